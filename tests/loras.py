"""Random LoRA files in the names of every trainer, with what they mean computed in torch, and models to put them on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import diffusers
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from safetensors.torch import save_file

from oracle import nchw, nhwc, normal
from stable_diffusion.lora.files import read_lora
from stable_diffusion.lora.layers import attach, fuse
from stable_diffusion.lora.names import write_keys
from stable_diffusion.weights.files import open_checkpoint
from stable_diffusion.weights.load import load_component

Tensors = dict[str, torch.Tensor]


@dataclass
class Model:
    """A diffusers pipeline and the same networks here."""

    family: str
    pipe: diffusers.DiffusionPipeline
    networks: dict[str, nn.Module]

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        return {name: getattr(self.pipe, name) for name in self.networks}

    def theirs(self) -> dict[str, np.ndarray]:
        """Outputs of every torch network."""
        with torch.no_grad():
            outputs = {"unet": nhwc(self.their_noise())}
            for name, module in self.modules.items():
                if name != "unet":
                    outputs[name] = module(torch.arange(20).reshape(2, 10)).last_hidden_state.numpy()
                    if name == "text_encoder_2":
                        outputs["pooled"] = module(torch.arange(20).reshape(2, 10)).text_embeds.numpy()
        return outputs

    def their_noise(self) -> torch.Tensor:
        """Output of the torch UNet, NCHW."""
        x, context, pooled = self._inputs()
        added = None
        if pooled is not None:
            added = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.full((2, 6), 64.0)}
        t = torch.tensor([3, 700])
        return self.pipe.unet(nchw(x), t, torch.from_numpy(context), added_cond_kwargs=added).sample

    def ours(self) -> dict[str, np.ndarray]:
        """Outputs of every network here, for the same inputs."""
        outputs = {"unet": self.our_noise()}
        for name, module in self.networks.items():
            if name != "unet":
                result = module(mx.arange(20).reshape(2, 10))
                outputs[name] = result.last_hidden_state
                if name == "text_encoder_2":
                    outputs["pooled"] = result.pooled_output
        return {name: np.array(value.astype(mx.float32)) for name, value in outputs.items()}

    @cached_property
    def unchanged(self) -> dict[str, np.ndarray]:
        """Outputs of every network here without a LoRA, for a model that is put back after each test."""
        return self.ours()

    def our_noise(self) -> mx.array:
        """Output of the UNet here, NHWC."""
        x, context, pooled = self._inputs()
        unet = self.networks["unet"]
        dtype = unet.conv_in.weight.dtype
        added = None if pooled is None else (mx.array(pooled).astype(dtype), mx.full((2, 6), 64.0))
        temb = unet.embed_time(mx.array([3, 700]), dtype, added)
        return unet(mx.array(x).astype(dtype), temb, mx.array(context).astype(dtype))

    def _inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        width = self.pipe.unet.config.cross_attention_dim
        return normal(2, 8, 6, 4), normal(2, 5, width, seed=1), normal(2, 32, seed=2) if self.family == "xl" else None


def load(folder: Path, family: str) -> Model:
    pipeline = diffusers.StableDiffusionXLPipeline if family == "xl" else diffusers.StableDiffusionPipeline
    parts = open_checkpoint(folder).components
    networks = {name: load_component(parts[name]) for name in parts if name != "vae"}
    return Model(family, pipeline.from_pretrained(folder), networks)


def layers(model: Model) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(network, path with the names of checkpoints, weight) of every matrix and every convolution."""
    for network, module in model.modules.items():
        for path, layer in module.named_modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                prefix = "text_model." if network != "unet" and path.startswith("encoder.") else ""
                yield network, prefix + path, layer.weight


# --- kinds: random factors, and the change that they stand for --------------------------------------------------------

RANK, ALPHA = 4, 3.0
# Kinds of changes, with the size of their factors: products of more factors need larger ones to show.
KINDS = {"lora": 0.1, "locon-tucker": 0.3, "loha": 0.3, "loha-tucker": 0.5}
KINDS |= {"lokr": 0.3, "lokr-factored": 0.3, "lokr-tucker": 0.5, "diff": 0.03}
_WITHOUT_CORE = {"locon-tucker": "lora", "loha-tucker": "loha", "lokr-tucker": "lokr-factored"}  # of matrices


def _shapes(kind: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The factors that trainers make of a kind for a weight [out, in, ...]."""
    (out, into), kernel = shape[:2], shape[2:]
    if kernel in ((), (1, 1)):
        kind = _WITHOUT_CORE.get(kind, kind)
    a, b = (2 if n % 2 == 0 else 1 for n in (out, into))  # of a Kronecker product
    c, d, positions, ones = out // a, into // b, int(np.prod(kernel)), (1,) * len(kernel)
    match kind:
        case "lora":
            return {"down": (RANK, into, *kernel), "up": (out, RANK, *ones)}
        case "locon-tucker":
            return {"down": (RANK, into, 1, 1), "mid": (RANK, RANK, *kernel), "up": (out, RANK, 1, 1)}
        case "loha":
            pair = {"a": (out, RANK), "b": (RANK, into * positions)}
            return {f"hada_w{i}_{side}": size for i in "12" for side, size in pair.items()}
        case "loha-tucker":
            factors = {"t{}": (RANK, RANK, *kernel), "w{}_a": (RANK, out), "w{}_b": (RANK, into)}
            return {f"hada_{role.format(i)}": size for i in "12" for role, size in factors.items()}
        case "lokr":
            return {"lokr_w1": (a, b), "lokr_w2": (c, d, *kernel)}
        case "lokr-factored":
            w1 = {"lokr_w1_a": (a, RANK), "lokr_w1_b": (RANK, b)}
            return w1 | {"lokr_w2_a": (c, RANK), "lokr_w2_b": (RANK, d * positions)}
        case "lokr-tucker":
            w1 = {"lokr_w1": (a, b), "lokr_t2": (RANK, RANK, *kernel)}
            return w1 | {"lokr_w2_a": (RANK, c), "lokr_w2_b": (RANK, d)}
        case _:
            return {"diff": shape}


def _combine(t: torch.Tensor, out: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """A kernel in Tucker form: t [r, r, kh, kw], out [r, out], into [r, in] -> [out, in, kh, kw]."""
    return torch.einsum("ijkl,jn->inkl", t, into).permute(1, 2, 3, 0).matmul(out).permute(3, 0, 1, 2).contiguous()


def meaning(factors: Tensors, shape: tuple[int, ...], alpha: float | None) -> torch.Tensor:
    """ΔW [out, in, ...], after LyCORIS, one row of its table after the other."""
    f = {role: factor.double() for role, factor in factors.items()}
    if "diff" in f:
        return f["diff"]
    if "mid" in f:
        delta, rank = _combine(f["mid"], f["up"].flatten(1).T, f["down"].flatten(1)), RANK
    elif "down" in f:
        delta, rank = f["up"].flatten(1) @ f["down"].flatten(1), RANK
    elif "hada_t1" in f:
        delta = _combine(f["hada_t1"], f["hada_w1_a"], f["hada_w1_b"])
        delta, rank = delta * _combine(f["hada_t2"], f["hada_w2_a"], f["hada_w2_b"]), RANK
    elif "hada_w1_a" in f:
        delta, rank = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"]), RANK
    else:
        w1 = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
        if "lokr_t2" in f:
            w2 = _combine(f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"])
        else:
            w2 = f["lokr_w2"] if "lokr_w2" in f else f["lokr_w2_a"] @ f["lokr_w2_b"]
        delta = torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2)
        rank = None if {"lokr_w1", "lokr_w2"} <= f.keys() else RANK
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    return scale * delta.reshape(shape)


@contextmanager
def added(changes: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """torch parameters with something added, for a while."""
    kept = [(parameter, parameter.detach().clone()) for parameter, _ in changes]
    with torch.no_grad():
        for parameter, change in changes:
            parameter += change
    yield
    with torch.no_grad():
        for parameter, before in kept:
            parameter.copy_(before)


def changed(model: Model, deltas: dict[tuple[str, str], torch.Tensor], scale: float = 1.0):
    """The torch networks with ``scale`` times ``deltas`` added to their weights, for a while."""
    weights = {(network, path): weight for network, path, weight in layers(model)}
    return added([(weights[key], scale * delta.float()) for key, delta in deltas.items()])


@contextmanager
def attached(model: Model, source: Path, scale: float = 1.0) -> Iterator[None]:
    """Our networks with a LoRA beside their weights, for a while."""
    lora = attach(model.networks, read_lora(source), scale)
    yield
    lora.detach()


@contextmanager
def fused(model: Model, *loras: tuple) -> Iterator[None]:
    """Our networks with LoRAs, each with its scale, in their weights, for a while."""
    before = {name: network.parameters() for name, network in model.networks.items()}
    fuse(model.networks, loras)
    yield
    for name, parameters in before.items():
        model.networks[name].update(parameters)


def through_diffusers(model: Model, path: Path, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Outputs of every torch network with a LoRA that diffusers reads."""
    model.pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="it")
    model.pipe.set_adapters("it", scale)
    try:
        return model.theirs()
    finally:
        model.pipe.unload_lora_weights()


# --- names: (network, path) -> a prefix, and how the roles are spelt --------------------------------------------------

_KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
_PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}
_OLD = {"down": "down.weight", "up": "up.weight"}
NAMES = {"kohya": _KOHYA, "kohya-sd1": _KOHYA, "kohya-original": _KOHYA}
NAMES |= {"peft": _PEFT, "processor": _OLD, "linear-layer": _OLD}
_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _prefix(names: str, network: str, path: str) -> str | None:
    """The name of a layer; None for one that has none: only projections of attention had processors."""
    if names.startswith("kohya"):
        encoder = "lora_te_" if names == "kohya-sd1" else "lora_te1_"
        prefixes = {"unet": "lora_unet_", "text_encoder": encoder, "text_encoder_2": "lora_te2_"}
        return prefixes[network] + path.replace(".", "_")
    block, _, projection = path.removesuffix(".0").rpartition(".")
    if names == "processor" and network == "unet":
        return f"unet.{block}.processor.{projection}_lora" if projection.startswith("to_") else None
    if names == "processor":
        return f"{network}.{block}.{_PROJECTIONS[projection]}_lora" if projection in _PROJECTIONS else None
    ending = {"peft": "", "linear-layer": ".lora" if network == "unet" else ".lora_linear_layer"}[names]
    return f"{network}.{path}{ending}"


def few(network: str, path: str) -> bool:
    """Whether a layer is one of some of every kind."""
    parts = ("attentions.1", "encoder.layers.1", "resnets.1.conv", "upsamplers")
    return path == "conv_in" or any(part in path for part in parts)


def make(
    model: Model,
    names: str = "kohya",
    kind: str = "lora",
    alpha: float | None = ALPHA,
    seed: int = 0,
    only: Callable[[str, str], bool] = few,
    dora: str | None = None,
) -> tuple[Tensors, dict[tuple[str, str], torch.Tensor]]:
    """A LoRA for every layer that ``only`` picks: (its tensors under ``names``, {(network, path): change of W}).

    ``dora`` adds lengths for the "rows" of the changed weights, or for their "columns".
    """
    roles, generator = NAMES[names], torch.Generator().manual_seed(seed)
    tensors, deltas, unet = {}, {}, [path for network, path, _ in layers(model) if network == "unet"]
    original = write_keys("kohya-xl", "unet", unet) if names == "kohya-original" else {}
    for network, path, weight in layers(model):
        prefix = original[path] if original and network == "unet" else _prefix(names, network, path)
        if prefix is None or not only(network, path):
            continue
        shapes = _shapes(kind, tuple(weight.shape))
        factors = {role: KINDS[kind] * torch.randn(size, generator=generator) for role, size in shapes.items()}
        tensors |= {f"{prefix}.{roles.get(role, role)}": value for role, value in factors.items()}
        if alpha is not None and kind != "diff":
            tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
        delta = meaning(factors, tuple(weight.shape), alpha)
        if dora is not None:
            along = [axis for axis in range(weight.ndim) if axis != ("rows", "columns").index(dora)]
            new = weight.detach().double() + delta
            norm = new.square().sum(dim=along, keepdim=True).sqrt()
            lengths = (norm * (1 + 0.2 * torch.randn(norm.shape, generator=generator))).float()
            tensors[f"{prefix}.{roles.get('dora_scale', 'dora_scale')}"] = lengths
            delta = lengths / norm * new - weight.detach()
        deltas[network, path] = delta.detach()
    return tensors, deltas


def write(folder: Path, tensors: Tensors, name: str = "lora.safetensors", metadata: dict | None = None) -> Path:
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, folder / name, metadata=metadata)
    return folder / name

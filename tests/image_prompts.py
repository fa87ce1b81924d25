"""Small random IP-Adapters in the layouts of the published files, and the image encoders that they read."""

import json
from pathlib import Path

import diffusers
import mlx.core as mx
import torch
from mlx.utils import tree_flatten
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from oracle import perturb
from stable_diffusion.weights.load import build

VISION = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 42, "patch_size": 14, "projection_dim": 80, "hidden_act": "gelu"}
KINDS = ("plain", "plus", "full-face")


def image_encoder(folder: Path | None = None, **values) -> CLIPVisionModelWithProjection:
    """A random image encoder, written to ``folder``; ``values`` are others of its config."""
    torch.manual_seed(5)
    model = perturb(CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION | values)), seed=5)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def write_vision(folder: Path, part: str) -> Path:
    """Write a random image encoder or safety checker, the latter with concepts that no picture comes near."""
    network = build(part, VISION)
    tensors = {n: v.transpose(0, 3, 1, 2) if v.ndim == 4 else v for n, v in tree_flatten(network.parameters())}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(VISION))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def _shapes(kind: str, d: int) -> dict[str, tuple[int, ...]]:
    """The shapes of ``image_proj`` for tokens ``d`` wide."""
    c, w, inner = VISION["hidden_size"], 48, 128
    if kind == "plain":
        e = VISION["projection_dim"]
        return {"proj.weight": (4 * d, e), "proj.bias": (4 * d,), "norm.weight": (d,), "norm.bias": (d,)}
    if kind == "full-face":
        first = {"proj.0.weight": (c, c), "proj.0.bias": (c,), "proj.2.weight": (d, c), "proj.2.bias": (d,)}
        return first | {"proj.3.weight": (d,), "proj.3.bias": (d,)}
    shapes = {"latents": (1, 5, w), "proj_in.weight": (w, c), "proj_in.bias": (w,)}
    shapes |= {"proj_out.weight": (d, w), "proj_out.bias": (d,), "norm_out.weight": (d,), "norm_out.bias": (d,)}
    for i in range(4):  # as diffusers has it, like the factor 4
        attention = {"to_q": (inner, w), "to_kv": (2 * inner, w), "to_out": (w, inner)}
        shapes |= {f"layers.{i}.0.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"layers.{i}.{n}.{p}": (w,) for n in ("0.norm1", "0.norm2", "1.0") for p in ("weight", "bias")}
        shapes |= {f"layers.{i}.1.1.weight": (4 * w, w), f"layers.{i}.1.3.weight": (w, 4 * w)}
    return shapes


def random_adapter(unet: diffusers.UNet2DConditionModel, kind: str, seed: int = 0) -> dict[str, dict]:
    """Return the tensors for a UNet as a ``.bin`` holds them: {"image_proj": {...}, "ip_adapter": {...}}."""
    generator = torch.Generator().manual_seed(seed)

    def random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        is_norm = len(shape) == 1 and name.endswith("weight")
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.3) + is_norm

    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    keys = [unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape for name in names]
    ips = {f"{2 * i + 1}.to_{x}_ip.weight": shape for i, shape in enumerate(keys) for x in "kv"}
    shapes = {"image_proj": _shapes(kind, keys[0][1]), "ip_adapter": ips}
    return {part: {name: random(name, shape) for name, shape in rows.items()} for part, rows in shapes.items()}


def flat(nested: dict[str, dict]) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": value for part, rows in nested.items() for name, value in rows.items()}


def write_adapter(path: Path, nested: dict[str, dict]) -> Path:
    """Write the tensors as a safetensors file or, by its suffix, one of torch's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(flat(nested), path)
    else:
        torch.save(nested, path)
    return path

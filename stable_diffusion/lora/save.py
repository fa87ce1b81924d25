"""Write an attached LoRA, trained or not, to a file that other programs read, and describe it in the header.

Keys that begin with "ss_" are those of kohya's scripts. AUTOMATIC1111's web UI reads the model family, the LoRA's name
and its tags from them. "modelspec." is the model metadata specification 1.0.1 of Stability AI. There are no dates: the
same training writes the same file.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..files.whole import new_file
from ..weights.formats.safetensors import write_safetensors
from ..weights.save import is_convolution
from .delta import LoRADelta, rank_of
from .layers import AttachedLoRA, wrapped_layers
from .names import ROLES, write_keys

_FAMILIES = {  # width of the encoded prompt, predicts v: names in kohya's scripts and in the specification
    (768, False): ("sd_v1", "stable-diffusion-v1"),
    (768, True): ("sd_v1_v", "stable-diffusion-v1"),
    (1024, False): ("sd_v2", "stable-diffusion-v2-512"),
    (1024, True): ("sd_v2_v", "stable-diffusion-v2-768-v"),
    (2048, False): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    (2048, True): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}


def write_lora(
    path: str | os.PathLike,
    networks: Mapping[str, nn.Module],
    lora: AttachedLoRA,
    *,
    naming: str = "kohya",
    dtype: mx.Dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the current factors of an attached LoRA. The file appears complete or not at all.

    Args:
        path: path of the .safetensors file.
        networks: the model's networks by name.
        naming: "kohya", or "peft" for the names of PEFT and diffusers. These names have no alpha, so "up" is
            multiplied by alpha / rank. They support only LoRA and DoRA.
        dtype: the type of the factors in the file. Default: unchanged.
        metadata: texts for the header of the file; PEFT's adapter settings are added.

    Raises ValueError for a kind of LoRA that PEFT's names do not support, and for a factor with values that are not
    finite or too large for ``dtype``.
    """
    unet = networks.get("unet")
    is_xl = "text_encoder_2" in networks or (unet is not None and unet.config.addition_embed_type == "text_time")
    table = "kohya-xl" if naming == "kohya" and is_xl else naming
    tensors: dict[str, mx.array] = {}
    ranks: dict[str, dict[str, int]] = {}
    for network, module in networks.items():
        names = write_keys(table, network, [name for name, _ in module.named_modules()])
        for name, layer in wrapped_layers(module):
            convolution = is_convolution(module, f"{name}.weight") or layer.weight.ndim == 4
            for delta in (delta for delta in layer.loras if delta.lora is lora):
                ranks.setdefault(network, {})[name] = rank_of(delta)
                for role, factor in _stored(delta, naming, convolution).items():
                    if role not in ROLES[naming]:
                        raise ValueError(f"{naming} has no name for {role} of {name}: choose the kohya naming")
                    stored = factor if dtype is None else factor.astype(dtype)
                    _check_finite(stored, factor, f"{network}.{name}")
                    tensors[f"{names[name]}.{ROLES[naming][role]}"] = stored
    texts = dict(metadata or {})
    if naming == "peft":
        texts["lora_adapter_metadata"] = json.dumps(_adapter_settings(ranks, tensors), sort_keys=True)
    with new_file(Path(os.path.expanduser(path))) as partial:
        write_safetensors(partial, sorted(tensors), tensors, texts)


def _check_finite(stored: mx.array, factor: mx.array, layer: str) -> None:
    if not mx.isfinite(stored).all().item():
        largest, kind = mx.abs(factor).max().item(), str(stored.dtype).removeprefix("mlx.core.")
        raise ValueError(
            f"the LoRA has values up to {largest:.3g} in {layer}, which {kind} cannot hold; its training diverged: "
            "choose a smaller learning rate"
        )


def _stored(delta: LoRADelta, naming: str, convolution: bool) -> dict[str, mx.array]:
    """Return the factors in the layout of files. 1×1 convolutions, which are Linears here, get kernel axes."""
    factors, rank = dict(delta), rank_of(delta)
    kernel = (1, 1) if convolution else ()
    for role in ("down", "up"):
        if role in factors and factors[role].ndim == 2:
            factors[role] = factors[role].reshape(*factors[role].shape, *kernel)
    m = factors.get("dora_scale")
    if m is not None and (m.ndim == 1 or m.shape[0] > 1):  # of rows
        peft = (1, -1, *kernel) if convolution else (-1,)
        factors["dora_scale"] = m.reshape(peft if naming == "peft" else (-1, 1, *kernel))
    elif m is not None and naming == "peft":
        raise ValueError(f"peft has no name for the column norms of {delta.name}: choose the kohya naming")
    if naming == "peft":
        return factors | {role: delta.multiplier * factors[role] for role in ("up", "bias") if role in factors}
    return factors if rank is None else factors | {"alpha": mx.array(delta.multiplier * rank)}


def _adapter_settings(ranks: Mapping[str, Mapping[str, int]], names: Mapping[str, Any]) -> dict[str, Any]:
    """Return diffusers' settings of PEFT adapters, {"unet.r": 16, ...}, in which alpha is the rank.

    Without them, diffusers before 0.42 uses the first layer's alpha for layers with other ranks.
    """
    settings: dict[str, Any] = {}
    for network, by_layer in ranks.items():
        layers = {name.removeprefix("text_model."): rank for name, rank in by_layer.items()}  # transformers 5 has none
        rank = Counter(layers.values()).most_common(1)[0][0]
        others = {name: other for name, other in layers.items() if other != rank}
        values = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others}
        own = [name for name in names if name.startswith(f"{network}.")]
        values |= {"target_modules": sorted(layers), "lora_bias": any(name.endswith("lora_B.bias") for name in own)}
        values["use_dora"] = any(name.endswith(ROLES["peft"]["dora_scale"]) for name in own)
        settings |= {f"{network}.{key}": value for key, value in values.items()}
    return settings


def describe(
    lora: AttachedLoRA | None,
    context_width: int,
    prediction: str,
    *,
    resolution: int,
    title: str,
    trigger: str | None = None,
    captions: Iterable[tuple[str, str]] = (),
) -> dict[str, str]:
    """Return the header texts of a LoRA with two factors per layer, or, for None, of a textual inversion.

    Args:
        context_width: width of the encoded prompt, which identifies the model family.
        prediction: the model's prediction type, "epsilon" or "v_prediction".
        resolution: side in pixels of a square with the area of the pictures.
        trigger: the trigger word for prompts.
        captions: (folder, caption) of each picture. Their comma-separated parts are counted as tags.
    """
    tags: dict[str, Counter[str]] = defaultdict(Counter)
    for folder, caption in captions:
        tags[folder].update(filter(None, (tag.strip().lower() for tag in caption.split(","))))
    is_v = prediction == "v_prediction"
    version, architecture = _FAMILIES.get((context_width, is_v), ("unknown", "unknown"))
    texts = ({} if lora is None else _network_texts(lora)) | {
        "ss_output_name": title,
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_tag_frequency": json.dumps({folder: dict(counts.most_common()) for folder, counts in tags.items()}),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{'textual-inversion' if lora is None else 'lora'}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if is_v else "epsilon",
    }
    return texts | ({"modelspec.trigger_phrase": trigger} if trigger else {})


def _network_texts(lora: AttachedLoRA) -> dict[str, str]:
    """Return texts that describe the factors: the UNet's ranks and alphas, and LyCORIS as the module of a DoRA."""
    deltas = [delta for delta in lora.deltas if delta.network == "unet"] or lora.deltas
    is_dora = any("dora_scale" in delta for delta in deltas)
    texts = {"ss_network_module": "lycoris.kohya" if is_dora else "networks.lora"}
    arguments = {"algo": "lora", "dora_wd": "True"} if is_dora else {}
    for target, kind, axes in ((texts, "ss_network", 2), (arguments, "conv", 4)):
        found = next((delta for delta in deltas if delta["down"].ndim == axes), None)
        if found is not None:
            rank = rank_of(found)
            target.update({f"{kind}_dim": str(rank), f"{kind}_alpha": f"{found.multiplier * rank:g}"})
    return texts | ({"ss_network_args": json.dumps(arguments)} if arguments else {})

"""Write an attached LoRA, trained or not, to a file that other programs read."""

import json
import os
from collections import Counter
from collections.abc import Mapping
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


def write_lora(
    path: str | os.PathLike,
    networks: Mapping[str, nn.Module],
    lora: AttachedLoRA,
    *,
    naming: str = "kohya",
    dtype: mx.Dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the factors of an attached LoRA as they are now; the file appears complete or not at all.

    The same factors and texts make the same bytes.

    Args:
        path: of the file, which ends in .safetensors.
        networks: those of the model that it is attached to, by name.
        naming: "kohya", or "peft" for the names of PEFT and diffusers. Those have no alpha, so "up" is multiplied by
            alpha / rank there, and no other kinds than LoRA and DoRA.
        dtype: the type of the factors in the file; None leaves it.
        metadata: texts for the header of the file; PEFT's settings of the adapter are added to them.

    Raises ValueError for a kind of change that PEFT's names cannot express, and for a factor with values that are not
    finite or too large for ``dtype``.
    """
    table = "kohya-xl" if naming == "kohya" and _is_xl(networks) else naming
    tensors: dict[str, mx.array] = {}
    ranks: dict[str, dict[str, int]] = {}
    for network, module in networks.items():
        names = write_keys(table, network, [name for name, _ in module.named_modules()])
        for name, layer in wrapped_layers(module):
            convolution = is_convolution(module, f"{name}.weight") or layer.weight.ndim == 4
            for delta in (delta for delta in layer.loras if delta.lora is lora):
                ranks.setdefault(network, {})[name] = rank_of(delta)
                for role, factor in _stored(delta, naming, convolution).items():
                    if role not in ROLES[table]:
                        raise ValueError(f"{naming} has no name for {role} of {name}: choose kohya's names")
                    stored = factor if dtype is None else factor.astype(dtype)
                    _check_finite(stored, factor, f"{network}.{name}")
                    tensors[f"{names[name]}.{ROLES[table][role]}"] = stored
    texts = dict(metadata or {})
    if naming == "peft":
        texts["lora_adapter_metadata"] = json.dumps(_adapter_settings(ranks, tensors), sort_keys=True)
    with new_file(Path(os.path.expanduser(path))) as partial:
        write_safetensors(partial, sorted(tensors), tensors, texts)


def _check_finite(stored: mx.array, factor: mx.array, layer: str) -> None:
    """Raise ValueError for a factor with values that its type in the file does not hold."""
    if not mx.isfinite(stored).all().item():
        largest, kind = mx.abs(factor).max().item(), str(stored.dtype).removeprefix("mlx.core.")
        raise ValueError(
            f"the LoRA has values up to {largest:.3g} in {layer}, which {kind} does not hold; its training diverged: "
            "choose a smaller learning rate"
        )


def _is_xl(networks: Mapping[str, nn.Module]) -> bool:
    unet = networks.get("unet")
    return "text_encoder_2" in networks or (unet is not None and unet.config.addition_embed_type == "text_time")


def _stored(delta: LoRADelta, naming: str, convolution: bool) -> dict[str, mx.array]:
    """Return the factors as files have them; those of 1×1 convolutions, which are Linears here, with a kernel."""
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
        raise ValueError(f"peft has no name for the lengths of columns of {delta.name}: choose kohya's names")
    if naming == "peft":
        return factors | {role: delta.multiplier * factors[role] for role in ("up", "bias") if role in factors}
    return factors if rank is None else factors | {"alpha": mx.array(delta.multiplier * rank)}


def _adapter_settings(ranks: Mapping[str, Mapping[str, int]], names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings from which diffusers makes PEFT's adapters, {"unet.r": 16, ...}: alpha is the rank.

    Without them diffusers before 0.42 takes the alpha of layers with different ranks from the first one.
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

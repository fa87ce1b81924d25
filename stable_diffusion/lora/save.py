"""Write an attached LoRA, trained or not, to a file that other programs read."""

import os
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

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

    Args:
        path: of the file, which ends in .safetensors.
        networks: all networks of the model that it is attached to.
        naming: "kohya", or "peft" for the names of PEFT and diffusers. Those have no alpha, so "up" is multiplied by
            alpha / rank there, and no other kinds than LoRA and DoRA.
        dtype: the type of the factors in the file; None leaves it.
        metadata: texts for the header of the file.

    Raises ValueError for a kind of change that PEFT's names cannot express.
    """
    table = "kohya-xl" if naming == "kohya" and "text_encoder_2" in networks else naming
    tensors: dict[str, mx.array] = {}
    for network, module in networks.items():
        names = write_keys(table, network, [name for name, _ in module.named_modules()])
        for name, layer in wrapped_layers(module):
            convolution = is_convolution(module, f"{name}.weight") or layer.weight.ndim == 4
            for delta in (delta for delta in layer.loras if delta.lora is lora):
                for role, factor in _stored(delta, naming, convolution).items():
                    if role not in ROLES[table]:
                        raise ValueError(f"{naming} has no name for {role} of {name}: choose kohya's names")
                    tensors[f"{names[name]}.{ROLES[table][role]}"] = factor if dtype is None else factor.astype(dtype)
    path = Path(os.path.expanduser(path))
    partial = path.with_name(f".{path.stem}.partial.safetensors")
    mx.save_safetensors(str(partial), tensors, {"format": "pt", **(metadata or {})})
    partial.replace(path)


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

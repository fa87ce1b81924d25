"""LoRAs: a file -> the change ΔW of each of a model's matrices, kept in factors (Hu et al. 2022, arXiv:2106.09685).

In matrices, with the kernels of convolutions as their further axes:

    LoRA     up @ down                        "mid" between them: a Tucker decomposition of the kernel (LoCon)
    LoHa     (w1_a @ w1_b) * (w2_a @ w2_b)    Hadamard product (Hyeon-Woo et al. 2022, arXiv:2108.06098)
    LoKr     w1 ⊗ w2                          Kronecker product, either of them perhaps a product itself
    diff     ΔW itself, of norms and biases too

times alpha / rank, all but diff (Yeh et al. 2024, arXiv:2309.14859, has the conventions). DoRA (Liu et al. 2024,
arXiv:2402.09353) then gives the rows of W + ΔW the lengths m, so that in all it changes W by m (W + ΔW) / |W + ΔW| - W.
At other scales than 1 it is this that is scaled: every LoRA is linear in its scale, and absent at 0.

Weights are in the layout of files here, [out, in] or [out, in, kh, kw], and float32. `adapters.py` has the models.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..weights import hub
from ..weights.files import Component, read_tensors
from ..weights.layout import SUFFIXES
from .names import read_key

# --- files ---------------------------------------------------------------------------------------------------------

_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers, of PEFT
_PEFT_CONFIG = "adapter_config.json"
_HUB_FILE = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<file>.+))?")


@dataclass(frozen=True, eq=False)
class Change:
    """How to change one layer: the factors of ΔW, lazy and as the file has them, and what their product is times."""

    network: str
    layer: str  # as the file writes it, with underscores
    factors: Mapping[str, mx.array]  # by role, see `lora_keys.read_key`
    multiplier: float

    @property
    def name(self) -> str:
        return f"{self.network}.{self.layer}"

    @property
    def of_weight(self) -> bool:
        """Whether it changes a weight; some change a bias alone."""
        return not self.factors.keys() <= {"alpha", "diff_b"}

    @property
    def of_bias(self) -> bool:
        return not self.factors.keys().isdisjoint({"bias", "diff_b"})


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA file, parsed: its changes, and the names in it that are none."""

    path: Path
    changes: tuple[Change, ...]
    unknown: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_lora(source: str | os.PathLike) -> Lora:
    """Read a LoRA; its tensors stay lazy.

    Args:
        source: a file, a folder as diffusers or PEFT save them, or a Hub id, ``owner/name`` or ``owner/name:file``.

    Raises:
        ValueError: the file is damaged, is no LoRA, or lacks a factor of a change.
        OSError: no such file, or it cannot be downloaded.
    """
    path = locate(source)
    tensors = read_tensors(Component("lora", {}, (path,)))
    metadata = mx.load(str(path), return_metadata=True)[1] if path.suffix == ".safetensors" else {}
    grouped: dict[tuple[str, str], dict[str, mx.array]] = {}
    unknown = []
    for name, tensor in sorted(tensors.items()):
        if key := read_key(name):
            *layer, role = key
            if tensor.size == 0 or (tensor.ndim == 0 and role != "alpha"):
                raise ValueError(f"{path} is damaged: its {name} has the shape {tensor.shape}")
            grouped.setdefault(tuple(layer), {})[role] = tensor
        else:
            unknown.append(name)
    if incomplete := [".".join(layer) for layer, factors in grouped.items() if not _is_complete(factors)]:
        raise ValueError(f"{path} lacks factors of its changes of {', '.join(incomplete)}")
    if not grouped:
        raise ValueError(f"{path} is not a LoRA: it holds {', '.join(unknown[:3]) or 'nothing'}")
    mx.eval([factors["alpha"] for factors in grouped.values() if "alpha" in factors])
    settings = _settings(path, metadata)
    changes = (Change(*layer, factors, _multiplier(*layer, factors, settings)) for layer, factors in grouped.items())
    return Lora(path, tuple(changes), tuple(unknown), metadata)


def locate(source: str | os.PathLike) -> Path:
    """The file of a LoRA, see :func:`read_lora`; from the Hub it comes into the cache, once."""
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if found := next((path / file for file in _FILES if (path / file).is_file()), None):
            return found
        raise ValueError(f"{name} holds no LoRA: it has no {' or '.join(_FILES)}; give the path of a file")
    named = _HUB_FILE.fullmatch(name)
    if named is None or (named["file"] is None and path.suffix in SUFFIXES):
        raise FileNotFoundError(f"there is no LoRA at {name}; give a file, a folder, or a Hub id as owner/name:file")
    files = _FILES if named["file"] is None else (named["file"],)
    want = hub.Want("a LoRA", files, _lacking, "connect once, or give a local file")
    folder = hub.fetch((named["repo"],), want)[1]
    return next(folder / file for file in files if (folder / file).is_file())


def find_in(folder: str | os.PathLike, name: str) -> Path:
    """The file of a LoRA in a folder, by its name with or without the suffix; ValueError where there is none."""
    found = [path for path in sorted(Path(folder).expanduser().glob("*")) if name in (path.name, path.stem)]
    if not found:
        raise ValueError(f"there is no LoRA {name} in {folder}; write the name of a file there, as in <lora:name:0.8>")
    return found[0]


def _lacking(folder: Path, names: set[str], repo: str) -> list[str]:
    return [_PEFT_CONFIG] if _PEFT_CONFIG in names and not (folder / _PEFT_CONFIG).is_file() else []


def _is_complete(factors: Mapping[str, mx.array]) -> bool:
    """Whether there is all that some kind of change needs."""

    def has(*roles: str) -> bool:
        return all(role in factors for role in roles)

    def lokr(name: str) -> bool:
        return has(name) or has(f"{name}_a", f"{name}_b")

    if factors.keys() <= {"alpha", "diff_b"}:
        return has("diff_b")
    hada = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return has("down", "up") or has(*hada) or (lokr("lokr_w1") and lokr("lokr_w2")) or has("diff")


def _rank(factors: Mapping[str, mx.array]) -> int | None:
    """The rank of a change; None where it has none (diff, and LoKr of two whole matrices)."""
    for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in factors:
            return factors[role].shape[0]
    return None


def _settings(path: Path, metadata: Mapping[str, str]) -> dict:
    """What diffusers notes in a file, and PEFT beside it, of how it was trained: {"unet.lora_alpha": 8, ...}."""
    beside = path.with_name(_PEFT_CONFIG)
    try:
        if path.name == _FILES[1] and beside.is_file():
            settings = json.loads(beside.read_text(encoding="utf-8"))
        else:
            settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise ValueError(f"the settings of the LoRA {path} are not valid JSON: {error}") from error
    return settings if isinstance(settings, dict) else {}


def _multiplier(network: str, layer: str, factors: Mapping[str, mx.array], settings: Mapping) -> float:
    """alpha / rank. Where the file has no alpha it is in the settings, or equals the rank."""
    rank = _rank(factors)
    if rank is None:
        return 1.0

    def setting(key: str) -> Any:
        return settings.get(f"{network}.{key}", settings.get(key))

    if "alpha" in factors:
        alpha = factors["alpha"].item() if factors["alpha"].size == 1 else math.nan
    else:
        alpha = setting("lora_alpha")
        for pattern, value in (setting("alpha_pattern") or {}).items():
            flat = pattern.strip("^$").replace(".", "_")
            alpha = value if layer == flat or layer.endswith(f"_{flat}") else alpha
    multiplier = 1.0 if alpha is None else alpha / (math.sqrt(rank) if setting("use_rslora") else rank)
    if not math.isfinite(multiplier):
        raise ValueError(f"the LoRA has alpha {alpha} for {network}.{layer}, which is no number")
    return multiplier


# --- changes -------------------------------------------------------------------------------------------------------


def delta(change: Change, shape: tuple[int, ...]) -> mx.array:
    """ΔW, of a layer whose weight has ``shape``; without DoRA's rescaling.

    Raises ValueError where the factors do not give this shape.
    """
    f = {role: factor.astype(mx.float32) for role, factor in change.factors.items()}
    try:
        if "diff" in f:
            value = f["diff"]
        elif "up" in f:
            value = _product(f["up"], f["down"], f.get("mid"))
        elif "hada_w1_a" in f:
            value = _hada(f, "1") * _hada(f, "2")
        else:
            value = _kronecker(_lokr(f, "1"), _lokr(f, "2"))
    except (ValueError, IndexError) as error:
        raise ValueError(f"{change.name}: its factors do not fit each other") from error
    if value.ndim == 4 and len(shape) == 2 and value.shape[2:] == (1, 1):
        value = value.reshape(value.shape[:2])
    elif value.ndim == 2 and value.shape == (shape[0], math.prod(shape[1:])):
        value = value.reshape(shape)
    if value.shape != shape:
        raise ValueError(f"{change.name} {value.shape} instead of {shape}")
    return change.multiplier * value


def bias_delta(change: Change) -> mx.array:
    """What a change at scale 1 adds to a layer's bias: that of "up" goes with its product, "diff_b" is whole."""
    times = {"bias": change.multiplier, "diff_b": 1.0}
    return sum(times[role] * change.factors[role].astype(mx.float32) for role in times if role in change.factors)


def _product(up: mx.array, down: mx.array, mid: mx.array | None) -> mx.array:
    """[out, r] and [r, in], each perhaps with a kernel -> [out, in] or [out, in, kh, kw]."""
    if mid is not None:
        return mx.einsum("oi,ijkl,jn->onkl", up.reshape(up.shape[0], -1), mid, down.reshape(down.shape[0], -1))
    product = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
    return product.reshape(-1, *down.shape[1:])


def _hada(f: Mapping[str, mx.array], part: str) -> mx.array:
    a, b, t = f[f"hada_w{part}_a"], f[f"hada_w{part}_b"], f.get(f"hada_t{part}")
    return a @ b if t is None else mx.einsum("ijkl,jn,io->onkl", t, b, a)


def _lokr(f: Mapping[str, mx.array], part: str) -> mx.array:
    name = f"lokr_w{part}"
    if name in f:
        return f[name]
    a, b, t = f[f"{name}_a"], f[f"{name}_b"], f.get(f"lokr_t{part}")
    return a @ b if t is None else mx.einsum("ijkl,io,jn->onkl", t, a, b)


def _kronecker(w1: mx.array, w2: mx.array) -> mx.array:
    """[a, b] and [c, d, ...] -> [a c, b d, ...]; what a matrix w2 has of a kernel is flat in its d."""
    (a, b), (c, d, *kernel) = w1.shape, w2.shape
    product = w1.reshape(a, 1, b, 1, 1) * w2.reshape(1, c, 1, d, -1)
    return product.reshape(a * c, b * d, *kernel)


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight."""
    shape = layer.weight.shape
    if isinstance(layer, nn.QuantizedLinear):
        return (shape[0], shape[1] * 32 // layer.bits)
    return (shape[0], shape[3], shape[1], shape[2]) if len(shape) == 4 else shape


def weight_of(layer: nn.Module) -> mx.array:
    """A layer's weight; of a quantized layer what it stands for."""
    weight = layer.weight
    if isinstance(layer, nn.QuantizedLinear):
        groups = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        weight = mx.dequantize(weight, layer.scales, layer.get("biases"), **groups)
    return (weight.transpose(0, 3, 1, 2) if weight.ndim == 4 else weight).astype(mx.float32)


def laid_out(value: mx.array) -> mx.array:
    """From the layout of files to that of layers."""
    return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value


def gain(change: Change, layer: nn.Module) -> mx.array | None:
    """DoRA's m / |W + ΔW|, or None: [out, 1, ...] for the rows, or [1, in, ...] for the columns as older files have it.

    Raises ValueError where the file's m fits neither.
    """
    role = next((role for role in ("dora_scale", "lora_magnitude_vector") if role in change.factors), None)
    if role is None:
        return None
    m, shape = change.factors[role].astype(mx.float32), shape_of(layer)
    if len(shape) < 2:
        raise ValueError(f"{change.name} {role} for a weight of {shape}")
    columns = role == "dora_scale" and m.ndim > 1 and m.shape[0] == 1 and m.size == shape[1]
    if not columns and m.size != shape[0]:
        raise ValueError(f"{change.name} {role} {m.shape} for a weight of {shape}")
    summed = [axis for axis in range(len(shape)) if axis != (1 if columns else 0)]
    norm = mx.sqrt(mx.square(weight_of(layer) + delta(change, shape)).sum(axis=summed, keepdims=True))
    return m.reshape(norm.shape) / norm


def whole_delta(change: Change, layer: nn.Module) -> mx.array:
    """All that a change at scale 1 adds to a layer's weight, DoRA's rescaling included."""
    value, factor = delta(change, shape_of(layer)), gain(change, layer)
    if factor is None:
        return value
    weight = weight_of(layer)
    return factor * (weight + value) - weight

"""Hold all code that is specific to a GPU, where reading and writing a map takes longer than elementwise operations.

A function under ``mx.compile`` is one kernel, which reads each input and writes the result once. So biases and sums
are part of a kernel that reads the map anyway.
"""

from collections.abc import Sequence
from copy import copy

import mlx.core as mx
import mlx.nn as nn

# Head widths for which Metal has a fused attention kernel, and prefers it (MLX 0.32).
FUSED = (64, 72, 80, 96, 128)


def is_default() -> bool:
    """Return whether a GPU is the default device."""
    return mx.default_device() != mx.cpu


@mx.compile
def _shifted(x: mx.array, *shifts: mx.array) -> mx.array:
    """Compute x + Σ shifts, contiguous for any strides of ``x``."""
    return x + sum(shifts)


@mx.compile
def affine(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Compute x * weight + bias in float32, in the type of x."""
    return (x.astype(mx.float32) * weight + bias).astype(x.dtype)


@mx.compile
def affine_silu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Compute SiLU of x * weight + bias in float32, in the type of x."""
    y = x.astype(mx.float32) * weight + bias
    return (y * mx.sigmoid(y)).astype(x.dtype)


@mx.compile
def biased_sum(x: mx.array, bias: mx.array, residual: mx.array) -> mx.array:
    """Compute x + bias + residual."""
    return x + bias + residual


@mx.compile
def geglu(x: mx.array, gate: mx.array) -> mx.array:
    """Compute x * GELU(gate) (Shazeer 2020)."""
    return x * nn.gelu(gate)


def group_norm(x: mx.array, groups: int, eps: float, shifts: Sequence[mx.array] = ()) -> mx.array:
    """Normalize the groups of channels of ``x`` [B, H, W, C] + Σ ``shifts``: -> [B, H * W, groups, C / groups].

    A shift is [C], or [1 or B, C]. A group becomes one row, in the copy that adds the shifts. MLX's kernel
    for layer norms computes in float32 and subtracts the mean first. The result is a view for the next kernel.
    """
    b, h, w, c = x.shape
    y = x.reshape(b, h * w, groups, c // groups).transpose(0, 2, 1, 3)
    if shifts:
        y = _shifted(y, *(shift.reshape(-1, groups, 1, c // groups) for shift in shifts))
    rows = mx.fast.layer_norm(y.reshape(b, groups, -1), None, None, eps)
    return rows.reshape(y.shape).transpose(0, 2, 1, 3)


def fused_width(dim: int) -> int:
    """Return the width to which heads of ``dim`` are padded; ``dim`` without a fused kernel."""
    return next((fused for fused in FUSED if fused >= dim), dim)


def is_fused(dim: int) -> bool:
    """Return whether one kernel computes attention for heads of ``dim``, with scores in float32 for any type.

    On a GPU this holds for any number of queries up to a width of 64; some wider heads need more than eight queries.
    """
    return is_default() and dim <= FUSED[0]


def attention(q: mx.array, k: mx.array, v: mx.array, dim: int | None = None) -> mx.array:
    """Pad heads with zeros to the width of a fused kernel: scores do not change, and the extra columns are cut off.

    ``dim`` is the width of heads that are padded already; they stay padded.
    """
    own = q.shape[-1]
    width = fused_width(own)
    if width > own:
        q, k, v = (mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, width - own)]) for x in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=(dim or own) ** -0.5)[..., :own]


class Joined:
    """Compute products of an attention's layers as one, with heads padded to the width of a fused kernel.

    Parameters become views of joined ones, which take more memory only for padded heads. The joined product is used
    only while the layers have these parameters: changed layers, or layers with a LoRA, compute separately.
    """

    def __init__(self) -> None:
        # The layer that computes the product, and its parameters.
        self._entries: dict[tuple[str, ...], tuple[nn.Module, list[dict[str, mx.array]]]] = {}

    def add_rows(self, names: tuple[str, ...], layers: Sequence[nn.Module], heads: int) -> None:
        """Join ``layers`` with the same input, also quantized ones: each row is quantized separately."""
        own, first = [_parameters(layer) for layer in layers], layers[0]
        kinds = {tuple((key, p.shape, p.dtype) for key, p in parameters.items()) for parameters in own}
        kinds |= {(type(layer), *(getattr(layer, key, None) for key in _QUANTIZATION)) for layer in layers}
        dim = len(first.weight) // heads
        width = fused_width(dim)
        if len(kinds) > 2 or not isinstance(first, (nn.Linear, nn.QuantizedLinear)) or (width == dim and len(own) == 1):
            return
        joined = {}
        for key in own[0]:
            joined[key] = mx.concatenate([_widen(parameters[key], heads, width) for parameters in own])
            if width == dim:
                for layer, view in zip(layers, mx.split(joined[key], len(layers)), strict=True):
                    layer[key] = view
        self._entries[names] = copy(first).update(joined), [_parameters(layer) for layer in layers]

    def add_columns(self, layer: nn.Module, heads: int) -> None:
        """Let ``layer`` accept padded heads, with columns of zeros. Quantized layers are unchanged."""
        dim = layer.weight.shape[-1] // heads
        width = fused_width(dim)
        if isinstance(layer, nn.Linear) and width > dim:
            weight = _widen(layer.weight, heads, width, axis=1)
            self._entries["out",] = copy(layer).update({"weight": weight}), [_parameters(layer)]

    def rows(self, names: tuple[str, ...], layers: Sequence[nn.Module], x: mx.array) -> list[mx.array]:
        """Compute the product of ``x`` with each of the layers, with padded heads if they were added so."""
        joined = self._find(names, layers)
        return [layer(x) for layer in layers] if joined is None else mx.split(joined(x), len(layers), axis=-1)

    def out(self, layer: nn.Module, x: mx.array, dim: int) -> mx.array:
        """Compute the product of ``layer`` and heads [B, N, heads, ``dim`` or more], padded with zeros."""
        if x.shape[-1] > dim:
            widened = self._find(("out",), [layer])
            x, layer = (x[..., :dim], layer) if widened is None else (x, widened)
        return layer(x.flatten(2))

    def _find(self, names: tuple[str, ...], layers: Sequence[nn.Module]) -> nn.Module | None:
        """Return the joined layer of ``layers``, and drop it if their parameters have changed."""
        if names not in self._entries or not is_default():
            return None
        joined, own = self._entries[names]
        for layer, parameters in zip(layers, own, strict=True):
            now = _parameters(layer.get("base", layer))
            if now.keys() != parameters.keys() or any(now[key] is not p for key, p in parameters.items()):
                self._entries.pop(names, None)
                return None
        return joined if all("base" not in layer or layer.is_idle for layer in layers) else None


_QUANTIZATION = ("group_size", "bits", "mode")


def _parameters(layer: nn.Module) -> dict[str, mx.array]:
    return {key: value for key, value in layer.items() if isinstance(value, mx.array)}


def _widen(x: mx.array, heads: int, width: int, axis: int = 0) -> mx.array:
    """Pad each head with zeros along an axis: heads * D -> heads * width."""
    x = x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :])
    pads = [(0, 0)] * x.ndim
    pads[axis + 1] = (0, width - x.shape[axis + 1])
    return mx.pad(x, pads).flatten(axis, axis + 1)


def join(network: nn.Module) -> None:
    """Let each attention of ``network`` compute products of one input together, on a GPU as default device."""
    if is_default():
        for module in network.modules():
            if hasattr(module, "join"):
                module.join()

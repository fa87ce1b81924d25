"""Compute the change ΔW of a layer from its factors in a LoRA file (Hu et al. 2022, arXiv:2106.09685).

In matrices, with the kernels of convolutions as their further axes:

    LoRA     up @ down                        "mid" between them: a Tucker decomposition of the kernel (LoCon)
    LoHa     (w1_a @ w1_b) * (w2_a @ w2_b)    Hadamard product (Hyeon-Woo et al. 2022, arXiv:2108.06098)
    LoKr     w1 ⊗ w2                          Kronecker product; w1 and w2 may be products themselves
    diff     ΔW itself, of norms and biases too

All except diff are multiplied by alpha / rank (conventions: Yeh et al. 2024, arXiv:2309.14859), and by the scale s of
the LoRA. DoRA (Liu et al. 2024, arXiv:2402.09353) gives the rows of W + ΔW the norms m. The programs that write the
files apply s by two rules, which are equal at 1; at 0 a LoRA has no effect:

    lora_magnitude_vector    m (W + s ΔW) / |W + s ΔW| - W        PEFT and diffusers
    dora_scale               s (m (W + ΔW) / |W + ΔW| - W)        ComfyUI and AUTOMATIC1111's web UI, for kohya's files
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Scale = float | tuple[float, float]  # of all networks, or of (text encoders, UNet)


def scale_of(scale: Scale, network: str) -> float:
    """Return a LoRA's scale in a network."""
    return scale[network == "unet"] if isinstance(scale, tuple) else scale


def is_complete(roles: Iterable[str]) -> bool:
    """Return whether these are all factors of a change: of one kind, or only of a bias."""
    bases = set(roles) - {"alpha"}
    bases |= {role.removesuffix("_a") for role in bases if role.endswith("_a") and f"{role[:-1]}b" in bases}
    kinds = ({"down", "up"}, {"hada_w1", "hada_w2"}, {"lokr_w1", "lokr_w2"}, {"diff"})
    return bases == {"diff_b"} or any(kind <= bases for kind in kinds)


def rank_of(factors: Mapping[str, mx.array]) -> int | None:
    """Return the rank of a change; None for diff, and for a LoKr of two full matrices."""
    roles = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((factors[role].shape[0] for role in roles if role in factors), None)


class LoRADelta(nn.Module):
    """Hold the factors of one layer's change as parameters.

    The factors have the roles of ``names.read_key`` and the layout of files, [out, in] or [out, in, kh, kw]. PEFT's
    norms "dora_scale" have one axis. ``multiplier`` is alpha / rank, ``layer`` the layer's name in the file with
    underscores, ``lora`` the attached LoRA, which has the ``scale``.
    """

    def __init__(
        self, network: str, layer: str, factors: Mapping[str, mx.array], multiplier: float = 1.0, lora: Any = None
    ):
        super().__init__()
        self.network, self.layer, self.multiplier, self.lora = network, layer, multiplier, lora
        self.name = f"{network}.{layer}"  # for messages
        for role, factor in factors.items():
            self[role] = factor

    def delta(self, layer: nn.Module, scale: float = 1.0) -> dict[str, mx.array]:
        """Return what to add to a layer's "weight" and "bias" at a scale: lazy, float32, in the layout of the layer.

        Raises ValueError if the factors do not fit each other or the layer.
        """
        changes = {}
        if self.keys() != {"diff_b"}:
            change, m = to_layer(self._product(shape_of(layer))), self.get("dora_scale")
            if m is not None:
                weight = weight_of(layer)
                change = self._rescale(weight + (scale * change if m.ndim == 1 else change)) - weight
            changes["weight"] = change if m is not None and m.ndim == 1 else scale * change
        for role, multiplier in (("bias", self.multiplier), ("diff_b", 1.0)):  # beside "up", and by itself
            if role in self:
                shape = layer.bias.shape if "bias" in layer else None
                if self[role].shape != shape:
                    raise ValueError(f"{self.name} {role} {self[role].shape} instead of {shape}")
                changes["bias"] = changes.get("bias", 0) + scale * (multiplier * self[role].astype(mx.float32))
        return changes

    def _rescale(self, weight: mx.array) -> mx.array:
        """Give the rows of W + ΔW [out, ..., in], or in older files the columns, DoRA's norms m."""
        m, shape = self["dora_scale"].astype(mx.float32), weight.shape
        columns = m.ndim > 1 and m.shape[0] == 1 and m.size == shape[-1]
        if weight.ndim < 2 or (not columns and m.size != shape[0]):
            raise ValueError(f"{self.name} dora_scale {m.shape} for a weight of {shape}")
        axes = range(weight.ndim - 1) if columns else range(1, weight.ndim)
        norm = mx.sqrt(mx.square(weight).sum(axis=tuple(axes), keepdims=True))
        return m.reshape(norm.shape) / mx.stop_gradient(norm) * weight  # a constant for gradients: sec. 4.3

    def _product(self, shape: tuple[int, ...]) -> mx.array:
        f = {role: factor.astype(mx.float32) for role, factor in self.items()}
        try:
            if "diff" in f:
                change = f["diff"]
            elif "up" in f:
                up, down = (f[role].reshape(len(f[role]), -1) for role in ("up", "down"))
                kernel = f["down"].shape[1:]
                change = _factored(up.T, down, f["mid"]) if "mid" in f else (up @ down).reshape(-1, *kernel)
            elif "hada_w1_a" in f:
                change = _matrix(f, "hada", 1) * _matrix(f, "hada", 2)
            else:
                w1, w2 = _matrix(f, "lokr", 1), _matrix(f, "lokr", 2)
                change = mx.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2)
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{self.name}: the shapes of its factors do not match") from error
        if change.ndim == 4 and len(shape) == 2 and change.shape[2:] == (1, 1):
            change = change.reshape(change.shape[:2])
        elif change.ndim == 2 and change.shape == (shape[0], math.prod(shape[1:])):
            change = change.reshape(shape)
        if change.shape != shape:
            raise ValueError(f"{self.name} {change.shape} instead of {shape}")
        return self.multiplier * change


def _matrix(f: Mapping[str, mx.array], kind: str, i: int) -> mx.array:
    """Return w1 or w2, which is stored as one matrix, as two factors, or as two factors around a Tucker core."""
    w = f"{kind}_w{i}"
    return f[w] if w in f else _factored(f[f"{w}_a"], f[f"{w}_b"], f.get(f"{kind}_t{i}"))


def _factored(a: mx.array, b: mx.array, core: mx.array | None) -> mx.array:
    """Multiply [out, r] and [r, in] to a matrix, or [r, out] and [r, in] around a core [r, r, kh, kw] to a kernel."""
    return a @ b if core is None else mx.einsum("ijkl,io,jn->onkl", core, a, b)


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight in the layout of files; for a packed weight the unpacked shape."""
    shape = layer.weight.shape
    if isinstance(layer, nn.QuantizedLinear):
        return (shape[0], shape[1] * 32 // layer.bits)
    return (shape[0], shape[3], shape[1], shape[2]) if len(shape) == 4 else shape


def weight_of(layer: nn.Module) -> mx.array:
    """Return a layer's weight in the layer's layout, float32 and dequantized."""
    if isinstance(layer, nn.QuantizedLinear):
        groups = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **groups).astype(mx.float32)
    return layer.weight.astype(mx.float32)


def to_layer(weight: mx.array) -> mx.array:
    """Turn the layout of files, OIHW, into that of layers, OHWI."""
    return weight.transpose(0, 2, 3, 1) if weight.ndim == 4 else weight

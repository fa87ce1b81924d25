"""The work of a graph on Apple's GPUs: kernels, bytes, floating-point operations, and a model of the time.

The rules are those of MLX 0.32's Metal backend, as its sources have them; nothing was measured. Views cost nothing, and
their strides are followed: a kernel that needs its input in order takes a copy first. A kernel reads each input and
writes each output once. Convolutions are direct ones, or for large maps Winograd's (Lavin & Gray 2016), which MLX
takes where there is memory for them: fewer products, more bytes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .gpu_graph import Array, Graph, Node


@dataclass(frozen=True)
class Chip:
    """A GPU: operations per second at most, also of products in half precision, and bytes per second."""

    flops: float
    products: float
    bandwidth: float


# Cores, FLOP per core and clock, clock; a core has 128 lanes, which multiply and add once a clock, in float16 as in
# float32. Apple names the bandwidths, and 2.6 TFLOP/s for the M1. Cores and clocks of M1 and M2 Max are from
# github.com/philipturner/metal-benchmarks, the M4's clock from hmc-tech.com/gpu, the M5's from
# michaelstinkerings.org/apple-m5-gpu-roofline-analysis. The M5's neural accelerators take 1024 FLOP per core and clock
# (github.com/kavanaghpatrick/gpu-forge/issues/15); MLX has kernels for them for products and attention, in half
# precision or, where it is on, TF32, and none for convolutions.
CHIPS = {
    "M1": Chip(8 * 256 * 1.278e9, 8 * 256 * 1.278e9, 68e9),
    "M2 Max": Chip(38 * 256 * 1.398e9, 38 * 256 * 1.398e9, 400e9),
    "M4 Max": Chip(40 * 256 * 1.678e9, 40 * 256 * 1.678e9, 546e9),
    "M5": Chip(10 * 256 * 1.578e9, 10 * 1024 * 1.578e9, 153e9),
}
_REACHED = 0.7  # of the peak, by good kernels
_LAUNCH = 2e-6  # seconds from kernel to kernel


@dataclass(frozen=True)
class Kernel:
    """A kernel: the primitive that it is for, the bytes that it moves, and its floating-point operations.

    ``is_product`` is of products and attention in half precision.
    """

    name: str
    bytes: int
    flops: int = 0
    is_product: bool = False

    def seconds(self, chip: Chip) -> float:
        """Model the time by a roofline (Williams et al. 2009) and a constant."""
        peak = chip.products if self.is_product else chip.flops
        return max(self.flops / (_REACHED * peak), self.bytes / chip.bandwidth) + _LAUNCH


def kernels(graph: Graph, *, winograd: bool = False) -> list[Kernel]:
    """List the kernels of a graph, with Winograd's convolutions where MLX takes them, or only direct ones."""
    rules = _RULES | {"Convolution": _winograd} if winograd else _RULES
    arrays: dict[str, np.ndarray] = {}
    made: list[Kernel] = []
    for node in graph.nodes:
        inputs = [arrays.setdefault(entry[0], _in_order(entry)) for entry in node.inputs]
        launched, outputs = rules.get(node.name, _elementwise)(node, inputs, list(map(_in_order, node.outputs)))
        made += launched
        arrays.update(zip((name for name, *_ in node.outputs), outputs, strict=True))
    return made


def totals(graph: Graph) -> dict[str, Any]:
    """Sum up the kernels of a graph, also with Winograd's convolutions, and the bytes of the parameters it reads."""
    parameters = sum(_in_order(entry).nbytes for entry in graph.parameters)
    return _sums(kernels(graph)) | {"winograd": _sums(kernels(graph, winograd=True)), "parameters": parameters}


def _sums(found: Sequence[Kernel]) -> dict[str, Any]:
    """Their number, bytes and FLOPs, the seconds of each chip by the model, and (number, bytes) by kind."""
    kinds: dict[str, list[int]] = {}
    for kernel in found:
        kinds.setdefault(kernel.name, []).append(kernel.bytes)
    return {
        "kernels": len(found),
        "moved": sum(kernel.bytes for kernel in found),
        "flops": sum(kernel.flops for kernel in found),
        "model": {name: sum(kernel.seconds(chip) for kernel in found) for name, chip in CHIPS.items()},
        "kinds": {name: (len(sizes), sum(sizes)) for name, sizes in kinds.items()},
    }


# Arrays are NumPy's views of nothing, never read: NumPy knows the strides of views, and which reshape takes a copy.


def _in_order(array: Array) -> np.ndarray:
    _, shape, dtype = array
    strides = [dtype.size * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return as_strided(np.empty(1, f"V{dtype.size}"), shape, strides)


def _moved(*arrays: np.ndarray) -> int:
    """Bytes of arrays, of which what is broadcast counts once."""
    return sum(a.itemsize * math.prod(n for n, s in zip(a.shape, a.strides, strict=True) if s) for a in arrays)


def _is_in_order(a: np.ndarray) -> bool:
    return a.flags.c_contiguous


def _is_dense(a: np.ndarray) -> bool:
    """Whether the array has no gaps, in whatever order of its axes."""
    return _is_in_order(a.transpose(np.argsort(a.strides, kind="stable")[::-1]))


def _copies(*arrays: np.ndarray) -> list[Kernel]:
    return [Kernel("copy", _moved(a) + a.nbytes) for a in arrays]


Priced = tuple[list[Kernel], Sequence[np.ndarray]]  # its kernels, and its outputs as they lie in memory


def _elementwise(node: Node, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> Priced:
    """One kernel. Of one input, beside scalars, it keeps the order of the axes where that has no gaps."""
    launched = [Kernel(node.name, _moved(*inputs, *outputs))]
    maps = [a for a in inputs if any(a.strides)]
    if len(maps) == len(outputs) == 1 and maps[0].shape == outputs[0].shape and _is_dense(maps[0]):
        size = outputs[0].itemsize
        outputs = [as_strided(outputs[0], strides=[s // maps[0].itemsize * size for s in maps[0].strides])]
    return launched, outputs


def _view(node: Node, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> Priced:
    x, shape = inputs[0], outputs[0].shape
    match node.name:
        case "Transpose":
            return [], [x.transpose(node.arguments[0])]
        case "Broadcast":
            return [], [np.broadcast_to(x, shape)]
        case "Split":
            return [], [as_strided(x, out.shape, x.strides) for out in outputs]
        case "Slice":
            return [], [as_strided(x, shape, [s * step for s, step in zip(x.strides, node.arguments[2], strict=True)])]
        case "Depends":
            return [], inputs[: len(outputs)]
    try:
        return [], [x.reshape(shape, copy=False)]
    except ValueError:
        return _copies(x), outputs


def _convolution(node: Node, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> Priced:
    x, weight = inputs
    launched = [] if _is_in_order(x) else _copies(x)
    flops = 2 * outputs[0].size * math.prod(weight.shape[1:])
    work = Kernel(node.name, x.nbytes + _moved(weight, *outputs), flops)
    return [*launched, work], outputs


def _winograd(node: Node, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> Priced:
    """A convolution as ``dispatch_conv_2D_gpu`` chooses it, with the memory for all rows at once.

    Winograd's F(6 × 6, 3 × 3) transforms the weights and the tiles of 8 × 8 of a copy of the map with a border,
    multiplies 64 matrices, and transforms the result: 64 products in place of 9 × 36, and more memory.
    """
    x, weight, out = *inputs, *outputs
    stride, (b, h, w, c), o = node.arguments[0], x.shape, len(weight)
    large = b * h * w >= 4096 and c + o >= 256 and c % 32 == o % 32 == 0
    if not (large and weight.shape[1:3] == (3, 3) and list(stride) == [1, 1]):
        return _convolution(node, inputs, outputs)
    rows, columns = (math.ceil(n / 6) for n in out.shape[1:3])
    border = b * (6 * rows + 2) * (6 * columns + 2) * c * x.itemsize
    factor, tiles, product = (64 * n * x.itemsize for n in (c * o, b * rows * columns * c, b * rows * columns * o))
    moved = [_moved(weight) + factor, border, 2 * x.nbytes, border + tiles, product + out.nbytes]
    flops = 2 * 64 * b * rows * columns * c * o
    work = [*(Kernel("Winograd", size) for size in moved)]
    work.append(Kernel("Winograd", factor + tiles + product, flops, x.itemsize < 4))
    return [*([] if _is_in_order(x) else _copies(x)), *work], outputs


def _product(node: Node, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> Priced:
    """A product reads matrices that are transposed or cut; others are copied."""
    x, *_ = inputs
    factors = inputs[:1] if node.name == "QuantizedMatmul" else inputs[:2]
    launched = _copies(*(a for a in factors if a.itemsize not in a.strides[-2:]))
    work = Kernel(node.name, _moved(*inputs, *outputs), 2 * outputs[0].size * x.shape[-1], x.itemsize < 4)
    return [*launched, work], outputs


def _attention(node: Node, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> Priced:
    """All of attention, [B, heads, N, D]: it reads any strides, and writes the heads of a position side by side."""
    q, k, *_ = inputs
    _, heads, n, dim = q.shape
    strides = [q.itemsize * s for s in (heads * n * dim, dim, heads * dim, 1)]
    work = Kernel(node.name, _moved(*inputs, *outputs), 4 * q.size * k.shape[2], q.itemsize < 4)
    return [work], [as_strided(outputs[0], strides=strides)]


def _layer_norm(node: Node, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> Priced:
    """A norm of rows that follow each other, or else of a copy."""
    x = inputs[0]
    rows = x.strides[-1] == x.itemsize and (x.ndim == 1 or x.strides[-2] == x.shape[-1] * x.itemsize)
    launched = [] if rows and _is_dense(x) else _copies(x)
    work = Kernel(node.name, x.nbytes + _moved(*inputs[1:], *outputs))
    return [*launched, work], outputs if launched else [as_strided(outputs[0], strides=x.strides)]


def _pad(node: Node, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> Priced:
    """All of it is filled, and then a part overwritten."""
    return [Kernel(node.name, outputs[0].nbytes), *_copies(inputs[0])], outputs


def _concatenate(node: Node, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> Priced:
    return [Kernel(node.name, _moved(a) + a.nbytes) for a in inputs], outputs


def _gather(node: Node, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> Priced:
    """It reads no more of the table than it writes."""
    return [Kernel(node.name, outputs[0].nbytes + _moved(*inputs[1:], *outputs))], outputs


def _reduce(node: Node, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> Priced:
    """One kernel, or two where few sums have many terms each; the sums between them are small."""
    x, out = inputs[0], outputs[0]
    passes = 2 if out.size < 2**15 and x.size > 256 * out.size else 1
    return [Kernel(node.name, _moved(x, out)), *[Kernel(node.name, 0)] * (passes - 1)], outputs


_VIEWS = "Transpose Broadcast Split Slice ExpandDims Squeeze Unflatten Flatten Reshape Depends StopGradient"
_RULES: dict[str, Callable[[Node, list[np.ndarray], list[np.ndarray]], Priced]] = {
    **dict.fromkeys(_VIEWS.split(), _view),
    "Convolution": _convolution,
    **dict.fromkeys(("Matmul", "AddMM", "QuantizedMatmul"), _product),
    "attention": _attention,
    "layer_norm": _layer_norm,
    "Pad": _pad,
    "Concatenate": _concatenate,
    **dict.fromkeys(("Gather", "GatherAxis"), _gather),
    "Reduce": _reduce,
}

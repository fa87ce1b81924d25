"""How much memory a network will take, predicted from its graph before anything of it is computed.

The weights are known from the config: a module that is built but not filled knows the shapes and types of its arrays.
For all else the module is traced (nothing is evaluated), and MLX's evaluation is replayed on the sizes of the arrays:
the order in which it visits the graph, the buffers that it shares, reuses and lets go of, the room that its kernels
take beside their results, and how far it works ahead of the device. What a buffer needs is what MLX reports as peak
memory. The CPU's rules are tested against that: UNets come within 10 %, and take up to a third less where the scores
of attention decide, which are computed in place or not as the machine is busy. With the nodes in another order, or
without buffers taken over, they would be 30 to 60 % off. Text encoders, whose buffers are small beside their weights,
take up to three tenths less. Metal's rules are read from MLX's sources and not measured on a Mac.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

_WIDTH = 20  # of MLX's walk through the graph, breadth first up to here (MLX_BFS_MAX_WIDTH)
_TASKS = 10  # that MLX hands to a device before it waits
_RESHAPES = {"Reshape", "ExpandDims", "Squeeze", "Depends", "StopGradient", "Unflatten", "Flatten"}
_VIEWS = _RESHAPES - {"Reshape"} | {"Transpose", "Broadcast", "Split", "Slice", "AsStrided"}
# What has a buffer of its own whatever becomes of its inputs.
_NEVER_IN_PLACE = {"Concatenate", "Convolution", "Matmul", "AddMM", "QuantizedMatmul", "Reduce", "Gather", "GatherAxis"}
_NEVER_IN_PLACE |= {"Pad", "Arange", "RandomBits", "Scan", "Sort", "ArgReduce", "ArgSort", "Copy", "Reshape"}
_ELEMENTWISE = {"Abs", "Add", "AsType", "Broadcast", "Cos", "Divide", "Equal", "Erf", "Exp", "Greater", "Less", "Log"}
_ELEMENTWISE |= {"LogicalAnd", "LogicalNot", "Maximum", "Minimum", "Multiply", "Negative", "Power", "Rsqrt", "Select"}
_ELEMENTWISE |= {"Sigmoid", "Sin", "Sqrt", "Square", "Subtract", "Tanh"}


@dataclass(frozen=True)
class Backend:
    """How a device evaluates a graph: what it counts as one of its tasks, and its temporary buffers.

    A task ends after ``calls`` kernels or, on Metal, once its arrays add up to ``bytes``.
    """

    name: str
    calls: int
    bytes: float
    fused: frozenset[int]  # widths of attention heads for which the scores are never in memory


CPU = Backend("CPU", 10, math.inf, frozenset())
METAL = Backend("Metal", 40, 40 * 2**20, frozenset((64, 72, 80, 96, 128)))


@dataclass(eq=False)
class _Buffer:
    size: int
    users: int = 0


@dataclass(eq=False)
class _Array:
    shape: tuple[int, ...]
    dtype: mx.Dtype
    node: "_Node | None" = None
    uses: int = 0  # by what is not computed yet
    contiguous: bool = True
    fused: bool = False
    buffer: _Buffer | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.fused else math.prod(self.shape) * self.dtype.size


@dataclass(eq=False)
class _Node:
    name: str
    inputs: list[_Array]
    outputs: list[_Array]
    arguments: list[Any] = field(default_factory=list)
    left: int = 0
    inside: bool = False  # of the kernel that computes its only user


def peak(
    network: nn.Module,
    call: Callable[..., Any],
    *inputs: tuple[tuple[int, ...], mx.Dtype],
    backend: Backend = CPU,
    limit: float = math.inf,
) -> int:
    """Bytes that ``call(*inputs)`` will take at its peak beside the weights of ``network``, which it runs.

    Args:
        network: a module, whose parameters may be lazy.
        inputs: the shape and type of each.
        limit: what is set by ``mx.set_memory_limit``, less the weights: beyond it MLX does not work ahead.
    """
    return _replay(_trace(network, call, inputs), backend, limit)


def _trace(
    network: nn.Module, call: Callable[..., Any], inputs: Sequence[tuple[tuple[int, ...], mx.Dtype]]
) -> tuple[list[_Node], list[_Array]]:
    """The graph of a call, and its results."""
    names, values = zip(*tree_flatten(network.parameters()), strict=True)
    said: list[dict] = []

    def run(*arrays: mx.array) -> Any:
        network.update(tree_unflatten(list(zip(names, arrays, strict=False))))
        return call(*arrays[len(names) :])

    try:
        mx.export_function(said.append, run, *values, *(mx.zeros(shape, dtype) for shape, dtype in inputs))
    finally:
        network.update(tree_unflatten(list(zip(names, values, strict=True))))
    arrays: dict[str, _Array] = {}

    def array(entry: tuple) -> _Array:
        return arrays.setdefault(entry[0], _Array(*entry[1:]))

    nodes, results = [], []
    for entry in said:
        if entry["type"] == "primitive":
            node = _Node(entry["name"], *([array(e) for e in entry[key]] for key in ("inputs", "outputs")))
            node.arguments = entry["arguments"]
            for output in node.outputs:
                output.node = node
            nodes.append(node)
        elif entry["type"] == "outputs":
            results = [array(e) for e in entry["outputs"]]
    return nodes, results


def _compiled(nodes: Sequence[_Node], results: Sequence[_Array]) -> None:
    """Make one node of each activation: MLX compiles it to one kernel, but shows the graph as it was written.

    An activation is elementwise work on one shape that reads some array twice. Other elementwise work is done in place,
    which takes as much memory, and only counts as one kernel. (The several kernels that MLX makes of a long activation
    take as much memory as one.)
    """
    users: dict[int, list[_Node]] = {}
    for node in nodes:
        for array in node.inputs:
            users.setdefault(id(array), []).append(node)
    end: dict[int, _Node] = {}  # of what a node is a part of
    parts: dict[int, list[_Node]] = {}
    kept = {id(array) for array in results}
    for node in reversed(nodes):
        if node.name not in _ELEMENTWISE:
            continue
        out = node.outputs[0]
        ends = {id(end.get(id(user), user)): end.get(id(user)) for user in users.get(id(out), [])}
        last = next(iter(ends.values())) if len(ends) == 1 and id(out) not in kept else None
        if last is None or (last.outputs[0].shape != out.shape and node.name != "Broadcast"):
            last = node
        end[id(node)] = last
        parts.setdefault(id(last), []).append(node)
    for members in parts.values():
        last, inside = members[0], {id(node.outputs[0]) for node in members}
        read = [array for node in members for array in node.inputs if array.shape == last.outputs[0].shape]
        if len({id(array) for array in read}) == len(read):
            for node in members[1:]:
                node.inside = True
            continue
        outside = {id(a): a for node in members for a in node.inputs if id(a) not in inside}
        last.outputs[0].node = _Node("Compiled", list(outside.values()), last.outputs)


def _order(results: Sequence[_Array]) -> list[_Node]:
    """The nodes in the order in which MLX computes them: that of its `eval_impl`, backwards from the results."""
    end = _Node("end", list(results), [])
    seen, stack = {id(end)}, [end]
    while stack:
        for array in stack.pop().inputs:
            if array.node is None:
                continue
            array.node.left += 1
            if id(array.node) not in seen:
                seen.add(id(array.node))
                stack.append(array.node)
    tape, held, at = [end], [], 0
    while at < len(tape) or held:
        if at < len(tape):
            node, first, at = tape[at], 0, at + 1
        else:
            node, first = held.pop()
        for i in range(first, len(node.inputs)):
            source = node.inputs[i].node
            if source is None or source.left == 0:
                continue
            if len(tape) - at >= _WIDTH:
                held.append((node, i))
                break
            source.left -= 1
            if source.left == 0:
                tape.append(source)
    return tape[:0:-1]


class _Memory:
    """What is in use, and what waits for the device to be done with it."""

    def __init__(self, backend: Backend, limit: float):
        self.backend, self.limit = backend, limit
        self.active = self.peak = 0
        self._tasks: deque[list[_Buffer]] = deque()
        self._open: list[_Buffer] = []
        self._calls, self._bytes = 0, 0

    def new(self, size: int) -> _Buffer:
        self.active += size
        self.peak = max(self.peak, self.active)
        return _Buffer(size)

    def hold(self, buffer: _Buffer | None) -> None:
        if buffer is not None:
            buffer.users += 1

    def drop(self, buffer: _Buffer | None) -> None:
        if buffer is None:
            return
        buffer.users -= 1
        if buffer.users == 0:
            self.active -= buffer.size

    @property
    def behind(self) -> bool:
        """Whether the device may have something to do. Compiled kernels, as measured, take over no buffer then."""
        return bool(self._tasks or self._open)

    def submit(self, buffers: Sequence[_Buffer], calls: int, size: int) -> None:
        """Hand a kernel to the device, which uses these buffers until it is done."""
        for buffer in buffers:
            self.hold(buffer)
        self._open += buffers
        self._calls += calls
        self._bytes += size
        if self._calls >= self.backend.calls or self._bytes > self.backend.bytes:
            self._calls, self._bytes = self._calls % self.backend.calls, 0
            self._tasks.append(self._open)
            self._open = []
        while len(self._tasks) > _TASKS or (self.active > self.limit and self._tasks):
            for buffer in self._tasks.popleft():
                self.drop(buffer)


def _replay(graph: tuple[list[_Node], list[_Array]], backend: Backend, limit: float) -> int:
    nodes, results = graph
    _compiled(nodes, results)
    _mark_fused(nodes, backend)
    order = _order(results)
    for array in (*(a for node in order for a in node.inputs), *results):
        array.uses += 1
    memory = _Memory(backend, limit)
    for node in order:
        temporaries = [memory.new(size) for size in _compute(node, memory, backend)]
        outputs = {id(array.buffer) for array in node.outputs}
        used = {id(a.buffer): a.buffer for a in node.inputs if a.buffer and id(a.buffer) not in outputs}
        calls = 0 if node.inside else 1 if node.name in _VIEWS else 2 + len(temporaries)
        size = sum(a.nbytes for a in (*node.inputs, *node.outputs))
        memory.submit([*used.values(), *temporaries], calls, size)
        for array in node.inputs:
            array.uses -= 1
            if array.uses == 0:
                memory.drop(array.buffer)
    return memory.peak


def _mark_fused(nodes: Sequence[_Node], backend: Backend) -> None:
    """The scores of attention, from the product that makes them to the one that uses them, where a kernel does it all.

    The graph is that of the CPU, which computes them one after the other.
    """
    users = {id(array): node for node in nodes for array in node.inputs}
    for node in nodes:
        user = users.get(id(node.outputs[0])) if node.name == "Softmax" else None
        if user is None or user.outputs[0].shape[-1] not in backend.fused:
            continue
        array = node.outputs[0]
        while array.node and math.prod(array.shape) == math.prod(node.outputs[0].shape):
            array.fused = True
            if array.node.name == "Matmul":
                break
            array = array.node.inputs[0]


def _compute(node: _Node, memory: _Memory, backend: Backend) -> list[int]:
    """Give the results of a node their buffers; returns the sizes of the temporary ones."""
    first = node.inputs[0] if node.inputs else None
    view = node.name in _VIEWS or (node.name == "Reshape" and first.contiguous)
    for array in node.outputs:
        if view:
            array.buffer, array.contiguous = first.buffer, _stays_contiguous(node, first, array)
        elif donor := None if node.name == "Compiled" and memory.behind else _donor(node, array):
            array.buffer = donor.buffer
        else:
            array.buffer = memory.new(array.nbytes)
        memory.hold(array.buffer)
    if node.name == "Convolution":
        return _of_convolution(node, backend)
    if node.name in ("Matmul", "QuantizedMatmul", "AddMM") and backend is CPU:
        return [a.nbytes for a in node.inputs[:2] if not a.contiguous and a.buffer is not None]
    return []


def _stays_contiguous(node: _Node, source: _Array, result: _Array) -> bool:
    if node.name in _RESHAPES:
        return source.contiguous
    # What is cut off at the first axis that is longer than 1 stays in one piece.
    longer = [i for i, side in enumerate(source.shape) if side > 1]
    if node.name in ("Split", "Slice") and longer:
        return source.contiguous and source.shape[longer[0] + 1 :] == result.shape[longer[0] + 1 :]
    return math.prod(source.shape) == math.prod(result.shape) and node.name == "Broadcast" and source.contiguous


def _donor(node: _Node, result: _Array) -> _Array | None:
    """An input whose buffer the result may take over: nothing else will read it."""
    if node.name in _NEVER_IN_PLACE:
        return None
    for array in node.inputs:
        own = array.buffer is not None and array.uses == 1 and array.buffer.users == 1
        if own and array.contiguous and array.nbytes == result.nbytes == array.buffer.size:
            return array
    return None


def _of_convolution(node: _Node, backend: Backend) -> list[int]:
    """Temporary buffers of a convolution, x [B, H, W, C] and weight [O, kh, kw, C] -> [B, h, w, O].

    The CPU pads x in float32 and unfolds it, so that each position has the kh × kw × C values under the kernel beside
    each other; what is not float32 is copied. Metal does large 3×3 convolutions by Winograd's scheme F(6, 3): x and
    the result are cut into tiles of 6 × 6, each of which takes 8 × 8 values while it is transformed.
    """
    x, weight = node.inputs
    out = node.outputs[0]
    b, h, w, c = x.shape
    outs, kh, kw, _ = weight.shape
    padding = node.arguments[1]
    if backend is CPU:
        padded = 4 * b * (h + 2 * padding[0]) * (w + 2 * padding[1]) * c
        unfolded = 4 * math.prod(out.shape[:3]) * kh * kw * c
        copies = [4 * math.prod(a.shape) for a in (weight, out) if a.dtype != mx.float32]
        return [padded, unfolded, *copies]
    large = (kh, kw) == (3, 3) and h == out.shape[1] and c % 32 == 0 and outs % 32 == 0 and b * h * w >= 4096
    if not large:
        return []
    tiles = b * -(-h // 6) * -(-w // 6)
    return [
        b * (h + 8) * (w + 8) * c * x.dtype.size,
        *(64 * n * x.dtype.size for n in (outs * c, tiles * c, tiles * outs)),
    ]

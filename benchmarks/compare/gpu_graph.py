"""The graph that MLX would run on a GPU, traced on any machine and not computed.

MLX takes other ways on a CPU: it spells out attention and norms, which a GPU has kernels for. So what is one kernel
there is traced as one node.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import Any

import mlx.core as mx

Array = tuple[str, tuple[int, ...], mx.Dtype]  # its name in the graph, shape and type

# Widths of heads for which MLX (0.32) chooses its fused kernel of attention, in scaled_dot_product_attention.cpp.
FUSED_WIDTHS = (64, 72, 80, 96, 128)
# What mx.compile makes one kernel of: is_fusable in compile.cpp.
_FUSABLE = """
Abs Add ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTan2 ArcTanh AsType BitwiseBinary BitwiseInvert Broadcast Ceil Conjugate
Cos Cosh Divide Equal Erf ErfInv Exp Expm1 Floor Greater GreaterEqual Imag Less LessEqual Log Log1p LogAddExp LogicalAnd
LogicalNot LogicalOr Maximum Minimum Multiply Negative NotEqual Power Real Remainder Round Select Sigmoid Sign Sin Sinh
Sqrt Square Subtract Tan Tanh
"""
_LAYOUT = ["Pad", "Concatenate", "Transpose", "Reshape", "Flatten", "Unflatten", "Split", "Contiguous"]
_fused: set[str] = set()  # functions that became one kernel, which others may call
_FIRST = 2**30  # the numbers that mark the nodes which stand for a kernel, from here on
_stand_ins: list[str] = []  # their names


@dataclass(frozen=True)
class Node:
    """A primitive of MLX, or a kernel that stands for several: then ``name`` is its own, and it has no arguments."""

    name: str
    arguments: Sequence[Any]
    inputs: Sequence[Array]
    outputs: Sequence[Array]


@dataclass(frozen=True)
class Graph:
    """The nodes that some outputs need, in the order of their computation, and the parameters that they read."""

    nodes: Sequence[Node]
    parameters: Sequence[Array]


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let functions choose their way of a GPU, and trace as one node what is one kernel there.

    What decorates functions is replaced for those that it decorates in the meantime: import networks within this
    context, in a process that has not imported them before.
    """
    stand_ins: dict[tuple[Any, str], Callable] = {
        (mx, "default_device"): lambda: mx.Device(mx.gpu),
        (mx, "compile"): _compile,
        (mx, "custom_function"): _without_gradients,
        (mx.fast, "layer_norm"): _layer_norm,
        (mx.fast, "scaled_dot_product_attention"): _attention,
    }
    before = {(module, name): getattr(module, name) for module, name in stand_ins}
    try:
        for (module, name), value in stand_ins.items():
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def trace(function: Callable[..., Any], *parameters: mx.array) -> Graph:
    """Trace ``function(*parameters)``, which gives an array or a list of arrays. Parameters may be lazy."""
    return _needed(_export(function, *parameters))


def trace_step(networks: Sequence[Any], step: Callable[[int], Any]) -> Graph:
    """Trace ``step(1)``, which gives arrays, without what ``step(0)`` has made for it, such as a prompt's keys.

    Parameters that are padded or put side by side count as laid out so while they were loaded.
    The ``networks`` are modules. Each step sees parameters of its own in them, or MLX would find in the trace that both
    compute the same. The networks are of no use afterwards.
    """
    from mlx.utils import tree_flatten, tree_unflatten  # imports mlx.nn, which compiles functions

    names, values = zip(*tree_flatten([network.parameters() for network in networks]), strict=True)

    def both(*arrays: mx.array) -> list[mx.array]:
        outputs = []
        for i in range(2):
            own = arrays[i * len(names) :]
            for network, tree in zip(networks, tree_unflatten(list(zip(names, own, strict=False))), strict=True):
                network.update(tree)
            outputs.append(step(i))
        counts.append(len(_flat(outputs[0])))
        return _flat(outputs)

    counts: list[int] = []
    said = _export(both, *values, *values)
    first, second = _needed(said, slice(counts[0])), _needed(said, slice(counts[0], None))
    made = {name for name, *_ in said.parameters[: len(names)]}  # and all that is computed from them
    for node in first.nodes:
        if made.intersection(name for name, *_ in node.inputs):
            made.update(name for name, *_ in node.outputs)
    laid = {name for name, *_ in said.parameters}  # and views and copies of them alone
    for node in second.nodes:
        inputs = node.inputs[:1] if node.name == "Pad" else node.inputs  # without the value that it is padded with
        if node.name in _LAYOUT and laid.issuperset(name for name, *_ in inputs):
            laid.update(name for name, *_ in node.outputs)
            made.update(name for name, *_ in node.outputs if node.name in ("Pad", "Concatenate"))
    nodes = [node for node in second.nodes if node.outputs[0][0] not in made]
    return Graph(nodes, [entry for entry in second.parameters if entry[0] not in made])


def _flat(outputs: Any) -> list[mx.array]:
    return [outputs] if isinstance(outputs, mx.array) else list(chain.from_iterable(map(_flat, outputs)))


@dataclass(frozen=True)
class _Trace:
    nodes: Sequence[Node]
    parameters: Sequence[Array]
    outputs: Sequence[str]


def _export(function: Callable[..., Any], *parameters: mx.array) -> _Trace:
    said: list[dict] = []
    shown = [mx.zeros(array.shape, array.dtype) for array in parameters]  # of which only shapes and types are used
    mx.export_function(said.append, lambda *arrays: _flat(function(*arrays)), *shown)
    constants = {name: value for entry in said for name, value in entry.get("constants", ())}
    nodes = [_node(entry, constants) for entry in said if entry["type"] == "primitive"]
    inputs, outputs = (
        [array for e in said if e["type"] == kind for array in e[kind]] for kind in ("inputs", "outputs")
    )
    return _Trace(nodes, inputs, [name for name, *_ in outputs])


def _node(entry: dict, constants: dict[str, mx.array]) -> Node:
    name, inputs, outputs = entry["name"], entry["inputs"], entry["outputs"]
    if name == "Depends":
        mark = constants.get(inputs[len(outputs)][0])
        if mark is not None and mark.ndim == 0 and 0 <= (number := int(mark.item()) - _FIRST) < len(_stand_ins):
            return Node(_stand_ins[number], (), inputs[len(outputs) + 1 :], outputs)
    return Node(name, entry["arguments"], inputs, outputs)


def _needed(said: _Trace, chosen: slice = slice(None)) -> Graph:
    """Leave out what the chosen outputs do not need, such as what was computed to know the shape of a kernel's."""
    wanted = set(said.outputs[chosen])
    nodes: list[Node] = []
    for node in reversed(said.nodes):
        if wanted.intersection(name for name, *_ in node.outputs):
            wanted.update(name for name, *_ in node.inputs)
            nodes.append(node)
    return Graph(nodes[::-1], [entry for entry in said.parameters if entry[0] in wanted])


def _kernel(name: str, inputs: Iterable[mx.array], outputs: Sequence[mx.array]) -> list[mx.array]:
    """Make arrays like ``outputs``, of one node with a name."""
    _stand_ins.append(name)
    mark = mx.array(_FIRST + len(_stand_ins) - 1)
    return mx.depends([mx.zeros(array.shape, array.dtype) for array in outputs], [mark, *inputs])


def _without_gradients(function: Callable) -> Callable:
    """In place of ``mx.custom_function``, whose primitive cannot be exported."""

    @wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        return function(*args, **keywords)

    call.vjp = call.jvp = call.vmap = lambda rule: rule
    return call


def _compile(function: Callable | None = None, *_: Any, **options: Any) -> Callable:
    """In place of ``mx.compile``: one kernel where all of a function becomes one, and else what it consists of."""
    if function is None:
        return _compile
    known: dict[tuple, bool] = {}

    @wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        outputs = function(*args, **keywords)
        arrays = [a for a in (*args, *keywords.values()) if isinstance(a, mx.array)]
        key = tuple((array.shape, array.dtype) for array in arrays)
        if key not in known:
            known[key] = _becomes_one(function, args, keywords)
        if not known[key]:
            return outputs
        _fused.add(function.__name__)
        made = _kernel(function.__name__, arrays, _flat(outputs))
        return made[0] if isinstance(outputs, mx.array) else tuple(made)

    return call


def _becomes_one(function: Callable, args: Sequence[Any], keywords: dict[str, Any]) -> bool:
    given = [*args, *keywords.values()]
    places = [i for i, value in enumerate(given) if isinstance(value, mx.array)]

    def run(*arrays: mx.array) -> Any:
        values = list(given)
        for i, array in zip(places, arrays, strict=True):
            values[i] = array
        return function(*values[: len(args)], **dict(zip(keywords, values[len(args) :], strict=True)))

    return {node.name for node in trace(run, *(given[i] for i in places)).nodes} <= {*_FUSABLE.split(), *_fused}


def _layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    return _kernel("layer_norm", [array for array in (x, weight, bias) if array is not None], [x])[0]


def _attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None = None, **_: Any
) -> mx.array:
    """Trace MLX's kernel for all of attention for the widths that have one, and the products and softmax for others."""
    masks = [mask] if isinstance(mask, mx.array) else []
    if q.shape[-1] in FUSED_WIDTHS:
        return _kernel("attention", [q, k, v, *masks], [q])[0]
    scores = sum(masks, (q * mx.array(scale, q.dtype)) @ k.swapaxes(-1, -2))
    return mx.softmax(scores, axis=-1, precise=True) @ v

"""Build modules from configs and tensors, strictly: every tensor must be used, and every parameter filled."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..models.config import listed, readable
from .files import Component, read_tensors
from .formats.safetensors import loading_stream
from .parts import PARTS
from .quantize import prepare_quantized

_READING = threading.Lock()


def read_weights(network: Any, on_layer: Callable[[int, int], None] = lambda number, total: None) -> None:
    """Read and quantize the lazy weights of a module, one layer and one thread at a time.

    ``on_layer`` is called with the number of layers read and the total. A function as network has no weights.
    """
    with _READING:
        layers = [layer for _, layer in network.named_modules()] if isinstance(network, nn.Module) else []
        for number, layer in enumerate(layers, start=1):
            mx.eval([value for value in layer.values() if isinstance(value, mx.array)])
            on_layer(number, len(layers))


def size_in_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters as they are stored."""
    return sum(value.nbytes for _, value in tree_flatten(module.parameters()))


def build(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build the module of a part, with lazy random parameters: nothing is allocated until they are evaluated.

    Parameters do not change MLX's random state.
    Raises ValueError for a config with values of the wrong type or unsupported values.
    """
    high, low = mx.random.state[0].tolist()
    try:
        with readable(f"{name} config"):
            classes = PARTS[name].classes
            config_class, module_class = classes.get(str(config.get("_class_name"))) or next(iter(classes.values()))
            # The storage of weights does not concern the network.
            return module_class(config_class.from_dict({k: v for k, v in config.items() if k != "quantization"}))
    finally:
        mx.random.seed(high << 32 | low)


def load_component(component: Component, dtype: mx.Dtype | None = mx.float32) -> nn.Module:
    """Build a component with its weights, quantized if they are stored so.

    Weights stay lazy: they are read when first needed, in any thread. They are laid out and cast on the CPU, so that no
    command buffer of a GPU waits for a disk. ``dtype`` is the type of floating-point weights; None keeps theirs.
    Raises ValueError that counts missing, unexpected and wrongly shaped tensors and names the first of each.
    """
    try:
        with mx.stream(loading_stream(mx.cpu)):
            module = build(component.name, component.config)
            tensors = read_tensors(component)
            if component.config.get("quantization") is not None:
                prepare_quantized(module, tensors, component.config)
            fill(module, tensors, dtype)
    except ValueError as error:
        files = listed(map(str, component.files), most=1)
        raise ValueError(f"{component.name} ({files}): {error}") from error
    return module.eval()


@dataclass
class LazyNetwork:
    """Build a network from outside the checkpoint at its first use."""

    component: Component
    dtype: mx.Dtype
    network: nn.Module | None = None  # while it is kept
    size: int = 0  # bytes of its weights, once it is built

    def build(self, keep: bool) -> nn.Module:
        """Return the network with lazy weights; ``keep`` holds it until the next use."""
        network = load_component(self.component, self.dtype) if self.network is None else self.network
        self.network, self.size = network if keep else None, size_in_bytes(network)
        return network


def fill(module: nn.Module, tensors: Mapping[str, mx.array], dtype: mx.Dtype | None = None) -> None:
    """Fill ``module`` with ``tensors``, laid out for NHWC and cast to ``dtype``; ValueError for tensors that misfit.

    A 4-D weight is transposed from [out, in, h, w] to [out, h, w, in]. If the parameter is a matrix, a 1×1
    convolution's weight is flattened. Weights are row-contiguous, or MLX would copy a convolution's at every call.
    """
    parameters = dict(tree_flatten(module.parameters()))
    weights, wrong_shape, mistyped = {}, [], []
    for name in parameters.keys() & tensors.keys():
        stored, parameter = tensors[name], parameters[name]
        weight = stored.transpose(0, 2, 3, 1) if stored.ndim == 4 else stored
        if parameter.ndim == 2 and stored.shape[2:] == (1, 1):
            weight = weight.reshape(weight.shape[0], -1)
        is_float = mx.issubdtype(weight.dtype, mx.floating)
        if weight.shape != parameter.shape:
            expected = parameter.shape
            if parameter.ndim == 4:
                expected = tuple(expected[i] for i in (0, 3, 1, 2))
            elif stored.ndim == 4:
                expected = (*expected, 1, 1)
            wrong_shape.append(f"{name} {stored.shape} instead of {expected}")
        if is_float != mx.issubdtype(parameter.dtype, mx.floating):
            mistyped.append(f"{name} of {weight.dtype}")
        weight = mx.contiguous(weight)
        weights[name] = weight.astype(dtype) if is_float and dtype is not None else weight
    problems = {
        "missing": parameters.keys() - tensors.keys(),
        "unexpected": tensors.keys() - parameters.keys(),
        "of the wrong shape": wrong_shape,
        "of the wrong type": mistyped,
    }
    if lines := [f"{len(names)} {kind}: {listed(sorted(names))}" for kind, names in problems.items() if names]:
        raise ValueError(f"the weights do not fit the config: {'; '.join(lines)}")
    module.update(tree_unflatten(list(weights.items())))

"""A component's config and tensors -> a module, strictly: every tensor is used, every parameter is filled."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..models.clip import CLIPTextModel
from ..models.config import AutoencoderConfig, CLIPTextConfig, ControlNetConfig, UNetConfig, readable
from ..models.controlnet import ControlNetModel, T2IAdapter, T2IAdapterConfig
from ..models.dpt import DPTConfig, DPTForDepthEstimation
from ..models.taesd import AutoencoderTiny, AutoencoderTinyConfig
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from .files import Component, read_tensors
from .names import canonical
from .quantize import prepare_quantized, quantize, read_quantization, still_to_do

_ARCHITECTURES: dict[str, tuple[type, type]] = {
    "unet": (UNetConfig, UNet2DConditionModel),
    "vae": (AutoencoderConfig, AutoencoderKL),
    "text_encoder": (CLIPTextConfig, CLIPTextModel),
    "text_encoder_2": (CLIPTextConfig, CLIPTextModel),
    "controlnet": (ControlNetConfig, ControlNetModel),
    "depth_estimator": (DPTConfig, DPTForDepthEstimation),
}
# Where a part comes in several kinds, its config says by `_class_name` which one it is.
_KINDS = {
    ("vae", "AutoencoderTiny"): (AutoencoderTinyConfig, AutoencoderTiny),
    ("controlnet", "T2IAdapter"): (T2IAdapterConfig, T2IAdapter),
}


def build(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The module of a component, with lazy random parameters: nothing is allocated until they are evaluated.

    Raises ValueError for a config whose values are of the wrong kind, or that this library cannot compute.
    """
    with readable(f"{name} config"):
        config_class, module_class = _KINDS.get((name, config.get("_class_name")), _ARCHITECTURES[name])
        # How weights are stored says nothing of the network.
        return module_class(config_class.from_dict({k: v for k, v in config.items() if k != "quantization"}))


def load_component(
    component: Component, dtype: mx.Dtype | None = mx.float32, quantization: tuple[int, int] | None = None
) -> nn.Module:
    """Build a component and give it its weights.

    Args:
        component: the config and the files. Weights that are stored quantized stay so.
        dtype: the type its floating-point weights are cast to; None leaves them as they are.
        quantization: (bits, group size), or None to keep the weights as they are.

    Weights stay lazy: they are read when first needed, or here, matrix by matrix, when they are quantized.
    Raises ValueError that lists every missing, unexpected and misshapen tensor, or for weights that are stored in other
    bits than those asked for.
    """
    files = ", ".join(str(f) for f in component.files)
    try:
        module = build(component.name, component.config)
        tensors = canonical(read_tensors(component))
        if stored := read_quantization(component.config):
            prepare_quantized(module, tensors, stored[1])
        fill(module, tensors, dtype)
        if pending := still_to_do(component.config, quantization):
            quantize(module, *pending)
    except ValueError as error:
        raise ValueError(f"{component.name} ({files}): {error}") from error
    return module.eval()


def fill(module: nn.Module, tensors: Mapping[str, mx.array], dtype: mx.Dtype | None = None) -> None:
    """Give ``module`` the ``tensors``, laid out for NHWC and cast to ``dtype``; ValueError lists all that does not fit.

    A 4-D weight goes from [out, in, h, w] to [out, h, w, in]; where the parameter is a matrix, a 1×1 convolution's
    weight is flattened to one.
    """
    parameters = dict(tree_flatten(module.parameters()))
    shapes = {name: value.shape for name, value in parameters.items()}
    given = canonical(dict(tensors))
    missing = sorted(shapes.keys() - given.keys())
    extra = sorted(given.keys() - shapes.keys())
    laid_out = {name: _lay_out(given[name], len(shape)) for name, shape in shapes.items() if name in given}
    misshapen = [
        f"{name} {tuple(given[name].shape)} instead of {_as_stored(given[name], shapes[name])}"
        for name, value in laid_out.items()
        if value.shape != shapes[name]
    ]
    mistyped = [
        f"{name} of {value.dtype}"
        for name, value in laid_out.items()
        if mx.issubdtype(value.dtype, mx.floating) != mx.issubdtype(parameters[name].dtype, mx.floating)
    ]
    kinds = (("missing", missing), ("unexpected", extra), ("misshapen", misshapen), ("of the wrong type", mistyped))
    problems = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds if names]
    if problems:
        raise ValueError(f"the weights do not fit the config: {'; '.join(problems)}")
    if dtype is not None:
        laid_out = {n: v.astype(dtype) if mx.issubdtype(v.dtype, mx.floating) else v for n, v in laid_out.items()}
    module.update(tree_unflatten(list(laid_out.items())))


def _lay_out(value: mx.array, ndim: int) -> mx.array:
    if value.ndim == 4:
        value = value.transpose(0, 2, 3, 1)
        if ndim == 2 and value.shape[1:3] == (1, 1):
            value = value.reshape(value.shape[0], -1)
    return value


def _as_stored(value: mx.array, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a file should have had, in the layout of files."""
    if len(shape) == 4:
        return (shape[0], shape[3], shape[1], shape[2])
    return (*shape, 1, 1) if value.ndim == 4 else tuple(shape)

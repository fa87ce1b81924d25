"""Load ControlNets, T2I-Adapters, and those that are made of a model's own UNet: LLLites and Control-LoRAs."""

from collections.abc import Callable
from os import PathLike

import mlx.core as mx
import mlx.nn as nn

from ..models import gpu
from ..models.config import UNetConfig, listed
from ..models.controlnet import misfit
from ..models.lllite import ControlNetLLLite, ControlNetwork
from ..models.unet import UNet2DConditionModel
from ..weights.files import open_part
from ..weights.formats.safetensors import loading_stream
from ..weights.load import load_component
from .delta import shape_of


def load_controlnet(
    source: str | PathLike, dtype: mx.Dtype, config: UNetConfig, build_unet: Callable[[], UNet2DConditionModel]
) -> ControlNetwork:
    """Load what steers a UNet with this ``config`` from a file, a folder or a Hub id.

    ``build_unet`` builds it, without LoRAs beside its weights. Raises ValueError or OSError, one line, for what cannot
    be found or read, or is for another family of models.
    """
    component = open_part(source, "controlnet", float16=dtype != mx.float32)
    network = load_component(component, dtype)
    if isinstance(network, ControlNetLLLite):
        check_layers(network, build_unet())
    else:
        network.config.check_fits(config)
    with mx.stream(loading_stream(mx.cpu)):
        gpu.join(network)
    return network


def check_layers(network: ControlNetLLLite, unet: UNet2DConditionModel) -> None:
    """Raise ValueError unless the UNet has the layers of a ControlNet-LLLite, with inputs that are positions."""
    layers = {path.replace(".", "_"): layer for path, layer in unet.named_modules() if isinstance(layer, nn.Module)}
    widths = {
        name: shape_of(layer)[1]
        for name, layer in layers.items()
        if "attentions" in name and getattr(layer, "weight", mx.zeros(0)).ndim == 2
    }
    wanted = zip(network.config.layers, network.config.widths, strict=True)
    wrong = [n for n, width in wanted if widths.get(n) != width or n.endswith(("attn2_to_k", "attn2_to_v"))]
    if wrong:
        raise misfit("ControlNet-LLLite", f"it changes {listed(wrong, most=1)}, which the model does not have so")

"""Load ControlNets and T2I-Adapters, and the kinds that are built on the model's UNet: LLLites and Control-LoRAs."""

from collections.abc import Callable
from dataclasses import fields
from os import PathLike

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..models import gpu
from ..models.config import EncoderConfig, UNetConfig, listed
from ..models.controlnet import ControlNetModel, misfit
from ..models.lllite import ControlNetLLLite, ControlNetwork
from ..models.unet import UNet2DConditionModel
from ..weights.files import Component, open_part, read_tensors
from ..weights.formats.safetensors import loading_stream
from ..weights.load import build, fill, load_component
from .delta import LoRADelta, shape_of, weight_of


def load_controlnet(
    source: str | PathLike, dtype: mx.Dtype, config: UNetConfig, build_unet: Callable[[], UNet2DConditionModel]
) -> ControlNetwork:
    """Load a control network for a UNet with this ``config``, see ``Networks.load_controlnet``.

    ``build_unet`` builds that UNet, without LoRAs beside its weights.
    """
    component = open_part(source, "controlnet", float16=dtype != mx.float32)
    if component.config.get("_class_name") == "ControlLoRA":
        network = build_control_lora(component, build_unet(), dtype)
    else:
        network = load_component(component, dtype)
    if isinstance(network, ControlNetLLLite):
        check_layers(network, build_unet())
    else:
        network.config.check_fits(config)
    with mx.stream(loading_stream(mx.cpu)):
        gpu.join(network)
    return network


def check_layers(network: ControlNetLLLite, unet: UNet2DConditionModel) -> None:
    """Raise ValueError unless the UNet has the layers of a ControlNet-LLLite, with positions of maps as inputs."""
    widths = {
        path.replace(".", "_"): shape_of(layer)[1]
        for path, layer in unet.named_modules()
        if "attentions" in path and isinstance(layer, nn.Linear | nn.QuantizedLinear)
    }
    wanted = zip(network.config.layers, network.config.widths, strict=True)
    wrong = [n for n, width in wanted if widths.get(n) != width or n.endswith(("attn2_to_k", "attn2_to_v"))]
    if wrong:
        reason = f"it changes {listed(wrong, most=1)}, which the model lacks or has in another shape"
        raise misfit("ControlNet-LLLite", reason)


def build_control_lora(component: Component, unet: UNet2DConditionModel, dtype: mx.Dtype) -> ControlNetModel:
    """Build a ControlNet from the UNet's first half and a Control-LoRA (Stability AI 2023); all weights are lazy.

    The file has low-rank factors for matrices and kernels, W + up @ down, and complete tensors for other changes.
    """
    config = {field.name: getattr(unet.config, field.name) for field in fields(EncoderConfig)} | component.config
    layers = dict(unet.named_modules())
    try:
        with mx.stream(loading_stream(mx.cpu)):
            network = build("controlnet", config | {"_class_name": "ControlNetModel"})
            tensors = dict(read_tensors(component))
            tensors.pop("lora_controlnet", None)
            for name, _ in tree_flatten(network.parameters()):
                path, kind = name.rsplit(".", 1)
                if name in tensors or path not in layers:
                    continue
                layer = layers[path]
                value = weight_of(layer) if kind == "weight" else layer[kind]
                roles = [role for role in ("up", "down") if kind == "weight" and f"{path}.{role}" in tensors]
                if roles:
                    factors = {role: tensors.pop(f"{path}.{role}") for role in roles}
                    value = value + LoRADelta("unet", path, factors).delta(layer)["weight"]
                tensors[name] = value.transpose(0, 3, 1, 2) if value.ndim == 4 else value  # as in files
            fill(network, tensors, dtype)
    except ValueError as error:
        raise misfit("Control-LoRA", str(error)) from error
    return network.eval()

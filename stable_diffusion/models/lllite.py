"""ControlNet-LLLite (kohya-ss 2023): small networks that change the inputs of the UNet's layers by a control image.

Each belongs to one layer and reads the layer's input and the image. In most files these layers are the queries, keys
and values of self-attention and the queries of cross-attention in the first half of XL's UNet. Names are those of
kohya-ss/sd-scripts, with the UNet's blocks named as in diffusers and underscores for all dots.
"""

import math
from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from .config import Config
from .controlnet import ControlNetModel, T2IAdapter
from .layers import Conv2d
from .unet import UNet2DConditionModel

_KERNELS = {1: (4, 2), 2: (4, 4), 3: (4, 4, 2)}  # kernels and strides of the image embedding, by depth


@dataclass(frozen=True, kw_only=True)
class LLLiteConfig(Config):
    """Hold the shapes of a ControlNet-LLLite: the UNet's ``layers``, with a width and depth for each."""

    kind: ClassVar[str] = "controlnet"
    ignored: ClassVar[Collection[str]] = ()

    layers: tuple[str, ...]
    widths: tuple[int, ...]  # of the layers' inputs
    depths: tuple[int, ...]  # number of halvings of the latents in the layer's map
    cond_emb_dim: int  # the widths inside
    mlp_dim: int


class LLLiteLayer(nn.Module):
    """Compute the change of a layer's input: down, joined with the embedded image, and up."""

    def __init__(self, width: int, depth: int, cond_emb_dim: int, mlp_dim: int):
        super().__init__()
        kernels = _KERNELS[depth]
        widths = [3, *[cond_emb_dim // 2] * (len(kernels) - 1), cond_emb_dim]
        convs = [Conv2d(i, o, k, stride=k) for (i, o), k in zip(pairwise(widths), kernels, strict=True)]
        self.conditioning1 = [convs[0]]
        for conv in convs[1:]:
            self.conditioning1 += [nn.ReLU(), conv]
        self.down = [nn.Linear(width, mlp_dim)]
        self.mid = [nn.Linear(cond_emb_dim + mlp_dim, mlp_dim)]
        self.up = [nn.Linear(mlp_dim, width)]
        self._stride = math.prod(kernels)

    def embed(self, image: mx.array) -> mx.array:
        """Embed an image [1, H, W, 3] in [-1, 1] -> its part [N, mlp_dim] of ``mid``, the same at all steps."""
        margins = [(0, -side % self._stride) for side in image.shape[1:3]]  # the UNet rounds up
        image = mx.pad(image, [(0, 0), *margins, (0, 0)], mode="edge")
        for layer in self.conditioning1:
            image = layer(image)
        x, mid = image.reshape(-1, image.shape[-1]), self.mid[0]
        return x @ mid.weight[:, : x.shape[-1]].T + mid.bias

    def __call__(self, x: mx.array, embedded: mx.array) -> mx.array:
        """``x`` [B * N, C], the positions of B maps -> the same."""
        y = nn.relu(self.down[0](x)).reshape(-1, *embedded.shape)
        y = nn.relu(y @ self.mid[0].weight[:, -y.shape[-1] :].T + embedded)
        return self.up[0](y).reshape(x.shape)


class ChangedLayer(nn.Module):
    """Wrap a layer of the UNet, or its wrapper, for a run. ``base`` is the innermost layer, see ``gpu.Joined``."""

    is_idle = False

    def __init__(self, layer: nn.Module, change: Callable[[mx.array], mx.array], scale: float):
        super().__init__()
        self.base = layer.get("base", layer)
        self._compute = lambda x: layer(x + scale * change(x))

    def __call__(self, x: mx.array) -> mx.array:
        return self._compute(x)


class ControlNetLLLite(nn.Module):
    """Hold the networks of all layers, by the layers' names."""

    def __init__(self, config: LLLiteConfig):
        super().__init__()
        self.config = config
        for name, width, depth in zip(config.layers, config.widths, config.depths, strict=True):
            self[name] = LLLiteLayer(width, depth, config.cond_emb_dim, config.mlp_dim)
        self.eval()

    def embed(self, image: mx.array) -> dict[str, mx.array]:
        """Embed a control image [1, H, W, 3] in [0, 1] for each layer. Raises ValueError for a wrong shape."""
        if image.ndim != 4 or image.shape[-1] != 3:
            raise ValueError(f"a ControlNet-LLLite takes control images [1, H, W, 3], not {image.shape}")
        image = 2 * image - 1
        return {name: self[name].embed(image) for name in self.config.layers}

    def applied(self, unet: UNet2DConditionModel, embedded: Mapping[str, mx.array], scale: float) -> Any:
        """Return the UNet with changed inputs: a copy of its modules, which share their weights."""

        def copied(value: Any, name: str) -> Any:
            if name in embedded:
                return ChangedLayer(value, partial(self[name], embedded=embedded[name]), scale)
            if isinstance(value, nn.Module):
                result = copy(value)
                for key, child in value.items():
                    result[key] = copied(child, f"{name}_{key}" if name else key)
                return result
            return [copied(child, f"{name}_{i}") for i, child in enumerate(value)] if isinstance(value, list) else value

        return copied(unet, "")


ControlNetwork = ControlNetModel | T2IAdapter | ControlNetLLLite

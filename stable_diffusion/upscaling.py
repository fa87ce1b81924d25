"""Enlarge pictures by a network: ``load_upscaler("RealESRGAN_x4plus.pth")(picture)``."""

from os import PathLike
from typing import Any

import mlx.core as mx
from PIL import Image, ImageOps

from .images.files import opened
from .images.image import from_array, to_array
from .models import upscalers
from .weights.files import open_part
from .weights.load import load_component, read_weights


class Upscaler:
    """Enlarge pictures by ``scale``. The weights are read when they are used first."""

    def __init__(self, network: upscalers.Upscaler, dtype: mx.Dtype):
        self.network, self.dtype, self.scale = network, dtype, network.config.scale

    def __call__(self, image: Any, memory: float | None = None) -> Any:
        """Enlarge a path or PIL image, to a PIL image, or pixels [H, W, 3] in [0, 1], to such pixels in float32.

        Transparency is kept, resized by LANCZOS. What does not fit into ``memory``, in bytes beside the weights and by
        default a quarter of the machine's, is computed in tiles. Raises ValueError for what is no image.
        """
        if isinstance(image, str | PathLike):
            with opened(image) as file:
                return self(ImageOps.exif_transpose(file), memory)
        if isinstance(image, Image.Image):
            alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
            rgb = image if alpha is None else image.convert("RGBA").convert("RGB")  # the colours behind it, too
            result = from_array(self(mx.array(to_array(rgb) / 2 + 0.5), memory))
            if alpha is not None:
                result.putalpha(alpha.resize(result.size, Image.Resampling.LANCZOS))
            return result
        x = mx.array(image)
        if x.ndim != 3 or x.shape[2] != 3 or 0 in x.shape:
            raise ValueError(f"pixels of shape {x.shape} must be [H, W, 3]; give a path, a PIL image or such an array")
        read_weights(self.network)
        y = upscalers.upscale(self.network, x.astype(self.dtype), memory).astype(mx.float32)
        return mx.where(mx.isfinite(y), mx.clip(y, 0, 1), mx.nan)  # which no image is made of


def load_upscaler(source: str | PathLike, *, dtype: mx.Dtype = mx.float32) -> Upscaler:
    """Load an ESRGAN, Real-ESRGAN or SRVGG network from a file, or from one on the Hub as owner/name/file.

    Raises ValueError or OSError, one line, for what cannot be found or read, or is another kind of network.
    """
    return Upscaler(load_component(open_part(source, "upscaler"), dtype), dtype)

"""Enlarge images with an upscaling network: ``load_upscaler("RealESRGAN_x4plus.pth")(picture)``."""

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
    """Enlarge images by the factor ``scale``. The weights are read at the first use."""

    def __init__(self, network: upscalers.Upscaler, dtype: mx.Dtype):
        self.network, self.dtype, self.scale = network, dtype, network.config.scale

    def __call__(self, image: Any, memory: float | None = None) -> Any:
        """Enlarge an image: a path or PIL image becomes a PIL image, an array an array.

        Arrays are pixels [H, W, 3] in [0, 1]; the result is float32. Transparency is kept, resized by LANCZOS. An image
        that needs more than ``memory`` is computed in tiles: bytes beside the weights, by default a quarter of the
        machine's memory. Raises ValueError for anything that is not an image.
        """
        if isinstance(image, str | PathLike):
            with opened(image) as file:
                return self(ImageOps.exif_transpose(file), memory)
        if isinstance(image, Image.Image):
            alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
            rgb = image if alpha is None else image.convert("RGBA").convert("RGB")  # also transparent colours
            result = from_array(self(mx.array(to_array(rgb) / 2 + 0.5), memory))
            if alpha is not None:
                result.putalpha(alpha.resize(result.size, Image.Resampling.LANCZOS))
            return result
        x = mx.array(image)
        if x.ndim != 3 or x.shape[2] != 3 or 0 in x.shape:
            raise ValueError(f"pixels of shape {x.shape} must be [H, W, 3]; give a path, a PIL image or such an array")
        read_weights(self.network)
        y = upscalers.upscale(self.network, x.astype(self.dtype), memory).astype(mx.float32)
        return mx.where(mx.isfinite(y), mx.clip(y, 0, 1), mx.nan)  # ``to_images`` refuses NaN


def load_upscaler(source: str | PathLike, *, dtype: mx.Dtype = mx.float32) -> Upscaler:
    """Load an ESRGAN, Real-ESRGAN or SRVGG network from a local file, or from the Hub as owner/name/file.

    Raises ValueError or OSError, one line, for a file that cannot be found or read, or holds another kind of network.
    """
    return Upscaler(load_component(open_part(source, "upscaler"), dtype), dtype)

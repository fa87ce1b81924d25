"""Stable Diffusion for Apple Silicon in pure MLX."""

from .diffusion.controls import Control
from .diffusion.samplers import SAMPLERS
from .images.image import to_images
from .models import blas  # noqa: F401  (first: it must run before MLX is loaded)
from .pipeline import StableDiffusion, StableDiffusionXL
from .text.encode import Conditioning, MicroConditioning
from .version import __version__

__all__ = [
    "SAMPLERS",
    "Conditioning",
    "Control",
    "MicroConditioning",
    "StableDiffusion",
    "StableDiffusionXL",
    "__version__",
    "to_images",
]

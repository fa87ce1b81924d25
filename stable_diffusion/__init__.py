"""Stable Diffusion for Apple Silicon in pure MLX."""

from . import blas  # noqa: F401  (first: it must run before MLX is loaded)
from .conditioning import Conditioning, MicroConditioning
from .control import Control
from .image import to_images
from .pipeline import StableDiffusion, StableDiffusionXL
from .samplers import SAMPLERS
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

"""Stable Diffusion for Apple Silicon in pure MLX."""

from .models import cpu  # noqa: F401  (first: it loads OpenBLAS before MLX is loaded)

# isort: split
from .diffusion.controls import Control
from .diffusion.image_prompts import ImagePrompt
from .diffusion.samplers import SAMPLERS
from .images.image import to_images
from .options import Options
from .pipeline import StableDiffusion, StableDiffusionXL
from .text.encode import Conditioning, SizeConditioning
from .unconditional import UnconditionalDiffusion
from .upscaling import Upscaler, load_upscaler

__version__ = "0.2.0.dev0"

MicroConditioning = SizeConditioning  # its name in version 0.1

__all__ = [
    "SAMPLERS",
    "Conditioning",
    "Control",
    "ImagePrompt",
    "MicroConditioning",
    "Options",
    "SizeConditioning",
    "StableDiffusion",
    "StableDiffusionXL",
    "UnconditionalDiffusion",
    "Upscaler",
    "__version__",
    "load_upscaler",
    "to_images",
]

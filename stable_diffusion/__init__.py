"""Stable Diffusion for Apple Silicon in pure MLX."""

from . import blas  # noqa: F401  (first: it must run before MLX is loaded)
from .pipeline import MicroConditioning, StableDiffusion, StableDiffusionXL
from .samplers import SAMPLERS

__all__ = ["SAMPLERS", "MicroConditioning", "StableDiffusion", "StableDiffusionXL"]

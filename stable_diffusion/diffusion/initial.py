"""The first latents of a run from an image: noised or not, what a mask keeps, and channels beside the latents."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..models.layers import resample
from .denoiser import InpaintMask
from .sample import Run

# Modes of checkpoints, by the input channels of the UNet beyond those of the latents.
MODES = {0: "text", 1: "depth", 4: "instructions", 5: "masks"}


@dataclass(frozen=True)
class InitialLatents:
    """Hold the first latents ``x`` [n, h, w, 4] and what goes with them.

    ``channels`` [1, h, w, C] go to the UNet beside the latents; ``uncond_channels`` take their place where the UNet is
    to run without the image.
    """

    x: mx.array
    mask: InpaintMask | None = None
    channels: mx.array | None = None
    uncond_channels: mx.array | None = None


def from_noise(run: Run, size: tuple[int, int], channels: int, is_continued: bool) -> InitialLatents:
    """Draw the noise that text to image starts from, or take the latents that another run has left.

    ``size`` is (h, w) of the latents. A run that is continued begins with ``run.latents`` in the scale of training.
    """
    x = run.initial_noise((*size, channels))
    if not is_continued:
        return InitialLatents(run.initial_scale * x)
    return InitialLatents(math.sqrt(run.steps.sigmas[0] ** 2 + 1) * x if len(run.steps) else x)


def from_image(
    run: Run,
    encode: Callable[[mx.array], mx.array],
    latent_scale: float,
    mode: str,
    strength: float,
    image: mx.array,
    mask: mx.array | None,
    depth: Callable[[], Any],
) -> InitialLatents:
    """Noise an image's latents to the first sigma of a run (Meng et al. 2022).

    Args:
        encode: [n, H, W, 3] -> latents, which are ``latent_scale`` times those of the autoencoder itself.
        mode: one of ``MODES``.
        image: pixels [H, W, 3], or latents [n, h, w, 4].
        mask: [H, W], 0 where the image is kept.
        depth: returns the map [H', W'] of the image, larger is nearer; for mode "depth".
    """
    x0 = image if image.ndim == 4 else encode(image[None])
    x0 = mx.broadcast_to(x0, (run.n_images, *x0.shape[1:]))
    if not len(run.steps):
        return InitialLatents(x0)
    size, noise = x0.shape[1:3], run.initial_noise(x0.shape[1:])
    small = None if mask is None else latent_mask(mask, size)
    # Where diffusers' pipelines begin with noise alone, so do these: the image would not be painted over.
    is_noise = strength == 1 and (mask is not None or mode in ("masks", "instructions"))
    x = run.initial_scale * noise if is_noise else x0 + run.steps.sigmas[0] * noise
    if mode == "masks":
        ones = mx.ones(image.shape[:2])
        covered = encode((image * ((ones if mask is None else mask) < 0.5)[..., None])[None])
        repaint = latent_mask(ones, size) if small is None else small
        return InitialLatents(x, None, mx.concatenate([repaint, covered], axis=-1))
    inpaint = None if small is None else InpaintMask(x0, small, noise)
    if mode == "instructions":
        seen = x0[:1] / latent_scale
        return InitialLatents(x, inpaint, seen, mx.zeros_like(seen))
    return InitialLatents(x, inpaint, depth_latents(depth(), size) if mode == "depth" else None)


def latent_mask(mask: mx.array, size: tuple[int, int]) -> mx.array:
    """Reduce a mask [H, W] to the latents [1, h, w, 1] by its maximum, so that not even a thin line is lost."""
    h, w = size
    return mask.reshape(h, mask.shape[0] // h, w, mask.shape[1] // w).max(axis=(1, 3))[None, ..., None]


def depth_latents(depth: Any, size: tuple[int, int]) -> mx.array:
    """Resize a depth map [H, W] to the UNet's fifth channel [1, h, w, 1], from -1 (farthest) to 1 (nearest).

    ``size`` is (h, w) of the latents; another aspect ratio is stretched. The map is resized first (bicubic, without
    smoothing) and normalised then, as in diffusers. Raises ValueError for a map that is not [H, W], not finite, or the
    same everywhere.
    """
    array = mx.array(depth, dtype=mx.float32)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"a depth map is an array [height, width], not {list(array.shape)}")
    if bad := array.size - mx.isfinite(array).sum().item():
        raise ValueError(f"{bad} of {array.size} values of the depth map are not finite; give a map without them")
    small = resample(array[None, :, :, None], size, cubic=True)
    low, high = small.min(), small.max()
    if not (high > low).item():
        raise ValueError("the depth map is the same everywhere; give one that tells near from far")
    return 2 * (small - low) / (high - low) - 1

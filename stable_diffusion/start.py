"""Where a run from an image begins: its latents, what of them is kept, and what the UNet is told beside them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .denoise import Kept
from .depth import depth_latents
from .image import to_array
from .plan import Run

# What checkpoints with more input channels than latents have are made for.
MODES = {0: "text", 1: "depth", 4: "instructions", 5: "masks"}


@dataclass(frozen=True)
class Start:
    """The first latents ``x`` [n, h, w, 4]; ``channels`` [1, h, w, C] go to the UNet beside them.

    ``blind`` takes the place of ``channels`` where the UNet is asked what it would do without the image.
    """

    x: mx.array
    kept: Kept | None = None
    channels: mx.array | None = None
    blind: mx.array | None = None


def pixels_of(image: Any, unit: int) -> mx.array:
    """[H, W, 3] float32 in [-1, 1] of a PIL image or an array; ValueError unless sides are multiples of ``unit``."""
    pixels = mx.array(to_array(image.convert("RGB")) if hasattr(image, "convert") else image, dtype=mx.float32)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] % unit or pixels.shape[1] % unit:
        raise ValueError(f"image of shape {pixels.shape} must be [H, W, 3] with sides that are multiples of {unit}")
    return pixels


def mask_of(mask: Any, size: tuple[int, int]) -> mx.array:
    """[H, W] float32 in [0, 1] of a grey PIL image or an array; ValueError unless it has the ``size`` of the image."""
    values = mx.array(to_array(mask.convert("RGB"))[..., 0] / 2 + 0.5 if hasattr(mask, "convert") else mask)
    if values.shape != tuple(size):
        raise ValueError(f"mask of shape {values.shape} must be {tuple(size)}, the size of the image")
    if not mx.all((values >= 0) & (values <= 1)):
        raise ValueError("the values of a mask must be from 0, keep, to 1, make new")
    return values.astype(mx.float32)


def from_image(
    run: Run,
    encode: Callable[[mx.array], mx.array],
    latent_scale: float,
    mode: str,
    strength: float,
    image: mx.array,
    mask: mx.array | None,
    depth: Callable[[], Any],
) -> Start:
    """The start of a run of ``generate_latents_from_image``.

    Args:
        encode: [n, H, W, 3] -> latents, which are ``latent_scale`` times those of the autoencoder itself.
        image: pixels [H, W, 3], or latents [n, h, w, 4] of images that are worked on further.
        mask: [H, W], 0 where the image is kept.
        depth: gives the map [H', W'] of the image, larger is nearer; for mode "depth".
    """
    x0 = image if image.ndim == 4 else encode(image[None])
    x0 = mx.broadcast_to(x0, (run.n_images, *x0.shape[1:]))
    if not len(run.steps):
        return Start(x0)
    size, noise = x0.shape[1:3], run.initial_noise(x0.shape[1:])
    small = None if mask is None else latent_mask(mask, size)
    # Where diffusers' pipelines begin with noise alone, so do these: an image in it would not be overpainted.
    forgets = strength == 1 and (mask is not None or mode in ("masks", "instructions"))
    x = run.scale * noise if forgets else x0 + run.steps.sigmas[0] * noise
    if mode == "masks":
        everything = mx.ones(image.shape[:2])
        covered = encode((image * ((everything if mask is None else mask) < 0.5)[..., None])[None])
        return Start(x, None, mx.concatenate([latent_mask(everything, size) if small is None else small, covered], -1))
    kept = None if small is None else Kept(x0, small, noise)
    if mode == "instructions":
        seen = x0[:1] / latent_scale
        return Start(x, kept, seen, mx.zeros_like(seen))
    return Start(x, kept, depth_latents(depth(), size) if mode == "depth" else None)


def latent_mask(mask: mx.array, size: tuple[int, int]) -> mx.array:
    """[H, W] -> [1, h, w, 1]: a latent is as new as the newest of its pixels, so that not even a thin line is lost."""
    h, w = size
    return mask.reshape(h, mask.shape[0] // h, w, mask.shape[1] // w).max(axis=(1, 3))[None, ..., None]

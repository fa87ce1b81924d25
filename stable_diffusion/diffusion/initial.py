"""Where a run from an image begins: its latents, what of them is kept, and what the UNet is told beside them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..models.layers import resample
from .denoiser import Kept
from .run import Run

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


def depth_latents(depth: Any, size: tuple[int, int]) -> mx.array:
    """A depth map [H, W] -> the UNet's fifth channel [1, h, w, 1], from -1 where it is farthest to 1.

    ``size`` is (h, w), that of the latents. A map of another aspect ratio is stretched. It is resized first (bicubic,
    without smoothing) and normalised then, as diffusers does it. Raises ValueError for a map that is not [H, W], not
    finite, or the same everywhere.
    """
    values = mx.array(depth, dtype=mx.float32)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"a depth map is an array [height, width], not {list(values.shape)}")
    if bad := values.size - mx.isfinite(values).sum().item():
        raise ValueError(f"{bad} of {values.size} values of the depth map are not finite; give a map without them")
    small = resample(values[None, :, :, None], size, cubic=True)
    low, high = small.min(), small.max()
    if not (high > low).item():
        raise ValueError("the depth map is the same everywhere; give one that tells near from far")
    return 2 * (small - low) / (high - low) - 1

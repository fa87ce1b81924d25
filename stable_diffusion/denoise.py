"""From a network to D(x, sigma), the estimate of the clean latent that the samplers integrate."""

import math
from collections.abc import Callable

import mlx.core as mx

from .conditioning import Conditioning, concatenate
from .samplers import Denoiser
from .schedule import Schedule, Steps


def denoiser(
    unet: Callable[..., mx.array],
    schedule: Schedule,
    steps: Steps,
    dtype: mx.Dtype,
    conditioning: Conditioning,
    negative: Conditioning | None = None,
    guidance: float = 1.0,
) -> Denoiser:
    """D(x, sigma) of a run: scale the input, ask the UNet, read its answer as x0, and guide.

    Classifier-free guidance (Ho & Salimans 2022): with a ``negative`` conditioning the answer is
    ``negative + guidance * (positive - negative)``. Latents are float32 [n, h, w, 4]; the UNet computes in ``dtype``.
    """
    timesteps = dict(zip(steps.sigmas, steps.timesteps, strict=False))
    prediction = schedule.config.prediction_type
    both = conditioning if negative is None else concatenate([conditioning, negative])
    context = both.context if both.values is None else (both.context, both.values)

    def denoise(x: mx.array, sigma: float) -> mx.array:
        t = timesteps[sigma] if sigma in timesteps else schedule.timestep(sigma)
        scaled = (x / math.sqrt(sigma**2 + 1)).astype(dtype)
        batch = scaled if negative is None else mx.concatenate([scaled, scaled])
        text_time = None if both.pooled is None else (both.pooled, both.time_ids)
        out = unet(batch, mx.full((len(batch),), t), context, text_time=text_time, timestep_cond=both.guidance)
        out = out.astype(mx.float32)
        if negative is not None:
            positive, unwanted = mx.split(out, 2)
            out = unwanted + guidance * (positive - unwanted)
        return to_x0(out, x, sigma, prediction)

    return denoise


def to_x0(out: mx.array, x: mx.array, sigma: float, prediction: str) -> mx.array:
    """Read a network's output as the clean latent.

    ``epsilon`` is the noise (Ho et al. 2020), ``v_prediction`` is ``(noise - sigma * x0) / sqrt(sigma^2 + 1)``
    (Salimans & Ho 2022), ``sample`` is x0 itself.
    """
    if prediction == "epsilon":
        return x - sigma * out
    if prediction == "v_prediction":
        return x / (sigma**2 + 1) - (sigma / math.sqrt(sigma**2 + 1)) * out
    return out


def guidance_embedding(weight: float, dim: int) -> mx.array:
    """LCM's embedding of the guidance scale (Luo et al. 2023): the waves of ``1000 * (weight - 1)`` [1, dim]."""
    half = dim // 2
    frequencies = mx.exp(mx.arange(half) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (weight - 1) * frequencies
    return mx.pad(mx.concatenate([mx.sin(angles), mx.cos(angles)]), (0, dim % 2))[None]

"""From a network to D(x, sigma), the estimate of the clean latent that the samplers integrate.

Everything a run can be told about the picture is one :class:`Conditioning`, and guidance is a choice of two of them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .samplers import Denoiser, Sampler, keywords
from .schedule import Schedule, Steps


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told, for each of n images (or for one, which then holds for all).

    ``context`` [n, M, C] is the encoded prompt. XL adds ``pooled`` [n, P], the prompt as one vector, and ``time_ids``
    [n, 6 or 5], the sizes that the picture pretends to have. LCM adds ``guidance`` [n, G], the embedded guidance scale.
    """

    context: mx.array
    pooled: mx.array | None = None
    time_ids: mx.array | None = None
    guidance: mx.array | None = None

    def map(self, function: Callable[[mx.array], mx.array]) -> "Conditioning":
        """Apply ``function`` to every array that is present."""
        values = (self.context, self.pooled, self.time_ids, self.guidance)
        return Conditioning(*(None if value is None else function(value) for value in values))

    def expand(self, n: int) -> "Conditioning":
        """The same for a batch of ``n``."""
        return self.map(lambda a: mx.broadcast_to(a, (n, *a.shape[1:])))

    def __add__(self, other: "Conditioning") -> "Conditioning":
        """Both, one after the other in the batch."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Conditioning(*(None if a is None else mx.concatenate([a, b]) for a, b in pairs))


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
    timestep = _timesteps(schedule, steps)
    prediction = schedule.config.prediction_type
    both = conditioning if negative is None else conditioning + negative

    def denoise(x: mx.array, sigma: float) -> mx.array:
        t = timestep(sigma)
        scaled = (x / math.sqrt(sigma**2 + 1)).astype(dtype)
        batch = scaled if negative is None else mx.concatenate([scaled, scaled])
        text_time = None if both.pooled is None else (both.pooled, both.time_ids)
        out = unet(batch, mx.full((len(batch),), t), both.context, text_time=text_time, timestep_cond=both.guidance)
        out = out.astype(mx.float32)
        if negative is not None:
            positive, unwanted = mx.split(out, 2)
            out = unwanted + guidance * (positive - unwanted)
        return to_x0(out, x, sigma, prediction)

    return denoise


def consistency(denoise: Denoiser, schedule: Schedule, steps: Steps) -> Denoiser:
    """D of a consistency model (Song et al. 2023, eq. 5): what D leaps to, and near timestep 0 the latent itself.

    ``c_skip * x / sqrt(sigma^2 + 1) + c_out * D``, with the scalings of LCM (Luo et al. 2023, appendix) over the
    timestep times ``timestep_scaling``, and the data's standard deviation taken as 0.5.
    """
    timestep = _timesteps(schedule, steps)

    def leap(x: mx.array, sigma: float) -> mx.array:
        s = schedule.config.timestep_scaling * timestep(sigma)
        c_skip, c_out = 0.25 / (s**2 + 0.25), s / math.sqrt(s**2 + 0.25)
        return c_out * denoise(x, sigma) + (c_skip / math.sqrt(sigma**2 + 1)) * x

    return leap


def given(sampler: Sampler, schedule: Schedule, steps: Steps, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a sampler is told about the run besides the ``options`` chosen for it, by the names of its keywords."""
    known = {
        "velocity": lambda: schedule.config.prediction_type == "v_prediction",
        "targets": lambda: schedule.targets(steps),
        "again": lambda: schedule.start_of_repeat(steps),
        "stops": lambda: schedule.stops(steps, options.get("eta", 0.3)),
        "lower_order_final": lambda: schedule.config.lower_order_final and steps.total < 15,  # as in diffusers
    }
    return {name: known[name]() for name in keywords(sampler.run) & known.keys() if len(steps)}


def _timesteps(schedule: Schedule, steps: Steps) -> Callable[[float], float]:
    """The timestep of a sigma: the run's own where it is one of its levels."""
    known = dict(zip(steps.sigmas, steps.timesteps, strict=False))
    return lambda sigma: known[sigma] if sigma in known else schedule.timestep(sigma)


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

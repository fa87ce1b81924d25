"""The denoising loss: noise is added to pictures at random timesteps, and the UNet's predictions are compared.

All random numbers of a picture in a step come from one key. So they depend neither on the batch nor on interruptions
of the run.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..diffusion.schedule import Schedule
from ..models.unet import UNet2DConditionModel
from ..text.encode import Conditioning
from .settings import TrainingSettings

_HUBER = 0.1


@dataclass(frozen=True)
class TrainingBatch:
    """Hold pictures of one size, as inputs of the networks.

    Attributes:
        mean, deviation: [B, h, w, 4] of the posterior of the latents, in the UNet's scale.
        captions: B texts; "" for a dropped caption.
        time_ids: [B, 6] the size conditioning of XL; None for other models.
        conditioning: the encoded captions, B rows; None if the text encoders are trained.
        weight: of the loss of the batch.
    """

    mean: mx.array
    deviation: mx.array
    captions: tuple[str, ...]
    time_ids: mx.array | None = None
    conditioning: Conditioning | None = None
    weight: float = 1.0

    def rows(self, chosen: slice) -> "TrainingBatch":
        """Return a batch of some of the pictures."""
        time_ids = None if self.time_ids is None else self.time_ids[chosen]
        conditioning = None if self.conditioning is None else self.conditioning.select(chosen)
        arrays = self.mean[chosen], self.deviation[chosen]
        return TrainingBatch(*arrays, self.captions[chosen], time_ids, conditioning, self.weight)


@dataclass(frozen=True)
class NoisedBatch:
    """Hold the sample of a batch in a step: clean latents and noise [B, h, w, 4], and B timesteps."""

    latents: mx.array
    noise: mx.array
    timesteps: tuple[int, ...]


def seed_of(*parts: object) -> int:
    """Return a seed of 64 bits for a sequence of numbers and words; other sequences give other seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest)


def add_noise(
    batch: TrainingBatch, seeds: Sequence[int], settings: TrainingSettings, train_timesteps: int
) -> NoisedBatch:
    """Sample the latents of a batch, their noise and their timesteps, all from the seed of each picture."""
    shape, latents, noises, timesteps = batch.mean.shape[1:], [], [], []
    for mean, deviation, seed in zip(batch.mean, batch.deviation, seeds, strict=True):
        of_latents, of_noise, of_offset = mx.random.split(mx.random.key(seed), 3)
        latents.append(mean + deviation * mx.random.normal(shape, key=of_latents))
        noise = mx.random.normal(shape, key=of_noise)
        if settings.noise_offset:
            noise = noise + settings.noise_offset * mx.random.normal((1, 1, shape[-1]), key=of_offset)
        noises.append(noise)
        timesteps.append(seed % train_timesteps)
    return NoisedBatch(mx.stack(latents), mx.stack(noises), tuple(timesteps))


def loss_weight(snr: float, min_snr: float, prediction: str) -> float:
    """Return the weight of a loss at a signal to noise ratio: min(SNR, bound) divided by its weight in x0.

    Hang et al. 2023, sec. 3.4: divided by SNR for noise prediction, by SNR + 1 for v, by 1 for x0. 0 is no bound.
    """
    if not min_snr:
        return 1.0
    bounded = min(snr, min_snr)
    if prediction == "epsilon":
        return bounded / snr if snr else 1.0
    return bounded / (snr + 1) if prediction == "v_prediction" else bounded


def denoising_loss(
    unet: UNet2DConditionModel,
    schedule: Schedule,
    sample: NoisedBatch,
    conditioning: Conditioning,
    settings: TrainingSettings,
    dtype: mx.Dtype = mx.float32,
) -> mx.array:
    """Return the mean loss of a batch (Ho et al. 2020, eq. 14; Salimans & Ho 2022 for v), float32.

    ``dtype`` is the type in which the UNet computes.
    """
    prediction, x0, noise = schedule.config.prediction_type, sample.latents, sample.noise
    alphas = [schedule.alphas_cumprod[t] for t in sample.timesteps]
    signal, spread = (mx.sqrt(mx.array(a))[:, None, None, None] for a in (alphas, [1 - alpha for alpha in alphas]))
    noised = signal * x0 + spread * noise
    targets = {"epsilon": noise, "v_prediction": signal * noise - spread * x0, "sample": x0}
    text_time = None if conditioning.pooled is None else (conditioning.pooled, conditioning.time_ids)
    temb = unet.embed_time(mx.array(sample.timesteps), dtype, text_time)
    output = unet(noised.astype(dtype), temb, conditioning.context).astype(mx.float32)
    error = output - targets[prediction]
    each = mx.square(error)
    if settings.loss == "huber":
        each = 2 * _HUBER * (mx.sqrt(each + _HUBER**2) - _HUBER)
    ratios = [alpha / (1 - alpha) for alpha in alphas]
    weights = mx.array([loss_weight(ratio, settings.min_snr, prediction) for ratio in ratios])
    return (weights * each.mean(axis=(1, 2, 3))).mean()

"""The scales in which a network reads noisy latents and writes what it predicts (Karras et al. 2022, table 1)."""

import math
from dataclasses import dataclass

import mlx.core as mx

from .schedule_config import ScheduleConfig


@dataclass(frozen=True)
class Preconditioning:
    """Hold the scales of a network F: D(x, sigma) = c_skip x + c_out F(c_in x, c_noise).

    ``sigma_data`` is the standard deviation of the clean latents in c_in = 1 / sqrt(sigma^2 + sigma_data^2), and 1 for
    a variance-preserving model (Ho et al. 2020). For c_noise see :meth:`Schedule.c_noise`.
    """

    sigma_data: float
    prediction: str  # "epsilon", "v_prediction", "sample", or "edm"

    @classmethod
    def of(cls, config: ScheduleConfig) -> "Preconditioning":
        """Return the scales of a checkpoint; what a model of EDM calls "epsilon" is F of table 1."""
        if config.sigma_data is None:
            return cls(1.0, config.prediction_type)
        return cls(config.sigma_data, "edm" if config.prediction_type == "epsilon" else config.prediction_type)

    def scale_input(self, x: mx.array, sigma: float) -> mx.array:
        """Return c_in x."""
        return x / math.sqrt(sigma**2 + self.sigma_data**2)

    def to_x0(self, output: mx.array, x: mx.array, sigma: float) -> mx.array:
        """Return D, the clean latents, from a network's output at ``x = x0 + sigma * noise``.

        ``epsilon`` is the noise (Ho et al. 2020), ``v_prediction`` is ``(noise - sigma * x0) / sqrt(sigma^2 + 1)`` for
        a ``sigma_data`` of 1 (Salimans & Ho 2022), ``edm`` is its negative, ``sample`` is x0 itself.
        """
        if self.prediction == "epsilon":
            return x - sigma * output
        if self.prediction == "sample":
            return output
        variance = sigma**2 + self.sigma_data**2
        c_out = sigma * self.sigma_data / math.sqrt(variance)
        return x / (variance / self.sigma_data**2) + (c_out if self.prediction == "edm" else -c_out) * output

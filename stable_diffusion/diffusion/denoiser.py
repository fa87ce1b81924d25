"""D(x, sigma), the estimate of the clean latents that the samplers integrate (Karras et al. 2022), and its wrappers."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from ..models import cpu
from ..models.ip_adapter import ImageTokens
from ..models.layers import Context
from ..models.lllite import ControlNetLLLite
from ..models.unet import UNet2DConditionModel, find_attentions
from .choice import clip_for
from .controls import Control, apply_controls, embed_controls
from .guidance import GuidanceBatch
from .image_prompts import ImagePrompt
from .samplers import Sampler
from .schedule import Schedule, Sigma, Steps
from .schedule_config import ScheduleConfig

DenoiseStep = Callable[[mx.array, float, int], mx.array]  # D of (x, sigma, step of the sampler)


@dataclass
class _Part:
    """Hold the rows of a batch that run through the networks together, and their caches."""

    rows: GuidanceBatch
    context: Context
    images: list[ImageTokens]  # of each image prompt
    full_step: float = -math.inf  # the last step of the full UNet, and its map for DeepCache
    maps: list[mx.array] = field(default_factory=list)


class Denoiser:
    """Estimate the clean latents from noisy ones: D(x, sigma), with guidance and controls, for one run.

    Args:
        dtype: type in which the networks compute.
        batches: the result of ``guidance_batches``.
        controls: ControlNets and T2I-Adapters; each control image is embedded once.
        image_prompts: image prompts with their tokens.
        rows_at_once: run at most this number of rows of a batch at once, which takes less memory.
        deep_cache: run the full UNet only in every n-th step (DeepCache, Ma et al. 2023); 1 is exact. Other steps run
            only its last resnet and transformer. Their inputs are the cached map of the last full step and the output
            of the first convolution for the current latents. Each batch caches the maps of its rows.
        unet_options: the arguments ``tome_ratio`` and ``freeu_scales`` of the UNet.
        group: processes that compute the same run. Each computes a part of the rows of a batch, if their number is
            divisible. It is an ``mx.distributed.Group``, or an object with its methods and ``all_gather``.
        pag_layers: parts of the UNet where perturbed rows use identity attention maps, see
            ``find_attentions`` in ``models/unet.py``.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        schedule: Schedule,
        steps: Steps,
        dtype: mx.Dtype,
        batches: Sequence[GuidanceBatch],
        *,
        controls: Sequence[Control] = (),
        image_prompts: Sequence[ImagePrompt] = (),
        rows_at_once: int | None = None,
        deep_cache: int = 1,
        unet_options: Mapping[str, Any] | None = None,
        pag_layers: Sequence[str] = (),
        group: mx.distributed.Group | None = None,
    ):
        self._unet, self._schedule, self._steps, self._dtype = unet, schedule, steps, dtype
        self._unet_options = unet_options or {}
        self._controls, self._image_prompts = embed_controls(controls, dtype), image_prompts
        merges = self._unet_options.get("tome_ratio", 0)
        if merges and any(isinstance(control.network, ControlNetLLLite) for control in controls):
            raise ValueError(
                "token_merging cannot be combined with ControlNet-LLLite, which needs all positions; omit one"
            )
        self._rows_at_once, self._deep_cache, self._group = rows_at_once, deep_cache, group
        self._batches: list[tuple[GuidanceBatch, list[_Part]]] = []
        self._perturbed = find_attentions(unet, pag_layers) if pag_layers else set()
        for batch in batches:
            own = self._own_rows(batch)
            count = len(own.images)
            size = rows_at_once or count // cpu.parts(count)
            parts = own.split(size) if size < count else [own]
            self._batches.append((batch, [_Part(part, *self._read_by(part)) for part in parts]))
        self._current = self._batches[0]

    def __call__(self, x: mx.array, sigma: float, step: int = 0) -> mx.array:
        """Estimate x0 from ``x = x0 + sigma * noise``, both [n, h, w, 4] float32, for a step of the sampler.

        If the batches have unconditional weights, the result is [2, n, h, w, 4]: guided, and unconditional.
        The step chooses the batch, so all levels that a sampler evaluates in one step use the same rows.
        """
        if step not in self._current[0].steps:
            for part in self._current[1]:  # frees the cached keys and values
                part.context, part.images = self._read_by(part.rows)
            self._current = next(entry for entry in self._batches if step in entry[0].steps)
        batch, parts = self._current
        x_in = (x / math.sqrt(sigma**2 + self._schedule.config.data_variance)).astype(self._dtype)
        outputs: list[mx.array] = []
        for i, part in enumerate(parts):
            if self._rows_at_once is not None and outputs:
                # Each part waits for the previous one, or MLX would compute all at once and use more memory.
                x_in = mx.depends(x_in, outputs[-1])
            with nullcontext() if self._rows_at_once else cpu.stream_of(i, len(parts)):
                outputs.append(self._predict(x_in[part.rows.images], sigma, step, part))
        output = mx.concatenate(outputs)
        if len(output) < len(batch.images):
            gather = getattr(self._group, "all_gather", partial(mx.distributed.all_gather, group=self._group))
            output = gather(output)
        return to_x0(self._schedule.config, batch.combine(output.astype(mx.float32)), x, sigma)

    def _read_by(self, rows: GuidanceBatch) -> tuple[Context, list[ImageTokens]]:
        conditioning = rows.conditioning
        context = Context(conditioning.context, conditioning.v_context, rows.is_perturbed, self._perturbed)
        return context, [prompt.of_rows(rows, self._unet, self._dtype) for prompt in self._image_prompts]

    def _own_rows(self, batch: GuidanceBatch) -> GuidanceBatch:
        """Return the rows that this process computes: all, if they do not divide by the number of processes."""
        rank, size = (0, 1) if self._group is None else (self._group.rank(), self._group.size())
        count, rest = divmod(len(batch.images), size)
        return batch if size == 1 or rest else batch.split(count)[rank]

    def _predict(self, x: mx.array, sigma: float, step: int, part: _Part) -> mx.array:
        """Run the networks on the rows of one part: ``x`` [B, h, w, 4] -> [B, h, w, 4]."""
        rows, conditioning, timestep = part.rows, part.rows.conditioning, self._schedule.c_noise(sigma)
        text_time = None if conditioning.pooled is None else (conditioning.pooled, conditioning.time_ids)
        temb = self._unet.embed_time(timestep, x.dtype, text_time, conditioning.guidance)
        count, prompts = len(self._steps), zip(self._image_prompts, part.images, strict=True)
        part.context.images = [tokens for prompt, tokens in prompts if prompt.acts(step, count)]
        unet, residuals, features, cache = self._unet, None, (), None
        groups = [(group, [one.scale * one.acts(step, count) for one in group.controls]) for group in self._controls]
        if acting := [(group, scales) for group, scales in groups if any(scales)]:
            inputs = x, timestep, text_time, part.context, rows.is_cond
            unet, residuals, features = apply_controls(unet, acting, *inputs)
        if self._deep_cache > 1:
            if step - part.full_step >= self._deep_cache:  # a full step fills an empty list
                part.full_step, part.maps = step, []
            cache = part.maps
        if conditioning.channels is not None:
            x = mx.concatenate([x, conditioning.channels.astype(x.dtype)], axis=-1)
        added = {"residuals": residuals, "features": features, "cache": cache}
        return unet(x, temb, part.context, **added, **self._unet_options)


def to_x0(config: ScheduleConfig, output: mx.array, x: mx.array, sigma: float) -> mx.array:
    """Return D, the clean latents, from a network's output for ``x = x0 + sigma * noise`` (Karras et al. 2022).

    "epsilon" is the noise (Ho et al. 2020), "v_prediction" is ``(noise - sigma * x0) / sqrt(sigma^2 + 1)`` (Salimans &
    Ho 2022), "sample" is x0. For EDM models, with ``sigma_data``, "epsilon" is the negative of their v.
    """
    if config.prediction_type == "sample":
        return output
    if config.prediction_type == "epsilon" and config.sigma_data is None:
        return x - sigma * output
    variance = sigma**2 + config.data_variance
    c_out = sigma * math.sqrt(config.data_variance) / math.sqrt(variance)
    sign = 1 if config.prediction_type == "epsilon" else -1
    return x / (variance / config.data_variance) + sign * c_out * output


@dataclass(frozen=True)
class InpaintMask:
    """Hold the image of an inpainting run: its clean latents ``x0``, the ``mask`` [1, h, w, 1] and the ``noise``.

    Areas where the mask is 0 are kept, areas where it is 1 are repainted; values between are blended.
    """

    x0: mx.array
    mask: mx.array
    noise: mx.array

    def blend(self, x: mx.array, sigma: float) -> mx.array:
        """Replace the kept area of the latents ``x`` by the image, noised to ``sigma``."""
        return self.mask * x + (1 - self.mask) * (self.x0 + sigma * self.noise)


def inpainting(denoise: DenoiseStep, mask: InpaintMask) -> DenoiseStep:
    """Wrap D for inpainting (RePaint, Lugmayr et al. 2022, without resampling).

    The input of D has the kept area of the image with the noise of the level; its estimate has it without noise. The
    first latents of a run are unchanged: at full strength they are pure noise.
    """

    def blended(x: mx.array, sigma: float, step: int = 0) -> mx.array:
        first = isinstance(sigma, Sigma) and sigma.step == 0
        return mask.blend(denoise(x if first else mask.blend(x, sigma), sigma, step), 0.0)

    return blended


def for_sampler(denoise: DenoiseStep, sampler: Sampler, schedule: Schedule) -> DenoiseStep:
    """Wrap D for a sampler: clip x0 as in the checkpoint's scheduler, and adapt D to consistency models."""
    clip = None if "clip" in sampler.option_names else clip_for(sampler, schedule.config)  # DDIM clips x0 itself

    def limited(x: mx.array, sigma: float, step: int = 0) -> mx.array:
        x0 = denoise(x, sigma, step)
        return x0 if clip is None else clip(x0)

    return consistency(limited, schedule) if sampler.consistency else limited


def consistency(denoise: DenoiseStep, schedule: Schedule) -> DenoiseStep:
    """Wrap D for a consistency model (Song et al. 2023, eq. 5): near timestep 0 the estimate is the latent.

    It is ``c_skip * x / sqrt(sigma^2 + 1) + c_out * D``, with LCM's scalings (Luo et al. 2023, appendix) over the
    timestep times ``timestep_scaling``. The standard deviation of the data is assumed to be 0.5.
    """

    def leap(x: mx.array, sigma: float, step: int = 0) -> mx.array:
        s = schedule.config.timestep_scaling * schedule.timestep(sigma)
        c_skip, c_out = 0.25 / (s**2 + 0.25), s / math.sqrt(s**2 + 0.25)
        return c_out * denoise(x, sigma, step) + (c_skip / math.sqrt(sigma**2 + 1)) * x

    return leap

"""Predict the memory of a run from measured constants, and choose the batch size that fits.

The memory of a UNet step is proportional to the rows of its batch and to the positions of the latents; attention is
computed in pieces of a fixed size. So a few constants for each backend are enough. A run corrects their errors.
"""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx

from ..models import cpu, tiling, winograd
from ..models.unet import UNet2DConditionModel
from ..options import SettingError
from ..pipeline import StableDiffusion

_log = logging.getLogger("stable_diffusion")

_MOST_IMAGES = 8  # in a batch; larger batches save little time
_FRACTION = 0.75  # of the machine's memory; the rest is for the system and other programs
_RECOMMENDED = 0.9  # of the size that Metal recommends for a process, which is less on Macs below 36 GB

# Bytes of a step for each row, position of the latents (padded as by a convolution) and channel of the UNet's first two
# blocks; bytes for each pair of these channels; and the work of MLX ahead of the device: bytes in the unit of the
# first, and their upper limit, to which the bytes of the step are added.
# CPU: measured with the bundled model, SD 1.5 and SDXL from 256 to 1536 pixels (benchmarks/memory.py).
# GPU, half precision: computed, not measured on a Mac, by MLX 0.32's rules (mlx/backend/metal/conv.cpp and device.cpp,
# mlx/transforms.cpp): a Winograd convolution holds 64 values for each pair of channels, a command buffer ends after 40
# kernels or 40 Mi values, and 10 of them wait, or none where memory is at its limit.
_STEP = {mx.cpu: (51, 0, 62, math.inf), mx.gpu: (14, 2 * 64, 140, 0.6e9)}
_WINOGRAD = 36  # bytes instead of the first of these if a CPU convolves the maps of both blocks by that algorithm
_SCORES, _BESIDE_SCORES = 2**23, 13  # bytes of attention on a CPU, counted twice, and of the maps at that time
_SUMS, _BESIDE_SUMS = 64, 5  # bytes for each pair of the widest channels, of the sums in models/upsampling.py, on a CPU
_EACH_ROW = 0.25e6  # bytes that stay for each row of a batch, even if rows run one by one
_CONTROLNET = 0.35  # of a step that each ControlNet adds
_TEXT = 12e6  # bytes for each chunk of 75 tokens
_PICTURE = 60_000_000  # bytes of an image encoder's states (computed: 33 of 257 x 1280, and one layer's)

# Bytes of a training step for each position and channel: that enter or leave a resnet; of a transformer block; of its
# input. Bytes for each byte of the float32 scores of attention, of which 2**23 are computed at a time; and what
# MLX computes ahead of the device. CPU: measured with small UNets at 128 and 256 pixels. GPU, half precision: computed,
# not measured on a Mac.
_TRAINING = {mx.cpu: (50, 95, 4, 13, 0.0), mx.gpu: (8, 60, 2, 3, 0.6e9)}


@dataclass(frozen=True)
class RunShape:
    """Describe the memory needs of a batch: sizes are (height, width) of latents, ``larger`` in a second pass.

    ``rows`` are the conditional and unconditional rows of the UNet's batch for one image: 2 with guidance, 1 without, 3
    for instructions. ``controls`` are the sizes of ControlNets in bytes, ``adapters`` those of IP-Adapters,
    ``image_encoder`` that of their largest encoder. ``encodes`` says whether images are encoded.
    """

    n_images: int
    size: tuple[int, int]
    chunks: int = 1
    rows: int = 2
    controls: Sequence[int] = ()
    adapters: Sequence[int] = ()
    image_encoder: int = 0
    larger: tuple[int, int] | None = None
    encodes: bool = False


class StageMemory(NamedTuple):
    """Hold the bytes of a stage: the weights in memory, and the working memory."""

    stage: str
    weights: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.working


def available() -> float:
    """Return the default memory limit of a run in bytes."""
    info = {} if mx.default_device() == mx.cpu else mx.device_info()
    physical = info.get("memory_size") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_FRACTION * physical, _RECOMMENDED * info.get("max_recommended_working_set_size", math.inf))


def set_limits(memory: float | None, low_memory: bool) -> int:
    """Set MLX's limits for ``memory`` bytes (None: most of the machine's); return the memory limit of a run.

    Beyond its memory limit MLX does not work ahead of the device, which saves at least half of the working memory. So
    the limit is 0 in low memory. Buffers kept for reuse may take 1/8 of the memory, in low memory 1/64.
    """
    limit = int(available() if memory is None else memory)
    mx.set_memory_limit(0 if low_memory else limit)
    with cpu.collective:
        mx.set_cache_limit(limit // (64 if low_memory else 8))
    return limit


def step_bytes(model: StableDiffusion, shape: RunShape, size: tuple[int, int]) -> int:
    """Return the bytes of a step at ``size`` with the rows that run at once, without weights."""
    maps, pairs, ahead, most_ahead = _STEP[mx.default_device().type]
    on_cpu, rows = mx.default_device() == mx.cpu, min(shape.rows * shape.n_images, model.rows_at_once or math.inf)
    config, (height, width) = model.unet_config, size
    channels = sum(config.block_out_channels[:2])
    if on_cpu and rows * height * width // 4 >= winograd.fewest_positions(config.block_out_channels[1]):
        maps = _WINOGRAD
    size_of_maps = rows * (height + 2) * (width + 2) * channels
    needed = size_of_maps * maps + channels**2 * pairs
    # Attention on maps of full size is in the first block; SDXL has none there.
    if on_cpu and config.down_block_types[0].startswith("CrossAttn"):
        scores = 4 * rows * config.num_attention_heads[0] * (height * width) ** 2
        needed = max(needed, 2 * min(scores, _SCORES) + size_of_maps * _BESIDE_SCORES)
    if on_cpu:
        needed = max(needed, _SUMS * max(config.block_out_channels) ** 2 + size_of_maps * _BESIDE_SUMS)
    needed += 0 if mx.get_memory_limit() == 0 else min(size_of_maps * ahead, most_ahead + needed)
    needed *= 2 if model.dtype == mx.float32 and not on_cpu else 1
    return int(_EACH_ROW * shape.rows * shape.n_images + needed * (1 + _CONTROLNET * len(shape.controls)))


def training_bytes(unet: UNet2DConditionModel, rows: int, size: tuple[int, int], recomputes: bool) -> int:
    """Return the bytes of a gradient of ``rows`` latents of ``size`` (h, w), without weights, factors and optimizer."""
    of_resnets, of_block, of_input, of_scores, ahead = _TRAINING[mx.default_device().type]
    last = len(unet.down_blocks) - 1
    blocks = [*enumerate(unet.down_blocks), *((last - i, block) for i, block in enumerate(unet.up_blocks))]
    blocks += [(last, unet.mid_block)] if "mid_block" in unet else []
    kept, largest, scores = 0.0, 0.0, 0
    for level, block in blocks:
        positions = math.prod(math.ceil(side / 2**level) for side in size)
        for resnet in block.resnets:
            kept += of_resnets * rows * positions * (resnet.conv1.weight.shape[-1] + resnet.conv1.weight.shape[0])
        for attention in block.get("attentions", []):
            width, depth = attention.norm.weight.size, len(attention.transformer_blocks)
            heads = unet.config.num_attention_heads[level]
            kept += depth * (of_input if recomputes else of_block) * rows * positions * width
            largest = max(largest, of_block * rows * positions * width if recomputes else 0)
            scores = max(scores, 4 * rows * heads * positions**2)
    needed = kept + largest + of_scores * min(scores, _SCORES) + ahead
    is_double = unet.conv_in.weight.dtype == mx.float32 and mx.default_device() != mx.cpu
    return int(needed * (2 if is_double else 1))


def plan(model: StableDiffusion, shape: RunShape, limit: int) -> list[StageMemory]:
    """Return the memory of each stage of a run, in order, from configs and the headers of files."""
    sizes = {name: source.size for name, source in model.sources.items()}
    unet, vae = sizes.pop("unet"), sizes.pop("autoencoder", 0)  # which pixel-space models lack
    text, controls = sum(sizes.values()), sum(shape.controls) + sum(shape.adapters)
    stays = 0 if model.low_memory or not shape.encodes else vae
    largest, itemsize = shape.larger or shape.size, model.sources["autoencoder"].dtype.size if vae else 0
    stages = [StageMemory("text encoding", text + controls, int(_TEXT * shape.chunks))]
    if shape.image_encoder:
        stages.insert(0, StageMemory("image prompts", shape.image_encoder + controls, _PICTURE))
    if shape.encodes:
        weights = vae + controls + (0 if model.low_memory else text)
        pixels = (1, *(side * model.pixels_per_latent for side in largest))
        peak = tiling.plan(model.vae_config, "encoder", pixels, limit - weights, itemsize).peak
        stages.append(StageMemory("encoding", weights, int(peak)))
    for stage, size in (("a step of the UNet", shape.size), ("a step of the second pass", shape.larger)):
        if size is not None:
            stages.append(StageMemory(stage, unet + controls + stays, step_bytes(model, shape, size)))
    peak = tiling.plan(model.vae_config, "decoder", (1, *largest), limit - vae, itemsize).peak if vae else 0
    return [*stages, StageMemory("decoding", vae, int(peak))]


def _weights(model: StableDiffusion, shape: RunShape) -> int:
    """Return the bytes of the networks that are needed after the prompts are encoded."""
    beside = sum(shape.controls) + sum(shape.adapters)
    return sum(model.sources[name].size for name in {"unet", "autoencoder"} & {*model.sources}) + beside


def images_that_fit(model: StableDiffusion, shape: RunShape, limit: int) -> int:
    """Return how many of ``shape.n_images`` to generate together: as many as fit, in batches of about equal size.

    If the rows run one by one, as in low memory, a batch saves no time.
    """
    if shape.n_images == 1 or model.rows_at_once:
        return 1
    room = limit - _weights(model, shape)
    each = step_bytes(model, replace(shape, n_images=1), shape.larger or shape.size)
    most = max(1, min(shape.n_images, _MOST_IMAGES, int(room // each)))
    return math.ceil(shape.n_images / math.ceil(shape.n_images / most))  # so that the last batch is not a small one


def fit(model: StableDiffusion, shape: RunShape, limit: int, is_strict: bool) -> bool:
    """Choose how to run within ``limit`` bytes; returns whether all networks but the text encoders fit in at once.

    If a step does not fit, the rows run one by one; the autoencoder stays within the remaining memory. If the limit is
    too small, raises SettingError where the user has set it (``is_strict``); otherwise logs a warning.
    """
    model.memory_limit = limit
    stages = plan(model, shape, limit)
    if model.rows_at_once != 1 and max(stage.total for stage in stages[:-1]) > limit:
        model.rows_at_once = 1
        _log.info("not enough memory for the UNet's whole batch: running its rows one by one")
        stages = plan(model, shape, limit)
    for stage in stages:
        figures = (size / 1e9 for size in (stage.weights, stage.working, stage.total))
        _log.info("memory for %s: %.2f GB of weights + %.2f GB = %.2f GB", stage.stage, *figures)
    largest = max(stages, key=lambda stage: stage.total)
    if largest.total > limit:
        text = f"{largest.stage} needs about {largest.total / 1e9:.1f} GB, the limit is {limit / 1e9:.1f} GB"
        text += "; quantize, use low_memory, fewer images at once or a smaller size"
        if is_strict:
            raise SettingError(text, "quantize", "low_memory")
        _log.warning("%s", text)
    return _weights(model, shape) + max(stage.working for stage in stages[1:]) <= limit

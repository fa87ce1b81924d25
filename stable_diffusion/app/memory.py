"""The memory that a run takes, by measured constants, and the batch that fits.

A step of the UNet takes memory in proportion to the rows of its batch and to the positions of the latents; attention is
cut into pieces of a fixed size. So one constant for each backend is enough, and the first step of a run corrects it.
"""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..models import tiling
from ..models.controlnet import ControlNetModel, T2IAdapter
from ..options import SettingError
from ..pipeline import StableDiffusion
from ..weights.load import size_in_bytes

_log = logging.getLogger("stable_diffusion")

_MOST_IMAGES = 8  # in a batch; more of them save little time
_FRACTION = 0.75  # of the machine's memory that a run may take: the system and other programs need some
_RECOMMENDED = 0.9  # of what Metal recommends to a process, which is less on Macs below 36 GB

# Bytes of a step for each row and position of the latents, as a multiple of the widths of the UNet's first two blocks.
# Measured on the CPU over SD 1.5 and SDXL at 512 to 1536 pixels (benchmarks/memory.py): 1.45 x 36 where MLX does not
# work ahead (a memory limit of 0), 2.2 times as much where it does.
_CPU, _CPU_AHEAD = 1.45 * 36, 2.2 * 1.45 * 36
# On Metal, by the rules of MLX 0.32's allocator and not measured: 12,200 bytes for each row and position of SDXL, and
# up to 1.3 GB in command buffers where MLX works ahead.
_METAL, _METAL_AHEAD, _METAL_MOST_AHEAD = 12.7, 94, 1.3e9
_STEP = 1.5e6  # bytes that each step takes besides
_CONTROLNET = 0.35  # of a step that each ControlNet adds
_TEXT = 12e6  # bytes for each chunk of 75 tokens


@dataclass(frozen=True)
class RunShape:
    """Describe a batch as far as its memory goes.

    ``size`` is (height, width) of the latents, ``larger`` the size in a second pass. ``rows`` are the UNet's rows for
    one image: 2 with guidance, 1 without, 3 for instructions. ``encodes`` says whether images are encoded.
    """

    n_images: int
    size: tuple[int, int]
    chunks: int = 1
    rows: int = 2
    networks: Sequence[ControlNetModel | T2IAdapter] = ()
    larger: tuple[int, int] | None = None
    encodes: bool = False


@dataclass(frozen=True)
class StageMemory:
    """Hold the bytes of a stage: the weights in memory meanwhile, and what it computes."""

    stage: str
    weights: int
    working: int

    @property
    def total(self) -> int:
        """Return both together, the peak of the stage."""
        return self.weights + self.working

    def __str__(self) -> str:
        weights, working = self.weights / 1e9, self.working / 1e9
        return f"{self.stage}: {weights:.2f} GB of weights + {working:.2f} GB = {weights + working:.2f} GB"


def set_limits(memory: float | None, low_memory: bool) -> int:
    """Set MLX's limits for ``memory`` bytes (None: most of the machine's); returns the bytes that a run may take.

    Beyond its memory limit MLX does not work ahead of the device, which saves half of the working memory on a CPU: in
    low memory the limit there is 0. Buffers kept for reuse may take an eighth, in low memory a 64th.
    """
    on_cpu = mx.default_device() == mx.cpu
    info = {} if on_cpu else mx.device_info()
    physical = info.get("memory_size") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    recommended = info.get("max_recommended_working_set_size", math.inf)
    limit = int(min(_FRACTION * physical, _RECOMMENDED * recommended) if memory is None else memory)
    mx.set_memory_limit(0 if low_memory and on_cpu else limit)
    mx.set_cache_limit(limit // (64 if low_memory else 8))
    return limit


def step_bytes(model: StableDiffusion, shape: RunShape, rows: int, size: tuple[int, int]) -> int:
    """Return the bytes of a step with this number of ``rows`` at ``size``, weights not included."""
    widths = sum(model.unet_config.block_out_channels[:2])
    positions = rows * math.prod(size) * widths
    if mx.default_device() == mx.cpu:
        step = positions * (_CPU if mx.get_memory_limit() == 0 else _CPU_AHEAD)
    else:
        step = positions * _METAL + min(positions * _METAL_AHEAD, _METAL_MOST_AHEAD)
    return int(_STEP + step * (1 + _CONTROLNET * len(shape.networks)))


def plan(model: StableDiffusion, shape: RunShape, limit: int) -> list[StageMemory]:
    """Return the memory of each stage of a run, in order, from configs and the headers of files."""
    sizes = {name: source.size for name, source in model.sources.items()}
    text = sum(size for name, size in sizes.items() if name.startswith("text_encoder"))
    # Quantized weights are in memory from the start, and the autoencoder's from its first use.
    early = 0 if model.low_memory or model.sources["unet"].quantization is None else sizes["unet"]
    stays = 0 if model.low_memory or not shape.encodes else sizes["autoencoder"]
    networks = sum(size_in_bytes(network) for network in shape.networks)
    largest = shape.larger or shape.size
    pixels = (model.pixels_per_latent * largest[0], model.pixels_per_latent * largest[1])
    stages = [StageMemory("text encoding", early + text + networks, int(_TEXT * shape.chunks))]
    if shape.encodes:
        weights = sizes["autoencoder"] + early + networks + (0 if model.low_memory else text)
        stages.append(StageMemory("encoding", weights, _autoencoder_bytes(model, "encoder", pixels, limit - weights)))
    weights, rows = sizes["unet"] + networks + stays, shape.rows * shape.n_images
    rows = min(rows, model.rows_at_once or rows)
    for stage, size in (("a step of the UNet", shape.size), ("a step of the second pass", shape.larger)):
        if size is not None:
            stages.append(StageMemory(stage, weights, step_bytes(model, shape, rows, size)))
    decoding = _autoencoder_bytes(model, "decoder", largest, limit - sizes["autoencoder"])
    return [*stages, StageMemory("decoding", sizes["autoencoder"], decoding)]


def _autoencoder_bytes(model: StableDiffusion, half: str, size: tuple[int, int], room: int) -> int:
    itemsize = model.sources["autoencoder"].dtype.size
    return int(tiling.plan(model.vae_config, half, (1, *size), room, itemsize).peak)


def images_that_fit(model: StableDiffusion, shape: RunShape, limit: int, correction: float = 1.0) -> int:
    """Return how many of ``shape.n_images`` to generate together: those that fit, in batches of about one size.

    Where the rows run one by one a batch saves no time. ``correction`` is the measured memory of a step over
    the planned.
    """
    if shape.n_images == 1 or model.rows_at_once:
        return 1
    weights = sum(model.sources[name].size for name in ("unet", "autoencoder"))
    room = limit - weights - sum(size_in_bytes(network) for network in shape.networks)
    each = correction * step_bytes(model, shape, shape.rows, shape.larger or shape.size)
    most = max(1, min(shape.n_images, _MOST_IMAGES, int(room // each)))
    return math.ceil(shape.n_images / math.ceil(shape.n_images / most))  # so that the last batch is not a small one


def fit(model: StableDiffusion, shape: RunShape, limit: int, is_strict: bool) -> list[StageMemory]:
    """Choose how to run within ``limit`` bytes; returns the memory of each stage.

    Where a step does not fit, the rows run one by one; the autoencoder keeps to what is left. Raises SettingError where
    a limit that the user has set cannot be kept (``is_strict``); otherwise the log has a warning.
    """
    model.memory_limit = limit
    stages = plan(model, shape, limit)
    if max(stage.total for stage in stages[:-1]) > limit and model.rows_at_once != 1:
        model.rows_at_once = 1
        _log.info("memory is short: the rows of the UNet's batch run one by one")
        stages = plan(model, shape, limit)
    largest = max(stages, key=lambda stage: stage.total)
    if largest.total > limit:
        text = f"{largest.stage} needs about {largest.total / 1e9:.1f} GB, the limit is {limit / 1e9:.1f} GB"
        remedy = "quantize, use low_memory, fewer images at once or a smaller size"
        if is_strict:
            raise SettingError(f"{text}: {remedy}", "quantize", "low_memory")
        _log.warning("%s: %s", text, remedy)
    for stage in stages:
        _log.info("memory for %s", stage)
    return stages


def fits_together(model: StableDiffusion, stages: Sequence[StageMemory], limit: int) -> bool:
    """Return whether the networks of all stages after the prompts fit into memory at once."""
    weights = sum(model.sources[name].size for name in ("unet", "autoencoder"))
    return weights + max(stage.working for stage in stages[1:]) <= limit

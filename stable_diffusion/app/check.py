"""Check this machine: kernels, networks, the bundled model's image and memory, each within a bound; then measure times.

Nothing is downloaded: the networks, small ones and those of SD 1.5 and SDXL, have random weights of a fixed seed. The
default device is compared with formulas in float64 (``check_kernels``) and with MLX's CPU in float32. Memory is
compared with the plans of ``memory`` and ``models.tiling``. On a CPU, shapes are small and few times are measured.
"""

import math
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, count, product
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map, tree_map_with_path

from ..images.files import open_image
from ..images.image import to_images
from ..models import tiling
from ..models.clip import CLIPTextModel
from ..models.layers import attention
from ..models.vae import AutoencoderKL
from ..pipeline import StableDiffusion
from ..weights.catalog import ALIASES
from ..weights.load import build, read_weights
from . import memory
from .check_kernels import TYPES, bounds, kernel_cases, kernel_error, largest_error

RELATIVE, PLANNED, SECONDS = "of the largest value", "of the plan", "s"  # units
_FULL = 3e-2  # a UNet in float16, with Winograd convolutions
_MODULES, _ROWS, _SLICES = bounds(1e-4, 1e-2), bounds(1e-5, 5e-3), bounds(1e-5, 1e-2)
_GOLDEN_PROMPT, _GOLDEN_SEED = "a red circle on a blue background", 1
_MEMORY_OF_XL = 14e9  # bytes: 5.2 GB of weights, the same again while they are created, and a step

_SD15 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_XL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SMALL_XL = _XL | {"block_out_channels": [128] * 3, "cross_attention_dim": 96, "attention_head_dim": 2}
_SMALL_SD1 = _SD15 | {"block_out_channels": [64, 128, 128, 128], "cross_attention_dim": 96, "attention_head_dim": 2}
_CLIP = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2}
_PROJECTED = {"hidden_act": "gelu", "architectures": ["CLIPTextModelWithProjection"], "projection_dim": 96}
_VAE = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "small UNet like SD 1.5's": ("unet", _SMALL_SD1),
    "small UNet like SD 2.1's": ("unet", _SMALL_SD1 | {"use_linear_projection": True, "upcast_attention": True}),
    "small UNet like SDXL's": ("unet", _SMALL_XL | {"transformer_layers_per_block": [1, 1, 2]}),
    "small text encoder like CLIP-L": ("text_encoder", _CLIP),
    "small text encoder like OpenCLIP-G": ("text_encoder", _CLIP | _PROJECTED),
    "small autoencoder": ("vae", _VAE | {"block_out_channels": [32, 64, 128, 128]}),
    "UNet of SD 1.5": ("unet", _SD15),
    "UNet of SDXL": ("unet", _XL),
    "autoencoder of SD 1.5": ("vae", _VAE | {"block_out_channels": [128, 256, 512, 512]}),
}


@dataclass(frozen=True)
class Check:
    """Describe a measurement, its ``unit`` and its bounds."""

    name: str
    dtype: mx.Dtype
    measure: Callable[[], float]
    highest: float = math.inf
    unit: str = RELATIVE
    lowest: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """Hold the value of a check, or the ``error`` that ended it."""

    check: Check
    value: float = math.nan
    error: str = ""

    @property
    def passed(self) -> bool:
        """Return whether there is a value, within its bounds."""
        return self.check.lowest <= self.value <= self.check.highest


def find_checks(words: Sequence[str] = ()) -> list[Check]:
    """Return the checks for the default device whose names contain all ``words``; nothing is computed."""
    on_cpu = mx.default_device() == mx.cpu
    kernels = (
        Check(case.name, dtype, partial(kernel_error, case, dtype), bound)
        for case in kernel_cases()
        for dtype, bound in bounds(case.bound, case.half).items()
        if not on_cpu or dtype in case.on_cpu
    )
    checks = chain(kernels, _network_checks(on_cpu), _full_size_checks(on_cpu), _kernel_times(on_cpu))
    return [check for check in checks if all(word in check.name for word in words)]


def measure(check: Check) -> Measurement:
    """Return the measurement of a check. An error is a result too."""
    try:
        return Measurement(check, check.measure())
    except Exception as error:
        return Measurement(check, error=" ".join(f"{type(error).__name__}: {error}".split()))


def findings(memory_limit: float) -> Iterator[str]:
    """Yield lines that describe the machine; ``memory_limit`` is that of a run, in bytes."""
    info = mx.device_info()
    yield f"MLX {mx.__version__}, {platform.platform()}, Python {platform.python_version()}"
    yield f"device: {mx.default_device()}, {info.get('device_name', '')}, {info.get('architecture', '')}"
    figures = {"memory": info.get("memory_size"), "recommended": info.get("max_recommended_working_set_size")}
    parts = [f"{name} {size / 1e9:.1f} GB" for name, size in figures.items() if size]
    yield ", ".join([*parts, f"memory limit of a run: {memory_limit / 1e9:.1f} GB"])
    if mx.default_device() == mx.cpu:
        yield "on a CPU: small shapes, and half precision as MLX computes it there"
        return
    tf32 = os.environ.get("MLX_ENABLE_TF32", "1") != "0"
    yield f"TF32 is {'on: from the M5 on, float32 products keep 11 bits' if tf32 else 'off'} (MLX_ENABLE_TF32)"
    winograd = os.environ.get("MLX_CONV_WINOGRAD_WORKING_SET") != "1"
    yield f"Winograd convolutions are {'on' if winograd else 'off'} (MLX_CONV_WINOGRAD_WORKING_SET)"


# --- networks ---


@lru_cache(maxsize=1)
def _random_network(name: str, dtype: mx.Dtype) -> nn.Module:
    """Build a network with seeded random weights, which replace all initial values."""
    _random_network.cache_clear()  # of the previous network, or both would be in memory
    module, seeds = build(*_NETWORKS[name]), count()

    def draw(path: str, parameter: mx.array) -> mx.array:
        noise = mx.random.uniform(-1, 1, parameter.shape, key=mx.random.key(next(seeds)))
        if parameter.ndim == 1:
            return (path.endswith("weight") + 0.1 * noise).astype(dtype)  # norms scale by about one
        return (noise * math.prod(parameter.shape[1:]) ** -0.5).astype(dtype)

    module.update(tree_map_with_path(draw, module.parameters()))
    read_weights(module.eval())
    return module


def _drawn(name: str, dtype: mx.Dtype, side: int, rows: int) -> tuple[nn.Module, list[mx.array]]:
    """Return a random network and its inputs in ``dtype``: token ids, or latents and a UNet's embeddings of prompts."""
    module, keys = _random_network(name, dtype), mx.random.split(mx.random.key(1), 3)
    if isinstance(module, CLIPTextModel):
        return module, [mx.random.randint(0, 49408, (rows, 77), key=keys[0])]
    x, config = mx.random.normal((rows, side, side, 4), key=keys[0]), module.config
    if isinstance(module, AutoencoderKL):
        return module, [(x * config.scaling_factor).astype(dtype)]
    arrays = [x, mx.random.normal((rows, 77, config.cross_attention_dim[0]), key=keys[1])]
    if config.addition_embed_type is not None:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        arrays.append(mx.random.normal((rows, pooled), key=keys[2]))
    return module, [array.astype(dtype) for array in arrays]


def _call(module: nn.Module, dtype: mx.Dtype, x: mx.array, *rest: mx.array) -> mx.array:
    if isinstance(module, CLIPTextModel):
        output = module(x)
        return output.pooled_output if "text_projection" in module else output.last_hidden_state
    x, *rest = (value.astype(dtype) for value in (x, *rest))
    if isinstance(module, AutoencoderKL):
        return module.decode(x)
    context, *pooled = rest
    text_time = (pooled[0], mx.full((len(x), 6), 512.0)) if pooled else None
    return module(x, module.embed_time(500.0, dtype, text_time), context)


def _network_error(name: str, dtype: mx.Dtype, side: int, rows: int) -> float:
    """Return the largest difference from the same weights and inputs in float32 on the CPU, over the largest value."""
    module, inputs = _drawn(name, dtype, side, rows)
    ours = _call(module, dtype, *inputs)
    mx.eval(ours)
    mx.disable_compile()  # on a CPU it needs Apple's command line tools, and opens a dialog if they are missing
    try:
        with mx.stream(mx.cpu):
            twin = build(*_NETWORKS[name])
            twin.update(tree_map(lambda x: x.astype(mx.float32), module.parameters()))
            reference = _call(twin, mx.float32, *inputs)
            del twin  # or all converted weights would stay in memory
            mx.eval(reference)
    finally:
        mx.enable_compile()
    return largest_error(ours, reference)


def _batch_error(name: str, dtype: mx.Dtype, side: int) -> float:
    """Return the largest difference between the first row of a batch and that row alone, over the largest value."""
    module, inputs = _drawn(name, dtype, side, rows=3)
    alone, together = (_call(module, dtype, *(x[:n] for x in inputs))[:1] for n in (1, 3))
    return largest_error(together, alone)


def _slices_error(name: str, dtype: mx.Dtype, side: int) -> float:
    """Return the largest difference between decoding in slices and decoding as one graph, over the largest value."""
    module, (z,) = _drawn(name, dtype, side, rows=1)
    slices = module.decode(z, lambda x: tiling.in_slices(module.decoder.layers, x, 3))
    return largest_error(slices, module.decode(z))


def _network_checks(on_cpu: bool) -> Iterator[Check]:
    """Yield the checks of small networks, of rows in a batch, of slices, and of the bundled model's image."""
    types = TYPES[:2] if on_cpu else TYPES
    side = 16 if on_cpu else 48  # below and, in a batch, above the 4096 positions from which Winograd computes
    more = {"unet": ("a row in a batch and alone", _batch_error, _ROWS)}
    more["vae"] = ("in slices and as a whole", _slices_error, _SLICES)
    for name, (part, _) in _NETWORKS.items():
        if name.startswith("small"):
            for dtype in types:
                yield Check(f"{name}, 2 rows", dtype, partial(_network_error, name, dtype, 16, rows=2), _MODULES[dtype])
            about, error, highest = more.get(part, ("", None, {}))
            for dtype in types if error else ():
                yield Check(f"{name}, {about}", dtype, partial(error, name, dtype, side), highest[dtype])
    for dtype in TYPES[:2]:
        measure = partial(_golden_difference, dtype)
        yield Check(f"bundled model: {_GOLDEN_PROMPT}", dtype, measure, 8, "levels of 255")


def _golden_difference(dtype: mx.Dtype) -> float:
    sd = StableDiffusion("tiny", dtype=dtype)
    for x_t in sd.generate_latents(_GOLDEN_PROMPT, seed=_GOLDEN_SEED):
        mx.eval(x_t)
    (picture,) = to_images(sd.decode(x_t))
    golden = open_image(ALIASES["tiny"].folder / "golden.png")
    return float(np.abs(np.array(picture, np.float64) - np.array(golden, np.float64)).max())


# --- networks of full size: values, memory and times ---


def _full_size_checks(on_cpu: bool) -> Iterator[Check]:
    """Yield checks of SD 1.5 and, where it fits, SDXL, in the types they run in, network by network."""
    unet, vae, least = "UNet of SD 1.5", "autoencoder of SD 1.5", 0.5 if on_cpu else 0.0
    side, rows, dtype, limits = (32, 1, mx.float32, (0,)) if on_cpu else (64, 2, mx.float16, (0, None))
    measure = partial(_network_error, unet, mx.float16, 8 if on_cpu else 64, rows=1)
    yield Check(f"{unet}, 1 row", mx.float16, measure, _FULL)
    fits_xl = not on_cpu and mx.device_info().get("memory_size", 0) >= _MEMORY_OF_XL
    for name in (unet, "UNet of SDXL")[: 1 + fits_xl]:
        step = f"a step of the {name}, {rows} row{'s' * (rows > 1)} of"
        for size, limit in product((16, 32) if on_cpu else (64,), limits):
            measure = partial(_step_memory, name, dtype, size, rows, limit)
            about = f"memory of {step} {_pixels(size)}" + ", MLX not working ahead" * (limit == 0)
            yield Check(about, dtype, measure, 1.25, PLANNED, least)
        measure = partial(_seconds, partial(_prepare, name, dtype, side, rows))
        yield Check(f"time of {step} {_pixels(side)}", dtype, measure, unit=SECONDS)
    for side in (16,) if on_cpu else (8, 32, 56, 128):
        about, measure = f"memory of decoding {_pixels(side)}", partial(_decoding_memory, vae, side)
        yield Check(f"{about}, MLX not working ahead", mx.float32, measure, 1.25, PLANNED, least)
    side = 16 if on_cpu else 64
    measure = partial(_seconds, partial(_prepare, vae, mx.float32, side, rows=1))
    yield Check(f"time of decoding {_pixels(side)}", mx.float32, measure, unit=SECONDS)


def _pixels(side: int) -> str:
    return f"{8 * side} x {8 * side} pixels"


def _prepare(name: str, dtype: mx.Dtype, side: int, rows: int) -> Callable[[], mx.array]:
    """Return a step of a UNet, or a decoding as planned for the memory; its inputs are in memory."""
    module, inputs = _drawn(name, dtype, side, rows)
    mx.eval(inputs)
    run = partial(tiling.decode, module) if isinstance(module, AutoencoderKL) else partial(_call, module, dtype)
    return partial(run, *inputs)


def _step_memory(name: str, dtype: mx.Dtype, side: int, rows: int, limit: int | None) -> float:
    """Return the peak memory of a step without weights, divided by the planned one, under MLX's memory ``limit``."""
    config = _random_network(name, dtype).config
    model = SimpleNamespace(unet_config=config, rows_at_once=None, dtype=dtype)
    shape = memory.RunShape(1, (side, side), rows=rows)
    planned = partial(memory.step_bytes, model, shape, shape.size)
    return _peak_over(planned, _prepare(name, dtype, side, rows), limit)


def _decoding_memory(name: str, side: int) -> float:
    """Return the peak memory of a decoding without weights, divided by the planned one; MLX does not work ahead."""
    config = _random_network(name, mx.float32).config
    decode = _prepare(name, mx.float32, side, rows=1)
    return _peak_over(lambda: tiling.plan(config, "decoder", (1, side, side, 4)).peak, decode, 0)


def _peak_over(planned: Callable[[], float], compute: Callable[[], mx.array], limit: int | None) -> float:
    """Return the peak memory of ``compute()`` divided by the planned bytes, both under MLX's memory ``limit``."""
    before = mx.set_memory_limit(mx.get_memory_limit() if limit is None else limit)
    try:
        mx.eval(compute())
        mx.clear_cache()
        mx.reset_peak_memory()
        active = mx.get_active_memory()
        mx.eval(compute())
        return (mx.get_peak_memory() - active) / planned()
    finally:
        mx.set_memory_limit(before)


def _seconds(prepare: Callable[[], Callable[[], mx.array]]) -> float:
    """Return the median time of a warm computation, over the runs that fit into a second."""
    compute, times = prepare(), []
    mx.eval(compute())
    while sum(times) < 1 and len(times) < 5:
        start = perf_counter()
        mx.eval(compute())
        times.append(perf_counter() - start)
    return statistics.median(times)


def _kernel_times(on_cpu: bool) -> Iterator[Check]:
    """Yield the times of a convolution, with weights in the layout of the library and of files, and of attention."""
    dtype, side = (mx.float32, 32) if on_cpu else (mx.float16, 64)
    for order in ("as the library has them", "as files have them"):
        prepare = partial(_convolution, dtype, side, order)
        about = f"time of a convolution 3 x 3, 2 x {side} x {side} x 640 to 640, weights {order}"
        yield Check(about, dtype, partial(_seconds, prepare), unit=SECONDS)
    for positions in (1024,) if on_cpu else (4096, 36864):
        about = f"time of attention, 2 rows, 8 heads of 40, {positions} positions"
        yield Check(about, dtype, partial(_seconds, partial(_attention, dtype, positions)), unit=SECONDS)


def _convolution(dtype: mx.Dtype, side: int, order: str) -> Callable[[], mx.array]:
    x, w = mx.ones((2, side, side, 640), dtype), mx.full((640, 640, 3, 3), 0.01, dtype)
    w = mx.contiguous(w)
    w = mx.contiguous(w.transpose(0, 2, 3, 1)) if "library" in order else w.transpose(0, 2, 3, 1)
    mx.eval(x, w)
    return partial(mx.conv2d, x, w, padding=1)


def _attention(dtype: mx.Dtype, positions: int) -> Callable[[], mx.array]:
    q = mx.random.normal((2, 8, positions, 40), dtype, key=mx.random.key(0))
    mx.eval(q)
    return partial(attention, q, q, q, 2**26)

"""Decode and encode images of any size within a memory budget, in one of three forms.

1. As one graph, in MLX's order of evaluation: decoding an image of 512 × 512 takes gigabytes.
2. In slices of a few rows, evaluated one after the other and freed after their last use. A convolution needs one row of
   its neighbours, and a group norm the mean and variance of all slices. The result is exact.
3. In overlapping tiles, each in slices, for images whose maps do not fit. This is an approximation: norms and attention
   see a tile instead of the image.
"""

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, product, tee

import mlx.core as mx
import mlx.nn as nn

from . import winograd
from .config import AutoencoderConfig
from .layers import Conv2d, Downsample2D, GroupNorm, Kernel, ResnetBlock2D, scaled, scaled_silu
from .seamless import is_seamless, pad, seamless, wrap
from .taesd import AutoencoderTiny, AutoencoderTinyConfig, TinyBlock
from .upsampling import Upsample2D, UpsampledConv2d, convolve_doubled, sum_taps, sums_pay, upsample_nearest
from .vae import LARGEST_SCORES, AutoencoderKL, Network, SpatialAttention

Autoencoder = AutoencoderKL | AutoencoderTiny
Config = AutoencoderConfig | AutoencoderTinyConfig
Slices = Iterable[mx.array]  # of one map [1, H, W, C], from the top down

_log = logging.getLogger("stable_diffusion")

# CPU: measured (benchmarks/vae.py). GPU: computed, not measured on a Mac, by MLX 0.32's rules: a Winograd convolution
# takes 4.6 maps (mlx/backend/metal/conv.cpp) and is a command buffer (device.cpp), of which 10 wait (transforms.cpp).
_GRAPH = {mx.cpu: 78, mx.gpu: 140}  # bytes per pixel and channel: a CPU unfolds inputs of convolutions
_TINY_GRAPH = {mx.cpu: 55, mx.gpu: 140}
_LARGEST_GRAPH = {mx.cpu: 2**28, mx.gpu: 7 * 2**27}  # bytes; above it slices are as fast; a GPU's is below 128 pixels
_SLICE = {mx.cpu: 2**11, mx.gpu: 2**15}  # pixels: unfolded, they fit a CPU's caches; a GPU needs more at a time
_WORK = {mx.cpu: 75, mx.gpu: 40}  # bytes per pixel and channel of a slice
_MARGIN = 1.1  # ratio of the budget to the expected peak
_LEAST = 1e-6  # smallest weight of a tile, where it may be the only one
_SMALLEST_TILE = 16  # latents: smaller tiles would see nothing of their surroundings


@dataclass(frozen=True)
class VAEPlan:
    """Describe how an encoder or decoder runs, and its peak of memory."""

    peak: float  # bytes beside the weights
    rows: int | None = None  # rows of a slice; None for one graph
    tile: int | None = None  # side of tiles in latents; None without tiles


def plan(config: Config, half: str, shape: tuple[int, ...], budget: float | None = None, itemsize: int = 4) -> VAEPlan:
    """Choose how the ``half`` ("encoder" or "decoder") of an autoencoder runs on an input of ``shape`` [n, h, w, C].

    ``budget`` is in bytes beside the weights, by default a quarter of the machine's memory; ``itemsize`` in bytes.
    """
    device, scale = mx.default_device().type, config.scale
    room = (default_budget() if budget is None else budget) / _MARGIN
    n, *sides = shape[:3]
    height, width = (side * scale for side in sides) if half == "decoder" else sides
    channels = config.widest(half)
    graph = (_GRAPH if isinstance(config, AutoencoderConfig) else _TINY_GRAPH)[device] * channels * n * height * width
    if graph <= min(_LARGEST_GRAPH[device] / _MARGIN, room):
        return VAEPlan(graph)
    fewest = winograd.TILE if device == mx.cpu else 1
    rows = max(_SLICE[device] // width, 1)

    def peak(positions: float, width: int) -> float:
        # Maps of two layers in slices, or scores in pieces, twice for the softmax.
        maps = itemsize * channels * scale**2 * positions
        slices = _WORK[device] * channels * min(max(_SLICE[device], fewest * width), scale**2 * positions)
        weights = _transformed_weights(config, half, maps) if device == mx.cpu else 0
        return max(maps + slices + weights, min(8 * positions**2, 2 * LARGEST_SCORES))

    positions, blended = height * width / scale**2, 32 * height * width  # the last is the result
    if (whole := peak(positions, width)) <= room:
        return VAEPlan(whole, rows)
    sides = range(int(math.sqrt(positions)) // 8 * 8, _SMALLEST_TILE, -8)
    side = next((side for side in sides if peak(side**2, side * scale) + blended <= room), _SMALLEST_TILE)
    return VAEPlan(peak(side**2, side * scale) + blended, rows, side)


def default_budget() -> float:
    """Return a quarter of the machine's memory, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4


def _transformed_weights(config: Config, half: str, maps: float) -> float:
    """Return the bytes of transformed weights that are in memory beside ``maps``, the bytes of the largest maps.

    Without norms all layers run at the same time. With norms two do, and layers with most channels have smaller maps.
    """
    if isinstance(config, AutoencoderConfig):
        return max(2 * winograd.weight_bytes(max(config.block_out_channels)) - maps / 3, 0)
    widths, blocks = getattr(config, f"{half}_block_out_channels"), getattr(config, f"num_{half}_blocks")
    return sum(3 * count * winograd.weight_bytes(width) for count, width in zip(blocks, widths, strict=True))


def decode(vae: Autoencoder, z: mx.array, budget: float | None = None) -> mx.array:
    """Decode latents like ``vae.decode``, within a ``budget``, see :func:`plan`; small images are one lazy graph."""
    return vae.decode(z, partial(_run, vae, "decoder", budget))


def encode(vae: Autoencoder, pixels: mx.array, budget: float | None = None) -> tuple[mx.array, mx.array]:
    """Encode pixels like ``vae.encode``, within a ``budget``."""
    return vae.encode(pixels, partial(_run, vae, "encoder", budget))


def _run(vae: Autoencoder, half: str, budget: float | None, x: mx.array) -> mx.array:
    """Run the encoder or decoder by its plan. If even the smallest tiles do not fit, the log says so."""
    network, chosen = vae[half], plan(vae.config, half, x.shape, budget, x.itemsize)
    if chosen.rows is None:
        return network(x)
    if len(x) > 1:
        return mx.concatenate([_now(_run(vae, half, budget, picture[None])) for picture in x])
    if budget is not None and chosen.peak > budget:
        text = "memory is short: the autoencoder needs %.2f GB, the limit is %.2f GB"
        _log.warning(text, chosen.peak / 1e9, budget / 1e9)
    if chosen.tile is None:
        return in_slices(network.layers, x, chosen.rows)
    down, up = (vae.config.scale, 1) if half == "encoder" else (1, vae.config.scale)
    return blend_tiles(partial(in_slices, network.layers, rows=chosen.rows), x, chosen.tile, down, up)


def blend_tiles(network: Network, x: mx.array, side: int, down: int, up: int, margin: int = 0) -> mx.array:
    """Run ``network`` on tiles of x [1, H, W, C] that overlap by a quarter or more, blended linearly.

    A tile has ``side`` latents each way; a latent has ``down`` positions of x each way and ``up`` of the result. The
    remainder at the end is cut off. The outer ``margin`` latents of a tile inside the map are not used.
    """
    if axes := [axis for axis in "yx" if is_seamless(axis)]:  # tiles see beyond the edge
        for axis in axes:
            x = wrap(x, axis, side // 4 * down, side // 4 * down)
        with seamless(""):
            y = blend_tiles(network, x, side, down, up, margin)
        top, left = (side // 4 * up * (axis in axes) for axis in "yx")
        return y[:, top : y.shape[1] - top, left : y.shape[2] - left]
    h, w = (length // down for length in x.shape[1:3])
    blended, total = mx.zeros((1, h * up, w * up, 1)), mx.zeros((1, h * up, w * up, 1))
    for (top, bottom), (left, right) in product(spans(h, side), spans(w, side)):
        tile = network(x[:, top * down : bottom * down, left * down : right * down])
        if blended.shape[-1] != tile.shape[-1]:  # the first
            blended = mx.repeat(blended, tile.shape[-1], axis=-1)
        rise, across = (_ramp(*span, up, margin) for span in ((top, bottom, h), (left, right, w)))
        weights = rise[:, None, None] * across[:, None]
        here = slice(None), slice(top * up, bottom * up), slice(left * up, right * up)
        blended[here] += tile * weights
        total[here] += weights
        mx.eval(blended, total)  # or all tiles would be computed at once
    return (blended / total).astype(x.dtype)


def _ramp(start: int, end: int, length: int, up: int, margin: int) -> mx.array:
    """Return the weights of a tile along an axis of the result, which has ``up`` * ``length`` positions."""
    n = (end - start) * up
    before, after = margin * up * (start > 0), margin * up * (end < length)
    return mx.maximum(mx.minimum(mx.arange(n) + 0.5 - before, mx.arange(n, 0, -1) - 0.5 - after), _LEAST)


def spans(length: int, side: int) -> list[tuple[int, int]]:
    """Spread tiles evenly along an axis of latents: the start and the end of each."""
    side = min(side, length)
    gaps = math.ceil((length - side) / max(side * 3 // 4, 1))
    starts = [i * (length - side) // max(gaps, 1) for i in range(gaps + 1)]
    return [(start, start + side) for start in starts]


def in_slices(layers: Iterable[Network], x: mx.array, rows: int) -> mx.array:
    """Run ``layers`` one after the other on a map [1, H, W, C] and evaluate the result.

    Slices have ``rows`` rows at every level of a network, since maps with more channels are narrower. They have more
    rows if Winograd's algorithm needs them.
    """
    slices: Slices = [x]
    for layer in layers:
        run = _RUN.get(type(layer))
        slices = map(layer, slices) if run is None else run(layer, slices, rows)
    return mx.concatenate(list(slices), axis=1)


def _now(x: mx.array) -> mx.array:
    """Evaluate a slice, so that its inputs can be freed."""
    mx.eval(x)
    return x


def _peek(slices: Slices) -> tuple[mx.array, Iterator[mx.array]]:
    """Return the first slice, and all of them."""
    slices = iter(slices)
    first = next(slices)
    return first, chain([first], slices)


def _parted(slices: Slices, height: int, overlap: int = 0) -> Iterator[mx.array]:
    """Yield the rows of a map ``height`` at a time, plus the first ``overlap`` of the next ones."""
    parts: list[mx.array] = []
    for x in slices:
        parts.append(x)
        if sum(part.shape[1] for part in parts) >= height + overlap:
            part = mx.concatenate(parts, axis=1)
            while part.shape[1] >= height + overlap:
                yield part[:, : height + overlap]
                part = part[:, height:]
            parts = [part] if part.shape[1] else []
    if sum(part.shape[1] for part in parts) > overlap:
        yield mx.concatenate(parts, axis=1)


def _windows(slices: Slices, height: int) -> Iterator[mx.array]:
    """Yield the rows of a map ``height`` at a time, plus one row above and below, zeros or the opposite edge."""
    if is_seamless("y"):  # the last row comes first
        slices = deque(map(_now, slices))
        above, below = slices[-1][:, -1:], slices[0][:, :1]
    else:
        first, slices = _peek(slices)
        above = below = mx.zeros((1, 1, *first.shape[2:]), first.dtype)
    return _parted(chain([above], slices, [below]), height, overlap=2)


def _height(conv: Conv2d, width: int, rows: int) -> int:
    """Return ``rows``, or for Winograd's algorithm more, in whole tiles, so that transforming the weights pays."""
    if not winograd.suits(conv.weight, conv.stride):
        return rows
    return math.ceil(max(rows, winograd.fewest_positions(len(conv.weight)) / width) / winograd.TILE) * winograd.TILE


def _kernel(conv: Conv2d) -> Network:
    """Return the convolution without padding, evaluated at once."""
    tiled = winograd.suits(conv.weight, conv.stride)
    weight = _now(winograd.transform(conv.weight)) if tiled else conv.weight

    def kernel(x: mx.array) -> mx.array:
        y = winograd.convolve(x, weight) if tiled else mx.conv2d(x, weight, conv.stride)
        return _now(y + conv.bias if "bias" in conv else y)

    return kernel


def _convolve(conv: Conv2d, slices: Slices, rows: int) -> Iterator[mx.array]:
    """Run a 3×3 convolution. Without padding it is a ``Downsample2D``'s, which pads only below and on the right."""
    x, slices = _peek(slices)
    first, sides = (0, (1, 1)) if conv.padding[0] else (1, (0, 1))
    kernel = _kernel(conv)
    for window in _windows(slices, _height(conv, x.shape[2], rows) * conv.stride[0]):
        window = pad(window[:, first:], (0, 0), sides)
        if window.shape[1] >= 3:  # less is a last row that a ``Downsample2D`` drops
            yield kernel(window)


def _upsample(conv: Conv2d, slices: Slices, rows: int) -> Iterator[mx.array]:
    """Double height and width and run a 3×3 convolution."""
    x, slices = _peek(slices)
    height = _height(conv, 2 * x.shape[2], rows)
    if not sums_pay((height, x.shape[2]), conv):
        doubled = (upsample_nearest(window)[:, 1:-1] for window in _windows(slices, math.ceil(height / 2)))
        padded = (pad(window, (0, 0), (1, 1)) for window in doubled)
        yield from _parted(map(_kernel(conv), padded), height)
        return
    sums = sum_taps(conv.weight)
    for window in _windows(slices, rows):
        y = _now(convolve_doubled(window, sums, conv.get("bias"), padding=(0, 1)))
        yield from mx.split(y, [rows], axis=1) if y.shape[1] > rows else [y]


def _normalized(norm: GroupNorm, slices: deque[mx.array], kernel: Kernel = scaled) -> Iterator[mx.array]:
    """Normalize by mean and variance of the groups over all slices (Chan et al. 1979), and take each from the queue."""
    heights, means, variances = zip(*((x.shape[1], *_now(norm.moments(x))) for x in slices), strict=True)
    fractions = mx.array(heights)[:, None, None, None] / sum(heights)
    means, variances = mx.concatenate(means), mx.concatenate(variances)
    mean = (fractions * means).sum(axis=0, keepdims=True)
    variance = (fractions * (variances + mx.square(means - mean))).sum(axis=0, keepdims=True)
    while slices:
        yield norm.normalize(slices.popleft(), mean, variance, kernel)


def _resnet(block: ResnetBlock2D, slices: Slices, rows: int) -> Iterator[mx.array]:
    first, slices = _peek(slices)
    rows = _height(block.conv2, first.shape[2], rows)
    x = deque(map(_now, _parted(slices, rows)))
    y = deque(_convolve(block.conv1, _normalized(block.norm1, x.copy(), scaled_silu), rows))
    for change in _convolve(block.conv2, _normalized(block.norm2, y, scaled_silu), rows):
        residual = x.popleft()
        yield _now(change + (block.conv_shortcut(residual) if "conv_shortcut" in block else residual))


def _attention(block: SpatialAttention, slices: Slices, rows: int) -> Iterator[mx.array]:
    """Attend on all rows together, at the smallest size."""
    x = _now(block(mx.concatenate(list(slices), axis=1)))
    return iter(mx.split(x, list(range(rows, x.shape[1], rows)), axis=1))


def _tiny_block(block: TinyBlock, slices: Slices, rows: int) -> Iterator[mx.array]:
    *convs, last = block.conv[::2]
    first, slices = _peek(slices)
    x, y = tee(_parted(slices, _height(last, first.shape[2], rows)))
    for conv in convs:
        y = map(nn.relu, _convolve(conv, y, rows))
    return (nn.relu(change + residual) for change, residual in zip(_convolve(last, y, rows), x, strict=True))


_RUN: dict[type, Callable[..., Iterator[mx.array]]] = {
    Conv2d: _convolve,
    GroupNorm: lambda norm, slices, rows: _normalized(norm, deque(map(_now, slices))),
    ResnetBlock2D: _resnet,
    SpatialAttention: _attention,
    Upsample2D: lambda layer, slices, rows: _upsample(layer.conv, slices, rows),
    UpsampledConv2d: _upsample,
    Downsample2D: lambda layer, slices, rows: _convolve(layer.conv, slices, rows),
    TinyBlock: _tiny_block,
}

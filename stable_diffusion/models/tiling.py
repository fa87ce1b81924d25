"""Decode and encode pictures of any size within a budget of memory.

There are these ways to run an autoencoder, of falling appetite:

1. As one graph, which MLX evaluates as it likes. A decoded picture of 512 × 512 takes gigabytes.
2. Layer by layer over bands of rows. A convolution needs of its neighbours one row only, and a group norm the mean and
   the variance of all bands together, so the result is that of the whole. Between two layers that read a map twice it
   is kept as a list of bands, each of which is let go of when it was used last.
3. The same with thinner bands, then with maps that are kept in half precision: within half a level of 255 of the whole.
4. In overlapping tiles, each of them as in 3, with their overlaps blended. Norms and attention see a tile instead of
   the picture, so this is an approximation, for what is left: pictures that are too large as a whole.
"""

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, tee

import mlx.core as mx
import mlx.nn as nn

from .kernels import silu
from .layers import Context, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D, upsample_nearest
from .taesd import AutoencoderTiny, TinyBlock, Upsample
from .vae import AutoencoderKL, Network, SpatialAttention

Autoencoder = AutoencoderKL | AutoencoderTiny
Bands = Iterable[mx.array]  # the rows of one map, [1, r, W, C] each, from the top down

_log = logging.getLogger("stable_diffusion")

# What a band takes as the input of a 3×3 convolution, unfolded to 9 values for each, as MLX's CPU kernels do: in the
# caches of a CPU products run twice as fast. A GPU unfolds nothing, but wants more work at a time.
_BANDS = {mx.cpu: (2**23, 2**21), mx.gpu: (2**28, 2**25)}
_WHOLE = {mx.cpu: 2**28, mx.gpu: 2**30}  # bytes at most of what is left to one graph: beyond, bands are as fast
_MARGIN = 1.1  # of what may be taken over what is expected
_SMALLEST_TILE = 16  # latents: less would show nothing of what is around


@dataclass(frozen=True)
class Way:
    """How a network is run on a picture, and the bytes that this is expected to take at most beside the weights.

    Without ``band`` it is one graph. ``halved`` maps are kept in half precision, ``side`` is that of tiles in latents.
    """

    peak: float
    band: int | None = None
    halved: bool = False
    side: int | None = None


def decode(vae: Autoencoder, z: mx.array, budget: float | None = None) -> mx.array:
    """Latents [n, h, w, 4] -> pixels [n, 8h, 8w, 3], about [-1, 1] and not clipped.

    Small pictures are one lazy graph. Otherwise they are computed at once, one after the other.

    Args:
        budget: bytes of memory that this may take beside the weights; None is a quarter of the machine's. Where not
            even the smallest tiles fit, the log says so.
    """
    if way(vae.decoder, z, 1, budget).band is None:
        return vae.decode(z)
    run = partial(_run, vae.decoder, down=1, up=vae.config.scale, budget=budget)
    return mx.concatenate([vae.decode(one[None], run) for one in z])


def encode(vae: Autoencoder, pixels: mx.array, budget: float | None = None) -> tuple[mx.array, mx.array]:
    """Pixels [n, H, W, 3] in [-1, 1] -> (mean, log variance) of the latents, each [n, H / 8, W / 8, 4].

    ``budget`` is that of :func:`decode`.
    """
    if way(vae.encoder, pixels, vae.config.scale, budget).band is None:
        return vae.encode(pixels)
    run = partial(_run, vae.encoder, down=vae.config.scale, up=1, budget=budget)
    means, logvars = zip(*(vae.encode(one[None], run) for one in pixels), strict=True)
    return mx.concatenate(means), mx.concatenate(logvars)


def way(network: nn.Module, x: mx.array, down: int, budget: float | None = None) -> Way:
    """How pictures [n, H, W, C] are decoded or encoded within ``budget``: exactly if possible, or in the largest tiles.

    ``down`` are the positions of x for one of the latents, in each direction. Nothing is computed.
    """
    kind = mx.default_device().type
    if budget is None:
        budget = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    whole = len(x) * peak_as_a_whole(network, x[:1])
    if _MARGIN * whole <= min(_WHOLE[kind], budget):
        return Way(whole)
    thin = _BANDS[kind][-1]
    sides = range(max(x.shape[1:3]) // down // 8 * 8, _SMALLEST_TILE - 1, -8)
    ways = [(band, False, None) for band in _BANDS[kind]] + [(thin, True, side) for side in (None, *sides)]
    for band, halved, side in ways:
        part = x[:1] if side is None else x[:1, : side * down, : side * down]
        blended = 0 if side is None else 2 * 4 * math.prod(list(_shapes(network, x))[-1][-1])
        found = Way(peak_in_bands(network, part, band, halved) + blended, band, halved, side)
        if _MARGIN * found.peak <= budget:
            break
    return found


def _run(network: nn.Module, x: mx.array, *, down: int, up: int, budget: float | None) -> mx.array:
    """``network`` on one picture; its output has ``up`` / ``down`` times the height of ``x``."""
    chosen = way(network, x, down, budget)
    if budget is not None and chosen.peak > budget:
        _log.warning(
            "memory is short: the autoencoder may take %.2f GB and needs %.2f GB for the smallest tile of a picture",
            budget / 1e9,
            chosen.peak / 1e9,
        )
    if chosen.band is None:  # several pictures would have been too much
        return network(x)
    return in_bands(network.layers, x, chosen) if chosen.side is None else in_tiles(network, x, chosen, down, up)


def peak_as_a_whole(network: nn.Module, x: mx.array) -> float:
    """Bytes that MLX is expected to take at most for ``network(x)`` beside the weights, x [1, H, W, C].

    On the CPU the inputs of several convolutions are in memory at a time, unfolded, as MLX runs ahead of what is
    computed: more of them where little else is between two convolutions. The figure for a GPU, where some maps are held
    but nothing is unfolded, is an estimate.
    """
    largest = max(h * w * c for layer, (h, w, c), _ in _shapes(network, x) if not isinstance(layer, GroupNorm))
    if mx.default_device() == mx.gpu:
        return 4 * largest * x.itemsize
    if isinstance(network, nn.Sequential):
        inputs = 8.0
    else:  # an encoder has its largest maps first: there is nothing before them that MLX would wait for
        inputs = 5.25 if any(isinstance(layer, Downsample2D) for layer in network.layers) else 4
    return inputs * 9 * 4 * largest


def peak_in_bands(network: nn.Module, x: mx.array, band: int, halved: bool = False) -> float:
    """Bytes that :func:`in_bands` is expected to take at most beside the weights, x [1, H, W, C].

    That is two maps of a residual block, its input and what is between its convolutions, and a few bands; or
    the attention's scores in a few shapes.
    """
    most = 0.0
    kept = min(x.itemsize, 2) if halved else x.itemsize
    for layer, (h, w, c), (h_out, w_out, c_out) in _shapes(network, x):
        before, after = h * w * c, h_out * w_out * c_out
        # The fewest rows of a band are two.
        rows = min(max(band, 2 * 9 * 4 * w_out * max(c, c_out)), 9 * 4 * h * w * max(c, c_out))
        if isinstance(layer, SpatialAttention):
            scores = min(max(band, 2 * 4 * w * h * w), 4 * (h * w) ** 2)
            most = max(most, (5 * x.itemsize + kept) * before + 2.25 * scores)
        elif isinstance(layer, ResnetBlock2D):
            most = max(most, kept * (before + after) + 2.25 * rows)
        elif isinstance(layer, TinyBlock):  # MLX runs ahead where there are no norms
            most = max(most, x.itemsize * (before + after) + 3.5 * rows)
        else:
            most = max(most, kept * before, kept * after)
    return most


def _shapes(network: nn.Module, x: mx.array) -> Iterator[tuple[Network, tuple[int, int, int], tuple[int, int, int]]]:
    """The layers of ``network`` with the shapes (height, width, channels) of their inputs and outputs."""
    h, w, c = x.shape[1:]
    for layer in network.layers:
        before = h, w, c
        if isinstance(layer, Upsample2D | Upsample):
            h, w = 2 * h, 2 * w
        elif isinstance(layer, Downsample2D):
            h, w = h // 2, w // 2
        elif isinstance(layer, nn.Conv2d):
            h, w, c = (h - 1) // layer.stride[0] + 1, (w - 1) // layer.stride[1] + 1, layer.weight.shape[0]
        elif isinstance(layer, ResnetBlock2D):
            c = layer.conv1.weight.shape[0]
        yield layer, before, (h, w, c)


def in_tiles(network: nn.Module, x: mx.array, how: Way, down: int, up: int) -> mx.array:
    """Run ``network`` on tiles of x [1, H, W, C] that overlap by a quarter or more, blended linearly.

    ``how.side`` is that of a tile in latents, for each of which the input has ``down`` positions in each direction and
    the output ``up``.
    """
    *_, (_, _, (height, width, _)) = _shapes(network, x)
    h, w = height // up, width // up
    blended = None
    for top, bottom, rows in _spans(h, how.side, up):
        for left, right, columns in _spans(w, how.side, up):
            # The last ones take what is left of a picture that is no multiple of latents.
            below, beyond = (None if end == all_ else end * down for end, all_ in ((bottom, h), (right, w)))
            tile = in_bands(network.layers, x[:, top * down : below, left * down : beyond], how)
            tile = tile * rows[:, None, None] * columns[:, None]
            if blended is None:
                blended = mx.zeros((1, h * up, w * up, tile.shape[-1]))
            blended[:, top * up : bottom * up, left * up : right * up] += tile
            mx.eval(blended)  # or all tiles would be computed together
    return blended.astype(x.dtype)


def _spans(length: int, side: int, up: int) -> list[tuple[int, int, mx.array]]:
    """(start, end, weights) of the tiles along an axis, evenly spread; the weights of all add up to 1 everywhere."""
    side = min(side, length)
    count = -(-(length - side) // (side * 3 // 4)) + 1
    starts = [i * (length - side) // max(count - 1, 1) for i in range(count)]
    ramps, total = [], mx.zeros(length * up)
    for i, start in enumerate(starts):
        ramp = mx.ones(side * up)
        places = mx.arange(side * up) + 0.5
        if i > 0:
            ramp = mx.minimum(ramp, places / ((starts[i - 1] + side - start) * up))
        if i < count - 1:
            ramp = mx.minimum(ramp, (side * up - places) / ((start + side - starts[i + 1]) * up))
        ramps.append(ramp)
        total[start * up : (start + side) * up] += ramp
    return [
        (start, start + side, ramp / total[start * up : (start + side) * up])
        for start, ramp in zip(starts, ramps, strict=True)
    ]


def in_bands(layers: Iterable[Network], x: mx.array, how: Way) -> mx.array:
    """Run ``layers`` one after the other on a map [1, H, W, C], band by band; evaluates them all.

    ``how`` has the bytes of a band as the unfolded input of a convolution; it has two rows at least.
    """
    bands: Bands = [x]
    for layer in layers:
        bands = _RUN.get(type(layer), _each)(layer, bands, how)
    return mx.concatenate(list(bands), axis=1)


class _Map:
    """A map that is read more than once, as a list of bands, evaluated.

    In half the memory they are float16 values and a factor each, which brings the largest value far below float16's
    limit: what is lost is a 4096th of every value.
    """

    def __init__(self, bands: Bands, how: Way):
        self._bands = deque(self._keep(band, how.halved) for band in bands)

    @staticmethod
    def _keep(band: mx.array, halved: bool) -> tuple[mx.array, mx.array | None]:
        if not halved or band.itemsize == 2:
            return _now(band), None
        factor = mx.maximum(mx.abs(band).max(), 1e-30) / 2**14
        return _now((band / factor).astype(mx.float16)), factor

    def __iter__(self) -> Iterator[mx.array]:
        return (self._whole(*kept) for kept in self._bands)

    def used_up(self) -> Iterator[mx.array]:
        """Each band once, then nothing holds it any more."""
        while self._bands:
            yield self._whole(*self._bands.popleft())

    @staticmethod
    def _whole(band: mx.array, factor: mx.array | None) -> mx.array:
        return band if factor is None else band.astype(mx.float32) * factor


def _cut(bands: Bands, channels: int, how: Way) -> Iterator[mx.array]:
    """The same rows in bands of a size that suits a convolution, an even number of rows in all but the last."""
    held = None
    for band in bands:
        held = band if held is None else mx.concatenate([held, band], axis=1)
        rows = max(how.band // (9 * 4 * channels * band.shape[2]) // 2 * 2, 2)
        while held is not None and held.shape[1] >= rows:
            yield held[:, :rows]
            held = held[:, rows:] if held.shape[1] > rows else None
    if held is not None:
        yield held


def _widest(conv: nn.Conv2d) -> int:
    """Its channels, of the input or the output."""
    return max(conv.weight.shape)


def _with_neighbours(bands: Bands) -> Iterator[mx.array]:
    """Each band between the last row above it and the first below; beyond the edges are zeros."""
    bands = iter(bands)
    band = next(bands)
    above = mx.zeros_like(band[:, :1])
    for below in chain(bands, [None]):
        edge = mx.zeros_like(above) if below is None else below[:, :1]
        yield mx.concatenate([above, band, edge], axis=1)
        above, band = band[:, -1:], below


def _convolve(conv: nn.Conv2d, bands: Bands, pad_end: bool = False) -> Iterator[mx.array]:
    """A 3×3 convolution. ``pad_end`` pads below and to the right only, as ``Downsample2D`` does with it."""
    first, sides = (1, (0, 1)) if pad_end else (0, (1, 1))
    for band in _with_neighbours(bands):
        band = mx.pad(band[:, first:], [(0, 0), (0, 0), sides, (0, 0)])
        if band.shape[1] < 3:  # the last row of an odd number, with ``pad_end``
            continue
        y = mx.conv2d(band, conv.weight, conv.stride)
        yield _now(y + conv.bias if "bias" in conv else y)


def _now(x: mx.array) -> mx.array:
    """Evaluated, so that what it was made of can be let go of: that is what bands are for."""
    mx.eval(x)
    return x


def _each(layer: Callable[[mx.array], mx.array], bands: Bands, how: Way | None = None) -> Iterator[mx.array]:
    """What looks at single positions."""
    return (layer(band) for band in bands)


def _normalize(norm: GroupNorm, bands: Iterable[mx.array], moments: tuple[mx.array, mx.array]) -> Iterator[mx.array]:
    return (norm.normalize(band, *moments) for band in bands)


def _moments(norm: GroupNorm, bands: Iterable[mx.array]) -> tuple[mx.array, mx.array]:
    """Mean and variance of the groups over all bands (Chan et al. 1979), each [1, 1, 1, C]."""
    rows, means, variances = [], [], []
    for band in bands:
        mean, variance = norm.moments(band)
        mx.eval(mean, variance)
        rows.append(band.shape[1])
        means.append(mean)
        variances.append(variance)
    share = (mx.array(rows) / sum(rows))[:, None]
    means, variances = mx.concatenate(means, axis=2), mx.concatenate(variances, axis=2)
    mean = (share * means).sum(axis=2, keepdims=True)
    return mean, (share * (variances + mx.square(means - mean))).sum(axis=2, keepdims=True)


def _group_norm(norm: GroupNorm, bands: Bands, how: Way) -> Iterator[mx.array]:
    x = _Map(bands, how)
    yield from _normalize(norm, x.used_up(), _moments(norm, x))


def _resnet(block: ResnetBlock2D, bands: Bands, how: Way) -> Iterator[mx.array]:
    x = _Map(_cut(bands, _widest(block.conv1), how), how)
    y = _each(silu, _normalize(block.norm1, x, _moments(block.norm1, x)))
    y = _Map(_convolve(block.conv1, y), how)
    y = _each(silu, _normalize(block.norm2, y.used_up(), _moments(block.norm2, y)))
    for change, band in zip(_convolve(block.conv2, y), x.used_up(), strict=True):
        yield _now(change + (block.conv_shortcut(band) if "conv_shortcut" in block else band))


def _attention(block: SpatialAttention, bands: Bands, how: Way) -> Iterator[mx.array]:
    """Each band looks at all others, of which the keys and values are kept."""
    x = [_now(band) for band in bands]
    positions = sum(band.shape[1] * band.shape[2] for band in x)
    # A position has a score for each of all others, where a convolution unfolds 9 values of a channel.
    x = _Map(_cut(x, max(x[0].shape[-1], positions // 9), how), how)
    moments = _moments(block.group_norm, x)
    normed = mx.concatenate(list(_normalize(block.group_norm, x, moments)), axis=1)
    context = Context(normed.reshape(1, -1, normed.shape[-1]))
    for band in x.used_up():
        yield _now(band + block.look(block.group_norm.normalize(band, *moments), context))


def _upsample(layer: Upsample2D, bands: Bands, how: Way) -> Iterator[mx.array]:
    return _convolve(layer.conv, _cut(_each(upsample_nearest, bands), _widest(layer.conv), how))


def _downsample(layer: Downsample2D, bands: Bands, how: Way) -> Iterator[mx.array]:
    return _convolve(layer.conv, _cut(bands, _widest(layer.conv), how), pad_end=True)


def _tiny_block(block: TinyBlock, bands: Bands, how: Way) -> Iterator[mx.array]:
    *convs, last = block.conv[::2]
    x, y = tee(_cut(bands, _widest(last), how))
    for conv in convs:
        y = _each(nn.relu, _convolve(conv, y))
    return (nn.relu(change + band) for change, band in zip(_convolve(last, y), x, strict=True))


_RUN: dict[type, Callable[..., Iterator[mx.array]]] = {
    nn.Conv2d: lambda conv, bands, how: _convolve(conv, _cut(bands, _widest(conv), how)),
    GroupNorm: _group_norm,
    ResnetBlock2D: _resnet,
    SpatialAttention: _attention,
    Upsample2D: _upsample,
    Downsample2D: _downsample,
    TinyBlock: _tiny_block,
}

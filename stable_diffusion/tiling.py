"""Decode and encode pictures of any size within a budget of memory.

There are three ways to run an autoencoder, of falling appetite:

1. As one graph, which MLX evaluates as it likes. A decoded picture of 512 × 512 takes gigabytes.
2. Layer by layer over bands of rows. A convolution needs of its neighbours one row only, and a group norm the mean and
   the variance of all bands together, so the result is that of the whole. Between two layers that read a map twice it
   is kept as a list of bands, each of which is let go of when it was used last.
3. In overlapping tiles, each by bands, with their overlaps blended. Norms and attention see a tile instead of the
   picture, so this is an approximation, for what is left: pictures that are too large as a whole.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, tee

import mlx.core as mx
import mlx.nn as nn

from .models.kernels import silu
from .models.layers import Context, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D, upsample_nearest
from .models.taesd import AutoencoderTiny, TinyBlock, Upsample
from .models.vae import AutoencoderKL, Network, SpatialAttention

Autoencoder = AutoencoderKL | AutoencoderTiny
Bands = Iterable[mx.array]  # the rows of one map, [1, r, W, C] each, from the top down

# What a band takes as the input of a 3×3 convolution, unfolded to 9 values for each, as MLX's CPU kernels do: in the
# caches of a CPU products run twice as fast. A GPU unfolds nothing, but wants more work at a time.
_BAND = {mx.cpu: 2**23, mx.gpu: 2**29}
_WHOLE = {mx.cpu: 2**28, mx.gpu: 2**30}  # bytes at most of what is left to one graph: beyond, bands are as fast
_SMALLEST_TILE = 16  # latents: less would show nothing of what is around


def decode(vae: Autoencoder, z: mx.array, budget: float | None = None) -> mx.array:
    """Latents [n, h, w, 4] -> pixels [n, 8h, 8w, 3], about [-1, 1] and not clipped.

    Small pictures are one lazy graph. Otherwise they are computed at once, one after the other.

    Args:
        budget: bytes of memory that this may take beside the weights; None is a quarter of the machine's. Pictures
            that need more are decoded in tiles.

    Raises ValueError where not even a tile fits into ``budget``.
    """
    if _fits_whole(vae.decoder, z, budget):
        return vae.decode(z)
    return mx.concatenate([vae.decode(one[None], _within(budget, vae.decoder, 1, vae.config.scale)) for one in z])


def encode(vae: Autoencoder, pixels: mx.array, budget: float | None = None) -> tuple[mx.array, mx.array]:
    """Pixels [n, H, W, 3] in [-1, 1] -> (mean, log variance) of the latents, each [n, H / 8, W / 8, 4].

    ``budget`` and errors are those of :func:`decode`.
    """
    if _fits_whole(vae.encoder, pixels, budget):
        return vae.encode(pixels)
    run = _within(budget, vae.encoder, vae.config.scale, 1)
    means, logvars = zip(*(vae.encode(one[None], run) for one in pixels), strict=True)
    return mx.concatenate(means), mx.concatenate(logvars)


def _fits_whole(network: nn.Module, x: mx.array, budget: float | None) -> bool:
    most = _WHOLE[mx.default_device().type]
    return len(x) * peak_as_a_whole(network, x[:1]) <= min(most, most if budget is None else budget)


def _within(budget: float | None, network: nn.Module, down: int, up: int) -> Network:
    """How to run ``network``, whose output has ``up`` / ``down`` times the height of its input, on one picture."""
    if budget is None:
        budget = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4

    def run(x: mx.array) -> mx.array:
        if peak_in_bands(network, x) <= budget:
            return in_bands(network.layers, x)
        sides = range(max(x.shape[1:3]) // down // 8 * 8, _SMALLEST_TILE - 1, -8)
        peaks = {side: peak_in_bands(network, x[:, : side * down, : side * down]) for side in sides}
        side = next((side for side in sides if peaks[side] <= budget), None)
        if side is None:
            least = min(peaks.values(), default=peak_in_bands(network, x))
            raise ValueError(
                f"{budget / 1e9:.2f} GB are too little for the autoencoder, which takes {least / 1e9:.2f} GB for a "
                "small tile of a picture"
            )
        return in_tiles(network, x, side, down, up)

    return run


def peak_as_a_whole(network: nn.Module, x: mx.array) -> float:
    """Bytes that MLX is expected to take at most for ``network(x)`` beside the weights, x [1, H, W, C].

    On the CPU the inputs of several convolutions are in memory at a time, unfolded, as MLX runs ahead of what is
    computed: more of them where little else is between two convolutions. The figure for a GPU, where some maps are held
    but nothing is unfolded, is an estimate.
    """
    largest = max(h * w * c for layer, (h, w, c), _ in _shapes(network, x) if not isinstance(layer, GroupNorm))
    if mx.default_device() == mx.gpu:
        return 4 * largest * x.itemsize
    return (8 if isinstance(network, nn.Sequential) else 4) * 9 * 4 * largest


def peak_in_bands(network: nn.Module, x: mx.array) -> float:
    """Bytes that :func:`in_bands` is expected to take at most beside the weights, x [1, H, W, C].

    That is two maps of a residual block, its input and what is between its convolutions, and a few bands; or
    the attention's scores in a few shapes.
    """
    most = 0.0
    for layer, (h, w, c), (h_out, w_out, c_out) in _shapes(network, x):
        before, after = h * w * c * x.itemsize, h_out * w_out * c_out * x.itemsize
        band = max(_BAND[mx.default_device().type], 2 * 9 * 4 * w_out * max(c, c_out))
        if isinstance(layer, SpatialAttention):
            scores = min(max(_BAND[mx.default_device().type], 2 * 4 * w * h * w), 4 * (h * w) ** 2)
            most = max(most, 6 * before + 7 * scores)
        elif isinstance(layer, ResnetBlock2D | TinyBlock):
            bands = 2.5 if isinstance(layer, ResnetBlock2D) else 3.5  # MLX runs ahead where there are no norms
            most = max(most, before + after + bands * min(band, 9 * 4 * h * w * max(c, c_out)))
        else:
            most = max(most, before, after)
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


def in_tiles(network: nn.Module, x: mx.array, side: int, down: int, up: int) -> mx.array:
    """Run ``network`` on tiles of x [1, H, W, C] that overlap by a quarter or more, blended linearly.

    ``side`` is that of a tile in latents, for each of which the input has ``down`` positions in each direction and the
    output ``up``.
    """
    *_, (_, _, (height, width, _)) = _shapes(network, x)
    h, w = height // up, width // up
    blended = None
    for top, bottom, rows in _spans(h, side, up):
        for left, right, columns in _spans(w, side, up):
            # The last ones take what is left of a picture that is no multiple of latents.
            below, beyond = (None if end == all_ else end * down for end, all_ in ((bottom, h), (right, w)))
            tile = in_bands(network.layers, x[:, top * down : below, left * down : beyond])
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


def in_bands(layers: Iterable[Network], x: mx.array) -> mx.array:
    """Run ``layers`` one after the other on a map [1, H, W, C], band by band; evaluates them all."""
    bands: Bands = [x]
    for layer in layers:
        bands = _RUN.get(type(layer), _each)(layer, bands)
    return mx.concatenate(list(bands), axis=1)


def _cut(bands: Bands, channels: int) -> Iterator[mx.array]:
    """The same rows in bands of a size that suits a convolution, an even number of rows in all but the last."""
    held = None
    for band in bands:
        held = band if held is None else mx.concatenate([held, band], axis=1)
        unfolded = 9 * 4 * channels * band.shape[2]
        rows = max(_BAND[mx.default_device().type] // unfolded // 2 * 2, 2)
        while held is not None and held.shape[1] >= rows:
            yield held[:, :rows]
            held = held[:, rows:] if held.shape[1] > rows else None
    if held is not None:
        yield held


def _widest(conv: nn.Conv2d) -> int:
    """Its channels, of the input or the output."""
    return max(conv.weight.shape)


def _used_up(bands: deque[mx.array]) -> Iterator[mx.array]:
    """Each band once, then nothing holds it any more."""
    while bands:
        yield bands.popleft()


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


def _each(layer: Callable[[mx.array], mx.array], bands: Bands) -> Iterator[mx.array]:
    """What looks at single positions."""
    return (layer(band) for band in bands)


def _normalize(norm: GroupNorm, bands: Iterable[mx.array], moments: tuple[mx.array, mx.array]) -> Iterator[mx.array]:
    return (norm.normalize(band, *moments) for band in bands)


def _moments(norm: GroupNorm, bands: Iterable[mx.array]) -> tuple[mx.array, mx.array]:
    """Mean and variance of the groups over all bands (Chan et al. 1979), each [1, G, 1]."""
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


def _group_norm(norm: GroupNorm, bands: Bands) -> Iterator[mx.array]:
    x = deque(_now(band) for band in bands)
    yield from _normalize(norm, _used_up(x), _moments(norm, x))


def _resnet(block: ResnetBlock2D, bands: Bands) -> Iterator[mx.array]:
    x = deque(_now(band) for band in _cut(bands, _widest(block.conv1)))
    y = _each(silu, _normalize(block.norm1, x, _moments(block.norm1, x)))
    y = deque(_convolve(block.conv1, y))
    y = _each(silu, _normalize(block.norm2, _used_up(y), _moments(block.norm2, y)))
    for change, band in zip(_convolve(block.conv2, y), _used_up(x), strict=True):
        yield _now(change + (block.conv_shortcut(band) if "conv_shortcut" in block else band))


def _attention(block: SpatialAttention, bands: Bands) -> Iterator[mx.array]:
    """Each band looks at all others, of which the keys and values are kept."""
    x = [_now(band) for band in bands]
    positions = sum(band.shape[1] * band.shape[2] for band in x)
    # A position has a score for each of all others, where a convolution unfolds 9 values of a channel.
    x = deque(_cut(x, max(x[0].shape[-1], positions // 9)))
    moments = _moments(block.group_norm, x)
    normed = mx.concatenate(list(_normalize(block.group_norm, x, moments)), axis=1)
    context = Context(normed.reshape(1, -1, normed.shape[-1]))
    for band in _used_up(x):
        yield _now(band + block.look(block.group_norm.normalize(band, *moments), context))


def _upsample(layer: Upsample2D, bands: Bands) -> Iterator[mx.array]:
    return _convolve(layer.conv, _cut(_each(upsample_nearest, bands), _widest(layer.conv)))


def _downsample(layer: Downsample2D, bands: Bands) -> Iterator[mx.array]:
    return _convolve(layer.conv, _cut(bands, _widest(layer.conv)), pad_end=True)


def _tiny_block(block: TinyBlock, bands: Bands) -> Iterator[mx.array]:
    *convs, last = block.conv[::2]
    x, y = tee(_cut(bands, _widest(last)))
    for conv in convs:
        y = _each(nn.relu, _convolve(conv, y))
    return (nn.relu(change + band) for change, band in zip(_convolve(last, y), x, strict=True))


_RUN: dict[type, Callable[..., Iterator[mx.array]]] = {
    nn.Conv2d: lambda conv, bands: _convolve(conv, _cut(bands, _widest(conv))),
    GroupNorm: _group_norm,
    ResnetBlock2D: _resnet,
    SpatialAttention: _attention,
    Upsample2D: _upsample,
    Downsample2D: _downsample,
    TinyBlock: _tiny_block,
}

"""Measure how time and memory of a step and a decoding grow with the size and the number of pictures.

    python -m benchmarks.growth [--shape sd15] [--work step decode] [--sizes 512 768 1024 1536] [--batches 1 2 4]
    python -m benchmarks.growth --shape narrow --work step decode --cpu --sizes 256 512 1024 2048 --batches 1 2 4 8 \
        --picture docs/pictures/growth.png

One step of the UNet without guidance, or one decoding, random weights, float32; memory is the most that it takes beside
the weights. The first table is of one picture; convolutions grow as the pixels do, and self-attention, which lets every
position look at every other, as their square: by four from 512 to 1024, and by sixteen. The second is at the first
size, where all should grow as the batch does. Below each are the exponents of a power law fitted to it: of the pixels
at most 2 for time and 1 for memory, of the batch at most 1. The narrow shape is SD 1.5 with a tenth of its channels,
one head and one layer in each block, so that 2048 x 2048 takes minutes.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from stable_diffusion import StableDiffusion  # noqa: F401, before MLX: it brings OpenBLAS, where there is one

# isort: split
import mlx.core as mx
from mlx import nn

from stable_diffusion.models import cpu
from stable_diffusion.models.layers import Context
from stable_diffusion.models.tiling import decode

from .long_prompts import Cost, cost, random_module
from .shapes import SHAPES, UNETS, VAE

_THIN = {"block_out_channels": [32, 64, 128, 128], "layers_per_block": 1}
NETWORKS = {
    "step": UNETS | {"narrow": UNETS["sd15"] | _THIN | {"attention_head_dim": 1}, "tiny": SHAPES["tiny"]["unet"]},
    "decode": dict.fromkeys(UNETS, VAE) | {"narrow": VAE | _THIN, "tiny": SHAPES["tiny"]["vae"]},
}


def step_of(unet: nn.Module, rows: int, size: int) -> Callable[[], mx.array]:
    """Return a step of the UNet for ``rows`` pictures of ``size`` x ``size`` pixels, once it is warm."""
    config = unet.config
    x = mx.random.normal((rows, size // 8, size // 8, config.in_channels), key=mx.random.key(0))
    context = Context(mx.random.normal((rows, 77, config.cross_attention_dim[0]), key=mx.random.key(1)))
    temb = unet.embed_time(500.0, mx.float32, text_time(unet, rows))  # of the middle of a run
    mx.eval(x, temb, unet(x[:, :8, :8], temb, context))
    return partial(unet, x, temb, context)


def decoding_of(vae: nn.Module, rows: int, size: int) -> Callable[[], mx.array]:
    """Return the decoding of ``rows`` pictures of ``size`` x ``size`` pixels, once it is warm."""
    side = size // 2 ** (len(vae.config.block_out_channels) - 1)
    z = mx.random.normal((rows, side, side, vae.latent_channels), key=mx.random.key(0))
    mx.eval(z, decode(vae, z[:, :8, :8]))
    return partial(decode, vae, z)


def text_time(unet: nn.Module, rows: int) -> tuple[mx.array, mx.array] | None:
    """Return the conditioning of an XL UNet besides the prompt."""
    config = unet.config
    if not config.addition_embed_type:
        return None
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return mx.ones((rows, pooled)), mx.ones((rows, 6))


def exponents(units: Sequence[float], costs: Sequence[Cost]) -> tuple[float, float]:
    """Return the powers of the units by which time and memory grow: slopes of lines through their logarithms."""
    x = [math.log(unit) for unit in units]
    return tuple(statistics.linear_regression(x, [math.log(cost[i]) for cost in costs]).slope for i in (0, 1))


def table(title: str, names: Iterable[str], units: Sequence[float], costs: Iterable[Cost]) -> list[Cost]:
    """Print each row's cost, as it comes, and what a unit of work costs in shares of the first's; return the costs."""
    print(f"{title:16}{'time':>10}{'for the same':>14}{'memory':>12}{'for the same':>14}")
    seen: list[Cost] = []
    for name, unit, cost_of in zip(names, units, costs, strict=True):
        seen.append(cost_of)
        time_share, memory_share = (value / unit / (of / units[0]) for value, of in zip(cost_of, seen[0], strict=True))
        seconds, memory = cost_of
        print(f"{name:16}{seconds:8.2f} s{time_share:14.2f}{memory / 1e9:9.2f} GB{memory_share:14.2f}", flush=True)
    if len(seen) > 1:
        print("{:16}{:10.2f}{:26.2f}".format("exponent", *exponents(units, seen)))
    return seen


def draw(path: Path, title: str, curves: dict[str, list[tuple[Sequence[float], Sequence[Cost]]]]) -> None:
    """Draw time and memory over pixels and batches, with their exponents: {work: [(pixels, costs), (batches, …)]}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for column, unit in enumerate(("megapixels", "pictures at once")):
        for row, (label, scale) in enumerate((("seconds", 1), ("memory, GB", 1e-9))):
            axes = figure.add_subplot(2, 2, 1 + 2 * row + column)
            for work, tables in curves.items():
                units, costs = tables[column]
                name = f"{work}: exponent {exponents(units, costs)[row]:.2f}"
                axes.plot(units, [cost[row] * scale for cost in costs], marker="o", label=name)
            axes.set(xscale="log", yscale="log", xlabel=unit, ylabel=label)
            axes.set_xticks(units, [f"{value:.2g}" for value in units])
            axes.minorticks_off()
            axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=NETWORKS["step"], default="sd15")
    parser.add_argument("--work", choices=NETWORKS, nargs="+", default=["step"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 768, 1024, 1536], help="sides in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="count the time of this process, where others are at work")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw what was measured into this file")
    args = parser.parse_args()
    clock = time.process_time if args.cpu else time.perf_counter
    cpu.tune()
    curves = {}
    for work in args.work:
        network = random_module("unet" if work == "step" else "vae", NETWORKS[work][args.shape])
        make = partial(step_of if work == "step" else decoding_of, network)
        mx.eval(make(1, args.sizes[0])())  # the first is slower
        sizes = (cost(make(1, size), clock, args.repeats) for size in args.sizes)
        pixels = [size**2 / 1e6 for size in args.sizes]
        by_size = table(f"{work}, size", [f"{size} x {size}" for size in args.sizes], pixels, sizes)
        batches = (cost(make(rows, args.sizes[0]), clock, args.repeats) for rows in args.batches)
        by_batch = table(f"{work}, pictures", [str(rows) for rows in args.batches], args.batches, batches)
        curves[work] = [(pixels, by_size), (args.batches, by_batch)]
    if args.picture:
        kind = "of the processor" if args.cpu else "on the clock"
        draw(args.picture, f"{args.shape}, float32, on a CPU, measured; seconds {kind}", curves)


if __name__ == "__main__":
    main()

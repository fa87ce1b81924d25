"""How a step's time and memory grow with the size of the picture, and with the number of pictures made at once.

    python -m benchmarks.growth [--shape sd15] [--sizes 512 768 1024 1536] [--batches 1 2 4]

One step of the UNet at full size, random weights, float32, without guidance; memory is the most that it takes beside
the weights. The first table is of one row; convolutions grow as the pixels do, and self-attention, which lets every
position look at every other, as their square: by four from 512 to 1024, and by sixteen. The second is at the first
size, where all should grow as the batch does.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from stable_diffusion import StableDiffusion  # noqa: F401, before MLX: it brings OpenBLAS, where there is one

# isort: split
import mlx.core as mx
from mlx import nn

from stable_diffusion.models import cpu
from stable_diffusion.models.layers import Context

from .long_prompts import Cost, cost, random_module
from .shapes import UNETS


def step_of(unet: nn.Module, rows: int, size: int) -> Callable[[], mx.array]:
    """Return a step of the UNet for ``rows`` pictures of ``size`` x ``size`` pixels, once it is warm."""
    config = unet.config
    x = mx.random.normal((rows, size // 8, size // 8, config.in_channels), key=mx.random.key(0))
    context = Context(mx.random.normal((rows, 77, config.cross_attention_dim[0]), key=mx.random.key(1)))
    temb = unet.embed_time(500.0, mx.float32, text_time(unet, rows))  # of the middle of a run
    mx.eval(x, temb, unet(x[:, :8, :8], temb, context))
    return partial(unet, x, temb, context)


def text_time(unet: nn.Module, rows: int) -> tuple[mx.array, mx.array] | None:
    """Return the conditioning of an XL UNet besides the prompt."""
    config = unet.config
    if not config.addition_embed_type:
        return None
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return mx.ones((rows, pooled)), mx.ones((rows, 6))


def table(title: str, names: Iterable[str], units: Sequence[float], costs: Iterable[Cost]) -> None:
    """Each row's cost, as it comes, and how much it is for a unit of work in shares of the first's."""
    print(f"{title:16}{'time':>10}{'for the same':>14}{'memory':>12}{'for the same':>14}")
    first: Cost | None = None
    for name, unit, cost_of in zip(names, units, costs, strict=True):
        first = first or cost_of
        time_share, memory_share = (value / unit / (of / units[0]) for value, of in zip(cost_of, first, strict=True))
        seconds, memory = cost_of
        print(f"{name:16}{seconds:8.2f} s{time_share:14.2f}{memory / 1e9:9.2f} GB{memory_share:14.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=UNETS, default="sd15")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 768, 1024, 1536], help="sides in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="count the time of this process, where others are at work")
    args = parser.parse_args()
    clock = time.process_time if args.cpu else time.perf_counter
    cpu.tune()
    unet = random_module("unet", UNETS[args.shape])
    sizes = (cost(step_of(unet, 1, size), clock, args.repeats) for size in args.sizes)
    table("size", [f"{size} x {size}" for size in args.sizes], [size**2 for size in args.sizes], sizes)
    batches = (cost(step_of(unet, rows, args.sizes[0]), clock, args.repeats) for rows in args.batches)
    table("pictures", [str(rows) for rows in args.batches], args.batches, batches)


if __name__ == "__main__":
    main()

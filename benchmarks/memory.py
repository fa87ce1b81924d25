"""Measure what a step of the UNet and the autoencoder take at full size, and hold it against the memory plan.

    python -m benchmarks.memory [--shape sd15 sdxl] [--sizes 512 1024] [--batches 1 2] [--ahead]

The weights are random and in float32, a step has the rows of guidance, and memory is the peak beside the weights. MLX's
memory limit is 0, as in --low_memory on a CPU; with --ahead it is the machine's, and MLX works ahead of the device. The
constants of ``app/memory.py`` and ``models/tiling.py`` come from here.
"""

import argparse
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

from stable_diffusion import StableDiffusion  # noqa: F401, before MLX: it brings OpenBLAS, where there is one

# isort: split
import mlx.core as mx

from stable_diffusion.app.memory import RunShape, step_bytes
from stable_diffusion.models import cpu, tiling

from .growth import step_of
from .long_prompts import cost, random_module
from .shapes import SHAPES


def compare(name: str, planned: float, compute: Callable[[], mx.array]) -> None:
    """Print the planned and the measured bytes of a computation."""
    _, measured = cost(compute, lambda: 0.0, 1)
    ratio = 100 * (planned / measured - 1)
    print(f"{name:32} planned {planned / 1e9:6.3f} GB  measured {measured / 1e9:6.3f} GB  {ratio:+4.0f} %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["sd15", "sdxl"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="sides in pixels (512 1024)")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2], help="images at once (1 2)")
    parser.add_argument("--ahead", action="store_true", help="let MLX work ahead of the device")
    args = parser.parse_args()
    cpu.tune()
    if not args.ahead:
        mx.set_memory_limit(0)
    for shape in args.shape:
        unet = random_module("unet", SHAPES[shape]["unet"])
        model = SimpleNamespace(unet_config=unet.config)
        for size in args.sizes:
            for images in args.batches:
                planned = step_bytes(
                    model, RunShape(images, (size // 8, size // 8)), 2 * images, (size // 8, size // 8)
                )
                compare(f"{shape}, step, {images} at {size}", planned, step_of(unet, 2 * images, size))
    del unet
    vae = random_module("vae", SHAPES["sd15"]["vae"])
    for size in args.sizes:
        latents, pixels = mx.zeros((1, size // 8, size // 8, 4)), mx.zeros((1, size, size, 3))
        planned = tiling.plan(vae.config, "decoder", latents.shape).peak
        compare(f"decoding at {size}", planned, partial(tiling.decode, vae, latents))
        planned = tiling.plan(vae.config, "encoder", pixels.shape).peak
        compare(f"encoding at {size}", planned, partial(tiling.encode, vae, pixels))


if __name__ == "__main__":
    main()

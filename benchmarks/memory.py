"""Measure what a step of the UNet and the autoencoder take at full size, and hold it against the memory plan.

    python -m benchmarks.memory [--shape tiny sd15 sdxl] [--sides 32 64] [--rows 1 2] [--ahead]

The weights are random and in float32, and memory is the peak beside them; of the bundled model it is that of a whole
run. MLX's memory limit is 0, as in --low_memory on a CPU; with --ahead it is the machine's, and MLX works ahead of the
device. The constants of ``app/memory.py`` and ``models/tiling.py`` come from here.
"""

import argparse
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

from stable_diffusion import StableDiffusion  # before MLX: it brings OpenBLAS, where there is one

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


def run_of_tiny(rows: int, side: int) -> Callable[[], mx.array]:
    """Return a run of two steps of the bundled model, with prompts that are encoded and weights that are read."""
    sd = StableDiffusion("tiny")
    sd.ensure_models_are_loaded()
    text, negative_text = sd.encode_prompts("a red circle")
    guidance = {1: 1.0, 2: 5.0}[rows]

    def run() -> mx.array:
        for x_t in sd.generate_latents(text, 1, 2, guidance, negative_text, (side, side), seed=1):
            mx.eval(x_t)
        return x_t

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["tiny", "sd15", "sdxl"])
    parser.add_argument("--sides", type=int, nargs="+", help="of latents (32 64; the bundled model 16 24 32 48)")
    parser.add_argument("--rows", type=int, nargs="*", choices=[1, 2], default=[1, 2], help="of the UNet's batch (1 2)")
    parser.add_argument("--ahead", action="store_true", help="let MLX work ahead of the device")
    args = parser.parse_args()
    cpu.tune()
    if not args.ahead:
        mx.set_memory_limit(0)
    for shape in args.shape:
        unet = random_module("unet", SHAPES[shape]["unet"])
        model = SimpleNamespace(unet_config=unet.config, rows_at_once=None)
        for side in args.sides or ([16, 24, 32, 48] if shape == "tiny" else [32, 64]):
            for rows in args.rows:
                planned = step_bytes(model, RunShape(1, (side, side), rows=rows), (side, side))
                step = run_of_tiny(rows, side) if shape == "tiny" else step_of(unet, rows, 8 * side)
                compare(f"{shape}, step, {rows} rows of {side} x {side}", planned, step)
    del unet
    vae = random_module("vae", SHAPES["sd15"]["vae"])
    for side in args.sides or [32, 64]:
        latents, pixels = mx.zeros((1, side, side, 4)), mx.zeros((1, 8 * side, 8 * side, 3))
        planned = tiling.plan(vae.config, "decoder", latents.shape).peak
        compare(f"decoding {8 * side} x {8 * side}", planned, partial(tiling.decode, vae, latents))
        planned = tiling.plan(vae.config, "encoder", pixels.shape).peak
        compare(f"encoding {8 * side} x {8 * side}", planned, partial(tiling.encode, vae, pixels))


if __name__ == "__main__":
    main()

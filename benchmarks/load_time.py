"""What converting costs and saves: its time and memory, and the time to the first step with and without it.

    python -m benchmarks.load_time FOLDER [--family sdxl]

Writes a checkpoint of full size with random weights in half precision into FOLDER (SD 1.5: 2.1 GB, SDXL: 6.9 GB, and
as much again or less for what is converted), then quantizes it as `-q` does: when it is loaded, and by converting it.
Each is measured in a process of its own. Memory is the peak of MLX's arrays, and that of the process as the system sees
it. Files are read from the system's cache if it keeps them, as it does after a first start.
"""

import argparse
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stable_diffusion import StableDiffusion  # before MLX: it brings OpenBLAS, where there is one

# isort: split
import mlx.core as mx

from stable_diffusion.app.convert import convert
from stable_diffusion.app.engine import TEXT_BITS, UNET_BITS
from stable_diffusion.app.request import Request

from .checkpoints import write_checkpoint
from .shapes import SHAPES

BITS = {"unet_bits": UNET_BITS, "text_bits": TEXT_BITS}


def conversion(source: Path, dest: Path, latents: int) -> dict[str, float]:
    started = time.perf_counter()
    convert(Request(model=str(source), **BITS), dest)
    return {"seconds": time.perf_counter() - started}


def at_load(source: Path, dest: Path, latents: int) -> dict[str, float]:
    return first_step(lambda: StableDiffusion(source, True, **BITS), latents)


def from_converted(source: Path, dest: Path, latents: int) -> dict[str, float]:
    return first_step(lambda: StableDiffusion(dest, True), latents)


def first_step(load: Callable[[], StableDiffusion], latents: int) -> dict[str, float]:
    started = time.perf_counter()
    sd = load()
    sd.ensure_models_are_loaded()
    loaded = time.perf_counter()
    result = {"seconds": loaded - started}
    if latents:
        mx.eval(next(iter(sd.generate_latents("red", 1, 20, cfg_weight=1, latent_size=(latents, latents), seed=0))))
        result["to the first step"] = time.perf_counter() - started
    return result


def measured(work: Callable[..., dict[str, float]], pipe: Any, *arguments: Any) -> None:
    """Send what ``work`` took, from a process that does nothing else."""
    mx.reset_peak_memory()
    result = work(*arguments)
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    pipe.send(result | {"arrays, GB": mx.get_peak_memory() / 1e9, "process, GB": memory / 1e9})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; what this writes there is removed at the end")
    parser.add_argument("--family", choices=SHAPES, default="sd15")
    parser.add_argument("--latents", type=int, default=8, help="side of the first step's latents; 0 takes no step (8)")
    args = parser.parse_args()
    source, dest = args.folder / f"{args.family}-random", args.folder / f"{args.family}-quantized"
    context = multiprocessing.get_context("spawn")
    try:
        write_checkpoint(source, args.family)
        for name, work in {"converting": conversion, "quantized at load": at_load, "converted": from_converted}.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=measured, args=(work, theirs, source, dest, args.latents))
            process.start()
            print(f"{name:20}" + "".join(f"{key} {value:.2f}   " for key, value in ours.recv().items()), flush=True)
            process.join()
    finally:
        for folder in (source, dest):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

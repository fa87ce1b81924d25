"""Measure the start beside the plain time of reading the files, and what converting costs and saves.

    python -m benchmarks.load_time FOLDER [--family sdxl] [--only reading half]

Writes a checkpoint of full size with random weights in half precision into FOLDER (SD 1.5: 2.1 GB, SDXL: 6.9 GB, and
as much again or less for what is converted). It is read plainly, opened in half precision and in float32, and converted
to half precision; then it is quantized as `-q` does: when it is loaded, and by converting it.

Each is measured in a process of its own: from its start to the end of its imports, and then its work, after which the
first step can begin. A prompt and a step follow, and the same once more, which shows whether anything was left for the
first. Reading is `readinto` memory of its own for each file, which is kept, as weights are. Memory is the peak of MLX's
arrays, and that of the process as the system sees it. Files are read from the system's cache if it keeps them, as it
does after a first start. Where others are at work, compare seconds of the processor.
"""

import argparse
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stable_diffusion import StableDiffusion  # before MLX: it brings OpenBLAS, where there is one

# isort: split
import mlx.core as mx

from stable_diffusion.app.convert import convert
from stable_diffusion.app.engine import TEXT_BITS, UNET_BITS
from stable_diffusion.app.request import Request
from stable_diffusion.models import cpu

from .checkpoints import write_checkpoint
from .shapes import SHAPES

BITS = {"unet_bits": UNET_BITS, "text_bits": TEXT_BITS}


def reading(source: Path, dest: Path) -> None:
    """Read all files of weights into memory and keep them there: what any start takes at least."""
    kept = []
    for path in sorted(source.rglob("*.safetensors")):
        kept.append(bytearray(path.stat().st_size))
        rest = memoryview(kept[-1])
        with path.open("rb", buffering=0) as file:
            while rest:
                rest = rest[file.readinto(rest) :]


def conversion(source: Path, dest: Path, **bits: int) -> None:
    convert(Request(model=str(source), **bits), dest)


def opened(source: Path, dest: Path, *, converted: bool = False, **options: Any) -> StableDiffusion:
    sd = StableDiffusion(dest if converted else source, **options)
    sd.ensure_models_are_loaded()
    return sd


WORK: dict[str, Callable[[Path, Path], StableDiffusion | None]] = {
    "reading": reading,
    "half": partial(opened, float16=True),
    "float32": opened,
    "converting": conversion,
    "quantizing": partial(conversion, **BITS),  # into the folder that "quantized" is loaded from
    "quantized-at-load": partial(opened, float16=True, **BITS),
    "quantized": partial(opened, converted=True, float16=True),
}


def measured(name: str, pipe: Any, started: float, latents: int, source: Path, dest: Path) -> None:
    """Send what the work of a name took, from a process that does nothing else and was ``started`` then."""
    cpu.tune()
    mx.reset_peak_memory()
    begun, used = time.time(), time.process_time()
    sd = WORK[name](source, dest)
    result = {"import, s": begun - started, "work, s": time.time() - begun, "processor, s": time.process_time() - used}
    for step in ("first step, s", "again, s") if sd is not None and latents else ():
        before, side = time.perf_counter(), (latents, latents)
        mx.eval(next(iter(sd.generate_latents("red", 1, 20, cfg_weight=1, latent_size=side, seed=0))))
        result[step] = time.perf_counter() - before
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    pipe.send(result | {"arrays, GB": mx.get_peak_memory() / 1e9, "process, GB": memory / 1e9})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; what this writes there is removed at the end")
    parser.add_argument("--family", choices=SHAPES, default="sd15")
    parser.add_argument("--latents", type=int, default=8, help="side of the first step's latents; 0 takes no step (8)")
    parser.add_argument("--only", nargs="+", choices=WORK, default=list(WORK), help="in this order (all)")
    args = parser.parse_args(argv)
    source, dest = args.folder / f"{args.family}-random", args.folder / f"{args.family}-converted"
    context = multiprocessing.get_context("spawn")
    try:
        write_checkpoint(source, args.family)
        for name in args.only:
            if name in ("converting", "quantizing"):
                shutil.rmtree(dest, ignore_errors=True)
            ours, theirs = context.Pipe()
            process = context.Process(target=measured, args=(name, theirs, time.time(), args.latents, source, dest))
            process.start()
            print(f"{name:20}" + "".join(f"{key} {value:.2f}   " for key, value in ours.recv().items()), flush=True)
            process.join()
    finally:
        for folder in (source, dest):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

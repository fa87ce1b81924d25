"""Measure what the approximations save, and what the pictures lose by them.

    python -m benchmarks.approximations [--captions 60]
    python -m benchmarks.approximations --steps-of sd15 sdxl [--latents 64]

The first draws held-out captions with the bundled model, in its own way and in others that take less time. Its columns:
processor time of an image, from the prompt to the pixels; how far the final latents are from the exact ones, root mean
square over that of the latents, a mean over the captions; and how many of the pictures are as their caption says in
each respect, and in all of them (the judge is ``tools.tiny.score``). Fewer steps are an approximation too, so they
stand beside the others. There is no TAESD and no LoRA for the bundled model, so they are not here.

The second measures one step at full size, with guidance, random weights and float32: whole, with what DeepCache keeps
(every N-th step of a run is of the first kind and the others of the second), and whole with merged positions. Behind
each stands its share of the exact time.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from stable_diffusion import StableDiffusion  # before MLX: it brings OpenBLAS, where there is one

# isort: split
import mlx.core as mx
import numpy as np

from stable_diffusion.models import cpu
from tools.tiny.evaluate import evaluate

from .growth import step_of
from .long_prompts import random_module
from .shapes import UNETS

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "--deep_cache 2": {"deep_cache": 2},
    "--deep_cache 3": {"deep_cache": 3},
    "--deep_cache 5": {"deep_cache": 5},
    "--token_merging 0.25": {"token_merging": 0.25},
    "--token_merging 0.5": {"token_merging": 0.5},
    "--guidance_interval 0.2,0.8": {"guidance_interval": (0.2, 0.8)},
    "--deep_cache 3 --token_merging 0.5": {"deep_cache": 3, "token_merging": 0.5},
    "--sampler dpmpp_2m --steps 15": {"sampler": "dpmpp_2m", "num_steps": 15},
    "--sampler dpmpp_2m --steps 10": {"sampler": "dpmpp_2m", "num_steps": 10},
}


class Draw:
    """Draw captions with ``options`` and note what each takes; ``exact`` are the latents to compare with, if any."""

    def __init__(self, sd: StableDiffusion, options: dict[str, Any], exact: list[mx.array]):
        self._sd, self._options, self._exact = sd, options, exact
        self.latents: list[mx.array] = []
        self.seconds = 0.0

    def __call__(self, captions: list[str], seeds: list[int]) -> np.ndarray:
        """Return pictures, uint8 [n, 64, 64, 3]."""
        pixels, start = [], time.process_time()
        for caption, seed in zip(captions, seeds, strict=True):
            for x in self._sd.generate_latents(caption, seed=seed, **self._options):
                mx.eval(x)
            pixels.append(np.array(self._sd.decode(x))[0])
            self.latents.append(x)
        self.seconds = (time.process_time() - start) / len(captions)
        return (np.stack(pixels) * 255 + 0.5).astype(np.uint8)

    def distance(self) -> float:
        """Return the mean over the captions of the relative distance to the exact latents."""
        pairs = zip(self.latents, self._exact or self.latents, strict=True)
        return float(np.mean([math.sqrt((mx.mean((a - b) ** 2) / mx.mean(b**2)).item()) for a, b in pairs]))


def quality(captions: int) -> None:
    sd = StableDiffusion("tiny")
    mx.eval(list(sd.generate_latents("a red circle", num_steps=1)))
    exact: list[mx.array] = []
    names = ("colour", "shape", "background", "order")
    print(f"{captions} captions".ljust(44), *(f"{name:>11}" for name in ("time", "distance", *names, "all right")))
    for setting, options in SETTINGS.items():
        draw = Draw(sd, options, exact)
        shares, rows = evaluate(draw, captions - captions // 4, captions // 4)
        exact = exact or draw.latents
        right = 100 * np.mean([all(score.values()) for *_, score in rows])
        figures = [f"{shares[name]:9.0f} %" for name in names] + [f"{right:9.0f} %"]
        print(setting.ljust(44), f"{draw.seconds:9.2f} s {draw.distance():11.3f}", *figures, flush=True)


def steps_of(shape: str, side: int, clock: Callable[[], float]) -> None:
    """Print the time of a whole step, one with kept maps, and whole ones with merged positions, measured in turns."""
    step = step_of(random_module("unet", UNETS[shape]), 2, 8 * side)
    cache: list[mx.array] = []
    mx.eval(step(cache=cache), cache)  # what a run computes once is there

    def seconds(compute: Callable[[], mx.array]) -> float:
        start = clock()
        mx.eval(compute())
        return clock() - start

    steps = {"whole": step, "with kept maps": partial(step, cache=cache)}
    steps |= {f"merging {ratio}": partial(step, tome_ratio=ratio) for ratio in (0.25, 0.5)}
    turns = [{name: seconds(step) for name, step in steps.items()} for _ in range(2)]
    least = {name: min(turn[name] for turn in turns) for name in steps}
    whole, outer = least["whole"], least["with kept maps"]
    print(f"{shape}, latents {side} x {side}")
    for name, value in least.items():
        print(f"  a step, {name:16} {value:7.2f} s  {value / whole:6.3f}")
    for n in (2, 3, 5):
        print(f"  a run, --deep_cache {n}       {(whole + (n - 1) * outer) / (n * whole):14.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=60, help="a quarter of them with two objects (60)")
    parser.add_argument("--steps-of", nargs="+", choices=UNETS, help="measure steps of these shapes instead")
    parser.add_argument("--latents", type=int, default=64, help="side of these steps' latents (64)")
    parser.add_argument("--cpu", action="store_true", help="count the time of this process, where others are at work")
    args = parser.parse_args()
    cpu.tune()
    if args.steps_of is None:
        quality(args.captions)
    for shape in args.steps_of or ():
        steps_of(shape, args.latents, time.process_time if args.cpu else time.perf_counter)


if __name__ == "__main__":
    main()

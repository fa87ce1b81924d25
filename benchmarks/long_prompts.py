"""Measure long prompts: time and peak memory of encoding them, and of the UNet that reads them.

    python -m benchmarks.long_prompts

A prompt is encoded in chunks of 75 tokens, each of which is 77 positions for cross-attention. The text encoders are
those of SD 1.5 (CLIP-L) and SDXL (CLIP-L and OpenCLIP-G), the UNet is SD 1.5's, at full size with random weights,
which cost as much as trained ones, in float32; the whole run is one of the bundled model. A figure is the median of the
repeats; memory is what the computation takes beside the weights, at its peak. Behind each row stand R² of a line fitted
to it and its last figure over its first: a cost that grew faster than the prompt would show there.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from stable_diffusion import StableDiffusion  # before MLX: it brings OpenBLAS, where there is one

# isort: split
import mlx.core as mx
from mlx import nn

from stable_diffusion.models import cpu
from stable_diffusion.text.encode import encode
from stable_diffusion.weights.load import build

from .shapes import TEXT_ENCODERS, UNETS

CHUNK = 75
Cost = tuple[float, float]  # seconds, bytes


def cost(compute: Callable[[], Any], clock: Callable[[], float], repeats: int) -> Cost:
    """Return the median time and peak memory of ``compute()``, whose arrays are evaluated."""
    times, peaks = [], []
    for _ in range(repeats):
        mx.clear_cache()
        mx.reset_peak_memory()
        before, start = mx.get_active_memory(), clock()
        mx.eval(compute())
        times.append(clock() - start)
        peaks.append(mx.get_peak_memory() - before)
    return statistics.median(times), statistics.median(peaks)


def prompt(chunks: int) -> str:
    """Return a prompt whose chunks are all different, because equal ones are encoded once."""
    return " ".join("red" if token <= chunk else "blue" for chunk in range(chunks) for token in range(CHUNK))


def random_module(name: str, config: dict[str, Any]) -> nn.Module:
    module = build(name, config)
    mx.eval(module.parameters())
    return module


Work = Iterator[Callable[[], Any]]  # what to measure, one for each length


def encoding(sd: StableDiffusion, texts: Sequence[str], configs: Sequence[dict[str, Any]]) -> Work:
    """Yield the encoding of each text with one encoder, or as XL does with two."""
    encoders = [(sd.tokenizer, random_module("text_encoder", config)) for config in configs]
    xl = len(encoders) > 1
    for text in texts:
        yield lambda text=text: encode([text], encoders, xl=xl).arrays()


def unet_step(size: int, chunks: Sequence[int]) -> Work:
    """Yield one call of SD 1.5's UNet for latents of ``size`` x ``size`` and each number of chunks."""
    unet = random_module("unet", UNETS["sd15"])
    x, temb = mx.random.normal((1, size, size, 4), key=mx.random.key(0)), unet.embed_time(500.0, mx.float32)
    for count in chunks:
        context = mx.random.normal((1, 77 * count, 768), key=mx.random.key(count))
        mx.eval(x, temb, context)
        yield partial(unet, x, temb, context)


def whole_run(sd: StableDiffusion, texts: Sequence[str]) -> Work:
    """Make an image with the bundled model, from the prompt to the pixels."""

    def image(text: str) -> mx.array:
        for x in sd.generate_latents(text, seed=0):
            mx.eval(x)
        return sd.decode(x)

    for text in texts:
        yield partial(image, text)


def growth(chunks: Sequence[int], values: Sequence[float]) -> tuple[str, str]:
    """(R² of a line through the values, the last value over the first); a flat column has no R²."""
    ratio = f"x{values[-1] / values[0]:.2f}"
    if max(values) < 1.02 * min(values):
        return "flat", ratio
    return f"R² {statistics.correlation(chunks, values) ** 2:.4f}", ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4, 8], help="lengths in chunks (1 2 4 8)")
    parser.add_argument("--repeats", type=int, default=3, help="that the median is taken of (3)")
    parser.add_argument("--latents", type=int, default=32, help="side of the UNet's latents (32; its own are 64)")
    parser.add_argument("--cpu", action="store_true", help="count the time of this process, where others are at work")
    args = parser.parse_args()
    chunks, clock = args.chunks, time.process_time if args.cpu else time.perf_counter
    cpu.tune()
    sd = StableDiffusion("tiny")
    sd.ensure_models_are_loaded()
    texts = [prompt(count) for count in chunks]
    measured = {
        "CLIP-L": encoding(sd, texts, [TEXT_ENCODERS["sd15"]]),
        "XL's two encoders": encoding(sd, texts, [TEXT_ENCODERS["sd15"], TEXT_ENCODERS["sdxl-2"]]),
        f"SD 1.5's UNet, {args.latents}x{args.latents}": unet_step(args.latents, chunks),
        "bundled model, whole run": whole_run(sd, texts),
    }
    tokens = "".join(f"{CHUNK * count:>10}" for count in chunks)
    print(f"{'tokens':36}{tokens}{'line':>12}{f'x{chunks[-1] / chunks[0]:.2f}':>8}")
    for name, work in measured.items():
        seconds, memory = zip(*(cost(compute, clock, args.repeats) for compute in work), strict=True)
        for unit, values in (("s", seconds), ("MB", [m / 2**20 for m in memory])):
            fit, ratio = growth(chunks, values)
            print(
                f"{f'{name}, {unit}':36}" + "".join(f"{v:10.3f}" for v in values) + f"{fit:>12}{ratio:>8}", flush=True
            )


if __name__ == "__main__":
    main()

"""Measure how fast the deterministic samplers approach the solution of the ODE, by steps, on the bundled model.

    python -m benchmarks.sampler_convergence --output benchmarks/sampler_convergence.png

Every sampler runs from the same noise through the same levels (linspace spacing, and the curve of --schedule) to 0. The
distance is that of the final latents to those of 1000 steps of dpmpp_2m, root mean square over that of the latents.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from stable_diffusion import StableDiffusion  # first: it brings OpenBLAS before anything brings MLX

# isort: split
import mlx.core as mx
from PIL import Image, ImageDraw, ImageFont

from stable_diffusion.diffusion.denoiser import Denoiser
from stable_diffusion.diffusion.guidance import guidance_batches
from stable_diffusion.diffusion.samplers import SAMPLERS
from stable_diffusion.diffusion.schedule import SCHEDULES

STEPS = (5, 7, 10, 15, 20, 30, 50, 100)
REFERENCE = ("dpmpp_2m", 1000)
PROMPT = "a red circle on a blue background"
NAMES = ("euler", "heun", "dpm2", "lms", "pndm", "dpmpp_2m", "unipc", "deis")
COLOURS = ("#333333", "#d62728", "#ff7f0e", "#8c564b", "#9467bd", "#1f77b4", "#2ca02c", "#17becf")


def final_latents(sd: StableDiffusion, sampler: str, count: int, schedule: str, noise: mx.array) -> mx.array:
    """Where a run from ``noise`` [n, h, w, 4] ends."""
    steps = sd.schedule.steps(count, "euler", "linspace", schedule)
    prompt, negative = sd.encode_prompt(PROMPT), sd.encode_prompt("")
    batches = guidance_batches(count, len(noise), prompt, negative, sd.defaults.cfg_weight)
    denoise = Denoiser(sd.unet, sd.schedule, steps, sd.dtype, batches)
    start = sd.schedule.initial_scale(steps, "euler", "linspace") * noise
    for x in SAMPLERS[sampler].run(denoise, start, steps.sigmas, lambda draw, shape: mx.zeros(shape)):
        mx.eval(x)
    return x


def measure(sd: StableDiffusion, schedule: str, n_images: int) -> dict[str, list[float]]:
    """The distances of each sampler, for ``STEPS``."""
    height, width = sd.default_latent_size
    noise = mx.random.normal((n_images, height, width, 4), key=mx.random.key(0))
    want = final_latents(sd, *REFERENCE, schedule, noise)
    size = math.sqrt(mx.mean(want**2).item())

    def distance(name: str, count: int) -> float:
        return math.sqrt(mx.mean((final_latents(sd, name, count, schedule, noise) - want) ** 2).item()) / size

    return {name: [distance(name, count) for count in STEPS] for name in NAMES}


def chart(lines: dict[str, Sequence[float]], title: str, size: tuple[int, int] = (860, 560)) -> Image.Image:
    """Both axes logarithmic, one line for each sampler."""
    left, top, right, bottom = 80, 50, size[0] - 130, size[1] - 60
    values = [value for line in lines.values() for value in line]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    first, last = math.log(STEPS[0]), math.log(STEPS[-1])

    def place(count: int, value: float) -> tuple[float, float]:
        x = left + (math.log(count) - first) / (last - first) * (right - left)
        return x, bottom - (math.log10(value) - low) / (high - low) * (bottom - top)

    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    for exponent in range(low, high + 1):
        y = place(STEPS[0], 10.0**exponent)[1]
        draw.line([(left, y), (right, y)], fill="#dddddd")
        draw.text((left - 10, y), f"{10.0**exponent:g}", fill="black", font=font, anchor="rm")
    for count in STEPS:
        x = place(count, 10.0**low)[0]
        draw.line([(x, top), (x, bottom)], fill="#eeeeee")
        draw.text((x, bottom + 8), str(count), fill="black", font=font, anchor="ma")
    draw.rectangle([left, top, right, bottom], outline="#888888")
    draw.text((left, 16), title, fill="black", font=font)
    draw.text(((left + right) / 2, size[1] - 24), "steps", fill="black", font=font, anchor="ma")
    labels: list[float] = []
    for (name, line), colour in zip(lines.items(), COLOURS, strict=True):
        points = [place(count, value) for count, value in zip(STEPS, line, strict=True)]
        draw.line(points, fill=colour, width=3, joint="curve")
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        y = points[-1][1]
        while any(abs(y - other) < 17 for other in labels):
            y += 1
        labels.append(y)
        draw.text((right + 10, y), name, fill=colour, font=font, anchor="lm")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedule", choices=SCHEDULES, default="karras")
    parser.add_argument("--n_images", type=int, default=1, help="seeds to take the mean over (1)")
    parser.add_argument("--output", type=Path, default=Path("sampler_convergence.png"))
    args = parser.parse_args()
    lines = measure(StableDiffusion("tiny"), args.schedule, args.n_images)
    print("steps".ljust(10), *(f"{count:>9}" for count in STEPS))
    for name, line in lines.items():
        print(name.ljust(10), *(f"{value:9.2e}" for value in line))
    chart(lines, f"distance to the solution, schedule {args.schedule!r}").save(args.output)


if __name__ == "__main__":
    main()

"""Measure what a step of the UNet and the autoencoder take at full size, and hold it against the memory plan.

    python -m benchmarks.memory [--shape tiny sd15 sdxl] [--sides 32 64] [--rows 1 2] [--ahead]
    python -m benchmarks.memory --macs
    python -m benchmarks.memory --models

The weights are random and in float32, and memory is the peak beside them; of the bundled model it is that of a whole
run. MLX's memory limit is 0, as in --low_memory; with --ahead it is the machine's, and MLX works ahead of the device.
A CPU's constants of ``app/memory.py`` and ``models/tiling.py`` come from here.

With --macs and --models nothing is measured: they print the plan's largest stage on Macs of several sizes, and for all
models with a name.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

from stable_diffusion import StableDiffusion  # before MLX: it brings OpenBLAS, where there is one

# isort: split
import mlx.core as mx

from stable_diffusion.app.memory import RunShape, fit, plan, set_limits, step_bytes
from stable_diffusion.models import cpu, tiling
from stable_diffusion.options import SettingError
from stable_diffusion.weights.load import build, size_in_bytes
from stable_diffusion.weights.parts import PARTS
from stable_diffusion.weights.quantize import quantize

from .growth import step_of
from .long_prompts import cost, random_module
from .shapes import SHAPES, UNETS

MACS = (8, 16, 24, 32)  # GB
QUANTIZED = {"unet": 8, "text_encoder": 4, "text_encoder_2": 4}  # as by -q
OPTIONS: dict[str, dict[str, int]] = {"none": {}, "`-q`": QUANTIZED, "`-q --low_memory`": QUANTIZED}
_XL = SHAPES["sdxl"]
_REFINER = {"unet": UNETS["sdxl-refiner"], "vae": _XL["vae"], "text_encoder_2": _XL["text_encoder_2"]}
NAMED = {  # names of models: configurations of the parts, pixels, rows of the UNet for one image
    ("sd14", "sd15"): (SHAPES["sd15"], 512, 2),
    ("sd",): (SHAPES["sd21"], 512, 2),
    ("sd21",): (SHAPES["sd21"], 768, 2),
    ("sd-turbo",): (SHAPES["sd21"], 512, 1),
    ("sdxl", "sdxl-turbo"): (_XL, 512, 1),
    ("sdxl-base",): (_XL, 1024, 2),
    ("sdxl-refiner",): (_REFINER, 1024, 2),
    ("ssd-1b",): (_XL | {"unet": UNETS["ssd-1b"]}, 1024, 2),
    ("lcm",): (SHAPES["sd15"] | {"unet": UNETS["lcm-dreamshaper-v7"]}, 768, 1),
}
MODELS = {"sd15": "Stable Diffusion 1.5", "sd21": "Stable Diffusion 2.1", "sdxl": "SDXL"}


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


def half_precision(parts: dict[str, dict], bits: dict[str, int]) -> SimpleNamespace:
    """Return what the plan reads of a model in half precision, its autoencoder in float32, quantized to ``bits``."""
    sources, networks = {}, {part: build(part, config) for part, config in parts.items()}
    for part, network in networks.items():
        name, dtype = ("autoencoder", mx.float32) if part == "vae" else (part, mx.float16)
        network.set_dtype(dtype)
        if part in bits:
            quantize(network, bits[part], PARTS[part].group_size)
        sources[name] = SimpleNamespace(size=size_in_bytes(network), dtype=dtype)
    configs = {f"{part}_config": networks[part].config for part in ("unet", "vae")}
    return SimpleNamespace(dtype=mx.float16, sources=sources, **configs)


def largest_stage(model: SimpleNamespace, pixels: int, mac: int, rows: int = 2) -> str:
    """Return the largest stage of one image on a Mac of ``mac`` GB, as a cell of the table; 2 rows are guidance.

    Below 36 GB Metal recommends two thirds of the memory.
    """
    info = {"memory_size": mac * 2**30, "max_recommended_working_set_size": mac * 2**31 // 3}
    run, shape = SimpleNamespace(**vars(model)), RunShape(1, (pixels // 8, pixels // 8), rows=rows)
    run.rows_at_once = 1 if run.low_memory else None
    with patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)), patch.object(mx, "device_info", lambda: info):
        limit = set_limits(None, run.low_memory)
        try:
            fit(run, shape, limit, is_strict=True)
            cell = "{:.1f}" if run.low_memory or run.rows_at_once is None else "{:.1f}, row by row"
        except SettingError:
            cell = "no: {:.1f}"
        return cell.format(max(stage.total for stage in plan(run, shape, limit)) / 1e9)


def macs(shapes: Iterable[str]) -> Iterator[str]:
    """Yield the lines of the table of what fits which Mac."""
    yield "| one picture | options | pixels | " + " | ".join(f"{mac} GB" for mac in MACS) + " |"
    yield "| --- " * (3 + len(MACS)) + "|"
    for shape in shapes:
        for options, bits in OPTIONS.items():
            model = half_precision(SHAPES[shape], bits)
            model.low_memory = "low_memory" in options
            for pixels in (512, 768, 1024):
                cells = [largest_stage(model, pixels, mac) for mac in MACS]
                yield f"| {MODELS[shape]} | {options} | {pixels} | {' | '.join(cells)} |"


def rows_of_models() -> Iterator[tuple[str, int, list[str]]]:
    """Yield (name, pixels, its largest stage for each of ``OPTIONS``), on a Mac that has memory enough."""
    for names, (parts, pixels, rows) in NAMED.items():
        cells = []
        for options, bits in OPTIONS.items():
            model = half_precision(parts, bits)
            model.low_memory = "low_memory" in options
            cells.append(f"{largest_stage(model, pixels, MACS[-1], rows)} GB")
        yield from ((name, pixels, cells) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["tiny", "sd15", "sdxl"])
    parser.add_argument("--sides", type=int, nargs="+", help="of latents (32 64; the bundled model 16 24 32 48)")
    parser.add_argument("--rows", type=int, nargs="*", choices=[1, 2], default=[1, 2], help="of the UNet's batch (1 2)")
    parser.add_argument("--ahead", action="store_true", help="let MLX work ahead of the device")
    parser.add_argument("--macs", action="store_true", help="print what fits Macs of several sizes")
    parser.add_argument("--models", action="store_true", help="print what each model with a name takes")
    args = parser.parse_args()
    if args.models:
        print(*(f"| `{name}` | {pixels} | {' | '.join(cells)} |" for name, pixels, cells in rows_of_models()), sep="\n")
        return
    if args.macs:
        print(*macs(MODELS), sep="\n")
        return
    cpu.tune()
    if not args.ahead:
        mx.set_memory_limit(0)
    for shape in args.shape:
        unet = random_module("unet", SHAPES[shape]["unet"])
        model = SimpleNamespace(unet_config=unet.config, rows_at_once=None, dtype=mx.float32)
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

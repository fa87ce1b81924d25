"""Measure a step of training a LoRA, time and peak memory, beside diffusers with peft on torch.

    python -m benchmarks.training [--shape sd15] [--size 256] [--rows 1] [--rank 16] [--steps 3] [--columns ...]
    python -m benchmarks.training --metal

The UNet has the published shape and random weights in float32; rank 16 on all attention layers, AdamW. Each column has
a process of its own, and one runs after the other. Seconds are the median of the steps after the first. The peak is
the resident memory of the whole process at its highest in these steps, libraries and weights among it.

With --metal nothing is measured: the memory of a step on a Mac is predicted from constants and printed as a table.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from .shapes import SHAPES, UNETS

_CLEAR_REFS = Path("/proc/self/clear_refs")
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def ours(shape: str, size: int, rows: int, rank: int, checkpointing: str = "off") -> Callable[[], Any]:
    """Return a step of this library."""
    from stable_diffusion.models import cpu

    # isort: split
    import mlx.core as mx

    from stable_diffusion.diffusion.schedule import Schedule
    from stable_diffusion.diffusion.schedule_config import ScheduleConfig
    from stable_diffusion.text.encode import Conditioning
    from stable_diffusion.training.loss import TrainingBatch
    from stable_diffusion.training.settings import TrainingSettings
    from stable_diffusion.training.trainer import LoRATrainer

    from .growth import text_time
    from .long_prompts import random_module

    cpu.tune()
    unet = random_module("unet", UNETS[shape])
    pooled = text_time(unet, rows)
    context = mx.random.normal((rows, 77, max(unet.config.cross_attention_dim)))
    conditioning = Conditioning(context, *([] if pooled is None else [pooled[0]]))
    latents = mx.random.normal((rows, size // 8, size // 8, 4))
    batch = TrainingBatch(latents, latents, ("",) * rows, pooled and pooled[1], conditioning)
    part = SimpleNamespace(component=SimpleNamespace(name="unet"))
    model = {"unet": unet, "unet_config": unet.config, "schedule": Schedule(ScheduleConfig()), "is_xl": bool(pooled)}
    model |= {
        "mode": "text",
        "scores_aesthetics": False,
        "pinned": WeakKeyDictionary(),
        "_attached": [],
        "_encoders": [],
        "sources": {"unet": part},
        "dtype": mx.float32,
    }
    settings = TrainingSettings(rank=rank, checkpointing=checkpointing)
    trainer = LoRATrainer(SimpleNamespace(**model), SimpleNamespace(batches=lambda number: [batch]), settings)
    return trainer.__next__


def theirs(shape: str, size: int, rows: int, rank: int, checkpointing: str = "off") -> Callable[[], Any]:
    """Return a step of diffusers with peft."""
    import diffusers
    import torch
    from peft import LoraConfig

    unet = diffusers.UNet2DConditionModel.from_config(dict(UNETS[shape])).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS))
    if checkpointing == "on":
        unet.enable_gradient_checkpointing()
        unet.train()
    factors = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer, scheduler = torch.optim.AdamW(factors, lr=1e-4), diffusers.DDPMScheduler(1000, 0.00085, 0.012)
    context = torch.randn(rows, 77, unet.config.cross_attention_dim)
    latents, added = torch.randn(rows, 4, size // 8, size // 8), None
    if unet.config.addition_embed_type:
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.ones(rows, pooled), "time_ids": torch.ones(rows, 6)}

    def step() -> None:
        optimizer.zero_grad()
        noise, t = torch.randn_like(latents), torch.randint(1000, (rows,))
        output = unet(scheduler.add_noise(latents, noise, t), t, context, added_cond_kwargs=added).sample
        torch.nn.functional.mse_loss(output, noise).backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()

    return step


COLUMNS = {
    "this library": (ours, "off"),
    "this library, checkpointing": (ours, "on"),
    "diffusers and peft": (theirs, "off"),
    "diffusers and peft, checkpointing": (theirs, "on"),
}


METAL = {"SD 1.5, 512 x 512": ("sd15", 64), "SDXL, 1024 x 1024": ("sdxl", 128)}


def metal(rank: int) -> Iterator[str]:
    """Yield the lines of a table: GB of a step in half precision on a Mac, from shapes without values."""
    from unittest.mock import patch

    import mlx.core as mx

    from stable_diffusion.app.memory import training_bytes
    from stable_diffusion.weights.load import build

    from .memory import half_precision

    yield "| one picture | options | without checkpointing | with checkpointing |"
    yield "| --- | --- | --- | --- |"
    for title, (shape, side) in METAL.items():
        unet = build("unet", SHAPES[shape]["unet"])
        unet.set_dtype(mx.float16)
        layers = [layer for path, layer in unet.named_modules() if path.endswith(tuple(_TARGETS))]
        factors = 4 * rank * sum(sum(layer.weight.shape) for layer in layers)
        for options, bits in (("none", {}), ("`-q`", {"unet": 8})):
            beside = half_precision(SHAPES[shape], bits).sources["unet"].size + 4 * factors  # gradient and two moments
            with patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)):
                steps = [beside + training_bytes(unet, 1, (side, side), recomputes) for recomputes in (False, True)]
            yield f"| {title} | {options} | {' | '.join(f'{step / 1e9:.1f} GB' for step in steps)} |"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(column: str, steps: int, shape: Sequence[Any]) -> tuple[float, int]:
    """Return the median seconds of a step after the first, and the peak of the process in bytes."""
    make, checkpointing = COLUMNS[column]
    step, times = make(*shape, checkpointing), []
    if _CLEAR_REFS.exists():  # begin a new peak: building the network is none of a step
        _CLEAR_REFS.write_text("5")
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), _peak()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=UNETS, default="sd15")
    parser.add_argument("--size", type=int, default=256, help="side in pixels (256)")
    parser.add_argument("--rows", type=int, default=1, help="pictures of a step (1)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="to measure, after a first one (3)")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--metal", action="store_true", help="print the predicted memory of a step on a Mac")
    args = parser.parse_args(argv)
    if args.metal:
        print(*metal(args.rank), sep="\n")
        return
    shape, context = (args.shape, args.size, args.rows, args.rank), multiprocessing.get_context("spawn")
    print(f"{args.shape}, {args.size} x {args.size}, {args.rows} rows, rank {args.rank}, float32", flush=True)
    for column in args.columns:
        with context.Pool(1) as pool:
            seconds, peak = pool.apply(measure, (column, args.steps, shape))
        print(f"{column:36}{seconds:8.2f} s/step  {peak / 1e9:6.2f} GB", flush=True)


if __name__ == "__main__":
    main()

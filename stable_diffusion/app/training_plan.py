"""Predict the operations and the time of a training step from constants, and describe a training in lines."""

import math
import re
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from ..models.config import listed
from ..models.unet import UNet2DConditionModel

# TFLOP/s of float32 by Apple's GPUs at full clock, all cores (from their published cores and clocks), and the
# fraction that a step is assumed to reach. Not measured on a Mac.
_PEAK = {"M1": 2.6, "M1 Pro": 5.2, "M1 Max": 10.4, "M1 Ultra": 20.8, "M2": 3.6, "M2 Pro": 6.8, "M2 Max": 13.6}
_PEAK |= {"M2 Ultra": 27.2, "M3": 3.5, "M3 Pro": 6.4, "M3 Max": 14.2, "M4": 4.3, "M4 Pro": 8.5, "M4 Max": 17.0}
_REACHED = (0.35, 0.6)
_TOKENS = 77


def step_operations(unet: UNet2DConditionModel, rows: int, size: tuple[int, int]) -> float:
    """Return the floating-point operations of a training step of ``rows`` latents of ``size`` (h, w).

    They are three times those of the UNet: its gradient has twice as many (Kaplan et al. 2020, table 1).
    """
    last, count = len(unet.down_blocks) - 1, 0.0
    for path, module in unet.named_modules():
        if "weight" not in module or module.weight.ndim < 2 or "time_emb" in path or "add_emb" in path:
            continue
        place = re.match(r"(down|up)_blocks\.(\d+)", path)
        level = last if path.startswith("mid") else 0
        if place:
            level = int(place[2]) if place[1] == "down" else last - int(place[2])
        level += ("downsamplers" in path) - ("upsamplers" in path)
        positions = math.prod(math.ceil(side / 2**level) for side in size)
        values = module.weight.size * (32 // module.bits if "scales" in module else 1)
        is_context = re.search(r"attn2\.to_[kv]", path) is not None
        count += 2 * values * (_TOKENS if is_context else positions)
        if re.search(r"attn[12]\.to_q", path):  # scores, and their product with the values
            count += 4 * positions * (positions if "attn1" in path else _TOKENS) * module.weight.shape[0]
    return 3 * rows * count


def predicted_seconds(operations: float) -> tuple[float, float] | None:
    """Return the lowest and highest predicted seconds of a step on this Mac; None for another device."""
    name = mx.device_info().get("device_name", "") if mx.default_device() == mx.gpu else ""
    peak = _PEAK.get(name.removeprefix("Apple "))
    return None if peak is None else tuple(operations / (peak * 1e12 * fraction) for fraction in reversed(_REACHED))


def describe(plan: dict[str, Any]) -> str:
    """Return the figures of ``plan`` and ``time_steps`` in lines."""
    sizes = listed([f"{count} of {size}" for size, count in plan["sizes"].items()], most=6)
    prior = f", {plan['prior']} prior pictures" if plan["prior"] else ""
    lines = [
        f"{plan['pictures']} pictures ({sizes}){prior}, {plan['steps']} steps, {plan['epochs']:.3g} epochs",
        f"{plan['factors']} factors with {plan['parameters'] / 1e6:.2f} million parameters"
        if plan["embedding"] is None
        else f"vectors for {plan['embedding']}: {plan['parameters']} parameters",
    ]
    checkpointing = "with" if plan["checkpointing"] else "without"
    lines.append(f"about {plan['planned_gb']:.2f} GB for a step, {checkpointing} checkpointing (predicted)")
    if plan["predicted_seconds"] is not None:
        least, most = plan["predicted_seconds"]
        speed = f"{plan['tflop']:.3g} TFLOP for a step, {least:.2g} to {most:.2g} s"
        lines.append(f"{speed} (predicted from constants, not measured on a Mac)")
    if plan["processes"] > 1:
        lines.append(f"{plan['processes']} processes, each with a batch of {plan['batch_size']} in a step")
    if plan["first_step"] > 1:
        lines.append(f"continues with step {plan['first_step']}")
    if "seconds" in plan:
        total = tqdm.format_interval(plan["seconds"] * (plan["steps"] - plan["first_step"] + 1))
        lines.append(f"{plan['seconds']:.2f} s/step, {total} in all, {plan['peak_gb']:.2f} GB")
    return "\n".join(lines)

"""Lines about a training before it begins."""

from typing import Any

from tqdm import tqdm

from ..models.config import listed


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
    if plan["processes"] > 1:
        lines.append(f"{plan['processes']} processes, each with a batch of {plan['batch_size']} in a step")
    if plan["first_step"] > 1:
        lines.append(f"goes on with step {plan['first_step']}")
    if "seconds" in plan:
        total = tqdm.format_interval(plan["seconds"] * (plan["steps"] - plan["first_step"] + 1))
        lines.append(f"{plan['seconds']:.2f} s/step, {total} in all, {plan['peak_gb']:.2f} GB")
    return "\n".join(lines)

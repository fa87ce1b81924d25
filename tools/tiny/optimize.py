"""The optimizer, its learning rate and its checkpoints.

Muon (Jordan et al. 2024) is momentum whose every update is orthogonalised, for matrices and convolutions. It is used
because the steps of a CPU are few: the VAE reached in 500 steps what took AdamW more than 3000. Vectors, embeddings and
the first and last layers stay with AdamW.
"""

import math
from pathlib import Path

import torch


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: a quintic Newton-Schulz iteration on [n, rows, columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """`lr` is on AdamW's scale: updates are scaled to its usual root mean square of 0.2 (Liu et al. 2025)."""

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list] = {}
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    buffer = state.setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    shapes.setdefault(p.shape, []).append((p, p.grad.lerp(buffer, group["momentum"]).flatten(1)))
            for pairs in shapes.values():  # equal shapes go through the iteration together
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                scale = 0.2 * max(updates.shape[1:]) ** 0.5
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * scale)


class Optimizers:
    """Muon for hidden matrices and convolutions, AdamW for the rest, behind one `step`."""

    def __init__(self, module: torch.nn.Module, weight_decay: float = 0.0):
        hidden, rest = [], []
        for name, p in module.named_parameters():
            edge = any(part in name for part in ("embedding.", "conv_in", "conv_out", "quant_conv"))
            (rest if edge or p.ndim < 2 else hidden).append(p)
        self.weights = hidden + rest
        self.parts = [
            Muon(hidden, weight_decay=weight_decay),
            torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True),
        ]

    def step(self, loss: torch.Tensor, lr: float) -> None:
        """Gradient of `loss`, clipped to norm 1, and one update at learning rate `lr`."""
        for part in self.parts:
            part.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def learning_rate(peak: float, step: int, steps: int, warmup: int, hold: float) -> float:
    """Linear warm-up, `peak` for the first `hold` of the steps, then a cosine to one hundredth of it."""
    share = min(1.0, max(0.0, (step / steps - hold) / (1 - hold)))
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def write(state: dict, path: Path) -> None:
    """Saves under another name first, so that an interruption leaves the old file or the new one."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def save(path: Path, model: torch.nn.Module, optimizer: Optimizers, **more) -> None:
    write({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more}, path)


def resume(path: Path, model: torch.nn.Module, optimizer: Optimizers) -> dict:
    """Loads what `save` wrote, and returns all of it; without a file, a beginning at step 0."""
    if not path.exists():
        return {"step": 0}
    state = torch.load(path, map_location=next(model.parameters()).device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state

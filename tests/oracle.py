"""Bridges between this library and its numerical oracles, torch with diffusers and transformers."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from stable_diffusion.weights.formats.original import to_diffusers
from stable_diffusion.weights.load import build, fill

SCALES = (1.0, 1e-2, 1e-3)  # a wrong GroupNorm epsilon is invisible at scale 1 and half the signal at 1e-3


def relative_error(ours, theirs) -> float:
    """Largest absolute difference over the largest absolute value; both finite and of one shape."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    assert np.isfinite(a).all() and np.isfinite(b).all()
    return float(np.abs(a - b).max() / np.abs(b).max())


def perturb(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter off its initial value, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator) * (parameter.abs().mean() + 0.1))
    return module.eval().requires_grad_(False)


def tensors(module: torch.nn.Module) -> dict[str, mx.array]:
    """A torch module's weights under their own names, as a checkpoint file holds them."""
    return {name: mx.array(value.numpy()) for name, value in module.state_dict().items()}


def twin(mlx_module, torch_module):
    """Give ``mlx_module`` the weights of ``torch_module``, through the library's own loader."""
    fill(mlx_module, to_diffusers("", tensors(torch_module)))
    return mlx_module


def pair(part: str, config: dict, make: Callable[[], torch.nn.Module], seed: int = 0) -> tuple[Any, Any]:
    """Build a part of a checkpoint and its oracle, with the same weights, of which none has its initial value."""
    torch.manual_seed(seed)
    oracle = perturb(make(), seed)
    return twin(build(part, config), oracle), oracle


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Seeded normal values, float32."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def picture(height: int = 48, width: int = 64, seed: int = 0) -> mx.array:
    """A random picture [H, W, 3] in -1 ... 1."""
    return mx.clip(mx.array(normal(height, width, 3, seed=seed, scale=0.3)), -1, 1)


def last(latents) -> np.ndarray:
    """The last latents of a run."""
    return np.array(list(latents)[-1])


def nchw(x: np.ndarray) -> torch.Tensor:
    """NHWC array -> NCHW tensor."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    """NCHW tensor -> NHWC array."""
    return x.detach().numpy().transpose(0, 2, 3, 1)

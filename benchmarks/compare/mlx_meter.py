"""Measuring with MLX, for both columns that compute with it. Either of their packages is called stable_diffusion."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import process
from .cases import GUIDANCE, POSITIONS, PROMPT, STEPS, Case


@dataclass
class Work:
    """What is measured: ``run()`` gives arrays that are not yet computed, or computes and gives nothing.

    ``weights`` are the bytes of weights that it reads, of ``networks``. Where all of it is one graph on a GPU,
    ``graph(0)`` and ``graph(1)`` build it, for the first time and once more, of other inputs.
    """

    run: Callable[[], Any]
    weights: int
    networks: Sequence[nn.Module] = ()
    graph: Callable[[int], Any] | None = None

    def describe(self) -> dict[str, Any]:
        """What it reads, and the rate of float32 products with the same threads."""
        a, b = (random(process.PRODUCT, process.PRODUCT, seed=seed) for seed in range(2))
        return {"weights": self.weights, "rate": process.product_rate(lambda: mx.eval(a @ b))}

    def measure(self) -> dict[str, float]:
        """Seconds on the clock and of the processor, and the peak of the arrays in bytes, weights among them."""
        mx.eval([network.parameters() for network in self.networks])
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        cpu, start = time.process_time(), time.perf_counter()
        mx.eval(self.run())
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {"seconds": seconds, "cpu": cpu, "peak": mx.get_peak_memory()}


def ready(module: nn.Module, dtype: str, change: Callable[[nn.Module], Any] | None = None) -> nn.Module:
    """The module with its weights in a type, and changed. They are lazy until the work is measured."""
    module.set_dtype(getattr(mx, dtype))
    if change is not None:
        change(module)
    return module.eval()


def size(*modules: nn.Module) -> int:
    return sum(value.nbytes for module in modules for _, value in tree_flatten(module.parameters()))


def file_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def random(*shape: int, dtype: str = "float32", seed: int = 0) -> mx.array:
    x = mx.random.normal(shape, key=mx.random.key(seed)).astype(getattr(mx, dtype))
    mx.eval(x)
    return x


def text_work(case: Case, encoders: Sequence[nn.Module]) -> Work:
    """Encode a prompt and its negative: what a UNet reads of it is computed."""

    def encode(token: int) -> list[mx.array]:
        ids = mx.full((2, POSITIONS), token, dtype=mx.int32)
        mx.eval(ids)
        outputs = [encoder(ids) for encoder in encoders]
        if not case.is_xl:
            return [outputs[0].last_hidden_state]
        return [output.hidden_states[-2] for output in outputs] + [outputs[-1].pooled_output]

    return Work(lambda: encode(0), size(*encoders), encoders, encode)


def image_work(case: Case, folder: Path, sd: Any) -> Work:
    """Make a whole image with an opened model."""

    def run() -> mx.array:
        latents = (case.latent, case.latent)
        for x in sd.generate_latents(PROMPT, 1, STEPS, GUIDANCE, latent_size=latents, seed=0):
            mx.eval(x)
        return sd.decode(x)

    return Work(run, file_size(folder))

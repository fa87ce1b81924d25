"""Measuring with MLX, for both columns that compute with it. Either of their packages is called stable_diffusion."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .cases import GUIDANCE, POSITIONS, PROMPT, STEPS, Case


@dataclass
class Work:
    """What is measured: ``run()`` gives arrays that are not yet computed, or computes and gives nothing.

    ``weights`` are the bytes of weights that it reads; it ``has_graph`` where all of it is one graph of primitives,
    which ``graph()`` gives where ``run()`` does not.
    """

    run: Callable[[], Any]
    weights: int
    has_graph: bool = True
    graph: Callable[[], Any] | None = None

    def describe(self) -> dict[str, Any]:
        """What it reads, and how large its graph is."""
        if not self.has_graph:
            return {"weights": self.weights, "primitives": None, "fused": None}
        build = self.graph or self.run
        if self.graph is not None:
            mx.eval(build())  # so that what a run keeps is there
        primitives = _primitives(build())
        with _as_on_a_gpu():
            return {"weights": self.weights, "primitives": primitives, "fused": _primitives(build())}

    def measure(self) -> dict[str, float]:
        """Seconds on the clock and of the processor, and the peak of the arrays in bytes, weights among them."""
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        cpu, start = time.process_time(), time.perf_counter()
        mx.eval(self.run())
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {"seconds": seconds, "cpu": cpu, "peak": mx.get_peak_memory()}


def _primitives(outputs: mx.array | list[mx.array]) -> int:
    """Primitives in the graph of arrays that are not yet computed, each as it runs on this backend."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *(outputs if isinstance(outputs, list) else [outputs]))
        return path.read_text().count("shape=rectangle")


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Let graphs be built as a GPU runs them, to be counted and not computed: what is fused there is one primitive."""

    def one(x: mx.array, *others: Any, **options: Any) -> mx.array:
        return mx.depends(x, [other for other in others if isinstance(other, mx.array)] or [x])

    stand_ins = {(mx.fast, name): one for name in ("layer_norm", "rms_norm", "scaled_dot_product_attention")}
    stand_ins[mx, "default_device"] = lambda: mx.Device(mx.gpu)
    before = {(module, name): getattr(module, name) for module, name in stand_ins}
    try:
        for (module, name), value in stand_ins.items():
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def ready(module: nn.Module, dtype: str, change: Callable[[nn.Module], Any] | None = None) -> nn.Module:
    """The module with its weights computed, in a type, and changed: so that they are no part of what is measured."""
    module.set_dtype(getattr(mx, dtype))
    if change is not None:
        change(module)
    mx.eval(module.parameters())
    return module.eval()


def size(*modules: nn.Module) -> int:
    return sum(value.nbytes for module in modules for _, value in tree_flatten(module.parameters()))


def file_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def random(*shape: int, dtype: str = "float32") -> mx.array:
    x = mx.random.normal(shape, key=mx.random.key(0)).astype(getattr(mx, dtype))
    mx.eval(x)
    return x


def text_work(case: Case, encoders: Sequence[nn.Module]) -> Work:
    """Encode a prompt and its negative: what a UNet reads of it is computed."""
    ids = mx.zeros((2, POSITIONS), dtype=mx.int32)

    def run() -> list[mx.array]:
        outputs = [encoder(ids) for encoder in encoders]
        if not case.is_xl:
            return [outputs[0].last_hidden_state]
        return [output.hidden_states[-2] for output in outputs] + [outputs[-1].pooled_output]

    return Work(run, size(*encoders))


def image_work(case: Case, folder: Path, sd: Any) -> Work:
    """Make a whole image with an opened model."""

    def run() -> mx.array:
        latents = (case.latent, case.latent)
        for x in sd.generate_latents(PROMPT, 1, STEPS, GUIDANCE, latent_size=latents, seed=0):
            mx.eval(x)
        return sd.decode(x)

    return Work(run, file_size(folder), has_graph=False)

"""On a CPU, equal shares of a step's questions side by side, each on a core of its own.

OpenBLAS gives a product all cores, but what lies between products MLX computes on one, so that the others wait for a
good part of the time. What is on different streams is computed at the same time, and there each product has one core:
on two of them a step of SD 2.1 with guidance takes four fifths of the time. On a GPU nothing of this happens.
"""

import threading
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx

from . import blas

CORES = blas.threads()  # all, unless the environment says less


class Lanes:
    """The lanes of a run, at most one for each of ``cores``; leaving the context gives products all cores back."""

    def __init__(self, cores: int = CORES):
        self._cores = cores

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, *_: object) -> None:
        self._give_products(self._cores)

    def shares(self, questions: int) -> int:
        """How many shares so many questions are asked in: one for each core if they divide so, or 1.

        It is 1 too where MLX is not to work ahead, in low memory.
        """
        if mx.default_device() != mx.cpu or mx.get_memory_limit() == 0 or questions % self._cores:
            return 1
        return self._cores

    def enter(self, share: int, shares: int) -> AbstractContextManager:
        """The lane in which the graph of a share is built."""
        self._give_products(self._cores // shares)
        return mx.stream(_stream(share)) if share and self._cores > 1 else nullcontext()

    def _give_products(self, cores: int) -> None:
        if self._cores > 1:
            blas.set_threads(cores)


ONE = Lanes(1)

_known = threading.local()  # MLX has streams for each thread


def _stream(number: int) -> mx.Stream:
    """The stream of a lane beside the first, which has the default stream."""
    streams = _known.__dict__.setdefault("streams", {})
    if number not in streams:
        streams[number] = mx.new_stream(mx.cpu)
    return streams[number]

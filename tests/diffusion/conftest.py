"""The calls of a small random model's UNet."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest


@dataclass
class Call:
    """The rows of one call of the UNet, its embedded timestep and prompts, and True if all of the UNet ran."""

    rows: int
    temb: mx.array
    encoded: mx.array
    full: bool


@dataclass
class RecordingUNet:
    """Stands in for a UNet and notes its calls."""

    network: Any
    calls: list[Call] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, x: mx.array, temb: mx.array, context: Any, *, cache: list | None = None, **more) -> mx.array:
        self.calls.append(Call(len(x), temb, context.encoded, not cache))
        return self.network(x, temb, context, cache=cache, **more)


@pytest.fixture
def unet(sd) -> Iterator[RecordingUNet]:
    """The UNet of ``sd``, which notes its calls."""
    network = sd.unet
    sd.unet = RecordingUNet(network)
    yield sd.unet
    sd.unet = network

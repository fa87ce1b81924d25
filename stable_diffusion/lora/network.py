"""Build a network of a checkpoint with its LoRAs, again after each release."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models import gpu
from ..weights.files import Component
from ..weights.formats.safetensors import loading_stream
from ..weights.load import load_component, size_in_bytes
from ..weights.quantize import quantize
from .delta import LoRADelta, Scale
from .files import read_lora
from .layers import AttachedLoRA, fuse


@dataclass
class NetworkSource:
    """Build a network from its files, LoRAs, quantization and words, again after each release."""

    component: Component
    dtype: mx.Dtype
    quantization: tuple[int | str, int] | None  # (bits or mode, group size)
    attached: Sequence[AttachedLoRA]
    fused: Sequence[tuple[str | PathLike, Scale]] = ()  # LoRA files to fuse, with their scales
    words: list[mx.array] = field(default_factory=list)  # vectors [n, C] of words that were added to a text encoder
    size: int = 0  # bytes of the weights in memory
    _arrays: list | None = None  # of the last network built

    def build(self, network: nn.Module | None = None) -> nn.Module:
        """Build the network with lazy weights, from its files or from a ``network`` that was just loaded."""
        name = self.component.name
        network = load_component(self.component, self.dtype) if network is None else network
        if self.fused:
            fuse({name: network}, [(read_lora(source), scale) for source, scale in self.fused])
        with mx.stream(loading_stream(mx.default_device().type)):  # so that any thread can evaluate it
            if self.quantization is not None:
                quantize(network, *self.quantization)
            for vectors in self.words:
                network.text_model.embeddings.add(vectors)
        with mx.stream(loading_stream(mx.cpu)):
            gpu.join(network)
        self.size = size_in_bytes(network)
        for lora in self.attached:
            lora.wrap(name, network)
        self._arrays = self._identify(network)
        return network

    def is_edited(self, network: Any) -> bool:
        """Return whether ``network`` was modified since it was built: replaced, quantized or with other weights.

        Arrays are compared by identity, not by their values.
        """
        return not isinstance(network, nn.Module) or self._identify(network) != self._arrays

    def _identify(self, network: nn.Module) -> list[tuple[str, str, int]]:
        """Identify the parameters of a network, without those of attached LoRAs."""
        return [
            (path.removesuffix(".base"), name, id(value))
            for path, module in network.named_modules()
            if not (isinstance(module, LoRADelta) and module.lora in self.attached)
            for name, value in module.items()
            if isinstance(value, mx.array) and not name.startswith("_")
        ]

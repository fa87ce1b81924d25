"""How a network came about, so that it can be let go of and made again as it was."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .lora.files import read_lora
from .lora.layers import Attachment, attachments, fuse
from .weights.files import Component
from .weights.load import load_component
from .weights.quantize import quantize, quantize_lazily, size_in_bytes


@dataclass
class Recipe:
    """What a network is made of: its files, the LoRAs added to its weights, its bits, and what was done to it later.

    ``quantization`` is (bits, group size), or None. ``loras`` are (source, scale), read again whenever they are needed;
    ``without`` names the parts of them that are not in the model. ``attachments`` are LoRAs that run beside the
    weights.
    """

    component: Component
    dtype: mx.Dtype
    quantization: tuple[int, int] | None = None
    loras: list[tuple[str | PathLike, float]] = field(default_factory=list)
    without: frozenset[str] = frozenset()
    attachments: list[Attachment] = field(default_factory=list)
    changes: list[Callable[[nn.Module], Any]] = field(default_factory=list)
    made: tuple | None = None  # what tells whether a network is as it was made

    def plain(self) -> nn.Module:
        """The network with the weights of its files, not quantized. All is lazy: it takes no memory."""
        return load_component(self.component, self.dtype)

    def make(self) -> nn.Module:
        """The network, its weights in memory. They are read one by one, so that there is never much beside them."""
        network, name = self.plain(), self.component.name
        for source, scale in self.loras:
            lora = read_lora(source)
            own = tuple(c for c in lora.changes if c.network == name and c.name not in self.without)
            if own:
                fuse({name: network}, [(replace(lora, changes=own, unknown=()), scale)], keep=False)
        if self.quantization is not None:
            quantize(network, *self.quantization)
        for change in self.changes:
            change(network)
        for attachment in self.attachments:
            attachment.attach_again(name, network)
        for _, module in network.named_modules():
            mx.eval(list(_arrays(module).values()))
        self.made = _identity(network)
        return network

    def change(self, network: nn.Module, change: Callable[[nn.Module], Any]) -> Any:
        """Do something to the network, now and whenever it is made again; returns what ``change`` does."""
        as_made = not self.is_changed(network)
        result = change(network)
        self.changes.append(change)
        if as_made:
            self.made = _identity(network)
        return result

    def is_changed(self, network: Any) -> bool:
        """Whether ``network`` is another than was made here, or has other weights or LoRAs of its own.

        Values that were written into an array of it are not seen.
        """
        return (
            not isinstance(network, nn.Module)
            or _identity(network) != self.made
            or not attachments(network) <= set(self.attachments)
        )

    def lazy(self) -> nn.Module:
        """A network of the same shapes and types, to be looked at and not run: it takes no memory."""
        network = self.plain()
        if self.quantization is not None:
            quantize_lazily(network, *self.quantization)
        return network

    def size(self) -> int:
        """Bytes of the weights in memory. Nothing is read but the headers of the files, and those once."""
        return self._size

    @cached_property
    def _size(self) -> int:
        return size_in_bytes(self.lazy())


def _arrays(module: nn.Module) -> dict[str, mx.array]:
    return {name: value for name, value in module.items() if isinstance(value, mx.array)}


def _identity(network: nn.Module) -> tuple:
    """Which arrays a network is made of."""
    return tuple(
        (path, name, id(value)) for path, module in network.named_modules() for name, value in _arrays(module).items()
    )

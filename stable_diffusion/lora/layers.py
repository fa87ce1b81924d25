"""Apply LoRAs to a model: W x becomes W x + Σ scale ΔW x in every layer that they change.

``fuse`` adds ΔW to the weights once: the model stays as fast and as large as before. ``attach`` wraps the layers and
keeps the weights: the scale may change between runs, the weights may be quantized, the factors can be trained.
A model is passed as its networks by name: "unet", "text_encoder", "text_encoder_2".

Attached, a layer ``to_q`` has the parameters ``to_q.base.weight``, ``to_q.loras.0.down``, ``to_q.loras.0.up``.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..models.config import listed
from ..models.layers import GroupNorm, LayerNorm, conv2d
from ..weights.formats.safetensors import loading_stream
from ..weights.parts import family_title
from .delta import LoRADelta, Scale, scale_of, shape_of, to_layer, weight_of
from .files import LoRAWeights
from .names import layer_names

_log = logging.getLogger("stable_diffusion")

_Model = Mapping[str, nn.Module]  # its networks by name
_Scaled = list[tuple[LoRADelta, float]]  # changes of a layer with nonzero scales
_LAYERS = (nn.Linear, nn.QuantizedLinear, nn.Conv2d, GroupNorm, LayerNorm)


class LoRALayer(nn.Module):
    """Wrap a layer and add LoRAs to it. ``base`` is the wrapped layer, ``loras`` are the changes.

    Two factors compute up (down x) beside a matrix or kernel. Other changes are added to the parameters in each call.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.loras = base, []

    @property
    def weight(self) -> mx.array:
        """Return the weight of the wrapped layer."""
        return self.base.weight

    @property
    def is_idle(self) -> bool:
        """Return whether no LoRA has an effect, so that the layer can compute like the wrapped one."""
        return not (self._scaled(factored=True) or self._scaled(factored=False))

    def __call__(self, x: mx.array) -> mx.array:
        y = self._changed()(x)
        for delta, scale in self._scaled(factored=True):
            down = delta["down"].reshape(-1, *shape_of(self.base)[1:])
            up = delta["up"].reshape(-1, len(down)).astype(x.dtype)
            y = y + (scale * delta.multiplier * self._apply(x, to_layer(down).astype(x.dtype))) @ up.T
        return y

    def activated(self, x: mx.array, *shifts: mx.array) -> mx.array:
        """Apply a GroupNorm and SiLU, as ``GroupNorm.activated`` does."""
        return self._changed().activated(x, *shifts)

    def apart(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Apply a convolution as ``Conv2d.apart`` does, but with the bias already added."""
        y = self(x)
        return y, mx.zeros(y.shape[-1], y.dtype)

    def _scaled(self, *, factored: bool) -> _Scaled:
        kinds = ((delta, delta.keys() == {"down", "up"} and self.weight.ndim > 1) for delta in self.loras)
        scales = ((delta, scale_of(delta.lora.scale, delta.network)) for delta, kind in kinds if kind == factored)
        return [(delta, scale) for delta, scale in scales if scale != 0]

    def _changed(self) -> Callable[[mx.array], mx.array]:
        parameters = _changed_parameters(self.base, self._scaled(factored=False))
        if not parameters:
            return self.base
        if isinstance(self.base, nn.QuantizedLinear) and "weight" in parameters:
            bias = parameters.get("bias", self.base.get("bias", 0))
            return lambda x: self._apply(x, parameters["weight"].astype(x.dtype)) + bias
        return copy(self.base).update(parameters)

    def _apply(self, x: mx.array, weight: mx.array) -> mx.array:
        if isinstance(self.base, nn.Conv2d):
            return conv2d(x, weight, self.base.stride, self.base.padding)
        return x @ weight.T


def _changed_parameters(layer: nn.Module, scaled: _Scaled) -> dict[str, mx.array]:
    """Return W + Σ scale ΔW for each changed parameter: summed in float32, in the type of the layer."""
    totals: dict[str, mx.array] = {}
    for delta, scale in scaled:
        for key, change in delta.delta(layer, scale).items():
            before = weight_of(layer) if key == "weight" else layer[key].astype(mx.float32)
            totals[key] = totals.get(key, before) + change
    dtype = layer.get("biases", layer.get("bias", layer["weight"])).dtype
    dtype = dtype if mx.issubdtype(dtype, mx.floating) else mx.float32  # for a packed weight
    return {key: total.astype(dtype) for key, total in totals.items()}


def wrapped_layers(network: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Iterate over (path, layer) of the layers with attached LoRAs."""
    return ((path, layer) for path, layer in network.named_modules() if isinstance(layer, LoRALayer))


def target_layers(name: str, network: nn.Module, deltas: Sequence[LoRADelta]) -> list[tuple[str, nn.Module, LoRADelta]]:
    """Return (path, layer without its wrapper, change) for the changes of layers that the network has."""
    layers = {path.removesuffix(".base"): m for path, m in network.named_modules() if isinstance(m, _LAYERS)}
    paths = layer_names(layers)
    pairs = [(paths[d.layer], d) for d in deltas if d.network == name and d.layer in paths]
    return [(path, layers[path], delta) for path, delta in pairs]


def check_fit(networks: _Model, lora: LoRAWeights, scale: Scale, partial: bool) -> None:
    """Raise ValueError for a LoRA of another family, with wrong shapes, or with parts that are not in the model.

    ``partial`` accepts a LoRA if the model has at least one of its parts, and logs the missing ones.
    """
    if isinstance(scale, tuple) and len(scale) != 2:
        raise ValueError(f"the scale {scale} of a LoRA has {len(scale)} numbers; give 1, or 2: (text encoders, UNet)")
    if not all(math.isfinite(scale_of(scale, name)) for name in ("text_encoder", "unet")):
        raise ValueError(f"the scale {scale} of a LoRA is not a finite number; 1 is full strength, 0 is off")
    read = lora.context_width
    width = read if "unet" not in networks else max(networks["unet"].config.cross_attention_dim)
    if read not in (None, width):
        family, model = family_title(read), family_title(width)
        raise ValueError(f"{lora.path} is a LoRA for {family} and this model is {model}: choose one made for it")
    matched, wrong = set(), []
    for name, network in networks.items():
        for _, layer, delta in target_layers(name, network, lora.deltas):
            matched.add(delta.name)
            try:
                delta.delta(layer)
            except ValueError as error:
                wrong.append(str(error))
    if wrong:
        raise ValueError(f"{lora.path} does not fit this model: {len(wrong)} have the wrong shape: {listed(wrong)}")
    unmatched = (*lora.unknown, *(delta.name for delta in lora.deltas if delta.name not in matched))
    total = f"{len(lora.deltas) + len(lora.unknown)} parts"
    if not matched:
        raise ValueError(f"{lora.path} is for another kind of model: this one lacks all {total}, {unmatched[0]}...")
    if unmatched:
        rest = f"{lora.path}: {len(unmatched)} of its {total} are not in this model: {listed(unmatched)}"
        if not partial:
            raise ValueError(f"{rest}; apply the others with partial=True, or choose a LoRA made for this model")
        _log.warning("%s; applying the others", rest)


class AttachedLoRA:
    """Control an attached LoRA. ``deltas`` hold the current factors.

    ``scale``, a number or (text encoders, UNet), may be set between runs. During a run, values that are computed once
    for all steps keep the old scale.
    """

    def __init__(self, lora: LoRAWeights, scale: Scale):
        self.scale: Scale = scale
        self.deltas = [LoRADelta(d.network, d.layer, d, d.multiplier, self) for d in lora.deltas]
        self._networks: dict[str, ref[nn.Module]] = {}  # weak, so that deleted networks are freed at once

    @property
    def is_attached(self) -> bool:
        """Return whether ``detach`` has not been called."""
        return bool(self.deltas)

    def wrap(self, name: str, network: nn.Module) -> None:
        """Wrap the layers that the LoRA changes in a network, also in one that was loaded again."""
        pairs, wrappers = target_layers(name, network, self.deltas), dict(wrapped_layers(network))
        if pairs and not wrappers:
            network._trainable = tuple(key for key, _ in tree_flatten(network.trainable_parameters()))
            network.freeze()
        for path, layer, delta in pairs:
            wrappers.setdefault(path, LoRALayer(layer)).loras.append(delta)
        network.update_modules(tree_unflatten(list(wrappers.items())))
        self._networks[name] = ref(network)

    def detach(self) -> None:
        """Remove the LoRA. Without other LoRAs, each layer is the original object again, frozen or not as before."""
        for network in filter(None, (network() for network in self._networks.values())):
            wrappers = dict(wrapped_layers(network))
            for layer in wrappers.values():
                layer.loras = [delta for delta in layer.loras if delta.lora is not self]
            bare = {path: layer.base for path, layer in wrappers.items() if not layer.loras}
            network.update_modules(tree_unflatten(list(bare.items())))
            if bare and len(bare) == len(wrappers):
                modules = dict(network.named_modules())
                for path, _, key in (name.rpartition(".") for name in network._trainable):
                    modules[path].unfreeze(recurse=False, keys=[key])
                del network._trainable
        self.deltas, self._networks = [], {}


def attach(networks: _Model, lora: LoRAWeights, scale: Scale = 1.0, *, partial: bool = False) -> AttachedLoRA:
    """Attach a LoRA without changing the weights, or raise ValueError as :func:`check_fit` does.

    Until it is detached, its factors are the only trainable parameters of the networks that it changes. They take as
    much memory as in the file. LoHa, LoKr, Tucker factors and diff compute ΔW in each call and then free it.
    """
    check_fit(networks, lora, scale, partial)
    result = AttachedLoRA(lora, scale)
    for name, network in networks.items():
        result.wrap(name, network)
    return result


def fuse(networks: _Model, loras: Sequence[tuple[LoRAWeights, Scale]]) -> None:
    """Add LoRAs, which :func:`check_fit` has accepted, to the weights; ValueError for a quantized layer.

    The sum is float32, cast back to the type of W. Nothing is computed before a weight is used: quantizing or saving
    matrix by matrix afterwards never holds more than one matrix in float32. A scale of 0 changes no bit.
    """
    changes: dict[tuple[str, str], tuple[nn.Module, _Scaled]] = {}
    for name, network in networks.items():
        for lora, scale in ((lora, scale_of(scale, name)) for lora, scale in loras):
            for path, layer, delta in target_layers(name, network, lora.deltas) if scale != 0 else ():
                if isinstance(layer, nn.QuantizedLinear):
                    raise ValueError(f"{name}.{path} is quantized: fuse before quantizing, or attach the LoRA instead")
                changes.setdefault((name, path), (layer, []))[1].append((delta, scale))
    with mx.stream(loading_stream(mx.default_device().type)):  # so that any thread can evaluate them
        for layer, scaled in changes.values():
            layer.update(_changed_parameters(layer, scaled))

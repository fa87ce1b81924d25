"""Put LoRAs into a model: W x becomes W x + Σ scale ΔW x in every layer that they change.

``fuse`` adds ΔW to the weights once: the model is as fast and as large as before. ``attach`` wraps the layers and
leaves the weights alone: the scale may change between runs, the weights may be quantized, the factors can be trained.
A model is passed as its networks by name: "unet", "text_encoder", "text_encoder_2".

Attached, a layer ``to_q`` has the parameters ``to_q.base.weight``, ``to_q.loras.0.down``, ``to_q.loras.0.up``.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..models.layers import GroupNorm, LayerNorm
from ..weights.formats.safetensors import loading_stream
from ..weights.parts import family_title
from .delta import LoRADelta, shape_of, to_layer, weight_of
from .files import LoRAWeights
from .names import layer_names

_log = logging.getLogger("stable_diffusion")

_Model = Mapping[str, nn.Module]  # its networks by name
_Matched = list[tuple[str, LoRADelta]]  # (path of the layer, its change)


class LoRALayer(nn.Module):
    """Wrap a layer and add LoRAs to it. ``base`` is the layer itself, ``loras`` are their changes."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.loras = base, []

    @property
    def weight(self) -> mx.array:
        """Return the weight of the wrapped layer."""
        return self.base.weight


class LoRALinear(LoRALayer):
    """Wrap a Linear or a QuantizedLinear.

    A LoRA of two factors computes up (down x) beside the layer. Any other change is added to the weight in each call.
    """

    def __call__(self, x: mx.array) -> mx.array:
        scaled = [(delta, delta.lora.scale) for delta in self.loras if delta.lora.scale != 0]
        changed = _changed_parameters(self.base, [pair for pair in scaled if pair[0].keys() != {"down", "up"}])
        if changed:
            weight = changed.get("weight", weight_of(self.base))
            y = self._apply(x, weight.astype(x.dtype)) + changed.get("bias", self.base.get("bias", 0))
        else:
            y = self.base(x)
        for delta, scale in scaled:
            if delta.keys() == {"down", "up"}:
                down = delta["down"].reshape(-1, *shape_of(self.base)[1:])
                up = delta["up"].reshape(-1, len(down)).astype(x.dtype)
                y = y + (scale * delta.multiplier * self._apply(x, to_layer(down).astype(x.dtype))) @ up.T
        return y

    def _apply(self, x: mx.array, weight: mx.array) -> mx.array:
        return x @ weight.T


class LoRAConv2d(LoRALinear):
    """Wrap a Conv2d."""

    def _apply(self, x: mx.array, weight: mx.array) -> mx.array:
        return mx.conv2d(x, weight, self.base.stride, self.base.padding, self.base.dilation)


class LoRANorm(LoRALayer):
    """Wrap a GroupNorm or a LayerNorm; the change is added to its parameters in each call."""

    def __call__(self, x: mx.array) -> mx.array:
        return self._changed()(x)

    def activated(self, x: mx.array) -> mx.array:
        """Apply the norm and SiLU, as ``GroupNorm.activated`` does."""
        return self._changed().activated(x)

    def _changed(self) -> nn.Module:
        norm = copy(self.base)
        norm.update(_changed_parameters(norm, [(delta, delta.lora.scale) for delta in self.loras]))
        return norm


_WRAPPERS = {
    nn.Linear: LoRALinear,
    nn.QuantizedLinear: LoRALinear,
    nn.Conv2d: LoRAConv2d,
    GroupNorm: LoRANorm,
    LayerNorm: LoRANorm,
}


def _changed_parameters(layer: nn.Module, scaled: Iterable[tuple[LoRADelta, float]]) -> dict[str, mx.array]:
    """W + Σ scale ΔW for each parameter that is changed: summed in float32, in the type of the layer."""
    totals: dict[str, mx.array] = {}
    for delta, scale in scaled:
        for key, change in delta.delta(layer).items() if scale != 0 else ():
            before = weight_of(layer) if key == "weight" else layer[key].astype(mx.float32)
            totals[key] = totals.get(key, before) + scale * change
    dtype = layer.get("scales", layer["weight"]).dtype
    return {key: total.astype(dtype) for key, total in totals.items()}


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that LoRAs may change, without their wrappers, by path."""
    layers = ((path, m) for path, m in network.named_modules() if isinstance(m, tuple(_WRAPPERS)))
    return {path.removesuffix(".base"): layer for path, layer in layers}


def wrapped_layers(network: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Return the layers with LoRAs beside their weights, with their paths."""
    return ((path, layer) for path, layer in network.named_modules() if isinstance(layer, LoRALayer))


def _match(networks: _Model, lora: LoRAWeights, partial: bool) -> tuple[dict[str, _Matched], tuple[str, ...]]:
    """The changes of each network, and the names of changes without a layer; raises ValueError as `attach` says."""
    layers = {name: _layers(network) for name, network in networks.items()}
    paths = {name: layer_names(name, layers[name]) for name in layers}
    _check_family(lora, layers.get("unet", {}))
    matched: dict[str, _Matched] = {name: [] for name in networks}
    unmatched, misshapen = list(lora.unknown), []
    for delta in lora.deltas:
        path = paths.get(delta.network, {}).get(delta.layer)
        if path is None:
            unmatched.append(delta.name)
            continue
        try:
            delta.delta(layers[delta.network][path])
        except ValueError as error:
            misshapen.append(str(error))
        matched[delta.network].append((path, delta))
    total = len(lora.deltas) + len(lora.unknown)
    if misshapen:
        raise ValueError(f"{lora.path} does not fit this model: {len(misshapen)} misshapen: {', '.join(misshapen)}")
    if not any(matched.values()):
        raise ValueError(
            f"{lora.path} is for another kind of model: this one has none of its {total} parts, {unmatched[0]}..."
        )
    if unmatched:
        rest = f"{lora.path}: {len(unmatched)} of its {total} parts are not in this model: {', '.join(unmatched)}"
        if not partial:
            raise ValueError(f"{rest}; apply the others with partial=True, or choose a LoRA made for this model")
        _log.warning("%s; applying the others", rest)
    return matched, tuple(unmatched)


def _check_family(lora: LoRAWeights, unet: Mapping[str, nn.Module]) -> None:
    """Compare the widths of the encoded prompt, which cross-attention reads and which tells the families apart."""
    of_model = {shape_of(layer)[1] for path, layer in unet.items() if path.endswith("attn2.to_k")}
    readers = [delta for delta in lora.deltas if delta.network == "unet" and delta.layer.endswith("attn2_to_k")]
    of_lora = {d[role].shape[1] for d in readers for role in ("down", "hada_w1_b", "diff") if role in d}
    if of_model and of_lora and not of_model & of_lora:
        family, model = (
            " or ".join(f"{family_title(width)} (prompts {width} wide)" for width in sorted(widths))
            for widths in (of_lora, of_model)
        )
        raise ValueError(f"{lora.path} is a LoRA for {family} and this model is {model}: choose one made for it")


class AttachedLoRA:
    """Control a LoRA that runs beside the weights.

    ``scale`` may be set between runs; within a run, values computed once for all steps keep the old one. ``unmatched``
    names the parts that are not in the model.
    """

    def __init__(self, scale: float, matched: Mapping[str, _Matched], unmatched: tuple[str, ...]):
        self.scale, self.unmatched = scale, unmatched
        self._matched = matched
        self._networks: dict[str, ref[nn.Module]] = {}  # weak: a network that all others delete is freed at once

    @property
    def is_attached(self) -> bool:
        """Return whether the LoRA runs: ``detach`` has not been called."""
        return bool(self._matched)

    def reattach(self, name: str, network: nn.Module) -> None:
        """Attach the LoRA to a network that was loaded again, in the same layers as before."""
        layers, wrappers = _layers(network), dict(wrapped_layers(network))
        if not wrappers and self._matched.get(name):
            network._trainable = tuple(key for key, _ in tree_flatten(network.trainable_parameters()))
            network.freeze()
        for path, delta in self._matched.get(name, ()):
            if path not in wrappers:
                layer = layers[path]
                wrappers[path] = next(wrap(layer) for kind, wrap in _WRAPPERS.items() if isinstance(layer, kind))
            wrappers[path].loras.append(LoRADelta(name, delta.layer, delta, delta.multiplier, self))
        network.update_modules(tree_unflatten(list(wrappers.items())))
        self._networks[name] = ref(network)

    def detach(self) -> None:
        """Remove the LoRA. Without others, each layer is again the object that it was, frozen or not as before."""
        for network in filter(None, (network() for network in self._networks.values())):
            bare = {}
            for path, layer in wrapped_layers(network):
                layer.loras = [delta for delta in layer.loras if delta.lora is not self]
                if not layer.loras:
                    bare[path] = layer.base
            network.update_modules(tree_unflatten(list(bare.items())))
            if bare and not attached(network):
                modules = dict(network.named_modules())
                for path, _, key in (name.rpartition(".") for name in network._trainable):
                    modules[path].unfreeze(recurse=False, keys=[key])
                del network._trainable
        self._matched, self._networks = {}, {}


def attached(network: nn.Module) -> set[AttachedLoRA]:
    """Return the LoRAs that run beside a network's weights."""
    return {delta.lora for _, layer in wrapped_layers(network) for delta in layer.loras}


def attach(networks: _Model, lora: LoRAWeights, scale: float = 1.0, *, partial: bool = False) -> AttachedLoRA:
    """Run a LoRA beside the weights: a layer computes W x + scale ΔW x, the second term from the factors.

    The factors become the only trainable parameters of the networks that the LoRA changes, until it is detached. They
    take memory as they are in the file. LoHa, LoKr, Tucker factors and diff compute ΔW in each call and drop it.

    Args:
        networks: the model, changed in place; its layers may be quantized, now or later.
        lora: the LoRA; several are attached one after the other.
        scale: its strength: 0 is none, negative scales lead away from it.
        partial: apply it even if the model lacks some of its layers; otherwise that is an error.

    Raises:
        ValueError: the LoRA is for another family of models, or its shapes do not fit; parts of it are not in the
            model, all of them named; or nothing of it is. The model is then unchanged.
    """
    if not math.isfinite(scale):
        raise ValueError(f"the scale {scale} of a LoRA is not a number; 1 is all of it, 0 is none")
    result = AttachedLoRA(scale, *_match(networks, lora, partial))
    for name, network in networks.items():
        result.reattach(name, network)
    return result


def fuse(networks: _Model, loras: Iterable[tuple[LoRAWeights, float]], *, partial: bool = False) -> tuple[str, ...]:
    """Add LoRAs to the weights: W becomes W + Σ scale ΔW, summed in float32 and cast back to the type of W.

    Nothing is computed before a weight is used: quantizing or saving matrix by matrix afterwards never holds more than
    one matrix in float32. ``loras`` come with their scales; 0 leaves every bit as it is. Returns the names of the parts
    that are not in the model. Raises ValueError for a quantized layer, and as :func:`attach`; the model is then
    unchanged.
    """
    fused: list[AttachedLoRA] = []
    try:
        for lora, scale in loras:
            fused.append(attach(networks, lora, scale, partial=partial))
        changed = []
        for name, network in networks.items():
            for path, layer in wrapped_layers(network):
                scaled = [(delta, delta.lora.scale) for delta in layer.loras if delta.lora in fused]
                if scaled and isinstance(layer.base, nn.QuantizedLinear):
                    raise ValueError(f"{name}.{path} is quantized: fuse before quantizing, or attach the LoRA instead")
                with mx.stream(loading_stream(mx.default_device().type)):  # so that any thread can evaluate them
                    changed.append((layer.base, _changed_parameters(layer.base, scaled)))
        for layer, parameters in changed:
            layer.update(parameters)
    finally:
        for lora in fused:
            lora.detach()
    return tuple(name for lora in fused for name in lora.unmatched)

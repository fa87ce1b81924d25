"""LoRAs in a model: W x becomes W x + Σ scale ΔW x, in every layer that they change.

Either the sum is made once (``fuse``: afterwards the model is as fast and as large as before), or for each call
(``attach``: the weights are not touched, so the scale may change between runs, and quantized weights stay as they are).
A model is given as its networks by name: "unet", "text_encoder", "text_encoder_2".
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from weakref import ref

import mlx.core as mx
import mlx.nn as nn

from ..models.kernels import silu
from ..models.layers import GroupNorm, LayerNorm
from .files import Change, Lora, bias_delta, delta, gain, laid_out, shape_of, whole_delta
from .names import layer_names

_log = logging.getLogger("stable_diffusion")

Networks = Mapping[str, nn.Module]

# --- the layers of a change ----------------------------------------------------------------------------------------

_FAMILIES = {768: "SD 1", 1024: "SD 2", 2048: "SDXL", 1280: "the SDXL refiner"}  # by the width of the encoded prompt


@dataclass(frozen=True, eq=False)
class _Place:
    change: Change
    path: str
    layer: nn.Module

    @property
    def name(self) -> str:
        return f"{self.change.network}.{self.path}"


def _places(networks: Networks, lora: Lora, partial: bool) -> tuple[list[_Place], tuple[str, ...]]:
    """Where each change goes, and the names of those that go nowhere; raises ValueError as `attach` says."""
    layers = {name: _layers(network) for name, network in networks.items()}
    names = {name: layer_names(name, found) for name, found in layers.items()}
    _check_family(lora, layers.get("unet", {}))
    places, unmatched, misshapen = [], list(lora.unknown), []
    for change in lora.changes:
        path = names.get(change.network, {}).get(change.layer)
        if path is None:
            unmatched.append(change.name)
            continue
        place = _Place(change, path, layers[change.network][path])
        try:
            _check_fit(place)
        except ValueError as error:
            misshapen.append(str(error))
        places.append(place)
    total = len(lora.changes) + len(lora.unknown)
    if misshapen:
        raise ValueError(f"{lora.path} does not fit this model: {len(misshapen)} misshapen: {', '.join(misshapen)}")
    if not places:
        raise ValueError(
            f"{lora.path} is for another kind of model: this one has none of its {total} parts, {unmatched[0]}..."
        )
    if unmatched:
        left = f"{lora.path}: {len(unmatched)} of its {total} parts are not in this model: {', '.join(unmatched)}"
        if not partial:
            raise ValueError(
                f"{left}; apply the rest with --lora_partial, or choose a LoRA that was made for this model"
            )
        _log.warning("%s; applying the rest", left)
    return places, tuple(unmatched)


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    return {path: layer for path, layer in network.named_modules() if type(layer) in {*_ADAPTED, *_PLAIN}}


def _check_fit(place: _Place) -> None:
    """Raises ValueError where a change has not the shape of its layer. Nothing is computed."""
    change, layer = place.change, place.layer
    if change.of_weight:
        delta(change, shape_of(layer))
        gain(change, layer)
    shape = layer.bias.shape if "bias" in layer else None
    for role in ("bias", "diff_b"):
        if role in change.factors and change.factors[role].shape != shape:
            raise ValueError(f"{change.name} {role} {change.factors[role].shape} instead of {shape}")


def _check_family(lora: Lora, unet: Mapping[str, nn.Module]) -> None:
    """Cross-attention reads the encoded prompt, whose width tells the families apart."""
    of_model = {shape_of(layer)[1] for path, layer in unet.items() if path.endswith("attn2.to_k")}
    of_lora = set()
    for change in lora.changes:
        if change.network == "unet" and change.layer.endswith("attn2_to_k"):
            of_lora |= {
                change.factors[role].shape[1] for role in ("down", "hada_w1_b", "diff") if role in change.factors
            }
    if of_model and of_lora and not of_model & of_lora:
        wanted, given = (
            " or ".join(f"{_FAMILIES.get(width, 'another family')} (prompts {width} wide)" for width in sorted(widths))
            for widths in (of_lora, of_model)
        )
        raise ValueError(f"{lora.path} is a LoRA for {wanted} and this model is {given}: choose one made for it")


def _weakly(networks: Networks) -> dict[str, ref[nn.Module]]:
    """A network that is deleted by everyone else is to free its memory at once, whatever is on it."""
    return {name: ref(network) for name, network in networks.items()}


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"the scale {scale} of a LoRA is not a number; 1 is all of it, 0 is none")


# --- fused ---------------------------------------------------------------------------------------------------------


class Fusion:
    """What :func:`fuse` did: the layers it changed, the parts that are not in the model, and the way back."""

    def __init__(self, networks: Networks, applied: Iterable[str], unmatched: Iterable[str], keep: bool):
        self.applied, self.unmatched = tuple(applied), tuple(unmatched)
        self._networks = _weakly(networks)
        self._keep = keep
        self._replaced: list[tuple[str, str, str, mx.array, mx.array]] = []

    def _replace(self, place: _Place, key: str, value: mx.array) -> None:
        if self._keep:
            self._replaced.append((place.change.network, place.path, key, place.layer[key], value))
        place.layer[key] = value

    def unfuse(self) -> None:
        """Put the very arrays back that were there before. Later fusions are to be undone first."""
        if not self._keep:
            raise ValueError("the weights from before this fusion were not kept: load the model again")
        layers = {name: dict(network().named_modules()) for name, network in self._networks.items() if network()}
        self._replaced = [replaced for replaced in self._replaced if replaced[0] in layers]
        for network, path, key, _, fused in self._replaced:
            if layers[network][path].get(key) is not fused:
                raise ValueError(f"{network}.{path} was changed after this fusion: undo that first, or load it again")
        for network, path, key, original, _ in self._replaced:
            layers[network][path][key] = original
        self._replaced = []


def fuse(
    networks: Networks, loras: Iterable[tuple[Lora, float]], *, partial: bool = False, keep: bool = True
) -> Fusion:
    """Add LoRAs to the weights: W becomes W + Σ scale ΔW, summed in float32 and cast back to the type of W.

    Nothing is computed before a weight is used: quantizing or saving matrix by matrix afterwards never holds more than
    one matrix in float32.

    Args:
        networks: the model, changed in place.
        loras: what to add, each with its scale; 0 leaves every bit as it is.
        partial: apply a LoRA of which parts are not in this model; otherwise that is an error.
        keep: keep the replaced weights for :meth:`Fusion.unfuse`: as many bytes more as the changed layers have.

    Raises:
        ValueError: a layer is quantized; and as :func:`attach`. The model is then as before.
    """
    found, unmatched = [], []
    for lora, scale in loras:
        _check_scale(scale)
        places, left = _places(networks, lora, partial)
        found += [(place, scale) for place in places]
        unmatched += left
    if quantized := sorted(place.name for place, _ in found if isinstance(place.layer, nn.QuantizedLinear)):
        raise ValueError(f"{quantized[0]} is quantized: fuse before quantizing, or attach the LoRA instead")
    fusion = Fusion(networks, dict.fromkeys(place.name for place, _ in found), unmatched, keep)
    sums: dict[tuple[str, str], tuple[_Place, mx.array]] = {}
    for place, scale in found:
        parts = {}
        if place.change.of_weight and scale:
            parts["weight"] = laid_out(whole_delta(place.change, place.layer))
        if place.change.of_bias and scale:
            parts["bias"] = bias_delta(place.change)
        for key, part in parts.items():
            _, total = sums.get((place.name, key), (place, place.layer[key].astype(mx.float32)))
            sums[place.name, key] = (place, total + scale * part)
    for (_, key), (place, total) in sums.items():
        fusion._replace(place, key, total.astype(place.layer[key].dtype))
    return fusion


# --- attached ------------------------------------------------------------------------------------------------------


class Attachment:
    """A LoRA that runs beside the weights. ``scale`` may be set at any time; a call takes the value that it has then.

    So set it between runs: in the middle of one, what its first step computed for all steps is as it was.
    """

    def __init__(self, networks: Networks, scale: float, places: Sequence[_Place], unmatched: Iterable[str]):
        self.scale = scale
        self.applied, self.unmatched = tuple(place.name for place in places), tuple(unmatched)
        self._networks = _weakly(networks)
        self._changes = [(place.change, place.path) for place in places]

    def attach_again(self, name: str, network: nn.Module) -> None:
        """Attach it to a network that was made anew, where it was attached to the one before of that name."""
        layers = _layers(network)
        for change, path in self._changes:
            if change.network == name:
                layer = layers[path]
                _set_terms(layer, (*_terms(layer), (self, _term(change, layer))))
        self._networks[name] = ref(network)

    def detach(self) -> None:
        """Take it away again; a layer without others is what it was before."""
        for network in self._networks.values():
            for layer in _layers(network()).values() if network() else ():
                _set_terms(layer, tuple(term for term in _terms(layer) if term[0] is not self))
        self._changes = []


def attachments(network: nn.Module) -> set[Attachment]:
    """The LoRAs that run beside a network's weights."""
    return {attachment for layer in _layers(network).values() for attachment, _ in _terms(layer)}


def attach(networks: Networks, lora: Lora, scale: float = 1.0, *, partial: bool = False) -> Attachment:
    """Let a LoRA run beside the weights: a layer computes W x + scale ΔW x, the second from the factors.

    The layers stay the objects they are, with their parameters under the same names. What a LoRA of the plain kind
    holds in memory is its factors, in the type of the model; LoHa, LoKr, Tucker factors and diff make their ΔW anew in
    each call and drop it.

    Args:
        networks: the model, changed in place; its layers may be quantized.
        lora: what to add; several are attached one after the other.
        scale: how much of it: 0 is none, negative scales lead away from it.
        partial: apply it even if parts of it are not in this model; otherwise that is an error.

    Raises:
        ValueError: the LoRA is for another family of models, or its shapes do not fit; parts of it are not in the
            model, all of them named; or nothing of it is. The model is then as before.
    """
    _check_scale(scale)
    places, unmatched = _places(networks, lora, partial)
    attachment = Attachment(networks, scale, places, unmatched)
    terms = [(place.layer, _term(place.change, place.layer)) for place in places]
    for layer, term in terms:
        _set_terms(layer, (*_terms(layer), (attachment, term)))
    return attachment


# (the layer without LoRAs, x, what it makes of x) -> ΔW x
_Term = Callable[[Callable[[mx.array], mx.array], mx.array, mx.array], mx.array]


def _term(change: Change, layer: nn.Module) -> _Term:
    bias = bias_delta(change) if change.of_bias else 0
    if isinstance(layer, _NORMS):  # linear in (weight, bias): the norm with those of the change is what to add
        twin = copy(layer)
        _set_terms(twin, ())
        twin.weight = delta(change, shape_of(layer)) if change.of_weight else mx.zeros_like(layer.weight)
        twin.bias = mx.broadcast_to(bias, layer.bias.shape)
        return lambda call, x, base: twin(x).astype(x.dtype)
    if not change.of_weight:
        return lambda call, x, base: bias.astype(x.dtype)
    product = _product(change, layer)
    rescaling = gain(change, layer)
    own_bias = layer.bias if "bias" in layer else 0
    rows = rescaling is not None and rescaling.shape[0] > 1
    rescaling = None if rescaling is None else rescaling.reshape(-1)

    def term(call, x: mx.array, base: mx.array) -> mx.array:
        if rescaling is None:
            y = product(x)
        elif rows:  # g (W + ΔW) x - W x
            y = rescaling * product(x) + (rescaling - 1) * (base - own_bias)
        else:  # (W + ΔW) g x - W x
            scaled = (rescaling * x).astype(x.dtype)
            y = product(scaled) + call(scaled) - base
        return (y + bias).astype(x.dtype)

    return term


def _product(change: Change, layer: nn.Module) -> Callable[[mx.array], mx.array]:
    """x -> ΔW x, without DoRA's rescaling."""
    factors, shape = change.factors, shape_of(layer)
    dtype = layer.scales.dtype if isinstance(layer, nn.QuantizedLinear) else layer.weight.dtype
    geometry = (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None

    def apply(x: mx.array, weight: mx.array) -> mx.array:
        return x @ weight.T if geometry is None else mx.conv2d(x, weight, *geometry)

    if "up" not in factors or "mid" in factors:
        return lambda x: apply(x, laid_out(delta(change, shape)).astype(dtype))
    up, down = factors["up"], factors["down"]
    up = (change.multiplier * up.reshape(up.shape[0], -1).astype(mx.float32)).astype(dtype).T
    down = (down.reshape(down.shape[0], -1) if geometry is None else laid_out(down)).astype(dtype)
    return lambda x: apply(x, down) @ up


class _Adapted:
    """A layer with terms added to its output. They are no parameters, so they stand beside those, not among them."""

    def __call__(self, x: mx.array) -> mx.array:
        y = base = super().__call__(x)
        for attachment, term in vars(self)["terms"]:
            if attachment.scale != 0:
                y = y + attachment.scale * term(super().__call__, x, base)
        return y


class _AdaptedLinear(_Adapted, nn.Linear):
    def to_quantized(self, *args, **kwargs) -> nn.Module:
        quantized = super().to_quantized(*args, **kwargs)
        _set_terms(quantized, _terms(self))
        return quantized


class _AdaptedQuantizedLinear(_Adapted, nn.QuantizedLinear):
    pass


class _AdaptedConv2d(_Adapted, nn.Conv2d):
    pass


class _AdaptedGroupNorm(_Adapted, GroupNorm):
    def activated(self, x: mx.array) -> mx.array:
        return silu(self(x))


class _AdaptedLayerNorm(_Adapted, LayerNorm):
    pass


_NORMS = (GroupNorm, LayerNorm)
_ADAPTED = {
    nn.Linear: _AdaptedLinear,
    nn.QuantizedLinear: _AdaptedQuantizedLinear,
    nn.Conv2d: _AdaptedConv2d,
    GroupNorm: _AdaptedGroupNorm,
    LayerNorm: _AdaptedLayerNorm,
}
_PLAIN = {adapted: plain for plain, adapted in _ADAPTED.items()}


def _terms(layer: nn.Module) -> tuple[tuple[Attachment, _Term], ...]:
    return vars(layer).get("terms", ())


def _set_terms(layer: nn.Module, terms: tuple[tuple[Attachment, _Term], ...]) -> None:
    """Give a layer its terms: it becomes the kind of layer that adds them, or again the kind that has none."""
    if terms:
        vars(layer)["terms"] = terms
        layer.__class__ = _ADAPTED.get(type(layer), type(layer))
    else:
        vars(layer).pop("terms", None)
        layer.__class__ = _PLAIN.get(type(layer), type(layer))

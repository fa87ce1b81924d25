"""Make the factors of a new LoRA, which changes nothing until it is trained."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from .delta import LoRADelta, shape_of, weight_of
from .files import LoRAWeights

# Layers by the end of their path. Those of text encoders have the same roles under other names.
_ATTENTION = r"(to_q|to_k|to_v|to_out\.0|q_proj|k_proj|v_proj|out_proj)"
_FEED_FORWARD = r"(ff\.net\.0\.proj|ff\.net\.2|mlp\.fc1|mlp\.fc2)"
TARGETS = {
    "attention": rf"\.{_ATTENTION}$",
    "attention+ff": rf"\.({_ATTENTION}|{_FEED_FORWARD})$",
    "all": "",
}


def new_lora(
    networks: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    *,
    alpha: float | None = None,
    targets: str = "attention",
    conv_rank: int = 0,
    dora: bool = False,
    seed: int = 0,
) -> LoRAWeights:
    """Make a LoRA (Hu et al. 2022) for some layers of a model: "down" is random (He et al. 2015), "up" is 0, float32.

    Args:
        networks: by name: "unet", "text_encoder", "text_encoder_2".
        ranks: of the matrices of each network; 0 leaves it out.
        alpha: by which ΔW is multiplied, over the rank; None is the rank itself.
        targets: a key of ``TARGETS``, or a regular expression that is searched in the paths of layers.
        conv_rank: of the 3×3 convolutions in the resnets and at the ends of blocks; 0 leaves them out.
        dora: add the lengths of the rows of each weight as parameters (Liu et al. 2024).
        seed: of the random factors; each depends on its layer's name only.

    Raises ValueError for a pattern without a layer, and for a rank above the width of a layer.
    """
    pattern = re.compile(TARGETS.get(targets, targets))
    deltas = []
    for network, rank, path, layer in _layers(networks, ranks, pattern, conv_rank):
        out, width, *kernel = shape_of(layer)
        if rank > min(out, width):
            raise ValueError(f"rank {rank} is above the width {min(out, width)} of {path}; choose a smaller one")
        name = hashlib.blake2b(f"{seed} {network} {path}".encode(), digest_size=8).digest()
        bound = (width * (kernel[0] * kernel[1] if kernel else 1)) ** -0.5
        down = mx.random.uniform(-bound, bound, (rank, width, *kernel), key=mx.random.key(int.from_bytes(name)))
        factors = {"down": down, "up": mx.zeros((out, rank, *(1 for _ in kernel)))}
        if dora:
            weight = weight_of(layer).reshape(out, -1)
            factors["dora_scale"] = mx.sqrt(mx.square(weight).sum(axis=1))
        multiplier = 1.0 if alpha is None else alpha / rank
        deltas.append(LoRADelta(network, path.replace(".", "_"), factors, multiplier))
    if not deltas:
        known = ", ".join(TARGETS)
        raise ValueError(f"no layer of the model is found by targets {targets!r}; choose {known}, or another pattern")
    mx.eval([list(delta.values()) for delta in deltas])
    return LoRAWeights(Path("new"), tuple(deltas))


def _layers(
    networks: Mapping[str, nn.Module], ranks: Mapping[str, int], pattern: re.Pattern, conv_rank: int
) -> Iterator[tuple[str, int, str, nn.Module]]:
    """Iterate over (network, rank, path, layer) of the layers that a pattern finds and that have a rank."""
    for network, module in networks.items():
        for path, layer in module.named_modules():
            path = path.removesuffix(".base")
            is_matrix = isinstance(layer, nn.Linear | nn.QuantizedLinear)
            is_kernel = isinstance(layer, nn.Conv2d) and re.search(r"\.(conv1|conv2|conv)$", path)
            rank = ranks.get(network, 0) if is_matrix else conv_rank if is_kernel and ranks.get(network, 0) else 0
            if rank and (is_kernel or pattern.search(path)):
                yield network, rank, path, layer

"""Create the factors of a new LoRA, which has no effect until it is trained."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from .delta import LoRADelta, shape_of, weight_of
from .files import LoRAWeights

_ATTENTION = r"to_q|to_k|to_v|to_out\.0|q_proj|k_proj|v_proj|out_proj"
_FEED_FORWARD = r"ff\.net\.0\.proj|ff\.net\.2|mlp\.fc1|mlp\.fc2"
TARGETS = {  # matrices by their path; those of text encoders have the same roles under other names
    "attention": rf"\.({_ATTENTION})$",
    "attention+ff": rf"\.({_ATTENTION}|{_FEED_FORWARD})$",
    "all": r"\.(attentions|self_attn|mlp)\.",
}
_KNOWN = ", ".join(TARGETS)
_KERNELS = r"\.(conv1|conv2|conv)$"  # of resnets, downsamplers and upsamplers
_RESNET_MATRICES = r"\.(time_emb_proj|conv_shortcut)$"


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
    """Create a LoRA (Hu et al. 2022) for some layers of a model: "down" is random (He et al. 2015), "up" is 0, float32.

    "attention" means the four projections of each attention; "attention+ff" adds both matrices of each feed-forward.
    "all" means the layers of kohya's scripts: every matrix in the UNet's transformers, with the projections around
    them, and in the layers of text encoders; with ``conv_rank`` also the matrices of the resnets.

    Args:
        networks: the model's networks by name: "unet", "text_encoder", "text_encoder_2".
        ranks: rank of the matrices in each network; 0 omits the network.
        alpha: ΔW is multiplied by alpha divided by the rank of its layer. Default: the rank.
        targets: a key of ``TARGETS``, or a regular expression that is searched in the paths of all matrices.
        conv_rank: rank of the 3×3 convolutions in the UNet's resnets, downsamplers and upsamplers; 0 omits them.
        dora: add the norms of the rows of each weight as parameters (DoRA, Liu et al. 2024).
        seed: seed of "down", which depends only on it and on the layer's name.

    Raises ValueError for a pattern without a layer, a rank above the width of a layer, and an alpha of 0 or less.
    """
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha {alpha} must be above 0, or the LoRA has no effect; give the rank, or half of it")
    layers = list(_layers(networks, ranks, targets, conv_rank))
    matched = {network for network, _, _, layer in layers if layer.weight.ndim == 2}
    if missed := [network for network in networks if ranks.get(network, 0) and network not in matched]:
        problem = f"targets {targets!r:.60} match no layer of the {missed[0]}"
        raise ValueError(f"{problem}; choose {_KNOWN} or another pattern")
    for network, rank, path, layer in sorted(layers, key=lambda row: min(shape_of(row[3])[:2])):
        width = min(shape_of(layer)[:2])
        if rank > width:
            raise ValueError(f"rank {rank} is above the width {width} of {network}.{path}; choose at most {width}")
    deltas = tuple(_delta(*row, alpha=alpha, dora=dora, seed=seed) for row in layers)
    return LoRAWeights(Path("new"), deltas)


def _layers(
    networks: Mapping[str, nn.Module], ranks: Mapping[str, int], targets: str, conv_rank: int
) -> Iterator[tuple[str, int, str, nn.Module]]:
    """Iterate over (network, rank, path, layer) of the layers that are trained."""
    pattern = TARGETS.get(targets, targets)
    if targets == "all" and conv_rank:
        pattern = f"{pattern}|{_RESNET_MATRICES}"
    try:
        matrices, kernels = re.compile(pattern), re.compile(_KERNELS)
    except re.error as error:
        problem = f"targets {targets!r:.60} is not a regular expression ({error})"
        raise ValueError(f"{problem}; choose {_KNOWN}, or correct it") from None
    for network, module in networks.items():
        rank = ranks.get(network, 0)
        for path, layer in module.named_modules() if rank else ():
            path = path.removesuffix(".base")
            if isinstance(layer, nn.Linear | nn.QuantizedLinear) and matrices.search(path):
                yield network, rank, path, layer
            elif conv_rank and isinstance(layer, nn.Conv2d) and kernels.search(path):
                yield network, conv_rank, path, layer


def _delta(
    network: str, rank: int, path: str, layer: nn.Module, *, alpha: float | None, dora: bool, seed: int
) -> LoRADelta:
    """Create the factors of a layer: Kaiming uniform with a = √5, as in kohya's scripts and PEFT, and zeros."""
    out, width, *kernel = shape_of(layer)
    name = hashlib.blake2b(f"{seed} {network} {path}".encode(), digest_size=8).digest()
    bound = (width * math.prod(kernel)) ** -0.5
    down = mx.random.uniform(-bound, bound, (rank, width, *kernel), key=mx.random.key(int.from_bytes(name)))
    factors = {"down": down, "up": mx.zeros((out, rank, *(1 for _ in kernel)))}
    if dora:
        weight = weight_of(layer)
        factors["dora_scale"] = mx.sqrt(mx.square(weight).sum(axis=tuple(range(1, weight.ndim))))
    mx.eval(factors)  # here, so that one weight at a time is in float32
    return LoRADelta(network, path.replace(".", "_"), factors, 1.0 if alpha is None else alpha / rank)

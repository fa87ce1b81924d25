"""Tensor names of older files -> the names in today's diffusers checkpoints, which are our module names."""

import re

import mlx.core as mx

# The autoencoder's attention had names of its own before diffusers 0.18, and files written then keep them.
_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY = re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.")

# Buffers that old text encoders saved although they are no weights: position_ids is 0, 1, 2, ...
_NOT_WEIGHTS = re.compile(r"(^|\.)position_ids$")


def canonical(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """The same tensors under today's names, without the entries that are no weights."""
    named = {name: value for name, value in tensors.items() if not _NOT_WEIGHTS.search(name)}
    if "embeddings.token_embedding.weight" in named:  # a text encoder without the prefix, as transformers 5 names it
        named = {name if name.startswith("text_projection") else f"text_model.{name}": v for name, v in named.items()}
    return {_LEGACY.sub(lambda m: f"{m[1]}.{_LEGACY_ATTENTION[m[2]]}.", name): v for name, v in named.items()}

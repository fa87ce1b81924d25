"""Rename the tensors of older diffusers and transformers files to the names of today's, which are our module names."""

import re

import mlx.core as mx

# The autoencoder's attention had other names before diffusers 0.18, and files written then keep them.
_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY = re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.")

# Buffers that old text encoders saved, and what a CLIP model holds beside its text encoder.
_NOT_WEIGHTS = re.compile(r"((^|\.)position_ids|^logit_scale|^attn_mask)$|^(visual|vision_model|visual_projection)\.")
_BARE_CLIP = "embeddings.token_embedding.weight"  # a text encoder without the prefix, as transformers 5 names it
_OLD = re.compile(f"{_LEGACY.pattern}|{_NOT_WEIGHTS.pattern}|^{re.escape(_BARE_CLIP)}$")


def canonical(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return the tensors under today's names, without entries that are no weights of a network."""
    if not any(map(_OLD.search, tensors)):
        return tensors
    named = {name: value for name, value in tensors.items() if not _NOT_WEIGHTS.search(name)}
    if _BARE_CLIP in named:
        named = {name if name.startswith("text_projection") else f"text_model.{name}": v for name, v in named.items()}
    return {_LEGACY.sub(lambda m: f"{m[1]}.{_LEGACY_ATTENTION[m[2]]}.", name): v for name, v in named.items()}

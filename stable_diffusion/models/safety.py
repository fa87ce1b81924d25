"""The safety checker of the published checkpoints (Rando et al. 2022), named as diffusers' class."""

import mlx.core as mx

from .clip_vision import CLIPVisionModelWithProjection
from .config import CLIPVisionConfig

_CONCEPTS, _SPECIAL_CARE = 17, 3
_STRICTER = 0.01  # change of the thresholds for an image near a special-care concept


class StableDiffusionSafetyChecker(CLIPVisionModelWithProjection):
    """Flag images whose embedding is near one of the concepts: pixels [B, S, S, 3] -> [B], true where flagged.

    Each concept has a threshold for the cosine similarity; the excess is rounded to three digits.
    """

    def __init__(self, config: CLIPVisionConfig):
        super().__init__(config)
        self.concept_embeds = mx.zeros((_CONCEPTS, config.projection_dim))
        self.special_care_embeds = mx.zeros((_SPECIAL_CARE, config.projection_dim))
        self.concept_embeds_weights = mx.zeros(_CONCEPTS)
        self.special_care_embeds_weights = mx.zeros(_SPECIAL_CARE)

    def __call__(self, pixels: mx.array) -> mx.array:
        embeddings, _ = super().__call__(pixels)
        special = _cosines(embeddings, self.special_care_embeds) - self.special_care_embeds_weights
        stricter = _STRICTER * _exceeds(special)[:, None]
        return _exceeds(_cosines(embeddings, self.concept_embeds) - self.concept_embeds_weights + stricter)


def _cosines(x: mx.array, y: mx.array) -> mx.array:
    """[B, E] and [n, E] -> [B, n]."""
    x, y = (v.astype(mx.float32) for v in (x, y))
    x, y = (v / mx.maximum(mx.linalg.norm(v, axis=-1, keepdims=True), 1e-12) for v in (x, y))
    return x @ y.T


def _exceeds(scores: mx.array) -> mx.array:
    return (mx.round(1000 * scores) > 0).any(axis=-1)

"""CLIP's image encoder (Radford et al. 2021), with the names of transformers' ``CLIPVisionModelWithProjection``."""

import mlx.core as mx
import mlx.nn as nn

from .clip import CLIPEncoderLayer
from .config import CLIPVisionConfig
from .layers import Conv2d, Group, LayerNorm


class CLIPVisionModelWithProjection(nn.Module):
    """Encode pixels [B, S, S, 3], see ``images/clip.py``; S is ``config.image_size``.

    Returns (embeddings [B, E], states): the projected class token, and the states [B, N + 1, C] before each layer and
    after the last layer, not normalised.
    """

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config = config
        width, patch, eps = config.hidden_size, config.patch_size, config.layer_norm_eps
        self.vision_model = Group(
            embeddings=Group(
                class_embedding=mx.zeros(width),
                patch_embedding=Conv2d(3, width, patch, stride=patch, bias=False),
                position_embedding=nn.Embedding((config.image_size // patch) ** 2 + 1, width),
            ),
            pre_layrnorm=LayerNorm(width, eps=eps),  # the checkpoints' spelling
            encoder=Group(layers=[CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)]),
            post_layernorm=LayerNorm(width, eps=eps),
        )
        self.visual_projection = nn.Linear(width, config.projection_dim, bias=False)

    def __call__(self, pixels: mx.array) -> tuple[mx.array, list[mx.array]]:
        model, size = self.vision_model, self.config.image_size
        if pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"the image encoder takes pixels [B, {size}, {size}, 3], not {pixels.shape}; resize them")
        embed = model.embeddings.patch_embedding
        patches = embed(pixels.astype(embed.weight.dtype)).flatten(1, 2)
        first = mx.broadcast_to(model.embeddings.class_embedding, (len(patches), 1, patches.shape[-1]))
        tokens = mx.concatenate([first, patches], axis=1) + model.embeddings.position_embedding.weight
        states = [model.pre_layrnorm(tokens)]
        for layer in model.encoder.layers:
            states.append(layer(states[-1]))
        return self.visual_projection(model.post_layernorm(states[-1][:, 0])), states

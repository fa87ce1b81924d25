"""The autoencoder with a codebook (van den Oord et al. 2017; Esser et al. 2021), named as diffusers' ``VQModel``."""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from .config import AutoencoderConfig, Supported
from .layers import Group
from .vae import AutoencoderKL, Network, with_no_variance


@dataclass(frozen=True)
class VQConfig(AutoencoderConfig):
    """Hold the config of a ``VQModel``, whose codebook has ``num_vq_embeddings`` vectors of ``vq_embed_dim`` numbers.

    Files without a ``scaling_factor`` are older than that key, and their latents are not scaled. Today's diffusers
    assumes 0.18215 and fails to draw faces: https://github.com/huggingface/diffusers/issues/6725.
    """

    kind: ClassVar[str] = "vq"
    supported: ClassVar[Supported] = AutoencoderConfig.supported | {"norm_type": ("group", None)}
    moments: ClassVar[int] = 1

    layers_per_block: int = 1
    latent_channels: int = 3
    scaling_factor: float = 1.0
    force_upcast: bool = False
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None
    lookup_from_codebook: bool = False  # no effect on quantized latents


class VQModel(AutoencoderKL):
    """Encode pixels in [-1, 1] to latents in the UNet's scale, and decode the codebook's nearest vectors to them."""

    def __init__(self, config: VQConfig):
        super().__init__(config)
        inner, outer = config.latent_channels, config.vq_embed_dim or config.latent_channels
        self.latent_channels = outer
        self.quant_conv, self.post_quant_conv = nn.Linear(inner, outer), nn.Linear(outer, inner)
        self.quantize = Group(embedding=nn.Embedding(config.num_vq_embeddings, outer))

    def encode(self, x: mx.array, encoder: Network | None = None) -> tuple[mx.array, mx.array]:
        """Encode pixels [B, H, W, 3] to (latents, log variance), each [B, h, w, C], before the codebook."""
        return with_no_variance(self.quant_conv((encoder or self.encoder)(x)) * self.config.scaling_factor)

    def decode(self, z: mx.array, decoder: Network | None = None) -> mx.array:
        """Decode latents [B, h, w, C] to pixels [B, H, W, 3], about [-1, 1] and not clipped."""
        z = self.nearest(z / self.config.scaling_factor)
        return (decoder or self.decoder)(self.post_quant_conv(z))

    def nearest(self, z: mx.array) -> mx.array:
        """Return the vector of the codebook that is nearest to each latent, in ``z`` [..., C]; distances in float32."""
        vectors = self.quantize.embedding.weight
        codes = vectors.astype(mx.float32)
        distances = mx.square(codes).sum(axis=-1) - 2 * (z.astype(mx.float32) @ codes.T)
        return vectors[mx.argmin(distances, axis=-1)]

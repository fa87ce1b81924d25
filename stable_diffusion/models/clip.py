"""CLIP's text encoder (Radford et al. 2021), with the module names of transformers' ``CLIPTextModel``."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .config import CLIPTextConfig, CLIPVisionConfig
from .layers import Group, LayerNorm, multi_head_attention

ACTIVATIONS = {"quick_gelu": nn.gelu_fast_approx, "gelu": nn.gelu}


@dataclass
class CLIPOutput:
    """Hold the outputs of a text encoder."""

    last_hidden_state: mx.array  # [B, N, C], normalised
    hidden_states: list[mx.array]  # the embeddings and every layer's output, none of them normalised
    pooled_output: mx.array  # [B, C or projection_dim]: the end-of-text state, projected if there is a projection


class CLIPEncoderLayer(nn.Module):
    """Run a pre-norm transformer layer; with the ``mask`` "causal", tokens do not see later ones."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, mask: str | None = None):
        super().__init__()
        dim, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        if dim % config.num_attention_heads:
            raise ValueError(f"{config.kind} width {dim} does not divide into {config.num_attention_heads} heads")
        self.layer_norm1 = LayerNorm(dim, eps=eps)
        self.self_attn = Group(**{name: nn.Linear(dim, dim) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Group(fc1=nn.Linear(dim, inner), fc2=nn.Linear(inner, dim))
        self._heads = config.num_attention_heads
        self._activation = ACTIVATIONS[config.hidden_act]
        self._mask = mask

    def __call__(self, x: mx.array) -> mx.array:
        attn, y = self.self_attn, self.layer_norm1(x)
        y = multi_head_attention(attn.q_proj(y), attn.k_proj(y), attn.v_proj(y), self._heads, self._mask)
        x = x + attn.out_proj(y)
        return x + self.mlp.fc2(self._activation(self.mlp.fc1(self.layer_norm2(x))))


class CLIPEmbeddings(nn.Module):
    """Embed tokens and add their positions. Both tables are modules, so that either may be quantized.

    Ids beyond the vocabulary are words that were added later; their vectors are in a separate table.
    """

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self._positions = config.max_position_embeddings
        self._vocabulary = config.vocab_size
        self._added = mx.zeros((0, config.hidden_size))

    def add(self, vectors: mx.array) -> list[int]:
        """Add the vectors [n, C] of a new word and return their ids."""
        if vectors.shape[1] != self._added.shape[1]:
            raise ValueError(f"vectors of width {vectors.shape[1]} do not fit a text encoder of {self._added.shape[1]}")
        first = self._vocabulary + len(self._added)
        self._added = mx.concatenate([self._added, vectors])
        return list(range(first, first + len(vectors)))

    def __call__(self, ids: mx.array) -> mx.array:
        n = ids.shape[-1]
        if n > self._positions:
            raise ValueError(f"{n} tokens do not fit into {self._positions} positions; shorten the text")
        tokens = self.token_embedding(mx.minimum(ids, self._vocabulary - 1))
        if len(self._added):
            added = self._added[mx.clip(ids - self._vocabulary, 0, len(self._added) - 1)].astype(tokens.dtype)
            tokens = mx.where((ids >= self._vocabulary)[..., None], added, tokens)
        return tokens + self.position_embedding(mx.arange(n))


class CLIPTextModel(nn.Module):
    """Encode token ids [B, N] to a :class:`CLIPOutput`: the text encoder of every Stable Diffusion."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.text_model = Group(
            embeddings=CLIPEmbeddings(config),
            encoder=Group(layers=[CLIPEncoderLayer(config, "causal") for _ in range(config.num_hidden_layers)]),
            final_layer_norm=LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
        )
        if config.with_projection:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self._eos_token_id = config.eos_token_id
        self._vocabulary = config.vocab_size

    def __call__(self, ids: mx.array) -> CLIPOutput:
        states = [self.text_model.embeddings(ids)]
        for layer in self.text_model.encoder.layers:
            states.append(layer(states[-1]))
        last = self.text_model.final_layer_norm(states[-1])
        # Old configs have a wrong eos_token_id, 2; end-of-text then is the last token of the vocabulary.
        vocabulary_ids = mx.where(ids < self._vocabulary, ids, 0)
        end = mx.argmax(vocabulary_ids if self._eos_token_id == 2 else ids == self._eos_token_id, axis=-1)
        pooled = last[mx.arange(ids.shape[0]), end]
        if "text_projection" in self:
            pooled = self.text_projection(pooled)
        return CLIPOutput(last, states, pooled)

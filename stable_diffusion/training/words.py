"""Train the vectors of a new word instead of a LoRA: textual inversion (Gal et al. 2023)."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.clip import CLIPEmbeddings
from ..pipeline import StableDiffusion
from ..text.tokenizer import Tokenizer
from ..weights.formats.safetensors import loading_stream


class NewWord(nn.Module):
    """Hold the vectors [N, C] of a new word for each text encoder, float32; the rest of the model is frozen.

    Changes (by an optimizer, a checkpoint, an average) call ``update``, which copies the vectors to the encoders.

    Args:
        sd: the model whose prompts get the word.
        word: for prompts.
        count: N, the number of tokens that the word takes in a prompt.
        initial_word: words whose vectors, repeated, are the initial ones; None is the mean of the vocabulary.
    """

    def __init__(self, sd: StableDiffusion, word: str, count: int, initial_word: str | None = None):
        super().__init__()
        self._sd = sd
        for name in sd.sources.keys() - {"autoencoder"}:
            getattr(sd, name).freeze()
        for tokenizer, name in sd._encoders:
            embeddings = getattr(sd, name).text_model.embeddings
            self[name] = _first_vectors(getattr(sd, tokenizer), embeddings, count, initial_word)
        mx.eval(self.parameters())
        self._places = {name: len(sd.sources[name].words) for _, name in sd._encoders}
        sd._add_words((word,), list(self.parameters().values()), word)

    def update(self, parameters: Mapping[str, Any], strict: bool = True) -> "NewWord":
        """Replace the vectors, here and in the text encoders."""
        super().update(parameters, strict)
        for name, place in self._places.items():
            words, embeddings = self._sd.sources[name].words, getattr(self._sd, name).text_model.embeddings
            words[place] = self[name]
            with mx.stream(loading_stream(mx.default_device().type)):  # so that any thread can evaluate it
                embeddings._added = mx.concatenate(words)
        return self


def _first_vectors(tokenizer: Tokenizer, embeddings: CLIPEmbeddings, count: int, initial_word: str | None) -> mx.array:
    table = embeddings.token_embedding
    if initial_word is None:
        vectors = table(mx.arange(embeddings._vocabulary)).astype(mx.float32).mean(axis=0, keepdims=True)
    elif not (ids := tokenizer.encode(initial_word)):
        raise ValueError(f"initial_word {initial_word!r} has no tokens; give a word that the tokenizer knows")
    else:
        vectors = table(mx.array(ids[:count])).astype(mx.float32)
    return mx.concatenate([vectors] * count)[:count]

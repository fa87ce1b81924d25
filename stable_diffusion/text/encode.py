"""Encode prompts with CLIP: chunks of tokens, emphasis, several prompts, SDXL's sizes."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypedDict, Unpack

import mlx.core as mx

from ..models.clip import CLIPTextModel
from .prompt import Part, Piece, Span, parts
from .tokenizer import Tokenizer

_log = logging.getLogger("stable_diffusion")

Encoders = Sequence[tuple[Tokenizer, CLIPTextModel]]


@dataclass(frozen=True)
class PromptRow:
    """Describe a row of a conditioning: its prompt, its weight, and the spans of a run in which it is active."""

    prompt: int = 0
    weight: float = 1.0
    spans: tuple[Span, ...] = (Span(),)

    def is_read(self, step: int, steps: int) -> bool:
        """Return whether the row is active in a step, from 0, of a run of ``steps``."""
        return any(span.holds(step, steps) for span in self.spans)


@dataclass(frozen=True)
class Conditioning:
    """Hold encoded prompts: arrays with one row per prompt, or several rows for a prompt with parts.

    Attributes:
        context: [r, M, C] the encoded prompt, M = 77 for each chunk.
        pooled: [r, P] the prompt as one vector; XL only.
        time_ids: [r, 6 or 5] the size conditioning; XL only.
        guidance: [r, G] the embedded guidance scale; LCM only.
        v_context: [r, M, C] replaces ``context`` for the values of cross-attention.
        channels: [r, h, w, C] extra input channels, for checkpoints that work from images.
        rows: a description of each row.
    """

    context: mx.array
    pooled: mx.array | None = None
    time_ids: mx.array | None = None
    guidance: mx.array | None = None
    v_context: mx.array | None = None
    channels: mx.array | None = None
    rows: tuple[PromptRow, ...] = (PromptRow(),)

    def arrays(self) -> dict[str, mx.array]:
        """Return all arrays that are not None, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, mx.array)}

    def map(self, function: Callable[[mx.array], mx.array]) -> "Conditioning":
        """Apply ``function`` to every array that is not None."""
        return replace(self, **{name: function(array) for name, array in self.arrays().items()})

    def select(self, prompts: slice) -> "Conditioning":
        """Return the conditioning of a slice of the prompts."""
        numbers = range(len(self))[prompts]
        places = [i for i, row in enumerate(self.rows) if row.prompt in numbers]
        rows = tuple(replace(self.rows[i], prompt=numbers.index(self.rows[i].prompt)) for i in places)
        return replace(self.map(lambda array: array[mx.array(places)]), rows=rows)

    def after(self, steps: int) -> "Conditioning":
        """Return the conditioning of a second pass, in which prompt scheduling continues after ``steps``."""
        rows = (replace(row, spans=tuple(span.after(steps) for span in row.spans)) for row in self.rows)
        return replace(self, rows=tuple(rows))

    def with_time_ids(self, time_ids: Sequence[float]) -> "Conditioning":
        """Return the conditioning with the same ``time_ids`` for every row."""
        return replace(self, time_ids=mx.array([time_ids] * len(self.rows), dtype=mx.float32))

    def with_channels(self, channels: mx.array) -> "Conditioning":
        """Return the conditioning with ``channels`` [1, h, w, C] for every row."""
        return replace(self, channels=mx.repeat(channels, len(self.rows), axis=0))

    def __len__(self) -> int:
        return 1 + self.rows[-1].prompt


@dataclass(frozen=True)
class SizeConditioning:
    """Describe SDXL's size conditioning (Podell et al. 2023, sec. 2.2). Sizes are (height, width).

    Attributes:
        original_size: size of the training image before resizing. Default: the size of the result.
        crop: (top, left) corner of the crop.
        target_size: size of the training image after resizing. Default: the size of the result.
        aesthetic_score, negative_aesthetic_score: the refiner's input instead of the target size.
        negative_original_size, negative_crop, negative_target_size: the same for the negative prompt. Default: the
            prompt's.
    """

    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    negative_original_size: tuple[int, int] | None = None
    negative_crop: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None

    def time_ids(self, pixels: tuple[int, int], is_cond: bool, has_score: bool) -> list[float]:
        """Return XL's time ids of the prompt or the negative prompt, for an image of ``pixels`` (height, width).

        ``has_score`` gives the refiner's ids, which end with an aesthetic score.
        """
        original, crop, target = self.original_size or pixels, self.crop, self.target_size or pixels
        score = self.aesthetic_score
        if not is_cond:
            original, crop = self.negative_original_size or original, self.negative_crop or crop
            target, score = self.negative_target_size or target, self.negative_aesthetic_score
        return [*original, *crop, *((score,) if has_score else target)]


def concatenate(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Join the prompts of conditionings with the same number of chunks, in order."""
    if any(c.v_context is not None for c in conditionings):  # if one has it, all need it
        conditionings = [replace(c, v_context=c.context) if c.v_context is None else c for c in conditionings]
    rows: list[PromptRow] = []
    prompts = 0
    for c in conditionings:
        rows += [replace(row, prompt=row.prompt + prompts) for row in c.rows]
        prompts += len(c)
    arrays = {name: mx.concatenate([getattr(c, name) for c in conditionings]) for name in conditionings[0].arrays()}
    return replace(conditionings[0], rows=tuple(rows), **arrays)


def same_length(conditionings: Sequence[Conditioning], empty: Callable[[], mx.array]) -> list[Conditioning]:
    """Pad all to the length of the longest with ``empty()``, an encoded empty prompt [1, 77, C]."""
    length = max(c.context.shape[1] for c in conditionings)

    def lengthen(c: Conditioning) -> Conditioning:
        rows, missing = len(c.rows), length - c.context.shape[1]
        if missing == 0:
            return c
        filling = empty().astype(c.context.dtype)
        filling = mx.tile(filling, (rows, missing // filling.shape[1], 1))
        prompts = {name: array for name, array in c.arrays().items() if name in ("context", "v_context")}
        return replace(c, **{name: mx.concatenate([array, filling], axis=1) for name, array in prompts.items()})

    return list(map(lengthen, conditionings))


class ReadingKeywords(TypedDict, total=False):
    """List the keyword arguments of :func:`encode` for reading prompts."""

    clip_skip: int
    emphasis: str
    truncate: bool
    weight_blocks: bool


def encode(
    texts: str | Sequence[str],
    encoders: Encoders,
    *,
    xl: bool,
    texts_2: str | Sequence[str] | None = None,
    clip_skip: int = 0,
    emphasis: str = "mean",
    truncate: bool = False,
    weight_blocks: bool = False,
) -> Conditioning:
    """Encode prompts with every text encoder: one row for each part of each prompt, with context [r, 77 * chunks, C].

    Each encoder runs once on every different prompt, so that no encoding depends on the other prompts. The empty
    prompt pads prompts with fewer chunks. For XL each row also has the pooled vector of its first chunk.

    Args:
        texts: a prompt or several, in the language of ``prompt.py``.
        texts_2: prompts for the second text encoder, one for all or one for each of ``texts``. Default: the same.
        xl: use the penultimate states, not normalised, as XL was trained.
        clip_skip: number of final text encoder layers to skip.
        emphasis: the effect of weights. "mean" multiplies the encoded tokens and restores their mean. "values" scales
            the attention values (V) of the tokens; negative weights subtract them. "none" reads all signs of the prompt
            language as text.
        truncate: keep only the first chunk; the log shows the omitted text.
        weight_blocks: read each text as blocks with a weight after a colon, which are encoded separately and averaged.

    Raises ValueError for an empty list, options out of range, blocks whose weights sum to zero, and a wrong number of
    second prompts.
    """
    texts = [texts] if isinstance(texts, str) else texts
    pairs = enumerate(zip(texts, _seconds(texts_2, len(texts), len(encoders)), strict=True))
    read = [(n, part) for n, (text, second) in pairs for part in parts(text, emphasis, weight_blocks, text_2=second)]
    if not read:
        raise ValueError("the prompt is missing; give one, it may be empty")
    if truncate or _log.isEnabledFor(logging.INFO):
        _log_chunks(encoders[0][0], [part for _, part in read], truncate)
    encoded = cache(lambda texts: _encode_pieces(texts, encoders, xl, clip_skip, emphasis, truncate))
    rows = same_length([encoded(part.of_encoders) for _, part in read], lambda: encoded(((Piece(""),),) * 2).context)
    table = replace(concatenate(rows), rows=tuple(PromptRow(n, part.weight, part.spans) for n, part in read))
    if not weight_blocks:
        return table
    shares = [[row.weight if row.prompt == n else 0.0 for row in table.rows] for n in range(len(texts))]
    means = table.map(lambda array: mx.tensordot(mx.array(shares, dtype=array.dtype), array, axes=1))
    return replace(means, rows=tuple(map(PromptRow, range(len(texts)))))


def _seconds(texts_2: str | Sequence[str] | None, texts: int, encoders: int) -> Sequence[str | None]:
    """Return the second encoder's text for each of ``texts`` prompts."""
    if texts_2 is not None and encoders != 2:
        raise ValueError("prompt_2 and negative_prompt_2 need a model with two text encoders, such as SDXL; omit them")
    if texts_2 is None or isinstance(texts_2, str):
        return [texts_2] * texts
    if len(texts_2) != texts:
        raise ValueError(f"{len(texts_2)} prompts of the second encoder for {texts}; give one, or one for each")
    return texts_2


def count_chunks(text: str, tokenizer: Tokenizer, text_2: str | None = None, **reading: Unpack[ReadingKeywords]) -> int:
    """Count the chunks of 75 tokens of a prompt; the keywords are those of ``encode``."""
    read = parts(text, reading.get("emphasis", "mean"), reading.get("weight_blocks", False), text_2=text_2)
    texts = {pieces for part in read for pieces in part.of_encoders}
    return 1 if reading.get("truncate") else max(len(_chunks(tokenizer, pieces)) for pieces in texts)


def _chunks(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[list[tuple[int, float]]]:
    """Return (token, weight) of a prompt, in chunks of the most tokens between start and end."""
    chunks: list[list[tuple[int, float]]] = [[]]
    for piece in pieces:
        if piece.text is None:
            chunks.append([])
            continue
        for id_ in tokenizer.encode(piece.text):
            if len(chunks[-1]) == tokenizer.max_length - 2:
                chunks.append([])
            chunks[-1].append((id_, piece.weight))
    return chunks


def _log_chunks(tokenizer: Tokenizer, read: Sequence[Part], truncate: bool) -> None:
    for pieces in (pieces for part in read for pieces in dict.fromkeys(part.of_encoders)):
        first, *others = chunks = _chunks(tokenizer, pieces)
        if truncate and others:
            text = tokenizer.decode(id_ for chunk in others for id_, _ in chunk)
            _log.warning("the prompt is too long; this part of it is ignored: %r", text)
        shown = [first] if truncate else chunks
        for number, chunk in enumerate(shown, start=1):
            words = (tokenizer.decode([id_]) + ("" if weight == 1 else f":{weight:.3g}") for id_, weight in chunk)
            _log.info("prompt, chunk %d of %d, %d tokens: %s", number, len(shown), len(chunk), " | ".join(words))


def _encode_pieces(
    texts: Sequence[tuple[Piece, ...]], encoders: Encoders, xl: bool, clip_skip: int, emphasis: str, truncate: bool
) -> Conditioning:
    """Encode one prompt, in ``texts`` for each encoder: context [1, 77 * chunks, C] and XL's pooled vector [1, P].

    Empty chunks pad the shorter text.
    """
    states, weighted, pooled = [], [], None
    read = [_chunks(tokenizer, pieces) for (tokenizer, _), pieces in zip(encoders, texts, strict=False)]
    length = 1 if truncate else max(map(len, read))
    for (tokenizer, encoder), chunks in zip(encoders, read, strict=True):
        start, end, pad = ((id_, 1.0) for id_ in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id))
        chunks = [*chunks, *[[]] * (length - len(chunks))][:length]
        rows = [[start, *chunk, end] + [pad] * (tokenizer.max_length - 2 - len(chunk)) for chunk in chunks]
        output = encoder(mx.array([[id_ for id_, _ in row] for row in rows]))
        if not 0 <= clip_skip <= len(output.hidden_states) - 2:
            raise ValueError(f"clip_skip {clip_skip} is outside 0 ... {len(output.hidden_states) - 2}")
        if xl:
            state, pooled = output.hidden_states[-2 - clip_skip], output.pooled_output[:1]
        elif clip_skip:
            state = encoder.text_model.final_layer_norm(output.hidden_states[-1 - clip_skip])
        else:
            state = output.last_hidden_state
        states.append(state)
        weights = mx.array([[weight for _, weight in row] for row in rows])
        weighted.append(_emphasise(state, weights, restore_mean=emphasis == "mean"))
    context, emphasised = (mx.concatenate(x, axis=-1).flatten(0, 1)[None] for x in (states, weighted))
    if all(piece.weight == 1 for pieces in texts for piece in pieces):
        return Conditioning(context, pooled)
    if emphasis == "values":
        return Conditioning(context, pooled, v_context=emphasised)
    return Conditioning(emphasised, pooled)


def _emphasise(state: mx.array, weights: mx.array, restore_mean: bool) -> mx.array:
    """Multiply the state of each token [n, 77, C] by its weight [n, 77].

    ``restore_mean`` then scales each chunk back to its original mean, as AUTOMATIC1111's web UI does.
    """
    weighted = state * weights[..., None].astype(state.dtype)
    if not restore_mean:
        return weighted
    before, after = (s.astype(mx.float32).mean(axis=(1, 2), keepdims=True) for s in (state, weighted))
    return weighted * (before / after).astype(state.dtype)

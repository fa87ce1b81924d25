"""Encode prompts with CLIP: chunks of tokens, emphasis, several prompts, SDXL's sizes."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import mlx.core as mx

from ..models.clip import CLIPTextModel
from .prompt import Part, Piece, blocks, parts
from .tokenizer import Tokenizer

_log = logging.getLogger("stable_diffusion")

EMPHASES = ("mean", "values", "none")

Encoders = Sequence[tuple[Tokenizer, CLIPTextModel]]
_Chunk = list[tuple[int, float]]  # (token id, weight)


@dataclass(frozen=True)
class PromptRow:
    """Describe a row of a conditioning: its prompt, its weight, and the part of a run (0 ... 1) in which it counts."""

    prompt: int = 0
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Conditioning:
    """Hold encoded prompts: tables with a row for each prompt, or several rows where a prompt has parts.

    Attributes:
        context: [r, M, C] the encoded prompt, M = 77 for each chunk of it.
        pooled: [r, P] the prompt as one vector; XL only.
        time_ids: [r, 6 or 5] the size conditioning; XL only.
        guidance: [r, G] the embedded guidance scale; LCM only.
        v_context: [r, M, C] takes the place of ``context`` for the values of cross-attention.
        channels: [r, h, w, C] beside those of the latent, for checkpoints that work from images.
        rows: describes each row.
    """

    context: mx.array
    pooled: mx.array | None = None
    time_ids: mx.array | None = None
    guidance: mx.array | None = None
    v_context: mx.array | None = None
    channels: mx.array | None = None
    rows: tuple[PromptRow, ...] = (PromptRow(),)

    def arrays(self) -> dict[str, mx.array]:
        """Return the arrays that are present, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, mx.array)}

    def map(self, function: Callable[[mx.array], mx.array]) -> "Conditioning":
        """Apply ``function`` to every array that is present."""
        return replace(self, **{name: function(array) for name, array in self.arrays().items()})

    def select(self, prompts: slice) -> "Conditioning":
        """Return a conditioning of some of the prompts."""
        numbers = range(len(self))[prompts]
        places = [i for i, row in enumerate(self.rows) if row.prompt in numbers]
        rows = tuple(replace(self.rows[i], prompt=numbers.index(self.rows[i].prompt)) for i in places)
        return replace(self.map(lambda array: array[mx.array(places)]), rows=rows)

    def with_channels(self, channels: mx.array) -> "Conditioning":
        """Return the conditioning with ``channels`` [1, h, w, C] for every row."""
        return replace(self, channels=mx.repeat(channels, len(self.rows), axis=0))

    def __len__(self) -> int:
        return 1 + self.rows[-1].prompt


@dataclass(frozen=True)
class SizeConditioning:
    """Describe the picture that SDXL pretends to draw (Podell et al. 2023, sec. 2.2). Sizes are (height, width).

    Attributes:
        original_size: of the training picture before resizing. None stands for the size of the result.
        crop: (top, left) of the cut.
        target_size: that it was resized to. None stands for the size of the result.
        aesthetic_score, negative_aesthetic_score: of the refiner, in place of the target size.
    """

    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5


def with_sizes(
    conditioning: Conditioning, pixels: tuple[int, int], sizes: SizeConditioning, score: float | None
) -> Conditioning:
    """Add XL's time ids for a picture of ``pixels`` (height, width); with an aesthetic ``score``, the refiner's."""
    last = (sizes.target_size or pixels) if score is None else (score,)
    ids = [[*(sizes.original_size or pixels), *sizes.crop, *last]] * len(conditioning.rows)
    return replace(conditioning, time_ids=mx.array(ids, dtype=mx.float32))


def concatenate(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Join the prompts of conditionings that have the same number of chunks, in order."""
    if any(c.v_context is not None for c in conditionings):  # where one has it, all need it
        conditionings = [replace(c, v_context=c.context) if c.v_context is None else c for c in conditionings]
    rows: list[PromptRow] = []
    prompts = 0
    for c in conditionings:
        rows += [replace(row, prompt=row.prompt + prompts) for row in c.rows]
        prompts += len(c)
    arrays = {name: mx.concatenate([getattr(c, name) for c in conditionings]) for name in conditionings[0].arrays()}
    return replace(conditionings[0], rows=tuple(rows), **arrays)


def same_length(conditionings: Sequence[Conditioning], empty: Callable[[], mx.array]) -> list[Conditioning]:
    """Lengthen all to the chunks of the longest with ``empty()``, an encoded empty prompt [1, 77, C]."""
    length = max(c.context.shape[1] for c in conditionings)
    if all(c.context.shape[1] == length for c in conditionings):
        return list(conditionings)
    filling = empty()

    def lengthen(a: mx.array | None) -> mx.array | None:
        if a is None:
            return None
        chunks = (length - a.shape[1]) // filling.shape[1]
        return mx.concatenate([a, mx.tile(filling.astype(a.dtype), (len(a), chunks, 1))], axis=1)

    return [replace(c, context=lengthen(c.context), v_context=lengthen(c.v_context)) for c in conditionings]


class ReadingKeywords(TypedDict, total=False):
    """Describe the keywords of :func:`encode` that say how prompts are read."""

    clip_skip: int
    emphasis: str
    truncate: bool
    weight_blocks: bool


def encode(
    texts: str | Sequence[str],
    encoders: Encoders,
    *,
    xl: bool,
    clip_skip: int = 0,
    emphasis: str = "mean",
    truncate: bool = False,
    weight_blocks: bool = False,
) -> Conditioning:
    """Encode prompts with every text encoder: a row for each part of each prompt, with context [r, 77 * chunks, C].

    Each encoder runs once on every different prompt. The empty prompt pads those that have fewer chunks than others.
    For XL each row also has the pooled vector of its first chunk.

    Args:
        texts: a prompt or several, in the language of ``prompt.py``.
        xl: take the states below the last one, not normalised, as XL was trained on.
        clip_skip: how many of the encoders' last layers to leave out.
        emphasis: how weights act. "mean" multiplies the encoded tokens and restores their mean; "values" multiplies
            what cross-attention takes from the tokens, so that negative weights take it away; "none" reads all signs of
            the prompt language as text.
        truncate: keep the first chunk only; the log shows what is left out.
        weight_blocks: read each text as blocks with a weight behind a colon, encoded by themselves and averaged.

    Raises ValueError for no texts, for options out of range, and for blocks whose weights sum to zero.
    """
    texts = [texts] if isinstance(texts, str) else texts
    numbered = [(n, part) for n, text in enumerate(texts) for part in _parts(text, emphasis, weight_blocks)]
    pieces = [part.pieces for _, part in numbered]
    contexts, v_contexts, pooled = [], [], None
    for tokenizer, encoder in encoders:
        chunked = _chunk_rows(tokenizer, pieces, truncate, log=not contexts)  # the second reads the same tokens
        state, pooled = _run(tokenizer, encoder, chunked, xl, clip_skip)
        weighted = _emphasise(state, chunked, restore_mean=emphasis == "mean")
        contexts.append(state if emphasis == "values" else weighted)
        v_contexts.append(weighted)
    separate = emphasis == "values" and any(piece.weight != 1 for row in pieces for piece in row)
    table = Conditioning(
        mx.concatenate(contexts, axis=-1).flatten(1, 2),
        pooled,
        v_context=mx.concatenate(v_contexts, axis=-1).flatten(1, 2) if separate else None,
        rows=tuple(PromptRow(n, part.weight, part.start, part.end) for n, part in numbered),
    )
    return _average(table) if weight_blocks else table


def count_chunks(
    text: str,
    tokenizer: Tokenizer,
    *,
    clip_skip: int = 0,
    emphasis: str = "mean",
    truncate: bool = False,
    weight_blocks: bool = False,
) -> int:
    """Return the number of chunks of 75 tokens that a prompt is encoded in; the keywords are those of ``encode``."""
    lengths = [len(_chunks(tokenizer, part.pieces)) for part in _parts(text, emphasis, weight_blocks)]
    return 1 if truncate else max(lengths)


def _parts(text: str, emphasis: str, weight_blocks: bool) -> list[Part]:
    """Read a prompt; the weights of blocks are shares of their sum."""
    if emphasis not in EMPHASES:
        raise ValueError(f"emphasis {emphasis!r} is unknown; choose one of {', '.join(EMPHASES)}")
    if weight_blocks:
        pieces = blocks(text)
        total = sum(piece.weight for piece in pieces)
        if abs(total) < 1e-6:
            raise ValueError(f"the weights of the blocks sum to {total:g}; their mean needs another sum")
        return [Part((Piece(piece.text),), piece.weight / total) for piece in pieces]
    return [Part((Piece(text),))] if emphasis == "none" else parts(text)


def _chunks(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[_Chunk]:
    """Return (token, weight) of a prompt, in chunks as long as the encoder can read between start and end."""
    room = tokenizer.max_length - 2
    chunks: list[_Chunk] = [[]]
    for piece in pieces:
        if piece.text is None:
            chunks.append([])
            continue
        for id_ in tokenizer.encode(piece.text):
            if len(chunks[-1]) == room:
                chunks.append([])
            chunks[-1].append((id_, piece.weight))
    return chunks


def _chunk_rows(tokenizer: Tokenizer, rows: Sequence[Sequence[Piece]], truncate: bool, log: bool) -> list[list[_Chunk]]:
    """Split each row into chunks, of which only the first counts with ``truncate``."""
    if not rows:
        raise ValueError("there is no prompt; give one, which may be empty")
    chunked = [_chunks(tokenizer, pieces) for pieces in rows]
    for chunks in chunked if log else ():
        _log_chunks(tokenizer, chunks, truncate)
    return [chunks[:1] for chunks in chunked] if truncate else chunked


def _log_chunks(tokenizer: Tokenizer, chunks: list[_Chunk], truncate: bool) -> None:
    """Log how a prompt was read, its chunks and tokens with the weights that are not 1, and what was cut off."""
    cut = chunks[1:] if truncate else []
    if cut:
        text = tokenizer.decode(id_ for chunk in cut for id_, _ in chunk)
        _log.warning("the prompt is too long; this part of it is ignored: %r", text)
    if not _log.isEnabledFor(logging.INFO):
        return
    count = len(chunks) - len(cut)
    for number, chunk in enumerate(chunks[:count], start=1):
        words = (tokenizer.decode([id_]) + ("" if weight == 1 else f":{weight:.3g}") for id_, weight in chunk)
        _log.info("prompt, chunk %d of %d, %d tokens: %s", number, count, len(chunk), " | ".join(words))


def _run(
    tokenizer: Tokenizer, encoder: CLIPTextModel, chunked: list[list[_Chunk]], xl: bool, clip_skip: int
) -> tuple[mx.array, mx.array | None]:
    """Run a text encoder once on every different prompt: states [r, n, 77, C] and XL's pooled vectors [r, P].

    Prompts are not batched together: how one is rounded would depend on the others.
    """
    rows = [tuple(_window(tokenizer, chunk) for chunk in chunks) for chunks in chunked]
    empty, length = (_window(tokenizer, []),), max(map(len, rows))
    read = [*rows, empty] if any(len(row) < length for row in rows) else rows
    outputs = {row: _read(encoder, row, xl, clip_skip) for row in dict.fromkeys(read)}
    states = [[outputs[ids][0] for ids in (row, *[empty] * (length - len(row)))] for row in rows]
    pooled = mx.concatenate([outputs[row][1] for row in rows]) if xl else None
    return mx.stack([mx.concatenate(state) for state in states]), pooled


def _read(
    encoder: CLIPTextModel, windows: Sequence[tuple[int, ...]], xl: bool, clip_skip: int
) -> tuple[mx.array, mx.array | None]:
    """Run a text encoder on the windows of a prompt: states [n, 77, C] and XL's pooled vector [1, P] of the first."""
    output = encoder(mx.array(windows))
    if not 0 <= clip_skip <= len(output.hidden_states) - 2:
        raise ValueError(f"clip_skip {clip_skip} is outside 0 ... {len(output.hidden_states) - 2}")
    if xl:
        return output.hidden_states[-2 - clip_skip], output.pooled_output[:1]
    if clip_skip:
        return encoder.normalise(output.hidden_states[-1 - clip_skip]), None
    return output.last_hidden_state, None


def _window(tokenizer: Tokenizer, chunk: _Chunk) -> tuple[int, ...]:
    ids = (tokenizer.bos_id, *(id_ for id_, _ in chunk), tokenizer.eos_id)
    return ids + (tokenizer.pad_id,) * (tokenizer.max_length - len(ids))


def _emphasise(states: mx.array, chunked: list[list[_Chunk]], restore_mean: bool) -> mx.array:
    """Multiply each token's state [r, n, 77, C] by its weight; start, end and padding weigh 1.

    ``restore_mean`` then scales each chunk back to the mean it had, as AUTOMATIC1111's web UI does.
    """
    if all(weight == 1 for chunks in chunked for chunk in chunks for _, weight in chunk):
        return states
    length = states.shape[1]
    chunked = [chunks + [[]] * (length - len(chunks)) for chunks in chunked]
    weights = [[[1.0, *(w for _, w in chunk)] for chunk in chunks] for chunks in chunked]
    factors = mx.array([[w + [1.0] * (states.shape[2] - len(w)) for w in row] for row in weights])[..., None]
    weighted = states * factors.astype(states.dtype)
    if not restore_mean:
        return weighted
    before, after = (s.astype(mx.float32).mean(axis=(2, 3), keepdims=True) for s in (states, weighted))
    return weighted * (before / after).astype(states.dtype)


def _average(table: Conditioning) -> Conditioning:
    """Sum up the rows of each prompt, each times its weight."""
    prompts = range(len(table))
    weights = mx.array([[row.weight if row.prompt == prompt else 0.0 for row in table.rows] for prompt in prompts])
    means = table.map(lambda a: mx.tensordot(weights.astype(a.dtype), a, axes=1))
    return replace(means, rows=tuple(map(PromptRow, prompts)))

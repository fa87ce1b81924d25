"""From prompts to what the UNet is told: chunks of tokens, emphasis, several prompts, SDXL's sizes."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from ..models.clip import CLIPTextModel
from .prompt import Piece, blocks, parts, pieces
from .tokenizer import Tokenizer

_log = logging.getLogger("stable_diffusion")

EMPHASES = ("mean", "values", "none")

Encoders = Sequence[tuple[Tokenizer, CLIPTextModel]]


@dataclass(frozen=True)
class Row:
    """Which prompt a row of a conditioning belongs to, with what weight, and from where to where in a run (0 ... 1)."""

    prompt: int = 0
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told besides the latent: a table with a row for each prompt, or several where it has parts.

    ``context`` [r, M, C] is the encoded prompt, M = 77 for each chunk of it; ``values`` [r, M, C] takes its place as
    the values of cross-attention where emphasis asks for that. XL adds ``pooled`` [r, P], the prompt as one vector, and
    ``time_ids`` [r, 6 or 5], the sizes that the picture pretends to have. LCM adds ``guidance`` [r, G], the embedded
    guidance scale. Checkpoints that work from images take more ``channels`` [r, h, w, C] beside those of the latent.
    ``rows`` says what each row is for; its length is the number of prompts.
    """

    context: mx.array
    pooled: mx.array | None = None
    time_ids: mx.array | None = None
    guidance: mx.array | None = None
    values: mx.array | None = None
    channels: mx.array | None = None
    rows: tuple[Row, ...] = (Row(),)

    def map(self, function: Callable[[mx.array], mx.array]) -> "Conditioning":
        """Apply ``function`` to every array that is present."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, mx.array)}
        return replace(self, **{name: function(value) for name, value in arrays.items()})

    def __len__(self) -> int:
        return 1 + self.rows[-1].prompt


@dataclass(frozen=True)
class MicroConditioning:
    """What SDXL is told about the picture beside the prompt (Podell et al. 2023, sec. 2.2). Sizes are (height, width).

    ``original_size`` is the size that the training picture would have had before resizing, ``crop`` (top, left) where
    it would have been cut, ``target_size`` what it was resized to; None stands for the size of the result. The refiner
    takes aesthetic scores in place of the target size.
    """

    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5


def with_sizes(
    conditioning: Conditioning, pixels: tuple[int, int], micro: MicroConditioning, score: float | None
) -> Conditioning:
    """Add XL's time ids for a picture of ``pixels`` (height, width); with an aesthetic ``score``, the refiner's."""
    last = (micro.target_size or pixels) if score is None else (score,)
    ids = [[*(micro.original_size or pixels), *micro.crop, *last]] * len(conditioning.rows)
    return replace(conditioning, time_ids=mx.array(ids, dtype=mx.float32))


def concatenate(conditionings: Sequence[Conditioning]) -> Conditioning:
    """The prompts of all conditionings, which have the same number of chunks, in order."""
    if any(c.values is not None for c in conditionings):  # where one has values of its own, all need some
        conditionings = [c if c.values is not None else replace(c, values=c.context) for c in conditionings]
    first, before, rows = conditionings[0], 0, []
    for c in conditionings:
        rows += [replace(row, prompt=row.prompt + before) for row in c.rows]
        before += len(c)
    names = [name for name, value in vars(first).items() if isinstance(value, mx.array)]
    arrays = {name: mx.concatenate([getattr(c, name) for c in conditionings]) for name in names}
    return replace(first, rows=tuple(rows), **arrays)


def _pad(conditioning: Conditioning, length: int, empty: mx.array) -> Conditioning:
    """Lengthen the context to ``length`` positions with chunks that say nothing, ``empty`` [1, 77, C]."""
    missing = length - conditioning.context.shape[1]
    if missing <= 0:
        return conditioning
    filling = mx.tile(empty, (len(conditioning.rows), missing // empty.shape[1], 1))

    def lengthen(a: mx.array) -> mx.array:
        return mx.concatenate([a, filling.astype(a.dtype)], axis=1)

    values = None if conditioning.values is None else lengthen(conditioning.values)
    return replace(conditioning, context=lengthen(conditioning.context), values=values)


def encode(
    text: str,
    encoders: Encoders,
    *,
    xl: bool,
    clip_skip: int = 0,
    emphasis: str = "mean",
    truncate: bool = False,
    weight_blocks: bool = False,
) -> Conditioning:
    """Encode one prompt with every encoder: a row for each of its parts, with context [r, 77 * chunks, C].

    For XL each row also has the pooled vector of its first chunk.

    Args:
        text: in the language of ``prompt.py``.
        xl: take the states below the last one, not normalised, as XL was trained on.
        clip_skip: how many of the encoders' last layers to leave out.
        emphasis: how weights act. "mean" multiplies the encoded tokens and restores their mean; "values" multiplies
            what cross-attention takes from the tokens, so that negative weights take it away; "none" reads all signs of
            the prompt language as text.
        truncate: keep the first chunk only; the log says what is left out.
        weight_blocks: read the text as blocks, each with a weight behind a colon, that are encoded on their own and
            averaged.

    Raises ValueError for options out of range, and for blocks whose weights sum to zero.
    """
    if emphasis not in EMPHASES:
        raise ValueError(f"emphasis {emphasis!r} is unknown; choose one of {', '.join(EMPHASES)}")
    if not weight_blocks:
        if emphasis == "none":
            return _encode([Piece(text)], encoders, xl, clip_skip, emphasis, truncate)
        together = parts(text)
        encoded = [_encode(pieces(part.text), encoders, xl, clip_skip, emphasis, truncate) for part in together]
        table = concatenate(_same_length(encoded, encoders, xl, clip_skip))
        return replace(table, rows=tuple(Row(0, part.weight, part.start, part.end) for part in together))
    found = blocks(text)
    total = sum(block.weight for block in found)
    if abs(total) < 1e-6:
        raise ValueError(f"the weights of the blocks sum to {total:g}; their mean needs another sum")
    encoded = [_encode([Piece(block.text)], encoders, xl, clip_skip, "none", truncate) for block in found]
    weights = mx.array([block.weight / total for block in found])
    table = concatenate(_same_length(encoded, encoders, xl, clip_skip))
    mean = table.map(lambda a: mx.einsum("b,b...->...", weights.astype(a.dtype), a)[None])
    return replace(mean, rows=(Row(),))


def same_length(conditionings: Sequence[Conditioning], empty: Callable[[], mx.array]) -> list[Conditioning]:
    """The same with as many chunks as the longest of them has; ``empty()`` is one that says nothing, [1, 77, C]."""
    lengths = {c.context.shape[1] for c in conditionings}
    if len(lengths) == 1:
        return list(conditionings)
    filling = empty()
    return [_pad(c, max(lengths), filling) for c in conditionings]


def _same_length(encoded: Sequence[Conditioning], encoders: Encoders, xl: bool, clip_skip: int) -> list[Conditioning]:
    return same_length(encoded, lambda: _encode([Piece("")], encoders, xl, clip_skip, "none", True).context)


def _encode(
    text: Sequence[Piece], encoders: Encoders, xl: bool, clip_skip: int, emphasis: str, truncate: bool
) -> Conditioning:
    contexts: list[mx.array] = []
    values: list[mx.array] = []
    pooled = None
    for tokenizer, encoder in encoders:
        chunks = _chunks(tokenizer, text)
        kept = chunks[:1] if truncate else chunks
        if not contexts:  # the encoders read the same tokens: it is enough to say it of the first
            _tell(tokenizer, kept, chunks[len(kept) :])
        chunks = kept
        output = encoder(mx.array([_window(tokenizer, [id_ for id_, _ in chunk]) for chunk in chunks]))
        if not 0 <= clip_skip <= len(output.hidden_states) - 2:
            raise ValueError(f"clip_skip {clip_skip} is outside 0 ... {len(output.hidden_states) - 2}")
        if xl:
            state, pooled = output.hidden_states[-2 - clip_skip], output.pooled_output[:1]
        elif clip_skip:
            state = encoder.normalise(output.hidden_states[-1 - clip_skip])
        else:
            state = output.last_hidden_state
        weighted = _emphasise(state, [[w for _, w in chunk] for chunk in chunks], restore_mean=emphasis == "mean")
        contexts.append((state if emphasis == "values" else weighted).reshape(1, -1, state.shape[-1]))
        values.append(weighted.reshape(1, -1, state.shape[-1]))
    context = mx.concatenate(contexts, axis=-1)
    plain = emphasis != "values" or all(piece.weight == 1 for piece in text)
    return Conditioning(context, pooled, values=None if plain else mx.concatenate(values, axis=-1))


def _chunks(tokenizer: Tokenizer, text: Sequence[Piece]) -> list[list[tuple[int, float]]]:
    """(token, weight) of a prompt, in chunks as long as the encoder can read between start and end."""
    room = tokenizer.max_length - 2
    chunks: list[list[tuple[int, float]]] = [[]]
    for piece in text:
        if piece.text is None:
            chunks.append([])
            continue
        for id_ in tokenizer.encode(piece.text):
            if len(chunks[-1]) == room:
                chunks.append([])
            chunks[-1].append((id_, piece.weight))
    return chunks


def _tell(tokenizer: Tokenizer, chunks: list[list[tuple[int, float]]], cut: list[list[tuple[int, float]]]) -> None:
    """Log how a prompt was read, its chunks and tokens with the weights that are not 1, and what was cut off."""
    if cut:
        text = tokenizer.decode(id_ for chunk in cut for id_, _ in chunk)
        _log.warning("the prompt is too long; this part of it is ignored: %r", text)
    if not _log.isEnabledFor(logging.INFO):
        return
    for number, chunk in enumerate(chunks, start=1):
        words = (tokenizer.decode([id_]) + ("" if weight == 1 else f":{weight:.3g}") for id_, weight in chunk)
        _log.info("prompt, chunk %d of %d, %d tokens: %s", number, len(chunks), len(chunk), " | ".join(words))


def _window(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    window = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    return window + [tokenizer.pad_id] * (tokenizer.max_length - len(window))


def _emphasise(states: mx.array, weights: list[list[float]], restore_mean: bool) -> mx.array:
    """Multiply each token's state by its weight; start, end and padding weigh 1.

    ``restore_mean`` then scales each chunk back to the mean it had, as AUTOMATIC1111's web UI does.
    """
    if all(w == 1 for chunk in weights for w in chunk):
        return states
    length = states.shape[1]
    factors = mx.array([[1.0, *chunk, *[1.0] * (length - 1 - len(chunk))] for chunk in weights])[:, :, None]
    weighted = states * factors.astype(states.dtype)
    if not restore_mean:
        return weighted
    before, after = (s.astype(mx.float32).mean(axis=(1, 2), keepdims=True) for s in (states, weighted))
    return weighted * (before / after).astype(states.dtype)

"""Read and write textual inversion files (Gal et al. 2023): vectors for a new word, for one encoder or XL's two."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from ..files.whole import new_file
from ..models.config import listed
from .files import read_file
from .formats.safetensors import write_safetensors
from .layout import check_suffix

_XL_KEYS = ("clip_l", "clip_g")


def read_embedding(path: str | os.PathLike) -> tuple[tuple[str, ...], tuple[mx.array, ...]]:
    """Read the words of an embedding file, and its vectors [n, C] for each text encoder (XL: CLIP-L, OpenCLIP-G).

    Reads .safetensors, .pt and .bin as they are written by AUTOMATIC1111's web UI ("emb_params"; "string_to_param" and
    "name"), by diffusers (the word is the name of the tensor) and by trainers for XL ("clip_l", "clip_g"). The words
    are the one in the file or its header, if it has one, and the file's name.

    Raises ValueError, one line with the path, for any other file.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise ValueError(f"there is no embedding at {path}; check the path")
    check_suffix(path)
    tensors, texts = read_file(path)
    key = next(iter(tensors), "")
    named = texts.get("name") if key == "*" else key if len(tensors) == 1 and key != "emb_params" else None
    named = named or texts.get("modelspec.trigger_phrase")
    words = dict.fromkeys(word for word in (named, path.stem) if word and word != "*")
    return tuple(words), vectors_of(tensors, str(path))


def write_embedding(
    path: Path, word: str, vectors: Sequence[mx.array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the vectors [n, C] of a word, for one text encoder or XL's two. The file appears complete or not at all.

    The tensor has the name of the word, as in diffusers and the web UIs; XL's are "clip_l" and "clip_g".
    """
    names = (word,) if len(vectors) == 1 else _XL_KEYS
    tensors = dict(zip(names, vectors, strict=True))
    with new_file(path) as partial:
        write_safetensors(partial, list(tensors), tensors, metadata)


def vectors_of(tensors: Mapping[str, mx.array], where: str) -> tuple[mx.array, ...]:
    """Return the vectors in the tensors of an embedding. Raises ValueError, with ``where``, for other tensors."""
    if all(key in tensors for key in _XL_KEYS):
        vectors = [tensors[key] for key in _XL_KEYS]
    elif len(tensors) == 1:
        vectors = list(tensors.values())
    else:
        held = listed(sorted(tensors)) or "no tensors"
        raise ValueError(f"{where} is not an embedding: it holds {held}; give a textual inversion file")
    vectors = [v[None] if v.ndim == 1 else v for v in vectors]
    if any(v.ndim != 2 or len(v) < 1 for v in vectors) or len({len(v) for v in vectors}) != 1:
        shapes = listed(v.shape for v in vectors)
        raise ValueError(f"{where} is not an embedding: its vectors have the shapes {shapes}; they must be [n, width]")
    vectors = [v.astype(mx.float32) for v in vectors]
    mx.eval(vectors)  # they are small, and the file may change before they are used
    return tuple(vectors)

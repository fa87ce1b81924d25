"""Textual inversion files (Gal et al. 2023): vectors for a new word, of one text encoder or of XL's two."""

import os
from pathlib import Path
from typing import Any

import mlx.core as mx

from .files import Component, read_tensors
from .formats.pickles import load_pickle
from .layout import PICKLES

_XL_KEYS = ("clip_l", "clip_g")


def read_embedding(path: str | os.PathLike) -> tuple[str, tuple[mx.array, ...]]:
    """The word that a file is for, and its vectors [n, C] for each text encoder it knows (XL: CLIP-L, OpenCLIP-G).

    Reads .safetensors, .pt and .bin as they are written by AUTOMATIC1111's web UI ("emb_params"; "string_to_param" and
    "name"), by diffusers (the word is the name of the tensor) and by trainers for XL ("clip_l", "clip_g"). The word is
    the file's name where the file does not say it. Raises ValueError for anything else, one line with the path.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no embedding at {path}; check the path")
    word, tensors = _contents(path)
    if all(key in tensors for key in _XL_KEYS):
        vectors, name = [tensors[key] for key in _XL_KEYS], path.stem
    elif len(tensors) == 1:
        ((key, value),) = tensors.items()
        vectors, name = [value], path.stem if key == "emb_params" else key
    else:
        raise ValueError(f"{path} is not an embedding: it holds {', '.join(sorted(tensors)[:4]) or 'no tensors'}")
    vectors = [v[None] if v.ndim == 1 else v for v in vectors]
    if any(v.ndim != 2 or len(v) < 1 for v in vectors) or len({len(v) for v in vectors}) != 1:
        raise ValueError(f"{path} is not an embedding: its shapes are {', '.join(str(v.shape) for v in vectors)}")
    vectors = [v.astype(mx.float32) for v in vectors]
    mx.eval(vectors)  # they are small, and the file may change before a prompt needs them
    return word or name, tuple(vectors)


def _contents(path: Path) -> tuple[str, dict[str, mx.array]]:
    """(the word, "" where the file does not name it beside the vectors; the tensors by name)"""
    if path.suffix == ".safetensors":
        return "", read_tensors(Component("embedding", {}, (path,)))
    if path.suffix not in PICKLES:
        raise ValueError(f"the embedding {path} is neither .safetensors nor one of {', '.join(PICKLES)}")
    saved: Any = load_pickle(path)
    if not isinstance(saved, dict):
        raise ValueError(f"{path} is not an embedding: it holds no tensors with names")
    word = ""
    if isinstance(saved.get("string_to_param"), dict):
        # The web UI's: the one tensor has the name "*", which stands for the word.
        word = saved["name"] if isinstance(saved.get("name"), str) and saved["name"] else path.stem
        saved = saved["string_to_param"]
    return word, {str(key): value for key, value in saved.items() if isinstance(value, mx.array)}

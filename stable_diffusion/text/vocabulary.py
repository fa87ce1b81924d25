"""Read the files of CLIP's tokenizers."""

import json
from collections.abc import Callable, Sequence
from functools import reduce
from operator import index, or_
from pathlib import Path
from typing import Any

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
_ROLES = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}  # where no file says more


def read_vocabulary(folder: Path, pad_token: str | None = None) -> dict[str, Any]:
    """Read the arguments of :class:`Tokenizer` from the files of a checkpoint.

    The special tokens come from special_tokens_map.json, else from tokenizer_config.json. The latter alone counts,
    as in the reference, when it has a table of added tokens. A ``pad_token`` takes the place of theirs.
    Raises ValueError, one line that names the file and the key, for whatever is missing or malformed.
    """
    vocab, merges, added = _read_tables(folder)
    config = _JsonFile(folder / "tokenizer_config.json", optional=True)
    files = [config, _JsonFile(folder / "special_tokens_map.json", optional=True)]
    if "added_tokens_decoder" in config:
        added, files = config.read("added_tokens_decoder", _tokens_by_id), [config]
    special = {role: {token: False} for role, token in _ROLES.items()}
    additional: dict[str, bool] = {}
    for file in files:
        special |= {role: file.read(role, _token) for role in _ROLES if role in file}
        additional = file.read("additional_special_tokens", _tokens, additional)
    if pad_token is not None:
        special["pad_token"] = {pad_token: False}
    for token in (*added, *additional):  # those that are new take the ids after the vocabulary
        vocab.setdefault(token, len(vocab))
    length = config.read("model_max_length", int, 77)
    return {
        "vocab": vocab,
        "merges": merges,
        "pad_token": next(iter(special["pad_token"])),
        "max_length": length if length < 10_000 else 77,  # a huge number means that none was set
        "special_tokens": reduce(or_, (*special.values(), additional, added)),  # of two that name one the last counts
    }


def _read_tables(folder: Path) -> tuple[dict[str, int], list[Sequence[str]], dict[str, bool]]:
    """Read the vocabulary, the merges, and the words added after training -> whether they are normalised."""
    if not (folder / "vocab.json").is_file() and (folder / "tokenizer.json").is_file():
        file = _JsonFile(folder / "tokenizer.json")  # all that transformers 5 writes
        file |= file.read("model", dict, {})
        if file.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= file.keys():
            raise ValueError(f"{file.path} is not a BPE tokenizer; CLIP needs one")
        return file.read("vocab", _ids), file.read("merges", _pairs), file.read("added_tokens", _tokens, {})
    file = _JsonFile(folder / "vocab.json")
    vocab = {token: file.read(token, index) for token in file}
    lines = _read_text(folder / "merges.txt").split("\n")
    merges = _pairs([line for line in lines if line and not line.startswith("#version")])
    file = _JsonFile(folder / "added_tokens.json", optional=True)
    return vocab, merges, dict.fromkeys(sorted(file, key=lambda token: file.read(token, index)), True)


class _JsonFile(dict[str, Any]):
    """Hold the fields of a JSON object that are not empty; errors name the file and the key."""

    def __init__(self, path: Path, optional: bool = False):
        self.path = path
        try:
            content = {} if optional and not path.is_file() else json.loads(_read_text(path))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not readable as JSON ({error}); download it again") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not an object; download it again")
        super().__init__((key, value) for key, value in content.items() if value not in (None, "", [], {}))

    def read(self, key: str, parse: Callable[[Any], Any], default: Any = None) -> Any:
        """Parse a field where it is present."""
        try:
            return parse(self[key]) if key in self else default
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"{self.path}: {key!r} has an unknown shape, {self[key]!r:.60}; download it again"
            ) from None


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is missing; a tokenizer is vocab.json and merges.txt, or tokenizer.json")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable as UTF-8 text ({error}); download it again") from None


def _token(value: str | dict[str, Any]) -> dict[str, bool]:
    """Read a token, a string or the fields of an AddedToken: text -> whether it is looked for after normalisation."""
    if isinstance(value, str):
        return {value: False}
    text = value["content"] + ""  # TypeError for what is no text
    return {text: bool(value.get("normalized", not value.get("special", False)))}


def _tokens(tokens: list[Any]) -> dict[str, bool]:
    if not isinstance(tokens, list):
        raise TypeError(type(tokens))
    return reduce(or_, map(_token, tokens), {})


def _tokens_by_id(table: dict[str, Any]) -> dict[str, bool]:
    return _tokens([table[id_] for id_ in sorted(table, key=int)])


def _ids(table: dict[str, Any]) -> dict[str, int]:
    return {token: index(id_) for token, id_ in table.items()}


def _pairs(merges: list[Any]) -> list[Sequence[str]]:
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]

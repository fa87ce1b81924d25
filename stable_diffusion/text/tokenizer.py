"""Split prompts into the byte-level BPE tokens of CLIP.

    text -> split at special tokens -> NFC, blanks collapsed, lower case -> words -> UTF-8 bytes -> merges -> ids

The ids equal those of the reference, transformers' fast CLIPTokenizer, for all characters of Unicode 15.
References: Radford et al. 2021 (CLIP), Radford et al. 2019 (byte-level BPE), Sennrich et al. 2016 (BPE).
"""

import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import chain, pairwise
from operator import or_
from pathlib import Path
from typing import Any

import regex

from ..files.text import read_json, read_text

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
_ROLES = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}  # unless a file says otherwise
_END_OF_WORD = "</w>"
_LONGEST_MERGE = 512  # bytes: the time of merging grows with their square; a word of 100 kB takes 0.4 s in such runs
_NO_MERGE = (1 << 62, -1)
_LARGEST_ID = 2**31 - 1
_MOST_SPECIAL = 5000  # special tokens: compiling the pattern of 50,000 takes seconds

_BLANKS = regex.compile(r"\s+")
# The reference uses the NFC of Unicode 9, in which later combining marks are ordinary characters.
_COMPOSABLE = regex.compile(
    r"[^\u07fd\u0898-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1ace\u1df6-\u1dfa\ua82c\U00010d24-\U00010f85"
    r"\U00011070\U0001133b\U0001145e\U00011839-\U00011a99\U00011d42-\U00011f42\U00016ff0\U00016ff1\U0001e08f-\U0001e4ef]+"
)
# The reference splits twice: by CLIP's pattern, then by GPT-2's, which does not know the special tokens.
_PART = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
_WORD = regex.compile(rf"{regex.escape(BOS)}|{regex.escape(EOS)}|{_PART.pattern}")

# The printable characters that stand for the bytes in the vocabulary (Radford et al. 2019).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_TO_CHAR = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_CHAR_TO_BYTE = {char: bytes([byte]) for byte, char in _BYTE_TO_CHAR.items()}


class Tokenizer:
    """Split text into the byte-level BPE tokens of CLIP (Radford et al. 2021).

    Args:
        vocab: id of every token; words end in "</w>", bytes are written in the byte alphabet.
        merges: pairs of tokens, or lines with two, in the order in which they were learnt.
        pad_token: padding of a chunk. SD 1 pads with end-of-text, SD 2 and the second tokenizer of SDXL with "!".
        max_length: number of ids in a chunk, start and end included.
        special_tokens: tokens recognised inside a text -> whether they are searched after normalisation
            (then "<|STARTOFTEXT|>" is one too). Default: start, end and pad, as written.

    Attributes: ``vocab``, ``max_length``, and ``bos_id``, ``eos_id``, ``pad_id`` of start, end and padding.
    Raises ValueError when a special token or the product of a merge is not in the vocabulary.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Iterable[str | Sequence[str]],
        *,
        pad_token: str = EOS,
        max_length: int = 77,
        special_tokens: dict[str, bool] | None = None,
    ):
        special_tokens = {BOS: False, EOS: False, pad_token: False} if special_tokens is None else special_tokens
        for token in (BOS, EOS, pad_token, *special_tokens):
            if token not in vocab:
                raise ValueError(f"the special token {token!r} is not in the vocabulary; give a CLIP tokenizer")
        if max_length < 2:
            raise ValueError(f"max_length {max_length} has no room for the start and end tokens; it is 77 for CLIP")
        self.vocab = vocab
        self.max_length = max_length
        self.bos_id, self.eos_id, self.pad_id = vocab[BOS], vocab[EOS], vocab[pad_token]
        self.bos_token, self.eos_token = self.bos_id, self.eos_id  # their names in mlx-examples
        self._tokens = {id_: token for token, id_ in vocab.items()}
        self._merges: dict[tuple[int, int], tuple[int, int]] = {}  # (left id, right id) -> (rank, id of the product)
        for rank, pair in enumerate(merges):
            try:
                left, right = pair.split(" ") if isinstance(pair, str) else pair
                self._merges[vocab[left], vocab[right]] = (rank, vocab[left + right])
            except (KeyError, TypeError, ValueError):
                reason = "is not two tokens of the vocabulary that make a third"
                raise ValueError(f"merge {rank + 1}, {pair!r:.60}, {reason}; download its file again") from None
        self._exact = {token: [vocab[token]] for token, normalized in special_tokens.items() if not normalized}
        self._folded = {_normalize(token): vocab[token] for token, normalized in special_tokens.items() if normalized}
        self._added: dict[str, list[int]] = {}  # words of embeddings, in any case, as their authors' programs read them
        self._split_exact, self._split_folded = _any_of(self._exact), _any_of(self._folded)

    @classmethod
    def from_folder(cls, folder: Path | str, pad_token: str | None = None, size: int | None = None) -> "Tokenizer":
        """Read the tokenizer of a checkpoint: vocab.json and merges.txt, or else tokenizer.json.

        The special tokens come from special_tokens_map.json, else from tokenizer_config.json. If the latter has a table
        of added tokens, only this table is used, as in the reference. ``pad_token`` replaces the files' padding.
        ``size`` is the number of tokens of the text encoder.
        Raises ValueError, one line that names the file and the key, for missing or malformed entries.
        """
        folder = Path(os.path.expanduser(folder))
        vocab, merges, added = _read_vocabulary(folder)
        if (highest := max(vocab.values(), default=0)) >= (size or highest + 1):
            text = f"{folder} has the id {highest}, the text encoder only {size} tokens"
            raise ValueError(f"{text}; give the encoder's tokenizer")
        config = _JsonFile(folder / "tokenizer_config.json", optional=True)
        files = [config, _JsonFile(folder / "special_tokens_map.json", optional=True)]
        if "added_tokens_decoder" in config:
            added, files = config.read("added_tokens_decoder", _tokens_by_id), [config]
        special, additional = {role: {token: False} for role, token in _ROLES.items()}, {}
        for file in files:
            special |= {role: token for role in _ROLES if (token := file.read(role, _token))}
            additional = file.read("additional_special_tokens", _tokens, additional)
        if pad_token is not None:
            special["pad_token"] = {pad_token: False}
        if (count := len(added) + len(additional)) > _MOST_SPECIAL:
            raise ValueError(f"{folder} names {count} special tokens; the limit is {_MOST_SPECIAL}")
        for token in (*added, *additional):  # new ones get the ids after the vocabulary
            vocab.setdefault(token, len(vocab))
        length = config.read("model_max_length", int, 77)
        try:
            return cls(
                vocab,
                merges,
                pad_token=next(iter(special["pad_token"])),
                max_length=length if length < 10_000 else 77,  # a huge number means that it was not set
                special_tokens=reduce(or_, (*special.values(), additional, added)),  # of equal ones the last is used
            )
        except ValueError as error:
            raise ValueError(f"the tokenizer in {folder} cannot be used: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text of any length, without start and end. Raises ValueError for invalid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            position = f"character {error.start} ({text[error.start]!r})"
            raise ValueError(f"the prompt is not valid Unicode at {position}; give it in UTF-8") from None
        ids = []
        # Each split alternates: text, special token, text, ...
        for i, part in enumerate(self._split_exact.split(text)):
            if i % 2 and (known := self._exact.get(part) or self._added.get(part.casefold())):
                ids += known
                continue
            for j, piece in enumerate(self._split_folded.split(_normalize(part))):
                if j % 2:
                    ids.append(self._folded[piece])
                    continue
                for word in chain.from_iterable(map(_PART.findall, _WORD.findall(piece))):
                    ids += self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        """Join the pair of lowest rank, the leftmost first, until no pair has a rank."""
        chars = [_BYTE_TO_CHAR[byte] for byte in word.encode()]
        chars[-1] += _END_OF_WORD
        result = []
        for start in range(0, len(chars), _LONGEST_MERGE):
            # A byte that is not in the vocabulary becomes the end token, as in the reference.
            ids = [self.vocab.get(char, self.eos_id) for char in chars[start : start + _LONGEST_MERGE]]
            ranks = [self._merges.get(pair, _NO_MERGE) for pair in pairwise(ids)]
            while ranks and (best := min(ranks)) != _NO_MERGE:
                i = ranks.index(best)
                ids[i : i + 2] = [best[1]]
                first = max(i - 1, 0)
                ranks[first : i + 2] = [self._merges.get(pair, _NO_MERGE) for pair in pairwise(ids[first : i + 2])]
            result += ids
        return result

    def add(self, word: str, ids: Sequence[int]) -> None:
        """Map ``word``, as a whole word in upper or lower case, to ``ids``. Raises ValueError for a blank word."""
        if not word.strip():
            raise ValueError(f"{word!r} cannot name an embedding; give a word")
        self._added[word.casefold()] = list(ids)
        self._split_exact = _any_of(self._exact, self._added)
        self._tokens |= dict.fromkeys(ids, "") | {ids[0]: word + _END_OF_WORD}

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids: lower case, a space after every word, U+FFFD for an incomplete character."""
        try:
            tokens = [self._tokens[int(id_)] for id_ in ids]
        except KeyError as error:
            raise ValueError(f"the id {error} is not in the vocabulary of {len(self.vocab)} tokens") from None
        text = "".join(token.removesuffix(_END_OF_WORD) + " " * token.endswith(_END_OF_WORD) for token in tokens)
        return b"".join(_CHAR_TO_BYTE.get(char, char.encode()) for char in text).decode(errors="replace").strip()

    def tokenize(
        self, text: str | list[str], prepend_bos: bool = True, append_eos: bool = True
    ) -> list[int] | list[list[int]]:
        """Return the ids of one or several texts with start and end, neither padded nor cut (as in mlx-examples)."""
        if isinstance(text, list):
            return [self.tokenize(t, prepend_bos, append_eos) for t in text]
        return [self.bos_id] * prepend_bos + self.encode(text) + [self.eos_id] * append_eos


def _normalize(text: str) -> str:
    """Compose characters (NFC), collapse blanks, and turn each single character to lower case."""
    text = _COMPOSABLE.sub(lambda run: unicodedata.normalize("NFC", run[0]), text)
    return _BLANKS.sub(" ", text).replace("Σ", "σ").lower()  # str.lower would make a Σ at the end of a word ς


def _any_of(tokens: Iterable[str], added: Iterable[str] = ()) -> regex.Pattern:
    """Return a pattern that captures the leftmost and longest token that is not a part of a word.

    ``added`` tokens are found in upper and lower case.
    """
    patterns = {token: regex.escape(token) for token in tokens}
    patterns |= {token: f"(?i:{regex.escape(token)})" for token in added if token not in patterns}
    longest_first = "|".join(patterns[token] for token in sorted(patterns, key=len, reverse=True))
    return regex.compile(rf"(?:\b|(?!\w))({longest_first or '(?!)'})(?:\b|(?<!\w))")


# --- files -------------------------------------------------------------------------------------------------------


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[Any], dict[str, bool]]:
    """Read the vocabulary, the merges, and the words added after training -> whether they are normalised."""
    if not (folder / "vocab.json").is_file() and (folder / "tokenizer.json").is_file():
        file = _JsonFile(folder / "tokenizer.json")  # the only file of transformers 5
        file |= file.read("model", dict, {})
        if file.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= file.keys():
            raise ValueError(f"{file.path} is not a BPE tokenizer; CLIP needs one")
        return file.ids(file["vocab"]), file.read("merges", list), file.read("added_tokens", _tokens, {})
    file = _JsonFile(folder / "vocab.json")
    vocab = file.ids(file.content)
    lines = read_text(_existing(folder / "merges.txt")).split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    file = _JsonFile(folder / "added_tokens.json", optional=True)
    added = file.ids(file.content)
    return vocab, merges, dict.fromkeys(sorted(added, key=added.get), True)


class _JsonFile(dict[str, Any]):
    """Hold the nonempty fields of a JSON object; errors name the file and the key."""

    def __init__(self, path: Path, optional: bool = False):
        self.path = path
        self.content = {} if optional and not path.is_file() else read_json(_existing(path))
        super().__init__((key, value) for key, value in self.content.items() if value not in (None, "", [], {}))

    def read(self, key: str, parse: Callable[[Any], Any], default: Any = None) -> Any:
        try:
            return parse(self[key]) if key in self else default
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise self._unknown(key, self[key]) from None

    def ids(self, table: Any) -> dict[str, int]:
        """Check that an object holds an id for every token."""
        if not isinstance(table, dict):
            raise self._unknown("vocab", table)
        for token, id_ in table.items():
            if type(id_) is not int or not 0 <= id_ <= _LARGEST_ID:
                raise self._unknown(token, id_)
        return table

    def _unknown(self, key: str, value: Any) -> ValueError:
        return ValueError(f"{self.path}: {key!r:.60} has an unknown shape, {value!r:.60}; download it again")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is missing; a tokenizer is vocab.json and merges.txt, or tokenizer.json")
    return path


def _token(value: str | dict[str, Any]) -> dict[str, bool]:
    """Read a string or the fields of an AddedToken: text -> whether it is searched after normalisation."""
    if isinstance(value, str):
        return {value: False} if value else {}
    text = value["content"] + ""  # TypeError unless it is a text
    return {text: bool(value.get("normalized", not value.get("special", False)))} if text else {}


def _tokens(tokens: list[Any]) -> dict[str, bool]:
    if not isinstance(tokens, list):
        raise TypeError(type(tokens))
    return {text: normalized for token in tokens for text, normalized in _token(token).items()}


def _tokens_by_id(table: dict[str, Any]) -> dict[str, bool]:
    return _tokens([table[id_] for id_ in sorted(table, key=int)])

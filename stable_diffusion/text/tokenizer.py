"""Byte-level BPE of CLIP: from a prompt to the 77 ids of the text encoder.

The ids equal those of the reference, the fast CLIPTokenizer of transformers, for every Unicode text:

    text -> special tokens cut out -> NFC, blanks collapsed, lower case -> words -> UTF-8 bytes -> merges -> ids

References: Radford et al. 2021 (CLIP), Radford et al. 2019 (byte-level BPE), Sennrich et al. 2016 (BPE).
"""

import heapq
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import regex

_BOS = "<|startoftext|>"
_EOS = "<|endoftext|>"
_END_OF_WORD = "</w>"
_CACHED_WORDS = 16384

# The reference (tokenizers 0.23) sees Unicode through three libraries of different ages: its NFC knows Unicode 9, its
# letters and numbers Unicode 16, its lower case Unicode 17; what was assigned later is an unknown symbol there. These
# ranges, widened over code points that behave the same either way, say so, because Python and `regex` know other
# versions.
_MARKS_AFTER_UNICODE_9 = (
    r"\u05c8-\u05c9\u07fd\u0897-\u08d3\u09fe\u0c3c\u0d3b-\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa\ua82c"
    r"\U000105c9-\U000105e4\U00010d24-\U00010f85\U00011070\U0001133b\U00011383-\U000113d0\U0001145e"
    r"\U00011839-\U00011930\U00011938-\U00011a99\U00011d42-\U0001612f\U00016d67-\U00016ff1\U0001d127-\U0001d128"
    r"\U0001d250-\U0001d281\U0001e08f-\U0001e6f5"
)
_LETTERS_AFTER_UNICODE_16 = (
    r"\u0558\u058b-\u058c\u088f\u0c5c\u0cdc\u208f\u209d-\u209f\ua7ce-\ua7cf\ua7d2\ua7d4\ua7dd-\ua7f1\uab6c-\uab6d"
    r"\U000107bb-\U000107bf\U00010940-\U00010959\U00010ec5-\U00010eee\U00011b0a\U00011db0-\U00011df1"
    r"\U0001246f-\U0001247f\U00012550-\U00012686\U00016ea0-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff"
    r"\U00018cd6-\U00018cda\U00018d09-\U000191d2\U0001b123-\U0001b128\U0001b168\U0001d6a6\U0001df1f-\U0001df24"
    r"\U0001df2b-\U0001dfff\U0001e6c0-\U0001e6ff\U0002b73a-\U0002b73f\U0002b81e\U0002cea2-\U0002cead"
    r"\U000323b0-\U0003fc3f"
)
_CAPITALS_AFTER_UNICODE_14 = str.maketrans(
    {0x1C89: 0x1C8A, 0xA7CB: 0x264, 0xA7CC: 0xA7CD, 0xA7CE: 0xA7CF, 0xA7D2: 0xA7D3, 0xA7D4: 0xA7D5}
    | {0xA7DA: 0xA7DB, 0xA7DC: 0x19B}
    | {capital: capital + 0x20 for capital in range(0x10D50, 0x10D66)}
    | {capital: capital + 0x1B for capital in range(0x16EA0, 0x16EB9)}
)

_COMPOSABLE = regex.compile(f"[^{_MARKS_AFTER_UNICODE_9}]+")
_BLANKS = regex.compile(r"\s+")
_LETTER, _NUMBER = (rf"[\p{{{kind}}}--[{_LETTERS_AFTER_UNICODE_16}]]" for kind in "LN")
_WORD = regex.compile(
    rf"(?V1)<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|{_LETTER}+|{_NUMBER}|[^\s{_LETTER}{_NUMBER}]+"
)
# A special token that was written otherwise (capitals) is a word to the first of the reference's two splits, and falls
# into three at the second, which is that of GPT-2.
_SPLIT_AGAIN = {_BOS: ("<|", "startoftext", "|>"), _EOS: ("<|", "endoftext", "|>")}


def _byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for the bytes in the vocabulary (Radford et al. 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    stand_ins = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_ins.get(byte, chr(byte)) for byte in range(256)]


_BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {char: bytes([byte]) for byte, char in enumerate(_BYTE_TO_CHAR)}


class Tokenizer:
    """Byte-level BPE of CLIP (Radford et al. 2021), equal to the reference on any Unicode text.

    Attributes: `bos_id`, `eos_id`, `pad_id` (ids of start, end and padding), `max_length` (ids in a window).
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        *,
        pad_token: str = _EOS,
        max_length: int = 77,
        special_tokens: dict[str, bool] | None = None,
    ):
        """
        Args:
            vocab: id of every token; words end in "</w>", bytes are written in the byte alphabet.
            merges: pairs of tokens in the order in which they were learnt.
            pad_token: what fills a window. SD 1 pads with end-of-text, SD 2 and the second tokenizer of SDXL with "!".
            max_length: ids in a window, start and end included.
            special_tokens: tokens that are recognised inside a text -> whether they are looked for after
                normalisation (then "<|STARTOFTEXT|>" is one too). Default: start, end and pad, as written.

        Raises ValueError when a special token or the product of a merge is not in the vocabulary.
        """
        special_tokens = {_BOS: False, _EOS: False, pad_token: False} if special_tokens is None else special_tokens
        for token in (_BOS, _EOS, pad_token, *special_tokens):
            if token not in vocab:
                raise ValueError(
                    f"the special token {token!r} is not in the vocabulary; is this the tokenizer of a CLIP?"
                )
        if max_length < 2:
            raise ValueError(f"max_length {max_length} has no room for the start and end tokens; it is 77 for CLIP")
        self.vocab = vocab
        self.max_length = max_length
        self.bos_id, self.eos_id, self.pad_id = vocab[_BOS], vocab[_EOS], vocab[pad_token]
        self.bos_token, self.eos_token = self.bos_id, self.eos_id  # their names in mlx-examples
        self._tokens = {id_: token for token, id_ in vocab.items()}
        self._merges = _rank_merges(vocab, merges)
        self._exact = {token: [vocab[token]] for token, normalized in special_tokens.items() if not normalized}
        self._folded = {_normalize(token): vocab[token] for token, normalized in special_tokens.items() if normalized}
        self._split_exact, self._split_folded = _any_of(self._exact), _any_of(self._folded)
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def from_folder(cls, folder: Path | str, pad_token: str | None = None) -> "Tokenizer":
        """Read the tokenizer of a checkpoint: vocab.json and merges.txt, or tokenizer.json where these are missing.

        The special tokens come from special_tokens_map.json, else from tokenizer_config.json (which alone counts, as in
        the reference, when it has a table of added tokens); a ``pad_token`` takes the place of theirs.
        Raises ValueError, one line that names the file, for whatever is missing or malformed.
        """
        folder = Path(folder)
        vocab, merges, added = _read_vocabulary(folder)
        config = _read_json(folder / "tokenizer_config.json", optional=True)
        special_map = _read_json(folder / "special_tokens_map.json", optional=True)
        try:
            if table := config.get("added_tokens_decoder"):
                added = [table[id_] for id_ in sorted(table, key=int)]
            else:
                config |= special_map
            if pad_token is not None:  # a special token, which is found inside a text too
                config["pad_token"] = pad_token
            known = {_content(token) for token in added}
            extra = [_content(token) for token in config.get("additional_special_tokens") or []]
            added += [{"content": token, "special": True} for token in extra if token not in known]
            for token in added:  # those that are new take the ids after the vocabulary
                vocab.setdefault(_content(token), len(vocab))
            length = config.get("model_max_length", 77)  # a huge number there means that none was set
            return cls(
                vocab,
                merges,
                pad_token=_content(config.get("pad_token") or _EOS),
                max_length=length if isinstance(length, int) and length < 10000 else 77,
                special_tokens=_special_tokens(config, added),
            )
        except (AttributeError, TypeError, ValueError) as error:  # the first two: JSON of an unexpected shape
            raise ValueError(f"the tokenizer in {folder} cannot be used: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a text of any length, without start and end. Raises ValueError for text that is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt is not valid Unicode at character {error.start} ({text[error.start]!r}); is it UTF-8?"
            ) from None
        ids = []
        # Each split alternates: text, special token, text, ...
        for i, part in enumerate(self._split_exact.split(text)):
            if i % 2:
                ids.extend(self._exact[part])
                continue
            for j, piece in enumerate(self._split_folded.split(_normalize(part))):
                if j % 2:
                    ids.append(self._folded[piece])
                else:
                    ids.extend(id_ for word in _words(piece) for id_ in self._bpe(word))
        return ids

    def add(self, word: str, ids: Sequence[int]) -> None:
        """Have ``word``, written just so and standing alone, mean ``ids``. Raises ValueError for a blank word."""
        if not word.strip():
            raise ValueError(f"{word!r} cannot name an embedding; give a word")
        self._exact[word] = list(ids)
        self._split_exact = _any_of(self._exact)
        self._tokens |= dict.fromkeys(ids, "") | {ids[0]: word + _END_OF_WORD}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: lower case, a blank after every word; a part of a character is shown as U+FFFD."""
        data = b""
        try:
            data = b"".join(_token_bytes(self._tokens[int(id_)]) for id_ in ids)
        except KeyError as error:
            raise ValueError(f"the id {error} is not in the vocabulary of {len(self.vocab)} tokens") from None
        return data.decode(errors="replace").strip()

    def tokenize(
        self, text: str | list[str], prepend_bos: bool = True, append_eos: bool = True
    ) -> list[int] | list[list[int]]:
        """Ids of a text, or of each text of a list, with start and end, neither padded nor cut (as in mlx-examples)."""
        if isinstance(text, list):
            return [self.tokenize(t, prepend_bos, append_eos) for t in text]
        return [self.bos_id] * prepend_bos + self.encode(text) + [self.eos_id] * append_eos

    def window(self, text: str) -> tuple[list[int], str]:
        """The `max_length` ids of a prompt (start, text, end, padding) and the text that did not fit, "" if all did."""
        ids = self.encode(text)
        room = self.max_length - 2
        window = [self.bos_id, *ids[:room], self.eos_id]
        return window + [self.pad_id] * (self.max_length - len(window)), self.decode(ids[room:])

    def _bpe(self, word: str) -> list[int]:
        """Ids of one word, from a bounded cache where it has been seen."""
        if word in self._cache:
            return self._cache[word]
        chars = [_BYTE_TO_CHAR[byte] for byte in word.encode()]
        chars[-1] += _END_OF_WORD
        # A vocabulary that lacks a byte has the end token stand for it, as the reference does.
        ids = _merge([self.vocab.get(char, self.eos_id) for char in chars], self._merges)
        if len(word) <= 100:
            if len(self._cache) >= _CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = ids
        return ids


def _normalize(text: str) -> str:
    """NFC, every run of blanks one space, lower case of each character by itself."""
    text = _COMPOSABLE.sub(lambda run: unicodedata.normalize("NFC", run[0]), text)
    text = _BLANKS.sub(" ", text).translate(_CAPITALS_AFTER_UNICODE_14)
    return text.replace("Σ", "σ").lower()  # str.lower would make a Σ at the end of a word ς


def _words(text: str) -> Iterable[str]:
    for word in _WORD.findall(text):
        yield from _SPLIT_AGAIN.get(word, (word,))


def _any_of(tokens: Iterable[str]) -> regex.Pattern:
    """A pattern that finds the longest of the tokens at the leftmost place, and captures it; no part of a word."""
    longest_first = sorted(tokens, key=len, reverse=True)
    whole = [
        (r"(?<!\w)" if regex.match(r"\w", t) else "") + regex.escape(t) + (r"(?!\w)" if regex.search(r"\w$", t) else "")
        for t in longest_first
    ]
    return regex.compile("(" + ("|".join(whole) or r"(?!)") + ")")


def _rank_merges(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[tuple[int, int], tuple[int, int]]:
    """(left id, right id) -> (rank, id of the product)."""
    ranks = {}
    for rank, (left, right) in enumerate(merges):
        try:
            ranks[vocab[left], vocab[right]] = (rank, vocab[left + right])
        except KeyError as error:
            raise ValueError(f"merge {rank + 1} ({left!r} {right!r}): {error} is not in the vocabulary") from None
    return ranks


def _merge(ids: list[int], merges: dict[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Join the pair of lowest rank, the leftmost first, until no pair has a rank.

    A heap of candidates over a doubly linked list: O(n log n), so that a word of 100 kB takes a second and not a day.
    """
    end = len(ids)
    after, before = list(range(1, end + 1)), list(range(-1, end - 1))
    heap = []

    def push(i: int, j: int) -> None:
        if i >= 0 and j < end and (ids[i], ids[j]) in merges:
            rank, product = merges[ids[i], ids[j]]
            heapq.heappush(heap, (rank, i, product))

    for i in range(end - 1):
        push(i, i + 1)
    while heap:
        _, i, product = heapq.heappop(heap)
        j = after[i]
        # Candidates whose left or right has been merged meanwhile are stale. A merged right is -1, which has no rank.
        if j == end or merges.get((ids[i], ids[j]), (0, -1))[1] != product:
            continue
        ids[i], ids[j] = product, -1
        after[i] = after[j]
        if after[i] < end:
            before[after[i]] = i
        push(before[i], i)
        push(i, after[i])
    return [id_ for id_ in ids if id_ >= 0]


def _token_bytes(token: str) -> bytes:
    word = token.removesuffix(_END_OF_WORD)
    return b"".join(_CHAR_TO_BYTE.get(char, char.encode()) for char in word) + b" " * (word != token)


def _read_json(path: Path, optional: bool = False) -> dict:
    if not path.is_file():
        if optional:
            return {}
        raise ValueError(f"{path} is missing; a tokenizer is vocab.json and merges.txt, or tokenizer.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; download it again")
    return content


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], list]:
    """Vocabulary, merges, and words added after training."""
    if not (folder / "vocab.json").is_file() and (folder / "tokenizer.json").is_file():
        content = _read_json(folder / "tokenizer.json")  # all that transformers 5 writes
        model = content.get("model") or {}
        if model.get("type", "BPE") != "BPE" or "vocab" not in model or "merges" not in model:
            raise ValueError(f"{folder / 'tokenizer.json'} is not a BPE tokenizer; CLIP needs one")
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        return model["vocab"], merges, content.get("added_tokens") or []
    vocab = _read_json(folder / "vocab.json")
    if not all(type(id_) is int and id_ >= 0 for id_ in vocab.values()):
        raise ValueError(f"{folder / 'vocab.json'} is not a table of tokens and their ids; download it again")
    merges = _read_merges(folder / "merges.txt")
    legacy = _read_json(folder / "added_tokens.json", optional=True)
    added = [{"content": token, "normalized": True} for token in sorted(legacy, key=legacy.get)]
    return vocab, merges, added


def _read_merges(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; a tokenizer is vocab.json and merges.txt, or tokenizer.json")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable as UTF-8 text ({error}); download it again") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is not two tokens and one blank; download it again")
        merges.append(pair)
    return merges


def _content(token: str | dict) -> str:
    """The text of a special token, which configs hold as a string or as the fields of an AddedToken."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise ValueError(f"the special token {token!r} has no text")
    return content


def _special_tokens(config: dict, added: list[dict]) -> dict[str, bool]:
    """Special token -> whether it is looked for after normalisation. Of two that name it the last counts."""
    table = {_content(token): bool(token.get("normalized", not token.get("special", False))) for token in added}
    special = dict(table)
    for name, default in (("bos_token", _BOS), ("eos_token", _EOS), ("unk_token", _EOS), ("pad_token", _EOS)):
        token = config.get(name) or default
        content = _content(token)
        if name in ("bos_token", "eos_token") and content != default:
            raise ValueError(f"the {name} {content!r} is not supported; CLIP's own is {default!r}")
        special[content] = table.get(content, isinstance(token, dict) and bool(token.get("normalized")))
    return special

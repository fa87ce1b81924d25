"""Trains a byte-level BPE tokenizer in CLIP's format: vocab.json and merges.txt.

The algorithm is Sennrich et al. 2016 on bytes: start from one symbol per byte (the last of a word carries `</w>`),
and merge the most frequent neighbours until every word of the captions is one token. Ids follow CLIP's order:
256 bytes, the same with `</w>`, the merges, <|startoftext|>, <|endoftext|>.
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """One printable character per byte: itself where it prints, the 256 + n-th character for the n-th other byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def learn_merges(words: Counter[str], limit: int) -> list[tuple[str, str]]:
    """At most `limit` merges, most frequent pair first; equal counts in alphabetical order."""
    spelled = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, symbols in spelled.items():
            merged, i = [], 0
            while i < len(symbols):
                take = 2 if symbols[i : i + 2] == best else 1
                merged.append("".join(symbols[i : i + take]))
                i += take
            spelled[word] = tuple(merged)
    return merges


def write_tokenizer(captions: list[str], folder: Path, limit: int = 1000) -> None:
    """Writes the four files that transformers' CLIPTokenizer loads. The captions must be lower-case ASCII words."""
    words = Counter(word for line in captions for word in line.split())
    merges = learn_merges(words, limit)
    symbols = byte_symbols()
    tokens = symbols + [s + "</w>" for s in symbols] + [a + b for a, b in merges] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config |= {"add_prefix_space": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

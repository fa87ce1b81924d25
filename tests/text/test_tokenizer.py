"""The tokenizer against the reference (transformers' fast CLIPTokenizer) on a vocabulary trained here."""

import json
import os
import random
import sys
import time
import unicodedata
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from stable_diffusion.text.tokenizer import BOS, EOS, Tokenizer

SAMPLE = """
A photo of an astronaut riding a horse on mars, highly detailed, 8k, trending on artstation; isn't it? We'll see,
they've said I'm 100% sure he'd do what you're told. The café's naïve crème brûlée — “quoted”, ‘single’ … Ångström.
Señor, ¿qué tal? Быстрая коричневая лиса прыгает через ленивую собаку. Η γρήγορη καφέ αλεπού. הכלב הקפיץ. مرحبا بالعالم.
नमस्ते दुनिया 富士山と桜の写真、高解像度。春天的花园里有一只猫。 안녕하세요 세계. สวัสดีชาวโลก. 😀😃🚀🌍👩‍🚀👍🏽 ❤️
İstanbul'da ÇAY. Straße. 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 ①②③
"""
PICKED = [
    "",
    " ",
    "\n\t  \r\n",
    "a photo of a cat",
    "A Photo OF a CAT!!!  ",
    "don't I'm we'll they've he'd you're it's 'S 'Re 'LL o'clock 'x' ''s '''t",
    "word'ſ K Å ſ",  # letters whose case folding is an ASCII letter
    "café cafe\u0301 naïve Ångström Å \u212b",
    "\u0301", "\u0301\u0316a\u0316\u0301", "x\u0345\u0334", "\u1100\u1161\u11a8", "\u0958", "\ufb01 \u2126",
    "1234 3.14 ½ ٣ ² Ⅷ ① 𝟘",
    "İstanbul IĞDIR ΟΔΥΣΣΕΥΣ Σ ΣΑΣ ΌΣΟΣ. ẞ ǅ",
    "👩‍🚀👍🏽 ❤️ 🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿 \u200d\ufe0f",
    "富士山と桜の写真。안녕하세요",
    "zero\u200bwidth\u200cjoin\u200d \ufeffbom \u2060 soft\u00adhyphen",
    "\x00 a\x00b \x01\x02\x1b[31mred\x7f\x80\x85\x9f",
    "no\u00a0break\u2003em\u3000wide\u2028line\u2029par\u180emongol\x1cfs\x1fus\x0bvt",
    "\ufffd\ufffe\uffff\U0010ffff\ue000\U000f0000",
    BOS, EOS, f"a {BOS} b {EOS}c", f"{EOS}{EOS}", f"!!{BOS}!!", "<|STARTOFTEXT|>", "a<|EndOfText|>b", "!<|ENDOFTEXT|>!",
    "<|startoftext|", "<|startoftext|><|", "< |startoftext|>", "<|start\u200boftext|>", "'s<|endoftext|>'s",
    "</w>", "hello</w>", "Ġhello ĠĊ", "cat! dog!! !", "!a!b!",
]  # fmt: skip


NAMES = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
FLAGS = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
OBJECTS = {name: {"content": content} | FLAGS for name, content in NAMES.items()}
NEW = "<Cat-Toy>", "<Cat"
# The special_tokens_map.json and tokenizer_config.json that are found in checkpoints. Of added_tokens_decoder:
# content -> (normalized, special).
CONFIGS = {
    "nothing": ({}, {}),
    "sd1": (OBJECTS | {"pad_token": EOS}, {"pad_token": EOS, "model_max_length": 77, "do_lower_case": True}),
    "sd2": (
        OBJECTS | {"pad_token": "!"},
        {name: {"__type": "AddedToken"} | value for name, value in OBJECTS.items()}
        | {"pad_token": EOS, "model_max_length": 77},
    ),
    "config only": ({}, NAMES | {"pad_token": "!", "model_max_length": 77}),
    "xl2": (
        NAMES | {"pad_token": EOS},  # which does not count beside a table of added tokens
        NAMES
        | {"pad_token": "!", "model_max_length": 77, "additional_special_tokens": []}
        | {"added_tokens_decoder": {"!": (False, True), BOS: (True, False), EOS: (False, False)}},
    ),
    "additional": (
        {"bos_token": BOS, "eos_token": EOS, "pad_token": "!", "additional_special_tokens": ["<cat-toy>", "<Cat"]},
        {"model_max_length": 1000000000000000019884624838656},
    ),
    "textual inversion": (
        {},
        NAMES
        | {"pad_token": EOS, "model_max_length": 20}
        | {"added_tokens_decoder": dict.fromkeys((BOS, EOS), (True, True)) | dict.fromkeys(NEW, (True, False))},
    ),
}

NO_IDS = [("null", "None"), ("[1]", "[1]"), ("-1", "-1"), ("true", "True"), ("1.0", "1.0"), (str(2**63), str(2**63))]
MANY = [f"<{i}>" for i in range(50_000)]


@pytest.fixture(scope="session")
def bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary in CLIP's layout, 256 bytes, 256 final bytes, the merges, start, end; and the merges."""
    backend, reference = Backend(models.BPE(end_of_word_suffix="</w>")), CLIPTokenizer({}, []).backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = reference.normalizer, reference.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=3512, end_of_word_suffix="</w>", show_progress=False)
    texts = [SAMPLE] * 3 + [Path(file).read_text() for file in (random.__file__, json.__file__, __file__)]
    backend.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [char + "</w>" for char in alphabet] + [left + right for left, right in merges] + [BOS, EOS]
    assert alphabet[0] == "!" and len(alphabet) == 256 and len(merges) > 2000  # worth testing
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def write_folder(folder: Path, bpe, special_map: dict, config: dict) -> Path:
    vocab, merges = bpe
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if table := config.get("added_tokens_decoder"):
        ids = vocab | {content: len(vocab) + i for i, content in enumerate(NEW)}
        fields = ({"content": content, "normalized": n, "special": s} for content, (n, s) in table.items())
        config = config | {"added_tokens_decoder": {str(ids[token["content"]]): token for token in fields}}
    for name, content in (("special_tokens_map.json", special_map), ("tokenizer_config.json", config)):
        if content:
            (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session", params=CONFIGS)
def pair(request, bpe, tmp_path_factory):
    """Ours and the reference, from the same folder."""
    folder = write_folder(tmp_path_factory.mktemp("clip"), bpe, *CONFIGS[request.param])
    return Tokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def sd1_folder(bpe, tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("sd1"), bpe, *CONFIGS["sd1"])


@pytest.fixture(scope="session")
def sd1(sd1_folder):
    return Tokenizer.from_folder(sd1_folder), CLIPTokenizer.from_pretrained(sd1_folder)


# By Python 3.13 at most: Unicode 15. The libraries of the reference, 9 to 17, and ours differ in what came later.
ASSIGNED = [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]


def random_texts(count: int, seed: int) -> list[str]:
    """Make strings whose pieces come from all planes, and more often from where a tokenizer goes wrong."""
    rng = random.Random(seed)
    marks = [c for c in ASSIGNED if unicodedata.combining(chr(c))]
    cased = [c for c in ASSIGNED if chr(c).lower() != chr(c)]
    composed = [c for c in ASSIGNED if unicodedata.decomposition(chr(c))]
    blanks = [c for c in ASSIGNED if chr(c).isspace()]
    numbers = [c for c in ASSIGNED if unicodedata.category(chr(c)).startswith("N")]
    pools = [ASSIGNED, marks, cased, composed, blanks, numbers, range(0x20, 0x7F), range(0x180), range(0x3130, 0xA000)]
    words = [*SAMPLE.split(), BOS, EOS, BOS.upper(), "<|", "|>", "'s", "'LL", "!", "<Cat-Toy>", "<cat-toy>", " "]

    def piece() -> str:
        if rng.random() < 0.3:
            return rng.choice(words)
        pool = rng.choice(pools)
        return "".join(chr(rng.choice(pool)) for _ in range(rng.randint(1, 6)))

    return ["".join(piece() for _ in range(rng.randint(1, 12))) for _ in range(count)]


def assert_equal_ids(ours: Tokenizer, theirs: CLIPTokenizer, texts: list[str]) -> None:
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text) == ids, ascii(text)


def test_picked_and_random_strings(pair):
    assert_equal_ids(*pair, PICKED + random_texts(1500, seed=1))


def test_every_assigned_character_in_a_word(sd1):
    """How it splits from a letter and a symbol tells its class. Of the ideographs above U+20000 a sample."""
    chars = [chr(c) for c in ASSIGNED if c < 0x20000 or c % 37 == 0]
    assert_equal_ids(*sd1, [" ".join(f"a{c}." for c in chars[i : i + 64]) for i in range(0, len(chars), 64)])


def test_order_of_combining_marks(sd1):
    marks = [chr(c) for c in ASSIGNED if unicodedata.combining(chr(c))]
    probes = "\u0301\u0316\u0334\u0345\u093c\u3099\u094d\u302a"
    assert_equal_ids(*sd1, [" ".join(f"e{m}{p} e{p}{m}" for m in marks) for p in probes])


def test_special_tokens_and_length(pair):
    ours, theirs = pair
    ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == ids
    assert ours.max_length == (theirs.model_max_length if theirs.model_max_length < 10_000 else 77)


def test_decode(sd1):
    ours, theirs = sd1
    for text in ("A photo of  a CAT, isn't it?", "café — 富士山 😀 1234", ""):
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ours.encode("Two words")) == "two words"
    assert ours.decode(ours.encode("</w>")).replace(" ", "") == "</w>"
    assert ours.decode([ours.vocab["Ã"]]) == "\ufffd"  # the first byte of é: shown, not refused
    with pytest.raises(ValueError, match="123456"):
        ours.decode([123456])


def test_tokenize_as_in_mlx_examples(sd1):
    ours, _ = sd1
    ids = ours.encode("a cat")
    assert ours.tokenize("a cat") == [ours.bos_id, *ids, ours.eos_id]
    assert ours.tokenize("a cat", prepend_bos=False, append_eos=False) == ids
    assert ours.tokenize(["a cat", ""]) == [[ours.bos_id, *ids, ours.eos_id], [ours.bos_id, ours.eos_id]]
    assert len(ours.tokenize("cat " * 100)) == 102
    assert (ours.bos_token, ours.eos_token) == (ours.bos_id, ours.eos_id)


@pytest.mark.parametrize("unit", ["a", "the", "漢字", "e\u0301"])
def test_long_words(sd1, unit):
    """They are merged as in the reference up to 512 bytes, and in runs of these beyond, so that they end fast."""
    ours, theirs = sd1
    assert_equal_ids(ours, theirs, [unit * (length // len(unit.encode())) for length in (100, 512)])
    text = unit * (25_000 // len(unit.encode()))
    start = time.process_time()
    ids = ours.encode(text)
    assert time.process_time() - start < 1.25
    assert ours.decode(ids) == unicodedata.normalize("NFC", text)


def test_bytes_that_the_vocabulary_lacks(bpe, tmp_path):
    """A vocabulary without some bytes has the end token in their place."""
    vocab, merges = bpe
    vocab = {token: i for i, token in enumerate(t for t in vocab if t not in ("z", "z</w>", "q</w>"))}
    merges = [(a, b) for a, b in merges if {a, b, a + b} <= vocab.keys()]
    folder = write_folder(tmp_path / "lacking", (vocab, merges), *CONFIGS["sd1"])
    tokenizers = Tokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)
    assert_equal_ids(*tokenizers, ["zz jazz q", "zebra quiz", "z"])


def test_merges_that_reach_a_token_in_two_ways():
    """The order of the merges decides, not the length of the pieces."""
    chars = ["a", "b", "c", "a</w>", "b</w>", "c</w>"]
    merges = [("b", "c</w>"), ("a", "b"), ("ab", "c</w>"), ("a", "bc</w>"), ("a", "a"), ("aa", "a"), ("aa", "aa")]
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*chars, *(a + b for a, b in merges), BOS, EOS]))}
    ours, theirs = Tokenizer(vocab, merges), CLIPTokenizer(vocab, merges)
    rng = random.Random(0)
    texts = ["".join(rng.choice("abc") for _ in range(rng.randint(1, 12))) for _ in range(500)]
    assert_equal_ids(ours, theirs, texts + ["a" * n for n in range(1, 20)])


def test_what_transformers_5_saves(pair, tmp_path):
    """Only tokenizer.json and tokenizer_config.json."""
    pair[1].save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    ours, theirs = Tokenizer.from_folder(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    assert_equal_ids(ours, theirs, PICKED + random_texts(100, seed=4))
    assert ours.pad_id == theirs.pad_token_id


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", None, "vocab.json is missing"),
        ("merges.txt", None, "merges.txt is missing"),
        ("vocab.json", "{not json", "vocab.json is not readable as JSON"),
        ("vocab.json", '{"a": 0}', "special token '<|startoftext|>' is not in the vocabulary"),
        ("vocab.json", '{"a": "b"}', "vocab.json: 'a' has an unknown shape, 'b'; download it again"),
        ("special_tokens_map.json", '{"pad_token": "[PAD]"}', "[PAD]"),
        ("special_tokens_map.json", '{"pad_token": {"lstrip": true}}', "special_tokens_map.json: 'pad_token'"),
        ("special_tokens_map.json", '{"additional_special_tokens": "ab"}', "special_tokens_map.json: 'additional_sp"),
        ("added_tokens.json", '{"a": "b"}', "added_tokens.json: 'a'"),
        ("merges.txt", "#version: 0.2\na b c\n", "merge 1, 'a b c', is not two tokens"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "a"}}', "tokenizer_config.json: 'added_tokens_dec"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "tokenizer_config.json: 'model_max_length'"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is not readable as JSON"),
        ("tokenizer.json", "[]", "tokenizer.json holds a list"),
        ("tokenizer.json", '{"model": "BPE"}', "tokenizer.json: 'model'"),
        ("tokenizer.json", '{"model": {"type": "WordPiece"}}', "tokenizer.json is not a BPE tokenizer"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "b"}, "merges": ["a b"]}}', "tokenizer.json: 'a' has an unkn"),
        ("tokenizer.json", '{"model": {"vocab": [1], "merges": ["a b"]}}', "tokenizer.json: 'vocab'"),
        *(("vocab.json", f'{{"a": {id_}}}', f"vocab.json: 'a' has an unknown shape, {shown}") for id_, shown in NO_IDS),
        ("added_tokens.json", '{"a": null}', "added_tokens.json: 'a'"),
        ("vocab.json", '{"a": ' + "1" * 5000 + "}", "vocab.json is not readable as JSON (a number of 5000 digits)"),
        ("vocab.json", '{"a": ' * 480 + "1" + "}" * 480, "vocab.json is not readable as JSON (more than 20 levels)"),
        ("vocab.json", '{"a": "' + "x" * 10_000_000 + '"}', "vocab.json exceeds 10 MB"),
        ("merges.txt", "a b\n" * 2_500_001, "merges.txt exceeds 10 MB"),
        ("tokenizer_config.json", '{"model_max_length": [77]}', "tokenizer_config.json: 'model_max_length'"),
        ("tokenizer_config.json", '{"model_max_length": 1e400}', "tokenizer_config.json: 'model_max_length'"),
        ("tokenizer_config.json", '{"pad_token": ["!"]}', "tokenizer_config.json: 'pad_token'"),
        ("tokenizer_config.json", '{"pad_token": 3}', "tokenizer_config.json: 'pad_token'"),
        ("tokenizer_config.json", json.dumps({"additional_special_tokens": MANY}), "50000 special tokens; the"),
        (
            "added_tokens.json",
            json.dumps({token: i for i, token in enumerate(MANY)}),
            "50000 special tokens; the",
        ),
        ("tokenizer.json", '{"model": {"vocab": {"a": 1}, "merges": 7}}', "tokenizer.json: 'merges'"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 1}, "merges": [7]}, "added_tokens": [7]}', "'added_tokens'"),
    ],
    ids=lambda text: str(text)[:40],
)
def test_broken_folders(bpe, tmp_path, name, content, message):
    folder = write_folder(tmp_path / "broken", bpe, *CONFIGS["sd1"])
    if content is None or name == "tokenizer.json":  # which counts only where there is no vocab.json
        (folder / ("vocab.json" if content else name)).unlink()
    if content is not None:
        (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        Tokenizer.from_folder(folder)
    assert message in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("pair", ["a b</w>", ["a", "b</w>"]])
def test_merges_are_strings_or_pairs(tmp_path, pair):
    """tokenizer.json has held both. Special tokens that do not say it are not looked for after normalisation."""
    vocab = {token: i for i, token in enumerate(["a", "b</w>", "ab</w>", BOS, EOS])}
    model = {"type": "BPE", "vocab": vocab, "merges": [pair]}
    added = [{"content": BOS, "special": True}, {"content": "<New>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode(f"ab{BOS}<new>") == [2, 3, 5] and ours.encode(BOS.upper())[0] != 3


def test_words_of_embeddings_stand_alone(bpe):
    ours = Tokenizer(*bpe)
    plain = ours.encode("xcat cats")
    ours.add("cat", [9000, 9001])
    ours.add("<cat>", [9002])
    assert ours.encode("xcat cats") == plain
    assert ours.encode("cat, a<cat>b") == [9000, 9001, *ours.encode(", a"), 9002, *ours.encode("b")]
    assert ours.encode("CAT <Cat>") == [9000, 9001, 9002] and ours.encode("ſ") == Tokenizer(*bpe).encode("ſ")
    assert ours.decode([9000, 9001, 9002]) == "cat <cat>"
    with pytest.raises(ValueError, match="' ' cannot name an embedding"):
        ours.add(" ", [9003])


def test_words_added_after_training_in_the_old_file(bpe, tmp_path):
    folder = write_folder(tmp_path / "added", bpe, *CONFIGS["sd1"])
    count = len(bpe[0])
    (folder / "added_tokens.json").write_text(json.dumps({"<cat-toy>": count + 1, "<dog>": count}))
    assert Tokenizer.from_folder(folder).encode("<Cat-Toy><dog>") == [count + 1, count]


def test_a_given_pad_token_is_taken(bpe, sd1_folder):
    assert Tokenizer(*bpe, pad_token="!").pad_id == Tokenizer.from_folder(sd1_folder, "!").pad_id == bpe[0]["!"]


def test_bad_arguments(bpe, sd1):
    with pytest.raises(ValueError, match="max_length 1"):
        Tokenizer(*bpe, max_length=1)
    with pytest.raises(ValueError, match=r"\[PAD\]"):
        Tokenizer(*bpe, pad_token="[PAD]")
    with pytest.raises(ValueError, match=r"not valid Unicode at character 2[^\n]*$"):  # a lone surrogate
        sd1[0].encode("ab\udcffc")


def test_special_tokens_that_are_empty_or_look_like_patterns(bpe, tmp_path):
    """The reference ignores the first, and the others are text."""
    tokens = ["", "(a+)+$", "[[[", ".*", "\\b", "<|x|>"]
    folder = write_folder(tmp_path / "odd", bpe, *CONFIGS["sd1"])
    config = {"pad_token": {"content": ""}, "additional_special_tokens": tokens}
    (folder / "special_tokens_map.json").write_text(json.dumps(OBJECTS | config))
    ours = Tokenizer.from_folder(folder)
    text = "a" * 50_000 + "! (a+)+$ [[[ .* \\b <|x|> b"
    ids = ours.encode(text)
    assert [i for i in ids if i >= len(bpe[0])] == [ours.vocab[token] for token in tokens[1:]]
    assert ours.pad_id == ours.eos_id and "" not in ours.vocab


def test_a_vocabulary_that_the_text_encoder_does_not_know(sd1_folder):
    size = max(json.loads((sd1_folder / "vocab.json").read_text()).values()) + 1
    Tokenizer.from_folder(sd1_folder, size=size)
    with pytest.raises(ValueError, match=rf"has the id {size - 1}, the text encoder only {size - 1} tokens"):
        Tokenizer.from_folder(sd1_folder, size=size - 1)


def test_text_files_with_a_byte_order_mark_and_other_line_ends(bpe, sd1, tmp_path):
    folder = write_folder(tmp_path / "windows", bpe, *CONFIGS["sd1"])
    for name in ("vocab.json", "merges.txt"):
        text = (folder / name).read_bytes().replace(b"\n", b"\r\n")
        (folder / name).write_bytes(b"\xef\xbb\xbf" + text)
    assert Tokenizer.from_folder(folder).encode(SAMPLE) == sd1[0].encode(SAMPLE)

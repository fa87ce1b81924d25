"""Textual inversion: a new word with given vectors acts like the words that have these vectors."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from oracle import normal
from stable_diffusion import StableDiffusion, StableDiffusionXL
from stable_diffusion.weights.embeddings import read_embedding


@pytest.fixture
def sd(sd1_folder) -> StableDiffusion:
    return StableDiffusion(sd1_folder)


def vectors(tokenizer, encoder, text: str) -> mx.array:
    """The rows of the token table that a text stands for."""
    return encoder.text_model.embeddings.token_embedding.weight[mx.array(tokenizer.encode(text))]


def save(path, **tensors):
    mx.save_safetensors(str(path), tensors)
    return path


def test_a_word_with_the_vectors_of_others_acts_like_them(sd, tmp_path):
    for text in ("red", "the red cat"):
        file = save(tmp_path / "mystyle.safetensors", emb_params=vectors(sd.tokenizer, sd.text_encoder, text))
        assert sd.load_embedding(file) == "mystyle"
        for prompt in ("a {} on blue", "{}", "(a {}:1.3), {}"):
            ours = sd.encode_prompt(prompt.format(*["mystyle"] * 2)).context
            assert np.array_equal(ours, sd.encode_prompt(prompt.format(text, text)).context)


def test_several_embeddings_and_a_word_of_ones_own(sd, tmp_path):
    for word, text in (("<first>", "red"), ("second", "blue")):
        file = save(tmp_path / "file.safetensors", emb_params=vectors(sd.tokenizer, sd.text_encoder, text))
        assert sd.load_embedding(file, word) == word
    ours = sd.encode_prompt("the <first> second cat").context
    assert np.array_equal(ours, sd.encode_prompt("the red blue cat").context)


@pytest.mark.parametrize("inner", ["badthing3", "*", None, "<bad thing>"])
def test_the_name_of_the_file_and_the_one_in_it_are_words(sd, tmp_path, inner):
    row = torch.from_numpy(np.array(vectors(sd.tokenizer, sd.text_encoder, "the red")))
    torch.save({"string_to_param": {"*": row}, "name": inner}, tmp_path / "badthing4.pt")
    named = [inner] if inner not in (None, "*") else []
    assert sd.load_embedding(tmp_path / "badthing4.pt") == [*named, "badthing4"][0]
    want = sd.encode_prompt("a (the red:1.2) cat").context
    for word in (*named, "badthing4", "BadThing4", "embedding:badthing4", "embedding:badthing4.pt"):
        assert np.array_equal(sd.encode_prompt(f"a ({word}:1.2) cat").context, want), word
    star = sd.encode_prompt("a * cat").context
    assert np.array_equal(star, StableDiffusion(sd.source).encode_prompt("a * cat").context)


def test_the_word_is_no_part_of_another(sd, tmp_path):
    before = sd.encode_prompt("words wordy sword").context
    sd.load_embedding(save(tmp_path / "word.safetensors", emb_params=mx.array(normal(1, 32))))
    assert np.array_equal(before, sd.encode_prompt("words wordy sword").context)
    assert sd.tokenizer.decode(sd.tokenizer.encode("a word here")) == "a word here"


def test_both_encoders_of_xl(xl_folder, tmp_path):
    xl = StableDiffusionXL(xl_folder)
    pairs = ((xl.tokenizer_1, xl.text_encoder_1), (xl.tokenizer_2, xl.text_encoder_2))
    clip_l, clip_g = (vectors(*pair, "the red") for pair in pairs)
    xl.load_embedding(save(tmp_path / "x.safetensors", clip_l=clip_l, clip_g=clip_g))
    ours, want = xl.encode_prompt("x cat"), xl.encode_prompt("the red cat")
    assert np.array_equal(ours.context, want.context) and np.array_equal(ours.pooled, want.pooled)
    with pytest.raises(ValueError, match="vectors for 1 text encoders; this model has 2"):
        xl.load_embedding(save(tmp_path / "one.safetensors", emb_params=clip_l))


def test_on_quantized_encoders(sd1_folder, tmp_path):
    quantized = StableDiffusion(sd1_folder, text_bits=8)
    quantized.load_embedding(save(tmp_path / "x.safetensors", emb_params=mx.array(normal(2, 32))))
    one, other = (quantized.encode_prompt(text).context for text in ("the x cat", "the cat"))
    assert bool(mx.isfinite(one).all()) and not np.array_equal(one, other)


@pytest.mark.parametrize(
    "tensors, name, count",
    [
        ({"emb_params": (2, 8)}, "file", 1),
        ({"<cat>": (8,)}, "<cat>", 1),
        ({"clip_l": (2, 8), "clip_g": (2, 12)}, "file", 2),
    ],
)
def test_layouts(tmp_path, tensors, name, count):
    file = save(tmp_path / "file.safetensors", **{k: mx.ones(shape, dtype=mx.float16) for k, shape in tensors.items()})
    words, found = read_embedding(file)
    assert (
        words == tuple(dict.fromkeys((name, "file")))
        and len(found) == count
        and all(v.ndim == 2 and v.dtype == mx.float32 for v in found)
    )


STAR = torch.arange(24.0).reshape(3, 8)
PARAMETERS = torch.nn.ParameterDict({"*": torch.nn.Parameter(STAR)})
PICKLED = {
    "the web UI's": ({"string_to_token": {"*": 265}, "string_to_param": {"*": STAR}, "name": "cat", "step": 7}, "cat"),
    "the web UI's, half": ({"string_to_param": {"*": STAR.half()}, "name": None}, "file"),
    "textual inversion's": ({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": PARAMETERS}, "file"),
    "diffusers'": ({"<cat>": STAR}, "<cat>"),
}


@pytest.mark.parametrize("saved, word", PICKLED.values(), ids=PICKLED)
def test_layouts_of_pickles(tmp_path, saved, word):
    torch.save(saved, tmp_path / "file.pt")
    words, (found,) = read_embedding(tmp_path / "file.pt")
    assert (
        words == tuple(dict.fromkeys((word, "file")))
        and found.dtype == mx.float32
        and np.array_equal(found, STAR.numpy())
    )


@pytest.mark.parametrize("saved", [[STAR], {"name": "cat"}, {"string_to_param": {"*": STAR, "+": STAR}}])
def test_pickles_that_are_no_embeddings(tmp_path, saved):
    torch.save(saved, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"file\.pt (is not an embedding|holds no tensors with names)"):
        read_embedding(tmp_path / "file.pt")


@pytest.mark.parametrize("shapes", [{}, {"a": (1, 8, 2)}, {"clip_l": (1, 8), "clip_g": (2, 8)}])
def test_what_is_no_embedding(tmp_path, shapes):
    file = save(tmp_path / "file.safetensors", **{name: mx.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match=r"file\.safetensors is not an embedding"):
        read_embedding(file)


@pytest.mark.parametrize(
    "name, message",
    [
        ("none.safetensors", "there is no embedding at"),
        ("x.png", r"x\.png is not a weights file: these end in \.safetensors, "),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, message):
    (tmp_path / "x.png").write_bytes(b"image")
    with pytest.raises(ValueError, match=message):
        read_embedding(tmp_path / name)


def test_vectors_of_another_width(sd, tmp_path):
    file = save(tmp_path / "wide.safetensors", emb_params=mx.zeros((1, 48)))
    message = "another model family: vectors of width 48 do not fit a text encoder of 32"
    with pytest.raises(ValueError, match=message):
        sd.load_embedding(file)


def test_words_that_a_lora_brings_along(sd1_folder, tmp_path):
    file = tmp_path / "a.safetensors"
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    factors = {f"{layer}.lora_down.weight": mx.zeros((1, 32)), f"{layer}.lora_up.weight": mx.zeros((64, 1))}
    plain = StableDiffusion(sd1_folder)
    row = vectors(plain.tokenizer, plain.text_encoder, "red")
    save(file, **factors, **{"bundle_emb.newword.string_to_param.*": row})
    attached, fused = StableDiffusion(sd1_folder), StableDiffusion(sd1_folder, loras=[(file, 1.0)])
    attached.load_lora(file)
    want = plain.encode_prompt("a red cat").context
    for sd in (attached, fused):
        assert np.array_equal(sd.encode_prompt("a newword cat").context, want)

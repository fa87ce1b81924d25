"""What a long prompt costs grows with its chunks and no faster."""

import gc

import mlx.core as mx
import pytest

from peaks import peaks
from stable_diffusion import StableDiffusion
from stable_diffusion.text.encode import encode
from stable_diffusion.weights.load import build

ENCODER = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    model = StableDiffusion("tiny")
    model.ensure_models_are_loaded()
    gc.collect()  # what earlier tests left is not to vanish in the middle of a measurement
    return model


def prompt(tokens: int) -> str:
    """A prompt of which every chunk of 75 tokens is another, as equal ones are encoded once."""
    return " ".join("red" if token % 75 <= token // 75 else "blue" for token in range(tokens))


def grow_linearly(compute, choose=min) -> list[int]:
    """Peaks of prompts of 75, 150 and 300 tokens; the last is at most 20 % above the line through the others.

    ``choose`` takes one of ten runs.
    """
    first, second, last = result = [choose(peaks(compute, prompt(n), runs=10)) for n in (75, 150, 300)]
    assert 0 < last <= 1.2 * (first + 3 * max(second - first, 0))
    return result


def test_the_memory_of_encoding_grows_linearly(sd):
    module = build("text_encoder", ENCODER)
    mx.eval(module.parameters())
    encoders = [(sd.tokenizer, module)] * 2
    first, _, last = grow_linearly(lambda text: vars(encode(text, encoders, xl=True)))
    assert last > 2 * first  # it is the encoding that was measured


def test_the_memory_of_a_step_grows_linearly(sd):
    """The most is taken: of a small step the least depends on the order of its kernels more than on the prompt."""
    grow_linearly(lambda text: list(sd.generate_latents(text, num_steps=1, cfg_weight=4.0, seed=0)), choose=max)

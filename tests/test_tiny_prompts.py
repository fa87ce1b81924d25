"""The prompt language, by the pixels that the bundled model makes of it."""

import mlx.core as mx
import numpy as np
import pytest

from stable_diffusion.text.alternatives import expand
from tools.tiny.data import COLOURS


def draw(sd, text) -> np.ndarray:
    """uint8 [n, 64, 64, 3], two pictures of each prompt."""
    return np.stack(sd.generate(text, n_images=2, seed=0))


def share(images: np.ndarray, colour: str) -> float:
    """The share of pixels that are nearer to a colour than a quarter of the range in each channel."""
    return float((np.abs(images.astype(int) - COLOURS[colour]) < 64).all(axis=-1).mean())


@pytest.mark.parametrize("template", ["a (red:{}) circle on a blue background", "a square on a (red:{}) background"])
def test_the_weight_of_a_colour_raises_its_share_and_a_negative_one_removes_it(tiny, template):
    prompts = [tiny.encode_prompt(template.format(weight), emphasis="values") for weight in (-1, 0, 0.25)]
    shares = [share(draw(tiny, prompt), "red") for prompt in prompts]
    assert shares == sorted(shares)
    assert shares[0] < 0.005 < 0.1 < shares[-1]


def test_the_weight_of_a_part_raises_its_share(tiny):
    text = "a circle on a white background AND a red circle on a white background :{}"
    shares = [share(draw(tiny, text.format(weight)), "red") for weight in (-0.5, 0.5, 1.5)]
    assert shares == sorted(shares)
    assert shares[0] < 0.005 and shares[-1] > 0.1


def test_alternatives_give_each_variant(tiny):
    drawn = draw(tiny, expand("a {red|green|blue} circle on a white background"))
    for images, expected in zip(np.split(drawn, 3), ("red", "green", "blue"), strict=True):
        for colour in ("red", "green", "blue"):
            assert (share(images, colour) > 0.05) == (colour == expected)


def test_a_change_on_the_way_leaves_the_place_and_takes_the_colour(tiny):
    """A place is settled in the first steps, a colour in the last ones."""
    text = "[a red circle at the left:a blue circle at the right:{}] on a white background"
    images = draw(tiny, text.format(0.5))
    assert share(images, "blue") > 0.05 > share(images, "red")
    assert share(images[:, :, :32], "blue") > 10 * share(images[:, :, 32:], "blue")
    images = draw(tiny, text.format(0))
    assert share(images[:, :, 32:], "blue") > 10 * share(images[:, :, :32], "blue")


def test_an_embedding_with_a_words_vector_acts_like_the_word(tiny, tmp_path):
    (red,) = tiny.tokenizer.encode("red")
    vector = tiny.text_encoder.text_model.embeddings.token_embedding.weight[red]
    mx.save_safetensors(str(tmp_path / "crimsonish.safetensors"), {"emb_params": vector[None]})
    tiny.load_embedding(tmp_path / "crimsonish.safetensors")
    ours = draw(tiny, "a crimsonish circle on a white background")
    assert np.array_equal(ours, draw(tiny, "a red circle on a white background")) and share(ours, "red") > 0.05

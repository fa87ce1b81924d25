"""The prompt language, by the pixels that the bundled model makes of it."""

import mlx.core as mx
import numpy as np
import pytest

from stable_diffusion import StableDiffusion
from stable_diffusion.text.prompt import expand

RED, GREEN, BLUE = (0.86, 0.12, 0.16), (0.12, 0.59, 0.24), (0.14, 0.27, 0.86)  # of its data set


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return StableDiffusion("tiny")


def pictures(sd: StableDiffusion, text, n: int = 2, **run) -> np.ndarray:
    *_, x = sd.generate_latents(text, n_images=n, seed=0, **run)
    return np.array(sd.decode(x))


def share(images: np.ndarray, colour: tuple[float, float, float]) -> float:
    """The share of pixels that are nearer to a colour than 0.25 in each channel."""
    return float((np.abs(images - np.array(colour)) < 0.25).all(axis=-1).mean())


@pytest.mark.parametrize("template", ["a (red:{}) circle on a blue background", "a square on a (red:{}) background"])
def test_the_weight_of_a_colour_raises_its_share_and_a_negative_one_removes_it(sd, template):
    shares = [
        share(pictures(sd, sd.encode_prompt(template.format(weight), emphasis="values")), RED)
        for weight in (-1, 0, 0.25)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.005 < 0.1 < shares[-1]


def test_the_weight_of_a_part_raises_its_share(sd):
    shares = [
        share(pictures(sd, f"a circle on a white background AND a red circle on a white background :{weight}"), RED)
        for weight in (-0.5, 0.5, 1.5)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.005 and shares[-1] > 0.1


def test_alternatives_give_each_variant(sd):
    prompts = expand("a {red|green|blue} circle on a white background")
    images = pictures(sd, prompts).reshape(3, 2, 64, 64, 3)
    for drawn, expected in zip(images, (RED, GREEN, BLUE), strict=True):
        for colour in (RED, GREEN, BLUE):
            assert (share(drawn, colour) > 0.05) == (colour == expected)


def test_a_change_on_the_way_leaves_the_place_and_takes_the_colour(sd):
    """A place is settled in the first steps, a colour in the last ones."""
    images = pictures(sd, "[a red circle at the left:a blue circle at the right:0.5] on a white background")
    assert share(images, BLUE) > 0.05 > share(images, RED)
    assert share(images[:, :, :32], BLUE) > 10 * share(images[:, :, 32:], BLUE)
    images = pictures(sd, "[a red circle at the left:a blue circle at the right:0] on a white background")
    assert share(images[:, :, 32:], BLUE) > 10 * share(images[:, :, :32], BLUE)


def test_an_embedding_with_a_words_vector_acts_like_the_word(sd, tmp_path):
    (red,) = sd.tokenizer.encode("red")
    vector = sd.text_encoder.text_model.embeddings.token_embedding.weight[red]
    mx.save_safetensors(str(tmp_path / "crimsonish.safetensors"), {"emb_params": vector[None]})
    sd.load_embedding(tmp_path / "crimsonish.safetensors")
    ours = pictures(sd, "a crimsonish circle on a white background")
    assert np.array_equal(ours, pictures(sd, "a red circle on a white background")) and share(ours, RED) > 0.05

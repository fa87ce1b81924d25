"""The bundled tiny model: its files, its data set, and what its pictures show."""

import itertools
import json
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import stable_diffusion
from stable_diffusion import StableDiffusion
from tools.tiny import data, score
from tools.tiny.bpe import learn_merges
from tools.tiny.evaluate import evaluate, library

FOLDER = Path(stable_diffusion.__file__).parent / "tiny"
RED_ON_BLUE = "a red circle on a blue background"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For matrices this small the threads of torch only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion:
    return StableDiffusion("tiny")


@pytest.fixture(scope="module")
def oracle():
    """diffusers' own pipeline, from the folder as it is."""
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(model: StableDiffusion, latents) -> np.ndarray:
    """uint8 [n, 64, 64, 3] of the last latents."""
    for x in latents:
        mx.eval(x)
    return (np.array(model.decode(x)) * 255 + 0.5).astype(np.uint8)


def contrast(image: np.ndarray, colour: str) -> float:
    """How far the background is from a colour of the palette, in levels."""
    return float(np.linalg.norm(score.background_colour(image) - data.COLOURS[colour]))


def reads(image: np.ndarray) -> tuple[str, str, str]:
    """Colour and shape of the object, and the background's colour, as the scores see them."""
    mask = score.object_mask(image)
    colour, background = score.object_colour(image, mask), score.background_colour(image)
    return score.nearest_colour(colour), score.nearest_shape(mask), score.nearest_colour(background)


@pytest.fixture(scope="module")
def yellow_square() -> mx.array:
    """A yellow square in the left half of a purple picture, [64, 64, 3] in [-1, 1]."""
    scene = data.Scene((data.Thing("square", "yellow", cx=24, cy=32, radius=15),), "purple")
    return mx.array(data.render(scene, np.random.default_rng(0)).astype(np.float32) / 127.5 - 1)


# --- the data set and its scores ---


def test_an_example_is_the_same_whenever_it_is_drawn_and_never_held_out():
    for index in range(40):
        caption, image, scene = data.example(3, index)
        again = data.example(3, index)
        assert caption == again[0] and np.array_equal(image, again[1]) and image.dtype == np.uint8
        assert not any(data.held_out(thing.colour, thing.shape, scene.background) for thing in scene.things)
        assert all(thing.colour != scene.background for thing in scene.things)


def test_a_tenth_of_the_combinations_is_held_out_in_every_colour_shape_and_background():
    triples = [(c, s, b) for c in data.COLOURS for s in data.SHAPES for b in data.COLOURS if c != b]
    held = [triple for triple in triples if data.held_out(*triple)]
    assert 0.08 < len(held) / len(triples) < 0.12
    for position, names in enumerate((data.COLOURS, data.SHAPES, data.COLOURS)):
        assert {triple[position] for triple in held} == set(names)


@pytest.mark.parametrize("kind", ["single", "beside"])
def test_the_scores_read_the_data_set_itself_without_an_error(kind):
    judge = {"single": score.score_single, "beside": score.score_pair}[kind]
    for caption, image, scene in data.held_out_examples(60, seed=5, kind=kind):
        assert data.is_held_out(scene)
        assert all(judge(image, scene).values()), caption


def test_the_scores_see_a_wrong_colour_a_wrong_shape_and_a_swapped_pair():
    rng = np.random.default_rng(0)

    def draw(*things: data.Thing, background: str = "white", relation: str | None = None) -> data.Scene:
        return data.Scene(things, background, relation=relation)

    asked = draw(data.Thing("circle", "red"), background="blue")
    wrong = {
        "colour": draw(data.Thing("circle", "green"), background="blue"),
        "background": draw(data.Thing("circle", "red"), background="yellow"),
        "shape": draw(data.Thing("star", "red"), background="blue"),
    }
    for name, scene in wrong.items():
        right = score.score_single(data.render(scene, rng), asked)
        assert not right.pop(name) and all(right.values())
    left, right = (data.Thing("square", c, cx=x, radius=12) for c, x in (("red", 16), ("green", 48)))
    image = data.render(draw(left, right), rng)
    assert score.score_pair(image, draw(left, right, relation="left"))["order"]
    assert not score.score_pair(image, draw(right, left, relation="left"))["order"]
    assert not score.score_pair(image, draw(left, data.Thing("star", "black"), relation="left"))["both colours"]


def test_merges_join_the_most_frequent_neighbours_until_words_are_whole():
    assert learn_merges({"aab": 5, "ab": 4}, limit=9) == [("a", "b</w>"), ("a", "ab</w>")]
    assert learn_merges({"abc": 1}, limit=1) == [("a", "b")]


# --- the files ---


def test_the_files_are_small_and_in_half_precision():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert {file.parent.name for file in weights} == {"unet", "vae", "text_encoder", "controlnet"}
    for file in weights:
        with safe_open(file, "np") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert json.loads((FOLDER / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_the_captions_words_are_single_tokens_and_agree_with_transformers(tiny, oracle):
    for index in range(30):
        caption, _, _ = data.example(8, index)
        ids = oracle.tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2
        assert tiny.tokenizer.tokenize(caption) == ids


def test_the_autoencoder_returns_held_out_images_at_37_decibels(tiny):
    found = [image for _, image, _ in data.held_out_examples(24, seed=2)]
    x = mx.array(np.stack(found).astype(np.float32) / 127.5 - 1)
    y = tiny.decode(tiny.autoencoder.encode(x)[0])
    error = np.square(np.array(y) - np.stack(found) / 255).mean(axis=(1, 2, 3))
    assert (-10 * np.log10(error)).mean() >= 37


def test_diffusers_loads_the_folder_and_draws_the_same_image(tiny, oracle):
    noise = np.random.default_rng(4).standard_normal((1, 16, 16, 4)).astype(np.float32)
    ours = images(tiny, tiny.generate_latents(RED_ON_BLUE, latents=mx.array(noise), seed=0))
    steps, guidance = tiny.defaults.num_steps, tiny.defaults.cfg_weight
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2))
    theirs = oracle(
        RED_ON_BLUE, latents=latents, num_inference_steps=steps, guidance_scale=guidance, output_type="np"
    ).images
    assert np.abs(ours.astype(int) - (theirs * 255 + 0.5).astype(int)).max() <= 1


# --- the pictures ---


@pytest.mark.parametrize("device", ["cpu", pytest.param("default", marks=pytest.mark.gpu)])
def test_the_golden_image(tiny, device):
    """Same prompt, same seed, same picture, on whatever machine: rendered once by this library on a CPU."""
    golden = np.array(Image.open(Path(__file__).parent / "golden_tiny.png").convert("RGB")).astype(int)
    drawn = images(tiny, tiny.generate_latents(RED_ON_BLUE, seed=1))[0]
    assert reads(drawn) == ("red", "circle", "blue")
    assert np.abs(drawn - golden).max() <= 8 and np.abs(drawn - golden).mean() <= 0.5


def test_held_out_captions_are_drawn_as_they_say():
    """A smaller sample than the 200 captions of tools.tiny.evaluate, with thresholds below its figures."""
    figures, _ = evaluate(library(str(FOLDER)), singles=15, pairs=5)
    assert figures["colour"] >= 90 and figures["background"] >= 90
    assert figures["shape"] >= 85 and figures["order"] >= 80


def test_seeds_move_the_object_and_keep_what_the_caption_says(tiny):
    drawn = images(tiny, tiny.generate_latents(RED_ON_BLUE, n_images=4, seed=20))
    masks = [score.object_mask(image) for image in drawn]
    for i in range(4):
        assert reads(drawn[i]) == ("red", "circle", "blue")
        for j in range(i):
            assert (masks[i] ^ masks[j]).sum() >= 20  # pixels: another place or another size


def test_more_guidance_follows_the_caption_further(tiny, yellow_square):
    """With little noise the purple of the image and the caption's white contend: the more guidance, the more white."""
    left = []
    for guidance in (1.0, 1.5, 2.0, 4.0):
        latents = tiny.generate_latents_from_image(
            yellow_square, "a green star on a white background", strength=0.2, cfg_weight=guidance, seed=0
        )
        left.append(contrast(images(tiny, latents)[0], "white"))
    assert all(more - less >= 30 for more, less in itertools.pairwise(left)), left


def test_a_negative_prompt_drives_the_background_away_from_what_it_names(tiny):
    """The caption leaves the background open. Away from white is dark, away from black is light."""
    caption, shade = "a red circle left of a green square", {}
    for name in ("white", "black"):
        negative = f"{caption} on a {name} background"
        drawn = images(tiny, tiny.generate_latents(caption, n_images=2, seed=0, negative_text=negative))
        assert min(contrast(image, name) for image in drawn) >= 200
        shade[name] = np.mean([score.background_colour(image).mean() for image in drawn])
    plain = images(tiny, tiny.generate_latents(caption, n_images=2, seed=0))
    assert shade["white"] + 40 <= np.mean([score.background_colour(image).mean() for image in plain])
    assert np.mean([score.background_colour(image).mean() for image in plain]) + 40 <= shade["black"]


def test_strength_sweeps_from_the_image_to_the_caption(tiny, yellow_square):
    before, changes, seen = (np.array(yellow_square) + 1) * 127.5, [], []
    for strength in (0.0, 0.2, 0.4, 0.6, 0.9):
        latents = tiny.generate_latents_from_image(
            yellow_square, "a green star on a white background", strength=strength, cfg_weight=1.0, seed=0
        )
        image = images(tiny, latents)[0]
        changes.append(np.abs(image - before).mean())
        seen.append(reads(image))
    assert seen[0] == ("yellow", "square", "purple") and seen[-1] == ("green", "star", "white")
    assert changes[0] <= 4 and all(b - a >= 5 for a, b in itertools.pairwise(changes)), changes


def test_an_image_is_redrawn_where_it_was(tiny, yellow_square):
    """At half strength the caption changes what the object is, and the image says where."""
    latents = tiny.generate_latents_from_image(
        yellow_square, "a red circle on a purple background", strength=0.5, n_images=2, seed=0
    )
    for image in images(tiny, latents):
        assert reads(image) == ("red", "circle", "purple")
        y, x = np.argwhere(score.object_mask(image)).mean(axis=0)
        assert abs(x - 24) <= 4 and abs(y - 32) <= 4

"""The bundled tiny model: its files, its data set, and what its pictures show, also by its ControlNet."""

import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import stable_diffusion
from oracle import nchw, nhwc, normal, relative_error
from stable_diffusion import StableDiffusion
from stable_diffusion.diffusion.controls import Control
from stable_diffusion.models.controlnet import ControlNetModel
from tools.tiny import data, score
from tools.tiny.evaluate import evaluate, library
from tools.tiny.evaluate_control import overlap
from tools.tiny.train_control import to_hint

FOLDER = Path(stable_diffusion.__file__).parent / "tiny"
RED_ON_BLUE = "a red circle on a blue background"
GREEN_ON_WHITE = "a green star on a white background"


@pytest.fixture(scope="module")
def oracle() -> diffusers.StableDiffusionPipeline:
    """diffusers' own pipeline, from the folder as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(sd: StableDiffusion, text: str, image: mx.array | None = None, **keywords) -> np.ndarray:
    """uint8 [n, 64, 64, 3]."""
    return np.stack(sd.generate(text, image, **keywords))


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
    for seen, names in zip(zip(*held, strict=True), (data.COLOURS, data.SHAPES, data.COLOURS), strict=True):
        assert set(seen) == set(names)


@pytest.mark.parametrize("kind, judge", [("single", score.score_single), ("beside", score.score_pair)])
def test_the_scores_read_the_data_set_itself_without_an_error(kind, judge):
    for caption, image, scene in data.held_out_examples(60, seed=5, kind=kind):
        assert data.is_held_out(scene)
        assert all(judge(image, scene).values()), caption


def test_the_scores_see_a_wrong_colour_a_wrong_shape_and_a_swapped_pair():
    rng = np.random.default_rng(0)
    asked = data.Scene((data.Thing("circle", "red"),), "blue")
    wrong = {
        "colour": replace(asked, things=(data.Thing("circle", "green"),)),
        "background": replace(asked, background="yellow"),
        "shape": replace(asked, things=(data.Thing("star", "red"),)),
    }
    for name, scene in wrong.items():
        right = score.score_single(data.render(scene, rng), asked)
        assert not right.pop(name) and all(right.values())
    left, right = (data.Thing("square", c, cx=x, radius=12) for c, x in (("red", 16), ("green", 48)))
    pair = data.Scene((left, right), "white", relation="left")
    image = data.render(pair, rng)
    assert score.score_pair(image, pair)["order"]
    assert not score.score_pair(image, replace(pair, things=(right, left)))["order"]
    assert not score.score_pair(image, replace(pair, things=(left, data.Thing("star", "black"))))["both colours"]


# --- the files ---


def test_the_files_are_small_and_in_half_precision():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert {file.parent.name for file in weights} == {"unet", "vae", "text_encoder", "controlnet", "lora"}
    for file in weights:
        with safe_open(file, "np") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118
    for config, name in (("model_index", "StableDiffusionPipeline"), ("controlnet/config", "ControlNetModel")):
        assert json.loads((FOLDER / f"{config}.json").read_text())["_class_name"] == name


def test_the_captions_words_are_single_tokens_and_agree_with_transformers(tiny, oracle):
    for index in range(30):
        caption, _, _ = data.example(8, index)
        ids = oracle.tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2
        assert tiny.tokenizer.tokenize(caption) == ids


def test_the_autoencoder_returns_held_out_images_at_37_decibels(tiny):
    found = np.stack([image for _, image, _ in data.held_out_examples(24, seed=2)]).astype(np.float32)
    y = tiny.decode(tiny.encode(mx.array(found / 127.5 - 1)))
    error = np.square(np.array(y) - found / 255).mean(axis=(1, 2, 3))
    assert (-10 * np.log10(error)).mean() >= 37


def test_diffusers_loads_the_folder_and_draws_the_same_image(tiny, oracle):
    noise = normal(1, 16, 16, 4, seed=4)
    run = {"num_inference_steps": tiny.defaults.num_steps, "guidance_scale": tiny.defaults.cfg_weight}
    theirs = oracle(RED_ON_BLUE, latents=nchw(noise), output_type="np", **run).images
    ours = draw(tiny, RED_ON_BLUE, latents=mx.array(noise))
    assert np.abs(ours.astype(int) - (theirs * 255 + 0.5).astype(int)).max() <= 1


# --- the pictures ---


@pytest.mark.parametrize("device", ["cpu", pytest.param("default", marks=pytest.mark.gpu)])
def test_the_golden_image(tiny, device):
    """Same prompt, same seed, same picture, on whatever machine: rendered once by this library on a CPU."""
    golden = np.array(Image.open(FOLDER / "golden.png").convert("RGB")).astype(int)
    (drawn,) = draw(tiny, RED_ON_BLUE, seed=1)
    assert reads(drawn) == ("red", "circle", "blue")
    assert np.abs(drawn - golden).max() <= 8 and np.abs(drawn - golden).mean() <= 0.5


def test_held_out_captions_are_drawn_as_they_say():
    """Fewer captions and steps than in tools.tiny.evaluate, with thresholds below its figures."""
    figures, _ = evaluate(library(str(FOLDER), steps=10), singles=15, pairs=5)
    assert figures["colour"] >= 90 and figures["background"] >= 90
    assert figures["shape"] >= 85 and figures["order"] >= 80


def test_seeds_move_the_object_and_keep_what_the_caption_says(tiny):
    drawn = draw(tiny, RED_ON_BLUE, n_images=4, seed=20)
    assert {reads(image) for image in drawn} == {("red", "circle", "blue")}
    for one, other in itertools.combinations(map(score.object_mask, drawn), 2):
        assert (one ^ other).sum() >= 20  # pixels: another place or another size


def test_more_guidance_follows_the_caption_further(tiny, yellow_square):
    """With little noise the purple of the image and the caption's white contend: the more guidance, the more white."""
    left = [
        contrast(draw(tiny, GREEN_ON_WHITE, yellow_square, strength=0.2, cfg_weight=guidance, seed=0)[0], "white")
        for guidance in (1.0, 1.5, 2.0, 4.0)
    ]
    assert all(more - less >= 30 for more, less in itertools.pairwise(left)), left


def test_a_negative_prompt_drives_the_background_away_from_what_it_names(tiny):
    """The caption leaves the background open. Away from white is dark, away from black is light."""
    caption, shade = "a red circle left of a green square", {}
    for name in ("white", "", "black"):
        negative = name and f"{caption} on a {name} background"
        drawn = draw(tiny, caption, n_images=2, seed=0, negative_text=negative)
        assert not name or min(contrast(image, name) for image in drawn) >= 200
        shade[name] = np.mean([score.background_colour(image).mean() for image in drawn])
    assert shade["white"] + 40 <= shade[""] <= shade["black"] - 40


def test_strength_sweeps_from_the_image_to_the_caption(tiny, yellow_square):
    strengths = (0.0, 0.2, 0.4, 0.6, 0.9)
    drawn = [draw(tiny, GREEN_ON_WHITE, yellow_square, strength=s, cfg_weight=1.0, seed=0)[0] for s in strengths]
    assert reads(drawn[0]) == ("yellow", "square", "purple") and reads(drawn[-1]) == ("green", "star", "white")
    changes = [np.abs(image - (np.array(yellow_square) + 1) * 127.5).mean() for image in drawn]
    assert changes[0] <= 4 and all(b - a >= 5 for a, b in itertools.pairwise(changes)), changes


def test_an_image_is_redrawn_where_it_was(tiny, yellow_square):
    """At half strength the caption changes what the object is, and the image says where."""
    for image in draw(tiny, "a red circle on a purple background", yellow_square, strength=0.5, n_images=2, seed=0):
        assert reads(image) == ("red", "circle", "purple")
        y, x = np.argwhere(score.object_mask(image)).mean(axis=0)
        assert abs(x - 24) <= 4 and abs(y - 32) <= 4


# --- its ControlNet ---


@pytest.fixture(scope="module")
def controlnet(tiny) -> ControlNetModel:
    return tiny.load_controlnet(FOLDER / "controlnet")


@pytest.fixture(scope="module")
def examples() -> list[tuple[str, mx.array, data.Scene]]:
    """Caption, hint [64, 64, 3] in 0..1 and scene of one held-out picture of each of six shapes."""
    found = {}
    for caption, image, scene in data.held_out_examples(60, seed=4):
        hint = mx.array(to_hint(image).astype(np.float32) / 255)
        found.setdefault(scene.things[0].shape, (caption, hint, scene))
    return [found[shape] for shape in ("star", "moon", "heart", "triangle", "cross", "square")]


def test_diffusers_reads_the_controlnet_and_computes_the_same(controlnet):
    theirs = diffusers.ControlNetModel.from_pretrained(FOLDER / "controlnet", torch_dtype=torch.float32)
    x, context, hint = normal(2, 16, 12, 4, seed=1), normal(2, 77, 128, seed=2), abs(normal(2, 64, 48, 3, seed=3))
    temb = controlnet.embed_time(mx.array([7, 801]), mx.float32)
    down, mid = controlnet(mx.array(x), temb, mx.array(context), controlnet.embed(mx.array(hint)))
    with torch.no_grad():
        expected = theirs(nchw(x), torch.tensor([7, 801]), torch.from_numpy(context), nchw(hint), return_dict=False)
    for ours, want in zip([*down, mid], [*expected[0], expected[1]], strict=True):
        assert float(want.abs().max()) > 0.1  # trained: its last convolutions began at zero
        assert relative_error(ours, nhwc(want)) <= 1e-4


def test_without_a_caption_the_edges_alone_are_followed(tiny, controlnet, examples):
    overlaps, without = [], []
    for seed, (_, hint, scene) in enumerate(examples):
        run = {"seed": seed, "num_steps": 10, "cfg_weight": 1}  # no caption, nothing to strengthen
        overlaps.append(overlap(draw(tiny, "", controls=[Control(controlnet, hint)], **run)[0], scene))
        without.append(overlap(draw(tiny, "", **run)[0], scene))
    assert np.mean(overlaps) > 0.8 and np.mean(overlaps) > np.mean(without) + 0.3, (overlaps, without)


def test_with_a_caption_the_edges_say_where_and_the_words_which_colours(tiny, controlnet, examples):
    overlaps, without = [], []
    for seed, (caption, hint, scene) in enumerate(examples[:3]):
        (followed,) = draw(tiny, caption, seed=seed, controls=[Control(controlnet, hint)])
        assert all(score.score_single(followed, scene).values()), caption
        overlaps.append(overlap(followed, scene))
        without.append(overlap(draw(tiny, caption, seed=seed)[0], scene))
    assert np.mean(overlaps) > 0.8 and np.mean(overlaps) > np.mean(without) + 0.15, (overlaps, without)

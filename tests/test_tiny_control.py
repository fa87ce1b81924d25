"""The ControlNet of the bundled tiny model: its files, and that edges are followed, by pixels."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

import stable_diffusion
from oracle import nchw, nhwc, normal, relative_error
from stable_diffusion import StableDiffusion
from stable_diffusion.diffusion.controls import Control
from stable_diffusion.models.controlnet import ControlNetModel
from tools.tiny import data, score
from tools.tiny.evaluate_control import overlap
from tools.tiny.train_control import to_hint

FOLDER = Path(stable_diffusion.__file__).parent / "tiny" / "controlnet"
SHAPES = ("star", "moon", "heart", "triangle", "cross", "square")


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion:
    return StableDiffusion("tiny")


@pytest.fixture(scope="module")
def controlnet(tiny) -> ControlNetModel:
    return tiny.load_controlnet(FOLDER)


@pytest.fixture(scope="module")
def examples() -> list[tuple[str, mx.array, data.Scene]]:
    """Caption, hint [64, 64, 3] in 0..1 and scene of one held-out picture of each shape in SHAPES."""
    found = {}
    for caption, image, scene in data.held_out_examples(60, seed=4):
        hint = mx.array(to_hint(image).astype(np.float32) / 255)
        found.setdefault(scene.things[0].shape, (caption, hint, scene))
    return [found[shape] for shape in SHAPES]


def draw(tiny: StableDiffusion, caption: str, seed: int, *controls: Control, **options) -> np.ndarray:
    """uint8 [64, 64, 3]."""
    *_, x_0 = tiny.generate_latents(caption, seed=seed, controls=controls, **options)
    return (np.array(tiny.decode(x_0))[0] * 255 + 0.5).astype(np.uint8)


def test_the_files_are_small_and_of_diffusers_layout():
    assert {file.name for file in FOLDER.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 3e6
    assert json.loads((FOLDER / "config.json").read_text())["_class_name"] == "ControlNetModel"


def test_diffusers_reads_the_folder_and_computes_the_same(controlnet):
    from diffusers import ControlNetModel as Oracle

    oracle = Oracle.from_pretrained(FOLDER, torch_dtype=torch.float32)
    x, context, hint = normal(2, 16, 12, 4, seed=1), normal(2, 77, 128, seed=2), abs(normal(2, 64, 48, 3, seed=3))
    t = [7, 801]
    down, mid = controlnet(
        mx.array(x), controlnet.embed_time(mx.array(t), mx.float32), mx.array(context), controlnet.embed(mx.array(hint))
    )
    with torch.no_grad():
        expected = oracle(nchw(x), torch.tensor(t), torch.from_numpy(context), nchw(hint), return_dict=False)
    assert len(down) == len(expected[0])
    for ours, theirs in zip([*down, mid], [*expected[0], expected[1]], strict=True):
        assert float(theirs.abs().max()) > 0.1  # trained: its last convolutions began at zero
        assert relative_error(ours, nhwc(theirs)) <= 1e-4


def test_without_a_caption_the_edges_alone_are_followed(tiny, controlnet, examples):
    quick = {"num_steps": 10, "cfg_weight": 1}  # no caption, nothing to strengthen
    overlaps, without = [], []
    for seed, (_, hint, scene) in enumerate(examples):
        followed = draw(tiny, "", seed, Control(controlnet, hint), **quick)
        overlaps.append(overlap(followed, scene))
        without.append(overlap(draw(tiny, "", seed, **quick), scene))
    assert np.mean(overlaps) > 0.8 and np.mean(overlaps) > np.mean(without) + 0.3, (overlaps, without)


def test_with_a_caption_the_edges_say_where_and_the_words_which_colours(tiny, controlnet, examples):
    overlaps, without = [], []
    for seed, (caption, hint, scene) in enumerate(examples[:3]):
        followed = draw(tiny, caption, seed, Control(controlnet, hint))
        assert all(score.score_single(followed, scene).values()), caption
        overlaps.append(overlap(followed, scene))
        without.append(overlap(draw(tiny, caption, seed), scene))
    assert np.mean(overlaps) > 0.8 and np.mean(overlaps) > np.mean(without) + 0.15, (overlaps, without)

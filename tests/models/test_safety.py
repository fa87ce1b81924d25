"""The safety checker against diffusers: its decision, its files, and what it keeps a script from writing."""

import os
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker as Oracle
from PIL import Image
from transformers import CLIPConfig

from command_line import ROOT, pixels
from image_prompts import VISION
from oracle import nchw, normal, perturb, tensors
from stable_diffusion import StableDiffusion
from stable_diffusion.app.engine import Result
from stable_diffusion.app.request import Request, Sweep, expand
from stable_diffusion.app.results import OutputSettings, ResultWriter
from stable_diffusion.images.image import clip_pixels
from stable_diffusion.planning import RunDefaults
from stable_diffusion.weights.formats.original import to_diffusers
from stable_diffusion.weights.load import build, fill
from test_full_size import check, oracle_shapes

_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def checker(vision: dict = VISION) -> Oracle:
    config = CLIPConfig(vision_config=vision, text_config=_TEXT, projection_dim=vision["projection_dim"])
    return Oracle(config)


def small_checker() -> Oracle:
    """A random checker that tells pictures apart."""
    torch.manual_seed(0)
    oracle = checker()
    for parameter in oracle.parameters():
        if parameter.ndim in (2, 4):
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return perturb(oracle)


def random_checker(pixels: np.ndarray) -> Oracle:
    """A checker whose thresholds are near the scores of ``pixels``, so that rounding and adjustment decide."""
    oracle = small_checker()
    oracle.concept_embeds.copy_(torch.randn(17, 80))
    oracle.special_care_embeds.copy_(torch.randn(3, 80))
    features = torch.nn.functional.normalize(oracle.visual_projection(oracle.vision_model(nchw(pixels))[1]))
    for name, margin in (("concept_embeds", 0.004), ("special_care_embeds", -0.0002)):
        rows = torch.nn.functional.normalize(getattr(oracle, name))
        highest = (features @ rows.T).sort(dim=0).values[-3]  # exceeded by two of the pictures
        getattr(oracle, f"{name}_weights").copy_(highest + margin)
        getattr(oracle, f"{name}_weights")[1:] = 9  # one concept decides
    return oracle


def test_the_decision_is_that_of_diffusers():
    """Also where a concept of special care makes the others stricter, and at the third digit."""
    x = normal(10, 42, 42, 3)
    oracle = random_checker(x)
    ours = build("safety_checker", oracle.config.to_dict())
    fill(ours, to_diffusers("safety_checker", tensors(oracle)))
    thresholds, none = oracle.concept_embeds_weights.clone(), [np.zeros((1, 1, 3))] * len(x)
    counts = []
    for shift in (-0.1, -0.012, -0.0046, -0.0044, 0.0, 0.1):
        oracle.concept_embeds_weights.copy_(thresholds + shift)
        ours.concept_embeds_weights = mx.array(oracle.concept_embeds_weights.numpy())
        flags = ours(mx.array(x)).tolist()
        assert flags == oracle(nchw(x), list(none))[1]
        counts.append(sum(flags))
    assert len(set(counts)) >= 4 and counts[2] == counts[3] + 1  # an excess of 0.0006 counts, 0.0004 does not
    ours.concept_embeds_weights = mx.array((thresholds - 0.012).numpy())
    ours.special_care_embeds_weights += 9
    assert sum(ours(mx.array(x)).tolist()) == counts[1] - 1  # one was flagged by the stricter thresholds


def test_parameters_are_those_of_the_published_checker():
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    large |= {"image_size": 224, "patch_size": 14, "projection_dim": 768}
    config = {"vision_config": large, "projection_dim": 768, "text_config": _TEXT, "architectures": ["x"]}
    shapes = oracle_shapes(lambda: checker(large))
    # The published file has one more "vision_model." and the buffer of old versions.
    published = {name.replace("vision_model.", "vision_model.vision_model.", 1): s for name, s in shapes.items()}
    published["vision_model.vision_model.embeddings.position_ids"] = (1, 257)
    assert round(4 * check("safety_checker", config, published) / 1e6) == 1216


# --- files and scripts ---------------------------------------------------------------------------------------------


PROMPT = "a {red|green} circle on a white background"
SIZE = ["--steps", 3, "--n_images", 2, "--seed", 3, "--cfg", 1]


def draw(sd: StableDiffusion, colour: str, seed: int) -> Image.Image:
    return sd.generate(f"a {colour} circle on a white background", seed=seed, num_steps=3, cfg_weight=1)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The bundled model with a checker that flags the first of four pictures; beside it, one that flags all."""
    folder = tmp_path_factory.mktemp("safety") / "model"
    shutil.copytree(ROOT / "stable_diffusion" / "tiny", folder)
    sd, oracle = StableDiffusion(folder), small_checker()
    oracle.special_care_embeds_weights.fill_(9)
    pictures = [draw(sd, colour, seed) for colour in ("red", "green") for seed in (3, 4)]
    seen = oracle.visual_projection(oracle.vision_model(nchw(np.array(clip_pixels(pictures, 42))))[1])
    seen = torch.nn.functional.normalize(seen)
    oracle.concept_embeds.copy_(seen[:1].expand(17, -1))
    second = (seen @ seen[0]).sort().values[-2].item()
    assert second < 0.995
    for threshold, name in (((1 + second) / 2, "model/safety_checker"), (-9.0, "strict")):
        oracle.concept_embeds_weights.fill_(threshold)
        oracle.save_pretrained(folder.parent / name)
    return folder


def test_python(model):
    sd = StableDiffusion(model)
    check = sd.load_safety_checker()
    pictures = [draw(sd, "red", seed) for seed in (3, 4)]
    assert check(pictures) == [True, False] and check(pictures[1]) == [False]
    assert sd.load_safety_checker(model.parent / "strict")(pictures) == [True, True]
    assert StableDiffusion(model, low_memory=True).load_safety_checker()(pictures) == [True, False]
    with pytest.raises(ValueError, match=r"^tiny has no safety_checker: .*; set safety_model, for example to"):
        StableDiffusion("tiny").load_safety_checker()


def test_flagged_images_are_not_written_and_all_others_are_as_without(run, model, tmp_path):
    run("txt2image", PROMPT, "--model", model, *SIZE, "--batch_size", 2, "--output", tmp_path / "all.png").succeeded()
    options = ["--model", model, *SIZE, "--safety_check", "--stepwise", tmp_path / "steps.webp", "--batch_size", 2]
    done = run("txt2image", PROMPT, *options, "--output", tmp_path / "some.png").succeeded()
    names = ["some_2.png", "some_3.png", "some_4.png"]
    assert sorted(path.name for path in tmp_path.glob("some*")) == ["some.png", *names]
    written = [Path(line.partition(" seed")[0]).name for line in done.out]
    assert written == [*names, "steps.webp", "some.png"]  # the animation is that of the second batch
    for name in names:
        assert np.array_equal(pixels(tmp_path / name), pixels(tmp_path / name.replace("some", "all")))
    (remark,) = done.remarks
    assert remark.endswith(
        "1 of 4 images are omitted: the safety check flagged them; it can be wrong, try another seed"
    )
    mine, whole = pixels(tmp_path / "some.png"), pixels(tmp_path / "all.png")
    assert (mine[:64, :64] == 255).all() and np.array_equal(mine[:, 72:], whole[:, 72:])  # white in the grid


def test_where_all_are_flagged_there_is_no_file(run, model, tmp_path):
    options = ["--model", model, *SIZE, "--safety_check", "--safety_model", model.parent / "strict"]
    done = run("txt2image", PROMPT, *options, "--output", tmp_path / "out.png", "--json").succeeded()
    assert done.out == [] and list(tmp_path.iterdir()) == [] and "4 of 4 images are omitted" in done.remarks[0]


def test_an_image_that_another_mac_withholds_is_not_written_after_gathering(tmp_path):
    requests = expand([(Request(prompt="x", seed=1, n_images=2), Sweep())])
    writers = [ResultWriter(requests, OutputSettings(str(tmp_path / f"{i}.png"), no_metadata=True)) for i in (1, 2)]
    for number, (writer, level) in enumerate(zip(writers, (9, 0), strict=True)):
        writer.is_flagged = lambda image: image.getpixel((0, 0)) == (0, 0, 0)
        image, batch = Image.new("RGB", (8, 8), (level,) * 3), Mock()
        batch.defaults = RunDefaults("euler", 2, 1.0)
        list(writer.add(Result(requests[number], image, batch, 0, 1.0, "", None, None), None, number))
    sent = []
    list(writers[1].gather(lambda data: [b"", sent.append(data) or data], False))
    assert list(writers[0].gather(lambda data: [data, sent.pop(0)], True)) == []
    assert writers[0].has_all and writers[0].withheld == writers[1].withheld == {1}
    (grid,) = writers[0].finish()
    assert grid["images"] == [str(tmp_path / "1_1.png")] and sorted(os.listdir(tmp_path)) == ["1.png", "1_1.png"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--safety_model x", "--safety_model has no effect without --safety_check"),
        ("--safety_check --preview p.png", "--preview shows images before --safety_check has seen them"),
        ("--safety_check", "has no safety_checker: .* set --safety_model, for example to CompVis/"),
    ],
)
def test_refused_in_one_line(run, flags, message):
    done = run("txt2image", "x", "--model", "tiny", *flags.split())
    assert done.code == 2 and re.search(message, done.err) and done.err.count("\n") == 1

"""The command line of models without prompts."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest

from command_line import names, pixels
from stable_diffusion import UnconditionalDiffusion, to_images
from stable_diffusion.images.files import read_text
from test_unconditional import _LDM, save

STEPS = {"num_train_timesteps": 100}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    save(folder / "ddpm", "DDPMPipeline", diffusers.DDPMScheduler(**STEPS), sample_size=32)
    save(folder / "ldm", "LDMPipeline", diffusers.DDIMScheduler(**STEPS, **_LDM))
    return {name: folder / name for name in ("ddpm", "ldm")}


@pytest.fixture
def draw(run, models, tmp_path):
    """Make one picture in three steps, or as the flags say."""

    def call(*flags, model: str = "ddpm") -> np.ndarray:
        usual = ["--model", models[model], "--steps", 3, "--seed", 3, "--n_images", 1]
        run("unconditional", *usual, "--output", tmp_path / "made.png", "--overwrite", *flags).succeeded()
        return pixels(tmp_path / "made.png")

    return call


def test_pictures_are_those_of_python_and_are_made_again(run, models, tmp_path):
    out = tmp_path / "cat.png"
    flags = ["--steps", 4, "--n_images", 2, "--sampler", "ddim", "--seed", 7, "--preview", tmp_path / "now.png"]
    run("unconditional", "--model", models["ddpm"], *flags, "--output", out).succeeded()
    assert names(tmp_path) == ["cat.png", "cat_1.png", "cat_2.png", "now.png"]
    expected = UnconditionalDiffusion(models["ddpm"]).generate(2, num_steps=4, seed=7, sampler="ddim")
    for i, picture in enumerate(expected, start=1):
        assert np.abs(pixels(tmp_path / f"cat_{i}.png") - np.asarray(picture).astype(int)).max() <= 1
    record = json.loads(read_text(tmp_path / "cat_2.png")["stable_diffusion"])
    assert record["script"] == "unconditional" and record["arguments"]["seed"] == 8
    assert list(record["files"]) == ["ddpm unet/diffusion_pytorch_model.safetensors"]
    again = run(
        "unconditional",
        "--from_image",
        tmp_path / "cat_2.png",
        "--output",
        tmp_path / "again.png",
        "--trust",
        "--model",
        models["ddpm"],
    )
    again.succeeded()
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "cat_2.png"))


def test_latents_are_decoded(draw, models):
    sd, made = UnconditionalDiffusion(models["ldm"]), draw(model="ldm")
    *_, x = sd.generate_latents(1, 3, seed=3)
    assert made.shape == (32, 32, 3)
    assert np.abs(made - np.asarray(to_images(sd.decode(x))[0]).astype(int)).max() <= 1


def test_what_flags_change(draw):
    plain, flags = draw(), "--seed 4; --steps 4; --width 40; --height 48; --sampler ddim --eta 0.5; --schedule karras; "
    flags += "--noise_source torch; --s_noise 0.5; --deep_cache 2; --freeu 1.5,1.6,0.9,0.2; --eta_noise_seed_delta 1; "
    for flag in (flags + "--variation_strength 0.5 --variation_seed 1; --sampler heun --s_churn 1").split("; "):
        made = draw(*flag.split())
        assert made.shape != plain.shape or np.abs(made - plain).max() > 1, flag
    for flag in ("--low_memory", "--memory_limit 2", "--batch_size 1", "--dtype float32"):
        assert np.abs(draw(*flag.split()) - plain).max() <= 1, flag


def test_what_is_refused(run, models):
    for flags, words in {
        "--model tiny": ["tiny is a 'StableDiffusionPipeline'", "DDPMPipeline"],
        f"--model {models['ddpm']} --width 16": ["--width", "a multiple of 8 from 32"],
        "--negative_prompt red": ["--negative_prompt is a flag of image2image and txt2image"],
        "cat": ["unexpected words: cat"],
    }.items():
        run("unconditional", *flags.split()).refused(*words)
    run("txt2image", "a cat", "--model", models["ddpm"]).refused("takes no prompt: use UnconditionalDiffusion")

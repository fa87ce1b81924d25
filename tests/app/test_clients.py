"""Programs that read how a picture was made read ours: sd-parsers, SD Prompt Reader and ExifTool."""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from sd_parsers import ParserManager

from cli.test_images import noise, write_lora
from stable_diffusion.app.fingerprints import lora_hash, model_hash
from stable_diffusion.images.files import read_text, save

PROMPT, NEGATIVE = "the red cat, ünïcödé 富士山", "blue, \U0001f600"
SHOWN = f"{PROMPT} <lora:paint:0.5>"


def need(is_installed: object, remedy: str) -> None:
    """Skip a test whose program is not installed, except in CI, where it fails."""
    if not is_installed:
        (pytest.fail if "CI" in os.environ else pytest.skip)(remedy)


@pytest.fixture(scope="module")
def made(sd1_folder, tmp_path_factory) -> tuple[dict[str, str], dict[str, str]]:
    """The texts of a picture that was made with a LoRA, and the settings that they name."""
    from stable_diffusion.cli import main as cli

    folder = tmp_path_factory.mktemp("clients")
    write_lora(folder / "paint.safetensors")
    options = ["--negative_prompt", NEGATIVE, "--seed", "7", "--steps", "2", "--sampler", "dpmpp_2m", "--cfg", "3.5"]
    options += ["--schedule", "karras", "--width", "64", "--height", "72", "--n_images", "1", "--model", sd1_folder]
    options += ["--lora", f"{folder / 'paint.safetensors'}:0.5", "--output", folder / "a.png"]
    assert cli.txt2image([PROMPT, *map(str, options)]) == 0
    weights = sd1_folder / "unet" / "diffusion_pytorch_model.safetensors"
    settings = {"Model": sd1_folder.name, "Model hash": model_hash(weights), "Sampler": "DPM++ 2M", "Seed": "7"}
    settings |= {"Steps": "2", "CFG scale": "3.5", "Size": "64x72", "Schedule type": "Karras"}
    return read_text(folder / "a.png"), settings | {"LoRA": lora_hash(folder / "paint.safetensors")}


@pytest.fixture(params=["png", "jpg", "webp"])
def picture(request, made, tmp_path) -> Path:
    save(noise(), tmp_path / f"a.{request.param}", made[0])
    return tmp_path / f"a.{request.param}"


def test_sd_parsers(picture, made):
    found, settings = ParserManager().parse(picture), made[1]
    (sampler,) = found.samplers
    assert [prompt.value for prompt in (*sampler.prompts, *sampler.negative_prompts)] == [SHOWN, NEGATIVE]
    assert (sampler.name, sampler.model.name, sampler.model.hash) == tuple(
        settings[name] for name in ("Sampler", "Model", "Model hash")
    )
    assert sampler.parameters == {"seed": "7", "steps": "2", "cfg_scale": "3.5", "scheduler": "Karras"}
    assert found.metadata["Size"] == "64x72"
    assert found.metadata["Hashes"] == {"model": settings["Model hash"], "lora:paint": settings["LoRA"][:10]}


def test_sd_prompt_reader(picture, made):
    need(importlib.util.find_spec("sd_prompt_reader"), "pip install --no-deps -r tests/requirements-no-deps.txt")
    from sd_prompt_reader.format import BaseFormat
    from sd_prompt_reader.image_data_reader import ImageDataReader

    reader, settings = ImageDataReader(str(picture)), made[1]
    assert reader.status == BaseFormat.Status.READ_SUCCESS and reader.tool == "A1111 webUI"
    assert (reader.positive, reader.negative) == (SHOWN, NEGATIVE)
    names = {"cfg": "CFG scale"} | {name: name.title() for name in ("model", "sampler", "seed", "steps", "size")}
    assert reader.parameter == {key: settings[name] for key, name in names.items()}
    assert f'Lora hashes: "paint: {settings["LoRA"]}"' in reader.setting


def test_exiftool(picture, made):
    """Without warnings, and without a caption."""
    need(program := shutil.which("exiftool"), "apt-get install libimage-exiftool-perl, or brew install exiftool")
    done = subprocess.run([program, "-json", picture], check=True, capture_output=True, text=True, timeout=60)
    (found,) = json.loads(done.stdout)
    text = found["Parameters" if picture.suffix == ".png" else "UserComment"]
    record = found["Stable_diffusion" if picture.suffix == ".png" else "ImageHistory"]
    assert text == made[0]["parameters"] and record == made[0]["stable_diffusion"]
    assert not {"Warning", "ImageDescription", "Description"} & found.keys()
    settings = {name: value for name, value in made[1].items() if name != "LoRA"}
    assert all(f"{name}: {value}" in text for name, value in settings.items()) and made[1]["LoRA"] in text

"""Pictures that say how they were made: what is in them, and that they are made again from it, pixel for pixel."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler

from app.test_infotext import as_others_read
from checkpoints import SCALED, make
from cli.test_images import noise, rectangle, write_lora
from command_line import PROMPT, pixels
from stable_diffusion.app import metadata, results
from stable_diffusion.app.fingerprints import fingerprint, lora_hash
from stable_diffusion.app.metadata import describe, read_record
from stable_diffusion.app.request import Request, expand
from stable_diffusion.app.results import OutputSettings
from stable_diffusion.cli import arguments as cli_arguments
from stable_diffusion.images.files import read_text, save
from test_parity_images import control_nets

QUICK = ["--width", 64, "--height", 64, "--steps", 2]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Pictures, LoRAs and a ControlNet."""
    folder = tmp_path_factory.mktemp("files")
    noise().save(folder / "in.png")
    noise(seed=1).save(folder / "hint.png")
    rectangle((32, 0, 64, 32)).save(folder / "mask.png")
    (folder / "loras").mkdir()
    write_lora(folder / "loras" / "paint.safetensors")
    write_lora(folder / "more.safetensors", seed=1)
    control_nets("sd1", 1)[0][0].save_pretrained(folder / "net")
    return folder


Draw = Callable[..., list[Path]]


@pytest.fixture
def draw(run, tmp_path, monkeypatch) -> Draw:
    """Run a script with ``options`` and return the images that it wrote, without a grid.

    They name files by whole paths, so that these are found again.
    """
    monkeypatch.chdir(tmp_path)
    count = iter(range(100))

    def call(script: str, *options, suffix: str = ".png") -> list[Path]:
        folder = tmp_path / f"{next(count)}"
        folder.mkdir()
        draw.done = run(
            script, *options, "--no_grid", "--full_paths", "--output", folder / f"{{i}}{suffix}"
        ).succeeded()
        return sorted(folder.iterdir(), key=lambda path: int(path.stem))

    draw = call
    return call


def again(draw: Draw, script: str, path: Path, *options) -> Path:
    (made,) = draw(script, "--from_image", path, *options, suffix=path.suffix)
    return made


def said_by(draw: Draw) -> list[str]:
    """Return the remarks of the last run, without the program's name."""
    return [line.partition(": ")[2] for line in draw.done.remarks]


def assert_same(one: Path, other: Path, levels: int = 0) -> None:
    """The same pixels, and the same said of them. What was made in a batch is rounded otherwise in another one."""
    assert np.abs(pixels(one) - pixels(other)).max() <= levels
    said = read_text(one), read_text(other)
    if levels:
        for texts in said:
            texts["stable_diffusion"] = json.loads(texts["stable_diffusion"])
            assert texts["stable_diffusion"]["made"].pop("batch")
    assert said[0] == said[1]


# --- made again ------------------------------------------------------------------------------------------------------


def test_an_image_of_several(draw, sd1_folder):
    options = ["--seed", 7, "--sampler", "euler_a", "--negative_prompt", "blue", "--model", sd1_folder, *QUICK]
    for size in (1, 3):
        images = draw("txt2image", PROMPT, "--n_images", 4, "--batch_size", size, *options)
        assert [read_record(path).arguments["seed"] for path in images] == [7, 8, 9, 10]
        assert_same(images[2], again(draw, "txt2image", images[2]), levels=int(size > 1))
    assert draw.done.remarks == []


def test_what_lists_and_alternatives_came_to(draw, sd1_folder):
    lists = ["--steps", "1,2", "--sampler", "euler,ddim", "--batch_size", 1, "--seed", 3, "--model", sd1_folder]
    images = draw("txt2image", "the {red|blue} cat", *lists, "--width", 64, "--height", 64)
    said = [read_record(path).arguments for path in images]
    wanted = set(product((1, 2), ("euler", "ddim"), ("red", "blue")))
    assert {(a["steps"], a["sampler"], a["resolved_prompt"].split()[1]) for a in said} == wanted
    assert {a["prompt"] for a in said} == {"the {red|blue} cat"}
    assert_same(images[6], again(draw, "txt2image", images[6]))


def test_prompts_are_recorded_as_typed(draw, sd1_folder):
    """Also those that alternatives stand in, whatever signs are beside them."""
    typed = r"[small] ((big)) (cat):1.20 :) [a:b:.50] [red|blue|] \\(x\\) a\_b"
    (path,) = draw("txt2image", typed, "--model", sd1_folder, *QUICK, "--n_images", 1)
    paths = draw("txt2image", typed + " {the|on)}", "--model", sd1_folder, *QUICK, "--n_images", 1)
    texts = [read_text(path)["parameters"].partition("\n")[0] for path in (path, *paths)]
    assert texts == [typed, typed + " the", typed + " on)"]


def test_a_masked_image_in_another_format(draw, sd1_folder, files):
    options = ["--mask", files / "mask.png", "--mask_blur", 1.5, "--strength", 0.7, "--quality", 60, "--resize", "pad"]
    image = [files / "in.png", "red", "--model", sd1_folder, "--steps", 3, "--n_images", 1]
    (path,) = draw("image2image", *image, *options, suffix=".jpg")
    assert_same(path, again(draw, "image2image", path, "--quality", 60))
    assert read_record(path).details["script"] == "image2image"
    assert {str(files / name) for name in ("in.png", "mask.png")} < read_record(path).details["files"].keys()


def test_loras_and_quantized_weights(draw, sd1_folder, files):
    options = ["--lora_dir", files / "loras", "--lora", f"{files}/more.safetensors:0.00001", "--lora"]
    options += [files / "loras" / "paint.safetensors", "--unet_bits", 4]
    prompt = "red <lora:paint:0.25> cat <lora:paint.safetensors:-.5>"
    (path,) = draw("txt2image", prompt, "--model", sd1_folder, *QUICK, "--n_images", 1, *options)
    record = dict(read_record(path).details)
    assert record["arguments"]["prompt"] == prompt
    assert record["made"]["bits"] == {"unet": 4} and "sampler" not in record["arguments"]
    assert_same(path, again(draw, "txt2image", path))
    hash_ = lora_hash(files / "loras" / "paint.safetensors")
    assert f"paint: {hash_}" in as_others_read(read_text(path)["parameters"])[2]["Lora hashes"]


def test_a_controlnet_and_a_second_pass(draw, sd1_folder, files):
    net = ["--controlnet", f"{files}/net:0.5", "--control_image", files / "hint.png", "--control_end", 0.9, "--canny"]
    hires = ["--hires", 1.5, "--hires_steps", 3, "--hires_upscaler", "pixels", "--guidance_interval", "0.1,0.9"]
    (path,) = draw("txt2image", PROMPT, "--model", sd1_folder, *QUICK, "--n_images", 1, *net, *hires)
    assert pixels(path).shape == (96, 96, 3)
    assert_same(path, again(draw, "txt2image", path))
    assert any("net controlnet/" in name for name in read_record(path).details["files"])
    settings = as_others_read(read_text(path)["parameters"])[2]
    shown = {"ControlNet 0": "Model: net, Weight: 0.5", "Denoising strength": "0.5", "Hires upscale": "1.5"}
    assert shown.items() < settings.items() and settings["Hires upscaler"] == "Lanczos"


def test_the_text_names_loras_once(draw, sd1_folder, files, tmp_path):
    """Those of --lora stand in the prompt as others name them, and a run that reads the text does not double them."""
    lora = ["--lora", f"{files / 'loras' / 'paint.safetensors'}:0.5", "--lora_dir", files / "loras"]
    options = ["--model", sd1_folder, *QUICK, "--n_images", 1, "--seed", 1, "--eta", 0.5]
    (path,) = draw("txt2image", "red <lora:paint:0.25>", *lora, *options)
    text = read_text(path)["parameters"]
    assert text.startswith("red <lora:paint:0.5> <lora:paint:0.25>\n") and "Eta: 0.5, " in text
    (path,) = draw("txt2image", "red", *lora[:2], *options)
    save(noise(), tmp_path / "text.png", {"parameters": read_text(path)["parameters"]})
    (made,) = draw("txt2image", "--from_image", "text.png", "--model", sd1_folder, *lora[2:])
    assert read_text(made)["parameters"] == read_text(path)["parameters"]
    assert np.abs(pixels(made) - pixels(path)).max() <= 1  # attached where it was fused
    again(draw, "txt2image", path)
    assert read_text(path)["parameters"].count("<lora:") == 1


def test_a_grid_has_the_record_of_its_first_image(run, sd1_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--model", sd1_folder, *QUICK, "--seed", 7]
    run("txt2image", PROMPT, *options, "--n_images", 2, "--output", "a.jpg").succeeded()
    run("txt2image", PROMPT, *options, "--cfg", "1,2", "--output", "b.png").succeeded()
    run("txt2image", PROMPT, *options, "--n_images", 2, "--no_metadata", "--output", "c.png").succeeded()
    for grid, first in (("a.jpg", "a_1.jpg"), ("b.png", "b_1.png")):
        assert read_text(tmp_path / grid) == read_text(tmp_path / first) and read_record(grid).arguments["seed"] == 7
    assert read_text(tmp_path / "c.png") == {}


def test_the_defaults_of_a_model(draw, xl_folder):
    (path,) = draw("txt2image", PROMPT, "--model", xl_folder, "--n_images", 1, "--height", 64)
    said = read_record(path).arguments
    assert (said["width"], said["height"], said["steps"], said["cfg"], said["sampler"]) == (128, 64, 2, 0, "euler_a")
    assert_same(path, again(draw, "txt2image", path))
    (path,) = draw("txt2image", "a red circle", "--model", "tiny", "--n_images", 1, "--steps", 3, "--refiner", "tiny")
    assert_same(path, again(draw, "txt2image", path))
    shown = {"Model": "tiny", "Refiner": "tiny", "Refiner switch at": "0.8", "CFG scale": "4"}
    assert shown.items() < as_others_read(read_text(path)["parameters"])[2].items()
    assert "tiny unet/diffusion_pytorch_model.safetensors" in read_record(path).details["files"]


def test_the_texts_and_sizes_of_xl(draw, xl_folder):
    sizes = ["--original_size", "96x640", "--crop", "0,99", "--negative_target_size", "8x16", "--aesthetic_score", 5]
    texts = ["--prompt_2", 'the "blue", cat', "--negative_prompt_2", "", "--cfg", 4]
    (path,) = draw("txt2image", PROMPT, "--model", xl_folder, *QUICK, "--n_images", 1, *texts, *sizes)
    assert said_by(draw) == ["aesthetic_score has no effect: only SDXL's refiner reads it"]
    said = read_record(path).arguments
    assert (said["original_size"], said["crop"], said["negative_target_size"]) == ([640, 96], [99, 0], [16, 8])
    assert_same(path, again(draw, "txt2image", path))
    settings = as_others_read(read_text(path)["parameters"])[2]
    assert (settings["Prompt 2"], settings["Negative prompt 2"]) == ('the "blue", cat', "")


# --- flags in place of what a picture says ---------------------------------------------------------------------------


def parsed(script: str, *words: object) -> dict:
    """Return the values of the only request of a script that are not the defaults, and of its sweep."""
    ((request, sweep),) = cli_arguments.read(script, [*map(str, words), "--trust"]).lines
    return request.to_dict() | dict(sweep)


COMMON = {"prompt": PROMPT, "n_images": 1, "seed": 7, "cfg": 3.0, "steps": 4, "negative_prompt": "x"}
COMMON |= {"dtype": "bfloat16", "quantize": True}


@pytest.fixture
def picture(tmp_path) -> Path:
    return with_record(tmp_path / "picture.png", COMMON | {"lora": [["a", 0.5], ["b", 1.0]]})


@pytest.mark.parametrize(
    "words, said",
    [
        ([], {}),
        (["a dog", "--cfg=2", "--negative-prompt", ""], {"prompt": "a dog", "cfg": 2.0, "negative_prompt": None}),
        (["--steps", "1,2", "--sampler", "euler"], {"steps": (1, 2), "sampler": "euler"}),
        (["--lora", "c", "--n_images", "3"], {"lora": (("c", 1.0),), "n_images": 3}),
        (["--without", "lora", "--without=--quantize"], {"lora": None, "quantize": None}),
        (["--without", "negative-prompt", "--without", "vae"], {"negative_prompt": None}),
        (["--without", "cfg", "--cfg", "2"], {"cfg": 2.0}),
        (["--original_size", "640x96", "--crop", "1,2"], {"original_size": (96, 640), "crop": (2, 1)}),
        (["--seed", "4,2"], {"seed": (4, 2), "n_images": None}),
    ],
)
def test_flags_and_prompts_take_the_place_of_what_is_recorded(picture, words, said):
    wanted = COMMON | {"lora": (("a", 0.5), ("b", 1.0))} | said
    wanted = {name: value for name, value in wanted.items() if value is not None}
    assert parsed("txt2image", "--from_image", picture, *words) == wanted


def test_texts_of_the_second_encoder_go_with_the_first(tmp_path):
    seconds = {"prompt_2": "film", "negative_prompt_2": "y", "crop": [1, 2]}
    words = ["--from_image", with_record(tmp_path / "a.png", {"prompt": PROMPT, "negative_prompt": "x"} | seconds)]
    crop = {"crop": (1, 2)}
    for more, left in {
        (): seconds | crop,
        ("a dog",): {"negative_prompt_2": "y"} | crop,
        ("--negative_prompt", "z"): {"prompt_2": "film"} | crop,
    }.items():
        said = parsed("txt2image", *words, *more)
        assert {name: value for name, value in said.items() if name in seconds} == left


@pytest.mark.parametrize("half, dtype", [(False, "float32"), (True, None)])
def test_the_type_in_a_record_of_version_0_1(tmp_path, half, dtype):
    path = with_record(tmp_path / "old.png", {"prompt": PROMPT, "float16": half})
    assert parsed("txt2image", "--from_image", path).get("dtype") == dtype
    assert remarks("txt2image", "--from_image", path) == []


def test_what_cannot_be_left_out(picture, run, no_model):
    for name in ("prompt", "output", ""):
        run("txt2image", "--from_image", picture, "--without", name).refused(
            f"--without {name} is not a flag of this picture",
            "choose from cfg, dtype, lora, negative_prompt, quantize, seed",
        )
    run("txt2image", PROMPT, "--without", "cfg").refused("--without has no effect without --from_image")


def remarks(script: str, *words: object) -> list[str]:
    """Return what a script says of the picture that it repeats."""
    return list(cli_arguments.read(script, [*map(str, words), "--trust"]).remarks)


def test_the_other_script(picture, tmp_path):
    image = str(tmp_path / "in.png")
    noise().save(image)
    args = parsed("image2image", image, "--from_image", picture, "--strength", 0.5)
    assert (args["image"], args["prompt"], args["seed"]) == (image, PROMPT, 7)
    left_out = f"{picture} was made with txt2image; settings that only it has are omitted"
    assert remarks("image2image", image, "--from_image", picture) == [left_out]
    path = with_record(tmp_path / "a.png", {"image": "x.png", "prompt": PROMPT, "strength": 0.5}, script="image2image")
    for words, found in {
        (): ("x.png", PROMPT),
        ("y.png",): ("y.png", PROMPT),
        (image,): (image, PROMPT),
        ("a dog",): ("x.png", "a dog"),
        ("y", "a dog"): ("y", "a dog"),
    }.items():
        args = parsed("image2image", "--from_image", path, *words)
        assert (args["image"], args["prompt"], args["strength"]) == (*found, 0.5)
        assert remarks("image2image", "--from_image", path, *words) == []
    assert parsed("txt2image", "--from_image", path)["prompt"] == PROMPT


def test_without_metadata(draw, run, sd1_folder):
    (path,) = draw("txt2image", PROMPT, "--model", sd1_folder, *QUICK, "--n_images", 1, "--no_metadata")
    assert read_text(path) == {}
    run("txt2image", "--from_image", path).refused(str(path), "does not record how it was made", "write a prompt")


# --- what a picture says may be wrong --------------------------------------------------------------------------------


def with_record(path: Path, arguments: object, **more: object) -> Path:
    save(noise(), path, {"stable_diffusion": json.dumps({"script": "txt2image", "arguments": arguments} | more)})
    return path


def test_a_record_that_cannot_be_followed(run, no_model, tmp_path):
    wide = with_record(tmp_path / "a.png", {"prompt": PROMPT, "width": 100})
    run("txt2image", "--from_image", wide).refused("a.png", "--width 100 is not a multiple of 8")
    unnamed = with_record(tmp_path / "b.png", {"prompt": None})
    run("txt2image", "--from_image", unnamed).refused("b.png", "prompt None has the wrong type")


def test_a_record_decides_nothing_about_files_that_are_written(tmp_path):
    evil = {"output": str(tmp_path / "other.png"), "overwrite": True, "prompt_file": "x", "no_metadata": True}
    path = with_record(tmp_path / "a.png", {"prompt": PROMPT, "n_images": 9} | evil)
    command = cli_arguments.read("txt2image", ["--from_image", str(path)])
    assert command.output == OutputSettings() and command.lines[0][0] == Request(prompt=PROMPT, n_images=1)


@pytest.mark.parametrize("text", ["{", "[]", '{"arguments": 3}', "[" * 100_000, ""])
def test_a_record_that_is_none(run, no_model, tmp_path, text):
    save(noise(), tmp_path / "a.png", {"stable_diffusion": text})
    run("txt2image", "--from_image", tmp_path / "a.png").refused("a.png does not record how it was made")
    save(noise(), tmp_path / "a.png", {"stable_diffusion": text, "parameters": "cat\nSteps: 3, Seed: 1, CFG scale: 2"})
    assert read_record(tmp_path / "a.png").arguments["cfg"] == 2


def test_no_picture(run, no_model, tmp_path):
    run("txt2image", "--from_image", tmp_path / "none.png").refused("no image at", "none.png")
    path = with_record(tmp_path / "a.png", {"prompt": PROMPT})
    run("image2image", "--from_image", path).refused("a.png records no image")


def test_flags_of_another_version_are_named(tmp_path):
    path = with_record(tmp_path / "a.png", {"prompt": PROMPT, "sharpness": 3, "aura": "x"}, partial="3 of 20 steps")
    assert remarks("txt2image", "--from_image", path, "--seed", 3) == [
        f"{path} has unknown settings, which are ignored: aura, sharpness",
        f"{path} is a partial image (3 of 20 steps); all steps run here",
    ]


# --- other programs, and what is not as it was -----------------------------------------------------------------------

FOREIGN = """the red cat
Negative prompt: blue
Steps: 2, Sampler: DPM++ 2M Karras, CFG scale: 3, Seed: 5, Size: 64x72, Model hash: 6ce0161689, Model: dreams, \
Clip skip: 2, ENSD: 31337"""


def test_a_picture_of_another_program(draw, sd1_folder, tmp_path):
    save(noise(), tmp_path / "other.png", {"parameters": FOREIGN})
    assert "model dreams, which is not chosen automatically" in remarks("txt2image", "--from_image", "other.png")[0]
    (path,) = draw("txt2image", "--from_image", "other.png", "--model", sd1_folder)
    remark = "other.png was made by another program: expect a similar picture, not the same"
    assert said_by(draw) == [f"{remark} (its noise is drawn as cuda draws it); ignored: Model hash 6ce0161689"]
    said = ["--negative_prompt", "blue", "--steps", 2, "--sampler", "dpmpp_2m", "--schedule", "karras", "--cfg", 3]
    said += ["--rng", "cuda", "--ensd", 31337]
    said += ["--seed", 5, "--width", 64, "--height", 72, "--clip_skip", 1, "--n_images", 1]
    (wanted,) = draw("txt2image", "the red cat", "--model", sd1_folder, *said)
    assert np.array_equal(pixels(path), pixels(wanted))
    assert read_record(path).arguments == read_record(wanted).arguments | {"resolved_prompt": "the red cat"}


def test_braces_of_another_program_are_text(tmp_path):
    """Also where the picture that was made of it is repeated."""
    text = "a {cat|dog}, __x__, 50% # b"
    save(
        noise(),
        tmp_path / "other.png",
        {"parameters": f"{text}\nNegative prompt: {{c|d}}\nSteps: 2, Seed: 5, CFG scale: 3"},
    )
    (line, sweep), *others = cli_arguments.read("txt2image", ["--from_image", str(tmp_path / "other.png")]).lines
    (image,) = expand([(line, sweep)])
    assert not others and (image.text, image.negative_prompt) == (text, "{c|d}")
    (again,) = expand([(Request.from_dict(image.to_dict())[0], {})])
    assert (again.text, again.negative_prompt) == (text, "{c|d}")


@pytest.mark.parametrize(
    "family, flags, skipped",
    [
        ("sd1", [], 1),
        ("sd2", [], 0),
        ("xl", [], 0),
        ("xl", ["--clip_skip", 1], 1),
        ("sd2", ["--clip_skip", 0], 0),
        ("sd1", ["--without", "clip_skip"], 0),
    ],
)
def test_clip_skip_of_another_program_is_that_of_a_family(run, tmp_path, monkeypatch, family, flags, skipped):
    """The web UI has it for Stable Diffusion 1 alone; a flag of ours acts on all."""
    make(tmp_path / family, family, DDIMScheduler(**SCALED))
    save(noise(), tmp_path / "other.png", {"parameters": FOREIGN})
    monkeypatch.chdir(tmp_path)
    run("txt2image", "--from_image", "other.png", "--model", family, *flags, "--output", "a.png").succeeded()
    assert read_record("a.png").arguments.get("clip_skip", 0) == skipped


def test_what_we_say_is_read_as_that_of_another_program(draw, sd1_folder, files, tmp_path):
    options = ["--sampler", "dpm2_a", "--schedule", "exponential", "--clip_skip", 1, "--strength", 0.6, "--cfg", 2.5]
    image = [files / "in.png", PROMPT, "--negative_prompt", "a, b", "--model", sd1_folder, "--n_images", 1, "--seed", 1]
    (path,) = draw("image2image", *image, "--steps", 4, *options)
    save(noise(), tmp_path / "text.png", {"parameters": read_text(path)["parameters"]})
    (made,) = draw("image2image", files / "in.png", "--from_image", "text.png", "--model", sd1_folder)
    assert np.array_equal(pixels(path), pixels(made))


def test_files_and_versions_that_have_changed(draw, sd1_folder, files, tmp_path):
    shutil.copy(files / "in.png", tmp_path / "in.png")
    lora = ["--lora", files / "more.safetensors"]
    (path,) = draw("image2image", "in.png", PROMPT, "--model", sd1_folder, "--steps", 1, "--n_images", 1, *lora)
    noise(seed=5).save(tmp_path / "in.png")
    again(draw, "image2image", path, "--trust")
    assert said_by(draw) == [f"these files differ from those that {path} was made with: in.png"]
    again(draw, "image2image", path, files / "hint.png")  # in place of the one that changed
    assert said_by(draw) == []
    record = dict(read_record(path).details)
    record |= {"software": {"mlx": "0.1", "device": "gpu"}, "files": {"in.png": "damaged"}}
    save(noise(), tmp_path / "old.png", {"stable_diffusion": json.dumps(record)})
    draw("image2image", "--from_image", "old.png", files / "hint.png", "--trust")
    (line,) = said_by(draw)
    assert line.startswith("old.png was made with mlx 0.1 (now ") and line.endswith("the picture may differ")
    assert "device gpu (now " in line


def test_an_unfinished_image_and_files_that_are_gone(draw, sd1_folder, files, tmp_path, monkeypatch):
    """What was made is written, whatever became of the files that it was made from."""
    shutil.copytree(files / "loras", tmp_path / "loras")
    shutil.copy(files / "more.safetensors", tmp_path)
    shutil.copytree(files / "net", tmp_path / "net")
    metadata._open_part.cache_clear()

    def late(*given, **options):
        for path in ("loras/paint.safetensors", "more.safetensors", "net/config.json"):
            (tmp_path / path).unlink(missing_ok=True)
        return describe(*given[:3], "1 of 2 steps", *given[4:])

    monkeypatch.setattr(results, "describe", late)
    options = ["--lora_dir", "loras", "--lora", "more.safetensors", "--controlnet", "net", "--control_image"]
    options += [files / "hint.png", "--model", sd1_folder, *QUICK, "--n_images", 1]
    (path,) = draw("txt2image", "red <lora:paint:1>", *options)
    record = dict(read_record(path).details)
    assert record["partial"] == as_others_read(read_text(path)["parameters"])[2]["Partial"] == "1 of 2 steps"
    assert record["arguments"]["lora"] == [["more.safetensors", 1.0]]
    assert [name for name in record["files"] if not name.startswith(str(sd1_folder))] == [str(files / "hint.png")]


def test_others_read_prompts_as_they_were(draw, sd1_folder):
    prompt = "a \"quoted\": cat, 'red', Steps: 3, Sampler: Euler, Seed: 5; ünïcödé 富士山 \U0001f600 \u202e\u0301"
    options = ["--model", sd1_folder, *QUICK, "--steps", 1, "--n_images", 1, "--negative_prompt", f"no {prompt}"]
    (path,) = draw("txt2image", prompt, *options, "--truncate")
    said = read_record(path).arguments
    text, negative, settings = as_others_read(read_text(path)["parameters"])
    assert (text, negative) == (said["prompt"], said["negative_prompt"]) == (prompt, f"no {prompt}")
    weights = sd1_folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert settings.pop("Model hash") == fingerprint(weights)["sha256"][:10]
    assert settings.pop("Version").startswith("stable-diffusion-mlx ") and settings.pop("Seed").isdecimal()
    named = {"Steps": "1", "Sampler": "DDIM", "Schedule type": "Uniform", "CFG scale": "7.5", "Size": "64x64"}
    assert settings == named | {"Model": sd1_folder.name}


def test_a_long_prompt_of_several_lines(draw, sd1_folder, tmp_path):
    """100 kB, which no command line holds; a NUL is not in the text, which it would end."""
    prompt = "a red\ncat: 富, \0" * 8000 + "end"
    path = with_record(tmp_path / "a.png", {"prompt": prompt, "truncate": True, "emphasis": "none"})
    (made,) = draw("txt2image", "--from_image", path, "--model", sd1_folder, *QUICK, "--steps", 1)
    assert read_record(made).arguments["prompt"] == prompt
    assert as_others_read(read_text(made)["parameters"])[0].split() == prompt.replace("\0", "").split()
    assert_same(made, again(draw, "txt2image", made))


def test_bad_quality(run, no_model):
    run("txt2image", PROMPT, "--quality", 80).refused("--quality", "JPEG", ".jpg")
    run("txt2image", PROMPT, "--quality", 101, "--output", "a.jpg").refused("--quality", "'101'", "1 to 100")

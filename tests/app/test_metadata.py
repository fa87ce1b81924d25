"""Pictures that say how they were made: what is in them, and that they are made again from it, pixel for pixel."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from app.test_infotext import as_others_read
from cli.test_images import noise, rectangle, write_lora
from command_line import PROMPT, pixels
from stable_diffusion.app import fingerprints, results
from stable_diffusion.app.fingerprints import fingerprint, lora_hash, model_hash
from stable_diffusion.app.metadata import _elsewhere, describe
from stable_diffusion.app.records import recorded, repeat
from stable_diffusion.cli.arguments import read, recorded_flags, script_parser
from stable_diffusion.images.image import read_text, save
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
    """Run a script with ``options`` and return the images that it wrote, without a grid."""
    monkeypatch.chdir(tmp_path)
    count = iter(range(100))

    def call(script: str, *options, suffix: str = ".png") -> list[Path]:
        folder = tmp_path / f"{next(count)}"
        folder.mkdir()
        draw.done = run(script, *options, "--no_grid", "--output", folder / f"{{i}}{suffix}").succeeded()
        return sorted(folder.iterdir(), key=lambda path: int(path.stem))

    draw = call
    return call


def again(draw: Draw, script: str, path: Path, *options) -> Path:
    (made,) = draw(script, "--from_image", path, *options, suffix=path.suffix)
    return made


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
        assert [recorded(path)["arguments"]["seed"] for path in images] == [7, 8, 9, 10]
        assert_same(images[2], again(draw, "txt2image", images[2]), levels=int(size > 1))
    assert draw.done.remarks == []


def test_an_image_of_several_with_all_that_were_made_at_once(draw, sd1_folder):
    """In a batch of the same size sums are rounded as they were, to the last bit."""
    options = ["--seed", "7,3,11", "--sampler", "euler_a", "--model", sd1_folder, *QUICK]
    images = draw("txt2image", PROMPT, *options)
    repeated = draw("txt2image", "--from_image", images[1], "--whole_batch")
    assert len(images) == len(repeated) == 3
    for one, other in zip(images, repeated, strict=True):
        assert_same(one, other)
    parts = draw("txt2image", "--from_image", images[1], "--whole_batch", "--batch_size", 2)
    assert [recorded(path)["made"]["batch"] for path in parts] == [[7, 3], [7, 3], [11]]


def test_a_batch_stays_one(tmp_path):
    path = with_record(tmp_path / "a.png", {"prompt": PROMPT, "seed": 3}, made={"batch": [7, 3, 11]})
    args = parsed("txt2image", "--from_image", path, "--whole_batch")
    assert (args["seed"], args["n_images"], args["batch_size"]) == ((7, 3, 11), None, 3)
    args = parsed("txt2image", "--from_image", path, "--whole_batch", "--batch_size", 1, "--seed", 5)
    assert (args["seed"], args["batch_size"]) == ((5,), 1)


@pytest.mark.parametrize("made", [{}, {"made": 3}, {"made": {"batch": 2}}, {"made": {"batch": []}}])
def test_a_batch_that_is_not_recorded(run, no_model, tmp_path, made):
    path = with_record(tmp_path / "a.png", {"prompt": PROMPT}, **made)
    run("txt2image", "--from_image", path, "--whole_batch").refused("does not say what it was made together with")


def test_what_lists_and_alternatives_came_to(draw, sd1_folder):
    lists = ["--steps", "1,2", "--sampler", "euler,ddim", "--seed", "3,9", "--batch_size", 1, "--model", sd1_folder]
    images = draw("txt2image", "the {red|blue} cat", *lists, "--width", 64, "--height", 64)
    said = [recorded(path)["arguments"] for path in images]
    wanted = set(product((1, 2), ("euler", "ddim"), ("red", "blue"), (3, 9)))
    assert {(a["steps"], a["sampler"], a["prompt"].split()[1], a["seed"]) for a in said} == wanted
    for path in images[5::6]:
        assert_same(path, again(draw, "txt2image", path))


def test_lines_of_a_file_of_prompts(draw, sd1_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("red cat --steps 1 --seed 4\nblue cat --cfg 2 --clip_skip 1\n")
    images = draw("txt2image", "--prompt_file", "prompts.txt", "--model", sd1_folder, *QUICK, "--n_images", 1)
    os.remove("prompts.txt")
    for path in images:
        assert_same(path, again(draw, "txt2image", path))


@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_a_masked_image_in_other_formats(draw, sd1_folder, files, suffix):
    options = ["--mask", files / "mask.png", "--mask_blur", 1.5, "--strength", 0.7, "--quality", 60, "--resize", "pad"]
    image = [files / "in.png", "red", "--model", sd1_folder, "--steps", 3, "--n_images", 1]
    (path,) = draw("image2image", *image, *options, suffix=suffix)
    assert_same(path, again(draw, "image2image", path, "--quality", 60))
    assert recorded(path)["script"] == "image2image"
    assert {str(files / name) for name in ("in.png", "mask.png")} < recorded(path)["files"].keys()


def test_loras_and_quantized_weights(draw, sd1_folder, files):
    options = ["--lora_dir", files / "loras", "--lora", f"{files}/more.safetensors:0.00001", "--lora"]
    options += [files / "loras" / "paint.safetensors", "--unet_bits", 4]
    prompt = "red <lora:paint:0.25> cat <lora:paint.safetensors:-.5>"
    (path,) = draw("txt2image", prompt, "--model", sd1_folder, *QUICK, "--n_images", 1, *options)
    record = recorded(path)
    assert record["arguments"]["prompt"] == "red cat <lora:paint:0.25> <lora:paint.safetensors:-0.5>"
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
    assert any("net controlnet/" in name for name in recorded(path)["files"])
    settings = as_others_read(read_text(path)["parameters"])[2]
    assert settings["ControlNet 0"] == "Model: net, Weight: 0.5" and settings["Hires upscale"] == "1.5"


def test_xl(draw, xl_folder):
    (path,) = draw("txt2image", PROMPT, "--model", xl_folder, "--n_images", 1, "--height", 64)
    said = recorded(path)["arguments"]
    assert (said["width"], said["height"], said["steps"], said["cfg"], said["sampler"]) == (128, 64, 2, 0, "euler_a")
    assert_same(path, again(draw, "txt2image", path))


def test_the_bundled_model(draw):
    (path,) = draw("txt2image", "a red circle", "--model", "tiny", "--n_images", 1, "--steps", 3)
    assert_same(path, again(draw, "txt2image", path))
    assert "tiny unet/diffusion_pytorch_model.safetensors" in recorded(path)["files"]


# --- flags in place of what a picture says ---------------------------------------------------------------------------


def parsed(script: str, *words: object) -> dict:
    """What a script makes of its arguments."""
    return vars(read(script == "image2image", [str(word) for word in words])[1])


@pytest.fixture
def picture(tmp_path) -> Path:
    """One that was made with a seed of 7 and guidance of 3, with LoRAs and in float32."""
    said = {
        "seed": 7,
        "cfg": 3.0,
        "lora": [["a", 0.5], ["b", 1.0]],
        "float16": False,
        "steps": 4,
        "negative_prompt": "x",
        "quantize": True,
    }
    return with_record(tmp_path / "picture.png", {"prompt": PROMPT, "n_images": 1} | said)


@pytest.mark.parametrize(
    "words, said",
    [
        ([], {}),
        (["--seed", "8"], {"seed": (8,)}),
        (["--cfg=2", "--negative-prompt", ""], {"cfg": (2.0,), "negative_prompt": ""}),
        (["--steps", "1", "2", "--sampler", "euler"], {"steps": (1, 2), "sampler": ("euler",)}),
        (["--lora", "c"], {"lora": [("c", 1.0)]}),
        (["--without", "lora", "--without=--quantize"], {"lora": [], "quantize": False}),
        (["--without", "negative-prompt", "--without", "vae"], {"negative_prompt": ""}),
        (["--without", "cfg", "--cfg", "2"], {"cfg": (2.0,)}),
        (["--lora", "b", "--lora", "a:.5"], {"lora": [("b", 1.0), ("a", 0.5)]}),
        (["a dog"], {"prompt": "a dog"}),
        (["--n_images", "3"], {"n_images": 3}),
        (["--seed", "4,2"], {"seed": (4, 2), "n_images": None}),
        (["--prompt_file", "x.txt"], {"prompt": None, "prompt_file": "x.txt", "n_images": None}),
        (
            ["--output", "a.jpg", "--quality", "9", "--no_metadata"],
            {"output": "a.jpg", "quality": 9, "no_metadata": True},
        ),
    ],
)
def test_flags_and_prompts_take_the_place_of_what_is_recorded(picture, words, said):
    common = {"prompt": PROMPT, "n_images": 1, "seed": (7,), "cfg": (3.0,), "steps": (4,), "negative_prompt": "x"}
    common |= {"lora": [("a", 0.5), ("b", 1.0)], "float16": False, "from_image": str(picture)}
    common |= {"quantize": True}
    found = parsed("txt2image", "--from_image", picture, *words)
    assert bool(found.pop("without")) == ("--without" in words)
    plain = parsed("txt2image", "x")
    del plain["without"]
    assert found | {"lists": ()} == plain | common | said | {"lists": ()}


@pytest.mark.parametrize("name", ["prompt", "output", "best", "strength", ""])
def test_what_cannot_be_left_out(picture, run, no_model, name):
    run("txt2image", "--from_image", picture, "--without", name).refused(
        f"--without {name} is none of the flags", "the picture has cfg, float16, lora, n_images, negative_prompt, quant"
    )
    run("txt2image", PROMPT, "--without", name).refused("--without and --whole_batch need --from_image FILE")


def test_the_other_script(picture, tmp_path, capsys):
    noise().save(tmp_path / "in.png")
    args = parsed("image2image", tmp_path / "in.png", "--from_image", picture, "--strength", 0.5)
    assert (args["image"], args["prompt"], args["seed"]) == (str(tmp_path / "in.png"), PROMPT, (7,))
    assert capsys.readouterr().err.endswith(f": {picture} was made with txt2image; what only that has is left out\n")
    path = with_record(tmp_path / "a.png", {"image": "x.png", "prompt": PROMPT, "strength": 0.5}, script="image2image")
    for words, image, prompt in (
        ([], "x.png", PROMPT),
        (["y.png"], "y.png", PROMPT),
        ([str(tmp_path / "in.png")], str(tmp_path / "in.png"), PROMPT),
        (["a dog"], "x.png", "a dog"),
        (["y.png", "a dog"], "y.png", "a dog"),
        (["y", "a dog"], "y", "a dog"),
    ):
        args = parsed("image2image", "--from_image", path, *words)
        assert (args["image"], args["prompt"], args["strength"]) == (image, prompt, (0.5,))
    assert capsys.readouterr().err == ""
    args = parsed("txt2image", "--from_image", path)
    assert "was made with image2image; what" in capsys.readouterr().err and args["prompt"] == PROMPT


def _prog(draw: Draw) -> str:
    return draw.done.remarks[0].partition(":")[0]


def test_without_metadata(draw, run, sd1_folder):
    for suffix in (".png", ".jpg", ".webp"):
        (path,) = draw(
            "txt2image", PROMPT, "--model", sd1_folder, *QUICK, "--n_images", 1, "--no_metadata", suffix=suffix
        )
        assert read_text(path) == {}
        run("txt2image", "--from_image", path).refused(str(path), "does not say how it was made", "--from_image")


# --- what a picture says may be wrong --------------------------------------------------------------------------------


def with_record(path: Path, arguments: object, **more: object) -> Path:
    save(noise(), path, {"stable_diffusion": json.dumps({"script": "txt2image", "arguments": arguments} | more)})
    return path


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"steps": 0}, ["--steps", "'0'", "whole number"]),
        ({"steps": "many"}, ["--steps", "'many'"]),
        ({"steps": {}}, ["--steps", "'{}'"]),
        ({"width": 100}, ["--width", "'100'", "multiple of 8"]),
        ({"sampler": "best"}, ["--sampler", "'best'"]),
        ({"canny": "yes"}, ["--canny"]),
        ({"vae": True}, ["--vae"]),
        ({"prompt": 3}, ["names no prompt"]),
        ({"prompt": None}, ["names no prompt"]),
        ({"negative_prompt": "\udcff"}, ["Unicode"]),
        ({"hires": [1, 2]}, ["--hires", "'1,2'"]),
    ],
)
def test_a_record_that_cannot_be_followed(run, no_model, tmp_path, arguments, words):
    path = with_record(tmp_path / "a.png", {"prompt": PROMPT} | arguments)
    run("txt2image", "--from_image", path).refused("a.png", *words)


def test_a_record_decides_nothing_about_files_that_are_written(tmp_path):
    evil = {
        "output": str(tmp_path / "other.png"),
        "overwrite": True,
        "prompt_file": "x",
        "no_metadata": True,
        "n_images": 9,
    }
    path = with_record(tmp_path / "a.png", {"prompt": PROMPT} | evil)
    parse = script_parser(False).parse_args
    args, remarks = repeat(str(path), parse, [], recorded_flags(False))
    plain = vars(parse([])) | {"prompt": PROMPT, "n_images": 1}
    assert vars(args) == plain and remarks == []


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"arguments": 3}', '"' * 9, "[" * 100_000, ""])
def test_a_record_that_is_none(run, no_model, tmp_path, text):
    save(noise(), tmp_path / "a.png", {"stable_diffusion": text})
    run("txt2image", "--from_image", tmp_path / "a.png").refused("a.png does not say how it was made")
    save(noise(), tmp_path / "a.png", {"stable_diffusion": text, "parameters": "cat\nSteps: 3, Seed: 1, CFG scale: 2"})
    assert recorded(tmp_path / "a.png")["arguments"]["cfg"] == 2


def test_no_picture(run, no_model, tmp_path):
    run("txt2image", "--from_image", tmp_path / "none.png").refused("no image at", "none.png")
    (tmp_path / "a.txt").write_text("x")
    run("image2image", "--from_image", tmp_path / "a.txt").refused("a.txt is not an image")


def test_no_image_to_start_from(run, no_model, tmp_path):
    path = with_record(tmp_path / "a.png", {"prompt": PROMPT})
    run("image2image", "--from_image", path).refused("a.png names no image")
    run("image2image").refused("image")


def test_flags_of_another_version_are_named(tmp_path):
    path = with_record(tmp_path / "a.png", {"prompt": PROMPT, "sharpness": 3, "aura": "x"}, partial="3 of 20 steps")
    args, remarks = repeat(str(path), script_parser(False).parse_args, ["--seed", "3"], recorded_flags(False))
    assert remarks == [
        f"{path} was made with what is not known here: aura, sharpness",
        f"{path} was not finished (3 of 20 steps); here all steps are made",
    ]
    assert args.prompt == PROMPT


# --- every flag ------------------------------------------------------------------------------------------------------

ODD = "a, b: 'c' \"d\" =e\n-- {f|g} \U0001f600 \\"
PATH = "a/ö b,c=d:e.safetensors"
ALL = (
    dict.fromkeys(("model", "vae", "unet", "text_encoder", "refiner", "lora_dir"), PATH)
    | dict.fromkeys(("revision", "text_encoder_2", "tokenizer", "mask", "depth"), "-odd name")
    | {"lora": [["a b:c", 0.1], ["-d", -1e-07]], "controlnet": [["x/y", 1.0]], "control_image": ["é, f.png"]}
    | {"control_start": [0.1], "control_end": [0.123456789012345], "embedding": ["a,b=c", "d"]}
    | {"guidance_interval": [1e-05, 0.75], "expand": [8, 0, 16, 0], "sampler": "DPM++ 2M", "schedule": "karras"}
    | {
        "eta": 0.5,
        "cfg": -7.25,
        "image_cfg": 1.5,
        "strength": 0.1,
        "mask_blur": 0.3,
        "mask_padding": 3,
        "deep_cache": 2,
        "token_merging": 0.5,
    }
    | {"prediction": "epsilon", "unet_bits": 4, "text_bits": 8, "float16": False, "emphasis": "none", "resize": "pad"}
    | {"hires_upscaler": "pixels", "hires": 1.25, "hires_steps": 3, "hires_strength": 0.25, "refiner_start": 0.5}
    | {"steps": 7, "width": 72, "height": 640, "clip_skip": 2, "negative_prompt": ODD, "seed": 2**63 - 1}
)


@pytest.mark.parametrize("from_image", [False, True])
def test_every_flag_comes_back(tmp_path, from_image):
    """A flag of a kind that is new must be readable from what is recorded of it."""
    parse, names = script_parser(from_image).parse_args, recorded_flags(from_image)
    defaults = vars(parse([]))
    said = {name: True if defaults[name] is False else ALL.get(name) for name in names}
    said |= {"prompt": ODD, "n_images": 1} | ({"image": "in.png"} if from_image else {})
    assert [name for name, value in said.items() if value is None] == []  # say in ALL what a new flag may be
    path = with_record(tmp_path / "a.png", said, script="image2image" if from_image else "txt2image")
    args, remarks = repeat(str(path), parse, [], names)
    assert remarks == []
    found = {name: getattr(args, name) for name in names}
    listed = {name: value[0] for name, value in found.items() if isinstance(value, tuple) and len(value) == 1}
    assert json.loads(json.dumps(found | listed)) == said


@pytest.mark.parametrize("from_image", [False, True])
def test_what_is_not_recorded(from_image):
    """These flags say where results go, or how a machine is made use of; any other is recorded."""
    names = vars(script_parser(from_image).parse_args([])).keys() - set(recorded_flags(from_image))
    assert {
        "output",
        "quality",
        "no_metadata",
        "verbose",
        "batch_size",
        "low_memory",
        "from_image",
        "stepwise",
    } < names
    assert not names & {"model", "quantize", "float16", "seed", "steps", "prompt", "image"}


# --- pictures of other programs --------------------------------------------------------------------------------------

FOREIGN = """the red cat
Negative prompt: blue
Steps: 2, Sampler: DPM++ 2M Karras, CFG scale: 3, Seed: 5, Size: 64x72, Model hash: 6ce0161689, Model: dreams, \
Clip skip: 2, ENSD: 31337"""


def test_a_picture_of_another_program(draw, sd1_folder, tmp_path):
    save(noise(), tmp_path / "other.png", {"parameters": FOREIGN})
    (path,) = draw("txt2image", "--from_image", "other.png", "--model", sd1_folder)
    remark = "other.png is by another program, whose noise is another; not used: Model hash 6ce0161689, ENSD 31337"
    assert draw.done.remarks == [f"{_prog(draw)}: {remark}"]
    said = ["--negative_prompt", "blue", "--steps", 2, "--sampler", "dpmpp_2m", "--schedule", "karras", "--cfg", 3]
    said += ["--seed", 5, "--width", 64, "--height", 72, "--clip_skip", 1, "--n_images", 1]
    (wanted,) = draw("txt2image", "the red cat", "--model", sd1_folder, *said)
    assert_same(path, wanted)


def test_the_model_of_another_program_is_named(tmp_path):
    save(noise(), tmp_path / "other.png", {"parameters": FOREIGN})
    args, remarks = repeat(str(tmp_path / "other.png"), script_parser(False).parse_args, [], recorded_flags(False))
    assert "was made with the model dreams; --model chooses one" in remarks[0] and args.model == "sdxl"


def test_what_we_say_is_read_as_that_of_another_program(draw, sd1_folder, files, tmp_path):
    options = ["--sampler", "dpm2_a", "--schedule", "exponential", "--clip_skip", 1, "--strength", 0.6, "--cfg", 2.5]
    image = [files / "in.png", PROMPT, "--negative_prompt", "a, b", "--model", sd1_folder, "--n_images", 1, "--seed", 1]
    (path,) = draw("image2image", *image, "--steps", 4, *options)
    save(noise(), tmp_path / "text.png", {"parameters": read_text(path)["parameters"]})
    (made,) = draw("image2image", files / "in.png", "--from_image", "text.png", "--model", sd1_folder)
    assert np.array_equal(pixels(path), pixels(made))


# --- what is not as it was -------------------------------------------------------------------------------------------


def test_files_and_versions_that_have_changed(draw, sd1_folder, files, tmp_path, monkeypatch):
    shutil.copy(files / "in.png", tmp_path / "in.png")
    image = [
        "in.png",
        PROMPT,
        "--model",
        sd1_folder,
        "--steps",
        1,
        "--n_images",
        1,
        "--lora",
        files / "more.safetensors",
    ]
    (path,) = draw("image2image", *image)
    noise(seed=5).save(tmp_path / "in.png")
    again(draw, "image2image", path)
    prog = _prog(draw)
    assert draw.done.remarks == [f"{prog}: not the files that {path} was made from: in.png"]
    again(draw, "image2image", path, files / "hint.png")  # in place of the one that changed
    assert draw.done.remarks == []
    record = recorded(path)
    record["software"] |= {"mlx": "0.1", "device": "gpu"}
    save(noise(), tmp_path / "old.png", {"stable_diffusion": json.dumps(record)})
    draw("image2image", "--from_image", "old.png", files / "hint.png")
    (line,) = draw.done.remarks
    assert line.startswith(f"{prog}: old.png was made with mlx 0.1 (now ") and line.endswith("the picture may differ")
    assert "device gpu (now " in line


def test_an_unfinished_image_and_files_that_are_gone(draw, sd1_folder, files, tmp_path, monkeypatch):
    """What was made is written, whatever became of the files that it was made from."""
    shutil.copytree(files / "loras", tmp_path / "loras")
    shutil.copy(files / "more.safetensors", tmp_path)
    shutil.copytree(files / "net", tmp_path / "net")
    _elsewhere.cache_clear()

    def late(*given, **options):
        for path in ("loras/paint.safetensors", "more.safetensors", "net/config.json"):
            (tmp_path / path).unlink(missing_ok=True)
        return describe(*given, **options | {"partial": "1 of 2 steps"})

    monkeypatch.setattr(results, "describe", late)
    options = ["--lora_dir", "loras", "--lora", "more.safetensors", "--controlnet", "net", "--control_image"]
    (path,) = draw(
        "txt2image", "red <lora:paint:1>", "--model", sd1_folder, *QUICK, "--n_images", 1, *options, files / "hint.png"
    )
    record = recorded(path)
    assert record["partial"] == as_others_read(read_text(path)["parameters"])[2]["Partial"] == "1 of 2 steps"
    assert record["arguments"]["lora"] == [["more.safetensors", 1.0]]
    assert [name for name in record["files"] if not name.startswith(str(sd1_folder))] == [str(files / "hint.png")]


# --- what others read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        "cat, Steps: 3, Sampler: Euler, Seed: 5",
        "Steps: 3, Sampler: Euler, Seed: 5, Size: 8x8",
        "a \"quoted\": cat, 'red'; ünïcödé 富士山 \U0001f600 \u202e\u0301",
        "colon: and, comma\\(escaped\\)",
        "x" * 500,
    ],
)
def test_others_read_prompts_as_they_were(draw, sd1_folder, prompt):
    options = ["--model", sd1_folder, *QUICK, "--steps", 1, "--n_images", 1, "--negative_prompt", f"no {prompt}"]
    (path,) = draw("txt2image", prompt, *options, "--truncate")
    said = recorded(path)["arguments"]
    text, negative, settings = as_others_read(read_text(path)["parameters"])
    assert (text, negative) == (said["prompt"], said["negative_prompt"]) == (prompt, f"no {prompt}")
    assert (
        settings.pop("Model hash")
        == fingerprint(sd1_folder / "unet" / "diffusion_pytorch_model.safetensors")["sha256"][:10]
    )
    assert settings.pop("Version").startswith("stable-diffusion-mlx ") and settings.pop("Seed").isdecimal()
    named = {"Steps": "1", "Sampler": "DDIM", "Schedule type": "Uniform", "CFG scale": "7.5", "Size": "64x64"}
    assert settings == named | {"Model": sd1_folder.name}


def test_a_long_prompt_of_several_lines(draw, sd1_folder, tmp_path, monkeypatch):
    """100 kB, which no command line holds; a NUL is not in the text, which it would end."""
    prompt = "a red\ncat: 富, \0" * 8000 + "end"
    path = with_record(tmp_path / "a.png", {"prompt": prompt, "truncate": True, "emphasis": "none"})
    common = ["--model", sd1_folder, *QUICK, "--steps", 1]
    (made,) = draw("txt2image", "--from_image", path, *common)
    assert recorded(made)["arguments"]["prompt"] == prompt
    assert as_others_read(read_text(made)["parameters"])[0].split() == prompt.replace("\0", "").split()
    assert_same(made, again(draw, "txt2image", made))
    (jpeg,) = draw("txt2image", "--from_image", path, *common, suffix=".jpg")
    assert draw.done.remarks[-1].endswith(
        "has no room for all metadata: stable_diffusion, parameters is left out; a PNG has it"
    )
    assert pixels(jpeg).shape == (64, 64, 3)


# --- hashes ----------------------------------------------------------------------------------------------------------


def test_hashes_of_small_files(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc" * 1000)
    whole = hashlib.sha256(b"abc" * 1000).hexdigest()
    assert fingerprint(path) == {"sha256": whole} and model_hash(path) == whole[:10]
    path.write_bytes(b"abd" * 1000)
    assert fingerprint(path)["sha256"] != whole
    assert fingerprint(tmp_path / "none") == {} and model_hash(tmp_path / "none") is None
    assert fingerprint(tmp_path) == {}


def test_hashes_of_large_files(tmp_path, monkeypatch):
    """Not all of them is read; a change of a few hundred kB shows wherever it is."""
    monkeypatch.setattr(fingerprints, "_WHOLE", 10**6)
    data = np.random.default_rng(0).integers(0, 256, 12 * 2**20, dtype=np.uint8)
    path = tmp_path / "a.safetensors"
    path.write_bytes(data.tobytes())
    first = fingerprint(path)
    assert first.keys() == {"sampled"}
    assert model_hash(path) == hashlib.sha256(data[2**20 : 2**20 + 2**16].tobytes()).hexdigest()[:8]
    assert lora_hash(path) is None
    for place in (0, 5 * 2**20, len(data) - 1):
        changed = data.copy()
        changed[place : place + 2**18] += 1
        path.write_bytes(changed.tobytes())
        os.utime(path, ns=(1, place))
        assert fingerprint(path)["sampled"] != first["sampled"]
    path.write_bytes(data.tobytes() + b"\0")
    assert fingerprint(path)["sampled"] != first["sampled"]


def test_files_of_the_hub_are_not_read(tmp_path):
    digest = "0123456789abcdef" * 4
    folder = tmp_path / "models--some--one"
    snapshot = folder / "snapshots" / "abc123" / "unet"
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "blobs" / digest).write_bytes(b"x")
    (snapshot / "a.safetensors").symlink_to(folder / "blobs" / digest)
    assert fingerprint(snapshot / "a.safetensors") == {"sha256": digest, "hub": "some/one@abc123"}
    (folder / "blobs" / "short").write_bytes(b"x")  # small files are named by another hash
    (snapshot / "b.json").symlink_to(folder / "blobs" / "short")
    assert fingerprint(snapshot / "b.json") == {"sha256": hashlib.sha256(b"x").hexdigest(), "hub": "some/one@abc123"}


def test_hashes_of_loras_are_of_what_follows_the_header(tmp_path, files):
    path = files / "more.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert lora_hash(path) == hashlib.sha256(data[start:]).hexdigest()[:12]
    pickle = tmp_path / "a.pt"
    pickle.write_bytes(b"xyz")
    assert lora_hash(pickle) == hashlib.sha256(b"xyz").hexdigest()[:12]
    short = tmp_path / "a.safetensors"
    short.write_bytes(b"x")
    assert lora_hash(short) is None and lora_hash(tmp_path / "none.safetensors") is None


def test_a_file_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"x")
    first = fingerprint(path)
    monkeypatch.setattr(fingerprints, "_sha256", None)
    assert fingerprint(path) == first


def test_bad_quality(run, no_model):
    run("txt2image", PROMPT, "--quality", 80).refused("--quality", "JPEG", ".jpg")
    for value in ("0", "101", "x"):
        run("txt2image", PROMPT, "--quality", value, "--output", "a.jpg").refused("--quality", repr(value), "1 to 100")

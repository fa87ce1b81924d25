"""The command lines: what they refuse and how, what they write, and what they leave behind when something breaks."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from PIL import Image

from command_line import PROMPT, SCRIPTS, Finished, names, pixels, process
from stable_diffusion import SAMPLERS
from stable_diffusion.app import engine
from stable_diffusion.app.results import FIELDS
from stable_diffusion.models.unet import UNet2DConditionModel
from stable_diffusion.pipeline import StableDiffusion

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def models(sd1_folder, xl_folder) -> dict[str, Path]:
    """Random checkpoints: "sd" of 64x64 pixels with guidance 7.5, "xl" of 128x128 with 2 steps and no guidance."""
    return {"sd": sd1_folder, "xl": xl_folder}


@pytest.fixture
def make_image(run, models, tmp_path):
    """Run txt2image for 64x64 pixels in one step, or whatever ``options`` say; returns the pixels of --output."""

    def call(*options, model: str = "sd", prompt: str = PROMPT) -> np.ndarray:
        output = tmp_path / "made.png"
        small = ["--width", 64, "--height", 64, "--steps", 1, "--n_images", 1, "--output", output, "--overwrite"]
        run("txt2image", prompt, "--model", models[model], *small, *options).succeeded()
        return pixels(output)

    return call


# --- as processes ----------------------------------------------------------------------------------------------------


def test_a_process_that_makes_images(models, tmp_path):
    options = ["--n_images", 3, "--n_rows", 2, "--steps", 2, "--seed", 5, "--output", tmp_path / "cat.png"]
    done = process("txt2image", "-q", PROMPT, "--model", models["sd"], *options).succeeded()
    assert done.out == [*(f"{tmp_path}/cat_{i + 1}.png seed {5 + i}" for i in range(3)), f"{tmp_path}/cat.png"]
    assert done.remarks == []
    assert names(tmp_path) == ["cat.png", "cat_1.png", "cat_2.png", "cat_3.png"]


def test_a_process_that_changes_an_image(models, tmp_path):
    Image.new("RGB", (96, 64), RED).save(tmp_path / "in.png")
    options = ["--model", models["xl"], "--n_images", 1, "--output", tmp_path / "out.webp", "--verbose"]
    done = process("image2image", tmp_path / "in.png", PROMPT, *options).succeeded()
    assert len(done.out) == 1 and re.fullmatch(rf"{tmp_path}/out\.webp seed \d+", done.out[0])
    assert any(re.search(r"peak memory: [\d.]+ GB for the UNet, [\d.]+ GB overall", line) for line in done.remarks)
    assert pixels(tmp_path / "out.webp").shape == (64, 96, 3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_process_that_is_refused(script, tmp_path):
    image = [tmp_path / "none.png"] if script == "image2image" else []
    process(script, *image, PROMPT, "--width", "100").refused("--width", "'100'", "multiple of 8")
    process(script, "--help").succeeded()


def test_a_process_that_fails_on_the_way(models, tmp_path):
    """Weights that are not a number: the exit code tells, and no black picture is written."""
    folder = shutil.copytree(models["sd"], tmp_path / "nan")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = mx.load(str(weights))
    edited = tensors | {"conv_out.bias": tensors["conv_out.bias"] * float("nan")}
    mx.eval(edited)
    mx.save_safetensors(str(weights), edited)
    output = tmp_path / "out"
    output.mkdir()
    done = process("txt2image", PROMPT, "--model", folder, "--steps", 2, "--output", output / "a.png")
    done.failed(1, "step 1", "not finite")
    assert done.out == [] and names(output) == []


# --- refused before a model is touched -------------------------------------------------------------------------------


COUNT = "a whole number from 1 to 9999"
BAD_OPTIONS = [
    ("--width 100", "--width", "'100'", "a multiple of 8 from 64 to 16384"),
    ("--width abc", "--width", "'abc'", "a multiple of 8"),
    ("--width 56", "--width", "'56'", "from 64"),
    ("--width 512.0", "--width", "'512.0'", "a multiple of 8"),
    ("--height 0", "--height", "'0'", "a multiple of 8"),
    ("--height -64", "--height", "'-64'", "from 64"),
    ("--height 16392", "--height", "'16392'", "to 16384"),
    ("--steps 0", "--steps", "'0'", COUNT),
    ("--steps 2.5", "--steps", "'2.5'", COUNT),
    ("--n_images 0", "--n_images", "'0'", COUNT),
    ("--n_images 99999999999999999999", "--n_images", "'99999999999999999999'", COUNT),
    ("--n_rows 0", "--n_rows", "'0'", COUNT),
    ("--decoding_batch_size 0", "--decoding_batch_size", "'0'", COUNT),
    ("--decoding_batch_size 99999999999999999999", "--decoding_batch_size", COUNT),
    ("--seed -1", "--seed", "'-1'", "a whole number from 0 to 2^63 - 1"),
    ("--seed 9223372036854775808", "--seed", "'9223372036854775808'", "2^63 - 1"),
    ("--cfg nan", "--cfg", "'nan'", "a number"),
    ("--cfg high", "--cfg", "'high'", "a number"),
    ("--eta -0.1", "--eta", "'-0.1'", "a number from 0 to 1"),
    ("--guidance_interval 0.5", "--guidance_interval", "'0.5'", "start,end"),
    ("--guidance_interval 0.6,0.2", "--guidance_interval", "'0.6,0.2'", "0.2,0.8"),
    ("--guidance_interval 0,1.5", "--guidance_interval", "'0,1.5'", "shares of the steps"),
    ("--token_merging 0.8", "--token_merging", "'0.8'", "from 0 to 0.75"),
    ("--deep_cache 0", "--deep_cache", "'0'", "a whole number of at least 1"),
    ("--memory_limit 0", "--memory_limit", "'0'", "a number of GB above 0"),
    ("--low_memory --preload_models", "--low_memory", "--preload_models", "leave one out"),
    ("--eta inf", "--eta", "'inf'", "a number from 0 to 1"),
    ("--clip_skip -1", "--clip_skip", "'-1'", "a whole number"),
    ("--guidance_rescale 1.5", "--guidance_rescale", "'1.5'", "a number from 0 to 1"),
    ("--sampler eule", "--sampler", "'eule'", *SAMPLERS),
    ("--sampler euler --eta 0.5", "euler", "eta", "leave it out"),
    ("--unet_bits 7", "--unet_bits", "7", "2, 3, 4, 5, 6, 8"),
    ("--text_bits x", "--text_bits", "'x'"),
    ("--output=", "output path is empty", "image.png"),
    ("--output {tmp}/none/out.png", "folder {tmp}/none does not exist", "create it"),
    ("--output {tmp}/out.tga", "'.tga'", ".png, .jpg, .jpeg, .webp"),
    ("--output {tmp}/out", "{tmp}/out has the suffix ''", ".png"),
    ("--n_images 2 --overwrite --output {tmp}/taken.png", "{tmp}/taken_2.png is a folder"),
    ("--output {tmp}/{sead}.png", "{sead}", *(f"{field}," for field in FIELDS[:-1]), "time"),
    ("--output {tmp}/{seed:q}.png", "{seed:q}", "format code 'q'"),
    ("--output {tmp}/{seed.png", "{seed.png is no pattern"),
    ("--output {tmp}/{seed}.tga", "'.tga'", ".webp"),
    ("--output {tmp}/in.png/{seed}.png", "{tmp}/in.png is a file"),
    ("--output {tmp}/in.png/", "{tmp}/in.png is a file"),
    (f"--n_images 2 --output {{tmp}}/{'a' * 250}.png", f"{'a' * 250}_1.png could not be written", "another name"),
    ("--n_rwos 2", "--n_rwos"),
    ("--negative_prompt \udcff", "'\\udcff'", "Unicode"),
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("options, words", [(row[0], row[1:]) for row in BAD_OPTIONS])
def test_bad_options(run, no_model, tmp_path, script, options, words):
    (tmp_path / "taken_2.png").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    before = names(tmp_path)
    image = [tmp_path / "in.png"] if script == "image2image" else []
    options = [part.replace("{tmp}", str(tmp_path)) for part in options.split(" ")]
    done = run(script, *image, PROMPT, "--n_images", 1, *options)
    done.refused(*(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert names(tmp_path) == before


@pytest.mark.parametrize("strength", ["0", "-0.5", "1.5", "nan", "inf", "much"])
def test_bad_strength(run, no_model, tmp_path, strength):
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    done = run("image2image", tmp_path / "in.png", PROMPT, "--strength", strength)
    done.refused("--strength", repr(strength), "above 0 and at most 1")


def test_bad_resize(run, no_model, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    run("image2image", tmp_path / "in.png", PROMPT, "--resize", "zoom").refused("'zoom'", "crop", "pad", "stretch")


def test_bad_images(run, no_model, tmp_path):
    (tmp_path / "text.png").write_text("this is not an image")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    run("image2image", "", PROMPT).refused("path of the image is empty", "give the path")
    run("image2image", tmp_path / "none.png", PROMPT).refused(f"no image at {tmp_path}/none.png", "check the path")
    run("image2image", tmp_path, PROMPT).refused(f"{tmp_path} is a folder", "give the path of an image")
    run("image2image", tmp_path / "text.png", PROMPT).refused("text.png is not an image", "PNG or JPEG")
    run("image2image", tmp_path / "cut.png", PROMPT).refused("cut.png cannot be read", "save it again")


def test_bad_prompts(run, no_model):
    run("txt2image").refused("prompt")
    run("image2image", "in.png").refused("prompt")
    run("txt2image", "a \udcff").refused("'a \\udcff'", "Unicode")
    run("txt2image", "two", "words").refused("words")


def test_a_path_with_line_breaks_is_still_one_line(run, no_model):
    run("txt2image", PROMPT, "--output", "no\nfolder\r\nhere/out.png").refused("no folder here does not exist")


# --- refused by the loader -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("model", ["sdx", "sd1.5", "", "a/b/c", "https://example.com/a/b"])
def test_unknown_model(run, monkeypatch, tmp_path, script, model):
    monkeypatch.setattr("stable_diffusion.networks.load_component", None)
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    image = [tmp_path / "in.png"] if script == "image2image" else []
    run(script, *image, PROMPT, "--model", model).refused(repr(model), "sdxl-turbo", "sd15", "tiny", "a folder")


def test_a_model_that_is_no_folder(run, tmp_path):
    run("txt2image", PROMPT, "--model", tmp_path / "none").refused(f"{tmp_path}/none", "no such folder")
    run("txt2image", PROMPT, "--model", tmp_path).refused(f"{tmp_path}", "model_index.json")


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def refusal(run, models, tmp_path):
    """Break a copy of a checkpoint with ``damage(folder)`` and see it refused with ``words``, before any step."""

    def check(damage: Callable[[Path], object], *words: str, model: str = "sd") -> None:
        folder = shutil.copytree(models[model], tmp_path / "model")
        damage(folder)
        done = run("txt2image", PROMPT, "--model", folder, "--output", tmp_path / "out.png")
        done.refused(*words)
        assert not (tmp_path / "out.png").exists()

    return check


def edit_json(file: str, **changes) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes))

    return edit


def edit_tensors(file: str, change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        edited = change(mx.load(str(folder / file)))
        mx.eval(edited)
        mx.save_safetensors(str(folder / file), edited)

    return edit


def test_corrupt_weights(refusal):
    refusal(lambda folder: (folder / UNET).write_bytes(b"\x00garbage" * 100), UNET, "damaged", "delete")


def test_truncated_weights(refusal):
    def cut(folder: Path) -> None:
        os.truncate(folder / UNET, (folder / UNET).stat().st_size - 100)

    refusal(cut, UNET, "damaged", "bytes", "delete")


def test_empty_weights(refusal):
    refusal(lambda folder: (folder / UNET).write_bytes(b""), UNET, "damaged")


@pytest.mark.parametrize(
    "file, changes",
    [
        ("unet/config.json", {"act_fn": "mish", "resnet_time_scale_shift": "scale_shift"}),
        ("unet/config.json", {"encoder_hid_dim": 512}),
        ("unet/config.json", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}),
        ("vae/config.json", {"act_fn": "mish"}),
        ("text_encoder/config.json", {"hidden_act": "relu"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}),
    ],
)
def test_configs_with_unknown_values(refusal, file, changes):
    refusal(edit_json(file, **changes), *(repr(value) for value in changes.values()))  # each of them is named


@pytest.mark.parametrize("pipeline_class", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_unsupported_pipelines(refusal, pipeline_class):
    refusal(edit_json("model_index.json", _class_name=pipeline_class), pipeline_class, "not supported")


def test_missing_tensors_are_all_listed(refusal):
    gone = ["conv_in.weight", "down_blocks.0.resnets.1.norm1.bias", "mid_block.attentions.0.proj_out.weight"]
    without = edit_tensors(UNET, lambda tensors: {name: tensors[name] for name in tensors if name not in gone})
    refusal(without, UNET, "3 missing", *gone)


def test_misshapen_and_unexpected_tensors(refusal):
    def change(tensors):
        return tensors | {"conv_in.weight": mx.zeros((32, 9, 3, 3)), "extra.weight": mx.zeros((1,))}

    words = ("1 misshapen", "conv_in.weight (32, 9, 3, 3) instead of (32, 4, 3, 3)", "1 unexpected: extra.weight")
    refusal(edit_tensors(UNET, change), UNET, *words)


def test_missing_tensors_of_the_second_encoder(refusal):
    file = "text_encoder_2/model.safetensors"
    without = edit_tensors(file, lambda tensors: {n: v for n, v in tensors.items() if n != "text_projection.weight"})
    refusal(without, file, "1 missing: text_projection.weight", model="xl")


@pytest.mark.parametrize(
    "file", ["vae/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt", UNET]
)
def test_missing_files(refusal, file):
    refusal(lambda folder: (folder / file).unlink(), file)


def test_a_component_that_the_index_lacks(refusal):
    refusal(edit_json("model_index.json", vae=[None, None]), "vae", "model_index.json")


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/vocab.json"])
def test_files_that_are_not_json(refusal, file):
    refusal(lambda folder: (folder / file).write_text('{"_class_name": '), file)


def test_steps_beyond_the_model(run, models):
    done = run("txt2image", PROMPT, "--model", models["sd"], "--steps", 1001)
    done.refused("1001", "1000")


# --- good runs -------------------------------------------------------------------------------------------------------


def test_one_image_is_exactly_the_size_asked_for(run, models, tmp_path):
    for width, height in ((64, 96), (136, 72)):
        output = tmp_path / "out.png"
        options = ["--width", width, "--height", height, "--steps", 1, "--n_images", 1, "--output", output]
        options.append("--overwrite")
        done = run("txt2image", PROMPT, "--model", models["sd"], *options).succeeded()
        assert len(done.out) == 1 and names(tmp_path) == ["out.png"]
        image = pixels(output)
        assert image.shape == (height, width, 3)
        # No border: the outermost pixels are part of a picture, which is not of one colour.
        assert all(edge.std() > 1 for edge in (image[0], image[-1], image[:, 0], image[:, -1]))


def test_the_models_own_size_and_steps(run, models, tmp_path):
    output = tmp_path / "out.png"
    options = ["--model", models["xl"], "--n_images", 1, "--output", output, "--overwrite", "--json"]
    done = run("txt2image", PROMPT, *options).succeeded()
    assert pixels(output).shape == (128, 128, 3) and json.loads(done.out[0])["steps"] == 2
    run("txt2image", PROMPT, *options, "--width", 64).succeeded()
    assert pixels(output).shape == (128, 64, 3)


def test_several_images_are_numbered_and_laid_on_a_grid(run, models, tmp_path):
    options = ["--width", 72, "--height", 64, "--steps", 1, "--n_images", 3, "--n_rows", 2, "--seed", 7]
    output = tmp_path / "out.png"
    done = run("txt2image", PROMPT, "--model", models["sd"], *options, "--output", output).succeeded()
    assert done.out == [*(f"{tmp_path}/out_{i}.png seed {6 + i}" for i in (1, 2, 3)), str(output)]
    assert names(tmp_path) == ["out.png", "out_1.png", "out_2.png", "out_3.png"]
    grid, images = pixels(output), [pixels(tmp_path / f"out_{i}.png") for i in (1, 2, 3)]
    assert grid.shape == (2 * 64 + 8, 2 * 72 + 8, 3)
    assert np.array_equal(grid[:64, :72], images[0]) and np.array_equal(grid[:64, 80:], images[1])
    assert np.array_equal(grid[72:, :72], images[2]) and (grid[72:, 72:] == 255).all()
    assert not np.array_equal(images[0], images[1])


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "webp"])
def test_other_formats(run, models, tmp_path, suffix):
    output = tmp_path / f"out.{suffix}"
    options = ["--model", models["sd"], "--steps", 1, "--n_images", 2, "--output", output]
    run("txt2image", PROMPT, *options).succeeded()
    assert names(tmp_path) == [f"out.{suffix}", f"out_1.{suffix}", f"out_2.{suffix}"]
    with Image.open(output) as image:
        assert (image.format, image.size) == ("WEBP" if suffix == "webp" else "JPEG", (136, 64))


FLAGS = [
    *("--negative_prompt", "the blue", "--n_images", "2", "--steps", "2", "--cfg", "3", "--n_rows", "2"),
    *("--decoding_batch_size", "2", "--no_float16", "--quantize", "--preload_models", "--seed", "3", "--verbose"),
    *("--width", "64", "--height", "72", "--sampler", "euler_a", "--eta", "0.5", "--clip_skip", "1"),
    *(
        "--unet_bits",
        "6",
        "--text_bits",
        "5",
        "--schedule",
        "karras",
        "--guidance_interval",
        "0.2,1",
        "--guidance_rescale",
        "0.5",
        "--deep_cache",
        "2",
        "--token_merging",
        "0.5",
    ),
    *("--embedding", "word.safetensors=word", "--emphasis", "values"),
    *("--weight_blocks", "--truncate", "--alternatives", "one"),
    *("--resize", "pad", "--batch_size", "1", "--overwrite", "--no_metadata"),
]
# What needs files of its own, or goes with few others; and what is said in every test or in a process of its own.
ELSEWHERE = {
    *(
        "--prompt_file",
        "--wildcards",
        "--revision",
        "--model",
        "--output",
        "--help",
        "--version",
        "--no_grid",
        "--json",
    ),
    *("--lora", "--lora_dir", "--lora_partial", "--vae", "--unet", "--text_encoder", "--text_encoder_2"),
    *("--tokenizer", "--prediction", "--refiner", "--refiner_start", "--low_memory", "--memory_limit"),
    *("--controlnet", "--control_image", "--canny", "--control_start", "--control_end", "--guess_mode"),
    *("--preview", "--preview_every", "--preview_vae", "--stepwise", "--from_image", "--without"),
    "--quality",
}
ONLY = {
    "txt2image": {"--hires", "--hires_strength", "--hires_steps", "--hires_upscaler"},
    "image2image": {
        *("--strength", "--image_cfg", "--mask", "--invert_mask", "--mask_blur", "--mask_padding", "--no_composite"),
        *("--expand", "--depth"),
    },
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_with_underscores_and_with_hyphens(run, models, tmp_path, monkeypatch, script):
    Image.effect_noise((100, 90), 60).save(tmp_path / "in.png")
    image = [tmp_path / "in.png"] if script == "image2image" else []
    more = ["--strength", "0.5"] if image else []
    mx.save_safetensors(str(tmp_path / "word.safetensors"), {"emb_params": mx.zeros((2, 32))})
    monkeypatch.chdir(tmp_path)
    results = []
    for spelling in ("_", "-"):
        flags = [flag.replace("_", spelling) if flag.startswith("--") else flag for flag in [*FLAGS, *more]]
        output = tmp_path / "out.png"
        run(script, *image, PROMPT, "--model", models["sd"], "--output", output, *flags).succeeded()
        results.append(pixels(output))
    assert results[0].shape == (2 * 72 + 8, 64, 3) and np.array_equal(*results)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_but_those(script):
    """A flag that is added must be added to the tests above; --model and --output are in every one of them."""
    text = process(script, "--help").succeeded().out
    shown = set(re.findall(r"(--[a-z0-9_]+)(?=[ ,\n\]]|$)", "\n".join(text)))
    tested = {flag for flag in FLAGS if flag.startswith("--")} | ELSEWHERE | ONLY[script]
    tested |= {"--list_samplers", "--list-samplers"} & shown
    assert shown == tested


@pytest.mark.parametrize("flag", ["--list_samplers", "--list-samplers"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_list_of_samplers(run, script, flag):
    done = run(script, flag).succeeded()
    assert [line.split()[0] for line in done.out] == ["sampler", *SAMPLERS] and done.err == ""


def test_names_of_samplers_as_others_write_them(make_image):
    given = ("--steps", 4, "--seed", 1, "--sampler")
    want = make_image(*given, "dpmpp_2m", "--schedule", "karras")
    assert np.array_equal(make_image(*given, "DPM++ 2M Karras"), want)
    assert not np.array_equal(make_image(*given, "DPM++ 2M Karras", "--schedule", "default"), want)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(make_image, sampler):
    assert make_image("--sampler", sampler, "--steps", 3, "--seed", 1).std() > 1


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_alternatives_make_an_image_each(run, models, tmp_path):
    options = ["--model", models["sd"], "--steps", 1, "--seed", 5, "--output", tmp_path / "out.png", "--overwrite"]
    done = run("txt2image", "the {red|blue} (cat:1.2)", *options, "--n_images", 2).succeeded()
    assert [line.split()[-1] for line in done.out[:4]] == ["5", "6", "7", "8"] and len(done.out) == 5
    together = [pixels(tmp_path / f"out_{i}.png") for i in range(1, 5)]
    for i, colour in enumerate(("red", "red", "blue", "blue")):
        run("txt2image", f"the {colour} (cat:1.2)", *options, "--n_images", 1, "--seed", 5 + i).succeeded()
        assert np.abs(pixels(tmp_path / "out.png") - together[i]).max() <= 1


def test_one_alternative_is_chosen_by_the_seed(run, models, tmp_path):
    options = ["--model", models["sd"], "--steps", 1, "--n_images", 1, "--output", tmp_path / "out.png", "--overwrite"]
    chosen = []
    for seed in (0, 0, 1, 2, 3):
        run("txt2image", "{red|blue|cat|the}", *options, "--seed", seed, "--alternatives", "one").succeeded()
        chosen.append(pixels(tmp_path / "out.png"))
    assert names(tmp_path) == ["out.png"] and np.array_equal(chosen[0], chosen[1])


def test_signs_may_be_text(make_image):
    plain = make_image("--emphasis", "none", "--seed", 1, prompt="the {red|(blue:2)} cat")
    written = make_image("--seed", 1, prompt=r"the \{red\|\(blue:2\)\} cat")
    assert np.array_equal(plain, written)


def test_a_file_of_prompts(run, models, tmp_path):
    """Each line is a run of its own; what it does not say is said by the command line."""
    lines = [
        "# colours",
        "the red cat",
        "",
        "blue --seed 3 --cfg 5 --n_images 2",
        'the {red|blue} --width 72 --negative_prompt "on the"',
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    output = tmp_path / "out.png"
    common = ["--model", models["sd"], "--steps", 1, "--height", 64, "--seed", 8, "--n_images", 1]
    common += ["--output", output, "--overwrite"]
    done = run("txt2image", "--prompt-file", tmp_path / "prompts.txt", *common).succeeded()
    assert [int(line.split()[-1]) for line in done.out] == [8, 3, 4, 5, 6]
    assert "several sizes" in done.remarks[0] and not output.exists()
    made = [pixels(tmp_path / f"out_{i}.png") for i in range(1, 6)]
    singles = [
        ("the red cat", []),
        ("blue", ["--seed", 3, "--cfg", 5]),
        ("blue", ["--seed", 4, "--cfg", 5]),
        ("the red", ["--seed", 5, "--width", 72, "--negative_prompt", "on the"]),
        ("the blue", ["--seed", 6, "--width", 72, "--negative_prompt", "on the"]),
    ]
    for image, (prompt, flags) in zip(made, singles, strict=True):
        run("txt2image", prompt, *common, *flags).succeeded()
        assert np.abs(pixels(output) - image).max() <= 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["holds no prompt"]),
        ("# only a remark\n", ["holds no prompt"]),
        ("a\nb --steps 0", ["line 2", "--steps", "'0'"]),
        ("a --model sd15", ["line 1", "--model"]),
        ("a --negative_prompt 'open", ["line 1", "closing quotation"]),
        (b"\xff\xfe\x00", ["prompts.txt", "UTF-8"]),
    ],
)
def test_bad_files_of_prompts(run, no_model, tmp_path, text, words):
    file = tmp_path / "prompts.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    run("txt2image", "--prompt_file", file, "--output", tmp_path / "out.png").refused(*words)


def test_a_prompt_or_a_file_of_them(run, no_model, tmp_path):
    run("txt2image", "--prompt_file", tmp_path / "none.txt").refused("none.txt", "cannot be read")
    run("txt2image", "a", "--prompt_file", tmp_path / "none.txt").refused("a prompt or a file of them")
    run("txt2image").refused("give a prompt, or --prompt_file")


@pytest.mark.parametrize("script", SCRIPTS)
def test_too_many_alternatives(run, no_model, tmp_path, script):
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    image = [tmp_path / "in.png"] if script == "image2image" else []
    run(script, *image, "{a|b|c|d|e|f|g|h|i|j}" * 9, "--output", tmp_path / "out.png").refused("at most 10000")


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_seed_zero_is_a_seed(run, models, tmp_path):
    options = ["--model", models["sd"], "--steps", 1, "--n_images", 1, "--seed", 0]
    results = []
    for name in ("a.png", "b.png"):
        done = run("txt2image", PROMPT, *options, "--output", tmp_path / name).succeeded()
        assert done.out == [f"{tmp_path / name} seed 0"]
        results.append(pixels(tmp_path / name))
    assert np.array_equal(*results)


def test_a_random_seed_is_printed_and_gives_the_image_again(run, models, tmp_path, make_image):
    options = ["--model", models["sd"], "--steps", 1, "--n_images", 1, "--output", tmp_path / "a.png", "--overwrite"]
    seeds = [run("txt2image", PROMPT, *options).succeeded().out[0].split()[-1] for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert np.array_equal(pixels(tmp_path / "a.png"), make_image("--seed", seeds[1]))
    assert not np.array_equal(pixels(tmp_path / "a.png"), make_image("--seed", seeds[0]))


@pytest.mark.parametrize("options", [(), ("--sampler", "euler_a"), ("--decoding_batch_size", 2)])
def test_every_image_of_a_run_is_the_single_image_of_its_seed(run, models, tmp_path, make_image, options):
    several = ["--model", models["sd"], "--steps", 2, "--n_images", 3, "--seed", 10, "--output", tmp_path / "out.png"]
    run("txt2image", PROMPT, *several, *options).succeeded()
    singles = [make_image("--steps", 2, "--seed", 10 + i, *options) for i in range(3)]
    for i, single in enumerate(singles):
        # One level: a matrix product may add in another order for another batch size.
        assert np.abs(pixels(tmp_path / f"out_{i + 1}.png") - single).max() <= 1
    assert np.abs(singles[0] - singles[1]).max() > 10


def test_the_largest_seed(run, models, tmp_path):
    options = ["--model", models["sd"], "--steps", 1, "--n_images", 2, "--output", tmp_path / "out.png"]
    done = run("txt2image", PROMPT, *options, "--seed", 2**63 - 1).succeeded()
    assert [line.split()[-1] for line in done.out[:2]] == [str(2**63 - 1), str(2**63)]


# --- guidance and prompts --------------------------------------------------------------------------------------------


def test_guidance_of_zero_is_zero_and_not_the_default(make_image):
    options = ["--cfg", 0], ["--cfg", 1], ["--cfg", 7.5], []
    zero, none, seven, default = (make_image("--seed", 1, "--steps", 3, *cfg) for cfg in options)
    print(np.abs(zero - default).max())
    assert np.array_equal(zero, none) and np.array_equal(seven, default)
    assert np.abs(zero - default).max() > 1


@pytest.mark.parametrize("model, cfg, told", [("xl", (), "0"), ("sd", ("--cfg", 1), "1"), ("sd", (), None)])
def test_a_negative_prompt_without_guidance_is_remarked(run, models, tmp_path, model, cfg, told):
    options = ["--model", models[model], "--width", 64, "--height", 64, "--steps", 1, "--n_images", 1, *cfg]
    options += ["--output", tmp_path / "out.png"]
    done = run("txt2image", PROMPT, *options, "--negative_prompt", "the blue").succeeded()
    expected = f"the negative prompt has no effect at a guidance scale of {told}; it needs more than 1"
    assert [line.partition(": ")[2] for line in done.remarks] == ([expected] if told else [])
    assert run("txt2image", PROMPT, *options).succeeded().remarks == []


def test_a_prompt_that_is_too_long_is_remarked(run, models, tmp_path):
    output = tmp_path / "out.png"
    long = " ".join(["the red cat"] * 30 + ["on the blue"])
    done = run(
        "txt2image", long, "--model", models["sd"], "--steps", 1, "--n_images", 1, "--truncate", "--output", output
    )
    assert len(done.succeeded().remarks) == 1 and "on the blue" in done.remarks[0]


# --- quantization and precision --------------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch) -> list[StableDiffusion]:
    """The models that the scripts make; in the UNet and the text encoders the bits of each quantized matrix."""
    seen = []

    class Spied(StableDiffusion):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            encoders = [name for name in vars(self) if name.startswith("text_encoder")]
            self.unet_bits = bits(self.unet)
            self.text_bits = set().union(*(bits(getattr(self, name)) for name in encoders))
            seen.append(self)

    def bits(module: nn.Module) -> set[int]:
        return {m.bits for _, m in module.named_modules() if isinstance(m, nn.QuantizedLinear)}

    monkeypatch.setattr(engine, "StableDiffusion", Spied)
    return seen


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("model", ["sd", "xl"])
def test_the_switch_q_before_the_prompt(run, models, tmp_path, built, script, model):
    Image.effect_noise((64, 64), 60).save(tmp_path / "in.png")
    image = [tmp_path / "in.png"] if script == "image2image" else []
    size = ["--width", 64, "--height", 64]
    options = ["--model", models[model], *size, "--steps", 2, "--n_images", 1, "--output", tmp_path / "out.png"]
    run(script, "-q", *image, PROMPT, *options).succeeded()
    assert built[0].unet_bits == {8}
    # The text encoder of "sd" is narrower than a group in some places, never in all.
    assert built[0].text_bits == {4}
    assert pixels(tmp_path / "out.png").std() > 1


@pytest.mark.parametrize(
    "options, unet, text",
    [
        ([], set(), set()),
        (["--quantize"], {8}, {4}),
        *((["--unet_bits", b], {b}, set()) for b in (2, 3, 4, 5, 6, 8)),
        *((["--text_bits", b], set(), {b}) for b in (2, 3, 4, 5, 6, 8)),
        (["-q", "--unet_bits", 4], {4}, {4}),
        (["-q", "--text_bits", 8], {8}, {8}),
    ],
)
def test_bits(make_image, built, options, unet, text):
    image = make_image("--seed", 1, *options)
    assert (built[0].unet_bits, built[0].text_bits) == (unet, text) and image.std() > 1


@pytest.mark.parametrize(
    "device, options, half", [("cpu", [], False), ("gpu", [], True), ("gpu", ["--no-float16"], False)]
)
def test_half_precision_only_on_a_gpu(run, monkeypatch, device, options, half):
    asked = []

    def refuse(model, float16, **kwargs):
        asked.append(float16)
        raise ValueError("seen")

    monkeypatch.setattr(engine, "StableDiffusion", refuse)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(getattr(mx, device)))
    run("txt2image", PROMPT, *options).refused("seen")
    assert asked == [half]


def test_models_are_preloaded_before_the_first_step(make_image, built, monkeypatch):
    events = []
    load, denoise = StableDiffusion.ensure_models_are_loaded, UNet2DConditionModel.__call__
    monkeypatch.setattr(StableDiffusion, "ensure_models_are_loaded", lambda self: events.append("loaded") or load(self))
    monkeypatch.setattr(
        UNet2DConditionModel, "__call__", lambda self, *a, **k: events.append("step") or denoise(self, *a, **k)
    )
    make_image("--cfg", 1)
    assert events == ["step"]
    make_image("--cfg", 1, "--preload-models")
    assert events == ["step", "loaded", "step"]


# --- when something breaks on the way --------------------------------------------------------------------------------


@pytest.fixture
def three(run, models, tmp_path):
    """Make three images, --decoding_batch_size 1, into a folder of their own."""
    folder = tmp_path / "out"
    folder.mkdir()

    def call(*options) -> tuple[Finished, list[str]]:
        options = ["--model", models["sd"], "--n_images", 3, "--steps", 2, "--cfg", 1, "--seed", 1, *options]
        return run("txt2image", PROMPT, *options, "--output", folder / "a.png"), names(folder)

    return call


@pytest.mark.parametrize("error", [ValueError("it broke"), RuntimeError("[malloc] it\nbroke"), MemoryError()])
def test_images_are_kept_when_a_later_one_cannot_be_decoded(three, tmp_path, monkeypatch, error):
    decode, calls = StableDiffusion.decode, []

    def breaks(self, latents):
        calls.append(names(tmp_path / "out"))
        if len(calls) == 3:
            raise error
        return decode(self, latents)

    monkeypatch.setattr(StableDiffusion, "decode", breaks)
    done, left = three()
    done.failed(1, *str(error).split())
    assert calls == [[], ["a_1.png"], ["a_1.png", "a_2.png"]]  # each was there before the next was decoded
    assert left == ["a_1.png", "a_2.png"]
    assert done.out == [f"{tmp_path}/out/a_{i}.png seed {i}" for i in (1, 2)]
    assert all(pixels(tmp_path / "out" / name).shape == (64, 64, 3) for name in left)


def test_an_image_that_cannot_be_written_leaves_no_half_file(three, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save, calls = Image.Image.save, []

    def full(self, file, **options):
        calls.append(file)
        if len(calls) == 2:
            file.write(b"half of a picture")
            raise OSError(28, "No space left on device")
        save(self, file, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    done, left = three()
    done.failed(1, "a_2.png", "No space left on device", f"it is kept as {tmp_path}/a_2.png")
    assert left == ["a_1.png", "a_3.png"] and pixels(tmp_path / "a_2.png").shape == (64, 64, 3)
    assert done.out[1] == f"{tmp_path}/a_2.png seed 2" and len(done.out) == 3


def test_latents_that_are_not_finite(three, tmp_path, monkeypatch):
    unet, calls = UNet2DConditionModel.__call__, []

    def breaks(self, *args, **kwargs):
        calls.append(1)
        return unet(self, *args, **kwargs) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(UNet2DConditionModel, "__call__", breaks)
    (tmp_path / "out" / "a.png").write_text("an older picture")
    done, left = three("--steps", 4)
    done.failed(1, "step 2 ", "not finite")
    assert done.out == [] and left == ["a.png"] and len(calls) == 2
    assert (tmp_path / "out" / "a.png").read_text() == "an older picture"


def test_images_that_are_not_finite(three, monkeypatch):
    decode = StableDiffusion.decode
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, x: decode(self, x) * float("nan"))
    done, left = three()
    done.failed(1, "not finite")
    assert done.out == [] and left == []


@pytest.mark.parametrize("error", [RuntimeError("[metal::malloc] too\nlarge"), MemoryError("too large")])
def test_a_run_without_enough_memory(three, monkeypatch, error):
    def breaks(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(UNet2DConditionModel, "__call__", breaks)
    done, left = three()
    done.failed(1, "too large", "fewer images", "a smaller size")
    assert left == []


# --- images to start from --------------------------------------------------------------------------------------------


@pytest.fixture
def started_from(run, models, tmp_path, monkeypatch):
    """Run image2image on a file; returns the pixels that the model was given. The result has their size."""
    given, generate = [], StableDiffusion.generate_latents_from_image

    def spied(self, image, *args, **kwargs):
        given.append(image)
        return generate(self, image, *args, **kwargs)

    monkeypatch.setattr(StableDiffusion, "generate_latents_from_image", spied)

    def call(path: Path, *options) -> np.ndarray:
        output = tmp_path / "result.png"
        shared = ["--model", models["sd"], "--steps", 2, "--strength", 0.5, "--n_images", 1, "--output", output]
        run("image2image", path, PROMPT, *shared, "--overwrite", *options).succeeded()
        assert given[-1].mode == "RGB"
        image = np.asarray(given[-1]).astype(int)
        assert pixels(output).shape == image.shape
        return image

    return call


def halves(left: object, right: object, mode: str, size: tuple[int, int] = (96, 64)) -> Image.Image:
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def palette() -> Image.Image:
    image = halves(0, 1, "P")
    image.putpalette([*RED, *BLUE])
    return image


@pytest.mark.parametrize(
    "name, image, left, right",
    [
        ("grey.png", halves(40, 200, "L"), (40,) * 3, (200,) * 3),
        ("palette.gif", palette(), RED, BLUE),
        (
            "deep.png",
            Image.fromarray(np.array([[0x2000, 0xC000]], np.uint16)).resize((96, 64), 0),
            (32,) * 3,
            (191,) * 3,
        ),
        ("bits.png", halves(0, 1, "1"), (0,) * 3, WHITE),
        ("la.png", halves((0, 0), (90, 255), "LA"), WHITE, (90,) * 3),
        ("rgba.png", halves((255, 0, 0, 0), (0, 0, 255, 255), "RGBA"), WHITE, BLUE),
        ("half.webp", halves((0, 0, 0, 51), (0, 255, 0, 255), "RGBA"), (204,) * 3, GREEN),
        ("cmyk.tiff", halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), RED, BLUE),
    ],
)
def test_pictures_of_every_kind(started_from, tmp_path, name, image, left, right):
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    given = started_from(tmp_path / name)
    assert given.shape == (64, 96, 3)
    assert np.abs(given[:, :40] - left).max() <= 1 and np.abs(given[:, 56:] - right).max() <= 1


def test_a_photo_lying_on_its_side(started_from, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: what is stored on the left is the top
    halves(RED, BLUE, "RGB").save(tmp_path / "photo.jpg", exif=exif, quality=100, subsampling=0)
    given = started_from(tmp_path / "photo.jpg")
    assert given.shape == (96, 64, 3)
    assert np.abs(given[:40] - RED).max() <= 3 and np.abs(given[56:] - BLUE).max() <= 3


@pytest.mark.parametrize("size, worked_on", [((30, 30), (64, 64)), ((3000, 40), (256, 64)), ((70, 64), (72, 64))])
def test_sizes_of_pictures(started_from, tmp_path, size, worked_on):
    Image.effect_noise(size, 60).save(tmp_path / "in.png")
    assert started_from(tmp_path / "in.png").shape[1::-1] == worked_on


def test_size_options_for_pictures(started_from, tmp_path):
    Image.effect_noise((100, 50), 60).save(tmp_path / "in.png")
    for options, size in (
        (["--width", 160], (160, 80)),
        (["--height", 64], (128, 64)),
        (["--width", 64, "--height", 88], (64, 88)),
    ):
        assert started_from(tmp_path / "in.png", *options).shape[1::-1] == size


def test_ways_to_resize(started_from, tmp_path):
    picture = Image.new("RGB", (256, 128), GREEN)
    picture.paste(RED, (0, 0, 64, 128))
    picture.paste(BLUE, (192, 0, 256, 128))
    picture.save(tmp_path / "in.png")
    size = ["--width", 64, "--height", 64]
    crop, pad, stretch = (
        started_from(tmp_path / "in.png", *size, "--resize", way) for way in ("crop", "pad", "stretch")
    )
    assert np.array_equal(crop, started_from(tmp_path / "in.png", *size))
    assert np.abs(crop[:, 4:60] - GREEN).max() <= 1
    assert (pad[:15] == 255).all() and (pad[49:] == 255).all()
    for stripes in (pad[18:46], stretch):
        for colour, columns in ((RED, slice(0, 14)), (GREEN, slice(18, 46)), (BLUE, slice(50, 64))):
            assert np.abs(stripes[:, columns] - colour).max() <= 1


@pytest.mark.parametrize("strength, steps", [("0.01", 1), ("0.58", 29), ("1", 50)])
def test_strength_is_the_share_of_the_steps(run, models, tmp_path, monkeypatch, strength, steps):
    Image.effect_noise((64, 64), 60).save(tmp_path / "in.png")
    calls = []
    monkeypatch.setattr(
        UNet2DConditionModel, "__call__", lambda self, x, *args, **kwargs: calls.append(1) or mx.zeros_like(x)
    )
    options = ["--model", models["sd"], "--n_images", 1, "--steps", 50, "--output", tmp_path / "out.png"]
    run("image2image", tmp_path / "in.png", PROMPT, *options, "--strength", strength).succeeded()
    assert len(calls) == steps

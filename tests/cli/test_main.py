"""The command lines: what they refuse and how, what they write, and what they leave behind when something breaks."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from PIL import Image

from command_line import PROMPT, SCRIPTS, names, pixels, process
from stable_diffusion import SAMPLERS
from stable_diffusion.app import engine
from stable_diffusion.cli.arguments import read
from stable_diffusion.cli.flags import FLAGS, FOREIGN
from stable_diffusion.cli.parser import script_parser
from stable_diffusion.images.files import save
from stable_diffusion.models.unet import UNet2DConditionModel
from stable_diffusion.pipeline import StableDiffusion

SMALL = ("--width", 64, "--height", 64, "--steps", 1, "--n_images", 1)


@pytest.fixture
def models(sd1_folder, xl_folder) -> dict[str, Path]:
    """Random checkpoints: "sd" of 64x64 pixels with guidance 7.5, "xl" of 128x128 with 2 steps and no guidance."""
    return {"sd": sd1_folder, "xl": xl_folder}


@pytest.fixture
def make_image(run, models, tmp_path):
    """Run txt2image for 64x64 pixels in one step, or whatever ``options`` say; returns the pixels of --output."""

    def call(*options, model: str = "sd", prompt: str = PROMPT) -> np.ndarray:
        output = tmp_path / "made.png"
        run(
            "txt2image", prompt, "--model", models[model], *SMALL, "--output", output, "--overwrite", *options
        ).succeeded()
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
    Image.new("RGB", (96, 64), (255, 0, 0)).save(tmp_path / "in.png")
    options = ["--model", models["xl"], "--n_images", 1, "--output", tmp_path / "out.webp", "--verbose"]
    done = process("image2image", tmp_path / "in.png", PROMPT, *options).succeeded()
    assert len(done.out) == 1 and re.fullmatch(rf"{tmp_path}/out\.webp seed \d+", done.out[0])
    assert any(re.search(r"peak memory: [\d.]+ GB for the UNet, [\d.]+ GB overall", line) for line in done.remarks)
    assert pixels(tmp_path / "out.webp").shape == (64, 96, 3)


def test_a_process_that_is_refused():
    process("txt2image", PROMPT, "--width", "100").refused("--width", "'100'", "multiple of 8")


# --- refused before a model is touched -------------------------------------------------------------------------------

COUNT = "a whole number from 1 to 9999"
REFUSED = [
    ("--width 100", "--width", "'100'", "a multiple of 8 from 64 to 16384"),
    ("--width abc", "--width", "'abc'", "a multiple of 8"),
    ("--width 512.0", "--width", "'512.0'", "a multiple of 8"),
    ("--height -64", "--height", "'-64'", "from 64"),
    ("--height 16392", "--height", "'16392'", "to 16384"),
    ("--steps 2.5", "--steps", "'2.5'", COUNT),
    ("--n_images 99999999999999999999", "--n_images", "'99999999999999999999'", COUNT),
    ("--n_images " + "9" * 400, "--n_images", COUNT),
    ("--n_rows 0", "--n_rows", "'0'", COUNT),
    ("--batch_size 0", "--batch_size", "'0'", COUNT),
    ("--decoding_batch_size 0", "--decoding_batch_size", "'0'", COUNT),
    ("--seed -1", "--seed", "'-1'", "a whole number from 0 to 2^63 - 1"),
    ("--seed 9223372036854775808", "--seed", "'9223372036854775808'", "2^63 - 1"),
    ("--cfg nan", "--cfg", "'nan'", "a number"),
    ("--eta inf", "--eta", "'inf'", "a number from 0 to 1"),
    ("--guidance_interval 0.5", "--guidance_interval", "'0.5'", "start,end"),
    ("--guidance_interval 0.6,0.2", "--guidance_interval", "'0.6,0.2'", "0.2,0.8"),
    ("--guidance_interval 0,1.5", "--guidance_interval", "'0,1.5'", "shares of the steps"),
    ("--token_merging 0.8", "--token_merging", "'0.8'", "from 0 to 0.75"),
    ("--deep_cache 0", "--deep_cache", "'0'", "a whole number of at least 1"),
    ("--clip_skip -1", "--clip_skip", "'-1'", "a whole number"),
    ("--guidance_rescale 1.5", "--guidance_rescale", "'1.5'", "a number from 0 to 1"),
    ("--memory_limit 0", "--memory_limit", "'0'", "a number of GB above 0"),
    ("--low_memory --preload_models", "--low_memory", "--preload_models", "leave one out"),
    ("--sampler eule", "--sampler", "'eule'", *SAMPLERS),
    ("--sampler euler --eta 0.5", "euler", "eta", "leave it out"),
    ("--resize zoom", "'zoom'", "crop", "pad", "stretch"),
    ("--unet_bits 7", "--unet_bits", "7", "2, 3, 4, 5, 6, 8"),
    ("--text_bits x", "--text_bits", "'x'"),
    ("--output=", "output path is empty", "image.png"),
    ("--output {tmp}/none/out.png", "folder {tmp}/none does not exist", "create it"),
    ("--output no\nfolder\r\nhere/out.png", "no folder here does not exist"),  # still in one line
    ("--n_images 2 --overwrite --output {tmp}/taken.png", "{tmp}/taken_2.png is a folder"),
    ("--n_rwos 2", "--n_rwos"),
    ("--negative_prompt \udcff", "'\\udcff'", "Unicode"),
    ("words", "words"),
]


@pytest.mark.parametrize("options, words", [(row[0], row[1:]) for row in REFUSED])
def test_refused(run, no_model, tmp_path, options, words):
    (tmp_path / "taken_2.png").mkdir()
    options = [part.replace("{tmp}", str(tmp_path)) for part in options.split(" ")]
    done = run("txt2image", PROMPT, "--n_images", 1, *options)
    done.refused(*(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert names(tmp_path) == ["taken_2.png"]


def test_bad_prompts(run, no_model):
    run("txt2image").refused("give a prompt, or --prompt_file")
    run("image2image", "in.png").refused("prompt")
    run("txt2image", "a \udcff").refused("'a \\udcff'", "Unicode")
    run("txt2image", "{a|b|c|d|e|f|g|h|i|j}" * 9).refused("at most 10000")


@pytest.mark.parametrize(
    "text, words",
    [
        ("# only a remark\n", ["holds no prompt"]),
        ("a\nb --steps 0", ["line 2", "--steps", "'0'"]),
        ("a --model sd15", ["line 1", "--model"]),
        ("a --prompt_file more.txt", ["line 1", "--prompt_file"]),
        ("a --negative_prompt 'open", ["line 1", "closing quotation"]),
        (b"\xff\xfe\x00", ["prompts.txt", "UTF-8"]),
    ],
)
def test_bad_files_of_prompts(run, no_model, tmp_path, text, words):
    file = tmp_path / "prompts.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    run("txt2image", "--prompt_file", file).refused(*words)
    run("txt2image", "a", "--prompt_file", file).refused("a prompt or a file of them")
    run("txt2image", "--prompt_file", tmp_path / "none.txt").refused("none.txt", "cannot be read")


def test_a_prompt_takes_the_place_of_what_alternatives_of_a_picture_came_to(tmp_path):
    record = {"arguments": {"prompt": "{red|blue}", "resolved_prompt": "red"}}
    save(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"stable_diffusion": json.dumps(record)})
    for words, text in (([], "red"), (["green"], "green")):
        ((request, _),) = read("txt2image", ["--from_image", str(tmp_path / "a.png"), *words]).lines
        assert request.text == text


# --- refused by the loader -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["sdx", "", "https://example.com/a/b"])
def test_unknown_model(run, monkeypatch, model):
    monkeypatch.setattr("stable_diffusion.networks.load_component", None)
    run("txt2image", PROMPT, "--model", model).refused(repr(model), "sdxl-turbo", "sd15", "tiny", "a folder")


@pytest.mark.parametrize(
    "file, changes",
    [
        ("unet/config.json", {"act_fn": "mish", "resnet_time_scale_shift": "scale_shift"}),
        ("unet/config.json", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}),
        ("vae/config.json", {"act_fn": "mish"}),
        ("text_encoder/config.json", {"hidden_act": "relu"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}),
    ],
)
def test_configs_with_unknown_values(run, models, tmp_path, file, changes):
    """Each of them is named, before any step."""
    path = shutil.copytree(models["sd"], tmp_path / "model") / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    done = run("txt2image", PROMPT, "--model", tmp_path / "model", "--output", tmp_path / "out.png")
    done.refused(*(repr(value) for value in changes.values()))
    assert not (tmp_path / "out.png").exists()


# --- flags -----------------------------------------------------------------------------------------------------------

VALUES = {"PIXELS": "64", "N": "2", "SHARE": "0.5", "SCALE": "2", "FRACTION": "0.5", "FACTOR": "2", "GB": "6"}
VALUES |= {"START,END": "0,1", "L,T,R,B": "8,0,0,0", "NAME": "euler"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_with_underscores_and_with_hyphens(script):
    parser = script_parser(script)
    for usage in [usage for group in FLAGS.values() for usage in group]:
        flag = usage.split()[0]
        if flag[2:] in FOREIGN[script]:
            continue
        (action,) = (action for action in parser._actions if flag in action.option_strings)
        value = str(action.choices[0]) if action.choices else VALUES.get(action.metavar, "x")
        same = "--" + flag[2:].replace("_", "-")
        lines = [[flag], [same]] if action.nargs == 0 else [[flag, value], [same, value], [f"{same}={value}"]]
        one, *others = (vars(parser.parse_args(line)) for line in lines)
        assert action.dest in one and all(other == one for other in others)


@pytest.mark.parametrize("flag", ["--list_samplers", "--list-samplers"])
def test_list_of_samplers(run, flag):
    done = run("image2image", flag).succeeded()
    assert [line.split()[0] for line in done.out] == ["sampler", *SAMPLERS] and done.err == ""


# --- good runs -------------------------------------------------------------------------------------------------------


def test_one_image_is_exactly_the_size_asked_for(make_image, tmp_path):
    for width, height in ((64, 96), (136, 72)):
        image = make_image("--width", width, "--height", height)
        assert names(tmp_path) == ["made.png"] and image.shape == (height, width, 3)
        # No border: the outermost pixels are part of a picture, which is not of one colour.
        assert all(edge.std() > 1 for edge in (image[0], image[-1], image[:, 0], image[:, -1]))


def test_the_models_own_size_and_steps(run, models, tmp_path):
    output = tmp_path / "out.png"
    options = ["--model", models["xl"], "--n_images", 1, "--output", output, "--overwrite", "--json"]
    done = run("txt2image", PROMPT, *options).succeeded()
    assert pixels(output).shape == (128, 128, 3) and json.loads(done.out[0])["steps"] == 2
    run("txt2image", PROMPT, *options, "--width", 64).succeeded()
    assert pixels(output).shape == (128, 64, 3)


def test_a_file_of_prompts(run, models, make_image, tmp_path):
    """Each line is a run of its own; what it does not say is said by the command line."""
    lines = [
        "# colours",
        "the red cat",
        "",
        "blue --seed 3 --cfg 5 --n_images 2",
        'the {red|blue} --width 72 --negative_prompt "on the"',
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    common = ["--model", models["sd"], *SMALL, "--seed", 8, "--output", tmp_path / "out.png"]
    done = run("txt2image", "--prompt-file", tmp_path / "prompts.txt", *common).succeeded()
    assert [int(line.split()[-1]) for line in done.out] == [8, 3, 4, 5, 6]
    assert "several sizes" in done.remarks[0] and not (tmp_path / "out.png").exists()
    wide = ["--width", 72, "--negative_prompt", "on the"]
    singles = [("the red cat", ["--seed", 8]), ("blue", ["--seed", 3, "--cfg", 5]), ("blue", ["--seed", 4, "--cfg", 5])]
    singles += [("the red", ["--seed", 5, *wide]), ("the blue", ["--seed", 6, *wide])]
    for i, (prompt, flags) in enumerate(singles, start=1):
        assert np.abs(pixels(tmp_path / f"out_{i}.png") - make_image(*flags, prompt=prompt)).max() <= 1


# --- seeds and guidance ----------------------------------------------------------------------------------------------


def test_a_random_seed_is_printed_and_gives_the_image_again(run, models, tmp_path, make_image):
    options = ["--model", models["sd"], "--steps", 1, "--n_images", 1, "--output", tmp_path / "a.png", "--overwrite"]
    seeds = [run("txt2image", PROMPT, *options).succeeded().out[0].split()[-1] for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert np.array_equal(pixels(tmp_path / "a.png"), make_image("--seed", seeds[1]))
    assert not np.array_equal(pixels(tmp_path / "a.png"), make_image("--seed", seeds[0]))


@pytest.mark.parametrize("options", [("--sampler", "euler_a"), ("--decoding_batch_size", 2)])
def test_every_image_of_a_run_is_the_single_image_of_its_seed(run, models, tmp_path, make_image, options):
    several = ["--model", models["sd"], "--steps", 2, "--n_images", 3, "--seed", 0, "--output", tmp_path / "out.png"]
    run("txt2image", PROMPT, *several, *options).succeeded()
    singles = [make_image("--steps", 2, "--seed", i, *options) for i in range(3)]
    for i, single in enumerate(singles):
        # One level: a matrix product may add in another order for another batch size.
        assert np.abs(pixels(tmp_path / f"out_{i + 1}.png") - single).max() <= 1
    assert np.abs(singles[0] - singles[1]).max() > 10


def test_the_largest_seed(run, models, tmp_path):
    options = ["--model", models["sd"], "--steps", 1, "--n_images", 2, "--output", tmp_path / "out.png"]
    done = run("txt2image", PROMPT, *options, "--seed", 2**63 - 1).succeeded()
    assert [line.split()[-1] for line in done.out[:2]] == [str(2**63 - 1), str(2**63)]


def test_guidance_of_zero_is_zero_and_not_the_default(make_image):
    options = ["--cfg", 0], ["--cfg", 1], ["--cfg", 7.5], []
    zero, none, seven, default = (make_image("--seed", 1, "--steps", 3, *cfg) for cfg in options)
    assert np.array_equal(zero, none) and np.array_equal(seven, default)
    assert np.abs(zero - default).max() > 1


@pytest.mark.parametrize("model, cfg, told", [("xl", (), "0"), ("sd", ("--cfg", 1), "1"), ("sd", (), None)])
def test_a_negative_prompt_without_guidance_is_remarked(run, models, tmp_path, model, cfg, told):
    options = ["--model", models[model], *SMALL, *cfg, "--output", tmp_path / "out.png"]
    done = run("txt2image", PROMPT, *options, "--negative_prompt", "the blue").succeeded()
    expected = f"the negative prompt has no effect at a guidance scale of {told}; it needs more than 1"
    assert [line.partition(": ")[2] for line in done.remarks] == ([expected] if told else [])
    assert run("txt2image", PROMPT, *options).succeeded().remarks == []


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


@pytest.mark.parametrize("model", ["sd", "xl"])
@pytest.mark.parametrize(
    "options, unet, text",
    [
        ([], set(), set()),
        (["--quantize"], {8}, {4}),
        (["--unet_bits", 3], {3}, set()),
        (["--text_bits", 2], set(), {2}),
        (["-q", "--unet_bits", 4], {4}, {4}),
        (["-q", "--text_bits", 8], {8}, {8}),
    ],
)
def test_bits(make_image, built, model, options, unet, text):
    image = make_image("--seed", 1, *options, model=model)
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


def test_models_are_preloaded_before_the_first_step(make_image, monkeypatch):
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


@pytest.mark.parametrize("error", [ValueError("it broke"), RuntimeError("[malloc] it\nbroke"), MemoryError()])
def test_images_are_kept_when_a_later_one_cannot_be_decoded(run, models, tmp_path, monkeypatch, error):
    decode, calls = StableDiffusion.decode, []

    def breaks(self, latents):
        calls.append(names(tmp_path))
        if len(calls) == 3:
            raise error
        return decode(self, latents)

    monkeypatch.setattr(StableDiffusion, "decode", breaks)
    options = ["--model", models["sd"], *SMALL, "--n_images", 3, "--output", tmp_path / "a.png"]
    done = run("txt2image", PROMPT, *options)
    remedies = () if isinstance(error, ValueError) else ("fewer images", "a smaller size")
    done.failed(1, *str(error).split(), *remedies)
    assert calls == [[], ["a_1.png"], ["a_1.png", "a_2.png"]]  # each was there before the next was decoded
    assert names(tmp_path) == ["a_1.png", "a_2.png"] and len(done.out) == 2

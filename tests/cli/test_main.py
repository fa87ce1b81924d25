"""The command lines: what they refuse and how, what they write, and what they leave behind when something breaks."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from command_line import PROMPT, names, pixels, process
from stable_diffusion import SAMPLERS
from stable_diffusion.app import engine
from stable_diffusion.app.metadata import read_record
from stable_diffusion.cli import arguments
from stable_diffusion.cli.flags import FOREIGN
from stable_diffusion.cli.foreign_flags import COUNTERPARTS
from stable_diffusion.cli.parser import script_parser
from stable_diffusion.models.unet import UNet2DConditionModel
from stable_diffusion.pipeline import StableDiffusion
from tools.flags import flags_of

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
        given = ["--model", models[model], *SMALL, "--output", output, "--overwrite", *options]
        run("txt2image", prompt, *given).succeeded()
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
    assert any(line.endswith("xl, 96x64, 2 steps of euler_a, cpu, float32") for line in done.remarks)
    assert pixels(tmp_path / "out.webp").shape == (64, 96, 3)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_sees_what_a_run_does_and_has_taken(run, tmp_path, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    options = ["--model", "tiny", "--steps", "1,2", "--width", 64, "--output", tmp_path / "a.png", "--json"]
    done = run("txt2image", PROMPT, *options).succeeded()
    assert all(json.loads(line) for line in done.out)
    if not is_terminal:
        assert done.err == ""
        return
    first, last = done.remarks
    assert first.endswith("tiny, 64x64, 1/2 steps of ddim, cpu, float32")
    assert re.search(
        r"2 images in [\d.]+ s, [\d.]+ s/step, peak memory: [\d.]+ GB for the UNet, [\d.]+ GB overall", last
    )


def test_a_process_that_is_refused():
    process("txt2image", PROMPT, "--width", "100").refused("--width", "'100'", "multiple of 8")


# --- refused before a model is touched -------------------------------------------------------------------------------

BAD_VALUES = {  # what is said: flags and their values
    "a multiple of 8 from 32 to 16384": "--width 100; --width 512.0; --height 16392",
    "a whole number from 1 to 9999": "--steps 2.5; --n_rows 0; --batch_size 0; --decoding_batch_size 0; "
    f"--hires_steps 0; --preview_every 0; --n_images {'9' * 400}",
    "a whole number from -1 to 2^63 - 1": "--seed 9223372036854775808",
    "a number": "--cfg nan; --image_cfg nan",
    "a number from 0 to 1": "--eta inf; --guidance_rescale 1.5; --control_start 1.5; --control_end -1",
    "a number above 0 and at most 1": "--strength 0; --strength nan; --hires_strength 0; --refiner_start 0",
    "a number from 1 to 8": "--hires 0.5",
    "a number from 0 to 9999": "--mask_blur -1",
    "a whole number": "--mask_padding -1; --clip_skip -1; --deep_cache 0",
    "from 0 to 0.75": "--token_merging 0.8",
    "a number above 0 and at most 9999": "--memory_limit 0",
    "start,end as fractions of the steps, such as 0.2,0.8": "--guidance_interval 0.5; --guidance_interval 0.6,1.2",
    "left,top,right,bottom in pixels": "--expand 8,8,8; --expand 8,8,8,x; --expand 99999,0,0,0",
}


@pytest.mark.parametrize("said", BAD_VALUES)
def test_values_that_are_refused(run, said):
    for flag, value in map(str.split, BAD_VALUES[said].split("; ")):
        script = "image2image" if flag[2:] in FOREIGN["txt2image"] else "txt2image"
        run(script, PROMPT, flag, value).refused(flag, repr(value)[:100], said)


REFUSED = [
    ("--low_memory --preload_models", "--low_memory", "--preload_models", "omit one"),
    ("--sampler euler --eta 0.5", "euler", "eta", "omit it"),
    ("--guidance_interval 0.6,0.2", "--guidance_interval (0.6, 0.2)", "start <= end"),
    ("--resize zoom", "'zoom'", "crop", "pad", "stretch"),
    ("--unet_bits 7", "--unet_bits", "7", "2, 3, 4, 5, 6, 8"),
    ("--text_bits x", "--text_bits", "'x'"),
    ("--output=", "output path is empty", "image.png"),
    ("--output no\nfolder\r\nhere", "no folder here has the suffix ''", "for a folder"),  # in one line
    ("--n_images 2 --overwrite --output {tmp}/taken.png", "{tmp}/taken_2.png is a folder"),
    ("--negative_prompt \udcff", "'\\udcff'", "Unicode"),
    ("a b --cfg 1", "in quotes", f'"{PROMPT} a b"'),
    ("--cfg 1 4", "4 belongs to no flag", "commas: --cfg 1,4"),
    ("-p again", "given twice", f"{PROMPT!r}", "'again'"),
    ("--canny", "--canny has no effect without --controlnet"),
    ("--control_end 0.5", "--control_end has no effect without --controlnet"),
    ("--hires_steps 5", "--hires_steps has no effect without --hires"),
    ("--refiner_start 0.5", "--refiner_start has no effect without --refiner"),
    ("--resize pad", "--resize has no effect without --control_image"),
    ("--lora_partial", "--lora_partial has no effect without --lora or --lora_dir"),
    ("--pag_layers mid", "--pag_layers has no effect without --pag_scale"),
    ("--without lora", "--without has no effect without --from_image"),
    ("--quality 90", "--quality is for JPEG and WebP"),
    ("--original_size 640", "--original_size", "'640' is not WIDTHxHEIGHT"),
    ("--crop 640x", "--crop", "'640x' is not left,top"),
    ("--schedule karas", "did you mean karras?"),
    ("--seed -2", "'-2' is not a whole number from -1"),
]


@pytest.mark.parametrize("options, words", [(row[0], row[1:]) for row in REFUSED])
def test_refused(run, no_model, tmp_path, options, words):
    (tmp_path / "taken_2.png").mkdir()
    done = run("txt2image", PROMPT, "--n_images", 1, *options.replace("{tmp}", str(tmp_path)).split(" "))
    done.refused(*(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert names(tmp_path) == ["taken_2.png"]


def test_bad_prompts(run, no_model, tmp_path):
    run("txt2image", "--seed", 1).refused("give a prompt in quotes, or --prompt_file")
    run("image2image", "in.png").refused("there is no image at in.png")
    run("image2image", __file__).refused("give a prompt after the image")
    run("txt2image", __file__, "a cat").refused("is a file; to change an image: image2image")
    run("txt2image", "a \udcff").refused("'a \\udcff'", "Unicode")
    run("txt2image", "{a|b|c|d|e|f|g|h|i|j}" * 9).refused("the limit is 10000")
    run("txt2image", "a", "--prompt_file", "prompts.txt").refused("a prompt or a file of them")
    run("txt2image", "--prompt_file", tmp_path / "none.txt").refused("none.txt", "cannot be read")


@pytest.mark.parametrize(
    "text, words",
    [
        ("# only a remark\n", ["has no prompt"]),
        ("a\nb --steps 0", ["line 2", "--steps", "'0'"]),
        ("a --prompt_file more.txt", ["line 1", "--prompt_file"]),
        ("a --negative_prompt 'open", ["line 1", "closing quotation"]),
        ("\udcff", ["prompts.txt", "UTF-8"]),
    ],
)
def test_bad_files_of_prompts(run, no_model, tmp_path, text, words):
    file = tmp_path / "prompts.txt"
    file.write_text(text, errors="surrogateescape")
    run("txt2image", "--prompt_file", file).refused(*words)


# --- refused by the loader -------------------------------------------------------------------------------------------


def test_unknown_model(run):
    run("txt2image", PROMPT, "--model", "sdx").refused("'sdx'", "sdxl-turbo", "sd15", "tiny", "a folder")


def test_a_config_with_unknown_values(run, models, tmp_path):
    """Each of them is named, before any step."""
    path = shutil.copytree(models["sd"], tmp_path / "model") / "unet" / "config.json"
    changes = {"act_fn": "mish", "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    done = run("txt2image", PROMPT, "--model", tmp_path / "model", "--output", tmp_path / "out.png")
    done.refused(*(repr(value) for value in changes.values()))
    assert names(tmp_path) == ["model"]


# --- flags -----------------------------------------------------------------------------------------------------------


def test_flags_with_underscores_and_with_hyphens():
    words = "a --n_images 2 --lora_dir=my-loras --no_grid --guidance_interval 0,1 --prediction=v_prediction"
    parse = script_parser("txt2image").parse_args
    hyphens = re.sub(r"(?<=--)\w+", lambda flag: flag[0].replace("_", "-"), words)
    assert "--guidance-interval" in hyphens and parse(hyphens.split()) == parse(words.split())
    assert parse(words.split()).lora_dir == ["my-loras"] and parse(["--", "--n-images"]).prompt == "--n-images"


FLAGS_OF_OTHERS = {
    "--ddim_steps 50": "--ddim_steps is --steps here",
    "--n-steps=50 --guidance-scale 7": "--n-steps is --steps here; --guidance-scale is --cfg here",
    "-H 512": "-H is --height here",
    "--size 512x512": "--size is --width and --height here",
    "--precision full": "--precision is --dtype float32, float16 or bfloat16 here",
    "--turbo": "--turbo: omit it",
    "--safety_checker": "--safety_checker is --safety_check here",
    "--disable-safety-checker": "--disable-safety-checker: omit it, the safety check is off by default",
    "--init-img a.png": '--init-img: give the image as the first word: image2image IMAGE "prompt"',
    "--denoising-strength 0.5": "--denoising-strength is --strength of image2image",
    "--strength 0.5": "--strength is a flag of image2image",
    "--stesp 5": "unknown flag --stesp; did you mean --steps?",
    "--nothing": "unknown flag --nothing; see --help_all",
    "-z": "unknown flag -z",
}


@pytest.mark.parametrize("flags", FLAGS_OF_OTHERS)
def test_flags_of_other_programs_are_answered_with_ours(run, no_model, flags):
    run("txt2image", *flags.split(), "-p", PROMPT).refused(FLAGS_OF_OTHERS[flags])


def test_no_foreign_name_is_ours_and_all_counterparts_are():
    known = {name for script in FOREIGN for name in flags_of(script_parser(script))}
    assert {flag for text in COUNTERPARTS.values() for flag in re.findall(r"--\w+", text)} <= known | {"--fixed_seed"}
    assert not {f"--{name}" for name in COUNTERPARTS} & known


@pytest.mark.parametrize("words", [[PROMPT], ["-p", PROMPT], ["--prompt", PROMPT], [f"-p{PROMPT}"]])
def test_a_prompt_with_and_without_a_flag(words):
    for script, image in (("txt2image", []), ("image2image", ["in.png"])):
        ((request, _),) = arguments.read(script, [*image, *words, "--cpu"]).lines
        assert request.prompt == PROMPT and request.image == (image[0] if image else None)


def test_list_of_samplers(run):
    done = run("image2image", "--list-samplers").succeeded()
    assert [line.split()[0] for line in done.out] == ["sampler", *SAMPLERS] and done.err == ""


# --- good runs -------------------------------------------------------------------------------------------------------


def test_the_models_own_size_and_steps(run, models, tmp_path):
    options = ["--model", models["xl"], "--n_images", 1, "--output", tmp_path / "out.png", "--json"]
    record = json.loads(run("txt2image", PROMPT, *options, "--width", 64).succeeded().out[0])
    assert (record["width"], record["height"], record["steps"]) == (64, 128, 2)


def test_a_file_of_prompts(run, models, tmp_path):
    """Each line is a run of its own; what it does not say is said by the command line."""
    lines = ["# colours", "the red cat", "", "blue --seed 3 --n_images 2", "the {red|blue} --width 72"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    common = ["--model", models["sd"], *SMALL, "--seed", 8, "--output", tmp_path / "out.png"]
    done = run("txt2image", "--prompt-file", tmp_path / "prompts.txt", *common).succeeded()
    assert [int(line.split()[-1]) for line in done.out] == [8, 3, 4, 5, 6]
    assert [pixels(tmp_path / f"out_{i}.png").shape[1] for i in range(1, 6)] == [64, 64, 64, 72, 72]
    assert "differ in size" in done.remarks[0] and not (tmp_path / "out.png").exists()


# --- seeds and guidance ----------------------------------------------------------------------------------------------


def test_a_random_seed_is_printed_and_gives_the_image_again(run, models, tmp_path, make_image):
    options = ["--model", models["sd"], "--steps", 1, "--n_images", 1, "--output", tmp_path / "a.png", "--overwrite"]
    seeds = [run("txt2image", PROMPT, *options).succeeded().out[0].split()[-1] for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert np.array_equal(pixels(tmp_path / "a.png"), make_image("--seed", seeds[1]))
    assert not np.array_equal(pixels(tmp_path / "a.png"), make_image("--seed", seeds[0]))


def test_the_largest_seed(run, models, tmp_path):
    options = ["--model", models["sd"], *SMALL, "--n_images", 2, "--output", tmp_path / "out.png"]
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


def test_cfg_pp_reads_the_negative_prompt_at_every_scale(run, tmp_path):
    """Without remarks; the default scale is in the record."""
    images = []
    for negative in ("blue", "a red heart"):
        given = ["--model", "tiny", "--steps", 4, "--sampler", "euler_cfg_pp", "--n_images", 1, "--seed", 1]
        path = tmp_path / f"{len(images)}.png"
        done = run("txt2image", PROMPT, *given, "--output", path, "--negative_prompt", negative).succeeded()
        images.append(Image.open(path))
        assert done.remarks == [] and "CFG scale: 0.6" in images[-1].info["parameters"]
    assert np.abs(np.subtract(*(np.asarray(image, dtype=int) for image in images))).max() > 50


@pytest.mark.parametrize(
    "options, remark",
    [
        ("--lora_dir {}", "--lora_dir has no effect: no prompt has <lora:name:0.8>"),
        ("--wildcards {}", "--wildcards has no effect: no prompt has __name__"),
        ("--alternatives one", "--alternatives has no effect: no prompt has {red|blue}"),
        ("--n_rows 2", "n_rows 2 has no effect: no grid is drawn"),
        ("--n_images 2 --n_rows 2 --no_grid", "n_rows 2 has no effect: no grid is drawn"),
        ("--cfg 1 --guidance_interval 0,0.5", "guidance_interval has no effect at a guidance scale of 1"),
        ("--crop 1,2", "crop has no effect: tiny is not SDXL"),
        ("--cfg 1 --aesthetic_score 5", "aesthetic_score has no effect: tiny is not SDXL"),
        ("--cfg 0 --guidance_rescale 0.7", "guidance_rescale has no effect at a guidance scale of 0"),
        ("--cfg 1 --guidance_interval 0,0.5 --pag_scale 2 --guidance_rescale 0.7", "guidance_rescale has no effect"),
    ],
)
def test_flags_without_effect_are_remarked(run, tmp_path, options, remark):
    given = ["--model", "tiny", *SMALL, "--output", tmp_path / "a.png", *options.replace("{}", str(tmp_path)).split()]
    done = run("txt2image", PROMPT, *given).succeeded()
    assert len(done.remarks) == 1 and remark in done.remarks[0]


@pytest.mark.parametrize(
    "options, remark",
    [
        ("--original_size 64x64 --crop 1,2 --target_size 64x64", None),
        ("--negative_crop 1,2", "negative_crop has no effect at a guidance scale of 0"),
        ("--aesthetic_score 5", "aesthetic_score has no effect: only SDXL's refiner reads it"),
    ],
)
def test_sizes_that_a_model_does_not_read_are_remarked(run, models, tmp_path, options, remark):
    given = ["--model", models["xl"], *SMALL, "--output", tmp_path / "a.png", *options.split()]
    done = run("txt2image", PROMPT, *given).succeeded()
    assert len(done.remarks) == (remark is not None) and all(remark in line for line in done.remarks)


def test_what_a_picture_records_counts_as_given(run, tmp_path):
    made = ["--output", tmp_path / "a.png", "--model", "tiny", *SMALL, "--hires", 1.5]
    run("txt2image", PROMPT, *made).succeeded()
    again = ["--from_image", tmp_path / "a.png", "--output", tmp_path / "b.png"]
    run("txt2image", *again, "--hires_strength", 1).succeeded()
    run("txt2image", *again, "--without", "hires", "--hires_strength", 1).refused("without --hires")


# --- quantization and precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, unet, text",
    [([], None, None), (["-q"], 8, 4), (["--quantize", "--unet_bits", "3", "--text_bits", "8"], 3, 8)],
)
def test_bits(options, unet, text):
    ((request, _),) = arguments.read("txt2image", [PROMPT, *options]).lines
    assert engine.chosen_networks(request) == {"parts": {}, "unet_bits": unet, "text_bits": text}


@pytest.mark.parametrize(
    "device, options, expected",
    [
        ("cpu", [], mx.float32),
        ("gpu", [], mx.float16),
        ("cpu", ["--dtype", "float16"], mx.float16),
        ("gpu", ["--dtype=bfloat16"], mx.bfloat16),
        ("gpu", ["--no-float16"], mx.float32),
    ],
)
def test_half_precision_only_on_a_gpu_unless_it_is_asked_for(monkeypatch, device, options, expected):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(getattr(mx, device)))
    ((request, _),) = arguments.read("txt2image", [PROMPT, *options]).lines
    assert engine.dtype_of(request) == expected


def test_a_device_that_is_not_there(run, monkeypatch, no_model):
    available = mx.is_available
    monkeypatch.setattr(mx, "is_available", lambda device: device == mx.cpu and available(device))
    run("txt2image", PROMPT, "--device", "gpu").refused("finds no gpu here", "omit the device")
    monkeypatch.setenv("SD_DEVICE", "gpu")
    run("txt2image", PROMPT).refused("finds no gpu here", "SD_DEVICE")
    monkeypatch.setenv("SD_DEVICE", "tpu")
    run("image2image", "x.png", PROMPT).refused("the device 'tpu' is unknown", "cpu or gpu")


def test_the_device_of_a_flag_wins(make_image, monkeypatch):
    monkeypatch.setenv("SD_DEVICE", "tpu")
    make_image("--device", "cpu")


def test_type_and_exactness_are_in_the_record_and_repeated(models, run, tmp_path, monkeypatch):
    """MLX reads the variable at each convolution."""
    monkeypatch.setenv("MLX_CONV_WINOGRAD_WORKING_SET", "0")
    seen, unet = [], UNet2DConditionModel.__call__

    def watched(self, x, *args, **kwargs):
        seen.append((x.dtype, os.environ["MLX_CONV_WINOGRAD_WORKING_SET"]))
        return unet(self, x, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "__call__", watched)
    options = ["--n_images", 1, "--cfg", 1, "--model", models["sd"], *SMALL]
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    run("txt2image", PROMPT, *options, "--output", first).succeeded()
    assert set(seen) == {(mx.float32, "0")}
    run("txt2image", PROMPT, *options, "--exact", "--dtype", "bfloat16", "--output", first, "--overwrite").succeeded()
    monkeypatch.setenv("MLX_CONV_WINOGRAD_WORKING_SET", "0")
    seen.clear()
    run("txt2image", "--from_image", first, "--model", models["sd"], "--output", again).succeeded()
    assert set(seen) == {(mx.bfloat16, "1")} and np.array_equal(pixels(first), pixels(again))
    record = read_record(again)
    assert record.arguments["dtype"] == "bfloat16" and record.arguments["exact"] is True
    assert record.details["software"]["type"] == "bfloat16"


def test_models_are_preloaded_before_the_first_step(make_image, monkeypatch):
    events, load = [], StableDiffusion.ensure_models_are_loaded
    monkeypatch.setattr(StableDiffusion, "ensure_models_are_loaded", lambda self: events.append("loaded") or load(self))
    monkeypatch.setattr(UNet2DConditionModel, "__call__", lambda self, x, *_, **__: events.append("step") or x)
    make_image("--cfg", 1)
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

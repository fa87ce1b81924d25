"""The engine by its scripts: the order of batches and files, overflow in half precision, --json."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from PIL import Image

import loras
from command_line import PROMPT, ROOT, names, pixels
from stable_diffusion import StableDiffusion
from stable_diffusion.app import memory
from stable_diffusion.models.unet import UNet2DConditionModel
from stable_diffusion.models.vae import AutoencoderKL

SMALL = ["--width", 64, "--height", 64, "--cfg", 1, "--seed", 1]


@pytest.fixture
def make(run, sd1_folder, tmp_path, monkeypatch) -> Callable:
    """Run txt2image into a folder of its own, with memory for all networks at once."""
    monkeypatch.setattr(memory, "fit", lambda *args, **kwargs: True)
    (tmp_path / "out").mkdir()

    def call(*options, model: Path = sd1_folder, name: str = "a.png"):
        return run("txt2image", PROMPT, "--model", model, *SMALL, *options, "--output", tmp_path / "out" / name)

    return call


# --- the order -------------------------------------------------------------------------------------------------------


@pytest.fixture
def events(tmp_path, monkeypatch) -> list:
    """The calls of the UNet, and for each decoding the files that were there."""
    seen = []
    unet, decode = UNet2DConditionModel.__call__, StableDiffusion.decode
    monkeypatch.setattr(
        UNet2DConditionModel, "__call__", lambda self, *a, **k: seen.append("step") or unet(self, *a, **k)
    )
    monkeypatch.setattr(
        StableDiffusion, "decode", lambda self, x: seen.append(len(names(tmp_path / "out"))) or decode(self, x)
    )
    return seen


def test_each_batch_is_written_before_the_next_begins(make, events):
    make("--n_images", 5, "--batch_size", 2, "--steps", 2, "--no_grid").succeeded()
    assert events == ["step", "step", 0, 1, "step", "step", 2, 3, "step", "step", 4]


def test_with_a_second_pass_too(make, events):
    make("--n_images", 2, "--batch_size", 1, "--steps", 2, "--hires", 1.5, "--no_grid").succeeded()
    assert events == ["step"] * 3 + [0] + ["step"] * 3 + [1]


@pytest.mark.parametrize(
    "prompt, first, second, refined",
    [
        ("[red:blue:3]", "rrrb", "bb", "rrrb"),
        ("[red:blue:0.5]", "rrbb", "bb", "rrbb"),
        ("[red:blue:5]", "rrrr", "rb", "rrrr"),
        ("[red:blue:1.5]", "rrrr", "rb", "rrrr"),
        ("[red|blue]", "rbrb", "rb", "rbrb"),
    ],
)
def test_prompts_that_change_count_on_in_a_later_pass(
    run, sd1_folder, tmp_path, monkeypatch, prompt, first, second, refined
):
    """A second pass counts on, and so does a refiner, which makes the last steps of the first."""
    unet, read = UNet2DConditionModel.__call__, []
    words = {word[0]: StableDiffusion(sd1_folder).encode_prompt(word).context for word in ("red", "blue")}
    monkeypatch.setattr(
        UNet2DConditionModel,
        "__call__",
        lambda self, x, temb, context, **k: read.append(context.encoded) or unet(self, x, temb, context, **k),
    )
    for flags, wanted in ((["--hires", 1.5], first + second), (["--refiner", sd1_folder], refined)):
        read.clear()
        options = ["--model", sd1_folder, *SMALL, "--n_images", 1, "--steps", 4, *flags]
        run("txt2image", prompt, *options, "--dtype", "float32", "--output", tmp_path / "a.png").succeeded()
        assert [letter for text in read for letter, word in words.items() if mx.array_equal(text, word)] == [*wanted]


def test_a_refiner_finishes_one_batch_after_the_other(make, events, sd1_folder):
    refiner = ["--refiner", sd1_folder, "--refiner_start", 0.5]
    make("--n_images", 2, "--batch_size", 1, "--steps", 4, "--no_grid", *refiner).succeeded()
    refined = [event for event in events if event != "step"]
    assert refined == [0, 1] and events.index(0) > 4 and events[events.index(0) + 1] == "step" and events[-1] == 1


@pytest.mark.parametrize("options, fits", [(["--low_memory"], True), ([], False)])
def test_where_memory_is_short_all_steps_come_first(make, events, monkeypatch, options, fits):
    monkeypatch.setattr(memory, "fit", lambda *args, **kwargs: fits)
    make("--n_images", 3, "--batch_size", 1, "--steps", 2, "--no_grid", *options).succeeded()
    assert events == ["step"] * 6 + [0, 1, 2]


def test_the_unet_is_let_go_of_before_a_single_batch_is_decoded(make, monkeypatch):
    held, decode = [], StableDiffusion.decode
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, x: held.append("unet" in vars(self)) or decode(self, x))
    make("--n_images", 2, "--steps", 1).succeeded()
    make("--n_images", 2, "--steps", 1, "--batch_size", 1).succeeded()
    assert held == [False, False, True, True]


def test_controlnets_are_let_go_of_before_the_images_are_decoded(run, tmp_path, monkeypatch):
    loaded, alive = [], []
    load, decode = StableDiffusion.load_controlnet, StableDiffusion.decode

    def load_controlnet(self, source):
        network = load(self, source)
        loaded.append(weakref.ref(network))
        return network

    monkeypatch.setattr(StableDiffusion, "load_controlnet", load_controlnet)
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, x: alive.append(loaded[0]()) or decode(self, x))
    Image.new("RGB", (64, 64)).save(tmp_path / "edges.png")
    net = ROOT / "stable_diffusion" / "tiny" / "controlnet"
    control = ["--controlnet", net, "--control_image", tmp_path / "edges.png", "--low_memory"]
    run("txt2image", PROMPT, "--model", "tiny", "--steps", 2, *control, "--output", tmp_path / "a.png").succeeded()
    assert alive == [None] * 4


def test_the_order_changes_no_image(make, tmp_path, monkeypatch):
    options = ["--n_images", 3, "--batch_size", 1, "--steps", 2, "--sampler", "euler_a", "--no_grid"]
    make(*options).succeeded()
    monkeypatch.setattr(memory, "fit", lambda *args, **kwargs: False)
    make(*options, name="b.png").succeeded()
    for i in (1, 2, 3):
        assert np.array_equal(pixels(tmp_path / "out" / f"a_{i}.png"), pixels(tmp_path / "out" / f"b_{i}.png"))


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.fixture
def half(sd1_folder, tmp_path) -> Path:
    """A checkpoint whose autoencoder may run in half precision."""
    folder = shutil.copytree(sd1_folder, tmp_path / "half")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    return folder


@pytest.fixture
def unets(monkeypatch) -> list[mx.Dtype]:
    """The types in which the UNet is called; its answers overflow in half precision from the second one on."""
    seen, unet = [], UNet2DConditionModel.__call__

    def overflows(self, x, *args, **kwargs):
        seen.append(x.dtype)
        layers = [m for _, m in self.named_modules() if isinstance(m, nn.QuantizedLinear)]
        assert all((m.weight.dtype, m.scales.dtype) == (mx.uint32, x.dtype) for m in layers)
        out = unet(self, x, *args, **kwargs)
        assert out.dtype == x.dtype
        return out * float("inf") if x.dtype == mx.float16 and len(seen) >= 2 else out

    monkeypatch.setattr(UNet2DConditionModel, "__call__", overflows)
    return seen


def check_near(folder: Path) -> None:
    for i in (1, 2):
        ours, theirs = (pixels(folder / f"{name}_{i}.png") for name in "ab")
        assert np.abs(ours - theirs).max() <= 4 and ours.std() > 1


@pytest.mark.parametrize("options", [[], ["--low_memory", "--quantize"]])
def test_a_batch_that_overflows_is_made_again_in_float32(make, half, unets, tmp_path, options):
    options = ["--dtype", "float16", *options, "--n_images", 2, "--batch_size", 1, "--steps", 3, "--no_grid"]
    done = make(*options, model=half).succeeded()
    assert unets == [mx.float16] * 2 + [mx.float32] * 6
    assert len(done.remarks) == 1 and "step 2 are not finite" in done.remarks[0] and "float32" in done.remarks[0]
    make(*options, "--dtype", "float32", model=half, name="b.png").succeeded()
    check_near(tmp_path / "out")  # the prompts were encoded in half precision


def test_what_overflows_in_float32_too(make, half, tmp_path, monkeypatch):
    monkeypatch.setattr(UNet2DConditionModel, "__call__", lambda self, x, *a, **k: x * float("nan"))
    done = make("--dtype", "float16", "--n_images", 1, "--steps", 3, model=half)
    assert done.code == 1 and len(done.remarks) == 2 and done.out == [] and names(tmp_path / "out") == []
    assert "step 1" in done.remarks[1] and "not finite" in done.remarks[1] and "--dtype float32" in done.remarks[1]


@pytest.mark.parametrize(
    "value, options",
    [
        (float("nan"), []),
        (-float("inf"), ["--low_memory"]),
        (float("inf"), ["--hires", 1.5, "--hires_upscaler", "pixels"]),  # decoded between the passes too
    ],
)
def test_an_image_that_overflows_is_decoded_again_in_float32(make, half, tmp_path, monkeypatch, value, options):
    seen, decode = [], AutoencoderKL.decode

    def overflows(self, z, *args):
        seen.append(z.dtype)
        image = decode(self, z, *args)
        assert image.dtype == z.dtype
        return mx.where(mx.arange(image.shape[1])[:, None, None] == 3, value, image) if z.dtype == mx.float16 else image

    monkeypatch.setattr(AutoencoderKL, "decode", overflows)
    options = ["--dtype", "float16", "--n_images", 2, "--steps", 1, "--no_grid", *options]
    done = make(*options, model=half).succeeded()
    assert seen[0] == mx.float16 and seen[1:] == [mx.float32] * (4 if "--hires" in options else 2)
    assert len(done.remarks) == 1 and "float32" in done.remarks[0]
    make(*options, "--dtype", "float32", model=half, name="b.png").succeeded()
    check_near(tmp_path / "out")


def test_a_float32_image_that_is_not_finite_is_not_written(make, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z, *_: z[..., :3] * float("inf"))
    make("--n_images", 1, "--steps", 1).failed(1, "not finite", "--vae")
    assert names(tmp_path / "out") == []


# --- what is said ----------------------------------------------------------------------------------------------------


def test_json(make, tmp_path):
    done = make("--n_images", 2, "--steps", 2, "--json", "--negative_prompt", "blue", "--cfg", 3).succeeded()
    *images, grid = map(json.loads, done.out)
    common = {"kind": "image", "prompt": PROMPT, "negative_prompt": "blue", "model": "sd", "sampler": "ddim"}
    common |= {"steps": 2, "cfg": 3.0, "width": 64, "height": 64}
    for i, image in enumerate(images, start=1):
        assert image.pop("seconds") > 0
        assert image == common | {"path": f"{tmp_path}/out/a_{i}.png", "i": i, "seed": i}
    paths = [image["path"] for image in images]
    assert grid == {"kind": "grid", "path": f"{tmp_path}/out/a.png", "width": 136, "height": 64, "images": paths}


def test_a_name_of_what_the_model_decides(make):
    name = "{sampler}-{steps}-{cfg}-{width}x{height}-{model}.png"
    done = make("--n_images", 1, "--steps", 1, "--json", name=name).succeeded()
    assert Path(json.loads(done.out[0])["path"]).name == "ddim-1-1-64x64-sd.png"


# --- models for few steps --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_folder(sd1_folder, tmp_path_factory) -> Path:
    """One LoRA under the names of several for few steps."""
    folder = tmp_path_factory.mktemp("loras")
    tensors, _ = loras.make(loras.load(sd1_folder, "sd1"))
    for name in ("lcm-lora-sdv1-5", "Hyper-SD15-2steps-lora", "dmd2_sdxl_1step_lora", "style"):
        loras.write(folder, tensors, f"{name}.safetensors")
    return folder


PROMPTS = {  # {prompt: what its picture says}
    "a cat": ("Steps: 3, Sampler: DDIM", "CFG scale: 2"),
    "a cat <lora:lcm-lora-sdv1-5:1>": ("Steps: 4, Sampler: LCM", "CFG scale: 1"),
    "a cat <lora:Hyper-SD15-2steps-lora:1>": ("Steps: 2, Sampler: DDIM", "CFG scale: 0"),
    "a cat <lora:dmd2_sdxl_1step_lora:1>": ("Steps: 1, Sampler: LCM", "CFG scale: 0"),
    "a cat <lora:lcm-lora-sdv1-5:0>": ("Steps: 3, Sampler: DDIM", "CFG scale: 2"),
    "a cat <lora:style:1>": ("Steps: 3, Sampler: DDIM", "CFG scale: 2"),
}


@pytest.mark.parametrize("memory_options", [[], ["--low_memory"]])
def test_a_lora_for_few_steps_is_for_its_own_prompts(run, sd1_folder, lora_folder, tmp_path, memory_options):
    index = json.loads((sd1_folder / "model_index.json").read_text()) | {"_defaults": {"steps": 3, "guidance": 2.0}}
    model = shutil.copytree(sd1_folder, tmp_path / "model")
    (model / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = ["--model", model, "--lora_dir", lora_folder, "--width", 64, "--height", 64, "--seed", 1, "--n_images", 1]
    options += [*memory_options, "--no_grid", "--output", tmp_path / "all.png"]
    run("txt2image", "--prompt_file", tmp_path / "prompts.txt", *options).succeeded()
    for i, (prompt, (steps, guidance)) in enumerate(PROMPTS.items(), start=1):
        text = Image.open(tmp_path / f"all_{i}.png").text["parameters"]
        assert steps in text and guidance in text, (prompt, text)
        options[options.index("--seed") + 1] = i
        run("txt2image", prompt, *options[:-1], tmp_path / f"alone_{i}.png").succeeded()
        assert np.array_equal(pixels(tmp_path / f"all_{i}.png"), pixels(tmp_path / f"alone_{i}.png")), prompt

"""What a file is, told by its names and shapes."""

import json
import shutil
from pathlib import Path

import diffusers
import mlx.core as mx
import pytest
import torch
from PIL import Image

from checkpoints import as_single_file
from configs import REAL_UNETS, UNETS
from stable_diffusion.app.convert import convert
from stable_diffusion.app.inspect import inspect
from stable_diffusion.app.request import Request
from stable_diffusion.images.files import save as save_image
from test_full_size import oracle_shapes, write_sparse
from test_parity_images import control_nets


def save(path: Path, **tensors: mx.array) -> Path:
    mx.save_safetensors(str(path), tensors)
    return path


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_a_folder(xl_folder):
    report = inspect(xl_folder)
    told = [report[key] for key in ("kind", "family", "pipeline", "prediction")]
    assert told == ["checkpoint", "Stable Diffusion XL", "StableDiffusionXLPipeline", "epsilon"]
    assert report["scheduler"] == "EulerAncestralDiscreteScheduler"
    assert list(report["parts"]) == ["unet", "vae", "text_encoder", "text_encoder_2"]
    unet = diffusers.UNet2DConditionModel.from_pretrained(xl_folder / "unet")
    count = sum(value.numel() for value in unet.parameters())
    sizes = {"parameters": count, "bytes": 4 * count, "types": {"float32": 4 * count}, "files": 1}
    assert report["parts"]["unet"] == {"class": "UNet2DConditionModel"} | sizes
    for key in ("parameters", "bytes"):
        assert report[key] == sum(part[key] for part in report["parts"].values())


def test_quantized_weights_count_as_what_they_stand_for(tmp_path):
    convert(Request(model="tiny", unet_bits=4, text_bits=8), tmp_path / "new")
    plain, quantized = inspect("tiny"), inspect(tmp_path / "new")
    for name, (bits, group_size) in {"unet": (4, 32), "vae": (None, None), "text_encoder": (8, 64)}.items():
        part = quantized["parts"][name]
        assert part["parameters"] == plain["parts"][name]["parameters"]
        assert (part.get("bits"), part.get("group_size")) == (bits, group_size)
    assert quantized["bytes"] < plain["bytes"]


def test_nothing_is_read(tmp_path):
    """XL's UNet, 5.1 GB of nothing on the disk."""
    path = tmp_path / "unet.safetensors"
    write_sparse(path, oracle_shapes(lambda: diffusers.UNet2DConditionModel(**REAL_UNETS["sdxl-base"])))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    report = inspect(path)
    assert mx.get_peak_memory() - before < 2**16
    assert (report["kind"], report["family"], report["parameters"]) == ("unet", "Stable Diffusion XL", 2_567_463_684)


def with_unet(folder: Path, sd1_folder: Path, **config: object) -> Path:
    """A checkpoint whose UNet has another configuration."""
    shutil.copytree(sd1_folder, folder)
    (folder / "unet" / "config.json").write_text(json.dumps(UNETS["sd1"] | config))
    return folder


@pytest.mark.parametrize(
    "name, family, mode",
    [
        ("sd2", "Stable Diffusion 2", "text"),
        ("inpaint", "Stable Diffusion 1", "masks"),
        ("refiner", "Stable Diffusion XL refiner", "text"),
    ],
)
def test_families(tmp_path, sd1_folder, name, family, mode):
    wide = {"cross_attention_dim": 1280} if name == "refiner" else {}
    folder = with_unet(tmp_path / "new", sd1_folder, **UNETS[name] | wide)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    report = inspect(folder)
    assert (report["family"], report["mode"], report["prediction"]) == (family, mode, "sample")


def test_a_single_file(tmp_path, sd1_folder):
    tensors, folder = as_single_file(sd1_folder), inspect(sd1_folder)
    report = inspect(save(tmp_path / "one.safetensors", **tensors))
    assert (report["kind"], report["pipeline"]) == ("checkpoint", "StableDiffusionPipeline")
    assert report["parts"].keys() == folder["parts"].keys() and report["parameters"] == folder["parameters"]
    tensors = {name: value for name, value in tensors.items() if not name.startswith("vae.")}
    report = inspect(save(tmp_path / "two.safetensors", **tensors))
    assert report["kind"] == "parts of a checkpoint" and list(report["parts"]) == ["unet", "text_encoder"]
    assert "lacks a VAE" in report["note"]


# --- networks by themselves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, family", [("vae", None), ("controlnet", "Stable Diffusion 1")])
def test_a_network_in_a_file_or_a_folder(tmp_path, kind, family):
    network = diffusers.AutoencoderTiny() if kind == "vae" else control_nets("sd1", 1)[0][0]
    network.save_pretrained(tmp_path)
    for report in (inspect(tmp_path / "diffusion_pytorch_model.safetensors"), inspect(tmp_path)):
        assert report["kind"] == kind and list(report["parts"]) == [kind] and report.get("family") == family
        assert report["parts"][kind]["class"] == type(network).__name__
        assert report["parts"][kind]["parameters"] == network.num_parameters()


def test_what_families_have_in_common_says_nothing_of_them(tmp_path, xl_folder, sd1_folder):
    config = {"_class_name": "T2IAdapter", "channels": [32, 64], "num_res_blocks": 1, "downscale_factor": 8}
    diffusers.T2IAdapter.from_config(config).save_pretrained(tmp_path)
    report = inspect(tmp_path)
    assert (report["kind"], report["parts"]["controlnet"]["class"]) == ("controlnet", "T2IAdapter")
    assert "family" not in report and "family" not in inspect(sd1_folder / "vae")
    assert inspect(xl_folder / "vae")["family"] == "Stable Diffusion XL"


# --- LoRAs and embeddings ----------------------------------------------------------------------------------------

_LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"


def lora(width: int = 768, rank: int = 4) -> dict[str, mx.array]:
    tensors = {}
    for layer, inner in ((f"{_LAYER}_attn2_to_k", width), (f"{_LAYER}_ff_net_2", 1280)):
        tensors[f"{layer}.lora_down.weight"] = mx.zeros((rank, inner), dtype=mx.float16)
        tensors[f"{layer}.lora_up.weight"] = mx.zeros((320, rank), dtype=mx.float16)
        tensors[f"{layer}.alpha"] = mx.array(2.0)
    return tensors


@pytest.mark.parametrize("width, family", [(768, "Stable Diffusion 1"), (512, "unknown (prompts 512 wide)")])
def test_a_lora(tmp_path, width, family):
    report = inspect(save(tmp_path / "a.safetensors", **lora(width)))
    assert (report["kind"], report["family"]) == ("LoRA", family)
    assert (report["ranks"], report["alphas"]) == ([4], [2.0])
    assert report["targets"] == {"unet": {"attn2": 1, "ff": 1}}
    assert report["parameters"] == 4 * (width + 1280 + 640)


def test_kinds_of_lora(tmp_path):
    k, text = f"{_LAYER}_attn1_to_k", "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    shapes = {"a": (8, 3), "b": (3, 8)}
    hada = {f"{k}.hada_w{i}_{side}": mx.zeros(shape) for i in (1, 2) for side, shape in shapes.items()}
    lokr = {f"{k}.lokr_w1": mx.zeros((2, 2)), f"{k}.lokr_w2": mx.zeros((4, 4))}
    dora = lora() | {f"{_LAYER}_ff_net_2.dora_scale": mx.zeros((320, 1))}
    second = {f"{text}.lora_{side}.weight": mx.zeros((2, 2)) for side in ("up", "down")}
    kinds = (hada, "LoHa", [3]), (lokr, "LoKr", []), (dora, "LoRA and LoRA (DoRA)", [4]), (second, "LoRA", [2])
    for tensors, kind, ranks in kinds:
        report = inspect(save(tmp_path / "a.safetensors", **tensors))
        assert (report["kind"], report["ranks"]) == (kind, ranks)
    assert report["family"] == "Stable Diffusion XL" and report["targets"] == {"text_encoder_2": {"mlp": 1}}


def test_what_a_trainer_says(tmp_path):
    path = tmp_path / "a.safetensors"
    said = {"modelspec.title": "Red things", "ss_base_model_version": "sdxl_base_v1-0"}
    texts = said | {"ss_tag_frequency": "x" * 10_000}
    mx.save_safetensors(str(path), lora() | {"odd.name": mx.zeros(1)}, metadata=texts)
    report = inspect(path)
    assert said.items() < report.items() and "ss_tag_frequency" not in report
    assert report["not recognised"] == ["odd.name"]


def test_embeddings(tmp_path):
    report = inspect(save(tmp_path / "cat.safetensors", **{"<cat>": mx.zeros(1024)}))
    assert report == {
        "kind": "embedding",
        "family": "Stable Diffusion 2",
        "word": "<cat>",
        "vectors": 1,
        "widths": [1024],
    }
    report = inspect(save(tmp_path / "cat.safetensors", clip_l=mx.zeros((2, 768)), clip_g=mx.zeros((2, 1280))))
    assert (report["family"], report["word"], report["widths"]) == ("Stable Diffusion XL", "cat", [768, 1280])
    torch.save({"string_to_param": {"*": torch.zeros(3, 768)}, "name": "kitten"}, tmp_path / "cat.pt")
    report = inspect(tmp_path / "cat.pt")
    assert (report["kind"], report["word"], report["vectors"]) == ("embedding", "kitten", 3)


RECORD = {
    "script": "txt2image",
    "arguments": {"prompt": "a\ncat \udcff", "seed": 7, "cfg": 2.5, "lora": [["x", 0.5]], "float16": False},
    "files": {"tiny unet/a.safetensors": {"sha256": "abc", "hub": "some/one@123"}},
    "software": {"mlx": "0.1"},
}
SAID = "a\ncat\x1b[2J\nSteps: 1"


def test_a_picture(tmp_path):
    image, path = Image.new("RGB", (8, 8)), tmp_path / "a.WEBP"
    save_image(image, path, {"parameters": SAID, "stable_diffusion": json.dumps(RECORD)})
    assert inspect(path) == {"kind": "image", "parameters": SAID, "stable_diffusion": RECORD}
    for text in ("{", "[" * 100_000, "3", '["x"]'):
        save_image(image, path, {"stable_diffusion": text})
        assert "stable_diffusion" in inspect(path)
    save_image(image, path)
    assert inspect(path) == {"kind": "image", "note": "no generation settings are recorded"}
    path.write_text("x")
    with pytest.raises(ValueError, match=r"a\.WEBP is not an image"):
        inspect(path)


def test_configs_with_values_of_the_wrong_kind_are_one_line(tmp_path, sd1_folder):
    for i, change in enumerate(({"architectures": 3}, {"cross_attention_dim": ["wide", 3]}, {"in_channels": [4]})):
        with pytest.raises(ValueError, match=r"^[^\n]*invalid value[^\n]*$"):
            inspect(with_unet(tmp_path / f"{i}", sd1_folder, **change))

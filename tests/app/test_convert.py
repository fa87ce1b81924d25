"""Converting: the same images, files that diffusers reads, and a folder that is complete or not there."""

import json
import os
import shutil
from dataclasses import replace

import diffusers
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from checkpoints import SCALED, VAE, as_single_file, make
from cli.test_images import write_lora
from oracle import last, relative_error
from stable_diffusion import StableDiffusion, StableDiffusionXL
from stable_diffusion.app.convert import convert
from stable_diffusion.app.inspect import inspect
from stable_diffusion.app.request import Request
from stable_diffusion.lora.delta import weight_of
from stable_diffusion.planning import RunDefaults
from stable_diffusion.weights.files import open_checkpoint
from stable_diffusion.weights.quantize import MODES


def same(a: StableDiffusion, b: StableDiffusion) -> bool:
    """Equal names, types and values of all weights."""

    def weights(sd: StableDiffusion) -> dict[str, mx.array]:
        parts = ("unet", "autoencoder", "text_encoder", "text_encoder_1", "text_encoder_2")
        return dict(tree_flatten({part: getattr(sd, part).parameters() for part in parts if hasattr(sd, part)}))

    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(
        value.dtype == theirs[name].dtype and mx.array_equal(value, theirs[name]).item() for name, value in ours.items()
    )


@pytest.mark.parametrize("float16", [True, False])
def test_converted_is_quantized_at_load_bit_for_bit(tmp_path, sd1_folder, xl_folder, float16):
    dtype, bits = ("float16" if float16 else "float32"), {"unet_bits": 8, "text_bits": 4}
    for name, source, cls in (("sd1", sd1_folder, StableDiffusion), ("xl", xl_folder, StableDiffusionXL)):
        folder = convert(Request(model=str(source), dtype=dtype, **bits), tmp_path / name)
        expected, made = cls(source, float16, **bits), cls(folder, float16)
        assert same(made, expected)
        assert same(cls(folder, float16, **bits), made)  # asking for what is there changes nothing
        assert not same(cls(source, float16), made)
        if name == "sd1" or not float16:  # half precision is slow without a GPU
            step = {"num_steps": 1, "latent_size": (2, 2), "seed": 3}
            assert np.array_equal(*(last(sd.generate_latents("the red cat", **step)) for sd in (made, expected)))


@pytest.mark.parametrize("mode", MODES)
def test_floats_of_few_bits(tmp_path, mode):
    """They are kept by folders, and compute what their values are, with a LoRA beside them."""
    folder = convert(Request(model="tiny", dtype="float32", unet_bits=mode, text_bits=mode), tmp_path / "x")
    made, direct = StableDiffusion(folder), StableDiffusion("tiny", unet_bits=mode, text_bits=mode)
    assert same(made, direct) and f"unet in {mode}," in repr(direct)
    ours, plain = inspect(folder)["parts"], inspect("tiny")["parts"]
    assert ours["unet"]["bits"] == ours["text_encoder"]["bits"] == mode and "bits" not in ours["vae"]
    assert all(ours[name]["parameters"] == plain[name]["parameters"] for name in plain)
    exact = StableDiffusion("tiny", text_bits=mode)
    layers, count = dict(made.unet.named_modules()), 0
    for path, layer in exact.unet.named_modules():
        if isinstance(layers[path], nn.QuantizedLinear):
            count += layers[path].mode == mode
            layer.weight = weight_of(layers[path])
    latents = []
    for sd in (made, exact):
        sd.load_lora("stable_diffusion/tiny/lora/arrow.safetensors", 0.8)
        latents.append(last(sd.generate_latents("a red ohwx", num_steps=2, seed=1)))
    assert count > 20 and relative_error(*latents) <= 1e-4
    with pytest.raises(ValueError, match=f"stored in {mode}, not in 8"):
        StableDiffusion(folder, unet_bits=8)


def test_the_bundled_model_and_its_small_files(tmp_path):
    folder = convert(Request(model="tiny", unet_bits=4), tmp_path / "small")
    made = StableDiffusion(folder, True)
    assert same(made, StableDiffusion("tiny", True, unet_bits=4))
    assert (made.defaults.num_steps, made.defaults.cfg_weight) == (20, 4.0)  # noted for the folder
    assert json.loads((folder / "unet" / "config.json").read_text())["quantization"] == {"bits": 4, "group_size": 32}
    for path in (open_checkpoint("tiny").tokenizers["tokenizer"]).iterdir():
        assert (folder / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    index = folder / "model_index.json"
    contents = json.loads(index.read_text())
    assert contents["safety_checker"] == [None, None] and contents["unet"] == ["diffusers", "UNet2DConditionModel"]
    for damaged in ("fast", {"steps": None}, {"guidance": []}):
        index.write_text(json.dumps(contents | {"_defaults": damaged}))
        with pytest.raises(ValueError, match=r"model_index\.json"):
            open_checkpoint(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_only_what_is_computed_in_half_precision_is_stored_so(tmp_path, sd1_folder, dtype):
    folder = convert(Request(model=str(sd1_folder), dtype=dtype), tmp_path / "new")
    for part, expected in {"unet": dtype, "text_encoder": dtype, "vae": "float32"}.items():
        (file,) = open_checkpoint(folder).components[part].files
        assert {value.dtype for value in mx.load(str(file)).values()} == {getattr(mx, expected)}


def test_a_converted_folder_converts_again(tmp_path, sd1_folder):
    once = convert(Request(model=str(sd1_folder), unet_bits=8), tmp_path / "once")
    again = convert(Request(model=str(once), unet_bits=8), tmp_path / "again")
    assert same(StableDiffusion(once, True), StableDiffusion(again, True))
    with pytest.raises(ValueError, match=r"^unet of .*once/unet: its weights are stored in 8 bits, not in 4"):
        convert(Request(model=str(once), unet_bits=4), tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["again", "once"]


@pytest.mark.parametrize(
    "family, cls", [("sd1", diffusers.StableDiffusionPipeline), ("xl", diffusers.StableDiffusionXLPipeline)]
)
def test_diffusers_reads_what_it_wrote(tmp_path, request, family, cls):
    source = request.getfixturevalue(f"{family}_folder")
    folder = convert(Request(model=str(source), dtype="float32"), tmp_path / "new", max_shard_size=400_000)
    ours, theirs = cls.from_pretrained(folder), cls.from_pretrained(source)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if family == "xl" else [])):
        a, b = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a), part
    assert ours.scheduler.config == theirs.scheduler.config
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()


def test_defaults_of_a_lora_for_few_steps_stay(tmp_path, sd1_folder):
    path = tmp_path / "dmd2_sdxl_4step_lora.safetensors"
    write_lora(path)
    folder = convert(Request(model=str(sd1_folder), lora=((str(path), 1.0),)), tmp_path / "new")
    again = convert(Request(model=str(folder)), tmp_path / "again")
    assert StableDiffusion(again).defaults == RunDefaults("lcm", 4, 0.0, spacing="trailing")


def test_a_lora_is_in_the_weights(tmp_path, sd1_folder):
    path = tmp_path / "red.safetensors"
    write_lora(path)
    request = Request(model=str(sd1_folder), lora=((str(path), 0.5),), unet_bits=8, dtype="float32")
    made = StableDiffusion(convert(request, tmp_path / "new"))
    expected = StableDiffusion(sd1_folder, unet_bits=8, loras=[(path, 0.5)])
    assert same(made, expected) and not same(made, StableDiffusion(sd1_folder, unet_bits=8))
    write_lora(path, "lora_unet_no_such_layer")
    with pytest.raises(ValueError, match="no_such_layer"):
        convert(request, tmp_path / "other")
    convert(replace(request, lora_partial=True), tmp_path / "other")


def test_parts_and_prediction_from_elsewhere(tmp_path, sd1_folder, xl_folder):
    request = Request(model=str(sd1_folder), vae=str(xl_folder / "vae"), prediction="v_prediction", dtype="float32")
    folder = convert(request, tmp_path / "new")
    config = json.loads((folder / "vae" / "config.json").read_text())
    assert config == json.loads((xl_folder / "vae" / "config.json").read_text())
    assert StableDiffusion(folder).schedule.config.prediction_type == "v_prediction"


def test_a_single_file(tmp_path):
    """What stands in no file, the small files of a folder, is made."""
    source = tmp_path / "source"
    vae = VAE | {"block_out_channels": [32, 32, 64, 64], "norm_num_groups": 32}  # the groups of a single file
    make(source, "sd1", diffusers.DDIMScheduler(**SCALED), vae=vae)
    tensors = as_single_file(source)
    attention = "vae.encoder.mid_block.attentions.0.to_q.weight"  # a 1×1 convolution in files of the original code
    mx.save_safetensors(str(tmp_path / "one.safetensors"), tensors | {attention: tensors[attention][..., None, None]})
    folder, vocabulary = tmp_path / "new", tmp_path / "vocabulary"
    shutil.copytree(source / "tokenizer", vocabulary, ignore=shutil.ignore_patterns("*_*.json"))
    request = Request(model=str(tmp_path / "one.safetensors"), tokenizer=str(vocabulary), dtype="float32")
    convert(request, folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"] and index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    special = json.loads((folder / "tokenizer" / "special_tokens_map.json").read_text())
    assert special["pad_token"] == "<|endoftext|>"
    written = as_single_file(folder)
    assert written.keys() == tensors.keys()
    assert all(mx.array_equal(tensors[key], value).item() for key, value in written.items())

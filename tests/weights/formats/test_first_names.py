"""T2I-Adapters and halves of a TAESD under the names of their authors, against the same weights under diffusers'."""

from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors.torch import save_file

from command_line import pixels
from models.test_adapter import ADAPTERS, FULL
from oracle import nchw, nhwc, normal, perturb, relative_error
from stable_diffusion import StableDiffusion
from stable_diffusion.app.inspect import inspect
from stable_diffusion.app.metadata import read_record
from stable_diffusion.app.preview import preview_decoder
from stable_diffusion.weights.files import open_checkpoint, open_part
from stable_diffusion.weights.load import load_component


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


# --- T2I-Adapters ----------------------------------------------------------------------------------------------------

PUBLISHED = {  # published ones see squares of 8 pixels, those of XL of 16
    "full": FULL | {"channels": [32, 64, 64, 64]},
    "grey": ADAPTERS["grey"],
    "xl": ADAPTERS["xl"] | {"downscale_factor": 16},
    "grey xl": ADAPTERS["xl"] | {"downscale_factor": 16, "in_channels": 1},
    "light": ADAPTERS["light"] | {"channels": [32, 64, 64], "num_res_blocks": 4},
}


def original_names(tensors: dict[str, torch.Tensor], is_light: bool) -> dict[str, torch.Tensor]:
    """TencentARC's names, as diffusers' conversion scripts read them."""
    named = {}
    for name, value in tensors.items():
        parts = name.split(".")[1:]  # without "adapter"
        if not is_light and parts[0] == "body":
            block, rest = (int(parts[3]), parts[4:]) if parts[2] == "resnets" else (0, parts[2:])
            parts = ["body", str(2 * int(parts[1]) + block), *rest]
        named[".".join(parts).replace("resnets", "body")] = value
    return named


@pytest.mark.parametrize("kind", PUBLISHED)
def test_adapters_give_the_same_features(kind, tmp_path):
    torch.manual_seed(0)
    oracle = perturb(diffusers.T2IAdapter(**PUBLISHED[kind]))
    oracle.save_pretrained(tmp_path / "folder")
    theirs = oracle.state_dict()
    first = original_names(theirs, kind == "light")
    assert ("body.0.body.3.block2.bias" if kind == "light" else "body.2.in_conv.bias") in first
    image = normal(2, 32, 64, oracle.config.in_channels, seed=1)
    sources = [tmp_path / "folder", write(tmp_path / "adapter.safetensors", theirs)]
    sources += [write(tmp_path / f"t2iadapter{suffix}", first) for suffix in (".pth", ".safetensors")]
    sources += [write(tmp_path / "nested.pth", {"adapter": first})]
    expected = None
    for source in sources:
        network = load_component(open_part(source, "controlnet"))
        features = network.embed(mx.array(image))
        if expected is None:
            expected = features, network.config
            for mine, other in zip(features, oracle(nchw(image)), strict=True):
                assert relative_error(mine, nhwc(other)) <= 1e-4
        assert network.config == expected[1]
        assert all(np.array_equal(a, b) for a, b in zip(features, expected[0], strict=True))
    assert inspect(sources[2])["parts"]["controlnet"]["class"] == "T2IAdapter"


def test_a_pipeline_takes_them_for_its_family_alone(sd, tmp_path):
    widths = list(sd.unet_config.block_out_channels)
    for xl in (False, True):
        config = (PUBLISHED["xl"] if xl else FULL) | {"channels": widths}
        tensors = original_names(diffusers.T2IAdapter(**config).state_dict(), False)
        path = write(tmp_path / "a.pth", tensors)
        if xl:
            with pytest.raises(ValueError, match="T2I-Adapter does not fit the model: its features"):
                sd.load_controlnet(path)
        else:
            assert len(sd.load_controlnet(path).embed(mx.zeros((1, 64, 64, 3)))) == len(widths)
            del tensors["body.3.block1.weight"]
            with pytest.raises(ValueError, match=r"1 missing: adapter\.body\.1\.resnets\.1\.block1\.weight"):
                sd.load_controlnet(write(path, tensors))


@pytest.mark.parametrize("name", ["style_embedding", "spatial_feat_mapping.0.1.weight"])
def test_adapters_of_styles_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="is a style adapter or a fuser of T2I-Adapters, which is not supported"):
        open_part(write(tmp_path / "t2iadapter.pth", {name: torch.zeros(1)}), "controlnet")


# --- halves of a TAESD -----------------------------------------------------------------------------------------------


def write_halves(folder: Path, suffix: str = ".pth", name: str = "taesd") -> diffusers.AutoencoderTiny:
    """Write a random TAESD as its author does; returns the whole."""
    torch.manual_seed(0)
    whole = perturb(diffusers.AutoencoderTiny())
    for half, first in (("encoder", 0), ("decoder", 1)):
        layers = getattr(whole, half).layers.state_dict()
        named = ((*key.split(".", 1), value) for key, value in layers.items())
        write(folder / f"{name}_{half}{suffix}", {f"{int(n) + first}.{rest}": value for n, rest, value in named})
    return whole


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_either_half_or_their_folder_is_the_whole(suffix, tmp_path):
    whole, halves = write_halves(tmp_path, suffix, "taesdxl"), tmp_path / "taesdxl"
    whole.save_pretrained(tmp_path / "folder")
    theirs = load_component(open_part(tmp_path / "folder", "vae"))
    expected = dict(tree_flatten(theirs.parameters()))
    for source in (tmp_path, f"{halves}_encoder{suffix}", f"{halves}_decoder{suffix}"):
        ours = load_component(open_part(source, "vae"))
        values = dict(tree_flatten(ours.parameters()))
        assert ours.config == theirs.config and values.keys() == expected.keys()
        assert all(np.array_equal(values[name], expected[name]) for name in expected)
    report = inspect(tmp_path)
    assert (report["kind"], report["parts"]["vae"]["files"]) == ("vae", 2)


def test_a_decoder_alone_is_enough_for_previews(sd, sd1_folder, tmp_path):
    whole = write_halves(tmp_path)
    z = normal(1, 3, 4, 4)
    expected = preview_decoder(sd, tmp_path)(mx.array(z))
    assert relative_error(expected, nhwc(whole.decode(nchw(z)).sample.clip(-1, 1) / 2 + 0.5)) <= 1e-4
    encoder, decoder = (tmp_path / f"taesd_{half}.pth" for half in ("encoder", "decoder"))
    pipeline = StableDiffusion(sd1_folder, parts={"vae": encoder})
    assert np.array_equal(pipeline.decode(mx.array(z)), expected)
    aside = encoder.rename(tmp_path / "aside.pth")
    for source in (decoder, tmp_path):
        assert np.array_equal(preview_decoder(sd, source)(mx.array(z)), expected)
        with pytest.raises(ValueError, match=r"taesd_decoder\.pth is a TAESD decoder.*put its encoder beside"):
            open_checkpoint(sd1_folder, parts={"vae": source})
    with pytest.raises(ValueError, match=r"aside\.pth is a TAESD encoder: put its decoder beside"):
        open_part(aside, "vae")


def test_what_is_no_taesd_of_these_models_is_refused(tmp_path):
    write_halves(tmp_path)
    write(tmp_path / "taesd3_decoder.pth", {"1.weight": torch.zeros(64, 16, 3, 3), "3.conv.0.weight": torch.zeros(1)})
    for source, message in (("", "several decoders; give the file"), ("taesd3_decoder.pth", "16 latent channels")):
        with pytest.raises(ValueError, match=message):
            open_part(tmp_path / source, "vae")
    write(tmp_path / "taesd_encoder.pth", {"other.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"taesd_decoder\.pth.*unexpected: other\.weight"):
        load_component(open_part(tmp_path / "taesd_decoder.pth", "vae"))


def test_both_halves_are_recorded(run, sd1_folder, tmp_path):
    write_halves(tmp_path)
    vae, out = tmp_path / "taesd_decoder.pth", tmp_path / "out.png"
    small = ["--width", 64, "--height", 64, "--steps", 1, "--n_images", 1, "--seed", 1, "--preview", tmp_path / "p.png"]
    options = ["--model", sd1_folder, "--vae", vae, "--preview_vae", vae, "--output", out]
    run("txt2image", "red", *options, *small).succeeded()
    files = read_record(out).details["files"]
    assert {vae.name, f"{vae.name} vae/taesd_encoder.pth"} <= files.keys()
    run("txt2image", "--from_image", out, "--model", sd1_folder, "--output", tmp_path / "again.png").succeeded()
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(out))

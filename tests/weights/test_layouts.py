"""Weights lie in memory as kernels read them. Metal copies others at every call of a convolution."""

import json
from itertools import product

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import loras
from configs import UNETS
from models.test_controlnet import CONTROLNETS
from models.test_vae import SD as VAE
from stable_diffusion import StableDiffusion, networks
from stable_diffusion.diffusion.controls import Control
from stable_diffusion.models.controlnet import ControlNetModel
from stable_diffusion.weights.load import load_component, read_weights, size_in_bytes
from weights.formats.test_single_file import opened
from weights.test_load import write


def strided(*networks) -> list[str]:
    """The parameters of networks whose values do not lie one after the other in memory."""
    parameters = [pair for network in networks for pair in tree_flatten(network.parameters())]
    assert len(parameters) > 20
    return [name for name, value in parameters if not memoryview(value).c_contiguous]


def test_strides_are_seen():
    x = mx.zeros((4, 3, 2, 2), dtype=mx.bfloat16)
    assert memoryview(x).c_contiguous and not memoryview(x.transpose(0, 2, 3, 1)).c_contiguous


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, None])
def test_of_a_part(tmp_path, dtype):
    configs = {"unet": UNETS["sd1"], "vae": VAE, "text_encoder": {}, "controlnet": CONTROLNETS["sd1"]}
    configs["text_encoder"] = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    for name, config in configs.items():
        module = load_component(write(tmp_path, name, config, mx.float16), dtype)
        read_weights(module)
        assert strided(module) == []


def test_the_cpu_reads_for_a_gpu(tmp_path, monkeypatch):
    """Its command buffers never wait for a disk: macOS ends those that do. Here there is no GPU to compute anything."""
    component = write(tmp_path, "unet", UNETS["sd1"], mx.float16)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    read_weights(load_component(component))


@pytest.mark.parametrize("family", ["sd1", "sd2", "xl"])
def test_of_a_file_in_the_original_layout(single, family):
    for component in opened(single(family)).components.values():
        assert strided(load_component(component, mx.float16)) == []


OPTIONS = [{}, {"low_memory": True}, {"dtype": mx.float16}, {"dtype": mx.bfloat16}, {"unet_bits": 8, "text_bits": 8}]


@pytest.mark.parametrize(
    ("options", "kind"),
    [*((options, "lora") for options in OPTIONS), *product(OPTIONS[::4], (None, "loha")), ({}, "locon-tucker")],
)
def test_of_a_model(sd1_folder, tmp_path, options, kind):
    """With a LoRA in its weights or without."""
    files = []
    if kind is not None:
        tensors, _ = loras.make(loras.load(sd1_folder, "sd1"), kind=kind, dora="rows" if kind == "loha" else None)
        files = [(loras.write(tmp_path, tensors), 0.7)]
    model = StableDiffusion(sd1_folder, loras=files, **options)
    model.ensure_models_are_loaded()
    networks = [getattr(model, name) for name in model.sources]
    assert strided(*networks) == []


def test_a_controlnet_is_read_before_a_graph_of_a_run(sd1_folder, tmp_path, monkeypatch):
    model = StableDiffusion(sd1_folder)
    model.ensure_models_are_loaded()
    file = tmp_path / "controlnet" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir()
    (file.parent / "config.json").write_text(json.dumps(CONTROLNETS["sd1"] | {"_class_name": "ControlNetModel"}))
    write(tmp_path, "controlnet", CONTROLNETS["sd1"]).files[0].rename(file)
    network, embed, read = model.load_controlnet(file.parent), ControlNetModel.embed, []
    before = mx.get_active_memory()
    monkeypatch.setattr(ControlNetModel, "embed", lambda *a: read.append(mx.get_active_memory() - before) or embed(*a))
    control = Control(network, mx.zeros((48, 64, 3)))
    next(model.generate_latents("a cat", num_steps=2, latent_size=(6, 8), controls=[control]))
    assert read[0] >= size_in_bytes(network)


def test_a_depth_estimator_is_read_before_its_graph(sd1_folder, tmp_path, monkeypatch):
    model, component, read = StableDiffusion(sd1_folder), write(tmp_path, "vae", VAE), []
    monkeypatch.setattr(networks, "open_part", lambda *args, **kwargs: component)
    monkeypatch.setattr(networks, "estimate_depth", lambda *args: read.append(mx.get_active_memory()))
    before = mx.get_active_memory()
    model.estimate_depth(None)
    assert read[0] - before >= component.files[0].stat().st_size * 0.9  # the rest is the header

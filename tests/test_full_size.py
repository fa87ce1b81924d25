"""The published configurations at full size, without their values: names and shapes equal the oracles'."""

import json
import math
import struct

import diffusers
import mlx.core as mx
import pytest
import torch
import transformers

from configs import REAL_TEXT_ENCODERS, REAL_UNETS, REAL_VAE
from stable_diffusion.weights.files import Component, read_tensors
from stable_diffusion.weights.formats.original import to_diffusers
from stable_diffusion.weights.load import build, fill


def oracle_shapes(make) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a torch model's weights, built on the meta device, which holds no values."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in make().state_dict().items()}


def check(name: str, config: dict, stored: dict[str, tuple[int, ...]]) -> int:
    """Fill a network with tensors of the stored names and shapes, which it must have; returns how many values."""
    before = mx.get_active_memory()
    fill(build(name, config), to_diffusers(name, {key: mx.zeros(shape) for key, shape in stored.items()}))
    assert mx.get_active_memory() - before < 2**20  # lazy: nothing was allocated
    return sum(map(math.prod, stored.values()))


@pytest.mark.parametrize("name", REAL_UNETS)
def test_unet(name):
    check("unet", REAL_UNETS[name], oracle_shapes(lambda: diffusers.UNet2DConditionModel(**REAL_UNETS[name])))


def test_vae():
    check("vae", REAL_VAE, oracle_shapes(lambda: diffusers.AutoencoderKL(**REAL_VAE)))


@pytest.mark.parametrize("name", REAL_TEXT_ENCODERS)
def test_text_encoder(name):
    config = REAL_TEXT_ENCODERS[name]
    oracle = getattr(transformers, config["architectures"][0])
    check("text_encoder", config, oracle_shapes(lambda: oracle(transformers.CLIPTextConfig(**config))))


def write_sparse(path, shapes: dict[str, tuple[int, ...]]) -> int:
    """Write a float16 safetensors file of zeros that takes no room on the disk; returns its size."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)
    return path.stat().st_size


def test_a_full_size_file_is_opened_without_reading_it(tmp_path):
    """XL's UNet, 5.1 GB: it is checked and handed to the module, and not a tensor of it is in memory."""
    shapes = oracle_shapes(lambda: diffusers.UNet2DConditionModel(**REAL_UNETS["sdxl-base"]))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert write_sparse(file, shapes) > 5.1e9
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    unet = build("unet", REAL_UNETS["sdxl-base"])
    fill(unet, read_tensors(Component("unet", REAL_UNETS["sdxl-base"], (file,))), mx.float16)
    assert mx.get_peak_memory() - before < 2**20
    block = unet.down_blocks[2].attentions[1].transformer_blocks[9]
    assert float(mx.abs(block.ff.net[2].weight).max()) == 0.0

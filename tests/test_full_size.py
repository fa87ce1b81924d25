"""The published configurations at full size, without their values: names, shapes and counts equal the oracles'."""

import json
import math
import struct

import diffusers
import mlx.core as mx
import pytest
import torch
import transformers
from mlx.utils import tree_flatten

from configs import REAL_TEXT_ENCODERS, REAL_UNETS, REAL_VAE
from stable_diffusion.weights.files import Component, read_tensors
from stable_diffusion.weights.formats.original import to_diffusers
from stable_diffusion.weights.load import build, fill

COUNTS = {"sd15": 859_520_964, "sdxl-base": 2_567_463_684}


def oracle_shapes(make) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a torch model's weights, built on the meta device, which holds no values."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in make().state_dict().items()}


def as_parameter(shape: tuple[int, ...], ours: tuple[int, ...]) -> tuple[int, ...]:
    """A stored shape in our layout: OIHW -> OHWI, or a matrix for a 1×1 convolution."""
    if len(shape) == 4:
        out, into, height, width = shape
        return (out, into) if len(ours) == 2 and (height, width) == (1, 1) else (out, height, width, into)
    return shape


def check(name: str, config: dict, stored: dict[str, tuple[int, ...]]) -> int:
    """Compare our module with the stored shapes; returns the number of parameters."""
    before = mx.get_active_memory()
    parameters = {key: value.shape for key, value in tree_flatten(build(name, config).parameters())}
    assert mx.get_active_memory() - before < 2**20  # lazy: nothing was allocated
    assert parameters.keys() == stored.keys()
    for key, shape in parameters.items():
        assert shape == as_parameter(stored[key], shape), key
    return sum(math.prod(shape) for shape in parameters.values())


@pytest.mark.parametrize("name", REAL_UNETS)
def test_unet(name):
    stored = oracle_shapes(lambda: diffusers.UNet2DConditionModel(**REAL_UNETS[name]))
    count = check("unet", REAL_UNETS[name], stored)
    assert count == sum(map(math.prod, stored.values()))
    assert count == COUNTS.get(name, count)


def test_vae():
    stored = oracle_shapes(lambda: diffusers.AutoencoderKL(**REAL_VAE))
    assert check("vae", REAL_VAE, stored) == 83_653_863


@pytest.mark.parametrize("name, count", [("sd15", 123_060_480), ("sd21", 340_387_840), ("sdxl-2", 694_659_840)])
def test_text_encoder(name, count):
    config = REAL_TEXT_ENCODERS[name]
    oracle = getattr(transformers, config["architectures"][0])
    stored = oracle_shapes(lambda: oracle(transformers.CLIPTextConfig(**config)))
    stored = to_diffusers("text_encoder", stored)
    assert check("text_encoder", config, stored) == count


def write_sparse(path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A float16 safetensors file of zeros that takes no room on the disk; returns its size."""
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

"""GGUF files: networks that compute what their values are, matrices that stay quantized, and damaged files."""

import random
import struct
from pathlib import Path

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ggufs import write_gguf
from oracle import normal, relative_error
from stable_diffusion import StableDiffusion
from stable_diffusion.app.inspect import inspect
from stable_diffusion.weights.files import open_checkpoint, open_part, read_file
from stable_diffusion.weights.formats.gguf import unpack
from stable_diffusion.weights.load import load_component
from weights.formats.test_fuzz import mutate
from weights.formats.test_single_file import UNET, opened, saved

BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4, "F16": None}


def quantized(network: nn.Module) -> list[nn.Module]:
    return [layer for _, layer in network.named_modules() if isinstance(layer, nn.QuantizedLinear)]


def assert_same_unet(path: Path, values: Path, bits: int | None, **options) -> None:
    """The UNet of a GGUF file computes what one computes with the values that the file's own package reads in it."""
    part = open_part(path, "unet", **options)
    ours, theirs = load_component(part), load_component(open_part(values, "unet"))
    assert {layer.bits for layer in quantized(ours)} == ({bits} if bits else set())
    assert part.config.get("quantization") == ({"bits": bits, "group_size": 32} if bits else None)
    shapes = (8, 16, 4), (4 * ours.config.block_out_channels[0],), (5, ours.config.cross_attention_dim[0])
    inputs = [mx.array(normal(2, *shape, seed=1)) for shape in shapes]
    assert relative_error(ours(*inputs), theirs(*inputs)) <= 1e-5


@pytest.mark.parametrize("kind", BITS)
def test_values(tmp_path, kind):
    """Packed or not, the values are those that the file's own package reads."""
    shapes = {"a.weight": (48, 64), "embed.weight": (8, 32), "in_proj_weight": (6, 32), "conv.weight": (8, 16, 3, 3)}
    values = write_gguf(tmp_path / "x.gguf", {name: normal(*shape) for name, shape in shapes.items()}, kind, True)
    tensors, _ = read_file(tmp_path / "x.gguf")
    assert ("a.scales" in tensors) == (BITS[kind] is not None) and "embed.scales" not in tensors
    tensors = {
        name: value.astype(mx.float32) if "a." in name and value.dtype == mx.float16 else value
        for name, value in tensors.items()
    }
    plain, _ = unpack(tensors)
    assert plain.keys() == values.keys()
    assert all(relative_error(plain[name], values[name]) <= 1e-6 for name in values)


@pytest.mark.parametrize("kind", ["Q8_0"])
def test_whole_checkpoint(tmp_path, made, kind):
    folder, original = made("sd1")
    values = write_gguf(tmp_path / "model.gguf", original, kind)
    saved(tmp_path / "values.safetensors", values)
    assert_same_unet(tmp_path / "model.gguf", tmp_path / "values.safetensors", BITS[kind])
    checkpoint = opened(tmp_path / "model.gguf")
    assert checkpoint.pipeline == "StableDiffusionPipeline"
    for name in ("vae", "text_encoder"):
        network = load_component(checkpoint.components[name])
        assert len(quantized(network)) == (12 if name == "text_encoder" and BITS[kind] else 0)
    sd = StableDiffusion(tmp_path / "model.gguf", tokenizer=folder / "tokenizer", unet_bits=BITS[kind])
    (picture,) = sd.generate("a fox", num_steps=1, latent_size=(8, 8), seed=1)
    assert picture.size == (64, 64) and inspect(tmp_path / "model.gguf")["family"] == "Stable Diffusion 1"


def test_folder_and_unet_alone(tmp_path, made):
    folder, original = made("xl")
    unet = {name.removeprefix(UNET): value for name, value in original.items() if name.startswith(UNET)}
    saved(tmp_path / "values.safetensors", write_gguf(tmp_path / "unet.gguf", unet, "Q8_0", reshapes=True))
    assert_same_unet(tmp_path / "unet.gguf", tmp_path / "values.safetensors", 8)
    checkpoint = open_checkpoint(folder, parts={"unet": tmp_path / "unet.gguf"})
    assert checkpoint.components["unet"].config["quantization"]["bits"] == 8
    squares = {n: v[..., None, None] if ".proj_" in n and v.ndim == 2 else v for n, v in unet.items()}
    saved(tmp_path / "values.safetensors", write_gguf(tmp_path / "unet.gguf", squares, "Q4_1"))
    assert open_part(tmp_path / "unet.gguf", "unet").config["use_linear_projection"]
    prefixes = {"unet": "unet.", "vae": "vae.", "text_encoder": "te.", "text_encoder_2": "te.1."}
    parts = open_checkpoint(folder).components
    renamed = {f"{prefixes[n]}{k}": v for n, part in parts.items() for k, v in read_file(part.files[0])[0].items()}
    write_gguf(tmp_path / "folder.gguf", renamed, "Q4_0")
    components = opened(tmp_path / "folder.gguf").components
    assert components.keys() == parts.keys()
    assert all(quantized(load_component(part)) for name, part in components.items() if name != "vae")


def small(path: Path) -> bytes:
    writer, code = gguf.GGUFWriter(path, "sd"), gguf.GGMLQuantizationType.Q8_0
    writer.add_array("texts", ["a", "b"])
    writer.add_tensor("a.weight", np.ones((4, 34), np.uint8), raw_dtype=code)
    writer.add_tensor("b", normal(3, 2, seed=1))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path.read_bytes()


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        mx.eval(read_file(path)[0])
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) <= 300 + len(str(path))
    return message


def test_refused(tmp_path):
    path = tmp_path / "x.gguf"
    good = small(path)
    assert good[8:16] == struct.pack("<Q", 2)
    for wrong in ((1 << 62, 2), (2, 1 << 62), (30_000, 2)):
        assert f"{wrong[0]:,} tensors and {wrong[1]:,} keys" in refused(
            path, good[:8] + struct.pack("<QQ", *wrong) + good[24:]
        )
    assert "version 9" in refused(path, good[:4] + struct.pack("<I", 9) + good[8:])
    assert "does not fit into" in refused(path, good[:-40])
    assert "its GGUF header is invalid" in refused(path, good[:60])
    assert "its GGUF header is invalid" in refused(path, b"GGUF" + random.Random(1).randbytes(500))
    length = good.index(b"a.weight") + 8
    shape = struct.pack("<IQQ", 2, 32, 4)
    assert good[length:].startswith(shape)
    for wrong in (struct.pack("<IQQ", 2, 1 << 63, 4), struct.pack("<IQQ", 2, 31, 4), struct.pack("<IQQ", 2, 32, 400)):
        assert "a.weight does not fit into" in refused(path, good[:length] + wrong + good[length + len(shape) :])
    code = length + len(shape)
    assert "holds a.weight as Q5_K, which is not supported: use a file of Q8_0" in refused(
        path, good[:code] + struct.pack("<I", 13) + good[code + 4 :]
    )


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged(tmp_path, count):
    path, rng, read = tmp_path / "x.gguf", random.Random(count), 0
    good = small(path)
    for _ in range(count):
        data = mutate(good, rng)
        path.write_bytes(data)
        try:
            mx.eval(read_file(path)[0])
            read += 1
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert 0 < read < count

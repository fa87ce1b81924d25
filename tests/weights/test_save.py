"""What is written: the files, tensor by tensor, and the folder, all or nothing."""

import math
from dataclasses import replace
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import safetensors
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from configs import UNETS
from models.test_taesd import SMALL as TAESD
from oracle import perturb, tensors
from stable_diffusion.weights.files import Component
from stable_diffusion.weights.formats.safetensors import all_finite
from stable_diffusion.weights.load import build, fill, load_component
from stable_diffusion.weights.quantize import quantize, remaining_quantization
from stable_diffusion.weights.save import stored_tensors, write_weights

ONE_FILE = 10**12
TEXT = {"architectures": ["CLIPTextModelWithProjection"], "hidden_size": 64, "intermediate_size": 128}
TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "projection_dim": 32}


def values(module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def same(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> bool:
    """Equal names, types and values."""
    return ours.keys() == theirs.keys() and all(
        a.dtype == theirs[name].dtype and mx.array_equal(a, theirs[name]).item() for name, a in ours.items()
    )


# --- files -------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_diffusers_has(tmp_path):
    """A network that no conversion of a whole model writes; tests/app/test_convert.py has the others."""
    oracle = tensors(perturb(diffusers.AutoencoderTiny.from_config(TAESD)))
    module = build("vae", TAESD)
    fill(module, oracle)
    (file,) = write_weights(tmp_path, "model", stored_tensors(module), ONE_FILE)
    with safetensors.safe_open(file, "np") as reader:
        assert reader.metadata() == {"format": "pt"}
    written = load_file(file)
    assert written.keys() == oracle.keys()
    for key, value in oracle.items():
        assert written[key].shape == value.shape and np.array_equal(written[key], value), key


def test_what_is_written_is_loaded_lazily(tmp_path):
    config = TEXT | {"quantization": {"bits": 3, "group_size": 64}}
    module = build("text_encoder_2", config)
    module.set_dtype(mx.float16)
    kept = values(quantize(module, 3, 64))
    files = write_weights(tmp_path, "model", stored_tensors(module), ONE_FILE)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    again = load_component(Component("text_encoder_2", config, tuple(files)), mx.float16)
    assert mx.get_peak_memory() - before < 2**16
    assert same(values(again), kept)


def test_shards(tmp_path):
    """Their index is for others; tests/app/test_convert.py has diffusers read them."""
    module = build("unet", UNETS["sd1"])
    kept = values(module)
    limit = sum(value.nbytes for value in kept.values()) // 3
    files = write_weights(tmp_path, "diffusion_pytorch_model", stored_tensors(module), limit)
    assert [file.name[-20:-12] for file in files] == [f"of-{len(files):05}" for _ in files] and len(files) >= 3
    assert all(file.stat().st_size <= limit + 2**16 for file in files)
    assert same(values(load_component(Component("unet", UNETS["sd1"], tuple(files)), None)), kept)


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    size = 2**18
    weights = {f"{i:03}": mx.random.normal((size,), key=mx.random.key(i)).astype(mx.float16) for i in range(64)}
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    write_weights(tmp_path, "model", weights, ONE_FILE)
    assert not weights
    assert mx.get_peak_memory() - before < 16 * size


@pytest.mark.parametrize(
    "dtype, largest", [(mx.float32, 0x7F7F_FFFF), (mx.bfloat16, 0x7F7F), (mx.float16, 0x7BFF)], ids=str
)
def test_what_is_finite(dtype, largest):
    """The largest finite value, the infinity and the NaNs beside it, by their bits, of both signs, among others."""
    unsigned = mx.uint32 if dtype == mx.float32 else mx.uint16
    sign = 1 << 8 * unsigned.size - 1
    for bits in (0, 1, largest, largest + 1, largest + 2, sign - 1):
        for pattern in (bits, bits + sign):
            value = mx.array([0, pattern, sign], unsigned).view(dtype)
            assert all_finite(value) == mx.isfinite(value).all().item() == (bits <= largest), pattern
    assert all_finite(mx.zeros((0, 2), dtype)) and all_finite(mx.array(-1.0, dtype))
    assert all_finite(mx.array([2**32 - 1], mx.uint32)) and all_finite(mx.array([-1]))


@pytest.mark.parametrize("dtype, bad", [(mx.float32, math.nan), (mx.bfloat16, -math.inf), (mx.float16, 1e5)])
def test_values_that_are_not_finite_are_refused(tmp_path, dtype, bad):
    value = mx.array([[1.0, 2.0], [65504.0, bad]]).astype(dtype)
    with pytest.raises(ValueError, match="second is not finite in "):
        write_weights(tmp_path, "model", {"first": mx.ones(2), "second": value}, ONE_FILE)
    write_weights(tmp_path, "model", {"x": value[:, :1]}, ONE_FILE)


# --- quantized parts: what is refused ----------------------------------------------------------------------------


def quantized(tmp_path: Path, change: dict, **tensors: mx.array | None) -> Component:
    """A quantized text encoder whose ``quantization`` and tensors are changed; None takes a tensor away."""
    module = quantize(build("text_encoder_2", TEXT), 4, 64)
    weights = stored_tensors(module) | tensors
    files = write_weights(tmp_path, "model", {k: v for k, v in weights.items() if v is not None}, ONE_FILE)
    stored = {"bits": 4, "group_size": 64} | change
    return Component("text_encoder_2", TEXT | {"quantization": stored}, tuple(files))


def refused(component: Component) -> str:
    with pytest.raises(ValueError) as error:
        load_component(component)
    assert "\n" not in str(error.value) and str(component.files[0]) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("stored", [{"bits": 7, "group_size": 64}, {"bits": 4, "group_size": 48}, {"bits": [4]}, "q4"])
def test_unknown_quantization_is_refused(tmp_path, stored):
    component = quantized(tmp_path, {})
    component.config["quantization"] = stored
    assert "is not supported" in refused(component)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    layer = "text_model.encoder.layers.0.mlp.fc1"
    assert f"missing: {layer}.biases" in refused(quantized(tmp_path, {}, **{f"{layer}.biases": None}))
    assert "of the wrong shape" in refused(quantized(tmp_path, {"group_size": 32}))
    message = refused(quantized(tmp_path, {}, **{f"{layer}.weight": mx.zeros((128, 7), dtype=mx.uint32)}))
    assert f"{layer}.weight (128, 7)" in message and f"unexpected: {layer}.biases, {layer}.scales" in message
    message = refused(quantized(tmp_path, {}, **{f"{layer}.weight": mx.zeros((128, 8))}))
    assert f"1 of the wrong type: {layer}.weight of" in message
    assert "unexpected" in refused(replace(quantized(tmp_path, {}), config=TEXT))


def test_other_bits_than_stored_are_refused_and_the_same_change_nothing(tmp_path):
    component = quantized(tmp_path, {})
    with pytest.raises(ValueError, match="stored in 4 bits, not in 8"):
        remaining_quantization(component, 8)
    assert remaining_quantization(component, 4) is None
    assert remaining_quantization(replace(component, config=TEXT), 4) == (4, 64)

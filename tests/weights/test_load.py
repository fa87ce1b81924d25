"""Loading is strict, lazy, and quantizes matrix by matrix."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from configs import UNETS
from models.test_vae import SD as VAE
from peaks import pages
from stable_diffusion.weights.files import Component
from stable_diffusion.weights.load import build, fill, load_component, read_weights, size_in_bytes
from stable_diffusion.weights.quantize import BITS, quantize
from stable_diffusion.weights.save import stored_tensors


def write(folder, name: str, config: dict, dtype: mx.Dtype = mx.float32) -> Component:
    """A component of random weights on disk."""
    tensors = {key: value.astype(dtype) for key, value in stored_tensors(build(name, config)).items()}
    file = folder / f"{name}.safetensors"
    mx.save_safetensors(str(file), tensors)
    return Component(name, config, (file,))


def test_weights_are_cast(tmp_path):
    component = write(tmp_path, "unet", UNETS["sd1"], mx.float16)
    for dtype in (mx.float16, mx.float32):
        module = load_component(component, dtype)
        assert {value.dtype for _, value in tree_flatten(module.parameters())} == {dtype}


@pytest.mark.parametrize("part", ["missing", "unexpected", "of the wrong shape"])
def test_tensors_that_do_not_fit_are_counted_and_the_first_are_named(part):
    module = build("vae", VAE)
    tensors = stored_tensors(module)
    names = sorted(tensors)
    chosen = names[::7]
    for name in chosen:
        if part == "missing":
            del tensors[name]
        elif part == "unexpected":
            tensors[f"{name}.more"] = mx.zeros(1)
        else:
            tensors[name] = mx.zeros((*tensors[name].shape[:-1], tensors[name].shape[-1] + 1))
    with pytest.raises(ValueError, match=f"{len(chosen)} {part}: ") as error:
        fill(module, tensors)
    message = str(error.value)
    assert f": {chosen[0]}" in message and message.endswith(" more") and len(message) <= 300


def test_a_wrong_file_is_named(tmp_path):
    component = write(tmp_path, "unet", UNETS["sd1"])
    other = Component("unet", UNETS["sd2"] | {"cross_attention_dim": 48}, component.files)
    message = r"unet \(.*unet\.safetensors\): the weights do not fit the config: .* of the wrong shape"
    with pytest.raises(ValueError, match=message):
        load_component(other)


def test_wrong_shapes_of_convolutions_are_reported_in_the_files_layout():
    module = build("unet", UNETS["sd1"])
    tensors = stored_tensors(module)
    tensors["conv_in.weight"] = mx.zeros((32, 9, 3, 3))
    with pytest.raises(ValueError, match=r"conv_in.weight \(32, 9, 3, 3\) instead of \(32, 4, 3, 3\)"):
        fill(module, tensors)


# Wide and shallow, so that one layer is a small part of the whole and activations do not count.
WIDE = UNETS["sd2"] | {"block_out_channels": [128, 128, 256], "cross_attention_dim": 256, "norm_num_groups": 32}
WIDE |= {"attention_head_dim": [2, 2, 4], "transformer_layers_per_block": 3}


@pytest.mark.parametrize("bits", [b if b == 4 else pytest.param(b, marks=pytest.mark.slow) for b in BITS])
def test_quantizing_never_holds_the_unquantized_model(tmp_path, bits):
    component = write(tmp_path, "unet", WIDE, mx.float16)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    module = quantize(load_component(component, mx.float16), bits, 32)
    assert mx.get_peak_memory() - before < 2**16  # still lazy
    read_weights(module)
    peak = mx.get_peak_memory() - before
    largest = max(value.nbytes for value in mx.load(str(component.files[0])).values())
    assert peak <= 1.3 * size_in_bytes(module) + largest + pages(module)
    assert size_in_bytes(module) < component.files[0].stat().st_size


def test_what_is_quantized_and_what_is_not():
    unet = quantize(build("unet", UNETS["sd1"]), 8, 32)
    kinds = {path: type(m).__name__ for path, m in unet.named_modules()}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    for path in (f"{block}.attn1.to_q", f"{block}.attn2.to_out.0", f"{block}.ff.net.0.proj", "time_embedding.linear_1"):
        assert kinds[path] == "QuantizedLinear"
    for path, kind in {"down_blocks.1.resnets.0.conv_shortcut": "Linear", "conv_in": "Conv2d"}.items():
        assert kinds[path] == kind
    encoder = quantize(build("text_encoder", {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 96}), 4, 64)
    embeddings = encoder.text_model.embeddings
    assert embeddings.token_embedding.bits == 8
    assert type(embeddings.position_embedding) is nn.Embedding
    assert encoder.text_model.encoder.layers[0].mlp.fc1.bits == 4


def test_quantizing_twice_changes_nothing():
    unet = quantize(build("unet", UNETS["sd1"]), 8, 32)
    before = dict(tree_flatten(unet.parameters()))
    after = dict(tree_flatten(quantize(unet, 4, 32).parameters()))
    assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)


def test_impossible_bits_are_refused():
    with pytest.raises(ValueError, match="7 bits is not supported; choose one of 2, 3, 4, 5, 6, 8"):
        quantize(build("unet", UNETS["sd1"]), 7, 32)


WRONG = [("unet", {"block_out_channels": -1}), ("unet", {"layers_per_block": "two"}), ("unet", {"down_block_types": 3})]
WRONG += [("vae", {"block_out_channels": 7}), ("vae", {"latent_channels": "four"})]
WRONG += [("text_encoder", {"hidden_size": "wide"}), ("text_encoder", {"num_attention_heads": 0})]


@pytest.mark.parametrize("name, change", WRONG)
def test_values_of_the_wrong_kind_are_one_line(name, change):
    config = {"unet": UNETS["sd1"], "vae": VAE, "text_encoder": {}}[name]
    with pytest.raises(ValueError, match="config") as error:
        mx.eval(build(name, config | change)(mx.zeros((1, 3), dtype=mx.int32)).last_hidden_state)
    assert "\n" not in str(error.value)

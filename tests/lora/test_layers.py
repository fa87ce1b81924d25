"""LoRAs come and go without a trace, add up, and say what they do not fit."""

import gc
import logging
import weakref
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

import loras
from loras import make
from oracle import relative_error
from peaks import pages
from stable_diffusion import StableDiffusion
from stable_diffusion.lora.files import read_lora
from stable_diffusion.lora.layers import LoRALayer, attach, fuse
from stable_diffusion.weights.load import load_component, read_weights, size_in_bytes
from stable_diffusion.weights.quantize import quantize
from stable_diffusion.weights.save import stored_tensors
from weights.test_load import WIDE
from weights.test_load import write as write_component

FIRST_BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0"


@pytest.fixture(scope="module")
def file(sd1, tmp_path_factory):
    """A LoRA of some layers of SD 1, and what it changes them by."""
    tensors, deltas = make(sd1)
    return loras.write(tmp_path_factory.mktemp("lora"), tensors), deltas


@pytest.fixture(scope="module")
def other(sd1, tmp_path_factory):
    """Another, of another kind, for some of the same layers."""
    tensors, deltas = make(sd1, "peft", "loha", seed=1, only=lambda n, path: loras.few(n, path) and "attn" in path)
    return loras.write(tmp_path_factory.mktemp("lora"), tensors), deltas


def arrays(networks) -> dict[str, mx.array]:
    return {f"{n}.{key}": value for n, network in networks.items() for key, value in tree_flatten(network.parameters())}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(one[key] is two[key] for key in one)


def equal(one: dict, two: dict) -> bool:
    return all(np.array_equal(one[key], two[key]) for key in one)


def close(one: dict, two: dict, tolerance: float = 1e-4) -> bool:
    return all(relative_error(one[key], two[key]) <= tolerance for key in two)


def tree(networks) -> dict[str, tuple]:
    """All modules, with the arrays of each and those of them that may be trained."""
    return {
        f"{n}.{path}": (
            id(module),
            frozenset(id(v) for v in module.values() if isinstance(v, mx.array)),
            frozenset(name for name, _ in tree_flatten(module.trainable_parameters())),
        )
        for n, network in networks.items()
        for path, module in network.named_modules()
    }


# --- there and back --------------------------------------------------------------------------------------------------


def test_attached_loras_are_modules_in_the_tree_and_no_weights_of_the_model(sd1, file):
    network = sd1.networks["unet"]
    before = stored_tensors(network)
    attached = attach(sd1.networks, read_lora(file[0]))
    wrapped = {path: layer for path, layer in network.named_modules() if isinstance(layer, LoRALayer)}
    assert wrapped.keys() == {path for n, path in file[1] if n == "unet"}
    conv = wrapped["conv_in"]
    assert isinstance(conv.base, nn.Conv2d) and conv.weight is conv.base.weight
    factors = {name for name, _ in tree_flatten(network.trainable_parameters())}
    assert factors == {f"{path}.loras.0.{role}" for path in wrapped for role in ("down", "up")}
    after = stored_tensors(network)
    attached.detach()
    assert before.keys() == after.keys() and equal(before, after)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_detaching_restores_every_module_and_array(sd1, file, other, order):
    sd1.networks["unet"].conv_out.freeze()
    before = tree(sd1.networks)
    attached = [attach(sd1.networks, read_lora(path)) for path, _ in (file, other)]
    assert tree(sd1.networks) != before
    for i in (*order, 0):
        attached[i].detach()
    assert tree(sd1.networks) == before
    sd1.networks["unet"].conv_out.unfreeze()


def test_a_lora_for_few_steps_changes_the_defaults_until_it_is_detached(sd1, sd1_folder, write, caplog):
    path = write(make(sd1)[0], "lcm-lora-sdv1-5.safetensors")
    sd = StableDiffusion(sd1_folder)
    before = sd.defaults
    lora = sd.load_lora(path)
    assert "was distilled for few steps: its defaults are sampler lcm, num_steps 4, cfg_" in caplog.text
    assert (sd.sampler, sd.generate_latents("a cat").n_steps, sd.defaults.cfg_weight) == ("lcm", 4, 1.0)
    lora.scale = 0.0
    assert sd.defaults == before
    lora.scale = 1.0
    sd.sampler = "euler"
    assert (sd.sampler, sd.defaults.num_steps) == ("euler", 4)
    lora.detach()
    assert sd.defaults == replace(before, sampler="euler")
    assert StableDiffusion(sd1_folder, loras=[(path, 1.0)]).defaults.num_steps == 4


def test_scale_zero_is_no_lora(sd1, write):
    tensors, _ = make(sd1)
    overflowing = {name: value * (torch.inf if "lora_up" in name else 1) for name, value in tensors.items()}
    lora, before, parameters = read_lora(write(overflowing)), sd1.ours(), arrays(sd1.networks)
    attachment = attach(sd1.networks, lora, 0)
    assert equal(sd1.ours(), before)
    attachment.detach()
    fuse(sd1.networks, [(lora, 0)])
    assert same(arrays(sd1.networks), parameters)


def test_loras_add_up(sd1, file, other):
    with loras.changed(sd1, file[1], 0.5), loras.changed(sd1, other[1], -0.8):
        wanted = sd1.theirs()
    first, then, before = (read_lora(file[0]), 0.5), (read_lora(other[0]), -0.8), sd1.ours()
    with loras.fused(sd1, first, then):
        assert close(sd1.ours(), wanted)
    with loras.fused(sd1, first), loras.attached(sd1, other[0], -0.8):
        assert close(sd1.ours(), wanted)
    one, two = attach(sd1.networks, *first), attach(sd1.networks, *then)
    assert close(sd1.ours(), wanted)
    one.detach()
    for scale in (-0.8, 0.0, 0.3):  # which changes between runs
        two.scale = scale
        with loras.changed(sd1, other[1], scale):
            assert close(sd1.ours(), sd1.theirs())
    two.detach()
    assert equal(sd1.ours(), before)


def test_a_deleted_network_is_freed_at_once(sd1_folder, file):
    """Scripts delete the text encoder and the UNet to make room, and expect it without a garbage collection."""
    networks = dict(loras.load(sd1_folder, "sd1").networks)
    before = tree({"text_encoder": networks["text_encoder"]})
    attachment = attach(networks, read_lora(file[0]))
    freed = weakref.ref(networks["unet"])
    gc.disable()
    try:
        del networks["unet"]
        assert freed() is None
    finally:
        gc.enable()
    attachment.detach()
    assert tree(networks) == before


# --- other types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, dora", [("lora", None), ("loha", None), ("lora", "columns")])
def test_float16(sd1, sd1_folder, kind, dora, write):
    tensors, deltas = make(sd1, kind=kind, dora=dora)
    lora, half = read_lora(write(tensors)), loras.load(sd1_folder, "sd1")
    for network in half.networks.values():
        network.set_dtype(mx.float16)
    with loras.changed(sd1, deltas, 0.7):
        wanted = sd1.theirs()
    attachment = attach(half.networks, lora, 0.7)
    attached = half.ours()
    assert half.our_noise().dtype == mx.float16
    attachment.detach()
    weight = f"unet.{FIRST_BLOCK}.attn1.to_q.weight"
    before = np.array(arrays(half.networks)[weight], dtype=np.float64)
    fuse(half.networks, [(lora, 0.7)])
    fused = arrays(half.networks)
    assert {value.dtype for value in fused.values()} == {mx.float16}
    for result in (attached, half.ours()):
        assert close(result, wanted, 0.02)
        assert not close(sd1.ours(), wanted, 0.05), "the tolerance would hide a missing LoRA"
    if dora is None:  # summed in float32, rounded once
        exact = before + 0.7 * deltas["unet", f"{FIRST_BLOCK}.attn1.to_q"].numpy()
        step = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
        assert (np.abs(np.array(fused[weight]) - exact) <= 0.501 * step).all()


@pytest.mark.parametrize("kind, dora", [("lora", None), ("lora", "rows")])
def test_on_quantized_weights(sd1_folder, kind, dora, write):
    model = loras.load(sd1_folder, "sd1")
    for network in model.networks.values():
        quantize(network, 8, 32)
    modules = {(n, path): m for n, network in model.networks.items() for path, m in network.named_modules()}
    with torch.no_grad():  # the torch model gets the weights that the quantized ones stand for
        for network, path, weight in loras.layers(model):
            if isinstance(module := modules[network, path], nn.QuantizedLinear):
                whole = mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=8)
                weight.copy_(torch.from_numpy(np.array(whole)).reshape(weight.shape))
        embedding = model.networks["text_encoder"].text_model.embeddings.token_embedding
        words = np.array(embedding(mx.arange(embedding.weight.shape[0])))
        model.pipe.text_encoder.get_input_embeddings().weight.copy_(torch.from_numpy(words))
    assert close(model.ours(), model.theirs())
    tensors, deltas = make(model, kind=kind, dora=dora)
    lora, before = read_lora(write(tensors)), arrays(model.networks)
    attachment = attach(model.networks, lora, 0.5)
    with loras.changed(model, deltas, 0.5):
        assert close(model.ours(), model.theirs())
    attachment.detach()
    assert same(arrays(model.networks), before)
    with pytest.raises(ValueError, match=r"is quantized: fuse before quantizing, or attach the LoRA instead"):
        fuse(model.networks, [(lora, 1)])
    assert same(arrays(model.networks), before)


def test_on_a_gpu(gpu, model, sd1_folder, write):
    """Beside every layer, of which a GPU joins some; detached again; on quantized layers."""
    tensors, deltas = make(model)
    attachment = attach(model.networks, read_lora(write(tensors)), 0.5)
    with loras.changed(model, deltas, 0.5):
        assert close(model.ours(), model.theirs())
    attachment.detach()
    assert close(model.ours(), model.theirs())
    if model.family == "sd1":
        test_on_quantized_weights(sd1_folder, "lora", None, write)


def test_quantizing_afterwards_keeps_what_is_attached(sd1_folder, file):
    one, two = loras.load(sd1_folder, "sd1"), loras.load(sd1_folder, "sd1")
    quantize(one.networks["unet"], 8, 32)
    attach(one.networks, read_lora(file[0]), 0.6)
    attachment = attach(two.networks, read_lora(file[0]), 0.6)
    quantize(two.networks["unet"], 8, 32)
    assert equal(two.ours(), one.ours())
    attachment.detach()
    assert any(isinstance(layer, nn.QuantizedLinear) for layer in two.networks["unet"].modules())
    assert not close(two.ours(), one.ours())


def test_fusing_before_quantizing_never_holds_the_whole_model(tmp_path):
    narrower = {"block_out_channels": [128, 128, 256], "transformer_layers_per_block": 2, "cross_attention_dim": 256}
    component = write_component(tmp_path, "unet", WIDE | narrower, mx.float16)
    shapes = {path: m.weight.shape for path, m in load_component(component).named_modules() if isinstance(m, nn.Linear)}
    tensors = {}
    for path, (out, into) in shapes.items():
        name = "lora_unet_" + path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": torch.zeros(4, into), f"{name}.lora_up.weight": torch.ones(out, 4)}
    file = loras.write(tmp_path, tensors)
    module = load_component(component, mx.float16)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    fuse({"unet": module}, [(read_lora(file), 1.0)])
    assert mx.get_active_memory() - before < 1e5, "fusing computes nothing by itself"
    read_weights(quantize(module, 4, 32))
    peak = mx.get_peak_memory() - before
    largest = 2 * max(value.nbytes for value in mx.load(str(component.files[0])).values())
    assert peak <= 1.3 * size_in_bytes(module) + 2 * largest + file.stat().st_size + pages(module)
    assert peak < component.files[0].stat().st_size + pages(module)


# --- norms and biases ------------------------------------------------------------------------------------------------


def test_norms_and_biases(sd1, write, monkeypatch):
    """Alone, and beside the factors of a matrix; on both kinds of devices."""
    path = "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0"
    unet, text = sd1.pipe.unet, sd1.pipe.text_encoder
    wave = torch.linspace(-1, 1, 64).cos()
    norm, layer_norm = unet.down_blocks[1].resnets[0].norm2, unet.mid_block.attentions[0].transformer_blocks[0].norm1
    text_norm = text.get_submodule("encoder.layers.0.layer_norm1")
    changes = {
        "lora_unet_down_blocks_1_resnets_0_norm2.w_norm": (norm.weight, wave),
        "lora_unet_down_blocks_1_resnets_0_norm2.b_norm": (norm.bias, -wave),
        "diffusion_model.middle_block.1.transformer_blocks.0.norm1.diff": (layer_norm.weight, wave),
        "unet.conv_in.diff_b": (unet.conv_in.bias, wave[:32]),
        "unet.mid_block.resnets.0.conv1.diff_b": (unet.mid_block.resnets[0].conv1.bias, wave),
        "unet.mid_block.resnets.1.conv2.diff_b": (unet.mid_block.resnets[1].conv2.bias, wave),
        "lora_unet_conv_norm_out.diff_b": (unet.conv_norm_out.bias, wave[:32]),
        "lora_te_text_model_encoder_layers_0_layer_norm1.w_norm": (text_norm.weight, wave[:32]),
    }
    tensors, deltas = make(sd1, only=lambda network, name: name == path)
    (name,) = {name.partition(".")[0] for name in tensors}
    tensors |= {name: change for name, (_, change) in changes.items()}
    tensors[f"{name}.lora_up.bias"] = wave * loras.RANK / loras.ALPHA  # the alpha counts for it
    changes[f"{name}.lora_up.bias"] = unet.get_submodule(path).bias, wave
    with loras.changed(sd1, deltas, 0.5), loras.added([(p, 0.5 * change) for p, change in changes.values()]):
        wanted = sd1.theirs()
    lora, before = read_lora(write(tensors)), arrays(sd1.networks)
    attachments = [attach(sd1.networks, lora, share) for share in (0.1, 0.4)]
    assert close(sd1.ours(), wanted)
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        assert close(sd1.ours(), wanted)
    for attachment in attachments:
        attachment.detach()
    with loras.fused(sd1, (lora, 0.5)):
        assert close(sd1.ours(), wanted)
    assert same(arrays(sd1.networks), before)
    assert not close(sd1.ours(), wanted, 1e-3), "hardly any change: nothing is tested"


# --- what does not fit -----------------------------------------------------------------------------------------------


def pair(name: str, down: tuple, up: tuple) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_down.weight": torch.ones(down), f"{name}.lora_up.weight": torch.ones(up)}


def refused(match, networks, source, **options):
    """Attaching refuses with one line and leaves the model as it was."""
    before = tree(networks)
    with pytest.raises(ValueError, match=match) as error:
        attach(networks, read_lora(source), **options)
    assert "\n" not in str(error.value)
    assert tree(networks) == before
    return str(error.value)


def test_what_does_not_match_is_listed(sd1, write, caplog):
    tensors, deltas = make(sd1)
    extra = pair("lora_unet_down_blocks_7_attentions_0_proj_in", (4, 32), (32, 4))
    extra |= pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", (4, 32), (64, 4))
    source = write(tensors | extra | {"something.else": torch.ones(1, 32)})
    message = refused("parts are not in this model", sd1.networks, source)
    left = ["unet.down_blocks_7_attentions_0_proj_in", "text_encoder_2.text_model_encoder_layers_0_mlp_fc1"]
    left += ["something.else"]
    assert f"3 of its {len(deltas) + 3} parts" in message and "partial=True" in message and str(source) in message
    assert all(name in message for name in left)
    with caplog.at_level(logging.WARNING, "stable_diffusion"):
        attachment = attach(sd1.networks, read_lora(source), partial=True)
    assert len(caplog.records) == 1 and all(name in caplog.text for name in left)
    with loras.changed(sd1, deltas):
        assert close(sd1.ours(), sd1.theirs())
    attachment.detach()


def test_a_missing_network_is_not_overlooked(sd1, file):
    refused("parts are not in this model: text_encoder", {"unet": sd1.networks["unet"]}, file[0])


@pytest.mark.parametrize("made_for, kind", [("sd1", "lora"), ("xl", "loha"), ("sd1", "diff")])
def test_another_family(sd1, xl, made_for, kind, write):
    given, model, widths = (sd1, xl, (32, 64)) if made_for == "sd1" else (xl, sd1, (64, 32))
    source = write(make(given, kind=kind)[0])
    match = "is a LoRA for .*prompts {} wide.* and this model is .*prompts {} wide".format(*widths)
    for partial in (False, True):
        refused(match, model.networks, source, partial=partial)


@pytest.mark.parametrize("partial", [False, True])
def test_other_models(sd1, partial, write):
    source = write(pair("lora_unet_other_blocks_0_attn_qkv", (4, 4), (4, 4)))
    refused("another kind of model: this one lacks all 1 parts, unet", sd1.networks, source, partial=partial)


def test_wrong_shapes_are_listed(sd1, write):
    """A kernel of 1×1 may not pass for one of 3×3 with as many values."""
    tensors, _ = make(sd1)
    tensors |= pair("lora_unet_conv_in", (4, 36, 1, 1), (32, 4, 1, 1))
    wrong = sorted(name for name in tensors if "attn1_to_k.lora_up" in name)
    tensors |= {name: torch.ones(33, 4) for name in wrong}
    message = refused(f"{len(wrong) + 1} have the wrong shape", sd1.networks, write(tensors), partial=True)
    assert "unet.conv_in (32, 36, 1, 1) instead of (32, 4, 3, 3)" in message
    assert "(33, 32) instead of (32, 32)" in message and message.endswith(f"and {len(wrong) - 1} more")


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr-factored"])
def test_half_a_change_is_refused(sd1, kind, write):
    tensors, _ = make(sd1, kind=kind, only=lambda network, path: path == f"{FIRST_BLOCK}.attn2.to_v")
    for left_out in (name for name in tensors if not name.endswith("alpha")):
        rest = {name: value for name, value in tensors.items() if name != left_out}
        with pytest.raises(ValueError, match=r"is incomplete: factors are missing for .*attn2_to_v$"):
            read_lora(write(rest))


@pytest.mark.parametrize("te, unet", [(0.5, -0.3), (0.0, 1.0), (1.0, 0.0)])
def test_text_encoders_and_unet_have_scales_of_their_own(sd1, file, te, unet):
    with loras.attached(sd1, file[0], te):
        wanted = sd1.ours()
    with loras.attached(sd1, file[0], unet):
        wanted["unet"] = sd1.ours()["unet"]
    with loras.attached(sd1, file[0], (te, unet)):
        assert close(sd1.ours(), wanted, 1e-6)
    with loras.fused(sd1, (read_lora(file[0]), (te, unet))):
        assert close(sd1.ours(), wanted)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), (1.0, float("nan")), (1.0,), (1.0, 1.0, 1.0)])
def test_scales_are_numbers(sd1, file, scale):
    with pytest.raises(ValueError, match=r"is not a finite number|has . numbers; give"):
        attach(sd1.networks, read_lora(file[0]), scale)


def test_any_shapes_are_one_line_or_right(sd1, write):
    """Factors of random shapes: either they make the weight's shape, or the error is one line."""
    rng = np.random.default_rng(0)
    roles = ["lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "diff", "diff_b"]
    roles += [f"{kind}_{part}" for kind in ("hada", "lokr") for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")]
    roles += ["lokr_w1", "lokr_w2", "hada_w1", "hada_w2", "lora_magnitude_vector"]
    layers = ["unet_conv_in", "unet_down_blocks_0_attentions_0_proj_in", "te_text_model_encoder_layers_0_mlp_fc1"]
    refusals = 0
    for trial in range(150):
        chosen, layer = rng.choice(roles, rng.integers(1, 6), replace=False), rng.choice(layers)
        sizes = [tuple(rng.choice([0, 1, 3, 4, 32], rng.integers(0, 5))) for _ in chosen]
        tensors = {f"lora_{layer}.{role}": torch.ones(size) for role, size in zip(chosen, sizes, strict=True)}
        try:
            attached = attach(sd1.networks, read_lora(write(tensors, f"{trial}.safetensors")))
        except ValueError as error:
            assert "\n" not in str(error), chosen
            refusals += 1
        else:
            sd1.ours()
            attached.detach()
    assert refusals > 75

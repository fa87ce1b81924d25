"""LoRAs come and go without a trace, add up, and say what they do not fit."""

import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

import loras
from loras import make, write
from oracle import relative_error
from stable_diffusion.lora.files import read_lora
from stable_diffusion.lora.layers import LoRAConv2d, LoRALayer, attach, fuse
from stable_diffusion.weights.load import load_component, size_in_bytes
from stable_diffusion.weights.quantize import quantize
from stable_diffusion.weights.save import stored_tensors
from weights.test_load import _WIDE
from weights.test_load import write as write_component


@pytest.fixture(scope="module")
def sd1(sd1_folder):
    return loras.load(sd1_folder, "sd1")


@pytest.fixture(scope="module")
def xl(xl_folder):
    return loras.load(xl_folder, "xl")


def few(network, path):
    return "attentions.1" in path or "encoder.layers.1" in path or path == "conv_in"


@pytest.fixture(scope="module")
def file(sd1, tmp_path_factory):
    """A LoRA of some layers of SD 1, and what it changes them by."""
    tensors, deltas = make(sd1, "kohya", only=few)
    return write(tmp_path_factory.mktemp("lora"), tensors), deltas


@pytest.fixture(scope="module")
def other(sd1, tmp_path_factory):
    """Another, of another kind, for some of the same layers."""
    tensors, deltas = make(
        sd1, "peft", "loha", seed=1, only=lambda network, path: few(network, path) and "attn" in path
    )
    return write(tmp_path_factory.mktemp("lora"), tensors), deltas


def arrays(networks) -> dict[str, mx.array]:
    return {f"{n}.{key}": value for n, network in networks.items() for key, value in tree_flatten(network.parameters())}


def modules(networks) -> dict[str, nn.Module]:
    return {f"{n}.{path}": module for n, network in networks.items() for path, module in network.named_modules()}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(one[key] is two[key] for key in one)


def equal(one: dict, two: dict) -> bool:
    return all(np.array_equal(one[key], two[key]) for key in one)


def close(one: dict, two: dict, tolerance: float = 1e-4) -> bool:
    return all(relative_error(one[key], two[key]) <= tolerance for key in two)


# --- there and back --------------------------------------------------------------------------------------------------


def tree(networks) -> dict[str, tuple]:
    """All modules, with the arrays of each and those of them that may be trained."""
    return {
        f"{n}.{path}": (module, frozenset(id(v) for v in module.values() if isinstance(v, mx.array)), names)
        for n, network in networks.items()
        for path, module in network.named_modules()
        for names in [frozenset(name for name, _ in tree_flatten(module.trainable_parameters()))]
    }


def same_tree(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(one[k][0] is two[k][0] and one[k][1:] == two[k][1:] for k in one)


def test_fusing_changes_the_arrays_of_the_lora_alone(sd1, file):
    before = arrays(sd1.networks)
    with loras.fused(sd1, (read_lora(file[0]), 0.5)):
        fused = arrays(sd1.networks)
    assert {key for key in before if before[key] is not fused[key]} == {f"{n}.{path}.weight" for n, path in file[1]}
    assert fused.keys() == before.keys()
    assert all(fused[key].dtype == before[key].dtype and fused[key].shape == before[key].shape for key in before)


def test_attached_loras_are_modules_in_the_tree(sd1, file):
    network = sd1.networks["unet"]
    attached = attach(sd1.networks, read_lora(file[0]))
    wrapped = {path: layer for path, layer in network.named_modules() if isinstance(layer, LoRALayer)}
    assert wrapped.keys() == {path for n, path in file[1] if n == "unet"}
    assert isinstance(wrapped["conv_in"], LoRAConv2d) and isinstance(wrapped["conv_in"].base, nn.Conv2d)
    factors = {name for name, _ in tree_flatten(network.trainable_parameters())}
    assert factors == {f"{path}.loras.0.{role}" for path in wrapped for role in ("down", "up")}
    attached.detach()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_detaching_restores_every_module_and_array(sd1, file, other, order):
    sd1.networks["unet"].conv_out.freeze()
    before = tree(sd1.networks)
    attached = [attach(sd1.networks, read_lora(path)) for path, _ in (file, other)]
    assert not same_tree(tree(sd1.networks), before)
    for i in order:
        attached[i].detach()
    assert same_tree(tree(sd1.networks), before)
    attached[0].detach()
    assert same_tree(tree(sd1.networks), before)
    sd1.networks["unet"].conv_out.unfreeze()


def test_attached_loras_are_no_weights_of_the_model(sd1, file):
    unet = sd1.networks["unet"]
    before = stored_tensors(unet)
    with loras.attached(sd1, file[0]):
        after = stored_tensors(unet)
        assert unet.conv_in.weight is unet.conv_in.base.weight
    assert before.keys() == after.keys() and equal(before, after)


def test_in_another_thread(sd1_folder, file):
    """Weights and factors are lazy, made in one thread and computed in another."""
    model = loras.load(sd1_folder, "sd1")
    with ThreadPoolExecutor(1) as pool:
        attachment = pool.submit(attach, model.networks, read_lora(file[0])).result()
        outputs = model.ours()
        pool.submit(attachment.detach).result()
        pool.submit(fuse, model.networks, [(read_lora(file[0]), 1.0)]).result()
        pool.submit(mx.synchronize).result()
    assert close(model.ours(), outputs)


def test_scale_zero_is_no_lora(sd1, tmp_path):
    tensors, _ = make(sd1, only=few)
    overflowing = {name: value * (torch.inf if "lora_up" in name else 1) for name, value in tensors.items()}
    lora, before, parameters = read_lora(write(tmp_path, overflowing)), sd1.ours(), arrays(sd1.networks)
    attachment = attach(sd1.networks, lora, 0)
    assert equal(sd1.ours(), before)
    attachment.detach()
    fuse(sd1.networks, [(lora, 0)])
    assert same(arrays(sd1.networks), parameters)


def test_scale_changes_between_runs(sd1, file):
    lora, deltas = read_lora(file[0]), file[1]
    attachment = attach(sd1.networks, lora, 1.0)
    for scale in (-1.5, 0.0, 0.3):
        attachment.scale = scale
        with loras.changed(sd1, deltas, scale):
            assert close(sd1.ours(), sd1.theirs())
    attachment.detach()


def test_loras_add_up(sd1, file, other):
    (path, deltas), (second, others) = file, other
    with loras.changed(sd1, deltas, 0.5), loras.changed(sd1, others, -0.8):
        wanted = sd1.theirs()
    first, then = (read_lora(path), 0.5), (read_lora(second), -0.8)
    before = sd1.ours()
    with loras.fused(sd1, first, then):
        assert close(sd1.ours(), wanted)
    with loras.fused(sd1, first):
        attachment = attach(sd1.networks, *then)
        assert close(sd1.ours(), wanted)
        attachment.detach()
    one, two = attach(sd1.networks, *first), attach(sd1.networks, *then)
    assert close(sd1.ours(), wanted)
    one.detach()
    with loras.changed(sd1, others, -0.8):
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
    assert same_tree(tree(networks), before)


# --- other types -----------------------------------------------------------------------------------------------------


def halved(sd1_folder):
    model = loras.load(sd1_folder, "sd1")
    for network in model.networks.values():
        network.set_dtype(mx.float16)
    return model


@pytest.mark.parametrize("kind, dora", [("lora", None), ("loha", None), ("lora", "rows"), ("lora", "columns")])
def test_float16(sd1, sd1_folder, kind, dora, tmp_path):
    tensors, deltas = make(sd1, "kohya", kind, only=few, dora=dora)
    lora, half = read_lora(write(tmp_path, tensors)), halved(sd1_folder)
    with loras.changed(sd1, deltas, 0.7):
        wanted = sd1.theirs()
    attachment = attach(half.networks, lora, 0.7)
    attached = half.ours()
    assert half.our_noise().dtype == mx.float16
    attachment.detach()
    before = arrays(half.networks)
    fuse(half.networks, [(lora, 0.7)])
    fused = arrays(half.networks)
    assert {value.dtype for value in fused.values()} == {mx.float16}
    for result in (attached, half.ours()):
        assert close(result, wanted, 0.02)
        assert not close(sd1.ours(), wanted, 0.05), "the tolerance would hide a missing LoRA"
    name = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
    exact = np.array(before[f"unet.{name}.weight"], dtype=np.float64) + 0.7 * deltas["unet", name].numpy()
    if dora is None:  # summed in float32, rounded once
        step = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
        assert (np.abs(np.array(fused[f"unet.{name}.weight"]) - exact) <= 0.501 * step).all()


@pytest.mark.parametrize("dora", [None, "rows"])
def test_on_quantized_weights(sd1_folder, dora, tmp_path):
    model = loras.load(sd1_folder, "sd1")
    for network in model.networks.values():
        quantize(network, 8, 32)
    quantized = {
        (name, path): module
        for name, network in model.networks.items()
        for path, module in network.named_modules()
        if isinstance(module, nn.QuantizedLinear)
    }
    with torch.no_grad():  # the torch model gets the weights that the quantized ones stand for
        for network, path, weight in loras.layers(model):
            if module := quantized.get((network, path)):
                whole = mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=8)
                weight.copy_(torch.from_numpy(np.array(whole)).reshape(weight.shape))
        embedding = model.networks["text_encoder"].text_model.embeddings.token_embedding
        model.pipe.text_encoder.get_input_embeddings().weight.copy_(
            torch.from_numpy(np.array(embedding(mx.arange(embedding.weight.shape[0]))))
        )
    assert close(model.ours(), model.theirs())
    tensors, deltas = make(model, "kohya", dora=dora)
    lora, before = read_lora(write(tmp_path, tensors)), arrays(model.networks)
    attachment = attach(model.networks, lora, 0.5)
    with loras.changed(model, deltas, 0.5):
        assert close(model.ours(), model.theirs())
    attachment.detach()
    assert same(arrays(model.networks), before)
    with pytest.raises(ValueError, match=r"is quantized: fuse before quantizing, or attach the LoRA instead"):
        fuse(model.networks, [(lora, 1)])
    assert same(arrays(model.networks), before)


def test_quantizing_afterwards_keeps_what_is_attached(sd1_folder, file):
    one, two = loras.load(sd1_folder, "sd1"), loras.load(sd1_folder, "sd1")
    lora = read_lora(file[0])
    quantize(one.networks["unet"], 8, 32)
    attach(one.networks, lora, 0.6)
    attachment = attach(two.networks, lora, 0.6)
    nn.quantize(
        two.networks["unet"],
        group_size=32,
        bits=8,
        class_predicate=lambda path, m: (
            isinstance(m, nn.Linear) and m.weight.shape[1] % 32 == 0 and "short" not in path
        ),
    )
    assert equal(two.ours(), one.ours())
    attachment.detach()
    assert {type(layer) for layer in modules(two.networks).values()} & {nn.QuantizedLinear}
    assert not close(two.ours(), one.ours())
    attachment.detach()


def test_fusing_before_quantizing_never_holds_the_whole_model(tmp_path):
    narrower = {"block_out_channels": [128, 128, 256], "transformer_layers_per_block": 2, "cross_attention_dim": 256}
    component = write_component(tmp_path, "unet", _WIDE | narrower, mx.float16)
    shapes = {path: m.weight.shape for path, m in load_component(component).named_modules() if isinstance(m, nn.Linear)}
    tensors = {}
    for path, (out, into) in shapes.items():
        name = "lora_unet_" + path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": torch.zeros(4, into), f"{name}.lora_up.weight": torch.ones(out, 4)}
    file = write(tmp_path, tensors)
    module = load_component(component, mx.float16)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    fuse({"unet": module}, [(read_lora(file), 1.0)])
    assert mx.get_active_memory() - before < 1e5, "fusing computes nothing by itself"
    quantize(module, 4, 32)
    mx.eval(module.parameters())
    peak = mx.get_peak_memory() - before
    largest = 2 * max(value.nbytes for value in mx.load(str(component.files[0])).values())
    assert peak <= 1.3 * size_in_bytes(module) + 2 * largest + file.stat().st_size
    assert peak < component.files[0].stat().st_size


# --- alpha, and what else may be missing ------------------------------------------------------------------------------


def test_without_alpha_it_is_the_rank(sd1, tmp_path):
    tensors, _ = make(sd1, only=few, alpha=None)
    assert {delta.multiplier for delta in read_lora(write(tmp_path, tensors)).deltas} == {1.0}
    tensors, _ = make(sd1, only=few, alpha=1)
    assert {delta.multiplier for delta in read_lora(write(tmp_path, tensors)).deltas} == {1 / loras.RANK}


@contextmanager
def added(*changes):
    """torch parameters with something added, for a while."""
    with torch.no_grad():
        for parameter, change in changes:
            parameter += change
        yield
        for parameter, change in changes:
            parameter -= change


def both_ways(model, path, wanted, scale=0.5):
    lora, before = read_lora(path), arrays(model.networks)
    attachments = [attach(model.networks, lora, share * scale) for share in (0.25, 0.75)]
    assert close(model.ours(), wanted)
    for attachment in attachments:
        attachment.detach()
    with loras.fused(model, (lora, scale)):
        assert close(model.ours(), wanted)
    assert same(arrays(model.networks), before)
    assert not close(model.ours(), wanted, 1e-3), "hardly any change: nothing is tested"


@pytest.mark.parametrize(
    "kind, role, times",
    [("diff", "diff_b", 1.0), ("lora", "diff_b", 1.0), ("lora", "lora_up.bias", loras.ALPHA / loras.RANK)],
)
def test_biases(sd1, kind, role, times, tmp_path):
    path = "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0"
    tensors, deltas = make(sd1, kind=kind, only=lambda network, name: name == path)
    (name,) = {name.partition(".")[0] for name in tensors}
    tensors[f"{name}.{role}"] = torch.linspace(-1, 1, 64)
    bias = sd1.pipe.unet.get_submodule(path).bias
    with loras.changed(sd1, deltas, 0.5), added((bias, 0.5 * times * torch.linspace(-1, 1, 64))):
        wanted = sd1.theirs()
    both_ways(sd1, write(tmp_path, tensors), wanted)


def test_norms_and_biases_alone(sd1, tmp_path):
    unet, text = sd1.pipe.unet, sd1.pipe.text_encoder
    wave = torch.linspace(-1, 1, 64).cos()
    norm, layer_norm = unet.down_blocks[1].resnets[0].norm2, unet.mid_block.attentions[0].transformer_blocks[0].norm1
    tensors = {
        "lora_unet_down_blocks_1_resnets_0_norm2.w_norm": wave,
        "lora_unet_down_blocks_1_resnets_0_norm2.b_norm": -wave,
        "diffusion_model.middle_block.1.transformer_blocks.0.norm1.diff": wave,
        "unet.conv_in.diff_b": wave[:32],
        "lora_unet_conv_norm_out.diff_b": wave[:32],
        "lora_te_text_model_encoder_layers_0_layer_norm1.w_norm": wave[:32],
    }
    changes = [(norm.weight, wave), (norm.bias, -wave), (layer_norm.weight, wave), (unet.conv_in.bias, wave[:32])]
    changes += [(unet.conv_norm_out.bias, wave[:32])]
    changes += [(text.get_submodule("encoder.layers.0.layer_norm1").weight, wave[:32])]
    with added(*((parameter, 0.5 * change) for parameter, change in changes)):
        wanted = sd1.theirs()
    both_ways(sd1, write(tmp_path, tensors), wanted)


def refused(match, networks, source, **options):
    """Both ways refuse with one line and leave the model as it was."""
    before = tree(networks)
    messages = set()
    for apply in (
        lambda lora: attach(networks, lora, **options),
        lambda lora: fuse(networks, [(lora, 1.0)], **options),
    ):
        with pytest.raises(ValueError, match=match) as error:
            apply(read_lora(source))
        assert "\n" not in str(error.value)
        messages.add(str(error.value))
    assert same_tree(tree(networks), before)
    return messages.pop()


def test_what_does_not_match_is_listed(sd1, file, tmp_path, caplog):
    tensors, deltas = make(sd1, only=few)
    extra = {
        "lora_unet_down_blocks_7_attentions_0_proj_in.lora_down.weight": torch.ones(4, 32),
        "lora_unet_down_blocks_7_attentions_0_proj_in.lora_up.weight": torch.ones(32, 4),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 32),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(64, 4),
        "bundle_emb.word.string_to_param.*": torch.ones(1, 32),
    }
    source = write(tmp_path, tensors | extra)
    message = refused("parts are not in this model", sd1.networks, source)
    left = (
        "unet.down_blocks_7_attentions_0_proj_in",
        "text_encoder_2.text_model_encoder_layers_0_mlp_fc1",
        "bundle_emb.word.string_to_param.*",
    )
    assert f"3 of its {len(deltas) + 3} parts" in message and "partial=True" in message and str(source) in message
    assert all(name in message for name in left)
    with caplog.at_level(logging.WARNING, "stable_diffusion"):
        attachment = attach(sd1.networks, read_lora(source), partial=True)
    assert len(caplog.records) == 1 and all(name in caplog.text for name in left)
    assert set(attachment.unmatched) == set(left)
    with loras.changed(sd1, deltas):
        assert close(sd1.ours(), sd1.theirs())
    attachment.detach()


def test_a_missing_network_is_not_overlooked(sd1, file):
    refused("parts are not in this model: text_encoder", {"unet": sd1.networks["unet"]}, file[0])


@pytest.mark.parametrize("kind", ["lora", "loha", "diff"])
@pytest.mark.parametrize("made_for", ["sd1", "xl"])
def test_another_family(sd1, xl, kind, made_for, tmp_path):
    given, model = (sd1, xl) if made_for == "sd1" else (xl, sd1)
    tensors, _ = make(given, kind=kind, only=few)
    widths = {"sd1": 32, "xl": 64}
    other = "xl" if made_for == "sd1" else "sd1"
    match = f"is a LoRA for .*prompts {widths[made_for]} wide.* and this model is .*prompts {widths[other]} wide"
    refused(match, model.networks, write(tmp_path, tensors))
    refused(match, model.networks, write(tmp_path, tensors), partial=True)


def test_another_kind_of_model(sd1, tmp_path):
    tensors = {
        f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_{side}.weight": torch.ones(4, 4)
        for i in range(3)
        for side in ("down", "up")
    }
    refused(
        r"another kind of model: this one has none of its 3 parts, unet.double_blocks_0_img_attn_qkv",
        sd1.networks,
        write(tmp_path, tensors),
    )
    refused("another kind of model", sd1.networks, write(tmp_path, tensors), partial=True)


def test_what_is_misshapen_is_listed(sd1, tmp_path):
    tensors, _ = make(sd1, only=few)
    wrong = sorted(name for name in tensors if "attn1_to_k.lora_up" in name)
    for name in wrong:
        tensors[name] = torch.ones(33, 4)
    message = refused(f"{len(wrong)} misshapen", sd1.networks, write(tmp_path, tensors), partial=True)
    assert all(name.partition(".")[0].removeprefix("lora_unet_") in message for name in wrong)
    assert "(33, 32) instead of (32, 32)" in message


def test_a_kernel_must_be_the_layers(sd1, tmp_path):
    """As many values as a 3×3 kernel has, but of 1×1: it may not pass for one."""
    tensors = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(4, 36, 1, 1),
        "lora_unet_conv_in.lora_up.weight": torch.ones(32, 4, 1, 1),
    }
    refused(r"unet.conv_in \(32, 36, 1, 1\) instead of \(32, 4, 3, 3\)", sd1.networks, write(tmp_path, tensors))


def test_half_a_change_is_refused(sd1, tmp_path):
    for kind in ("lora", "loha", "lokr-factored"):
        tensors, _ = make(sd1, kind=kind, only=few)
        for name in tensors:
            if "attn2_to_v" in name and not name.endswith("alpha"):
                rest = {key: value for key, value in tensors.items() if key != name}
                with pytest.raises(ValueError, match=r"lacks factors of its changes of .*attn2_to_v") as error:
                    read_lora(write(tmp_path, rest))
                assert "\n" not in str(error.value)
                break


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_are_numbers(sd1, file, scale):
    with pytest.raises(ValueError, match="is not a number"):
        attach(sd1.networks, read_lora(file[0]), scale)
    with pytest.raises(ValueError, match="is not a number"):
        fuse(sd1.networks, [(read_lora(file[0]), scale)])


def test_any_shapes_are_one_line_or_right(sd1, tmp_path):
    """Factors of random shapes: either they make the weight's shape, or the error is one line."""
    rng = np.random.default_rng(0)
    roles = ["lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "diff", "diff_b"]
    roles += [f"{kind}_{part}" for kind in ("hada", "lokr") for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")]
    roles += ["lokr_w1", "lokr_w2", "lora_magnitude_vector"]
    layers = [
        "unet_conv_in",
        "unet_conv_out",
        "unet_down_blocks_0_attentions_0_proj_in",
        "te_text_model_encoder_layers_0_mlp_fc1",
    ]
    refusals = 0
    for trial in range(150):
        chosen = rng.choice(roles, rng.integers(1, 6), replace=False)
        layer = rng.choice(layers)
        tensors = {
            f"lora_{layer}.{role}": torch.ones(tuple(rng.choice([0, 1, 3, 4, 32], rng.integers(0, 5))))
            for role in chosen
        }
        source = write(tmp_path, tensors, f"{trial}.safetensors")
        try:
            attached = attach(sd1.networks, read_lora(source))
        except ValueError as error:
            assert "\n" not in str(error), chosen
            refusals += 1
        else:
            sd1.ours()
            attached.detach()
    assert refusals > 75

"""Every way in which trainers name and factor their changes gives the outputs of diffusers with peft, or of LyCORIS."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

import loras
from loras import KINDS, make
from oracle import relative_error
from stable_diffusion.lora.files import read_lora

TOLERANCE = 1e-4


def check(model, path, wanted, scale=1.0, unchanged=()):
    """Both ways of applying the file give ``wanted``."""
    with loras.attached(model, path, scale):
        outputs = model.ours()
    with loras.fused(model, (read_lora(path), scale)):
        for result in (outputs, model.ours()):
            for name, value in result.items():
                assert relative_error(value, wanted[name]) <= TOLERANCE, name
    for name, value in model.unchanged.items():
        assert name in unchanged or relative_error(value, wanted[name]) > 100 * TOLERANCE, f"{name} hardly changes"


# Where names are plain, a part of the layers says enough.
READ_BY_DIFFUSERS = {"kohya-original": lambda network, path: not path.startswith("add_embedding")}
CASES = [("sd1", names) for names in ("kohya-sd1", "peft", "processor", "linear-layer")]
CASES += [("xl", names) for names in ("kohya", "kohya-original", "peft")]


@pytest.mark.parametrize("family, names", CASES)
def test_names(request, family, names, write):
    model = request.getfixturevalue(family)
    alpha = loras.ALPHA if names.startswith("kohya") else None
    tensors, _ = make(model, names, alpha=alpha, only=READ_BY_DIFFUSERS.get(names, loras.few))
    path = write(tensors)
    check(model, path, loras.through_diffusers(model, path, 0.7), 0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(sd1, kind, write):
    tensors, deltas = make(sd1, kind=kind)
    with loras.changed(sd1, deltas, -0.6):
        wanted = sd1.theirs()
    check(sd1, write(tensors), wanted, -0.6)


@pytest.mark.parametrize(
    "kind, lengths_of, scale", [("lora", "rows", 1.7), ("lora", "columns", -0.5), ("lokr", "rows", 0.3)]
)
def test_dora_of_kohya_is_linear_in_its_scale(sd1, kind, lengths_of, scale, write):
    """As in ComfyUI (``weight_decompose``) and AUTOMATIC1111's web UI (``finalize_updown``)."""
    tensors, deltas = make(sd1, kind=kind, dora=lengths_of)
    with loras.changed(sd1, deltas, scale):
        wanted = sd1.theirs()
    check(sd1, write(tensors), wanted, scale)


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_dora_of_peft_keeps_its_lengths_at_any_scale(request, family, tmp_path):
    """A text encoder's layers, linear ones and convolutions of the UNet, at scales that peft itself computes."""
    model, saved, layers = request.getfixturevalue(family), {}, []
    generator = torch.Generator().manual_seed(0)
    try:
        for network, module in model.modules.items():
            config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, use_dora=True)
            module.add_adapter(config, "it")
            for name, parameter in module.named_parameters():
                if "lora_magnitude_vector" in name:
                    parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
                elif "lora_" in name:
                    parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            saved[f"{network}_lora_layers"] = get_peft_model_state_dict(module, adapter_name="it")
            saved[f"{network}_lora_adapter_metadata"] = module.peft_config["it"].to_dict()
            layers += [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
        wanted = {}
        for scale in (0.3, 1.7, -0.5):  # 1 is that of the trainings below
            for layer in layers:
                layer.set_scale("it", scale)
            wanted[scale] = model.theirs()
        for layer in layers:
            layer.set_scale("it", 1.0)
        type(model.pipe).save_lora_weights(tmp_path, **saved)
    finally:
        model.pipe.unload_lora_weights()
    for scale, outputs in wanted.items():
        check(model, tmp_path, outputs, scale)


# As diffusers' training scripts do it: peft in the networks, saved by the pipeline with its settings.
TARGETS = ["attn1.to_q", "attn2.to_k", "to_out.0", "resnets.1.conv1", "proj_in", "q_proj", "fc1"]
PATTERNS = {
    "unet": {"alpha_pattern": {"attn1.to_q": 2}, "rank_pattern": {"attn2.to_k": 2}},
    "text_encoder": {"alpha_pattern": {"fc1": 1}},
    "text_encoder_2": {"alpha_pattern": {"layers.0.mlp.fc1": 1}},
}


@pytest.mark.parametrize(
    "family, settings", [("xl", None), ("xl", "patterns"), ("sd1", "use_rslora"), ("sd1", "use_dora")]
)
def test_trained_with_diffusers(request, family, settings, tmp_path):
    model = request.getfixturevalue(family)
    generator = torch.Generator().manual_seed(0)
    saved = {}
    try:
        for network, module in model.modules.items():
            more = PATTERNS[network] if settings == "patterns" else {settings: True} if settings else {}
            config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, **more)
            module.add_adapter(config, "it")
            for name, parameter in module.named_parameters():
                if "lora_magnitude_vector" in name:
                    parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
                elif "lora_" in name:
                    parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            saved[f"{network}_lora_layers"] = get_peft_model_state_dict(module, adapter_name="it")
            saved[f"{network}_lora_adapter_metadata"] = module.peft_config["it"].to_dict()
        wanted = model.theirs()
        type(model.pipe).save_lora_weights(tmp_path, **saved)
    finally:
        model.pipe.unload_lora_weights()
    check(model, tmp_path, wanted)


def test_trained_with_peft_alone(sd1, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv2"], init_lora_weights=False)
    peft = get_peft_model(sd1.pipe.unet, config)
    try:
        wanted = sd1.theirs() | {"text_encoder": sd1.ours()["text_encoder"]}
        peft.save_pretrained(tmp_path)
    finally:
        peft.unload()
    check(sd1, tmp_path, wanted, unchanged=("text_encoder",))

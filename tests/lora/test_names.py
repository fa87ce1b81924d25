"""The names in LoRA files lead to the layers of the published models; where LoRAs may lie."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest

from configs import REAL_TEXT_ENCODERS, REAL_UNETS
from hub_server import safetensors
from original_layout import PUBLISHED
from stable_diffusion.lora.delta import shape_of
from stable_diffusion.lora.files import locate, read_lora
from stable_diffusion.lora.names import layer_names, not_supported, read_key, write_keys
from stable_diffusion.models.layers import GroupNorm
from stable_diffusion.weights.load import build

_LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, GroupNorm)


def layers(network: str, config: dict) -> dict[str, nn.Module]:
    return {path: layer for path, layer in build(network, config).named_modules() if isinstance(layer, _LAYERS)}


UNETS = {"UNET-v1-SD": "sd15", "UNET-v2-SD": "sd21", "UNET-XL-SD": "sdxl-base", "UNET-XL-Refiner": "sdxl-refiner"}


@pytest.mark.parametrize("listed", UNETS)
def test_original_names_of_published_unets(listed):
    """Every weight of the published file is found under the name that kohya's trainer makes of it, one to one."""
    ours = layers("unet", REAL_UNETS[UNETS[listed]])
    names, found = layer_names(ours), {}
    for name, shape in PUBLISHED[listed].items():
        if name.endswith(".weight"):
            key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            network, layer, role = read_key(f"{key}.lora_down.weight")
            assert (network, role) == ("unet", "down")
            path = names[layer]
            assert list(shape_of(ours[path])) == shape[: max(2, ours[path].weight.ndim)], name
            found[path] = key
    assert found.keys() == ours.keys()
    assert write_keys("kohya-xl", "unet", ours) == found


@pytest.mark.parametrize("model", REAL_UNETS)
def test_no_name_is_that_of_two_layers(model):
    ours = layers("unet", REAL_UNETS[model])
    names = layer_names(ours)
    assert all(names[path.replace(".", "_")] == path for path in ours)
    attentions = sum(path.endswith("to_out.0") for path in ours)
    assert len(names) == 2 * len(ours) + 2 * attentions  # theirs and the original's, and to_out without its slot


BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
TEXT = "text_model.encoder.layers.3"
SPELLINGS = {  # beside those of published UNets above, and those that diffusers reads in test_formats.py
    "lora_unet_down_blocks_1_attentions_0_proj_in.alpha": "down_blocks.1.attentions.0.proj_in",
    "lora_unet_down_blocks_1_attentions_0_norm.b_norm": "down_blocks.1.attentions.0.norm",
    "lora_te2_text_model_encoder_layers_3_self_attn_q_proj.dora_scale": f"{TEXT}.self_attn.q_proj",
    "lora_te2_text_projection.lora_down.weight": "text_projection",
    f"unet.{BLOCK}.attn1.to_q.lora_B.default.weight": f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn1.processor.to_q_lora.down.weight": f"{BLOCK}.attn1.to_q",
    f"base_model.model.{BLOCK}.attn1.to_k.lora_A.weight": f"{BLOCK}.attn1.to_k",
    "base_model.model.text_model.encoder.layers.3.self_attn.q_proj.lora_A.weight": f"{TEXT}.self_attn.q_proj",
    "text_encoder_2.encoder.layers.3.mlp.fc2.lora_A.weight": f"{TEXT}.mlp.fc2",
    "diffusion_model.input_blocks.1.0.in_layers.0.diff": "down_blocks.0.resnets.0.norm1",
    "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_A.weight": f"{BLOCK}.attn1.to_q",
    "text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc1.lora_up.weight": f"{TEXT}.mlp.fc1",
    "text_encoders.clip_g.transformer.text_projection.lora_A.weight": "text_projection",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj.diff": f"{TEXT}.self_attn.q_proj",
    "text_encoders.clip_h.transformer.text_model.encoder.layers.3.mlp.fc1.lora_up.weight": f"{TEXT}.mlp.fc1",
    "clip_g.text_model.encoder.layers.3.mlp.fc1.lora_down.weight": f"{TEXT}.mlp.fc1",
    "clip_l.transformer.text_model.encoder.layers.3.mlp.fc1.alpha": f"{TEXT}.mlp.fc1",
    "lora_te1.text_model.encoder.layers.3.mlp.fc1.lora_down.weight": f"{TEXT}.mlp.fc1",
    "lora_te_text_model_encoder_layers_3_mlp_fc1.hada_w1_a": f"{TEXT}.mlp.fc1",
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_up.weight": f"{BLOCK}.attn1.to_q",
    "lycoris_down_blocks_1_attentions_0_proj_in.lokr_w2_a": "down_blocks.1.attentions.0.proj_in",
}


def test_spellings():
    unet = layer_names(layers("unet", REAL_UNETS["sdxl-base"]))
    text = layer_names(layers("text_encoder_2", REAL_TEXT_ENCODERS["sdxl-2"]))
    for name, path in SPELLINGS.items():
        network, layer, _ = read_key(name)
        assert (unet if network == "unet" else text).get(layer) == path, name
        second = any(mark in name for mark in ("te2", "encoder_2", "clip_g"))
        assert network == ("unet" if "block" in path else "text_encoder_2" if second else "text_encoder")


def test_other_names_are_none_of_a_lora():
    for name in ("unet.conv_in.weight", "emb_params", "lora_unet_conv_in.oft_blocks", "a.lora_C.weight"):
        assert read_key(name) is None, name


@pytest.mark.parametrize(
    "names, wanted",
    [
        (["lora_unet_conv_in.a1.weight", "lora_unet_conv_in.b2.weight", "lora_unet_conv_in.alpha"], "a GLoRA,"),
        (["lora_unet_conv_in.oft_blocks", "lora_unet_conv_in.alpha"], "an OFT,"),
        (["base_model.model.down_blocks.0.attentions.0.proj_in.oft_R.default"], "an OFT,"),
        (["lora_unet_mid_block_attentions_0_proj_in.on_input", "lora_unet_mid_block.weight"], "an IA3,"),
        (["base_model.model.conv_in.vera_lambda_b"], "a VeRA,"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "a LoRA for Flux,"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA for Flux,"),
        (["transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight"], "a LoRA for Stable Diffusion 3,"),
        (["diffusion_model.blocks.0.cross_attn.k.lora_A.weight"], "a LoRA for Wan,"),
        (["lora_unet_blocks_0_self_attn_k.lora_down.weight"], "a LoRA for Wan,"),
        (["lora_prior_unet_down_blocks_0.lora_down.weight"], "a LoRA for Stable Cascade,"),
        (["down_blocks.0.motion_modules.0.proj_in.lora_A.weight"], "a LoRA for AnimateDiff,"),
        (["transformer.layers.0.attention.to_q.lora_A.weight"], "a LoRA for a model without UNet,"),
    ],
)
def test_kinds_that_are_not_supported_are_named(names, wanted, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(**{name: mx.ones((2, 2)) for name in names}))
    with pytest.raises(ValueError, match=rf"a\.safetensors is {wanted} which is not supported: give a LoRA") as error:
        read_lora(path)
    assert len(str(error.value).replace(str(tmp_path), "")) < 200


@pytest.mark.parametrize("model", UNETS.values())
def test_no_layer_of_a_unet_is_of_another_kind(model):
    paths = layers("unet", REAL_UNETS[model])
    assert not_supported([*paths, *(f"lora_unet_{path.replace('.', '_')}.lora_down.weight" for path in paths)]) is None


def test_what_no_text_encoder_uses_is_passed_over(tmp_path):
    """ComfyUI writes the changes of all that CLIP has; OneTrainer the words that were trained along."""
    extra = {f"text_encoders.clip_{x}.logit_scale.diff": mx.array(0.0) for x in "lg"}
    projection = "text_encoders.clip_l.transformer.text_projection.lora"
    extra |= {f"{projection}_{x}.weight": mx.ones((4, 4)) for x in ("up", "down")}
    extra |= {"bundle_emb.my word.clip_l": mx.ones((2, 4)), "bundle_emb.my word.clip_g": mx.ones((2, 6))}
    (tmp_path / "a.safetensors").write_bytes(small(**extra, **{"bundle_emb.v.string_to_param.*": mx.ones((1, 4))}))
    lora = read_lora(tmp_path / "a.safetensors")
    assert [delta.name for delta in lora.deltas] == ["unet.conv_in"] and not lora.unknown
    shapes = {word: [v.shape for v in found] for word, found in lora.embeddings.items()}
    assert shapes == {"my word": [(2, 4), (2, 6)], "v": [(1, 4)]}


# --- where it may lie ------------------------------------------------------------------------------------------------


def small(**extra) -> bytes:
    key = "unet.conv_in.lora_{}.weight"
    return safetensors(**{key.format("A"): mx.ones((1, 4, 3, 3)), key.format("B"): mx.ones((8, 1, 1, 1))}, **extra)


def test_files_and_folders(tmp_path):
    file, folder, peft = tmp_path / "style.safetensors", tmp_path / "saved", tmp_path / "peft"
    for path in (file, folder / "pytorch_lora_weights.safetensors", peft / "adapter_model.safetensors"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(small())
    (peft / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "r": 1}))
    assert locate(file) == locate(str(file)) == file
    assert locate(folder) == folder / "pytorch_lora_weights.safetensors"
    assert [read_lora(path).deltas[0].multiplier for path in (folder, peft)] == [1, 3]
    (peft / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not readable as JSON"):
        read_lora(peft)


def test_missing_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("no/such.safetensors", "./no/such", "~/no/such", "such"):
        with pytest.raises(FileNotFoundError, match=r"^there is no LoRA at .*$"):
            locate(name)


@pytest.mark.parametrize(
    "contents, match",
    [
        (safetensors(**{"decoder.conv_in.weight": mx.ones(3)}), "is not a LoRA: it holds decoder.conv_in.weight$"),
        (small(**{"unet.conv_in.alpha": mx.ones(2)}), "has alpha nan for unet.conv_in, which is no"),
        (small()[:-1], "is damaged"),
        (None, "holds no LoRA: it has no pytorch_lora_weights.safetensors"),
    ],
)
def test_what_is_no_lora(contents, match, tmp_path):
    source = tmp_path
    if contents is not None:
        source = tmp_path / "a.safetensors"
        source.write_bytes(contents)
    with pytest.raises(ValueError, match=match) as error:
        read_lora(source)
    assert "\n" not in str(error.value)


CLIENT = """
import sys
from stable_diffusion.lora.files import read_lora
for source in sys.argv[1:]:
    try:
        lora = read_lora(source)
        print(lora.path.name, lora.deltas[0].multiplier)
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_the_hub(hub, tmp_path):
    hub.add("me/saved", {"pytorch_lora_weights.safetensors": small()})
    hub.add("me/many", {"a.safetensors": small(), "sub/b.safetensors": small(), "c.safetensors": small()})
    settings = json.dumps({"lora_alpha": 3}).encode()
    hub.add("me/peft", {"adapter_model.safetensors": small(), "adapter_config.json": settings})
    sources = ["me/saved", "me/many:sub/b.safetensors", "me/peft"]
    wanted = ["pytorch_lora_weights.safetensors 1.0", "b.safetensors 1.0", "adapter_model.safetensors 3.0"]
    *found, many, none = hub.run(CLIENT, *sources, "me/many", "me/none", home=tmp_path)[0].splitlines()
    assert found == wanted
    assert "me/many is not a LoRA: it has no pytorch_lora_weights.safetensors" in many and "me/none" in none
    assert "c.safetensors" not in hub.fetched()
    hub.requests.clear()
    assert hub.run(CLIENT, *sources, home=tmp_path)[0].splitlines() == wanted
    assert hub.requests == []

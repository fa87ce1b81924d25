"""Configs of all networks: what is not computed is refused by name."""

import math
import re
from dataclasses import fields

import pytest
import transformers

from configs import UNETS
from models.test_adapter import ADAPTERS
from models.test_clip import CONFIGS as TEXT_ENCODERS
from models.test_controlnet import CONTROLNETS
from models.test_dpt import TINY as DEPTH
from models.test_taesd import SMALL as TAESD
from models.test_vae import SD as VAE
from stable_diffusion.models.bit import BitConfig
from stable_diffusion.models.config import AutoencoderConfig, CLIPTextConfig, UNetConfig
from stable_diffusion.models.controlnet import ControlNetConfig, T2IAdapterConfig
from stable_diffusion.models.dpt import DPTConfig
from stable_diffusion.models.taesd import AutoencoderTinyConfig
from stable_diffusion.weights.load import build

COMPLETE = {
    UNetConfig: UNETS["sd1"],
    AutoencoderConfig: VAE,
    CLIPTextConfig: TEXT_ENCODERS["sd1"],
    ControlNetConfig: CONTROLNETS["sd1"],
    T2IAdapterConfig: ADAPTERS["full"],
    AutoencoderTinyConfig: TAESD,
    DPTConfig: DEPTH,
    BitConfig: DEPTH["backbone_config"],
}
# Keys that nothing but the table of a config refuses, since they are fields, or unknown ones are ignored.
UNET = "down_block_types mid_block_type addition_embed_type"
DPT = "is_hybrid patch_size num_channels hidden_act readout_type neck_ignore_stages head_in_index add_projection"
BIT = "model_type layer_type global_padding embedding_dynamic_padding hidden_act num_channels output_stride"
TABLES = {
    UNetConfig: f"{UNET} up_block_types",
    ControlNetConfig: f"{UNET} controlnet_conditioning_channel_order _class_name",
    CLIPTextConfig: "hidden_act architectures",
    T2IAdapterConfig: "adapter_type",
    DPTConfig: f"{DPT} use_batch_norm_in_fusion_residual use_bias_in_fusion_residual",
    BitConfig: f"{BIT} width_factor out_features",
}


@pytest.mark.parametrize("config", COMPLETE)
def test_values_that_are_not_computed_are_refused_by_name(config):
    unknown = [] if config.ignored is None else ["some_new_key"]
    for key in [*config.supported, *TABLES.get(config, "").split(), *unknown]:
        with pytest.raises(ValueError, match=f"^{config.kind} config: .*{key}='other'"):
            config.from_dict(COMPLETE[config] | {key: "other"})


@pytest.mark.parametrize("config", COMPLETE)
def test_keys_without_effect_are_let_through(config):
    """Unknown ones that are off, fields that are null, and what says how the weights were trained or written."""
    raw = COMPLETE[config]
    changes = {"_diffusers_version": "0.20.0", "some_new_key": False, "some_other_key": None}
    changes |= {f.name: None for f in fields(config) if f.name not in raw and f.name != "mid_block_type"}
    changes |= {key: 0.5 for key in ("dropout", "decay") if config.ignored is None or key in config.ignored}
    assert config.from_dict(raw | changes) == config.from_dict(raw)


def test_what_transformers_writes_into_any_config_is_let_through():
    """The installed version, and keys of versions since 2022 that it no longer writes."""
    old = {"torch_dtype": "float16", "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "max_length": 20}
    old |= {"chunk_size_feed_forward": 0, "pruned_heads": {}, "is_decoder": False, "logit_scale_init_value": 2.6592}
    written = transformers.CLIPTextConfig(**TEXT_ENCODERS["sd1"]).to_dict()
    assert len(written) > 25
    assert CLIPTextConfig.from_dict(written | old) == CLIPTextConfig.from_dict(TEXT_ENCODERS["sd1"])


CHANGES = [
    ("controlnet", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"] * 2}, "down_block_types='AttnDownBlock2D'"),
    ("controlnet", {"down_block_types": ["DownBlock2D"] * 2}, "2 entries for 3 blocks"),
    ("controlnet", {"cross_attention_dim": None}, "missing cross_attention_dim"),
    ("controlnet", {"mid_block_type": None}, "mid_block_type=None"),
    ("controlnet", {"num_control_type": 65}, "num_control_type=65 must be a whole number from 1 to 64"),
    ("unet", {"transformer_layers_per_block": [1, [2, 2], 1]}, "needs reverse_transformer_layers_per_block"),
    ("unet", {"attention_head_dim": 5}, "attention width 32 does not divide into 5 heads"),
    ("text_encoder", {"num_attention_heads": 5}, "text encoder width 64 does not divide into 5 heads"),
    ("text_encoder", {"hidden_size": "wide"}, "hidden_size='wide' must be a whole number from 1 to 131,072"),
    *(
        ("text_encoder", {"num_hidden_layers": n}, f"={n} must be a whole number from 1 to 64")
        for n in (10**30, 0, 1.5)
    ),
    ("text_encoder", {"layer_norm_eps": math.nan}, "layer_norm_eps=nan must be a finite number"),
    ("text_encoder", {"architectures": 7}, "architectures=7"),
    ("text_encoder", {"use_attention_mask": True}, "use_attention_mask=True (unknown)"),
    ("text_encoder", {"text_config": {"hidden_act": "gelu"}}, "text_config={'hidden_act': 'gelu'} (unknown)"),
    ("text_encoder", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} (unknown)"),
    ("text_encoder", {"is_decoder": True, "add_cross_attention": True}, "is_decoder=True (unknown), add_cross_"),
    ("unet", {"layers_per_block": 10**30}, "must be a list of at most 16, each a whole number from 1 to 8"),
    ("unet", {"transformer_layers_per_block": [1, 10**9, 1]}, "each a whole number from 0 to 32"),
    ("unet", {"block_out_channels": [32] * 17}, "must be a list of at most 16"),
    ("unet", {"block_out_channels": 32}, "block_out_channels=32 must be a list"),
    ("unet", {"block_out_channels": [2**63, 2**63, 32]}, "each a whole number from 1 to 131,072"),
    ("unet", {"norm_num_groups": 5}, "width 32 does not divide into norm_num_groups=5"),
    ("unet", {"norm_num_groups": []}, "norm_num_groups=() must be a whole number"),
    ("unet", {"use_linear_projection": "yes"}, "use_linear_projection='yes' must be true or false"),
    ("unet", {"sample_size": {"height": 64}}, "sample_size={'height': 64} must be a whole number"),
    ("vae", VAE | {"scaling_factor": [0.1]}, "scaling_factor=(0.1,) must be a finite number"),
    ("vae", TAESD | {"num_encoder_blocks": [10**30]}, "each a whole number from 1 to 64"),
    ("controlnet", {"layers_per_block": 9}, "each a whole number from 1 to 8"),
    ("backbone", {"depths": [10**30, 1, 1]}, "each a whole number from 1 to 64"),
    ("vae", TAESD | {"encoder_block_out_channels": [8, 16, 8]}, "(8, 16, 8) must be one width"),
    ("vae", TAESD | {"num_decoder_blocks": [2, 1]}, "one width for each of (2, 1)"),
    ("vae", TAESD | {"num_encoder_blocks": [1, 1], "encoder_block_out_channels": [8, 8]}, "differ in their number"),
    ("depth_estimator", {"is_hybrid": None}, "is_hybrid=None"),
    ("depth_estimator", {"reassemble_factors": [4, 2, 1, 1]}, "reassemble_factors end in (1, 1)"),
    ("depth_estimator", {"image_size": 80}, "image_size=80 (supported: multiples of 32"),
    ("depth_estimator", {"image_size": [64, 64]}, "image_size=(64, 64) must be a whole number"),
    ("depth_estimator", {"num_attention_heads": 5}, "width 32 does not divide into 5 heads"),
    ("depth_estimator", {"backbone_out_indices": [0, 1, 2, 4]}, "of 4 layers, backbone_out_indices end in (2, 4)"),
    ("depth_estimator", {"neck_hidden_sizes": [16, 64, 24, 40]}, "the first are (32, 64)"),
    ("backbone", {"depths": (2, 2)}, "depths=(2, 2)"),
    ("backbone", {"hidden_sizes": (32, 64, 72)}, "hidden_sizes=(32, 64, 72)"),
    *(("backbone", {key: None}, f"{key}=None") for key in ("global_padding", "embedding_dynamic_padding")),
]


@pytest.mark.parametrize("part, change, message", CHANGES)
def test_what_does_not_fit_together_is_refused_in_one_line(part, change, message):
    bases = {"controlnet": CONTROLNETS["sd1"], "unet": UNETS["sd1"], "text_encoder": TEXT_ENCODERS["sd1"], "vae": {}}
    if part == "backbone":
        part, change = "depth_estimator", {"backbone_config": DEPTH["backbone_config"] | change}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        build(part, bases.get(part, DEPTH) | change)
    assert "\n" not in str(error.value)

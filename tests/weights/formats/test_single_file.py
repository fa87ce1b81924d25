"""Single files in the original layout: read back bit for bit, and what is missing, left over or of another kind."""

from dataclasses import replace
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from transformers import CLIPConfig, CLIPModel

from checkpoints import SCALED, make
from configs import REAL_UNETS, REAL_VAE
from oracle import perturb, relative_error
from original_layout import diffusers_names, write_open_clip, write_original
from stable_diffusion import StableDiffusion
from stable_diffusion.diffusion.schedule_config import ScheduleConfig
from stable_diffusion.models.config import CLIPTextConfig as TextConfig
from stable_diffusion.weights import catalog
from stable_diffusion.weights.files import Component, open_checkpoint, open_part, read_tensors
from stable_diffusion.weights.load import load_component

# The published models, but narrow. What no shape tells stays: groups of 32, 8 heads or heads of 64 channels.
_SD1 = REAL_UNETS["sd15"] | {"block_out_channels": [32, 64, 96, 96], "cross_attention_dim": 64}
_SD2 = REAL_UNETS["sd21"] | {"block_out_channels": [64, 64, 128, 128], "cross_attention_dim": 64}
_SD2 |= {"attention_head_dim": [1, 1, 2, 2], "sample_size": 64}
_XL = REAL_UNETS["sdxl-base"] | {"block_out_channels": [64, 64, 128], "cross_attention_dim": 128}
_XL |= {"attention_head_dim": [1, 1, 2], "transformer_layers_per_block": [1, 1, 2]}
_XL |= {"projection_class_embeddings_input_dim": 6 * 256 + 64}
_REFINER = REAL_UNETS["sdxl-refiner"] | {"block_out_channels": [64] * 4, "cross_attention_dim": 64}
_REFINER |= {"attention_head_dim": [1] * 4, "transformer_layers_per_block": 1}
_REFINER |= {"projection_class_embeddings_input_dim": 5 * 256 + 64}
_VAE = REAL_VAE | {"block_out_channels": [32, 32, 64, 64]}
FAMILIES = {  # the UNet's config, the list with its names, and the pipeline
    "sd1": (_SD1, "v1-SD", "StableDiffusionPipeline"),
    "sd2": (_SD2, "v2-SD", "StableDiffusionPipeline"),
    "depth": (_SD2 | {"in_channels": 5}, "v2-Depth", "StableDiffusionDepth2ImgPipeline"),
    "xl": (_XL, "XL-SD", "StableDiffusionXLPipeline"),
    "refiner": (_REFINER, "XL-Refiner", "StableDiffusionXLImg2ImgPipeline"),
}
SCHEDULER = SCALED | {"steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True}
UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
CLIPS_OF_XL = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")


def _with(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: np.ascontiguousarray(value) for name, value in tensors.items()}


def make_both(folder: Path, family: str) -> tuple[Path, dict[str, np.ndarray]]:
    config, names, _ = FAMILIES[family]
    is_open_clip = family in ("sd2", "depth")  # of which the last layer is not used
    encoders = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 23 if is_open_clip else 2}
    encoders |= {"hidden_act": "gelu"} if is_open_clip else {}
    base = "sd2" if family == "depth" else family
    make(folder, base, diffusers.PNDMScheduler(**SCHEDULER), unet=config, vae=_VAE, encoders=encoders)
    parts = open_checkpoint(folder).components.items()
    tensors = {name: {key: np.array(v) for key, v in read_tensors(part).items()} for name, part in parts}
    original = _with(UNET, write_original("unet", f"UNET-{names}", tensors["unet"]))
    original |= _with(VAE, write_original("vae", "VAE-v1-SD", tensors["vae"]))
    if is_open_clip:
        return folder, original | _with(f"{CLIP}model.", write_open_clip(tensors["text_encoder"], unused=1))
    if "text_encoder" in tensors:
        place = CLIPS_OF_XL[0] if family == "xl" else f"{CLIP}transformer."
        original |= _with(place, tensors["text_encoder"])
        original[f"{place}text_model.embeddings.position_ids"] = np.arange(77)[None]
    if "text_encoder_2" in tensors:
        place = CLIPS_OF_XL[1] if family == "xl" else "conditioner.embedders.0.model."
        original |= _with(place, write_open_clip(tensors["text_encoder_2"]))
    return folder, original


def saved(path: Path, tensors: dict[str, np.ndarray], metadata: dict | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def opened(path: Path, **options):
    """The checkpoint in a file; its tokenizers are not read."""
    return open_checkpoint(path, **{"tokenizer": path.parent} | options)


def weights(component: Component) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(load_component(component).parameters())}


def assert_same(ours: Component, theirs: Component) -> None:
    first, second = weights(ours), weights(theirs)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in second)


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "stable_diffusion"]


def refused(path: Path, **options) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        for component in opened(path, **options).components.values():
            load_component(component)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2", "xl", "refiner"])
def test_read_back_bit_for_bit(made, single, family):
    """With what no shape tells: heads, activations, epsilons and scales are those of the published configs."""
    ours, theirs = opened(single(family)), open_checkpoint(made(family)[0])
    assert ours.pipeline == theirs.pipeline == FAMILIES[family][2]
    assert ours.components.keys() == theirs.components.keys()
    assert ours.tokenizers.keys() == theirs.tokenizers.keys() == ours.pad_tokens.keys()
    for name, component in ours.components.items():
        assert_same(component, theirs.components[name])
        if name in ("unet", "vae"):
            assert load_component(component).config == load_component(theirs.components[name]).config
        else:
            assert TextConfig.from_dict(component.config) == TextConfig.from_dict(theirs.components[name].config)


_PROJECTION = np.ones((64, 64), np.float32)
OF_CLIP = ["{}logit_scale", "{}transformer.logit_scale", "{}transformer.text_model.embeddings.position_ids"]
OF_CLIP += ["{}visual.proj", "{}transformer.vision_model.post_layernorm.bias", "{}text_projection", "{}attn_mask"]
OF_CLIP += ["{}transformer.text_projection.weight"]  # of CLIP-L, as ComfyUI writes it
OF_TRAINING = ["model_ema.decay", "model_ema.diffusion_modelout2bias", "denoiser.sigmas", "betas", "global_step"]
OF_TRAINING += ["alphas_cumprod", "optimizer.state.0.exp_avg", "lr_schedulers.0.base_lrs", "model.betas", "logvar"]


@pytest.mark.parametrize(
    "family, encoders",
    [
        ("sd1", [CLIP]),
        ("sd2", [f"{CLIP}model.", CLIP]),
        ("xl", ["conditioner.embedders.0.", "conditioner.embedders.1.model.", "conditioner.embedders.1."]),
        ("refiner", ["conditioner.embedders.0.model.", "conditioner.embedders.0."]),
    ],
)
def test_what_no_network_reads_is_left_out(made, single, family, encoders):
    """Names of CLIP beside its text encoder, and of a training, as other programs save and merge them."""
    names = [n.format(p) for p in encoders for n in OF_CLIP[: -1 if p.endswith(".model.") else None]]
    junk = {name: _PROJECTION for name in [*names, *OF_TRAINING] if name not in made(family)[1]}
    ours = opened(single(family, junk)).components
    for name, component in open_checkpoint(made(family)[0]).components.items():
        assert_same(ours[name], component)


def test_a_text_encoder_without_a_projection_in_a_folder(made, tmp_path):
    tensors = read_tensors(open_part(made("sd1")[0], "text_encoder"))
    more = dict.fromkeys(("text_projection.weight", "logit_scale", "vision_model.post_layernorm.bias"), _PROJECTION)
    path = saved(tmp_path / "model.safetensors", {name: np.array(v) for name, v in tensors.items()} | more)
    assert (
        read_tensors(Component("text_encoder", {"architectures": ["CLIPTextModel"]}, (path,))).keys() == tensors.keys()
    )


@pytest.mark.parametrize("family", ["sd1", "sd2", "xl"])
def test_latents_are_those_of_the_folder(made, single, family):
    """The whole way, with the scheduler that the family is known to have; pad tokens are the tokenizers' own."""
    folder, _ = made(family)
    ours = StableDiffusion(single(family), tokenizer=folder / "tokenizer", prediction="epsilon")
    theirs = StableDiffusion(folder)
    runs = [
        list(sd.generate_latents("the red cat!", num_steps=2, latent_size=(8, 8), seed=1, sampler="ddim"))
        for sd in (ours, theirs)
    ]
    for a, b in zip(*runs, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    "family, scheduler, size, defaults, pads",
    [
        ("sd1", "PNDMScheduler", 64, (50, 7.5), {"tokenizer": "<|endoftext|>"}),
        ("sd2", "DDIMScheduler", 64, (50, 7.5), {"tokenizer": "!"}),
        ("xl", "EulerDiscreteScheduler", 128, (50, 5.0), {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}),
        ("refiner", "EulerDiscreteScheduler", 128, (50, 5.0), {"tokenizer_2": "!"}),
    ],
)
def test_sizes_and_schedules_of_the_families(single, family, scheduler, size, defaults, pads):
    checkpoint = opened(single(family), prediction="epsilon")
    assert checkpoint.scheduler["_class_name"] == scheduler
    assert checkpoint.scheduler["beta_start"] == 0.00085 and checkpoint.scheduler["steps_offset"] == 1
    assert checkpoint.components["unet"].config["sample_size"] == size
    assert (checkpoint.steps, checkpoint.guidance) == defaults and checkpoint.pad_tokens == pads
    assert bool(checkpoint.index.get("force_zeros_for_empty_prompt")) == (family == "xl")
    assert bool(checkpoint.index.get("requires_aesthetics_score")) == (family == "refiner")


def test_ckpt(made, tmp_path):
    folder, original = made("sd1")
    tensors = {name: torch.from_numpy(value) for name, value in original.items()}
    torch.save({"epoch": 3, "global_step": 470000, "state_dict": tensors}, tmp_path / "model.ckpt")
    ours = opened(tmp_path / "model.ckpt").components
    for name, component in open_checkpoint(folder).components.items():
        assert_same(ours[name], component)


def test_lcm(single):
    checkpoint = opened(single("sd1", {f"{UNET}time_embed.cond_proj.weight": np.ones((32, 256), np.float32)}))
    assert checkpoint.pipeline == "LatentConsistencyModelPipeline"
    assert checkpoint.scheduler["_class_name"] == "LCMScheduler"
    assert (checkpoint.steps, checkpoint.guidance) == (4, 8.5)
    unet = load_component(checkpoint.components["unet"])
    assert unet.config.time_cond_proj_dim == 256
    assert np.array_equal(unet.time_embedding.cond_proj.weight, np.ones((32, 256)))


@pytest.mark.parametrize(
    "name, scheduler, spacing, prediction, rest",
    [
        ("sdxl_lightning_4step_unet", "EulerDiscreteScheduler", "trailing", "epsilon", {"spacing": "trailing"}),
        ("sdxl_lightning_1step_unet_x0", "EulerDiscreteScheduler", "trailing", "sample", {"spacing": "trailing"}),
        ("dmd2_sdxl_1step_unet", "LCMScheduler", "leading", "epsilon", {"timesteps": (399,)}),
    ],
)
@pytest.mark.parametrize("source", ["checkpoint", "unet", "folder"])
def test_models_for_few_steps(made, tmp_path, caplog, name, scheduler, spacing, prediction, rest, source):
    """As a whole checkpoint, or as the UNet of another one: a file, or a folder."""
    folder, tensors = made("xl")
    own = saved(tmp_path / f"{name}.safetensors", tensors)
    if source == "checkpoint":
        checkpoint = opened(own)
    else:
        base = saved(tmp_path / "base.safetensors", tensors) if source == "unet" else folder
        checkpoint = opened(base, parts={"unet": own})
    expected = SCHEDULER if source == "folder" else {"timestep_spacing": spacing}
    expected = expected | {"_class_name": scheduler, "prediction_type": prediction, "beta_start": 0.00085}
    expected |= {"timestep_spacing": "trailing"} if spacing == "trailing" else {}
    assert checkpoint.scheduler.items() >= expected.items()
    steps = 4 if "4step" in name else 1
    assert (checkpoint.steps, checkpoint.guidance, checkpoint.few_steps) == (steps, 0.0, rest)
    assert said(caplog) == [f"{own} was distilled for few steps: its defaults are " + _listed(own)]


def _listed(path: Path) -> str:
    return ", ".join(f"{key} {value}" for key, value in catalog.few_step_settings(str(path), {}).items())


# --- prediction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "more", "metadata", "argument", "expected"),
    [
        ("sd1", (), {}, None, "epsilon"),
        ("sd1", (), {"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ("sd1", (), {"modelspec.prediction_type": "v"}, "epsilon", "epsilon"),
        ("xl", ("v_pred", "ztsnr"), {}, None, "v_prediction"),
        ("xl", ("v_pred",), {"modelspec.prediction_type": "epsilon"}, None, "v_prediction"),
        ("xl", (), {"modelspec.predict_key": "v"}, None, "v_prediction"),
        ("xl", (), {"ss_v_parameterization": "True"}, None, "v_prediction"),
        ("xl", (), {"ss_v_parameterization": "False", "modelspec.predict_key": "epsilon"}, None, "epsilon"),
        ("sd2", (), {"modelspec.predict_key": "epsilon"}, None, "epsilon"),
        ("sd2", (), {"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, "v_prediction"),
        ("sd2", (), {"modelspec.architecture": "stable-diffusion-v2-512"}, None, "epsilon"),
        ("sd2", (), {"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
        ("depth", (), {}, None, "epsilon"),
    ],
)
def test_prediction_as_stated(single, caplog, family, more, metadata, argument, expected):
    path = single(family, dict.fromkeys(more, np.zeros(0, dtype=np.float32)), metadata)
    checkpoint = opened(path, prediction=argument)
    assert checkpoint.scheduler["prediction_type"] == expected
    assert checkpoint.scheduler.get("rescale_betas_zero_snr", False) == ("ztsnr" in more)
    assert checkpoint.scheduler["timestep_spacing"] == ("trailing" if "ztsnr" in more else "leading")
    large = family == "sd2" and expected == "v_prediction"
    assert checkpoint.components["unet"].config["sample_size"] == (96 if large else 128 if family == "xl" else 64)
    assert said(caplog) == []


@pytest.mark.parametrize("more, metadata", [(("v_pred", "ztsnr"), {}), ((), {"ss_v_parameterization": "true"})])
def test_a_unet_brings_its_prediction_along(made, single, more, metadata):
    unet = single("xl", dict.fromkeys(more, np.zeros(0, dtype=np.float32)), metadata)
    scheduler = open_checkpoint(made("xl")[0], parts={"unet": unet}).scheduler
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler.get("rescale_betas_zero_snr", False) == bool(more)
    chosen = open_checkpoint(made("xl")[0], parts={"unet": unet}, prediction="epsilon").scheduler
    assert chosen["prediction_type"] == "epsilon"


@pytest.mark.parametrize(("spread", "expected"), [(0.057, "epsilon"), (0.534, "v_prediction")])
def test_sd2_without_a_hint_is_told_by_its_weights(single, caplog, spread, expected):
    name = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    path = single("sd2", {name: np.resize(np.float32([spread, -spread]), 64)})
    assert opened(path).scheduler["prediction_type"] == expected
    (line,) = said(caplog)
    assert expected in line and "(override: prediction)" in line and str(path) in line


def test_prediction_of_a_folder_and_unknown_prediction(made):
    folder, _ = made("sd1")
    assert open_checkpoint(folder, prediction="v_prediction").scheduler["prediction_type"] == "v_prediction"
    assert "prediction 'v' is unknown; choose one of epsilon, v_prediction, sample" in refused(folder, prediction="v")


@pytest.mark.parametrize(
    "stated, size", [("768x512", [64, 96]), ("0x0", 64), ("99999x99999", 64), ("１２８x１２８", 64)]
)
def test_resolution_in_the_metadata(single, stated, size):
    path = single("sd1", None, {"modelspec.resolution": stated})
    assert opened(path).components["unet"].config["sample_size"] == size


# --- tokenizers --------------------------------------------------------------------------------------------------


def test_tokenizer_of_a_folder_is_replaced(made, tmp_path):
    tokenizers = open_checkpoint(made("xl")[0], tokenizer=tmp_path).tokenizers
    assert tokenizers == dict.fromkeys(("tokenizer", "tokenizer_2"), tmp_path)


# --- parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, part, prefix, message",
    [
        ("sd1", "vae", VAE, "lacks a VAE: add it with parts, for example from stable-diffusion-v1-5/"),
        ("xl", "text_encoder_2", "conditioner.embedders.1.", "lacks a second text encoder: add it with parts"),
        ("sd1", "unet", UNET, "holds only vae, text_encoder, no UNet: give a whole checkpoint"),
    ],
)
def test_missing_part_is_named_and_can_be_given(made, tmp_path, family, part, prefix, message):
    folder, original = made(family)
    path = saved(tmp_path / "m.safetensors", {n: v for n, v in original.items() if not n.startswith(prefix)})
    assert message in refused(path)
    ours, expected = opened(path, parts={part: folder}).components, open_checkpoint(folder).components
    assert ours.keys() == expected.keys()
    assert_same(ours[part], expected[part])


def test_several_missing_parts_are_named_at_once(made, tmp_path):
    path = saved(tmp_path / "m.safetensors", {n: v for n, v in made("xl")[1].items() if n.startswith(UNET)})
    assert "lacks a VAE and a text encoder and a second text encoder: add" in refused(path)


@pytest.mark.parametrize("naming", ["whole file", "original", "diffusers"])
@pytest.mark.parametrize(
    "part, prefix",
    [("unet", UNET), ("vae", VAE), ("text_encoder", CLIPS_OF_XL[0]), ("text_encoder_2", CLIPS_OF_XL[1])],
)
def test_part_from_a_file(made, tmp_path, naming, part, prefix):
    folder, tensors = made("xl")
    if naming == "original":
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    elif naming == "diffusers":
        tensors = {name: np.array(value) for name, value in read_tensors(open_part(folder, part)).items()}
    component = open_part(saved(tmp_path / "part.safetensors", tensors), part)
    assert component.name == part
    assert_same(component, open_part(folder, part))


@pytest.mark.parametrize("name", ["control_v11e_sd15_shuffle", "control_v11p_sd15_canny"])
def test_controlnet_in_the_original_layout(tmp_path, name):
    """Against diffusers' converter; only "shuffle" pools what it computes."""
    keys = ("block_out_channels", "down_block_types", "layers_per_block", "attention_head_dim", "cross_attention_dim")
    torch.manual_seed(0)
    model = perturb(diffusers.ControlNetModel(**{key: _SD1[key] for key in keys}))
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    assert diffusers_names("controlnet", "ControlNet-v1-SD").keys() == theirs.keys()
    file = _with("control_model.", write_original("controlnet", "ControlNet-v1-SD", theirs))
    component = open_part(saved(tmp_path / f"{name}.safetensors", file), "controlnet")
    assert component.config.get("global_pool_conditions", False) == ("shuffle" in name)
    ours = read_tensors(component)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in theirs)
    load_component(component)


def test_text_encoder_of_a_whole_clip(tmp_path):
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    text |= {"vocab_size": 300, "projection_dim": 64, "eos_token_id": 299}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    whole = perturb(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)))
    whole.save_pretrained(tmp_path)
    encoder = load_component(open_part(tmp_path, "text_encoder"))
    ids = [[298, 5, 7, 299]]
    expected = whole.text_model(torch.tensor(ids)).last_hidden_state
    assert relative_error(encoder(mx.array(ids)).last_hidden_state, expected) < 1e-4


def test_tiny_autoencoder_by_itself(tmp_path):
    theirs = perturb(diffusers.AutoencoderTiny())
    names = {name: value.numpy() for name, value in theirs.state_dict().items()}
    component = open_part(saved(tmp_path / "taesd.safetensors", names), "vae")
    assert component.config["_class_name"] == "AutoencoderTiny"
    assert weights(component).keys() == names.keys()


@pytest.mark.parametrize("own", ["folder", "file"])
def test_part_replaces_the_checkpoints_own(made, single, own):
    folder, (other, _) = made("sd1")[0], made("xl")
    source = other if own == "folder" else single("xl")
    checkpoint = open_checkpoint(folder, parts={"vae": source})
    assert_same(checkpoint.components["vae"], open_part(other, "vae"))
    assert_same(checkpoint.components["unet"], open_part(folder, "unet"))
    # A file does not say its scale: that of the family it is used in is taken.
    assert checkpoint.components["vae"].config["scaling_factor"] == (0.13025 if own == "folder" else 0.18215)
    assert open_checkpoint(other, parts={"vae": source}).components["vae"].config["scaling_factor"] == 0.13025


def test_unknown_part(made):
    message = refused(made("sd1")[0], parts={"lora": "x"})
    assert "'lora' is not a part of a checkpoint; choose one of unet, vae" in message


MEAN, STD = [-1.6, 1.1, 3.3, -2.6], [8.4, 5.9, 4.9, 5.2]
OF_EDM = {
    "Playground 2.5": {"edm_mean": np.float32(MEAN).reshape(1, 4, 1, 1), "edm_std": np.float32(STD)},
    "CosXL": {f"edm_vpred.sigma_{end}": np.array(s, np.float32) for end, s in (("max", 100), ("min", 0.004))},
}


@pytest.mark.parametrize("name", OF_EDM)
def test_models_of_edm(single, name):
    """Known by tensors beside their networks, also where only the UNet or the VAE is taken of them."""
    path, is_playground = single("xl", OF_EDM[name]), name != "CosXL"
    ours, unet, vae = opened(path), open_part(path, "unet"), open_part(path, "vae")
    theirs = diffusers.EDMDPMSolverMultistepScheduler()
    if not is_playground:
        cosxl = {"sigma_max": 100.0, "sigma_min": 0.004, "sigma_data": 1.0, "sigma_schedule": "exponential"}
        theirs = diffusers.EDMEulerScheduler(**cosxl, prediction_type="v_prediction")
    full = ScheduleConfig.from_dict(dict(theirs.config) | {"_class_name": type(theirs).__name__})
    for scheduler in (ours.scheduler, unet.scheduler):
        config = ScheduleConfig.from_dict(scheduler)
        of_sampler = {key: getattr(full, key) for key in ("algorithm_type", "solver_order", "solver_type")}
        assert replace(config, **of_sampler, sigma_min=pytest.approx(full.sigma_min)) == full
    assert ours.index["scheduler"][1] == ours.scheduler["_class_name"] == type(theirs).__name__
    for component in (ours.components["vae"], vae):
        config = load_component(component).config
        assert config.latents_mean == (pytest.approx(MEAN) if is_playground else None)
        assert config.latents_std == (pytest.approx(STD) if is_playground else None)
    assert ours.components["vae"].config["scaling_factor"] == (0.5 if is_playground else 0.13025)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"], "is a LoRA, not a model"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "is Stable Diffusion 3, which is not"),
        (["double_blocks.0.img_attn.qkv.weight"], "is Flux, which is not supported"),
        (["clip_l", "clip_g"], "is an embedding"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "is an IP-Adapter"),
        (["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"], "is an AnimateDiff model"),
        (["model.diffusion_model.clip_txt_mapper.weight"], "is Stable Cascade"),
        (["double_layers.0.attn.w1q.weight"], "is AuraFlow"),
        (["model.diffusion_model.t_block.1.weight"], "is PixArt"),
        (["model.diffusion_model.head.modulation"], "is Wan"),
        ([f"{UNET}time_embed.0.weight.absmax"], "is quantized by bitsandbytes"),
        (["transformer.h.0.attn.weight"], "is not a Stable Diffusion model: it holds transformer.h.0.attn.weight"),
        ([f"{UNET}input_blocks.0.0.weight", "noise_augmentor.x"], "is a Stable unCLIP"),
        ([f"{UNET}input_blocks.0.0.weight", "low_scale_model.x"], "is an upscaler"),
    ],
)
def test_file_of_another_kind(tmp_path, names, message):
    tensors = dict.fromkeys(names, np.zeros((2, 2), np.float32))
    assert message in refused(saved(tmp_path / "model.safetensors", tensors))


def test_part_that_a_file_does_not_have(made, tmp_path):
    _, original = made("sd1")
    alone = {n.removeprefix(VAE): v for n, v in original.items() if n.startswith(VAE)}
    for tensors in (original, alone):
        path = saved(tmp_path / "m.safetensors", tensors)
        with pytest.raises(ValueError, match=r"m\.safetensors holds no controlnet, but .*vae.*: give another file$"):
            open_part(path, "controlnet")


@pytest.mark.parametrize(
    "family, name, shape, message",
    [
        ("sd1", "something.else", (1,), "holds 1 tensors that this library does not know: something.else"),
        ("sd1", f"{UNET}input_blocks.1.0.more.weight", (1,), "unexpected: down_blocks.0.resnets.0.more.weight"),
        ("sd1", f"{UNET}input_blocks.0.0.weight", (32, 7, 3, 3), "7 input channels; supported: 4, 5, 8"),
        ("sd1", f"{UNET}conv_in.bias", (32,), "is stored twice, under its original name and its diffusers name"),
        ("sd1", f"{VAE}decoder.conv_norm_out.bias", (32,), "is stored twice, under its original name and its"),
        ("sd2", f"{CLIP}model.transformer.resblocks.0.attn.in_proj_bias", (64,), "its text_encoder cannot be read"),
        # Shapes and numbers that make no sense.
        ("sd1", f"{UNET}input_blocks.0.0.weight", (), ""),
        ("sd1", f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (32,), ""),
        ("sd1", f"{UNET}input_blocks.999999999999.0.in_layers.0.weight", (32,), ""),
        ("sd1", f"{VAE}decoder.up.999999999999.block.0.norm1.weight", (32,), ""),
        ("sd1", f"{CLIP}transformer.text_model.encoder.layers.999999999999.mlp.fc1.bias", (32,), ""),
        ("sd1", f"{UNET}input_blocks..1.norm.weight", (32,), ""),
    ],
)
def test_tensor_that_does_not_belong(single, family, name, shape, message):
    path = single(family, {name: np.zeros(shape, np.float32)})
    text = refused(path)
    assert message in text and str(path) in text


@pytest.mark.parametrize("part, prefix", [("unet", UNET), ("vae", VAE), ("text_encoder", CLIP)])
def test_every_tensor_is_needed(made, tmp_path, part, prefix):
    own = {n: v for n, v in made("sd1")[1].items() if n.startswith(prefix) and "position_ids" not in n}
    first = {"unet": "input_blocks.0.0.weight", "vae": "decoder.mid.block_1.conv1.weight"}  # by which they are known
    for name in [*list(own)[:: len(own) // 5], *([prefix + first[part]] if part in first else [])]:
        path = saved(tmp_path / "m.safetensors", {n: v for n, v in own.items() if n != name})
        with pytest.raises(ValueError, match=f"{path}.* (lacks|there is no|missing)"):
            load_component(open_part(path, part))


def test_vae_of_another_family(tmp_path):
    tensors = {"decoder.conv_in.weight": np.zeros((8, 16, 3, 3), np.float32)}
    with pytest.raises(ValueError, match="16 latent channels; those of Stable Diffusion 1, 2 and XL have 4"):
        open_part(saved(tmp_path / "ae.safetensors", tensors), "vae")

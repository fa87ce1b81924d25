"""Single files in the original layout: read back bit for bit, and what is missing, left over or of another kind."""

import json
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from checkpoints import write_vocabulary
from oracle import perturb, relative_error
from original_layout import controlnet_names, diffusers_names, tree_of, write_open_clip, write_unet, write_vae
from stable_diffusion import StableDiffusion
from stable_diffusion.text.tokenizer import Tokenizer
from stable_diffusion.weights.files import Component, open_checkpoint, open_part, read_tensors
from stable_diffusion.weights.load import load_component

# What no shape tells is as in the published models: groups of 32, 8 heads or heads of 64 channels, 256 for the sizes.
_SD1 = {
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
    "in_channels": 4,
    "sample_size": 64,
}
_SD2 = _SD1 | {
    "block_out_channels": [64, 128],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [1, 2],
    "use_linear_projection": True,
    "upcast_attention": True,
}
_XL = _SD2 | {
    "upcast_attention": False,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "cross_attention_dim": 128,
    "projection_class_embeddings_input_dim": 6 * 256 + 64,
    "sample_size": 128,
}
_REFINER = _XL | {"cross_attention_dim": 64, "projection_class_embeddings_input_dim": 5 * 256 + 64}
_VAE = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
}
FAMILIES = {
    "sd1": (_SD1, "StableDiffusionPipeline"),
    "inpaint": (_SD1 | {"in_channels": 9}, "StableDiffusionInpaintPipeline"),
    "pix2pix": (_SD1 | {"in_channels": 8}, "StableDiffusionInstructPix2PixPipeline"),
    "sd2": (_SD2, "StableDiffusionPipeline"),
    "depth": (_SD2 | {"in_channels": 5}, "StableDiffusionDepth2ImgPipeline"),
    "xl": (_XL, "StableDiffusionXLPipeline"),
    "refiner": (_REFINER, "StableDiffusionXLImg2ImgPipeline"),
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def _encoder(act: str, projection: bool, layers: int = 2) -> torch.nn.Module:
    config = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=1,
        vocab_size=526,  # of the vocabulary in checkpoints
        hidden_act=act,
        bos_token_id=524,
        eos_token_id=525,
        projection_dim=64,
    )
    return perturb((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed=layers)


def _arrays(module: torch.nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """A module's weights as safetensors hold them; transformers 5 leaves out a prefix that files have."""
    named = {name: value.numpy() for name, value in module.state_dict().items() if "position_ids" not in name}
    bare = "embeddings.token_embedding.weight" in named
    return {f"text_model.{n}" if bare and not n.startswith("text_projection") else n: v for n, v in named.items()}


def _with(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: np.ascontiguousarray(value) for name, value in tensors.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(family)`: (folder in diffusers layout, the same as tensors of a single file), made once."""
    done: dict[str, tuple[Path, dict[str, np.ndarray]]] = {}

    def make(family: str) -> tuple[Path, dict[str, np.ndarray]]:
        if family not in done:
            done[family] = _make(tmp_path_factory.mktemp(family), family)
        return done[family]

    return make


def _make(folder: Path, family: str) -> tuple[Path, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    config, pipeline = FAMILIES[family]
    scale = 0.13025 if family in ("xl", "refiner") else 0.18215
    unet = perturb(diffusers.UNet2DConditionModel(**config), seed=2)
    vae = perturb(diffusers.AutoencoderKL(**_VAE, scaling_factor=scale), seed=3)
    original = _with("model.diffusion_model.", write_unet(_arrays(unet), config))
    original |= _with("first_stage_model.", write_vae(_arrays(vae), _VAE))
    encoders = {}
    if family in ("sd1", "inpaint", "pix2pix", "xl"):
        encoders["text_encoder"] = _encoder("quick_gelu", False)
        place = "conditioner.embedders.0.transformer." if family == "xl" else "cond_stage_model.transformer."
        original |= _with(place, _arrays(encoders["text_encoder"]))
        original[f"{place}text_model.embeddings.position_ids"] = np.arange(77)[None]
    if family in ("sd2", "depth"):
        encoders["text_encoder"] = _encoder("gelu", False, layers=23)
        original |= _with("cond_stage_model.model.", write_open_clip(_arrays(encoders["text_encoder"]), unused=1))
    if family in ("xl", "refiner"):
        encoders["text_encoder_2"] = _encoder("gelu", True)
        place = f"conditioner.embedders.{1 if family == 'xl' else 0}.model."
        original |= _with(place, write_open_clip(_arrays(encoders["text_encoder_2"])))
    index = {"_class_name": pipeline, "scheduler": ["diffusers", "PNDMScheduler"]}
    index["force_zeros_for_empty_prompt"] = family == "xl"
    for name, module in {"unet": unet, "vae": vae, **encoders}.items():
        module.save_pretrained(folder / name)
        index[name] = ["library", type(module).__name__]
        if name.startswith("text_encoder"):
            tokenizer = name.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
            pad_first = tokenizer == "tokenizer" and not config.get("upcast_attention")
            write_vocabulary(folder / tokenizer, "<|endoftext|>" if pad_first else "!")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder, original


@pytest.fixture
def vocabulary(tmp_path) -> Path:
    return write_vocabulary(tmp_path / "vocabulary")


def saved(path: Path, tensors: dict[str, np.ndarray], metadata: dict | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def weights(component: Component) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(load_component(component).parameters())}


def assert_same(ours: Component, theirs: Component) -> None:
    first, second = weights(ours), weights(theirs)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in second)


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "stable_diffusion"]


def refused(model, **options) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        checkpoint = open_checkpoint(model, **options)
        for component in checkpoint.components.values():
            load_component(component)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_read_back_bit_for_bit(made, family, tmp_path, vocabulary):
    folder, original = made(family)
    path = saved(tmp_path / "model.safetensors", original)
    ours, theirs = open_checkpoint(path, tokenizer=vocabulary), open_checkpoint(folder)
    assert ours.pipeline == theirs.pipeline == FAMILIES[family][1]
    assert ours.components.keys() == theirs.components.keys()
    assert ours.tokenizers.keys() == theirs.tokenizers.keys() == ours.pad_tokens.keys()
    for name, component in ours.components.items():
        assert_same(component, theirs.components[name])


@pytest.mark.parametrize("family", ["sd1", "sd2", "xl", "refiner"])
def test_what_no_shape_tells_is_known(made, family, tmp_path, vocabulary):
    """Heads, activations, epsilons and scales: what the networks compute is the same to the last bit."""
    folder, original = made(family)
    path = saved(tmp_path / "model.safetensors", original)
    config = FAMILIES[family][0]
    outputs = []
    for checkpoint in (open_checkpoint(path, tokenizer=vocabulary), open_checkpoint(folder)):
        parts = {name: load_component(component) for name, component in checkpoint.components.items()}
        x, context = (
            mx.random.normal((1, 8, 8, 4), key=mx.random.key(0)),
            mx.ones((1, 5, config["cross_attention_dim"])),
        )
        text_time = None
        if width := config.get("projection_class_embeddings_input_dim"):
            text_time = (mx.ones((1, 64)), mx.arange((width - 64) // 256)[None].astype(mx.float32))
        found = [
            parts["unet"](x, parts["unet"].embed_time(500.0, mx.float32, text_time), context),
            parts["vae"].decode(x),
            *parts["vae"].encode(x[..., :3]),
        ]
        ids = mx.array([[524, 5, 7, 525, 525]])
        for name in parts.keys() & {"text_encoder", "text_encoder_2"}:
            text = parts[name](ids)
            found += [text.last_hidden_state, text.pooled_output, *text.hidden_states]
        outputs.append([np.array(value) for value in found])
    assert all(np.array_equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("family", ["sd1", "sd2", "xl"])
def test_latents_are_those_of_the_folder(made, family, tmp_path):
    """The whole way, with the scheduler that the family is known to have; pad tokens are the tokenizers' own."""
    folder, original = made(family)
    path = saved(tmp_path / "model.safetensors", original)
    ours = StableDiffusion(path, tokenizer=folder / "tokenizer", prediction="epsilon")
    theirs = StableDiffusion(folder)
    runs = [
        list(sd.generate_latents("the red cat!", num_steps=2, latent_size=(4, 8), seed=1, sampler="ddim"))
        for sd in (ours, theirs)
    ]
    for a, b in zip(*runs, strict=True):
        assert np.array_equal(a, b)


def test_sizes_and_schedules_of_the_families(made, tmp_path, vocabulary):
    expected = {
        "sd1": ("PNDMScheduler", 64, (50, 7.5), {"tokenizer": "<|endoftext|>"}),
        "sd2": ("DDIMScheduler", 64, (50, 7.5), {"tokenizer": "!"}),
        "xl": ("EulerDiscreteScheduler", 128, (50, 5.0), {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}),
        "refiner": ("EulerDiscreteScheduler", 128, (50, 5.0), {"tokenizer_2": "!"}),
    }
    for family, (scheduler, size, defaults, pads) in expected.items():
        path = saved(tmp_path / f"{family}.safetensors", made(family)[1])
        checkpoint = open_checkpoint(path, tokenizer=vocabulary, prediction="epsilon")
        assert checkpoint.scheduler["_class_name"] == scheduler
        assert checkpoint.scheduler["beta_start"] == 0.00085 and checkpoint.scheduler["steps_offset"] == 1
        assert checkpoint.components["unet"].config["sample_size"] == size
        assert (checkpoint.steps, checkpoint.guidance) == defaults
        assert checkpoint.pad_tokens == pads
        assert bool(checkpoint.index.get("force_zeros_for_empty_prompt")) == (family == "xl")
        assert bool(checkpoint.index.get("requires_aesthetics_score")) == (family == "refiner")


def test_names_without_text_model_and_half_precision(made, tmp_path, vocabulary):
    folder, original = made("sd1")
    renamed = {
        name.replace("transformer.text_model.", "transformer."): v.astype(np.float16) for name, v in original.items()
    }
    path = saved(tmp_path / "model.safetensors", renamed)
    ours = open_checkpoint(path, tokenizer=vocabulary).components["text_encoder"]
    theirs = weights(open_checkpoint(folder).components["text_encoder"])
    for name, value in weights(ours).items():
        assert np.array_equal(value, theirs[name].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_ckpt(made, tmp_path, vocabulary, wrapped, legacy):
    folder, original = made("sd1")
    tensors = {name: torch.from_numpy(value) for name, value in original.items()}
    checkpoint = {"epoch": 3, "global_step": 470000, "state_dict": tensors} if wrapped else tensors
    torch.save(checkpoint, tmp_path / "model.ckpt", _use_new_zipfile_serialization=not legacy)
    ours = open_checkpoint(tmp_path / "model.ckpt", tokenizer=vocabulary).components
    for name, component in open_checkpoint(folder).components.items():
        assert_same(ours[name], component)


def test_what_is_no_weight_is_left_out(made, tmp_path, vocabulary):
    names = "betas alphas_cumprod_prev sqrt_recipm1_alphas_cumprod posterior_mean_coef2 model_ema.num_updates"
    more = dict.fromkeys(names.split(), np.zeros(3, dtype=np.float32))
    more |= dict.fromkeys(
        ("model_ema.diffusion_modelout2bias", "first_stage_model.loss.logvar"), np.ones(2, np.float32)
    )
    more |= {"depth_model.model.pretrained.x": np.ones(1, np.float32)}
    path = saved(tmp_path / "model.safetensors", made("sd1")[1] | more)
    for component in open_checkpoint(path, tokenizer=vocabulary).components.values():
        load_component(component)


def test_pruned_text_encoder_of_sd2(made, tmp_path, vocabulary):
    folder, original = made("sd2")
    pruned = {n: v for n, v in original.items() if "resblocks.23." not in n and not n.endswith(("projection", "scale"))}
    assert len(pruned) == len(original) - 14
    ours = open_checkpoint(saved(tmp_path / "m.safetensors", pruned), tokenizer=vocabulary).components["text_encoder"]
    assert_same(ours, open_checkpoint(folder).components["text_encoder"])


def test_lcm(made, tmp_path, vocabulary):
    projection = {"model.diffusion_model.time_embed.cond_proj.weight": np.ones((32, 256), np.float32)}
    path = saved(tmp_path / "model.safetensors", made("sd1")[1] | projection)
    checkpoint = open_checkpoint(path, tokenizer=vocabulary)
    assert checkpoint.pipeline == "LatentConsistencyModelPipeline"
    assert checkpoint.scheduler["_class_name"] == "LCMScheduler" and checkpoint.steps == 4
    unet = load_component(checkpoint.components["unet"])
    assert unet.config.time_cond_proj_dim == 256
    assert np.array_equal(unet.time_embedding.cond_proj.weight, np.ones((32, 256)))


def test_distilled_models_are_known_by_the_names_of_their_files(made, tmp_path, vocabulary):
    checkpoint = open_checkpoint(
        saved(tmp_path / "sdxl_lightning_4step.safetensors", made("xl")[1]), tokenizer=vocabulary
    )
    assert checkpoint.scheduler["_class_name"] == "EulerDiscreteScheduler"
    assert checkpoint.scheduler["timestep_spacing"] == "trailing" and checkpoint.scheduler["beta_start"] == 0.00085
    assert (checkpoint.steps, checkpoint.guidance) == (4, 0.0)


# --- prediction --------------------------------------------------------------------------------------------------

_LAST_NORM = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.norm1.bias"


@pytest.mark.parametrize(
    ("family", "more", "metadata", "argument", "expected"),
    [
        ("sd1", (), {}, None, "epsilon"),
        ("sd1", (), {"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ("sd1", (), {"modelspec.prediction_type": "v"}, "epsilon", "epsilon"),
        ("sd1", ("v_pred",), {}, None, "v_prediction"),
        ("xl", ("v_pred", "ztsnr"), {}, None, "v_prediction"),
        ("xl", (), {}, "sample", "sample"),
        ("sd2", (), {"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, "v_prediction"),
        ("sd2", (), {"modelspec.architecture": "stable-diffusion-v2-512"}, None, "epsilon"),
        ("sd2", (), {"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
        ("sd2", (), {}, "v_prediction", "v_prediction"),
        ("depth", (), {}, None, "epsilon"),
    ],
)
def test_prediction_as_stated(made, tmp_path, vocabulary, caplog, family, more, metadata, argument, expected):
    tensors = made(family)[1] | dict.fromkeys(more, np.zeros(0, dtype=np.float32))
    path = saved(tmp_path / "model.safetensors", tensors, metadata)
    checkpoint = open_checkpoint(path, tokenizer=vocabulary, prediction=argument)
    assert checkpoint.scheduler["prediction_type"] == expected
    assert checkpoint.scheduler.get("rescale_betas_zero_snr", False) == ("ztsnr" in more)
    assert checkpoint.scheduler["timestep_spacing"] == ("trailing" if "ztsnr" in more else "leading")
    large = family == "sd2" and expected == "v_prediction"
    assert checkpoint.components["unet"].config["sample_size"] == (96 if large else 128 if family == "xl" else 64)
    assert said(caplog) == []


@pytest.mark.parametrize(("spread", "expected"), [(0.057, "epsilon"), (0.534, "v_prediction")])
def test_sd2_without_a_hint_is_told_by_its_weights(made, tmp_path, vocabulary, caplog, spread, expected):
    _, original = made("sd2")
    bias = np.resize(np.float32([spread, -spread]), original[_LAST_NORM].shape)
    path = saved(tmp_path / "model.safetensors", original | {_LAST_NORM: bias})
    assert open_checkpoint(path, tokenizer=vocabulary).scheduler["prediction_type"] == expected
    (line,) = said(caplog)
    assert expected in line and "the argument prediction" in line and str(path) in line


def test_prediction_of_a_folder_and_unknown_prediction(made):
    folder, _ = made("sd1")
    assert open_checkpoint(folder, prediction="v_prediction").scheduler["prediction_type"] == "v_prediction"
    assert "prediction 'v' is not one of epsilon, v_prediction, sample" in refused(folder, prediction="v")


def test_resolution_in_the_metadata(made, tmp_path, vocabulary):
    path = saved(tmp_path / "model.safetensors", made("sd1")[1], {"modelspec.resolution": "768x512"})
    assert open_checkpoint(path, tokenizer=vocabulary).components["unet"].config["sample_size"] == [64, 96]


# --- tokenizers --------------------------------------------------------------------------------------------------


def test_tokenizer_of_a_folder_is_replaced(made, vocabulary):
    folder, _ = made("xl")
    assert open_checkpoint(folder, tokenizer=vocabulary).tokenizers == dict.fromkeys(
        ("tokenizer", "tokenizer_2"), vocabulary
    )


def test_pad_tokens_are_those_of_the_family(made, tmp_path, vocabulary):
    checkpoint = open_checkpoint(saved(tmp_path / "m.safetensors", made("xl")[1]), tokenizer=vocabulary)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        ours = Tokenizer.from_folder(checkpoint.tokenizers[name], checkpoint.pad_tokens[name])
        theirs = Tokenizer.from_folder(write_vocabulary(tmp_path / name, pad_token=pad))
        assert ours.pad_id == theirs.pad_id == ours.vocab[pad]
        assert ours.encode("the red cat! on an ! blue") == theirs.encode("the red cat! on an ! blue")


# --- parts -------------------------------------------------------------------------------------------------------

MISSING = {
    "vae": (
        "sd1",
        "first_stage_model.",
        "lacks a VAE: add it with parts, such as the one of stable-diffusion-v1-5/",
    ),
    "text_encoder": ("sd1", "cond_stage_model.", "lacks a text encoder: add it with parts, such as"),
    "text_encoder_2": ("xl", "conditioner.embedders.1.", "lacks a second text encoder: add it with parts"),
    "unet": ("sd1", "model.diffusion_model.", "holds only vae, text_encoder and no UNet: give a whole checkpoint"),
}


@pytest.mark.parametrize("part", MISSING)
def test_missing_part_is_named_and_can_be_given(made, tmp_path, vocabulary, part):
    family, prefix, message = MISSING[part]
    folder, original = made(family)
    path = saved(tmp_path / "m.safetensors", {n: v for n, v in original.items() if not n.startswith(prefix)})
    assert message in refused(path, tokenizer=vocabulary)
    checkpoint = open_checkpoint(path, tokenizer=vocabulary, parts={part: folder})
    expected = open_checkpoint(folder).components
    assert checkpoint.components.keys() == expected.keys()
    for name, component in checkpoint.components.items():
        assert_same(component, expected[name])


def test_several_missing_parts_are_named_at_once(made, tmp_path, vocabulary):
    _, original = made("xl")
    path = saved(
        tmp_path / "m.safetensors", {n: v for n, v in original.items() if n.startswith("model.diffusion_model.")}
    )
    assert "lacks a VAE and a text encoder and a second text encoder: add" in refused(path, tokenizer=vocabulary)


@pytest.mark.parametrize("naming", ["whole file", "original", "original with prefix", "diffusers"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_part_from_a_file(made, tmp_path, part, naming):
    folder, original = made("xl")
    prefix = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    }[part]
    own = {name: value for name, value in original.items() if name.startswith(prefix)}
    file = {
        "whole file": original,
        "original": {name.removeprefix(prefix): value for name, value in own.items()},
        "original with prefix": own,
        "diffusers": {name: np.array(v) for name, v in read_tensors(open_part(folder, part)).items()},
    }[naming]
    component = open_part(saved(tmp_path / "part.safetensors", file), part)
    assert component.name == part
    assert_same(component, open_part(folder, part))


@pytest.mark.parametrize("place", ["", "vae/"])
def test_part_from_a_folder(made, tmp_path, place):
    folder, _ = made("sd1")
    (tmp_path / place).mkdir(exist_ok=True)
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / place / file).write_bytes((folder / "vae" / file).read_bytes())
    assert_same(open_part(tmp_path, "vae"), open_part(folder, "vae"))


@pytest.mark.parametrize("name", ["control_v11e_sd15_shuffle", "control_v11p_sd15_canny"])
def test_controlnet_in_the_original_layout(tmp_path, name):
    """Against diffusers' converter; only "shuffle" pools what it computes."""
    config = {
        key: _SD1[key] for key in ("block_out_channels", "down_block_types", "layers_per_block", "attention_head_dim")
    }
    torch.manual_seed(0)
    theirs = perturb(diffusers.ControlNetModel(**config, cross_attention_dim=64)).state_dict()
    names = diffusers_names("controlnet", controlnet_names(tree_of(_SD1)), config)
    assert names.keys() == theirs.keys()
    file = _with("control_model.", {names[n]: value.numpy() for n, value in theirs.items()})
    component = open_part(saved(tmp_path / f"{name}.safetensors", file), "controlnet")
    assert component.config.get("global_pool_conditions", False) == ("shuffle" in name)
    ours = read_tensors(component)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n].numpy()) for n in theirs)
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


def test_part_replaces_the_checkpoints_own(made, tmp_path):
    """Its own need not be there then."""
    folder, _ = made("sd1")
    other, original = made("xl")
    whole = saved(tmp_path / "xl.safetensors", original)
    for source in (other, whole):
        checkpoint = open_checkpoint(folder, parts={"vae": source})
        assert_same(checkpoint.components["vae"], open_part(other, "vae"))
        assert_same(checkpoint.components["unet"], open_part(folder, "unet"))
    # A file does not say its scale: that of the family it is used in is taken, here that of Stable Diffusion 1.
    assert checkpoint.components["vae"].config["scaling_factor"] == 0.18215
    assert open_checkpoint(other, parts={"vae": whole}).components["vae"].config["scaling_factor"] == 0.13025


def test_unknown_part(made):
    assert "'lora' is not a part of a checkpoint; the parts are unet, vae" in refused(
        made("sd1")[0], parts={"lora": "x"}
    )


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "is a LoRA, not a model"),
        (["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"], "is a LoRA, not a model"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "is Stable Diffusion 3, which is not"),
        (["double_blocks.0.img_attn.qkv.weight"], "is Flux, which is not supported"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "is Flux, which is not supported"),
        (["emb_params"], "is an embedding"),
        (["clip_l", "clip_g"], "is an embedding"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "is an IP-Adapter"),
        (["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"], "is an AnimateDiff model"),
        (["transformer.h.0.attn.weight"], "is no model of Stable Diffusion: it holds transformer.h.0.attn.weight"),
    ],
)
def test_file_of_another_kind(tmp_path, vocabulary, names, message):
    path = saved(tmp_path / "model.safetensors", dict.fromkeys(names, np.zeros((2, 2), np.float32)))
    assert message in refused(path, tokenizer=vocabulary)


@pytest.mark.parametrize("name", ["edm_mean", "edm_vpred.sigma_max"])
def test_edm_models(made, tmp_path, vocabulary, name):
    path = saved(tmp_path / "model.safetensors", made("xl")[1] | {name: np.zeros(1, np.float32)})
    assert "is an EDM model" in refused(path, tokenizer=vocabulary)


@pytest.mark.parametrize("source", ["whole file", "vae alone"])
def test_part_that_a_file_does_not_have(made, tmp_path, source):
    _, original = made("sd1")
    alone = {n.removeprefix("first_stage_model."): v for n, v in original.items() if n.startswith("first_stage_model.")}
    path = saved(tmp_path / "m.safetensors", original if source == "whole file" else alone)
    with pytest.raises(ValueError, match=r"m\.safetensors holds no controlnet, but .*vae.*: give another file$"):
        open_part(path, "controlnet")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("something.else", "holds 1 tensors that this library does not know: something.else"),
        ("model.diffusion_model.input_blocks.1.0.more.weight", "down_blocks.0.resnets.0.more.weight"),
        ("first_stage_model.encoder.more.weight", "encoder.more.weight"),
        ("cond_stage_model.transformer.more.weight", "more.weight"),
    ],
)
def test_tensors_left_over_are_named(made, tmp_path, vocabulary, name, where):
    path = saved(tmp_path / "m.safetensors", made("sd1")[1] | {name: np.zeros(1, np.float32)})
    message = refused(path, tokenizer=vocabulary)
    assert where in message and str(path) in message


@pytest.mark.parametrize(
    ("part", "prefix"),
    [("unet", "model.diffusion_model."), ("vae", "first_stage_model."), ("text_encoder", "cond_stage_model.")],
)
def test_every_tensor_is_needed(made, tmp_path, part, prefix):
    _, original = made("sd1")
    own = {n: v for n, v in original.items() if n.startswith(prefix) and "position_ids" not in n}
    for name in list(own)[:: len(own) // 5]:
        path = saved(tmp_path / "m.safetensors", {n: v for n, v in own.items() if n != name})
        with pytest.raises(ValueError, match=f"{path}.* (lacks|there is no|missing)"):
            load_component(open_part(path, part))


def test_channels_that_no_pipeline_reads(made, tmp_path, vocabulary):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    path = saved(tmp_path / "m.safetensors", made("sd1")[1] | {name: np.zeros((32, 7, 3, 3), np.float32)})
    assert "has a UNet that reads 7 channels; supported are those of 4, 5, 8 and 9" in refused(
        path, tokenizer=vocabulary
    )


ODD = {
    "no shape": ("model.diffusion_model.input_blocks.0.0.weight", ()),
    "a vector": ("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", (32,)),
    "no attention": ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (32,)),
    "far block": ("model.diffusion_model.input_blocks.999999999999.0.in_layers.0.weight", (32,)),
    "far level": ("first_stage_model.decoder.up.999999999999.block.0.norm1.weight", (32,)),
    "far layer": ("cond_stage_model.transformer.text_model.encoder.layers.999999999999.mlp.fc1.bias", (32,)),
    "no digit": ("model.diffusion_model.input_blocks..1.norm.weight", (32,)),
}


@pytest.mark.parametrize("odd", ODD)
def test_shapes_and_numbers_that_make_no_sense(made, tmp_path, vocabulary, odd):
    name, shape = ODD[odd]
    path = saved(tmp_path / "m.safetensors", made("sd1")[1] | {name: np.zeros(shape, np.float32)})
    assert str(path) in refused(path, tokenizer=vocabulary)


@pytest.mark.parametrize("name", ["model.diffusion_model.conv_in.bias", "first_stage_model.decoder.conv_norm_out.bias"])
def test_tensor_under_two_names(made, tmp_path, vocabulary, name):
    path = saved(tmp_path / "m.safetensors", made("sd1")[1] | {name: np.zeros(32, np.float32)})
    assert "is there twice, in the original naming and in that of diffusers" in refused(path, tokenizer=vocabulary)


def test_fused_projection_that_does_not_divide(made, tmp_path, vocabulary):
    name = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"
    path = saved(tmp_path / "m.safetensors", made("sd2")[1] | {name: np.zeros(64, np.float32)})
    assert "its text_encoder cannot be read" in refused(path, tokenizer=vocabulary)


@pytest.mark.parametrize("resolution", ["0x0", "99999x99999", "512", "ax512", "１２８x１２８", "9" * 5000 + "x512"])
def test_resolution_that_makes_no_sense_is_not_taken(made, tmp_path, vocabulary, resolution):
    path = saved(tmp_path / "model.safetensors", made("sd1")[1], {"modelspec.resolution": resolution})
    assert open_checkpoint(path, tokenizer=vocabulary).components["unet"].config["sample_size"] == 64


def test_vae_of_another_family(tmp_path):
    tensors = {"decoder.conv_in.weight": np.zeros((8, 16, 3, 3), np.float32)}
    with pytest.raises(ValueError, match="latents of 16 channels, those of Stable Diffusion 1, 2 and XL have 4"):
        open_part(saved(tmp_path / "ae.safetensors", tensors), "vae")


def test_cut_file(made, tmp_path, vocabulary):
    path = saved(tmp_path / "m.safetensors", made("sd1")[1])
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "is damaged" in refused(path, tokenizer=vocabulary)


@pytest.mark.parametrize("name", ["m.safetensors", "models/m.ckpt", "./m.pt"])
def test_file_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert f"{name}: no such folder or file" in refused(name)

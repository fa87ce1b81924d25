"""Files of trained LoRAs have published names and texts, and draw the trained picture here and in diffusers."""

import json
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from safetensors import safe_open

from checkpoints import SCALED, Recorder, make
from configs import REAL_TEXT_ENCODERS, REAL_UNETS
from oracle import nchw, normal
from stable_diffusion import StableDiffusion
from stable_diffusion.app.inspect import inspect
from stable_diffusion.app.training_output import header_texts
from stable_diffusion.images.folders import Picture
from stable_diffusion.lora.create import new_lora
from stable_diffusion.lora.layers import attach
from stable_diffusion.lora.save import describe, write_lora
from stable_diffusion.training.dataset import Dataset
from stable_diffusion.training.save import save_lora
from stable_diffusion.training.settings import TrainingSettings
from stable_diffusion.training.trainer import LoRATrainer
from stable_diffusion.weights.load import build

PROMPT = "the red cat"
# As kohya's scripts name them: the path in the UNet, of XL in the original one, with underscores.
NAMES = {
    "sd15": {
        "lora_unet_down_blocks_0_attentions_0_proj_in": (320, 1, 1),
        "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k": (768,),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": (1280,),
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_out_0": (320,),
        "lora_unet_down_blocks_0_resnets_1_conv2": (320, 3, 3),
        "lora_unet_down_blocks_2_downsamplers_0_conv": (1280, 3, 3),
        "lora_unet_up_blocks_0_upsamplers_0_conv": (1280, 3, 3),
        "lora_unet_up_blocks_3_resnets_2_conv_shortcut": (640, 1, 1),
        "lora_unet_mid_block_resnets_1_time_emb_proj": (1280,),
        "lora_te_text_model_encoder_layers_11_self_attn_q_proj": (768,),
        "lora_te_text_model_encoder_layers_0_mlp_fc2": (3072,),
    },
    "sdxl-base": {
        "lora_unet_input_blocks_4_1_proj_in": (640,),
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_v": (2048,),
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": (1280,),
        "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2": (2560,),
        "lora_unet_input_blocks_1_0_in_layers_2": (320, 3, 3),
        "lora_unet_input_blocks_6_0_op": (640, 3, 3),
        "lora_unet_output_blocks_2_2_conv": (1280, 3, 3),
        "lora_unet_output_blocks_8_0_skip_connection": (640, 1, 1),
        "lora_unet_middle_block_2_emb_layers_1": (1280,),
        "lora_te1_text_model_encoder_layers_11_self_attn_out_proj": (768,),
        "lora_te2_text_model_encoder_layers_31_mlp_fc1": (1280,),
    },
}


def written(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    with safe_open(path, "np") as file:
        names = file.keys()
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}, file.metadata()


def full_size(name: str, text_encoders: bool) -> dict:
    networks = {"unet": build("unet", REAL_UNETS[name])}
    if text_encoders:
        networks["text_encoder"] = build("text_encoder", REAL_TEXT_ENCODERS["sd15"])
        if name == "sdxl-base":
            networks["text_encoder_2"] = build("text_encoder_2", REAL_TEXT_ENCODERS["sdxl-2"])
    return networks


@pytest.mark.parametrize("name, modules", [("sd15", 278 + 72), ("sdxl-base", 788 + 72 + 192)])
def test_names_at_full_size_are_kohyas(name, modules, tmp_path):
    """The numbers of modules are those in the logs of kohya's scripts."""
    networks = full_size(name, text_encoders=True)
    lora = attach(networks, new_lora(networks, dict.fromkeys(networks, 1), targets="all", conv_rank=1))
    write_lora(tmp_path / "a.safetensors", networks, lora, dtype=mx.float16)
    shapes, _ = written(tmp_path / "a.safetensors")
    assert len(shapes) == 3 * modules
    for layer, width in NAMES[name].items():
        assert shapes[f"{layer}.lora_down.weight"] == (1, *width)
        assert shapes[f"{layer}.lora_up.weight"][1:] == (1, *(1 for _ in width[1:]))
        assert shapes[f"{layer}.alpha"] == ()


@pytest.mark.parametrize("name, modules, block", [("sd15", 128, "down_blocks_0"), ("sdxl-base", 560, "input_blocks_4")])
def test_attention_of_a_unet_alone(name, modules, block, tmp_path):
    networks = full_size(name, text_encoders=False)
    write_lora(tmp_path / "a.safetensors", networks, attach(networks, new_lora(networks, {"unet": 16})))
    shapes, _ = written(tmp_path / "a.safetensors")
    assert len(shapes) == 3 * modules and any(key.startswith(f"lora_unet_{block}_") for key in shapes)


# --- what the header says --------------------------------------------------------------------------------------------

FAMILIES = {
    (768, "epsilon"): ("sd_v1", "False", "stable-diffusion-v1/lora", "epsilon"),
    (1024, "epsilon"): ("sd_v2", "True", "stable-diffusion-v2-512/lora", "epsilon"),
    (1024, "v_prediction"): ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "v"),
    (2048, "epsilon"): ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "epsilon"),
    (128, "epsilon"): ("unknown", "False", "unknown/lora", "epsilon"),
}


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_families_are_named_as_kohya_and_stability_do(family, sd):
    keys = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.prediction_type")
    lora = trainer_of(sd).lora
    texts = describe(lora, *family, resolution=512, title="x")
    assert tuple(texts[key] for key in keys) == FAMILIES[family]
    lora.detach()


@pytest.fixture(scope="module", params=["sd1", "xl"])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    make(folder, request.param, diffusers.DDIMScheduler(**SCALED, steps_offset=1, clip_sample=False))
    return folder


@pytest.fixture
def sd(folder) -> StableDiffusion:
    return StableDiffusion(folder)


def trainer_of(sd: StableDiffusion, **settings) -> LoRATrainer:
    """A trainer whose factors are random numbers."""
    trainer = LoRATrainer(sd, None, TrainingSettings(rank=4, **settings))
    values = {}
    for seed, (name, factor) in enumerate(sorted(trainer.factors().items())):
        noise = 0.1 * mx.random.normal(factor.shape, key=mx.random.key(seed))
        values[name] = factor * (1 + noise) if name.endswith("dora_scale") else noise
    trainer.model.update(tree_unflatten(list(values.items())))
    return trainer


def test_the_header_is_read_by_other_programs(sd, tmp_path):
    settings = TrainingSettings(rank=4, alpha=2, conv_rank=3, steps=7, seed=5)
    captions = {"10_ohwx": ("ohwx, A cat, café", "ohwx, a cat"), "more": ("ohwx",)}
    pictures = [
        Picture(Path(name) / f"{i}.png", text, 10 if name[0] == "1" else 1, (64, 64), f"{name}{i}")
        for name, texts in captions.items()
        for i, text in enumerate(texts)
    ]
    data = Dataset(sd, pictures, settings, resolution=48)
    trainer = LoRATrainer(sd, data, settings)
    for path in (tmp_path / "a.safetensors", tmp_path / "b.safetensors"):
        save_lora(trainer, path, header_texts(trainer, "ohwx", "me"))
    _, texts = written(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    wanted = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_network_args": '{"conv_dim": "3", "conv_alpha": "2"}',
        "ss_output_name": "me",
        "ss_resolution": "(48, 48)",
        "ss_num_train_images": "21",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "me",
        "modelspec.resolution": "48x48",
        "modelspec.implementation": "diffusers",
        "modelspec.trigger_phrase": "ohwx",
    }
    assert texts.items() >= wanted.items()
    tags = json.loads(texts["ss_tag_frequency"])
    assert tags == {"10_ohwx": {"ohwx": 2, "a cat": 2, "café": 1}, "more": {"ohwx": 1}}
    assert not any("date" in key or "_at" in key for key in texts)
    report = inspect(tmp_path / "a.safetensors")
    assert report["ranks"] == [3, 4] and report["alphas"] == [2] and report["modelspec.trigger_phrase"] == "ohwx"
    assert report["types"].keys() == {"float16"}


# --- read back -------------------------------------------------------------------------------------------------------

NOISE = normal(1, 8, 6, 4, seed=1)


def draw(sd: StableDiffusion) -> np.ndarray:
    """A picture in levels."""
    steps = sd.generate_latents(PROMPT, latent_size=(8, 6), latents=mx.array(NOISE), num_steps=2, cfg_weight=3.0)
    return np.round(np.array(sd.decode(list(steps)[-1])) * 255)


@pytest.fixture(scope="module")
def pipe(folder) -> diffusers.DiffusionPipeline:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_in_diffusers(pipe: diffusers.DiffusionPipeline, file: Path) -> np.ndarray:
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    size = {"height": 64, "width": 48, "latents": nchw(NOISE), "guidance_scale": 3.0, "num_inference_steps": 2}
    drawn = np.round(Recorder(pipe)(prompt=PROMPT, **size) * 255)
    pipe.unload_lora_weights()
    return drawn


CASES = {
    "attention": {"alpha": 3.0},
    "all": {"targets": "all", "conv_rank": 2, "text_encoder_rank": 3, "alpha": 2.0},
    "dora": {"targets": "all", "conv_rank": 2, "dora": True, "alpha": 2.0},
}


# XL has one more encoder and other names in the UNet, which "all" holds too.
@pytest.mark.parametrize(
    "folder, case", [*(("sd1", case) for case in CASES), ("xl", "all"), ("xl", "dora")], indirect=["folder"]
)
def test_a_file_draws_the_trained_picture(folder, sd, pipe, case, tmp_path):
    """Here attached and fused, and in diffusers, which reads no lengths of DoRA under kohya's names."""
    before, trainer, again = draw(sd), trainer_of(sd, **CASES[case]), StableDiffusion(folder)
    trained = draw(sd)
    assert np.abs(trained - before).max() > 10
    for naming in ("kohya", "diffusers"):
        file = tmp_path / f"{naming}.safetensors"
        save_lora(trainer, file, {"modelspec.title": "x"}, naming)
        if case != "dora" or naming == "diffusers":
            assert np.abs(draw_in_diffusers(pipe, file) - trained).max() <= 1
        attached = again.load_lora(file)
        assert np.abs(draw(again) - trained).max() <= 1
        attached.detach()
    assert np.abs(draw(StableDiffusion(folder, loras=[(file, 1.0)])) - trained).max() <= 1


# --- what is saved ---------------------------------------------------------------------------------------------------


def test_the_average_is_saved_and_no_other_lora(sd1_folder, tmp_path):
    sd = StableDiffusion(sd1_folder)
    other = attach({"unet": sd.unet}, new_lora({"unet": sd.unet}, {"unet": 2}, targets="all"))
    trainer = LoRATrainer(sd, None, TrainingSettings(rank=4, ema=0.9))
    now = trainer.factors()
    trainer.average = tree_unflatten([(name, factor + 0.25) for name, factor in now.items()])
    save_lora(trainer, tmp_path / "a.safetensors", {})
    saved = mx.load(str(tmp_path / "a.safetensors"))
    assert len(saved) == 3 * len(trainer.lora.deltas) == 264
    for name, array in saved.items():
        assert "alpha" in name or array.shape[0] == 4 or array.shape[1] == 4
        if "lora_up" in name:
            assert mx.all(array == 0.25).item()
    assert all(mx.array_equal(factor, now[name]) for name, factor in trainer.factors().items())
    other.detach()


@pytest.mark.parametrize("value, said", [(70000.0, "7e.04"), (float("nan"), "nan")])
@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_what_float16_does_not_hold_is_one_line_and_no_file(sd1_folder, tmp_path, value, said, naming):
    trainer = trainer_of(StableDiffusion(sd1_folder))
    name = next(name for name in trainer.factors() if name.endswith("up"))
    trainer.model.update(tree_unflatten([(name, mx.full(trainer.factors()[name].shape, value))]))
    (tmp_path / "a.safetensors").write_bytes(b"what was there")
    with pytest.raises(ValueError, match=f"up to {said} in unet.*float16 cannot hold.*smaller learning rate") as error:
        save_lora(trainer, tmp_path / "a.safetensors", {}, naming)
    assert "\n" not in str(error.value)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.safetensors", b"what was there")]


def test_a_write_that_fails_leaves_what_was_there(sd1_folder, tmp_path, monkeypatch):
    trainer = trainer_of(StableDiffusion(sd1_folder))
    (tmp_path / "a.safetensors").write_bytes(b"what was there")

    def full(path, names, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("stable_diffusion.lora.save.write_safetensors", full)
    with pytest.raises(OSError, match="no space"):
        save_lora(trainer, tmp_path / "a.safetensors", {})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.safetensors", b"what was there")]

"""Whole pipelines in float16 and bfloat16 against float32, and what chooses the type.

``eps`` is the distance from 1 to the next number. Latents are float32 in every type, so an error is the networks':
0.3 to 0.9 eps of the latents' deviation (rms), up to 2 quantized, whose scales are rounded. Guidance w p - (w - 1) n
takes it times 4 at w = 5, and times (w^2 + (w - 1)^2)^(1/2) = 6.4 where the errors of p and n have nothing in common.
"""

import json
import shutil
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest

from checkpoints import PROMPT, SCALED, make
from cli.test_images import write_lora
from oracle import last, normal
from stable_diffusion import Control, StableDiffusion
from stable_diffusion.app.preview import preview_decoder
from test_parity_images import control_nets

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
PLAIN, V_PREDICTION, QUANTIZED = 0.6, 1.2, 2.0  # eps of a prediction (rms)
GUIDANCE = 5.0
RUN = {"num_steps": 3, "latent_size": (6, 8), "seed": 1, "negative_text": "the blue"}
TYPES = pytest.mark.parametrize("name", EPS)


def error(ours: np.ndarray, theirs: np.ndarray, name: str, guidance: float) -> tuple[float, float]:
    """The error of a prediction in eps, by that of guided latents: rms and largest, of their deviation."""
    errors = np.abs(ours - theirs) / theirs.std() / EPS[name]
    amplification = np.hypot(guidance, guidance - 1) if guidance > 1 else 1.0
    return float(np.sqrt((errors**2).mean())) / amplification, float(errors.max()) / amplification


def check(folder: Path, name: str, allowed: float, guidance: float = GUIDANCE, **options) -> None:
    run = RUN | {"cfg_weight": guidance}
    want = last(StableDiffusion(folder, **options).generate_latents(PROMPT, **run))
    sd = StableDiffusion(folder, dtype=getattr(mx, name), **options)
    for x_t in sd.generate_latents(PROMPT, **run):
        assert x_t.dtype == mx.float32
    rms, largest = error(np.array(x_t), want, name, guidance)
    assert 0.01 < rms <= allowed and largest <= 5 * allowed  # of hundreds of values


@TYPES
@pytest.mark.parametrize(
    "family, guidance",
    [("sd1", 1.0), ("sd2-v", 1.0), *((f, GUIDANCE) for f in ("sd1", "sd2", "sd2-v", "xl", "refiner"))],
)
def test_whole_pipelines(tmp_path, family, guidance, name):
    prediction, allowed = ("v_prediction", V_PREDICTION) if family == "sd2-v" else ("epsilon", PLAIN)
    make(tmp_path / "sd", family, diffusers.EulerDiscreteScheduler(**SCALED, prediction_type=prediction))
    check(tmp_path / "sd", name, allowed, guidance)


@TYPES
def test_quantized(sd1_folder, name):
    check(sd1_folder, name, QUANTIZED, unet_bits=8, text_bits=4)


@TYPES
def test_loras_and_controlnets(sd1_folder, tmp_path, name):
    """A LoRA in the weights, one beside them, and a ControlNet."""
    for seed in (0, 1):
        write_lora(tmp_path / f"{seed}.safetensors", seed=seed)
    control_nets("sd1", 1)[0][0].save_pretrained(tmp_path / "net")
    results = []
    for dtype in (mx.float32, getattr(mx, name)):
        sd = StableDiffusion(sd1_folder, dtype=dtype, loras=[(tmp_path / "0.safetensors", 0.05)])
        sd.load_lora(tmp_path / "1.safetensors", 0.05)
        network = sd.load_controlnet(tmp_path / "net")
        assert sd.unet.conv_in.weight.dtype == network.conv_in.weight.dtype == dtype
        control = Control(network, mx.array(np.abs(normal(48, 64, 3)).clip(0, 1)))
        results.append(last(sd.generate_latents(PROMPT, cfg_weight=GUIDANCE, controls=[control], **RUN)))
    rms, largest = error(results[1], results[0], name, GUIDANCE)
    assert 0.01 < rms <= PLAIN and largest <= 5 * PLAIN


def test_bfloat16_does_not_overflow(sd1_folder, tmp_path, caplog):
    """The first map of this UNet is larger than the largest number of float16; norms make it small again."""
    folder = shutil.copytree(sd1_folder, tmp_path / "sd")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = mx.load(str(file))
    weight = tensors["conv_in.weight"]
    tensors["conv_in.weight"] = weight * (6e4 / mx.abs(weight).max())
    mx.eval(tensors)
    file.unlink()
    mx.save_safetensors(str(file), tensors)
    for dtype, after in ((mx.bfloat16, "bfloat16"), (mx.float16, "float32")):
        sd = StableDiffusion(folder, dtype=dtype)
        sd.generate(PROMPT, cfg_weight=1.0, **RUN)
        assert sd.dtype_name == after
        assert ("switching the UNet to float32" in caplog.text) is (after == "float32")


@TYPES
@pytest.mark.parametrize("is_safe", [True, False])
def test_the_autoencoder_is_float32_unless_its_config_allows_another_type(sd1_folder, tmp_path, name, is_safe):
    folder = shutil.copytree(sd1_folder, tmp_path / "sd")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": not is_safe}))
    z = mx.array(normal(1, 6, 8, 4))
    exact, sd = StableDiffusion(folder), StableDiffusion(folder, dtype=getattr(mx, name))
    assert (sd.autoencoder.decoder.conv_in.weight.dtype == getattr(mx, name)) is is_safe
    for ours, want in ((sd.decode(z), exact.decode(z)), (preview_decoder(sd, folder)(z), exact.decode(z))):
        assert ours.dtype == mx.float32
        assert (0 < mx.abs(ours - want).max() <= 8 * EPS[name]) if is_safe else mx.array_equal(ours, want)


def test_the_type_in_python(sd1_folder):
    assert StableDiffusion(sd1_folder).dtype == mx.float32
    assert StableDiffusion(sd1_folder, True).dtype == StableDiffusion(sd1_folder, dtype=mx.float16).dtype == mx.float16
    assert "bfloat16" in repr(StableDiffusion(sd1_folder, dtype=mx.bfloat16))
    with pytest.raises(ValueError, match=r"float16=True and dtype=.*both choose the type; omit float16"):
        StableDiffusion(sd1_folder, float16=True, dtype=mx.bfloat16)
    for wrong in (mx.int8, "float16"):
        with pytest.raises(ValueError, match=r"is not supported; give mx\.float16, mx\.bfloat16 or mx\.float32"):
            StableDiffusion(sd1_folder, dtype=wrong)

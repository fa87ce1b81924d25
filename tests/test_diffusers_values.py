"""The numbers that diffusers' own tests expect, of its schedulers and of its pipelines, reproduced by this library.

Schedulers: their tests run a whole loop around the model ``sample * t / (t + 1)`` from a fixed sample, and hold the sum
and the mean of the result's absolute values. The following have no row: those with Lu sigmas, with thresholding and in
half precision, which are options that there are none of here; those that compare two runs and hold no number; those
that repeat another (``device``, ``switch``); PNDM's, which begin with Runge-Kutta steps, and DPMSolverSinglestep's, a
method that is not here; DPMSolverSDE's, whose noise is that of another library; LMS "from an image", where diffusers
takes a history of one slope for one of four.

Pipelines: their tests build small networks with the random weights of a seed (numbers from July 2026 on are for those
of transformers 5) and hold a corner of the picture. Without a row are the samplers PNDM, LMS and LCM, two prompts or
images at once, guidance rescaling, adapters and AutoencoderTiny.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stable_diffusion import StableDiffusion, StableDiffusionXL
from stable_diffusion.diffusion.denoiser import consistency, to_x0
from stable_diffusion.diffusion.samplers import SAMPLERS, run_options
from stable_diffusion.diffusion.schedule import Schedule, ScheduleConfig

STEPS = 10
TOLERANCE = 5e-4  # theirs is 1e-2, or 1e-3; their numbers are rounded to 1e-4
SHAPE = (4, 3, 8, 8)
_RAMP = np.arange(math.prod(SHAPE), dtype=np.float32) / math.prod(SHAPE)
SAMPLE, NOISE = (mx.array(ramp.reshape(3, 8, 8, 4).transpose(3, 0, 1, 2)) for ramp in (_RAMP, _RAMP[::-1].copy()))

# The schedulers of these have a ``scale_model_input`` and our state, x0 + sigma * noise; the others have it divided by
# sqrt(sigma^2 + 1). The loops of the tests overwrite the state of the former by its scaled value, and so does this one.
INPUT_IS_SCALED = {"euler", "euler_a", "heun", "dpm2", "dpm2_a", "lms"}


def seeded_noise() -> Callable[[tuple[int, ...]], np.ndarray]:
    """``draw(shape)``: the normal values, one after another, of the seed 0 of diffusers' tests."""
    generator = torch.Generator().manual_seed(0)
    return lambda shape: torch.randn(shape, generator=generator).numpy()


@dataclass(frozen=True)
class Loop:
    """A full loop: what it is run with, and the mean and the sum of the absolute values that it ends in.

    ``config`` is that of the checkpoint. With ``last`` the loop is a run's last steps, from the sample with noise
    added to it. ``clip`` keeps D in -1 ... 1, as the scheduler's ``clip_sample`` does.
    """

    name: str
    sampler: str
    mean: float
    total: float | None = None
    config: dict[str, Any] = field(default_factory=dict)
    last: int | None = None
    count: int = STEPS
    clip: bool = False
    tolerance: float = 1e-6  # relative, of the sum
    options: dict[str, Any] = field(default_factory=dict)


V = {"prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True}
FIRST = {"final_sigmas_type": "sigma_min"}
SECOND_ORDER = FIRST | {"lower_order_final": False}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LONG = {"num_train_timesteps": 1100}
LOOPS = [
    Loop("euler", "euler", 0.0131, 10.0807, LONG),
    Loop("euler, v", "euler", 2.2676e-06, 0.0002, LONG | V),
    Loop("euler, from an image", "euler", 74.3007, 57062.9297, LONG, last=2),
    Loop("euler_a", "euler_a", 0.1983, 152.3192, LONG),
    Loop("euler_a, v", "euler_a", 0.1412, 108.4439, LONG | V),
    Loop("euler_a, from an image", "euler_a", 73.1290, 56163.0508, LONG, last=2),
    Loop("ddim", "ddim", 0.223967, 172.0067),
    Loop("ddim, v", "ddim", 0.0684, 52.5302, V),
    Loop("ddim, ends at 0", "ddim", 0.1951, 149.8295, {"set_alpha_to_one": True, "beta_start": 0.01}),
    Loop("ddim, ends at the first sigma", "ddim", 0.1941, 149.0784, {"set_alpha_to_one": False, "beta_start": 0.01}),
    Loop("ddim, from an image", "ddim", 0.4616, 354.5418, last=2),
    Loop("ddpm", "ddpm", 0.3372, 258.9606, count=1000, clip=True),
    Loop("ddpm, v", "ddpm", 0.2631, 202.0296, V, count=1000, clip=True),
    # Its beta of the second timestep, 1 - a / b of float32 numbers near 1, has three digits; in float64 it is our sum.
    Loop("ddpm, from an image", "ddpm", 0.5051, 387.9466, count=1000, clip=True, last=2, tolerance=1e-4),
    Loop("euler, karras", "euler", 0.1621, 124.52299499511719, LONG | KARRAS),
    Loop("heun", "heun", 0.0002, 0.1233, LONG),
    Loop("heun, v", "heun", 6.1112e-10, 4.6934e-07, LONG | V),
    Loop("heun, karras", "heun", 1.9869554535034695e-07, 0.00015, LONG | KARRAS),
    Loop("heun, from an image", "heun", 97.7538, 75074.8906, LONG, last=2),
    Loop("dpm2", "dpm2", 0.0266, 20.4125, LONG),
    Loop("dpm2, v", "dpm2", 6.1112e-10, 4.6934e-07, LONG | V),
    Loop("dpm2, from an image", "dpm2", 91.6776, 70408.4062, LONG, last=2),
    Loop("dpm2_a", "dpm2_a", 18.2030, 13979.9433, LONG),
    Loop("dpm2_a, v", "dpm2_a", 0.4320, 331.8133, LONG | V),
    Loop("dpm2_a, from an image", "dpm2_a", 121.2074, 93087.3437, LONG, last=2),
    Loop("lms", "lms", 1.31, 1006.388, LONG),
    Loop("lms, v", "lms", 2.2676e-06, 0.0017, LONG | V),
    Loop("lms, karras", "lms", 4.9648, 3812.9927, LONG | KARRAS),
    Loop("dpmpp_2m", "dpmpp_2m", 0.3301, config=SECOND_ORDER),
    Loop("dpmpp_2m, v", "dpmpp_2m", 0.2251, config=SECOND_ORDER | V),
    Loop("dpmpp_2m, karras, v", "dpmpp_2m", 0.2096, config=SECOND_ORDER | V | KARRAS),
    Loop("dpmpp_2m, from an image", "dpmpp_2m", 0.4146, 318.4111, SECOND_ORDER, last=5),
    Loop("unipc", "unipc", 0.2464, config=FIRST),
    Loop("unipc, v", "unipc", 0.1014, config=FIRST | V),
    Loop("unipc, karras", "unipc", 0.2925, config=FIRST | KARRAS),
    Loop("unipc, karras, v", "unipc", 0.1966, config=FIRST | KARRAS | V),
    Loop("unipc, from an image", "unipc", 0.4109, 315.5757, FIRST, last=2),
    Loop("deis", "deis", 0.23916),
    Loop("deis, v", "deis", 0.091, config=V),
    Loop("deis, from an image", "deis", 0.41054, 315.3016, last=2),
    Loop("lcm, one step", "lcm", 0.0244, 18.7097, SCALED, count=1),
    Loop("lcm", "lcm", 0.2575, 197.7616, SCALED),
    Loop("tcd, one step", "tcd", 0.0389, 29.8715, SCALED, count=1, options={"eta": 0.0}),
    Loop("tcd", "tcd", 0.2359, 181.2040, SCALED, options={"eta": 0.0}),
]


def run(loop: Loop) -> np.ndarray:
    """Where ``loop`` ends, in the scale of the scheduler that it comes from."""
    schedule, sampler = Schedule(ScheduleConfig.from_dict(loop.config)), SAMPLERS[loop.sampler]
    steps = schedule.steps(loop.count, sampler.spacing_rule)
    scaled = loop.sampler in INPUT_IS_SCALED
    x = SAMPLE * schedule.initial_scale(steps, sampler.spacing_rule)
    if loop.last is not None:
        steps = steps.last(loop.last)
        x = (x if scaled else SAMPLE) + steps.sigmas[0] * NOISE

    def denoise(x: mx.array, sigma: float) -> mx.array:
        model_input = x / math.sqrt(sigma**2 + 1)
        if scaled:
            x[...] = model_input  # the sampler's own array
        t = schedule.timestep(sigma)
        x0 = to_x0(model_input * (t / (t + 1)), x, sigma, schedule.config.prediction_type)
        return mx.clip(x0, -1, 1) if loop.clip else x0

    draw = seeded_noise()
    noise = lambda step, shape: mx.array(draw(shape))  # noqa: E731
    options = run_options(sampler, schedule, steps, **loop.options)
    model = consistency(denoise, schedule) if sampler.consistency else denoise
    *_, end = sampler.run(model, x, steps.sigmas, noise, **options)
    return np.array(end) / (1 if scaled else math.sqrt(steps.sigmas[-1] ** 2 + 1))


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_full_loop(loop):
    absolute = np.abs(run(loop).astype(np.float64))
    assert absolute.mean() == pytest.approx(loop.mean, abs=1e-3)
    if loop.total is not None:  # its sums are float32, so the large ones are less certain than 1e-2
        assert absolute.sum() == pytest.approx(loop.total, rel=loop.tolerance, abs=1e-2)


@pytest.mark.parametrize(
    "t, target, variance",
    [(0, 0, 0.0), (420, 400, 0.14771), (980, 960, 0.32460), (487, 486, 0.00979), (999, 998, 0.02)],
)
def test_ddim_variance(t, target, variance):
    schedule = Schedule(ScheduleConfig())
    sigmas = [schedule.sigma(t), schedule.sigma(target)]
    unit_noise = SAMPLERS["ddim"].run(
        lambda x, sigma: x, mx.zeros(1), sigmas, lambda step, shape: mx.ones(shape), eta=1.0
    )
    assert next(unit_noise).item() ** 2 / (sigmas[1] ** 2 + 1) == pytest.approx(variance, abs=1e-5)


@pytest.mark.parametrize(
    "sampler, count, timesteps",
    [
        ("ddim", 5, range(801, 0, -200)),
        ("ddim", 10, range(901, 0, -100)),
        ("ddim", 25, range(961, 0, -40)),
        ("euler", 10, range(901, 0, -100)),
        ("euler", 25, range(961, 0, -40)),
        ("dpmpp_2m", 10, range(901, 90, -90)),
        ("dpmpp_2m", 25, range(951, 38, -38)),
    ],
)
def test_timesteps(sampler, count, timesteps):
    schedule = Schedule(ScheduleConfig(steps_offset=1))
    assert schedule.steps(count, SAMPLERS[sampler].spacing_rule, "leading").timesteps == tuple(timesteps)


# Their tokenizer is that of "hf-internal-testing/tiny-random-clip". These are the tokens that the prompt is made of.
PROMPT = "A painting of a squirrel eating a burger"
TOKENS = {letter: 66 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")} | {
    "<|startoftext|>": 0,
    "<|endoftext|>": 1,
    "a</w>": 197,
    "l</w>": 201,
    "r</w>": 204,
    "f</w>": 209,
    "g</w>": 214,
}
MERGES = {
    "i n": 358,
    "r e": 367,
    "a t": 372,
    "e r</w>": 374,
    "in g</w>": 383,
    "u r": 413,
    "i r": 453,
    "q u": 546,
    "a in": 568,
    "t ing</w>": 676,
    "at ing</w>": 922,
}

UNET = {
    "block_out_channels": (32, 64),
    "sample_size": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
}
UNET_2 = UNET | {"attention_head_dim": (2, 4), "use_linear_projection": True}
UNET_XL = UNET_2 | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 5 * 8 + 32,
}
TINY = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
TINIER = {"block_out_channels": (2, 4), "norm_num_groups": 1, "projection_class_embeddings_input_dim": 6 * 8 + 32}
VAE = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
TEXT = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 5}
TEXT_2 = TEXT | {"hidden_act": "gelu", "projection_dim": 32}
TINY_TEXT = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}

# UNet, autoencoder, first and second text encoder.
FAMILIES = {
    "sd1": (UNET | TINY | {"cross_attention_dim": 8}, VAE | TINY, TINY_TEXT, None),
    "sd1 img2img": (UNET, VAE, TEXT, None),
    "sd2": (UNET_2, VAE, TEXT_2, None),
    "xl": (UNET_XL | TINIER, VAE, TEXT_2, TEXT_2),
    "xl img2img": (UNET_XL, VAE, TEXT_2, TEXT_2),
    "refiner": (UNET_XL | {"cross_attention_dim": 32}, VAE, None, TEXT_2),
}

# Whatever a scheduler says, their pipelines of SD 1 and 2 replace a steps_offset of 0 by 1.
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
DDIM = SCALED | {"set_alpha_to_one": False}
XL = SCALED | {"timestep_spacing": "leading"}


@dataclass(frozen=True)
class Picture:
    """Two steps with the seed 0, and the blue channel of the last three rows and columns of what they make.

    ``scheduler`` is the class that the checkpoint names, ``config`` what it says of it. ``strength`` is that of image
    to image, None for text to image.
    """

    family: str
    scheduler: str
    config: dict[str, Any]
    corner: tuple[float, ...]
    guidance: float = 6.0
    size: int = 64
    strength: float | None = None


# fmt: off
PICTURES = [
    Picture("sd1", "DDIMScheduler", DDIM,
            (0.1641, 0.4640, 0.4864, 0.2683, 0.3652, 0.4507, 0.5290, 0.3307, 0.3977)),
    Picture("sd1", "DDIMScheduler", DDIM,
            (0.4587, 0.5238, 0.5006, 0.3869, 0.4538, 0.4228, 0.5666, 0.5814, 0.5468), size=136),
    Picture("sd1", "EulerDiscreteScheduler", SCALED,
            (0.2185, 0.4538, 0.4660, 0.2454, 0.4408, 0.4377, 0.5629, 0.3754, 0.3927)),
    Picture("sd1", "EulerAncestralDiscreteScheduler", SCALED,
            (0.2185, 0.4534, 0.4657, 0.2452, 0.4406, 0.4375, 0.5631, 0.3755, 0.3927)),
    # The one step of this run is the first of LMS, which is Euler's.
    Picture("sd1 img2img", "LMSDiscreteScheduler", SCALED,
            (0.4409, 0.4952, 0.4357, 0.6574, 0.5583, 0.4375, 0.5777, 0.5960, 0.5168), size=32, strength=0.8),
    Picture("sd2", "DDIMScheduler", DDIM,
            (0.5679, 0.6010, 0.5052, 0.5159, 0.5389, 0.4739, 0.5074, 0.4872, 0.4843)),
    Picture("sd2", "EulerDiscreteScheduler", SCALED,
            (0.4767, 0.5389, 0.4766, 0.5015, 0.5585, 0.4859, 0.5341, 0.5041, 0.5073)),
    Picture("sd2", "EulerAncestralDiscreteScheduler", SCALED,
            (0.4766, 0.5390, 0.4768, 0.5013, 0.5585, 0.4859, 0.5338, 0.5041, 0.5075)),
    Picture("sd2", "DDIMScheduler", DDIM | V,
            (0.6308, 0.6095, 0.5343, 0.5073, 0.4634, 0.4632, 0.4967, 0.4885, 0.4489)),
    Picture("sd2", "EulerDiscreteScheduler", SCALED | V,
            (0.5419, 0.5719, 0.5558, 0.5034, 0.4559, 0.5026, 0.4736, 0.4782, 0.4725)),
    Picture("xl", "EulerDiscreteScheduler", XL,
            (0.5556, 0.5318, 0.4649, 0.4321, 0.4824, 0.4624, 0.5183, 0.4981, 0.4692), guidance=5.0),
    Picture("xl img2img", "EulerDiscreteScheduler", XL,
            (0.4555, 0.4937, 0.4329, 0.6746, 0.5620, 0.4489, 0.5854, 0.5960, 0.5203),
            guidance=5.0, size=32, strength=0.8),
    Picture("refiner", "EulerDiscreteScheduler", XL,
            (0.4692, 0.4957, 0.4337, 0.6666, 0.5656, 0.4461, 0.5742, 0.5932, 0.5162),
            guidance=5.0, size=32, strength=0.8),
]
# fmt: on


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def write_checkpoint(folder: Path, picture: Picture) -> StableDiffusion:
    """The networks of a family with the seeded weights that diffusers' tests give them, saved and read."""
    unet, vae, text, text_2 = FAMILIES[picture.family]
    xl = text_2 is not None
    # None of their config's ids is a token in use, except that the end-of-text id 2 stands for the highest.
    ids = {"vocab_size": 1000, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    merged = {merge.replace(" ", ""): id_ for merge, id_ in MERGES.items()}
    parts: dict[str, Any] = {}
    torch.manual_seed(0)
    parts["unet"] = UNet2DConditionModel(**unet)
    torch.manual_seed(0)
    parts["vae"] = AutoencoderKL(**vae, latent_channels=4)
    torch.manual_seed(0)  # once for both encoders
    if text is not None:
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**ids, **text))
    if text_2 is not None:
        parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**ids, **text_2))
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"}
    index |= {"force_zeros_for_empty_prompt": xl, "requires_aesthetics_score": xl and picture.strength is not None}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = ["", type(part).__name__]
        if name.startswith("text_encoder"):
            tokenizer = name.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["", "CLIPTokenizer"]
            write_json(folder / tokenizer / "vocab.json", TOKENS | merged)
            (folder / tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]))
    index["scheduler"] = ["", picture.scheduler]
    write_json(folder / "scheduler" / "scheduler_config.json", picture.config)
    write_json(folder / "model_index.json", index)
    return (StableDiffusionXL if xl else StableDiffusion)(folder)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: f"{p.family}, {p.scheduler}, {p.size}")
def test_picture(tmp_path, picture):
    sd = write_checkpoint(tmp_path, picture)
    draw, side = seeded_noise(), picture.size // sd.pixels_per_latent

    def noise(*_) -> mx.array:
        return mx.array(draw((1, 4, side, side))).transpose(0, 2, 3, 1)

    common = {"num_steps": 2, "cfg_weight": picture.guidance, "noise": noise}
    if picture.strength is None:
        steps = sd.generate_latents(PROMPT, latent_size=(side, side), latents=noise(), **common)
    else:
        encode, posterior = sd.autoencoder.encode, noise()

        def encode_and_sample(x: mx.array, *run: Any) -> tuple[mx.array, mx.array]:
            mean, logvar = encode(x, *run)
            return mean + mx.exp(logvar / 2) * posterior, logvar

        sd.autoencoder.encode = encode_and_sample
        uniform = random.Random(0).random  # their picture is half of these values and a half, of 0 ... 1
        image = np.array([uniform() for _ in range(3 * picture.size**2)]).reshape(3, picture.size, -1)
        image = mx.array(image.transpose(1, 2, 0), dtype=mx.float32)
        steps = sd.generate_latents_from_image(image, PROMPT, strength=picture.strength, latents=noise(), **common)
    *_, x_0 = steps
    corner = np.array(sd.decode(x_0))[0, -3:, -3:, -1]
    assert corner.ravel().tolist() == pytest.approx(picture.corner, abs=TOLERANCE)

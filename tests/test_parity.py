"""Whole pipelines against diffusers: every step's latents, and the images within one level."""

import json

import diffusers
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from checkpoints import SCALED, Recorder, compare, encoded_mean, make
from oracle import nchw, normal, relative_error
from stable_diffusion import SizeConditioning, StableDiffusion, StableDiffusionXL

PROMPT, NEGATIVE = "the red cat on the blue — café 猫", "the blue"


SCHEDULERS = {
    "euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "ddim": (diffusers.DDIMScheduler, {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
}


# diffusers' ancestral sampler does not know models that predict the sample.
RUNS = [(*model, s) for model in (("sd1", "epsilon"), ("sd2-v", "v_prediction")) for s in SCHEDULERS]
RUNS += [("sd2", "sample", s) for s in SCHEDULERS if s != "euler_a"]


@pytest.mark.parametrize("family, prediction, sampler", RUNS)
def test_text_to_image(tmp_path, family, prediction, sampler):
    scheduler_class, options = SCHEDULERS[sampler]
    pipe = make(tmp_path / "sd", family, scheduler_class(**SCALED, prediction_type=prediction, **options))
    latents, added = normal(2, 8, 12, 4, seed=1), normal(5, 2, 8, 12, 4, seed=2)
    recorder = Recorder(pipe, added)
    images = recorder(
        prompt=[PROMPT] * 2,
        negative_prompt=[NEGATIVE] * 2,
        height=64,
        width=96,
        num_inference_steps=5,
        guidance_scale=5.0,
        latents=nchw(latents),
    )
    sd = StableDiffusion(tmp_path / "sd")
    assert sd.sampler == sampler
    steps = list(
        sd.generate_latents(
            PROMPT,
            n_images=2,
            num_steps=5,
            cfg_weight=5.0,
            negative_text=NEGATIVE,
            latent_size=(8, 12),
            latents=mx.array(latents),
            noise=lambda step, shape: mx.array(added[step]),
        )
    )
    compare(steps, recorder, images, sd.decode)


def test_an_old_offset_is_read_as_diffusers_reads_it(tmp_path):
    """Its pipelines for SD 1 and 2 put 1 in the place of any other offset."""
    pipe = make(tmp_path / "sd", "sd1", diffusers.DDIMScheduler(**SCALED, set_alpha_to_one=False, clip_sample=False))
    old = json.loads((tmp_path / "sd/scheduler/scheduler_config.json").read_text()) | {"steps_offset": 0}
    (tmp_path / "sd/scheduler/scheduler_config.json").write_text(json.dumps(old))
    assert pipe.scheduler.config.steps_offset == 1
    latents, recorder = normal(1, 8, 8, 4, seed=1), Recorder(pipe)
    images = recorder(prompt=PROMPT, height=64, width=64, num_inference_steps=3, latents=nchw(latents))
    sd = StableDiffusion(tmp_path / "sd")
    ours = sd.generate_latents(PROMPT, num_steps=3, latent_size=(8, 8), latents=mx.array(latents))
    compare(list(ours), recorder, images, sd.decode)


@pytest.mark.parametrize("guidance, negative", [(5.0, NEGATIVE), (5.0, ""), (0.0, "")])
def test_xl_text_to_image(tmp_path, guidance, negative):
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1)
    pipe = make(tmp_path / "xl", "xl", scheduler, force_zeros_for_empty_prompt=True)
    latents = normal(1, 8, 12, 4, seed=1)
    recorder = Recorder(pipe)
    images = recorder(
        prompt=PROMPT,
        negative_prompt=negative or None,
        height=64,
        width=96,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=nchw(latents),
        original_size=(100, 200),
        crops_coords_top_left=(3, 4),
    )
    sd = StableDiffusionXL(tmp_path / "xl")
    steps = list(
        sd.generate_latents(
            PROMPT,
            num_steps=4,
            cfg_weight=guidance,
            negative_text=negative,
            latent_size=(8, 12),
            latents=mx.array(latents),
            micro=SizeConditioning(original_size=(100, 200), crop=(3, 4)),
        )
    )
    compare(steps, recorder, images, sd.decode)


def test_image_to_image(tmp_path):
    scheduler = diffusers.DDIMScheduler(**SCALED, set_alpha_to_one=False, steps_offset=1, clip_sample=False)
    parts = make(tmp_path / "sd", "sd1", scheduler).components
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    check_image_to_image(pipe, StableDiffusion(tmp_path / "sd"), steps=10, strength=0.45)


def test_xl_refiner_image_to_image(tmp_path):
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1)
    pipe = make(tmp_path / "xl", "refiner", scheduler, force_zeros_for_empty_prompt=False)
    check_image_to_image(pipe, StableDiffusionXL(tmp_path / "xl"), steps=8, strength=0.3)


def check_image_to_image(pipe, sd: StableDiffusion, steps: int, strength: float) -> None:
    encoded_mean(pipe)
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    noise = normal(1, 8, 12, 4, seed=1)
    recorder = Recorder(pipe)
    module = type(pipe).__module__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{module}.randn_tensor", lambda shape, **_: nchw(noise))
        images = recorder(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            image=picture,
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=5.0,
        )
    ours = sd.generate_latents_from_image(
        picture,
        PROMPT,
        strength=strength,
        num_steps=steps,
        cfg_weight=5.0,
        negative_text=NEGATIVE,
        latents=mx.array(noise),
    )
    compare(list(ours), recorder, images, sd.decode)


def test_latent_consistency_model(tmp_path):
    """The UNet that takes the guidance scale as an input; Euler stands in for the sampler."""
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, timestep_spacing="trailing")
    pipe = make(tmp_path / "lcm", "lcm", scheduler)
    latents = normal(1, 8, 8, 4, seed=1)
    recorder = Recorder(pipe)
    images = recorder(
        prompt=PROMPT, height=64, width=64, num_inference_steps=3, guidance_scale=8.5, latents=nchw(latents)
    )
    sd = StableDiffusion(tmp_path / "lcm")
    ours = sd.generate_latents(PROMPT, num_steps=3, cfg_weight=8.5, latent_size=(8, 8), latents=mx.array(latents))
    compare(list(ours), recorder, images, sd.decode)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip(tmp_path, clip_skip):
    pipe = make(tmp_path / "sd", "sd1", diffusers.DDIMScheduler(**SCALED))
    ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    want = pipe.text_encoder.final_layer_norm(states[-1 - clip_skip])  # as its pipelines do
    sd = StableDiffusion(tmp_path / "sd")
    assert relative_error(sd.encode_prompt(PROMPT, clip_skip=clip_skip).context, want) <= 1e-4


def test_a_folder_as_transformers_5_writes_it(tmp_path):
    """Its tokenizer is one tokenizer.json, without vocab.json and merges.txt."""
    pipe = make(tmp_path / "sd", "sd2", diffusers.DDIMScheduler(**SCALED))
    want = StableDiffusion(tmp_path / "sd").encode_prompt(PROMPT).context
    pipe.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again/tokenizer/vocab.json").exists()
    assert np.array_equal(StableDiffusion(tmp_path / "again").encode_prompt(PROMPT).context, want)

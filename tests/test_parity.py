"""Whole pipelines against diffusers: every step's latents, and the images within one level."""

import json

import diffusers
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from checkpoints import PROMPT, SCALED, Recorder, both, compare, encoded_mean, make
from oracle import nchw, normal, relative_error
from stable_diffusion import SizeConditioning, StableDiffusion, StableDiffusionXL

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
    sd = StableDiffusion(tmp_path / "sd")
    assert sd.sampler == sampler
    both(pipe, sd, steps=4, n_images=2, added=True)


def test_an_old_offset_is_read_as_diffusers_reads_it(tmp_path):
    """Its pipelines for SD 1 and 2 put 1 in the place of any other offset."""
    pipe = make(tmp_path / "sd", "sd1", diffusers.DDIMScheduler(**SCALED, set_alpha_to_one=False, clip_sample=False))
    old = json.loads((tmp_path / "sd/scheduler/scheduler_config.json").read_text()) | {"steps_offset": 0}
    (tmp_path / "sd/scheduler/scheduler_config.json").write_text(json.dumps(old))
    assert pipe.scheduler.config.steps_offset == 1
    both(pipe, StableDiffusion(tmp_path / "sd"), steps=3)


# What files of 2022 have, and what they leave to their class.
BARE = {
    "PNDM": SCALED | {"skip_prk_steps": True},
    "DDIM": SCALED,
    "LMSDiscrete": SCALED,
    "HeunDiscrete": {},
    "EulerDiscrete": SCALED | {"num_train_timesteps": 500},
}


@pytest.mark.parametrize("family, name", [*(("sd1", name) for name in BARE), ("xl", "DDIM")])
def test_a_file_with_few_settings(tmp_path, family, name):
    """The images are compared, as some of these take more evaluations than steps; in XL a bare DDIM clips x0."""
    pipe = make(tmp_path / "sd", family, getattr(diffusers, f"{name}Scheduler")(**BARE[name]))
    bare = json.dumps({"_class_name": f"{name}Scheduler"} | BARE[name])
    (tmp_path / "sd/scheduler/scheduler_config.json").write_text(bare)
    noise = normal(1, 8, 12, 4, seed=1)
    recorder, run = Recorder(pipe), {"num_inference_steps": 5, "guidance_scale": 5.0}
    images = recorder(prompt=PROMPT, latents=nchw(noise), height=64, width=96, **run)
    recorder.steps = recorder.steps[-1:]
    sd = StableDiffusion(tmp_path / "sd")
    *_, x = sd.generate_latents(PROMPT, num_steps=5, cfg_weight=5.0, latents=mx.array(noise), latent_size=(8, 12))
    compare([x], recorder, images, sd.decode)


@pytest.mark.parametrize("guidance, negative", [(5.0, "the blue"), (5.0, ""), (0.0, "")])
def test_xl_text_to_image(tmp_path, guidance, negative):
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1)
    pipe = make(tmp_path / "xl", "xl", scheduler, force_zeros_for_empty_prompt=True)
    given = {"original_size": (100, 200), "crops_coords_top_left": (3, 4)}
    micro = SizeConditioning(original_size=(100, 200), crop=(3, 4))
    sd = StableDiffusionXL(tmp_path / "xl")
    both(pipe, sd, steps=2, guidance=guidance, negative_text=negative, micro=micro, theirs=given)


@pytest.mark.parametrize(
    "negative, seconds",
    [
        ("the blue", {"prompt_2": "a cat", "negative_prompt_2": "the red"}),
        ("the blue", {"prompt_2": "a cat"}),
        ("", {"prompt_2": "a cat"}),  # zeros
        ("the blue", {"negative_prompt_2": "the red"}),
    ],
)
def test_a_prompt_for_the_second_encoder(tmp_path, negative, seconds):
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1)
    pipe = make(tmp_path / "xl", "xl", scheduler, force_zeros_for_empty_prompt=True)
    both(pipe, StableDiffusionXL(tmp_path / "xl"), steps=2, negative_text=negative, theirs=seconds, **seconds)


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_freeu(tmp_path, family):
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1)
    pipe = make(tmp_path / "sd", family, scheduler)
    pipe.enable_freeu(b1=1.5, b2=1.6, s1=0.9, s2=0.2)
    both(pipe, StableDiffusion(tmp_path / "sd"), steps=2, n_images=2, freeu=(1.5, 1.6, 0.9, 0.2))


def test_sizes_of_the_negative_prompt(tmp_path):
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1)
    pipe = make(tmp_path / "xl", "xl", scheduler)
    sizes = {"original_size": (100, 200), "target_size": (50, 60)}
    negative = {"negative_original_size": (64, 32), "negative_target_size": (70, 80)}
    theirs = sizes | negative
    theirs |= {"crops_coords_top_left": (3, 4), "negative_crops_coords_top_left": (5, 6)}
    ours = SizeConditioning(**sizes, **negative, crop=(3, 4), negative_crop=(5, 6))
    both(pipe, StableDiffusionXL(tmp_path / "xl"), steps=2, size_conditioning=ours, theirs=theirs)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 96, 3), dtype=np.uint8))


def test_image_to_image(tmp_path):
    scheduler = diffusers.DDIMScheduler(**SCALED, set_alpha_to_one=False, steps_offset=1, clip_sample=False)
    parts = make(tmp_path / "sd", "sd1", scheduler).components
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    encoded_mean(pipe)
    both(pipe, StableDiffusion(tmp_path / "sd"), image=picture(), steps=10, strength=0.45)


def test_xl_refiner_image_to_image(tmp_path):
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1)
    pipe = make(tmp_path / "xl", "refiner", scheduler, force_zeros_for_empty_prompt=False)
    encoded_mean(pipe)
    both(pipe, StableDiffusionXL(tmp_path / "xl"), image=picture(), steps=8, strength=0.3)


def test_latent_consistency_model(tmp_path):
    """The UNet that takes the guidance scale as an input; Euler stands in for the sampler."""
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, timestep_spacing="trailing")
    pipe = make(tmp_path / "lcm", "lcm", scheduler)
    both(pipe, StableDiffusion(tmp_path / "lcm"), steps=3, guidance=8.5, negative_text="")


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

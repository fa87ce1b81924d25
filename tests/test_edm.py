"""Models of EDM (Karras et al. 2022), as Playground 2.5 and CosXL, against diffusers: folders and single files."""

import diffusers
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from checkpoints import PROMPT, both, encoded_mean, make
from configs import UNETS
from models.test_vae import CONFIGS
from oracle import last, normal, relative_error
from stable_diffusion import StableDiffusionXL
from stable_diffusion.diffusion.samplers import SAMPLERS

V = {"prediction_type": "v_prediction"}
COSXL = V | {"sigma_schedule": "exponential", "sigma_max": 120.0, "sigma_data": 1.0}
SCHEDULERS = {
    "Playground 2.5": diffusers.EDMDPMSolverMultistepScheduler(),
    "third order, v": diffusers.EDMDPMSolverMultistepScheduler(**V, solver_order=3),
    "sde": diffusers.EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "euler": diffusers.EDMEulerScheduler(),
    "CosXL": diffusers.EDMEulerScheduler(**COSXL),
}


def made(folder, scheduler, **more):
    return make(folder, "xl", scheduler, vae=CONFIGS["normalized"], force_zeros_for_empty_prompt=True, **more)


def picture(size=(64, 96), seed=5) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_text_to_image(tmp_path, name):
    pipe = made(tmp_path / "xl", SCHEDULERS[name])
    both(pipe, StableDiffusionXL(tmp_path / "xl"), steps=5, n_images=2, added=name == "sde")


@pytest.mark.parametrize("name", ["Playground 2.5", "CosXL"])
def test_image_to_image(tmp_path, name):
    parts = made(tmp_path / "xl", SCHEDULERS[name]).components
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    encoded_mean(pipe)
    both(pipe, StableDiffusionXL(tmp_path / "xl"), image=picture(), steps=8, strength=0.4)


def test_instructions_are_refused(tmp_path):
    make(tmp_path / "xl", "xl", SCHEDULERS["CosXL"], unet=UNETS["xl"] | {"in_channels": 8})
    with pytest.raises(ValueError, match="CosXL Edit, an EDM model for instructions, is not supported"):
        StableDiffusionXL(tmp_path / "xl")


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> StableDiffusionXL:
    folder = tmp_path_factory.mktemp("xl")
    made(folder, SCHEDULERS["Playground 2.5"])
    return StableDiffusionXL(folder)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_along_the_models_curve(sd, sampler):
    options = {"num_steps": 4, "cfg_weight": 1.0, "latent_size": (4, 4), "seed": 1, "sampler": sampler}
    steps = sd.schedule.steps(4, SAMPLERS[sampler].spacing_rule)
    assert steps.sigmas[0] == pytest.approx(80) and steps.sigmas[3] == pytest.approx(0.002)
    assert steps == sd.schedule.steps(4, SAMPLERS[sampler].spacing_rule, schedule="karras")
    assert 0.1 < np.abs(last(sd.generate_latents(PROMPT, **options))).max() < 100


def test_methods_meet_in_the_solution(sd):
    options = {"cfg_weight": 1.0, "latent_size": (4, 4), "seed": 1}
    want = last(sd.generate_latents(PROMPT, num_steps=40, sampler="heun", **options))
    for sampler, bound in (("dpmpp_2m", 0.02), ("unipc", 0.02), ("lms", 0.02), ("euler", 0.1)):
        assert relative_error(last(sd.generate_latents(PROMPT, num_steps=40, sampler=sampler, **options)), want) < bound


def test_a_mask_keeps_the_rest(sd):
    image = mx.clip(mx.array(normal(64, 64, 3)), -1, 1)
    mask = mx.concatenate([mx.zeros((64, 32)), mx.ones((64, 32))], axis=1)
    latents = last(sd.generate_latents_from_image(image, PROMPT, num_steps=4, mask=mask, seed=1))
    x0 = np.array(sd.encode(image[None]))
    assert relative_error(latents[:, :, :4], x0[:, :, :4]) < 1e-5 < relative_error(latents[:, :, 4:], x0[:, :, 4:])

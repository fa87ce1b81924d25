"""Whole pictures against diffusers from the same seeds: no noise is injected, each image has a generator of torch."""

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch

from checkpoints import NEGATIVE, PROMPT, SCALED, make
from oracle import last, nchw, normal, relative_error
from stable_diffusion import Options, StableDiffusion
from stable_diffusion.diffusion.generators import NOISE_SOURCES, CudaGenerator
from test_parity_images import EULER_A, mask, picture, reference

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch rounds otherwise"
)
SEEDS = [7, 2**32 + 8]
PLAIN = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
SDE = {"algorithm_type": "sde-dpmsolver++"}
KARRAS = {"use_karras_sigmas": True}
SAMPLERS = {  # the scheduler, its config, and eta
    "euler": (diffusers.EulerDiscreteScheduler, {}, None),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}, None),
    "dpm2_a": (diffusers.KDPM2AncestralDiscreteScheduler, {}, None),
    "ddim": (diffusers.DDIMScheduler, PLAIN, 0.7),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}, None),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, SDE, None),
    "dpmpp_2m_sde of order 1": (diffusers.DPMSolverMultistepScheduler, SDE | {"solver_order": 1}, None),
    "dpmpp_2m_sde of order 3": (diffusers.DPMSolverMultistepScheduler, SDE | {"solver_order": 3}, None),
    "dpmpp_2m_sde on the noise": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        None,
    ),
    "dpmpp_2s": (diffusers.DPMSolverSinglestepScheduler, SDE, None),
    "dpmpp_sde": (diffusers.DPMSolverSDEScheduler, {"noise_sampler_seed": SEEDS}, None),
    "dpmpp_sde on another curve": (diffusers.DPMSolverSDEScheduler, KARRAS | {"noise_sampler_seed": SEEDS}, None),
    "sa_solver": (diffusers.SASolverScheduler, {}, None),
    "lcm": (diffusers.LCMScheduler, {}, None),
    "tcd": (diffusers.TCDScheduler, {}, 0.4),
}


def agree(pipe, sd, image=None, theirs=(), **ours) -> None:
    """Draw two images of ``SEEDS`` with both: latents and pictures must agree. ``theirs`` is for diffusers alone."""
    size = {"height": 64, "width": 96} if image is None else {"image": [image] * 2}
    run = size | {"guidance_scale": 5.0, "num_inference_steps": 4} | dict(theirs)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    texts = {"prompt": [PROMPT] * 2, "negative_prompt": [NEGATIVE] * 2}
    latents = pipe(**texts, **run, generator=generators, output_type="latent").images
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.permute(0, 2, 3, 1)
    keywords = {"num_steps": 4, "cfg_weight": 5.0, "n_images": 2, "negative_text": NEGATIVE, "seed": SEEDS}
    keywords |= {"noise_source": "torch"} | ours
    if image is None:
        x = last(sd.generate_latents(PROMPT, latent_size=(8, 12), **keywords))
    else:
        x = last(sd.generate_latents_from_image(image, PROMPT, **keywords))
    assert relative_error(x, latents.permute(0, 2, 3, 1)) <= 1e-3
    levels = np.round(np.array(sd.decode(mx.array(x))) * 255) - np.round((decoded / 2 + 0.5).clamp(0, 1).numpy() * 255)
    assert np.abs(levels).max() <= 1


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # of diffusers' KDPM2 schedulers
@pytest.mark.filterwarnings("ignore:Should have t")  # of torchsde, for levels beyond its rounded ends
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_picture_of_diffusers_from_a_seed(tmp_path, sampler):
    """The noise of DPMSolverSDE is from seeds of its own, in place of the generators."""
    scheduler_class, config, eta = SAMPLERS[sampler]
    pipe = make(tmp_path / "sd", "sd1", scheduler_class(**SCALED, **config))
    sd = StableDiffusion(tmp_path / "sd")
    assert sd.sampler == sampler.split()[0]
    agree(pipe, sd, theirs={} if eta is None else {"eta": eta}, eta=eta)


IMAGE_RUNS = {
    "image": ("sd1", diffusers.StableDiffusionImg2ImgPipeline, {"strength": 0.5}),
    "mask": ("sd1", diffusers.StableDiffusionInpaintPipeline, {"mask": mask(), "strength": 0.5}),
    "mask over noise": ("sd1", diffusers.StableDiffusionInpaintPipeline, {"mask": mask(), "strength": 1.0}),
    "model for masks": ("inpaint", diffusers.StableDiffusionInpaintPipeline, {"mask": mask(), "strength": 0.5}),
    "that, over noise": ("inpaint", diffusers.StableDiffusionInpaintPipeline, {"mask": mask(), "strength": 1.0}),
    "instructions": ("pix2pix", diffusers.StableDiffusionInstructPix2PixPipeline, {}),
    "depth": ("depth", diffusers.StableDiffusionDepth2ImgPipeline, {"strength": 0.5, "depth": normal(1, 64, 96)}),
}


@pytest.mark.parametrize("kind", IMAGE_RUNS)
def test_an_image_that_is_changed_as_diffusers_changes_it(tmp_path, kind):
    """Each encoding of an image draws from the generator too."""
    family, pipeline, given = IMAGE_RUNS[kind]
    pipe = reference(tmp_path / "sd", family, EULER_A, pipeline)
    theirs = {name: given[name] for name in ("strength",) if name in given}
    theirs |= {"mask_image": [given["mask"]] * 2, "height": 64, "width": 96} if "mask" in given else {}
    theirs |= {"depth_map": torch.from_numpy(given["depth"]).repeat(2, 1, 1)} if "depth" in given else {}
    ours = given | ({"depth": given["depth"][0]} if "depth" in given else {})
    agree(pipe, StableDiffusion(tmp_path / "sd"), picture(), theirs, **ours)


@pytest.mark.filterwarnings("ignore:Should have t")
def test_a_brownian_motion_goes_over_the_whole_run(tmp_path):
    """Also where the first steps are left out, for an image."""
    sde = diffusers.DPMSolverSDEScheduler, {"noise_sampler_seed": SEEDS}
    pipe = reference(tmp_path / "sd", "sd1", sde, diffusers.StableDiffusionImg2ImgPipeline)
    agree(pipe, StableDiffusion(tmp_path / "sd"), picture(), {"strength": 0.5}, strength=0.5)


def test_latents_that_are_changed_draw_for_no_encoding(tmp_path):
    pipe = reference(tmp_path / "sd", "sd1", EULER_A, diffusers.StableDiffusionImg2ImgPipeline)
    x, theirs = normal(1, 8, 12, 4), {"strength": 0.5}
    agree(
        pipe,
        StableDiffusion(tmp_path / "sd"),
        mx.array(x),
        {"image": nchw(x).repeat(2, 1, 1, 1), **theirs},
        strength=0.5,
    )


def test_cuda_draws_nothing_for_an_encoding(sd):
    """Nor does A1111's web UI from these generators; the first noise and that of each step follow each other."""
    run = sd._plan(Options(noise_source="cuda"), 3, (5,))
    run.pass_encoding((4, 6, 4))
    draws = [run.initial_noise((4, 6, 4)), run.step_noise(0, (1, 4, 6, 4)), run.step_noise(7, (1, 4, 6, 4))]
    generator = CudaGenerator(5)
    for x in draws:
        assert np.array_equal(np.array(x)[0].transpose(2, 0, 1).reshape(-1), generator.normal(96))


@pytest.mark.parametrize("delta", [31337, -31337])
@pytest.mark.parametrize("source", NOISE_SOURCES)
def test_the_seed_of_added_noise(sd, source, delta):
    """It is the seed and the delta, as in A1111's web UI, where a generator begins again. The first noise stays."""
    shape, options = (4, 6, 4), Options(noise_source=source, eta_noise_seed_delta=delta)
    runs = [sd._plan(options, 3, (5,)), sd._plan(Options(noise_source=source), 3, ((5 + delta) % 2**64,))]
    first, other_first = (np.array(run.initial_noise(shape)) for run in runs)
    added, other_added = (np.array(run.step_noise(0, (1, *shape))) for run in runs)
    alone = sd._plan(Options(noise_source=source), 3, (5,))
    assert np.array_equal(first, alone.initial_noise(shape)) and not np.array_equal(first, other_first)
    assert np.array_equal(added, other_added if source == "mlx" else other_first)


def turned(low: np.ndarray, high: np.ndarray, share: float) -> torch.Tensor:
    """The noise of an image [C, h, w] and that of its variation seed, by the formula of A1111's web UI (rng.slerp)."""
    low, high = torch.from_numpy(low).double(), torch.from_numpy(high).double()
    cosine = torch.nn.functional.cosine_similarity(low, high, dim=1)
    angle = torch.acos(cosine)[:, None]
    return (torch.sin((1 - share) * angle) * low + torch.sin(share * angle) * high) / torch.sin(angle)


@pytest.mark.parametrize("source", NOISE_SOURCES)
def test_noise_between_two_seeds(sd, source):
    """The noise that samplers add stays that of the seed."""
    shape, given = (8, 6, 4), {"noise_source": source, "variation_seed": [9, 4]}
    low, other, high, high_2 = (
        np.array(sd._plan(Options(noise_source=source), 3, seed).initial_noise(shape)) for seed in (5, 6, 9, 4)
    )
    for share in (0, 0.001, 0.3, 1):
        run = sd._plan(Options(variation_strength=share, **given), 3, 5, 2)
        noise = np.array(run.initial_noise(shape))
        if share in (0, 1):
            assert np.array_equal(noise, np.concatenate([high, high_2] if share else [low, other]))
            continue
        for x, end in zip(noise, (high, high_2), strict=True):
            want = turned(low[0].transpose(2, 0, 1), end[0].transpose(2, 0, 1), share)
            assert relative_error(x, want.permute(1, 2, 0)) <= 2e-6
        alone = sd._plan(Options(noise_source=source), 3, (5, 5), 2)
        alone.initial_noise(shape)
        assert np.array_equal(run.step_noise(0, (2, *shape)), alone.step_noise(0, (2, *shape)))


def test_the_seeds_of_variations(sd):
    """All images have the seed, and their variation seeds count on, as in a batch of A1111's web UI."""
    plans = [
        (Options(variation_seed=7, variation_strength=0.5), 3, (3, 3, 3), (7, 8, 9)),
        (Options(variation_seed=(7, 7, 2), variation_strength=0.5), (3, 9, 3), (3, 9, 3), (7, 7, 2)),
        (Options(variation_seed=7), 3, (3, 4, 5), ()),
    ]
    for options, seed, seeds, variations in plans:
        run = sd._plan(options, 3, seed, 3)
        assert (run.seeds, run.variation_seeds) == (seeds, variations)
    drawn = [sd._plan(Options(variation_strength=0.5), 3, 3, 1).variation_seeds for _ in range(2)]
    assert drawn[0] != drawn[1]
    with pytest.raises(ValueError, match="2 seeds for 3 images"):
        sd._plan(Options(variation_seed=(1, 2), variation_strength=0.5), 3, 3, 3)


def test_a_variation_of_the_seed_by_itself_is_the_seed(sd):
    same = Options(variation_seed=5, variation_strength=0.4)
    noises = [np.array(sd._plan(options, 3, 5).initial_noise((8, 6, 4))) for options in (same, Options())]
    assert relative_error(*noises) <= 1e-6


@pytest.mark.parametrize("source", NOISE_SOURCES)
def test_an_image_does_not_depend_on_its_batch_nor_on_runs_beside_it(sd, source):
    given = {"num_steps": 3, "latent_size": (4, 6), "sampler": "euler_a", "noise_source": source}
    runs = [sd.generate_latents(PROMPT, n_images=2, seed=7, **given), sd.generate_latents(PROMPT, seed=8, **given)]
    together, alone = [[np.array(x) for x in pair] for pair in zip(*zip(*runs, strict=True), strict=True)]
    assert relative_error(together[-1][1:], alone[-1]) <= 1e-4
    assert relative_error(together[-1][:1], alone[-1]) > 0.1

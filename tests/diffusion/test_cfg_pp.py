"""CFG++ (Chung et al. 2024): runs in which the sampler sees the guided and the unconditional estimate."""

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch

from checkpoints import NEGATIVE, PROMPT, SCALED, make
from oracle import last, nchw, nhwc, normal, relative_error
from stable_diffusion import StableDiffusion
from stable_diffusion.diffusion.choice import guidance_scale
from stable_diffusion.diffusion.guidance import guidance_batches
from stable_diffusion.text.encode import Conditioning, PromptRow

SMALL = {"num_steps": 4, "latent_size": (6, 8), "seed": 3}
NAMES = ["euler_cfg_pp", "euler_a_cfg_pp", "dpmpp_2m_cfg_pp"]


def table(*rows: PromptRow, seed: int = 0) -> Conditioning:
    return Conditioning(mx.array(normal(len(rows), 77, 32, seed=seed)), rows=rows)


@pytest.mark.parametrize("rescale", [0.0, 1.0])
def test_the_unconditional_outputs(rescale):
    tables = table(PromptRow(0), PromptRow(1)), table(PromptRow(0), PromptRow(0, 3.0), PromptRow(1), seed=1)
    given = {"interval": (0.5, 1.0), "rescale": rescale, "pag_scale": 2.0}
    batches = guidance_batches(4, 2, *tables, 0.6, keeps_uncond=True, **given)
    assert [batch.steps for batch in batches] == [(0, 1), (2, 3)]
    assert [batch.images.tolist() for batch in batches] == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1]]
    for batch, plain in zip(batches, guidance_batches(4, 2, *tables, 0.6, **given), strict=True):
        out = mx.array(normal(len(batch.images), 3, 2, 4, seed=9))
        guided, uncond = batch.combine(out)
        rows = [i for i in range(len(out)) if not batch.is_cond[i].item()]
        assert relative_error(uncond, mx.stack([(out[rows[0]] + 3 * out[rows[1]]) / 4, out[rows[2]]])) <= 1e-6
        read = out if len(plain.images) == len(out) else out[mx.array([i for i in range(len(out)) if i not in rows])]
        assert relative_error(guided, plain.combine(read)) <= 1e-6


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0, 1.5])
def test_a_run_is_that_of_the_paper(tmp_path, scale):
    """With diffusers' networks, its timesteps, and algorithm 2 in the variance-exploding scale."""
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1)
    pipe = make(tmp_path / "sd", "sd1", scheduler)
    noise = normal(2, 8, 12, 4, seed=1)
    given = {"device": "cpu", "num_images_per_prompt": 2, "do_classifier_free_guidance": True}
    cond, uncond = pipe.encode_prompt(PROMPT, negative_prompt=NEGATIVE, **given)
    scheduler.set_timesteps(4)
    x, want = nchw(noise) * scheduler.init_noise_sigma, []
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            sigma, target = scheduler.sigmas[i], scheduler.sigmas[i + 1]
            z = x / (sigma**2 + 1) ** 0.5
            free, other = (pipe.unet(z, t, encoder_hidden_states=text).sample for text in (uncond, cond))
            x = x - sigma * (free + scale * (other - free)) + target * free
            want.append(nhwc(x / (target**2 + 1) ** 0.5))
    sd = StableDiffusion(tmp_path / "sd")
    run = {"num_steps": 4, "n_images": 2, "cfg_weight": scale, "negative_text": NEGATIVE, "latent_size": (8, 12)}
    have = list(sd.generate_latents(PROMPT, sampler="euler_cfg_pp", latents=mx.array(noise), **run))
    assert max(relative_error(a, b) for a, b in zip(have, want, strict=True)) <= 1e-3


RUNS = [(name, {}) for name in NAMES]
RUNS += [("euler_cfg_pp", {"guidance_interval": (0.3, 0.8)}), ("dpmpp_2m_cfg_pp", {"pag_scale": 2.0})]


@pytest.mark.parametrize("name, keywords", RUNS)
def test_runs_do_not_depend_on_their_batch(sd, name, keywords, monkeypatch):
    run = SMALL | keywords | {"num_steps": 3, "sampler": name, "negative_text": "blue"}
    latents = sd.generate_latents(PROMPT, n_images=2, **run)
    together = last(latents)
    assert latents.predicted.shape == (2, 6, 8, 4)
    alone = [last(sd.generate_latents(PROMPT, **run | {"seed": seed})) for seed in (3, 4)]
    assert relative_error(np.concatenate(alone), together) <= 1e-5
    monkeypatch.setattr(sd, "rows_at_once", 1)
    assert relative_error(last(sd.generate_latents(PROMPT, n_images=2, **run)), together) <= 1e-4
    other = last(sd.generate_latents(PROMPT, n_images=2, **run | {"negative_text": "a cat"}))
    assert relative_error(other, together) > 1e-4


def test_a_mask_keeps_the_image(sd):
    image, mask = mx.array(np.tanh(normal(48, 64, 3, seed=4))), np.zeros((48, 64), np.float32)
    mask[:, 32:] = 1
    run = {"num_steps": 4, "strength": 0.8, "seed": 3, "sampler": "dpmpp_2m_cfg_pp", "n_images": 2}
    x = last(sd.generate_latents_from_image(image, PROMPT, mask=mask, **run))
    assert relative_error(x[:, :, :4], np.broadcast_to(sd.encode(image[None]), x.shape)[:, :, :4]) <= 1e-5


def test_without_an_unconditional_estimate_it_is_eulers_method(tmp_path):
    """As with a UNet that takes the guidance scale as an input."""
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, timestep_spacing="trailing")
    make(tmp_path / "lcm", "lcm", scheduler)
    sd = StableDiffusion(tmp_path / "lcm")
    run = SMALL | {"cfg_weight": 8.5}
    states = [last(sd.generate_latents(PROMPT, sampler=name, **run)) for name in ("euler", "euler_cfg_pp")]
    assert relative_error(*states) <= 1e-5


@pytest.mark.parametrize(
    "sampler, given, of_model, want",
    [
        ("euler", None, 7.5, 7.5),
        ("Euler CFG++", None, 7.5, 0.6),
        ("euler_cfg_pp", None, 0.0, 1.0),
        ("euler", None, 0.0, 0.0),
        ("euler_cfg_pp", 0.0, 7.5, 0.0),
        (None, None, 7.5, 7.5),
    ],
)
def test_the_default_scale(sampler, given, of_model, want):
    assert guidance_scale(sampler, given, of_model) == want

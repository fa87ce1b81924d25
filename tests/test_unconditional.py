"""Pictures without prompts against diffusers' pipelines: every step on the same noise, and the pictures."""

import functools
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.test_unet2d import UNETS_2D, oracle_of
from models.test_vq import VQ
from models.test_vq import oracle_of as vq_of
from oracle import nchw, nhwc, normal, perturb, relative_error
from stable_diffusion import StableDiffusion, UnconditionalDiffusion, to_images

_SCHEDULE = {"num_train_timesteps": 100}
_LDM = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False}


def save(folder: Path, pipeline: str, scheduler, **unet) -> diffusers.DiffusionPipeline:
    """Write a small random checkpoint of a pipeline of diffusers, which is returned."""
    torch.manual_seed(0)
    parts = {"unet": perturb(oracle_of(UNETS_2D["ddpm"] | {"sample_size": 8} | unet)), "scheduler": scheduler}
    if pipeline == "LDMPipeline":
        parts["vqvae"] = perturb(vq_of(VQ))
    pipe = getattr(diffusers, pipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def run_theirs(pipe, noise: np.ndarray, added: np.ndarray, **keywords) -> tuple[list[np.ndarray], np.ndarray]:
    """Run a pipeline on injected noise: (what each call of its scheduler returns, images)."""
    steps, step, drawn = [], pipe.scheduler.step, iter(added)

    @functools.wraps(step)
    def remembered(*args, **kwargs):
        output = step(*args, **kwargs)
        steps.append(nhwc(output.prev_sample))
        return output

    draw = {type(pipe): lambda *_, **__: nchw(noise), type(pipe.scheduler): lambda *_, **__: nchw(next(drawn))}
    with ExitStack() as stack:
        for kind, function in draw.items():
            stack.enter_context(mock.patch(f"{kind.__module__}.randn_tensor", function, create=True))
        stack.enter_context(mock.patch.object(pipe.scheduler, "step", remembered))
        return steps, pipe(batch_size=len(noise), output_type="np", **keywords).images


# Pipeline, scheduler, number of images, config of the UNet, keywords of both.
CASES = {
    "ddpm": ("DDPMPipeline", diffusers.DDPMScheduler(**_SCHEDULE), 2, {}, {}),
    "ddpm, large": ("DDPMPipeline", diffusers.DDPMScheduler(**_SCHEDULE, variance_type="fixed_large"), 1, {}, {}),
    "ddpm, v": ("DDPMPipeline", diffusers.DDPMScheduler(**_SCHEDULE, prediction_type="v_prediction"), 1, {}, {}),
    "ddim": ("DDIMPipeline", diffusers.DDIMScheduler(**_SCHEDULE), 3, {"sample_size": (8, 12)}, {}),
    "ddim of ddpm": ("DDIMPipeline", diffusers.DDPMScheduler(**_SCHEDULE), 1, {"sample_size": 32}, {"eta": 0.5}),
    "pndm": ("PNDMPipeline", diffusers.DDPMScheduler(**_SCHEDULE), 2, {}, {}),
    "ldm": ("LDMPipeline", diffusers.DDIMScheduler(**_SCHEDULE, **_LDM), 2, {}, {"eta": 1.0}),
}


@pytest.mark.parametrize(("pipeline", "scheduler", "n_images", "unet", "keywords"), CASES.values(), ids=CASES)
def test_equals_diffusers(tmp_path, pipeline, scheduler, n_images, unet, keywords):
    pipe, sd = save(tmp_path, pipeline, scheduler, **unet), UnconditionalDiffusion(tmp_path)
    shape = (n_images, *sd.default_latent_size, 3)
    noise, added = normal(*shape, seed=1), normal(5, *shape, seed=2)
    theirs, images = run_theirs(pipe, noise, added, num_inference_steps=5, **keywords)
    if pipeline == "PNDMPipeline":  # which calls it four times for each of the first three steps
        theirs = theirs[3:12:4] + theirs[12:]
    draws = {"latents": mx.array(noise), "noise": lambda step, shape: mx.array(added[step])}
    ours = list(sd.generate_latents(n_images, 5, **draws, **keywords))
    for x_t, expected in zip(ours, theirs, strict=True):
        assert x_t.dtype == mx.float32 and relative_error(x_t, expected) <= 1e-3
    assert np.abs(np.round(np.array(sd.decode(ours[-1])) * 255) - np.round(images * 255)).max() <= 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A DDPM of pixels in the published layout of today."""
    folder = tmp_path_factory.mktemp("ddpm") / "ddpm"
    save(folder, "DDPMPipeline", diffusers.DDPMScheduler(**_SCHEDULE))
    return folder


@pytest.fixture(scope="module")
def sd(folder) -> UnconditionalDiffusion:
    return UnconditionalDiffusion(folder)


def test_old_repository_has_all_in_its_root_and_loads_by_its_id(folder, hub, tmp_path):
    """As google/ddpm-cat-256: a pickle, with the attention's names of before diffusers 0.18."""
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for key, v in tensors.items()}
    torch.save(tensors, tmp_path / "weights.bin")
    files = {"diffusion_pytorch_model.bin": (tmp_path / "weights.bin").read_bytes(), "README.md": b"# Cats"}
    names = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    files |= {Path(name).name: (folder / name).read_bytes() for name in names}
    hub.add("google/ddpm-cat-256", files)
    program = """
import sys
from stable_diffusion import UnconditionalDiffusion
for x_t in UnconditionalDiffusion().generate_latents(1, 2, seed=3): pass
print(x_t.tolist())
"""
    printed, _ = hub.run(program, home=tmp_path)
    assert hub.fetched() == sorted(files.keys() - {"README.md"})
    expected = UnconditionalDiffusion(folder).generate_latents(1, 2, seed=3)
    assert np.array_equal(json.loads(printed), list(expected)[-1])
    hub.stop()
    again, _ = hub.run(program, home=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert again == printed


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_another_sampler_is_that_of_diffusers_for_this_checkpoint(folder, sd, sampler):
    classes = {"ddim": diffusers.DDIMScheduler, "dpmpp_2m": diffusers.DPMSolverMultistepScheduler}
    pipe = diffusers.DDPMPipeline.from_pretrained(folder)
    scheduler = pipe.scheduler = classes[sampler].from_config(pipe.scheduler.config)
    noise = normal(1, 8, 8, 3, seed=1)
    x, unet = nchw(noise), pipe.unet.eval()
    scheduler.set_timesteps(4)
    for x_t, t in zip(
        sd.generate_latents(1, 4, latents=mx.array(noise), sampler=sampler), scheduler.timesteps, strict=True
    ):
        with torch.no_grad():
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
        assert relative_error(x_t, nhwc(x)) <= 1e-3


def test_an_image_does_not_depend_on_its_batch_or_on_low_memory(folder, sd):
    both = list(sd.generate_latents(2, 3, seed=5))
    assert [len(both), both[0].shape] == [3, (2, 8, 8, 3)]
    alone = list(UnconditionalDiffusion(folder, low_memory=True).generate_latents(1, 3, seed=6))[-1]
    assert relative_error(alone, both[-1][1:]) <= 1e-5
    pictures = sd.generate(2, num_steps=3, seed=5)
    assert [np.array_equal(a, b) for a, b in zip(pictures, to_images(sd.decode(both[-1])), strict=True)] == [True] * 2


def test_a_run_of_a_ddpm_has_all_timesteps_and_of_others_fifty(sd, tmp_path):
    assert sd.generate_latents().n_steps == 100
    save(tmp_path, "DDIMPipeline", diffusers.DDPMScheduler(**_SCHEDULE))
    for file in ("model_index.json", "scheduler/scheduler_config.json"):  # as in old files; the class converts it
        (tmp_path / file).write_text((tmp_path / file).read_text().replace("DDIMScheduler", "DDPMScheduler"))
    other = UnconditionalDiffusion(tmp_path, dtype=mx.float16)
    assert (other.sampler, other.generate_latents(latent_size=(4, 12)).n_steps) == ("ddim", 50)
    assert repr(other) == f"UnconditionalDiffusion({str(tmp_path)!r}, pixels, float16, ddim)"


def test_grey_pictures(tmp_path):
    save(tmp_path, "DDPMPipeline", diffusers.DDPMScheduler(**_SCHEDULE), in_channels=1, out_channels=1)
    (picture,) = UnconditionalDiffusion(tmp_path).generate(num_steps=2, seed=1)
    assert picture.size == (8, 8) and len({len(set(pixel)) for pixel in picture.get_flattened_data()}) == 1


def test_what_is_refused(folder, sd, tmp_path):
    refused = [
        (lambda: StableDiffusion(folder), "is a DDPMPipeline, which takes no prompt: use UnconditionalDiffusion"),
        (lambda: UnconditionalDiffusion("tiny"), "is a 'StableDiffusionPipeline', not a supported pipeline without"),
        (lambda: sd.generate_latents(latent_size=(6, 8)), "latent_size (6, 8) does not fit the UNet; choose multiples"),
        (lambda: sd.generate_latents(clip_skip=1), "clip_skip needs a prompt"),
        (lambda: sd.generate_latents_from_image("cat.png"), "cannot change images"),
    ]
    scheduler = diffusers.DDPMScheduler(**_SCHEDULE, variance_type="learned_range")
    save(tmp_path / "learned", "DDPMPipeline", scheduler)
    save(tmp_path / "six", "DDPMPipeline", scheduler, out_channels=6)
    shutil.copytree(folder, tmp_path / "cut", ignore=shutil.ignore_patterns("scheduler"))
    shutil.copytree(folder, tmp_path / "score")
    (tmp_path / "score" / "model_index.json").write_text('{"_class_name": "ScoreSdeVePipeline"}')
    for name, word in {
        "learned": "variance_type='learned_range'",
        "six": "a UNet with 3 input and 6 output channels is not supported",
        "cut": "is incomplete",
        "score": "is a 'ScoreSdeVePipeline', not a supported pipeline without prompts; supported: DDPMPipeline",
    }.items():
        refused.append((lambda name=name: UnconditionalDiffusion(tmp_path / name).generate_latents(), word))
    for act, word in refused:
        with pytest.raises(ValueError) as refusal:
            act()
        assert word in str(refusal.value) and "\n" not in str(refusal.value)

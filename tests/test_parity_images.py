"""Whole pipelines that work from images against diffusers: every step's latents, and the images within one level."""

from functools import cache

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import SCALED, Recorder, both, compare, encoded_mean, make
from configs import UNETS
from oracle import nchw, nhwc, normal, perturb, relative_error, twin
from stable_diffusion import Control, StableDiffusion, StableDiffusionXL
from stable_diffusion.weights.load import build

PROMPT, NEGATIVE = "the red cat on the blue", "the blue"
HEIGHT, WIDTH = 64, 96

DDIM = (diffusers.DDIMScheduler, {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False})
EULER = (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1})
EULER_A = (diffusers.EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"})
DPM = (diffusers.DPMSolverMultistepScheduler, {})
UNIPC = (diffusers.UniPCMultistepScheduler, {})


def picture(seed: int = 5, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def mask() -> Image.Image:
    """White where the image is to be made anew, along the edges of latents: diffusers takes one pixel for each."""
    values = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    values[16:48, 24:72] = 255
    return Image.fromarray(values)


def reference(folder, family: str, scheduler, pipeline: type, **more) -> diffusers.DiffusionPipeline:
    """A random checkpoint in ``folder``, as the ``pipeline`` of diffusers that works from images."""
    cls, options = scheduler
    parts = make(folder, family, cls(**SCALED, **options)).components
    if "XL" not in pipeline.__name__:
        more["requires_safety_checker"] = False
    if pipeline in (diffusers.StableDiffusionDepth2ImgPipeline, diffusers.StableDiffusionAdapterPipeline):
        del parts["image_encoder"]
    if pipeline is diffusers.StableDiffusionDepth2ImgPipeline:
        more = {"depth_estimator": None, "feature_extractor": None}
        del parts["safety_checker"]
    pipe = pipeline(**parts | more)
    pipe.set_progress_bar_config(disable=True)
    encoded_mean(pipe)
    return pipe


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", [DDIM, EULER_A, DPM], ids=["ddim", "euler_a", "dpmpp_2m"])
def test_inpainting_with_any_checkpoint(tmp_path, scheduler, strength):
    pipe = reference(tmp_path / "sd", "sd1", scheduler, diffusers.StableDiffusionInpaintPipeline)
    sd = StableDiffusion(tmp_path / "sd")
    both(pipe, sd, image=picture(), mask=mask(), strength=strength, added=True)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("family", ["inpaint", "xl-inpaint"])
def test_inpainting_with_a_checkpoint_made_for_it(tmp_path, family, strength):
    xl = family == "xl-inpaint"
    pipeline = diffusers.StableDiffusionXLInpaintPipeline if xl else diffusers.StableDiffusionInpaintPipeline
    pipe = reference(tmp_path / "sd", family, EULER, pipeline)
    sd = StableDiffusion(tmp_path / "sd")
    assert sd.mode == "masks"
    both(pipe, sd, image=picture(), mask=mask(), strength=strength)


def test_depth_to_image(tmp_path):
    pipe = reference(tmp_path / "sd", "depth", DDIM, diffusers.StableDiffusionDepth2ImgPipeline)
    depth = normal(40, 50, seed=3) * 7 + 100
    sd = StableDiffusion(tmp_path / "sd")
    assert sd.mode == "depth"
    given = {"depth_map": torch.from_numpy(depth)[None]}
    both(pipe, sd, image=picture(), depth=depth, strength=0.7, steps=6, theirs=given)


@pytest.mark.parametrize("scheduler", [DDIM, EULER_A], ids=["ddim", "euler_a"])
@pytest.mark.parametrize("guidance, image_guidance", [(5.0, 1.5), (3.0, 1.0), (1.0, 1.5)])
def test_instructions(tmp_path, scheduler, guidance, image_guidance):
    pipe = reference(tmp_path / "sd", "pix2pix", scheduler, diffusers.StableDiffusionInstructPix2PixPipeline)
    sd = StableDiffusion(tmp_path / "sd")
    assert sd.mode == "instructions"
    both(pipe, sd, image=picture(), steps=4, guidance=guidance, image_cfg_weight=image_guidance, added=True)


@cache
def control_nets(family: str, count: int, **options) -> tuple[list, list]:
    """``count`` random ControlNets for a family: diffusers' and ours. Made once; no test changes them."""
    theirs, ours = [], []
    config = {key: UNETS[family][key] for key in UNETS[family] if key not in ("sample_size", "out_channels")}
    config = {key: value for key, value in config.items() if not key.startswith(("up_block", "reverse"))}
    for seed in range(count):
        torch.manual_seed(seed)
        net = diffusers.ControlNetModel(**config, conditioning_embedding_out_channels=(16, 32, 96, 128), **options)
        theirs.append(perturb(net, seed=seed + 10))
        with torch.no_grad():  # so loud that it matters what a net is shown
            for layer in net.controlnet_cond_embedding.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    layer.weight.mul_(4)
        ours.append(twin(build("controlnet", dict(net.config)), net))
    return theirs, ours


def shown(image: Image.Image) -> mx.array:
    return mx.array(np.asarray(image, dtype=np.float32) / 255)


CONTROLS = {
    "one": [{}],
    "weak": [{"scale": 0.4}],
    "early": [{"end": 0.5}],
    "late": [{"start": 0.4}],
    "guess": [{"guess": True}],
    "two": [{"scale": 0.5}, {"scale": 1.5, "start": 0.2, "end": 0.8}],
}


# XL's have size conditioning too, with and without a negative half of the batch.
@pytest.mark.parametrize("family, case", [*(("sd1", case) for case in CONTROLS), ("xl", "guess"), ("xl", "two")])
def test_controlnet(tmp_path, family, case):
    xl, choices = family == "xl", CONTROLS[case]
    pipeline = diffusers.StableDiffusionXLControlNetPipeline if xl else diffusers.StableDiffusionControlNetPipeline
    theirs, ours = control_nets(family, len(choices))
    images = [picture(seed) for seed in range(20, 20 + len(choices))]

    def values(of: list):
        return of[0] if len(choices) == 1 else of

    pipe = reference(tmp_path / "sd", family, EULER, pipeline, controlnet=values(theirs))
    given = {"image": values(images), "guess_mode": choices[0].get("guess", False)}
    given["controlnet_conditioning_scale"] = values([choice.get("scale", 1.0) for choice in choices])
    given["control_guidance_start"] = values([choice.get("start", 0.0) for choice in choices])
    given["control_guidance_end"] = values([choice.get("end", 1.0) for choice in choices])
    controls = [Control(n, shown(image), **c) for n, image, c in zip(ours, images, choices, strict=True)]
    both(pipe, StableDiffusion(tmp_path / "sd"), controls=controls, theirs=given)


def test_controlnet_in_a_run_from_an_image(tmp_path):
    theirs, ours = control_nets("sd1", 1)
    pipeline = diffusers.StableDiffusionControlNetImg2ImgPipeline
    pipe = reference(tmp_path / "sd", "sd1", DDIM, pipeline, controlnet=theirs[0])
    given = {"control_image": picture(20), "controlnet_conditioning_scale": 1.0}
    controls = [Control(ours[0], shown(picture(20)))]
    both(pipe, StableDiffusion(tmp_path / "sd"), image=picture(), strength=0.6, controls=controls, theirs=given)


@pytest.mark.parametrize("scheduler, share", [(EULER, 0.5), (EULER, 0.8), (DPM, 0.8), (UNIPC, 0.5)])
def test_a_refiner_goes_on_where_the_base_stops(tmp_path, scheduler, share):
    cls, options = scheduler
    base = make(tmp_path / "base", "xl", cls(**SCALED, **options))
    refiner = make(tmp_path / "refiner", "refiner", cls(**SCALED, **options), force_zeros_for_empty_prompt=False)
    noise = normal(1, 8, 12, 4, seed=1)
    common = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": 10, "guidance_scale": 5.0}
    first = base(
        **common, height=HEIGHT, width=WIDTH, latents=nchw(noise), denoising_end=share, output_type="latent"
    ).images
    recorder = Recorder(refiner)
    images = recorder(**common, image=first, denoising_start=share)
    shared = {"num_steps": 10, "cfg_weight": 5.0, "negative_text": NEGATIVE, "latent_size": (8, 12)}
    ours = StableDiffusionXL(tmp_path / "base")
    *_, x = ours.generate_latents(PROMPT, latents=mx.array(noise), denoising_end=share, **shared)
    sd = StableDiffusionXL(tmp_path / "refiner")
    steps = list(sd.generate_latents(PROMPT, latents=x, denoising_start=share, **shared))
    assert 0 < len(steps) < 6
    compare(steps, recorder, images, sd.decode)


@pytest.mark.parametrize("family, share", [("sd1", 1.0), ("xl", 1.0), ("xl", 0.5)])
def test_t2i_adapter(tmp_path, family, share):
    """A share of the steps is known to diffusers' pipeline for XL only."""
    xl = family == "xl"
    pipeline = diffusers.StableDiffusionXLAdapterPipeline if xl else diffusers.StableDiffusionAdapterPipeline
    # XL's latents are an eighth of the picture, and its adapters see a sixteenth.
    shape = {"channels": (32, 64, 64, 64) if xl else (32, 64, 64), "downscale_factor": 16 if xl else 8}
    torch.manual_seed(0)
    adapter = perturb(diffusers.T2IAdapter(adapter_type="full_adapter_xl" if xl else "full_adapter", **shape), seed=7)
    pipe = reference(tmp_path / "sd", family, EULER, pipeline, adapter=adapter)
    noise, hint = normal(1, 8, 12, 4, seed=1), picture(20)
    given = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "image": hint, "height": HEIGHT, "width": WIDTH}
    given |= {"num_inference_steps": 5, "guidance_scale": 5.0, "latents": nchw(noise)}
    given |= {"adapter_conditioning_scale": 0.7} | ({"adapter_conditioning_factor": share} if xl else {})
    latents = pipe(**given, output_type="latent").images
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    images = pipe.image_processor.postprocess(decoded, output_type="np")
    sd = StableDiffusion(tmp_path / "sd")
    adapter.save_pretrained(tmp_path / "adapter")
    control = Control(sd.load_controlnet(tmp_path / "adapter"), shown(hint), scale=0.7, end=share)
    steps = sd.generate_latents(
        PROMPT,
        num_steps=5,
        cfg_weight=5.0,
        negative_text=NEGATIVE,
        latent_size=(8, 12),
        latents=mx.array(noise),
        controls=[control],
    )
    *_, ours = steps
    assert relative_error(ours, nhwc(latents)) <= 1e-3
    assert np.abs(np.round(np.array(sd.decode(ours)) * 255) - np.round(images * 255)).max() <= 1
    with pytest.raises(ValueError, match="guess mode"):
        Control(control.network, control.image, guess=True)


def test_a_network_for_another_family_is_refused(tmp_path, sd1_folder):
    theirs, _ = control_nets("xl", 1)
    theirs[0].save_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match="ControlNet"):
        StableDiffusion(sd1_folder).load_controlnet(tmp_path / "net")

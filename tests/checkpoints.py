"""Small random checkpoints in the true layouts, written by diffusers itself, and the runs that they are compared in."""

import atexit
import copy
import inspect
import json
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import diffusers
import mlx.core as mx
import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from configs import UNETS
from models.test_vae import SD as VAE
from oracle import nchw, normal, perturb, relative_error
from stable_diffusion.weights.files import open_checkpoint, read_tensors

PROMPT, NEGATIVE = "the red cat on the blue — café 猫", "the blue"
NAMES = {"image": "image", "mask": "mask_image", "strength": "strength", "image_cfg_weight": "image_guidance_scale"}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def write_vocabulary(folder: Path, pad_token: str = "<|endoftext|>") -> Path:
    """A real byte-level vocabulary with a few merges, in the files that a tokenizer folder has."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = ["r e", "re d</w>", "c a", "ca t</w>", "t h", "th e</w>", "o n</w>", "i n"]
    merges += ["b l", "bl u", "blu e</w>", "a n</w>"]
    tokens = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad_token
    config = special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _encoder(tokenizer: CLIPTokenizer, cls: type = CLIPTextModel, **values):
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return perturb(cls(CLIPTextConfig(**config | {"vocab_size": len(tokenizer)} | values)), seed=1)


_NETWORKS: dict[str, tuple[dict[str, torch.nn.Module], Path]] = {}  # with the folder that they are written in
_WRITTEN = tempfile.mkdtemp()
atexit.register(shutil.rmtree, _WRITTEN)


def _networks(family: str, configs: dict, encoders: dict, tokenizers: dict) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    networks = {"unet": perturb(diffusers.UNet2DConditionModel(**configs["unet"]), seed=2)}
    networks["vae"] = perturb(diffusers.AutoencoderKL(**configs["vae"]), seed=3)
    if "tokenizer" in tokenizers:
        networks["text_encoder"] = _encoder(tokenizers["tokenizer"], **encoders)
    if "tokenizer_2" in tokenizers:
        second = {"hidden_size": 64, "intermediate_size": 128} if family == "refiner" else {}
        second |= {"hidden_act": "gelu", "projection_dim": encoders.get("hidden_size", 32)} | encoders
        networks["text_encoder_2"] = _encoder(tokenizers["tokenizer_2"], CLIPTextModelWithProjection, **second)
    return networks


def make(
    folder: Path,
    family: str,
    scheduler: diffusers.SchedulerMixin,
    *,
    unet: dict | None = None,
    vae: dict = VAE,
    encoders: dict | None = None,
    **pipeline_options,
) -> diffusers.DiffusionPipeline:
    """Build a random pipeline of ``family`` (a key of UNETS), save it in ``folder`` and return the diffusers object.

    ``unet`` and ``vae`` are other configs, ``encoders`` other values in the configs of all text encoders. Networks of
    the same configs are made and written once in a process, and copied.
    """
    xl, refiner = family in ("xl", "xl-inpaint", "refiner", "ssd-1b"), family == "refiner"
    pads = {} if refiner else {"tokenizer": "!" if family.startswith("sd2") else "<|endoftext|>"}
    pads |= {"tokenizer_2": "!"} if xl else {}
    tokenizers = {name: CLIPTokenizer.from_pretrained(write_vocabulary(folder / name, pads[name])) for name in pads}
    configs = {"unet": unet or UNETS[family], "vae": vae | {"scaling_factor": 0.13025 if xl else 0.18215}}
    key = json.dumps([family, configs, encoders])
    if key not in _NETWORKS:
        _NETWORKS[key] = _networks(family, configs, encoders or {}, tokenizers), Path(_WRITTEN, str(len(_NETWORKS)))
        for name, network in _NETWORKS[key][0].items():
            network.save_pretrained(_NETWORKS[key][1] / name)
    networks, written = _NETWORKS[key]
    shutil.copytree(written, folder, dirs_exist_ok=True)
    parts = {"tokenizer": None, "text_encoder": None, "scheduler": scheduler} | tokenizers | copy.deepcopy(networks)
    if refiner:
        pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, **pipeline_options)
    elif xl:
        pipe = diffusers.StableDiffusionXLPipeline(**parts, **pipeline_options)
    else:
        none = {"safety_checker": None, "feature_extractor": None}
        pipe = diffusers.StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_config(folder)
    pipe.scheduler.save_pretrained(folder / "scheduler")  # some settings of which are the pipeline's
    return pipe


class Recorder:
    """Runs a diffusers pipeline with injected noise and keeps every step's latents, in variance-preserving scale."""

    def __init__(self, pipe: diffusers.DiffusionPipeline, noise: np.ndarray | None = None):
        self.pipe, self.noise, self.steps = pipe, noise, []
        self._drawn = 0

    def _draw(self, shape, **_):
        value = nchw(self.noise[self._drawn])
        self._drawn += 1
        assert tuple(value.shape) == tuple(shape)
        return value

    def _keep(self, pipe, index, timestep, kwargs):
        scheduler, latents = pipe.scheduler, kwargs["latents"]
        scaled = hasattr(scheduler, "is_scale_input_called") or type(scheduler).__name__.startswith("EDM")
        factor = (scheduler.sigmas[scheduler.step_index] ** 2 + 1) ** 0.5 if scaled else 1.0
        self.steps.append((latents / factor).numpy().transpose(0, 2, 3, 1))
        return {}

    def __call__(self, **kwargs) -> np.ndarray:
        """Images [n, H, W, 3] in [0, 1]; ``steps`` holds the latents [n, h, w, 4]."""
        module = type(self.pipe.scheduler).__module__
        with nullcontext() if self.noise is None else mock.patch(f"{module}.randn_tensor", self._draw):
            return self.pipe(**kwargs, output_type="np", callback_on_step_end=self._keep).images


def encoded_mean(pipe) -> None:
    """Make a diffusers pipeline draw a sample of the autoencoder's posterior, but take its mean, as we do."""
    encode = pipe.vae.encode

    def mean(x, **kwargs):
        output = encode(x, **kwargs)
        sample = output.latent_dist.sample
        output.latent_dist.sample = lambda generator=None: 0 * sample(generator) + output.latent_dist.mode()
        return output

    pipe.vae.encode = mean


def both(pipe, sd, *, steps=5, guidance=5.0, n_images=1, theirs=(), added=False, **ours) -> None:
    """Run diffusers and this library on the same noise: every step's latents and the images must agree.

    ``ours`` are keywords of this library, translated for diffusers by NAMES; ``theirs`` is for diffusers alone. With
    ``added`` the noise that a sampler draws is injected too. ``image`` makes it a run from an image.
    """
    size = ours.pop("latent_size", (8, 12))
    text, negative = ours.pop("text", PROMPT), ours.pop("negative_text", NEGATIVE)
    noise, drawn = normal(n_images, *size, 4, seed=1), normal(steps, n_images, *size, 4, seed=2)
    known = inspect.signature(pipe.__call__).parameters
    run = {"height": 8 * size[0], "width": 8 * size[1], "latents": nchw(noise)}
    run = {name: value for name, value in run.items() if name in known and ("image" not in ours or name != "latents")}
    run |= {NAMES[name]: value for name, value in ours.items() if name in NAMES} | dict(theirs)
    recorder = Recorder(pipe, drawn if added else None)
    with mock.patch(f"{type(pipe).__module__}.randn_tensor", lambda shape, **_: nchw(noise)):
        images = recorder(
            prompt=[text] * n_images,
            negative_prompt=[negative] * n_images if negative else None,
            num_inference_steps=steps,
            guidance_scale=guidance,
            **run,
        )
    keywords = {"num_steps": steps, "cfg_weight": guidance, "n_images": n_images, "negative_text": negative} | ours
    keywords |= {"noise": lambda step, shape: mx.array(drawn[step])} if added else {}
    if "image" in ours:
        latents = sd.generate_latents_from_image(text=text, latents=mx.array(noise), **keywords)
    else:
        latents = sd.generate_latents(text, latent_size=size, latents=mx.array(noise), **keywords)
    compare(list(latents), recorder, images, sd.decode)


def compare(steps, recorder: Recorder, images, decode) -> None:
    assert len(steps) == len(recorder.steps)
    for ours, theirs in zip(steps, recorder.steps, strict=True):
        assert ours.dtype == mx.float32
        assert relative_error(ours, theirs) <= 1e-3
    levels = np.round(np.array(decode(steps[-1])) * 255) - np.round(images * 255)
    assert np.abs(levels).max() <= 1


def as_single_file(folder: Path) -> dict[str, mx.array]:
    """Read all weights of a folder in diffusers layout, under the names that one file has for them."""
    parts = open_checkpoint(folder).components.items()
    return {f"{name}.{key}": value for name, part in parts for key, value in read_tensors(part).items()}

"""The column of mlx-examples' Stable Diffusion, from a copy of its repository: ``--mlx-examples DIR``.

It finds models by ids of the Hub; here it is led to files, and where only shapes matter it keeps its random weights.
"""

import sys
from pathlib import Path
from typing import Any

from . import blas  # noqa: F401  (first: it must run before MLX is loaded)

# isort: split
import mlx.core as mx
import mlx.nn as nn

from .cases import GUIDANCE, POSITIONS, STEPS, Case
from .mlx_meter import Work, file_size, image_work, random, ready, size, text_work

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def prepare(case: Case, folder: Path) -> Work:
    theirs, model_io = _package()
    files = {f"{part}_config": f"{part}/config.json" for part in _PARTS}
    files |= {part: f"{part}/diffusion_pytorch_model.safetensors" for part in _PARTS[:2]}
    files |= {part: f"{part}/model.safetensors" for part in _PARTS[2:]}
    files["diffusion_config"] = "scheduler/scheduler_config.json"
    for name in ("tokenizer", "tokenizer_2"):
        files |= {f"{name}_vocab": f"{name}/vocab.json", f"{name}_merges": f"{name}/merges.txt"}
    model_io._MODELS[case.shape] = files
    model_io.hf_hub_download = lambda key, file: str(folder / file)
    if not case.needs_files:
        model_io._load_safetensor_weights = lambda *arguments: None
    return _PREPARE[case.part](case, folder, theirs)


def _package() -> tuple[Any, Any]:
    import stable_diffusion
    from stable_diffusion import model_io

    assert Path(model_io.__file__).parents[1] == Path(sys.path[0]), model_io.__file__
    return stable_diffusion, model_io


def _quantize_unet(unet: nn.Module) -> None:
    nn.quantize(unet, group_size=32, bits=8)


def _quantize_text(encoder: nn.Module) -> None:
    nn.quantize(encoder, class_predicate=lambda _, m: isinstance(m, nn.Linear))


def _unet(case: Case, folder: Path, theirs: Any) -> Work:
    change = _quantize_unet if case.weights == "quantized" else None
    sd = object.__new__(theirs.StableDiffusion)
    sd.unet = ready(theirs.load_unet(case.shape), case.dtype, change)
    sd.sampler = theirs.SimpleEulerSampler(theirs.load_diffusion_config(case.shape))
    shape = 1, case.latent, case.latent, case.config["unet"]["in_channels"]
    x = [random(*shape, dtype=case.dtype, seed=step) for step in range(STEPS)]
    context = random(case.rows, POSITIONS, case.config["unet"]["cross_attention_dim"], dtype=case.dtype)
    text_time = None
    if case.is_xl:
        pooled = random(case.rows, case.config["text_encoder_2"]["projection_dim"], dtype=case.dtype)
        text_time = (pooled, mx.array([[case.size, case.size, 0, 0, case.size, float(case.size)]] * case.rows))
    timesteps = sd.sampler.timesteps(STEPS, dtype=getattr(mx, case.dtype))
    mx.eval(sd.sampler._sigmas, timesteps, text_time)
    guidance = GUIDANCE if case.rows == 2 else 0.0

    def step(i: int) -> mx.array:
        return sd._denoising_step(x[i], *timesteps[i], context, guidance, text_time)

    return Work(lambda: step(0), size(sd.unet), [sd.unet], step)


def _text(case: Case, folder: Path, theirs: Any) -> Work:
    change = _quantize_text if case.weights == "quantized" else None
    encoders = [
        ready(theirs.load_text_encoder(case.shape, model_key=name), case.dtype, change) for name in case.encoders
    ]
    return text_work(case, encoders)


def _vae_encode(case: Case, folder: Path, theirs: Any) -> Work:
    vae = ready(theirs.load_autoencoder(case.shape), "float32")
    pixels = [random(1, case.size, case.size, 3, seed=seed) for seed in range(2)]
    return Work(lambda: vae.encode(pixels[0])[0], size(vae.encoder), [vae], lambda i: vae.encode(pixels[i])[0])


def _vae_decode(case: Case, folder: Path, theirs: Any) -> Work:
    vae = ready(theirs.load_autoencoder(case.shape), "float32")
    latents = [random(1, case.latent, case.latent, 4, seed=seed) for seed in range(2)]
    return Work(lambda: vae.decode(latents[0]), size(vae.decoder), [vae], lambda i: vae.decode(latents[i]))


def _open(case: Case, theirs: Any) -> Any:
    sd = (theirs.StableDiffusionXL if case.is_xl else theirs.StableDiffusion)(case.shape, case.dtype == "float16")
    if case.weights == "quantized":
        _quantize_unet(sd.unet)
        for name in ("text_encoder_1", "text_encoder_2") if case.is_xl else ("text_encoder",):
            _quantize_text(getattr(sd, name))
    sd.ensure_models_are_loaded()
    return sd


def _load(case: Case, folder: Path, theirs: Any) -> Work:
    return Work(lambda: _open(case, theirs) and None, file_size(folder))


def _image(case: Case, folder: Path, theirs: Any) -> Work:
    return image_work(case, folder, _open(case, theirs))


_PREPARE = {
    "unet": _unet,
    "text": _text,
    "vae-encode": _vae_encode,
    "vae-decode": _vae_decode,
    "load": _load,
    "image": _image,
}

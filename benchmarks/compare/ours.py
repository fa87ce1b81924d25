"""The column of this library."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from stable_diffusion import StableDiffusion

# isort: split
import mlx.core as mx
import mlx.nn as nn

from stable_diffusion.app.engine import TEXT_BITS, UNET_BITS
from stable_diffusion.diffusion.denoiser import Denoiser
from stable_diffusion.diffusion.guidance import guidance_batches
from stable_diffusion.diffusion.schedule import Schedule, ScheduleConfig
from stable_diffusion.models import cpu, gpu, upsampling
from stable_diffusion.models.tiling import decode, encode
from stable_diffusion.text.encode import Conditioning
from stable_diffusion.weights.load import build
from stable_diffusion.weights.parts import PARTS
from stable_diffusion.weights.quantize import quantize

from .cases import GUIDANCE, POSITIONS, STEPS, Case
from .mlx_meter import Work, file_size, image_work, random, ready, size, text_work


def prepare(case: Case, folder: Path) -> Work:
    cpu.tune()
    return _PREPARE[case.part](case, folder)


@contextmanager
def as_published() -> Iterator[None]:
    """Let layers have the operations that they have as published: no wider heads, and doubled maps are convolved."""
    with (
        mock.patch.object(gpu, "fused_width", lambda dim: dim),
        mock.patch.object(upsampling, "sums_pay", lambda *_: False),
    ):
        yield


def _network(case: Case, part: str, dtype: str | None = None):
    bits = UNET_BITS if part == "unet" else TEXT_BITS
    change = None if case.weights == "plain" else lambda m: quantize(m, bits, PARTS[part].group_size)
    network = ready(build(part, case.config[part]), dtype or case.dtype, change)
    gpu.join(network)
    return network


def _joined(network: nn.Module, graph: Callable[[int], Any]) -> Callable[[int], Any]:
    """Build the graph of parameters that are joined, as those are that were loaded for a GPU."""

    def build(i: int) -> Any:
        gpu.join(network)
        return graph(i)

    return build


def _unet(case: Case, folder: Path) -> Work:
    """D(x, sigma), the model's estimate of the clean latent, as a run asks for it; the prompts are encoded.

    On a GPU its rows are one batch.
    """
    unet = _network(case, "unet")
    width, pooled, ids = unet.config.cross_attention_dim[0], None, None
    if case.is_xl:
        pooled = random(1, case.config["text_encoder_2"]["projection_dim"], dtype=case.dtype)
        ids = mx.array([[case.size, case.size, 0, 0, case.size, case.size]], dtype=mx.float32)
    told = Conditioning(random(1, POSITIONS, width, dtype=case.dtype), pooled, ids)
    schedule = Schedule(ScheduleConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))
    steps = schedule.steps(STEPS)
    batches = guidance_batches(len(steps), 1, told, told if case.rows == 2 else None, GUIDANCE)
    dtype = getattr(mx, case.dtype)
    batch, aside = (Denoiser(unet, schedule, steps, dtype, batches, rows_at_once=rows) for rows in (case.rows, None))
    x = [random(1, case.latent, case.latent, unet.config.in_channels, seed=step) for step in range(STEPS)]

    def run() -> None:
        mx.eval(aside(x[0], steps.sigmas[0]))
        cpu.all_cores()

    return Work(run, size(unet), [unet], _joined(unet, lambda step: batch(x[step], steps.sigmas[step], step)))


def _text(case: Case, folder: Path) -> Work:
    encoders = [_network(case, name) for name in case.encoders]
    return text_work(case, encoders)


def _vae_encode(case: Case, folder: Path) -> Work:
    vae = _network(case, "vae", case.vae_dtype)
    pixels = [random(1, case.size, case.size, 3, dtype=case.vae_dtype, seed=seed) for seed in range(2)]
    return Work(
        lambda: encode(vae, pixels[0])[0], size(vae.encoder), [vae], _joined(vae, lambda i: vae.encode(pixels[i])[0])
    )


def _vae_decode(case: Case, folder: Path) -> Work:
    vae = _network(case, "vae", case.vae_dtype)
    latents = [
        random(1, case.latent, case.latent, vae.latent_channels, dtype=case.vae_dtype, seed=seed) for seed in range(2)
    ]
    return Work(
        lambda: decode(vae, latents[0]), size(vae.decoder), [vae], _joined(vae, lambda i: vae.decode(latents[i]))
    )


def _open(case: Case, folder: Path) -> StableDiffusion:
    bits = {} if case.weights == "plain" else {"unet_bits": UNET_BITS, "text_bits": TEXT_BITS}
    sd = StableDiffusion(folder, case.dtype == "float16", **bits)
    sd.ensure_models_are_loaded()
    return sd


def _load(case: Case, folder: Path) -> Work:
    return Work(lambda: _open(case, folder) and None, file_size(folder))


def _image(case: Case, folder: Path) -> Work:
    return image_work(case, folder, _open(case, folder))


_PREPARE = {
    "unet": _unet,
    "text": _text,
    "vae-encode": _vae_encode,
    "vae-decode": _vae_decode,
    "load": _load,
    "image": _image,
}

"""The column of diffusers on torch: on CUDA where there is a GPU, else on the CPU."""

import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from . import process
from .cases import GUIDANCE, POSITIONS, PROMPT, STEPS, Case

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS: set[str] = set()  # "channels_last" and "compiled", of the networks of this process


@dataclass
class Work:
    """What is measured; ``resident`` are the bytes of weights that are in memory before it runs."""

    run: Callable[[], Any]
    weights: int
    resident: int

    def describe(self) -> dict[str, Any]:
        """What it reads, and the rate of float32 products with the same threads."""
        a, b = (_random(process.PRODUCT, process.PRODUCT) for _ in range(2))
        return {"weights": self.weights, "rate": process.product_rate(lambda: (a @ b, _wait()))}

    def measure(self) -> dict[str, float]:
        """Seconds on the clock and of the processor, and the peak of the memory in bytes, weights among them."""
        gc.collect()
        before = process.reset_peak()
        if _DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        cpu, start = time.process_time(), time.perf_counter()
        with torch.inference_mode():
            result = self.run()
        _wait()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        grown = max(0, process.peak() - before)
        del result
        peak = torch.cuda.max_memory_allocated() if _DEVICE == "cuda" else self.resident + grown
        return {"seconds": seconds, "cpu": cpu, "peak": peak}


def prepare(case: Case, folder: Path) -> Work:
    warnings.filterwarnings("ignore", category=FutureWarning)  # of what the pipelines themselves will mend
    for package in (diffusers, transformers):
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()
    return _PREPARE[case.part](case, folder)


def _wait() -> None:
    if _DEVICE == "cuda":
        torch.cuda.synchronize()


def _ready(module: torch.nn.Module, dtype: str = "float32") -> torch.nn.Module:
    module = module.to(_DEVICE, getattr(torch, dtype)).eval()
    if "channels_last" in SETTINGS:
        module.to(memory_format=torch.channels_last)
    if "compiled" in SETTINGS:
        is_vae = isinstance(module, diffusers.AutoencoderKL)
        for network in (module.encoder, module.decoder) if is_vae else (module,):
            network.compile()
    return module


def _size(*modules: torch.nn.Module) -> int:
    return sum(p.nbytes for module in modules for p in module.parameters())


def _work(run: Callable[[], Any], *modules: torch.nn.Module) -> Work:
    return Work(run, _size(*modules), _size(*modules))


def _random(*shape: int, dtype: str = "float32") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(_DEVICE, getattr(torch, dtype))


def _unet(case: Case, folder: Path) -> Work:
    unet = _ready(diffusers.UNet2DConditionModel.from_config(dict(case.config["unet"])), case.dtype)
    x = _random(1, unet.config.in_channels, case.latent, case.latent, dtype=case.dtype)
    context = _random(case.rows, POSITIONS, unet.config.cross_attention_dim, dtype=case.dtype)
    added = None
    if case.is_xl:
        pooled = _random(case.rows, case.config["text_encoder_2"]["projection_dim"], dtype=case.dtype)
        ids = torch.tensor([[case.size, case.size, 0, 0, case.size, case.size]] * case.rows, device=_DEVICE)
        added = {"text_embeds": pooled, "time_ids": ids.to(pooled.dtype)}

    def run() -> torch.Tensor:
        out = unet(torch.cat([x] * case.rows), 999, context, added_cond_kwargs=added).sample
        if case.rows == 1:
            return out
        wanted, unwanted = out.chunk(2)
        return unwanted + GUIDANCE * (wanted - unwanted)

    return _work(run, unet)


def _text(case: Case, folder: Path) -> Work:
    encoders = []
    for name in case.encoders:
        config = transformers.CLIPTextConfig(**case.config[name])
        encoders.append(_ready(getattr(transformers, config.architectures[0])(config), case.dtype))
    ids = torch.zeros((2, POSITIONS), dtype=torch.int64, device=_DEVICE)
    return _work(lambda: [encoder(ids, output_hidden_states=case.is_xl) for encoder in encoders], *encoders)


def _vae(case: Case) -> Any:
    return _ready(diffusers.AutoencoderKL.from_config(dict(case.config["vae"])), case.vae_dtype)


def _vae_encode(case: Case, folder: Path) -> Work:
    vae, pixels = _vae(case), _random(1, 3, case.size, case.size, dtype=case.vae_dtype)
    return Work(lambda: vae.encode(pixels).latent_dist.mean, _size(vae.encoder), _size(vae))


def _vae_decode(case: Case, folder: Path) -> Work:
    vae, latents = _vae(case), _random(1, 4, case.latent, case.latent, dtype=case.vae_dtype)
    return Work(lambda: vae.decode(latents).sample, _size(vae.decoder), _size(vae))


def _open(case: Case, folder: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, case.dtype)).to(_DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _file_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _load(case: Case, folder: Path) -> Work:
    return Work(lambda: _open(case, folder), _file_size(folder), 0)


def _image(case: Case, folder: Path) -> Work:
    pipe = _open(case, folder)
    networks = [network for network in pipe.components.values() if isinstance(network, torch.nn.Module)]
    told = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": case.size, "width": case.size}
    return Work(lambda: pipe(PROMPT, output_type="np", **told), _file_size(folder), _size(*networks))


_PREPARE = {
    "unet": _unet,
    "text": _text,
    "vae-encode": _vae_encode,
    "vae-decode": _vae_decode,
    "load": _load,
    "image": _image,
}

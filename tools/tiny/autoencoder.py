"""Trains the autoencoder: first whole, then, on stored latents, its decoder alone."""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from tools.tiny import data, models
from tools.tiny.optimize import Optimizers, learning_rate, resume, save, write

_BATCH = 8  # many small steps: normalisation is by group, so nothing is lost


def to_tensor(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> float:
    """Mean over images of the PSNR of decode(mode of encode), in dB."""
    total = 0.0
    for first in range(0, len(images), 50):
        x = to_tensor(images[first : first + 50], device)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        total += float((-10 * torch.log10(((x - y) / 2).square().mean(dim=(1, 2, 3)))).sum())
    return total / len(images)


def train_vae(work: Path, images: np.ndarray, total: int, seed: int, device: torch.device) -> AutoencoderKL:
    """The faint KL term keeps the latents smooth; the learning rate falls along a cosine over `total` images."""
    torch.manual_seed(seed)
    vae, path = models.make_vae().to(device), work / "vae.pt"
    optimizer = Optimizers(vae)
    step, steps, started = resume(path, vae, optimizer)["step"], total // _BATCH, time.time()
    check = np.stack([image for _, image, _ in data.held_out_examples(100, seed)])
    while step < steps:
        rng = np.random.default_rng((seed, 1, step))
        x = to_tensor(images[np.sort(rng.integers(len(images), size=_BATCH))], device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / (models.LATENT_SIZE**2 * 4)
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-4 * kl
        optimizer.step(loss, learning_rate(2.5e-3, step, steps, warmup=100, hold=0.2))
        step += 1
        if step % 100 == 0:
            seconds = time.time() - started
            print(f"vae {step}/{steps} loss {loss.item():.4f} kl {kl.item():.2f} {seconds:.0f}s", flush=True)
        if step % 500 == 0 or step == steps:
            print(f"vae {step}/{steps} held-out PSNR {psnr(vae, check, device):.2f} dB", flush=True)
            save(path, vae, optimizer, step=step)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def normalise(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Folds a shift and a scale per channel into the 1x1 convolutions at the bottleneck, exactly.

    Afterwards every latent channel has mean 0 and deviation 1 / scaling_factor, so that the scaled latents are unit.
    `latents` [n, 4, h, w] are the modes before; returns them after.
    """
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    gain = 1 / (std * vae.config.scaling_factor)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
    post.weight /= gain[None, :, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * gain
    quant.weight[:4] *= gain[:, None, None, None]
    quant.bias[4:] += 2 * gain.log()  # the second half is a log variance
    return (latents - mean[:, None, None]) * gain[:, None, None]


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Modes of all images, float32 [n, 4, 16, 16]."""
    chunks = []
    for first in range(0, len(images), 64):
        chunks.append(vae.encode(to_tensor(images[first : first + 64], device)).latent_dist.mode().cpu())
    return torch.cat(chunks)


def make_latents(work: Path, vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Normalises the VAE on the data's latents and stores both; float16 [n, 4, 16, 16], scaled to unit deviation."""
    path = work / "latents.pt"
    if not path.exists():
        latents = normalise(vae, encode_all(vae, images, device).to(device)).cpu()
        write({"vae": vae.state_dict(), "latents": (latents * vae.config.scaling_factor).half()}, path)
    state = torch.load(path, map_location="cpu")
    vae.load_state_dict(state["vae"])
    return state["latents"]


def refine_decoder(work: Path, vae: AutoencoderKL, images: np.ndarray, latents: torch.Tensor, total: int, seed: int):
    """Trains the decoder on `total` more images in place; faint noise on the latents stands for the UNet's errors."""
    path, device = work / "decoder.pt", vae.device
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).train().requires_grad_(True)
    optimizer, steps = Optimizers(decoder), total // _BATCH
    step = resume(path, decoder, optimizer)["step"]
    check = np.stack([image for _, image, _ in data.held_out_examples(100, seed)])
    while step < steps:
        rng = np.random.default_rng((seed, 3, step))
        rows = np.sort(rng.integers(len(latents), size=_BATCH))
        z = latents[rows].float() + 0.03 * torch.from_numpy(rng.standard_normal(latents[rows].shape, np.float32))
        y = vae.decode(z.to(device) / vae.config.scaling_factor).sample
        x = to_tensor(images[rows], device)
        loss = F.l1_loss(y, x) + 2 * F.mse_loss(y, x)
        optimizer.step(loss, learning_rate(1e-3, step, steps, warmup=100, hold=0.2))
        step += 1
        if step % 500 == 0 or step == steps:
            print(f"decoder {step}/{steps} held-out PSNR {psnr(vae, check, device):.2f} dB", flush=True)
            save(path, decoder, optimizer, step=step)
    vae.eval().requires_grad_(False)

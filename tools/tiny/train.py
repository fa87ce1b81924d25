"""Trains the bundled tiny model: python -m tools.tiny.train --out stable_diffusion/tiny

Six stages, each skipped when its result lies in --work and resumed from its last checkpoint when it was interrupted:

1. data       100,000 captioned images, drawn once (images.npy, captions.txt)
2. tokenizer  byte-level BPE on the captions
3. vae        L1 + MSE + a faint KL; then its latents are scaled per channel and stored for all images
4. decoder    the VAE's decoder alone, on the stored latents: cheaper steps, no further change of the latents
5. unet       UNet and text encoder together: noise (or v) prediction, min-SNR weights, EMA, 10 % empty captions
6. export     float16 safetensors in the layout of diffusers' StableDiffusionPipeline

Everything is seeded; a step's randomness depends on the seed and the step alone, so a resumed run continues the same
sequence. About two hours on one CPU core, minutes on a GPU. Twins of the model are one flag each, and share the data
and the VAE when given the same --work and another --name: --prediction v_prediction, --in_channels 9 (inpainting).
"""

import argparse
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from tools.tiny import data, models
from tools.tiny.bpe import write_tokenizer
from tools.tiny.export import export
from tools.tiny.muon import Optimizers

EMA_DECAY = 0.999
MIN_SNR = 5.0  # Hang et al. 2023, "Efficient diffusion training via min-SNR weighting", gamma
NOISY_WEIGHT = 0.2  # of the error in x0 where there is hardly any signal; there the background's colour is decided
NOISES = 2  # timesteps and noises per caption in a batch: the text encoder costs as much as the UNet on a CPU


_PAIR = re.compile(r" ((left|right) of|above|over|below|under) ")


def to_tensor(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


# --- stage 3: the VAE ---


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
    batch = 8  # many small steps: normalisation is by group, so nothing is lost
    step, steps, started = 0, total // batch, time.time()
    if path.exists():
        state = torch.load(path, map_location=device)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    check = np.stack([image for _, image, _ in data.held_out_examples(100, seed)])
    while step < steps:
        rng = np.random.default_rng((seed, 1, step))
        x = to_tensor(images[np.sort(rng.integers(len(images), size=batch))], device)
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
            save_atomically({"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, path)
    return vae.eval().requires_grad_(False)


def learning_rate(peak: float, step: int, steps: int, warmup: int, hold: float) -> float:
    """Linear warm-up, `peak` for the first `hold` of the steps, then a cosine to one hundredth of it."""
    share = min(1.0, max(0.0, (step / steps - hold) / (1 - hold)))
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


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
        save_atomically({"vae": vae.state_dict(), "latents": (latents * vae.config.scaling_factor).half()}, path)
    state = torch.load(path, map_location="cpu")
    vae.load_state_dict(state["vae"])
    return state["latents"]


def boxes(n: int, rng: np.random.Generator) -> np.ndarray:
    """Random masks for inpainting, float32 [n, 1, 64, 64]: 1 where the model shall paint. A tenth are all ones."""
    masks = np.zeros((n, 1, data.SIZE, data.SIZE), np.float32)
    for mask in masks:
        (x, y), (w, h) = rng.integers(0, 48, 2), rng.integers(16, 56, 2)
        mask[:, y : y + h, x : x + w] = 1
        if rng.random() < 0.1:
            mask[:] = 1
    return masks


# --- stage 4: the decoder ---


def refine_decoder(work: Path, vae: AutoencoderKL, images: np.ndarray, latents: torch.Tensor, total: int, seed: int):
    """Trains the decoder on `total` more images in place; faint noise on the latents stands for the UNet's errors."""
    path, device, batch = work / "decoder.pt", vae.device, 8
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).train().requires_grad_(True)
    optimizer, step, steps = Optimizers(decoder), 0, total // batch
    if path.exists():
        state = torch.load(path, map_location=device)
        decoder.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    check = np.stack([image for _, image, _ in data.held_out_examples(100, seed)])
    while step < steps:
        rng = np.random.default_rng((seed, 3, step))
        rows = np.sort(rng.integers(len(latents), size=batch))
        z = latents[rows].float() + 0.03 * torch.from_numpy(rng.standard_normal(latents[rows].shape, np.float32))
        y = vae.decode(z.to(device) / vae.config.scaling_factor).sample
        x = to_tensor(images[rows], device)
        loss = F.l1_loss(y, x) + 2 * F.mse_loss(y, x)
        optimizer.step(loss, learning_rate(1e-3, step, steps, warmup=100, hold=0.2))
        step += 1
        if step % 500 == 0 or step == steps:
            print(f"decoder {step}/{steps} held-out PSNR {psnr(vae, check, device):.2f} dB", flush=True)
            save_atomically({"model": decoder.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, path)
    vae.eval().requires_grad_(False)


# --- stage 5: UNet and text encoder ---


class Batches:
    """Training batches by step: latents, token ids and, for nine channels, the mask and the masked image's latents."""

    def __init__(
        self, vae, images: np.ndarray, captions: list[str], tokens: np.ndarray, args: argparse.Namespace, device
    ):
        self.latents = make_latents(args.work, vae, images, device)
        # Two objects are the hardest to learn: which is which, and where. They come three times as often as drawn.
        pairs = [row for row, words in enumerate(captions) if _PAIR.search(words)]
        self.rows = np.concatenate([np.arange(len(captions)), *2 * [np.array(pairs, int)]])
        self.vae, self.images, self.tokens, self.args, self.device = vae, images, torch.from_numpy(tokens), args, device

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x [n, 4, 16, 16], ids [n, 77], extra [n, 5, 16, 16] or None; a tenth of the captions is empty (row -1)."""
        rng = np.random.default_rng((self.args.seed, 2, step))
        rows = np.sort(self.rows[rng.integers(len(self.rows), size=self.args.batch // NOISES)])
        words = np.where(rng.random(len(rows)) < 0.1, -1, rows)
        x = self.latents[rows].float().to(self.device)
        extra = None
        if self.args.in_channels == 9:
            mask = torch.from_numpy(boxes(len(rows), rng)).to(self.device)
            with torch.no_grad():
                masked = to_tensor(self.images[rows], self.device) * (1 - mask)  # grey where it is hidden
                masked = self.vae.encode(masked).latent_dist.mode() * self.vae.config.scaling_factor
            extra = torch.cat([F.interpolate(mask, size=models.LATENT_SIZE), masked], dim=1)
        return x, self.tokens[words].long().to(self.device), extra


def denoising_loss(unet, text_encoder, batch, alphas: torch.Tensor, prediction: str, generator: torch.Generator):
    """min-SNR weighted error of the predicted noise or velocity, each caption at NOISES evenly spread timesteps."""
    x, ids, extra = batch
    n = len(x)
    spread = torch.arange(NOISES)[:, None] * (len(alphas) // NOISES)
    t = (torch.randint(len(alphas), (n,), generator=generator) + spread).remainder(len(alphas)).flatten().to(x.device)
    x = x.repeat(NOISES, 1, 1, 1)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    a = alphas[t][:, None, None, None]
    x_t, target = a.sqrt() * x + (1 - a).sqrt() * noise, noise
    snr = alphas[t] / (1 - alphas[t])
    weight = (snr.clamp(max=MIN_SNR) + NOISY_WEIGHT) / snr
    if prediction == "v_prediction":
        target = a.sqrt() * noise - (1 - a).sqrt() * x
        weight = (snr.clamp(max=MIN_SNR) + NOISY_WEIGHT) / (snr + 1)
    if extra is not None:
        x_t = torch.cat([x_t, extra.repeat(NOISES, 1, 1, 1)], dim=1)
    context = text_encoder(ids).last_hidden_state.repeat(NOISES, 1, 1)
    error = (unet(x_t, t, context).sample - target).square().mean(dim=(1, 2, 3))
    return (weight * error).mean()


def train_unet(work: Path, batches: Batches, vocab_size: int, args: argparse.Namespace, device: torch.device, after):
    """Calls `after(unet, text_encoder)` with the EMA weights whenever a checkpoint was written."""
    torch.manual_seed(args.seed + 1)
    unet, text_encoder = models.make_unet(args.in_channels).to(device), models.make_text_encoder(vocab_size).to(device)
    path = work / f"{args.name}.pt"
    modules = torch.nn.ModuleList([unet, text_encoder])
    weights = list(modules.parameters())
    ema = [w.detach().clone() for w in weights]
    optimizer = Optimizers(modules, weight_decay=1e-2)
    alphas = models.make_scheduler().alphas_cumprod.to(device)
    step, steps, started, mean = 0, args.unet_samples // args.batch, time.time(), None
    if path.exists():
        state = torch.load(path, map_location=device)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step = state["ema"], state["step"]
    first = step
    while step < steps:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        loss = denoising_loss(unet, text_encoder, batches(step), alphas, args.prediction, generator)
        optimizer.step(loss, learning_rate(args.lr, step, steps, warmup=200, hold=0.5))
        step += 1
        torch._foreach_lerp_(ema, [w.detach() for w in weights], 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        mean = loss.item() if mean is None else mean + 0.01 * (loss.item() - mean)
        if step % 100 == 0:
            rate = (step - first) * args.batch / (time.time() - started)
            print(f"unet {step}/{steps} loss {mean:.4f} {rate:.0f} samples/s {time.time() - started:.0f}s", flush=True)
        if step % args.save_every == 0 or step == steps:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step}
            save_atomically(state, path)
            after(*averaged(unet, text_encoder, ema, args.in_channels, vocab_size))
    return averaged(unet, text_encoder, ema, args.in_channels, vocab_size)


def averaged(unet, text_encoder, ema: list[torch.Tensor], in_channels: int, vocab_size: int):
    """New UNet and text encoder on the CPU that hold the averaged weights."""
    modules = torch.nn.ModuleList([models.make_unet(in_channels), models.make_text_encoder(vocab_size)])
    with torch.no_grad():
        for weight, value in zip(modules.parameters(), ema, strict=True):
            weight.copy_(value)
    return modules[0], modules[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, rewritten at each checkpoint")
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="data set and checkpoints")
    parser.add_argument("--name", default="unet", help="name of the UNet's checkpoint in --work; another for each twin")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--vae_images", type=int, default=20_000, help="images the VAE trains on, with repetition")
    parser.add_argument("--decoder_images", type=int, default=24_000, help="further images for the decoder alone")
    parser.add_argument("--until", choices=("decoder", "unet"), default="unet", help="last stage to run")
    parser.add_argument("--unet_samples", type=int, default=640_000, help="samples the UNet trains on, with repetition")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--in_channels", type=int, choices=(4, 9), default=4, help="9: an inpainting model")
    parser.add_argument("--save_every", type=int, default=500, help="steps between checkpoints of the UNet")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one per free core at most")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.work.mkdir(parents=True, exist_ok=True)
    images, captions = data.make_dataset(args.work, args.images, args.seed)
    tokens, vocab_size = tokenize(args.work, captions)
    vae = train_vae(args.work, images, args.vae_images, args.seed, device)
    batches = Batches(vae, images, captions, tokens, args, device)
    refine_decoder(args.work, vae, images, batches.latents, args.decoder_images, args.seed)
    if args.until == "decoder":
        return

    def write(unet, text_encoder) -> None:
        export(args.out, vae, unet, text_encoder, args.work / "tokenizer", args.prediction)

    write(*train_unet(args.work, batches, vocab_size, args, device, write))


def tokenize(work: Path, captions: list[str]) -> tuple[np.ndarray, int]:
    """int16 [n + 1, 77] ids, the last row those of the empty caption, and the size of the vocabulary."""
    from transformers import CLIPTokenizer

    folder, path = work / "tokenizer", work / "tokens.npy"
    if not folder.exists():
        write_tokenizer(captions, folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    if not path.exists():
        ids = tokenizer([*captions, ""], padding="max_length", max_length=77, truncation=True).input_ids
        np.save(path, np.array(ids, np.int16))
    return np.load(path), len(tokenizer)


if __name__ == "__main__":
    main()

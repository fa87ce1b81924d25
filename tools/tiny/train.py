"""Trains the bundled tiny model: python -m tools.tiny.train --out stable_diffusion/tiny

Six stages, each skipped when its result lies in --work and resumed from its last checkpoint when it was interrupted:

1. data       100,000 captioned images, drawn once (images.npy, captions.txt)
2. tokenizer  byte-level BPE on the captions
3. vae        L1 + MSE + a faint KL; then its latents are scaled per channel and stored for all images
4. decoder    the VAE's decoder alone, on the stored latents: cheaper steps, no further change of the latents
5. unet       UNet and text encoder together: noise (or v) prediction, min-SNR weights, EMA, 10 % empty captions
6. export     float16 safetensors in the layout of diffusers' StableDiffusionPipeline

Everything is seeded; a step's randomness depends on the seed and the step alone, so a resumed run continues the same
sequence. About two hours on one CPU core (with glibc, GLIBC_TUNABLES=glibc.malloc.hugetlb=1 saves
a tenth), minutes on a GPU. Twins of the model are one flag each, and share the data
and the VAE when given the same --work and another --name: --prediction v_prediction, --in_channels 9 (inpainting).
train_control.py adds a ControlNet to the finished model.
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tools.tiny import data, models
from tools.tiny.autoencoder import make_latents, refine_decoder, to_tensor, train_vae
from tools.tiny.bpe import write_tokenizer
from tools.tiny.export import export
from tools.tiny.optimize import Optimizers, learning_rate, resume, save

EMA_DECAY = 0.999
MIN_SNR = 5.0  # Hang et al. 2023, "Efficient diffusion training via min-SNR weighting", gamma
NOISY_WEIGHT = 0.2  # of the error in x0 where there is hardly any signal; there the background's colour is decided
NOISES = 2  # timesteps and noises per caption in a batch: the text encoder costs as much as the UNet on a CPU

_PAIR = re.compile(r" ((left|right) of|above|over|below|under) ")


def boxes(n: int, rng: np.random.Generator) -> np.ndarray:
    """Random masks for inpainting, float32 [n, 1, 64, 64]: 1 where the model shall paint. A tenth are all ones."""
    masks = np.zeros((n, 1, data.SIZE, data.SIZE), np.float32)
    for mask in masks:
        (x, y), (w, h) = rng.integers(0, 48, 2), rng.integers(16, 56, 2)
        mask[:, y : y + h, x : x + w] = 1
        if rng.random() < 0.1:
            mask[:] = 1
    return masks


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


def denoising_loss(predict, x: torch.Tensor, alphas: torch.Tensor, prediction: str, generator: torch.Generator):
    """min-SNR weighted error of the predicted noise or velocity, each picture at NOISES evenly spread timesteps.

    `x` [n, 4, 16, 16] are clean latents; `predict(x_t, t)` is asked for NOISES * n of them, x repeated in that order.
    """
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
    error = (predict(x_t, t) - target).square().mean(dim=(1, 2, 3))
    return (weight * error).mean()


def text_to_noise(unet, text_encoder, ids: torch.Tensor, extra: torch.Tensor | None):
    """What `denoising_loss` asks: the UNet with the contexts of token ids [n, 77], and with `extra` channels if any."""
    context = text_encoder(ids).last_hidden_state.repeat(NOISES, 1, 1)

    def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if extra is not None:
            x_t = torch.cat([x_t, extra.repeat(NOISES, 1, 1, 1)], dim=1)
        return unet(x_t, t, context).sample

    return predict


def train_unet(batches: Batches, vocab_size: int, args: argparse.Namespace, device: torch.device, after):
    """Calls `after(unet, text_encoder)` with the averaged weights whenever a checkpoint was written."""
    torch.manual_seed(args.seed + 1)
    unet, text_encoder = models.make_unet(args.in_channels).to(device), models.make_text_encoder(vocab_size).to(device)
    modules, path = torch.nn.ModuleList([unet, text_encoder]), args.work / f"{args.name}.pt"
    weights, optimizer = list(modules.parameters()), Optimizers(modules, weight_decay=1e-2)
    alphas = models.make_scheduler().alphas_cumprod.to(device)
    state = resume(path, modules, optimizer)
    ema = state.get("ema") or [w.detach().clone() for w in weights]
    first, steps, started, mean = state["step"], args.unet_samples // args.batch, time.time(), None
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        x, ids, extra = batches(step)
        predict = text_to_noise(unet, text_encoder, ids, extra)
        loss = denoising_loss(predict, x, alphas, args.prediction, generator)
        optimizer.step(loss, learning_rate(args.lr, step, steps, warmup=200, hold=0.5))
        done = step + 1
        torch._foreach_lerp_(ema, [w.detach() for w in weights], 1 - min(EMA_DECAY, (1 + done) / (10 + done)))
        mean = loss.item() if mean is None else mean + 0.01 * (loss.item() - mean)
        if done % 100 == 0:
            rate = (done - first) * args.batch / (time.time() - started)
            print(f"unet {done}/{steps} loss {mean:.4f} {rate:.0f} samples/s", flush=True)
        if done % args.save_every == 0 and done < steps:
            save(path, modules, optimizer, ema=ema, step=done)
            after(*averaged(ema, args.in_channels, vocab_size))
    if first < steps:
        save(path, modules, optimizer, ema=ema, step=steps)
    after(*averaged(ema, args.in_channels, vocab_size))


def averaged(ema: list[torch.Tensor], in_channels: int, vocab_size: int):
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
    parser.add_argument("--unet_samples", type=int, default=576_000, help="samples the UNet trains on, with repetition")
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

    def finish(unet, text_encoder) -> None:
        export(args.out, vae, unet, text_encoder, args.work / "tokenizer", args.prediction)

    train_unet(batches, vocab_size, args, device, finish)


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

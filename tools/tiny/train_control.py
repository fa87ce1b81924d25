"""Trains a ControlNet for edges on the bundled tiny model: python -m tools.tiny.train_control stable_diffusion/tiny

The model stays as it is; a copy of the encoder half of its UNet learns to draw what Canny's detector saw in the
training pictures (Zhang et al. 2023, "Adding conditional control to text-to-image diffusion models"). Half of the
captions are empty, so that the edges alone say enough. Nothing of the data's held-out combinations is shown to it.

The folder MODEL/controlnet is written in diffusers' layout, weights in float16, at each checkpoint. Seeded, and
resumed from the last checkpoint in --work when it was interrupted. About a quarter of an hour on an idle CPU core.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from stable_diffusion.images.canny import canny
from tools.tiny import data
from tools.tiny.autoencoder import encode_all
from tools.tiny.optimize import Optimizers, learning_rate, resume, save
from tools.tiny.train import EMA_DECAY, NOISES, denoising_loss

EMPTY = 0.5  # share of empty captions


def make_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """Starts as a copy of the UNet's encoder; the embedding of the hint halves it twice, as the tiny VAE does."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32))


def to_hint(image: np.ndarray) -> np.ndarray:
    """uint8 [64, 64, 3]: the edges of a picture, white on black."""
    return np.repeat(canny(image)[..., None], 3, axis=2)


def stored(path: Path, make) -> np.ndarray:
    """The array of a file, made at the first call."""
    if not path.exists():
        np.save(path, make())
    return np.load(path, mmap_mode="r")


def encode_pictures(folder: Path, images: np.ndarray, device: torch.device) -> np.ndarray:
    """float32 [n, 4, 16, 16]: their latents by the model's VAE, scaled to unit deviation."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).to(device)
    return encode_all(vae, images, device).numpy() * vae.config.scaling_factor


@torch.no_grad()
def encode_captions(folder: Path, captions: list[str]) -> np.ndarray:
    """float16 [n, 77, width]: what the model's text encoder makes of the captions."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)
    ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    parts = [text_encoder(part).last_hidden_state.half().numpy() for part in ids.split(64)]
    return np.concatenate(parts)


class Batches:
    """Training batches by step, from what is computed once: latents, contexts and hints of all pictures."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        images, captions = data.make_dataset(args.work, args.images, args.seed)
        self.latents = stored(args.work / "control_latents.npy", lambda: encode_pictures(args.model, images, device))
        self.contexts = stored(args.work / "control_contexts.npy", lambda: encode_captions(args.model, [*captions, ""]))
        self.hints = stored(args.work / "control_hints.npy", lambda: np.stack([canny(image) for image in images]))
        self.args, self.device = args, device

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [n, 4, 16, 16], context [n, 77, width], hint [n, 3, 64, 64] in 0..1; a context in two is empty."""
        rng = np.random.default_rng((self.args.seed, 4, step))
        rows = np.sort(rng.integers(len(self.latents), size=self.args.batch // NOISES))
        words = np.where(rng.random(len(rows)) < EMPTY, -1, rows)
        x, context, hint = (torch.from_numpy(a).to(self.device).float() for a in (
            self.latents[rows], self.contexts[words], self.hints[rows]
        ))  # fmt: skip
        return x, context, (hint / 255)[:, None].expand(-1, 3, -1, -1)


def controlled(unet: UNet2DConditionModel, controlnet: ControlNetModel, context: torch.Tensor, hint: torch.Tensor):
    """What `denoising_loss` asks: the noise by the UNet, its decoder corrected by the ControlNet."""
    context, hint = context.repeat(NOISES, 1, 1), hint.repeat(NOISES, 1, 1, 1)

    def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        down, mid = controlnet(x_t, t, context, controlnet_cond=hint, return_dict=False)
        return unet(
            x_t, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False
        )[0]

    return predict


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Writes the averaged weights to MODEL/controlnet whenever a checkpoint was written."""
    torch.manual_seed(args.seed + 2)
    batches = Batches(args, device)
    unet = UNet2DConditionModel.from_pretrained(args.model / "unet", torch_dtype=torch.float32)
    unet = unet.to(device).eval().requires_grad_(False)
    scheduler = DDIMScheduler.from_pretrained(args.model / "scheduler")
    alphas, prediction = scheduler.alphas_cumprod.to(device), scheduler.config.prediction_type
    controlnet = make_controlnet(unet).to(device).train().requires_grad_(True)
    weights, path = list(controlnet.parameters()), args.work / "controlnet.pt"
    optimizer = Optimizers(controlnet, weight_decay=1e-2)
    state = resume(path, controlnet, optimizer)
    ema = state.get("ema") or [w.detach().clone() for w in weights]
    first, steps, started, mean = state["step"], args.samples // args.batch, time.time(), None
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        x, context, hint = batches(step)
        loss = denoising_loss(controlled(unet, controlnet, context, hint), x, alphas, prediction, generator)
        optimizer.step(loss, learning_rate(args.lr, step, steps, warmup=100, hold=0.4))
        done = step + 1
        torch._foreach_lerp_(ema, [w.detach() for w in weights], 1 - min(EMA_DECAY, (1 + done) / (10 + done)))
        mean = loss.item() if mean is None else mean + 0.02 * (loss.item() - mean)
        if done % 50 == 0:
            rate = (done - first) * args.batch / (time.time() - started)
            print(f"controlnet {done}/{steps} loss {mean:.4f} {rate:.0f} samples/s", flush=True)
        if done % args.save_every == 0 or done == steps:
            save(path, controlnet, optimizer, ema=ema, step=done)
            export(controlnet, ema, args.model / "controlnet")


@torch.no_grad()
def export(controlnet: ControlNetModel, ema: list[torch.Tensor], folder: Path) -> None:
    """The averaged weights in float16, in diffusers' layout."""
    averaged = copy.deepcopy(controlnet)
    for weight, value in zip(averaged.parameters(), ema, strict=True):
        weight.copy_(value)
    averaged.cpu().half().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the trained tiny model; its controlnet/ is rewritten")
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="data set and checkpoints")
    parser.add_argument("--images", type=int, default=16_000, help="pictures to draw, if none lie in --work")
    parser.add_argument("--samples", type=int, default=80_000, help="samples to train on, with repetition")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save_every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one per free core at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    train(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()

"""Trains a LoRA for the bundled tiny model: python -m tools.tiny.train_lora stable_diffusion/tiny

Its style is neon: objects glow as thin tubes of their colour in the dark, which the model does not know. Captions are
those of the data set and say nothing of it, so that no word is needed. Factors beside the UNet's attentions and
convolutions (Hu et al. 2021) learn it; the model stays as it is. Held-out combinations are not shown.

The file MODEL/lora/neon.safetensors is written under the names of peft, in float16, every 250 steps; the one in the
package is that of step 2,250. Seeded. About a quarter of an hour on an idle CPU core.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from tools.tiny import data
from tools.tiny.optimize import learning_rate
from tools.tiny.train import NOISES, denoising_loss
from tools.tiny.train_control import encode_captions, encode_pictures

TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0)|(down_blocks\.0|up_blocks\.[12])\..*\.conv[12]"
NIGHT = (18, 16, 40)
TUBE, GLOW = 2.2, 6.0  # pixels: half the width of a tube, and how far it shines


def neon(scene: data.Scene) -> np.ndarray:
    """uint8 [64, 64, 3]: the objects of a scene as tubes of light, whatever their background is."""
    image = np.tile(np.float32(NIGHT), (data.SIZE, data.SIZE, 1))
    for thing in scene.things:
        away = np.abs(data.distance(thing.shape, thing.cx, thing.cy, thing.radius) + TUBE / 2)[..., None]
        colour = 50 + 0.8 * np.float32(data.COLOURS[thing.colour])  # black shines too
        image = image + 0.6 * np.exp(-np.square(away / GLOW)) * (colour - image)
        image = image + np.clip(TUBE + 0.5 - away, 0, 1) * (0.5 * colour + 127 - image)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def train(args: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(args.seed)
    examples = [data.example(args.seed + 1, index) for index in range(args.images)]
    pictures = np.stack([neon(scene) for _, _, scene in examples])
    latents = torch.from_numpy(encode_pictures(args.model, pictures, device))
    contexts = torch.from_numpy(encode_captions(args.model, [caption for caption, _, _ in examples]))
    unet = UNet2DConditionModel.from_pretrained(args.model / "unet", torch_dtype=torch.float32).to(device)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS))
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    scheduler = DDIMScheduler.from_pretrained(args.model / "scheduler")
    alphas, prediction, mean = scheduler.alphas_cumprod.to(device), scheduler.config.prediction_type, None
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(args.steps):
        rows = torch.randint(len(latents), (args.batch // NOISES,), generator=generator)
        context = contexts[rows].to(device).float().repeat(NOISES, 1, 1)
        loss = denoising_loss(
            lambda x_t, t, context=context: unet(x_t, t, context).sample, latents[rows].to(device), alphas, prediction,
            generator,
        )  # fmt: skip
        optimizer.param_groups[0]["lr"] = learning_rate(args.lr, step, args.steps, warmup=50, hold=0.3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else mean + 0.02 * (loss.item() - mean)
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            print(f"lora {step + 1}/{args.steps} loss {mean:.4f}", flush=True)
            write(unet, args.model / "lora" / "neon.safetensors")


def write(unet: UNet2DConditionModel, path: Path) -> None:
    """The factors in float16; alpha is the rank, so the file needs none."""
    path.parent.mkdir(exist_ok=True)
    factors = {f"unet.{name}": factor.cpu().half() for name, factor in get_peft_model_state_dict(unet).items()}
    save_file(factors, path, metadata={"format": "pt", "modelspec.title": path.stem})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the tiny model; its lora/neon.safetensors is rewritten")
    parser.add_argument("--images", type=int, default=4_000, help="pictures to draw")
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one per free core at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()

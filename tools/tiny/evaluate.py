"""Measures a tiny model on 200 held-out captions: python -m tools.tiny.evaluate stable_diffusion/tiny

150 captions ask for one object, 50 for two side by side; none of their (colour, shape, background) triples was trained
on. The seed of a caption is its number. Images come from this library, or with --backend diffusers from its oracle.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tools.tiny.data import Scene, held_out_examples
from tools.tiny.score import score_pair, score_single

WANTED = {"colour": 95, "background": 97, "shape": 90, "order": 85, "VAE PSNR": 32}
Generate = Callable[[list[str], list[int]], np.ndarray]  # captions, seeds -> uint8 [n, 64, 64, 3]


def library(
    folder: str, steps: int | None = None, guidance: float | None = None, sampler: str | None = None
) -> Generate:
    """Images by this library; None means the model's own default."""
    from stable_diffusion import StableDiffusion

    model = StableDiffusion(folder)

    def generate(captions: list[str], seeds: list[int]) -> np.ndarray:
        images = []
        for caption, seed in zip(captions, seeds, strict=True):
            options = {"num_steps": steps, "cfg_weight": guidance, "sampler": sampler}
            *_, x_0 = model.generate_latents(caption, seed=seed, **options)
            images.append(np.array(model.decode(x_0))[0])
        return (np.stack(images) * 255 + 0.5).astype(np.uint8)

    return generate


def oracle(
    folder: str, steps: int | None = None, guidance: float | None = None, sampler: str | None = None
) -> Generate:
    """Images by diffusers with the folder's own scheduler, fifty at a time."""
    import torch
    from diffusers import StableDiffusionPipeline

    if sampler is not None:
        raise ValueError("--sampler needs --backend library; diffusers takes the folder's scheduler")
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def generate(captions: list[str], seeds: list[int]) -> np.ndarray:
        parts = []
        for i in range(0, len(captions), 50):
            noise = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + 50]]
            options = {"num_inference_steps": steps or 20, "guidance_scale": 4.0 if guidance is None else guidance}
            parts.append(pipe(captions[i : i + 50], generator=noise, output_type="np", **options).images)
        return (np.concatenate(parts) * 255 + 0.5).astype(np.uint8)

    return generate


def vae_psnr(folder: str, n: int = 200, seed: int = 1) -> float:
    """Mean PSNR in dB of held-out images after diffusers' AutoencoderKL encoded (mode) and decoded them."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    images = np.stack([image for _, image, _ in held_out_examples(n, seed)])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        y = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(50)])
    return float((-10 * torch.log10(((x - y.clamp(-1, 1)) / 2).square().mean(dim=(1, 2, 3)))).mean())


def evaluate(generate: Generate, singles: int = 150, pairs: int = 50, seed: int = 1) -> tuple[dict[str, float], list]:
    """Shares in percent by name, and the examples with their images: (caption, scene, image, what was right)."""
    examples: list[tuple[str, Scene]] = [(c, s) for c, _, s in held_out_examples(singles, seed)]
    examples += [(c, s) for c, _, s in held_out_examples(pairs, seed, kind="beside")]
    images = generate([caption for caption, _ in examples], list(range(len(examples))))
    right, rows = defaultdict(list), []
    for (caption, scene), image in zip(examples, images, strict=True):
        score = (score_single if scene.relation is None else score_pair)(image, scene)
        rows.append((caption, scene, image, score))
        for name, value in score.items():
            right[name].append(value)
    return {name: 100 * float(np.mean(values)) for name, values in right.items()}, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a model in diffusers' layout")
    parser.add_argument("--backend", choices=("library", "diffusers"), default="library")
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--sampler", help="default: the model's")
    parser.add_argument("--captions", type=int, default=200, help="a quarter of them with two objects")
    parser.add_argument("--failures", type=Path, help="PNG for the images with an error; their captions are printed")
    args = parser.parse_args()
    make = library if args.backend == "library" else oracle
    generate, started = make(args.folder, args.steps, args.guidance, args.sampler), time.time()
    figures, rows = evaluate(generate, args.captions - args.captions // 4, args.captions // 4)
    seconds = (time.time() - started) / args.captions
    figures["VAE PSNR"] = vae_psnr(args.folder)
    for name, value in figures.items():
        wanted = f"  (wanted: {WANTED[name]})" if name in WANTED else ""
        print(f"{name:14} {value:6.2f} {'dB' if 'PSNR' in name else '%'}{wanted}")
    print(f"{seconds:.2f} s an image")
    wrong = [row for row in rows if not all(row[3].values())]
    if args.failures is not None and wrong:
        from PIL import Image

        for caption, _, _, score in wrong:
            print(f"{caption}: wrong {', '.join(name for name, good in score.items() if not good)}")
        blank = np.zeros_like(wrong[0][2])
        images = [row[2] for row in wrong] + [blank] * (-len(wrong) % 8)
        Image.fromarray(np.vstack([np.hstack(images[i : i + 8]) for i in range(0, len(images), 8)])).save(args.failures)


if __name__ == "__main__":
    main()

"""Fits the colours of previews to the bundled model's latents: python -m tools.tiny.fit_preview

A latent position stands for 4 x 4 pixels. Their mean colour, in [-1, 1], is predicted from its four channels by least
squares, over training pictures that the model's own autoencoder encodes. What is printed goes into
`stable_diffusion/app/preview.py`; the residuals are measured on held-out pictures.
"""

import argparse

import mlx.core as mx
import numpy as np

from stable_diffusion import StableDiffusion
from tools.tiny import data


def pairs(model: StableDiffusion, images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [64, 64, 3] each -> (latent channels and a one [N, 5], mean colours [N, 3]) of all positions."""
    pixels = np.stack(images).astype(np.float32) / 127.5 - 1
    unit = model.pixels_per_latent
    n, height, width = len(pixels), pixels.shape[1] // unit, pixels.shape[2] // unit
    latents = np.concatenate([np.array(model.encode(mx.array(pixels[i : i + 50]))) for i in range(0, n, 50)])
    colours = pixels.reshape(n, height, unit, width, unit, 3).mean(axis=(2, 4))
    return np.concatenate([latents, np.ones((*latents.shape[:3], 1))], -1).reshape(-1, 5), colours.reshape(-1, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="alias, Hub id or folder")
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    model = StableDiffusion(args.model)
    x, y = pairs(model, [data.example(0, i)[1] for i in range(args.images)])
    factors, *_ = np.linalg.lstsq(x, y, rcond=None)
    for row in factors.T:
        print("(" + ", ".join(f"{value:.4f}" for value in row) + "),")
    x, y = pairs(model, [image for _, image, _ in data.held_out_examples(200)])
    residual = y - x @ factors
    share = 1 - residual.var(axis=0) / y.var(axis=0)
    print("held out: rms", np.sqrt((residual**2).mean(axis=0)).round(3), "share explained", share.round(3))


if __name__ == "__main__":
    main()

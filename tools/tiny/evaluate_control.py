"""Measures whether the tiny ControlNet is followed: python -m tools.tiny.evaluate_control stable_diffusion/tiny

Hints are the edges of held-out pictures of one object; none of their (colour, shape, background) triples was trained
on. Each is drawn with and without the ControlNet, with its caption, with an empty one and with that of the next
picture, by diffusers' own pipeline, the seed of a picture being its number. Printed for each of the six:

    IoU     of the drawn object with the one in the picture the edges came from, mean, lowest decile, share >= 0.8;
            drawn is what differs from the frame's colour by more than half of the largest difference
    colour, background, shape    share of pictures that have those of the caption (shape: of the hint), in percent
"""

import argparse
import warnings
from pathlib import Path

import numpy as np

from tools.tiny.data import Scene, coverage, held_out_examples
from tools.tiny.score import nearest_shape, object_mask, score_single
from tools.tiny.train_control import to_hint

COLUMNS = ("IoU", "10 %", ">= 0.8", "colour", "background", "shape")


def true_mask(scene: Scene) -> np.ndarray:
    """[64, 64] bool: where the scene's only object is."""
    (thing,) = scene.things
    return coverage(thing.shape, thing.cx, thing.cy, thing.radius) > 0.5


def overlap(image: np.ndarray, scene: Scene) -> float:
    """IoU of the object seen in a uint8 [64, 64, 3] picture with the scene's."""
    seen, true = object_mask(image), true_mask(scene)
    return float((seen & true).sum() / (seen | true).sum())


def oracle(model: Path, controlnet: Path, steps: int, guidance: float):
    """A function (captions, hints uint8 [n, 64, 64, 3], scale) -> uint8 [n, 64, 64, 3] by diffusers, 50 at a time."""
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    options = {"torch_dtype": torch.float32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionControlNetPipeline.from_pretrained(
            model, controlnet=ControlNetModel.from_pretrained(controlnet, **options), **options
        )
    pipe.set_progress_bar_config(disable=True)

    def generate(captions: list[str], hints: np.ndarray, scale: float) -> np.ndarray:
        parts, images = [], torch.from_numpy(hints).permute(0, 3, 1, 2).float() / 255
        for i in range(0, len(captions), 50):
            noise = [torch.Generator().manual_seed(seed) for seed in range(i, min(i + 50, len(captions)))]
            parts.append(
                pipe(
                    captions[i : i + 50],
                    image=images[i : i + 50],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    controlnet_conditioning_scale=scale,
                    generator=noise,
                    output_type="np",
                ).images
            )
        return (np.concatenate(parts) * 255 + 0.5).astype(np.uint8)

    return generate


def row(images: np.ndarray, asked: list[Scene] | None, hinted: list[Scene]) -> list[str]:
    """IoU: mean, lowest decile, share >= 0.8; share of right colours, backgrounds (None: none was asked), shapes."""
    overlaps = np.array([overlap(image, scene) for image, scene in zip(images, hinted, strict=True)])
    cells = [f"{overlaps.mean():.3f}", f"{np.quantile(overlaps, 0.1):.3f}", percent(overlaps >= 0.8)]
    if asked is None:
        cells += ["-", "-"]
    else:
        scores = [score_single(image, scene) for image, scene in zip(images, asked, strict=True)]
        cells += [percent([score[name] for score in scores]) for name in ("colour", "background")]
    shapes = [nearest_shape(object_mask(image)) for image in images]
    return [*cells, percent([shape == scene.things[0].shape for shape, scene in zip(shapes, hinted, strict=True)])]


def percent(right) -> str:
    return f"{100 * np.mean(right):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the tiny model")
    parser.add_argument("--controlnet", type=Path, help="default: MODEL/controlnet")
    parser.add_argument("--pictures", type=int, default=120)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1, help="of the held-out pictures")
    parser.add_argument("--sheet", type=Path, help="PNG: 16 pictures; rows: picture, hint, then the rows of the table")
    args = parser.parse_args()
    generate = oracle(args.model, args.controlnet or args.model / "controlnet", args.steps, args.guidance)
    examples = held_out_examples(args.pictures, args.seed)
    captions, scenes = [caption for caption, _, _ in examples], [scene for _, _, scene in examples]
    hints = np.stack([to_hint(image) for _, image, _ in examples])
    asks = {
        "its own": (captions, scenes),
        "empty": ([""] * len(captions), None),
        "the next's": (captions[1:] + captions[:1], scenes[1:] + scenes[:1]),
    }
    sheet = [np.stack([image for _, image, _ in examples]), hints]
    print(f"{'caption':12}{'ControlNet':12}", *(f"{name:>10}" for name in COLUMNS))
    for name, (words, asked) in asks.items():
        for scale in (1.0, 0.0):
            images = generate(words, hints, scale)
            sheet.append(images)
            cells = row(images, asked, scenes)
            print(f"{name:12}{'yes' if scale else 'no':12}", *(f"{cell:>10}" for cell in cells), flush=True)
    if args.sheet is not None:
        from PIL import Image

        Image.fromarray(np.vstack([np.hstack(images[:16]) for images in sheet])).save(args.sheet)


if __name__ == "__main__":
    main()

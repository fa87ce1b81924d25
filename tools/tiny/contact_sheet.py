"""Renders captions x seeds with this library into one PNG: python -m tools.tiny.contact_sheet sheet.png

Under each caption lie its images, one for each seed. Captions can be given; by default they show what the model knows.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stable_diffusion import StableDiffusion

CAPTIONS = (
    "a red circle on a blue background",
    "a large yellow star on a purple background",
    "a small pink heart at the top on a white background",
    "a green triangle left of an orange square",
    "a cyan moon above a white ring on a brown background",
    "a green outlined heart on a grey background",
    "a large striped purple diamond on a yellow background",
    "a white cross on the right in the night sky",
    "a black star on a yellow to red gradient",
    "a brown square right of a yellow circle on a pink background",
)


def render(model: StableDiffusion, captions: list[str], seeds: int, steps: int | None) -> list[list[np.ndarray]]:
    """uint8 [H, W, 3] images, one list per caption."""
    rows = []
    for caption in captions:
        *_, x_0 = model.generate_latents(caption, n_images=seeds, num_steps=steps, seed=0)
        rows.append(list((np.array(model.decode(x_0)) * 255 + 0.5).astype(np.uint8)))
    return rows


def sheet(rows: list[list[np.ndarray]], captions: list[str], zoom: int, columns: int) -> Image.Image:
    """The images, `zoom` times as large, each caption's in a row under it; the rows in `columns` columns."""
    margin, line, size = 6, 22, rows[0][0].shape[0] * zoom
    font = ImageFont.load_default(size=14)
    width, height = len(rows[0]) * (size + margin) + 3 * margin, size + line + 2 * margin
    lines = -(-len(rows) // columns)
    canvas = Image.new("RGB", (columns * width - margin, lines * height + margin), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (caption, images) in enumerate(zip(captions, rows, strict=True)):
        left, top = i % columns * width + margin, i // columns * height + margin
        draw.text((left, top), caption, fill="black", font=font)
        for c, image in enumerate(images):
            picture = Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + c * (size + margin), top + line))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("captions", nargs="*", default=CAPTIONS)
    parser.add_argument("--model", default="tiny", help="alias, Hub id or folder")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--zoom", type=int, default=1)
    parser.add_argument("--columns", type=int, default=2, help="captions beside one another")
    args = parser.parse_args()
    rows = render(StableDiffusion(args.model), args.captions, args.seeds, args.steps)
    sheet(rows, args.captions, args.zoom, args.columns).save(args.output)


if __name__ == "__main__":
    main()

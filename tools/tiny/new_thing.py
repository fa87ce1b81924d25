"""Draws a shape that the bundled model was never shown, and measures a LoRA that learned it.

python -m tools.tiny.new_thing draw FOLDER writes FOLDER/new, 12 captioned pictures of arrows in which no colour and no
background comes twice, and FOLDER/known, captioned pictures of what the model knows, for --prior.

python -m tools.tiny.new_thing measure LORA asks for 40 arrows in other colours and places, and says how many of them
are right; and for 40 known shapes, drawn with and without the LoRA. With --embedding the file holds the vectors of the
trigger, as train --embedding ohwx writes them.

--shape takes another shape in place of the arrow, such as a moon, for which a new word can be learned.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tools.tiny import data, score

SHAPE, TRIGGER = "arrow", "ohwx"
SHAPES = (*data.SHAPES, SHAPE)
KNOWN = 48  # pictures of known shapes beside the 12 new ones
SHOWN = (
    ("red", "white", None),
    ("blue", "yellow", "left"),
    ("green", "pink", "right"),
    ("yellow", "blue", None),
    ("purple", "grey", "top"),
    ("orange", "black", "bottom"),
    ("cyan", "brown", None),
    ("black", "orange", "left"),
    ("white", "red", "right"),
    ("pink", "green", None),
    ("brown", "cyan", "top"),
    ("grey", "purple", "bottom"),
)
_REACH = 13.0  # pixels from the centre to a place
_WHERE = {"centre": " in the centre", "left": " on the left", "right": " on the right", None: ""}


def caption_of(colour: str, background: str, place: str | None) -> str:
    """Words for an arrow: the trigger stands in the place of its name."""
    where = _WHERE.get(place, f" at the {place}")
    return f"{data.with_article(colour)} {TRIGGER}{where} on {data.with_article(background)} background"


def new_pictures(seed: int = 1, shape: str = SHAPE) -> list[tuple[str, np.ndarray]]:
    """The 12 pictures, uint8 [64, 64, 3], with their captions."""
    rng, found = np.random.default_rng(seed), []
    for colour, background, place in SHOWN:
        cx, cy = (data.SIZE / 2 + _REACH * direction for direction in data.PLACES[place or "centre"])
        thing = data.Thing(shape, colour, cx=cx, cy=cy, radius=float(rng.uniform(13, 17)))
        image = data.render(data.Scene((thing,), background, place), rng)
        found.append((caption_of(colour, background, place), image))
    return found


def write_pictures(folder: Path, pictures: list[tuple[str, np.ndarray]]) -> None:
    """Write 00.png, 00.txt, 01.png, ... to a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (caption, image) in enumerate(pictures):
        Image.fromarray(image).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption + "\n", encoding="utf-8")


def draw(folder: Path, shape: str = SHAPE) -> None:
    write_pictures(folder / "new", new_pictures(shape=shape))
    write_pictures(folder / "known", [data.example(5, number)[:2] for number in range(KNOWN)])


def prompts(count: int, seed: int = 7, shape: str = SHAPE) -> Iterator[tuple[str, data.Scene]]:
    """Prompts with the trigger, each second one with a place. None of their pairs of colours was shown."""
    rng, shown = np.random.default_rng(seed), {pair[:2] for pair in SHOWN}
    for number in range(count):
        while (pair := tuple(str(colour) for colour in rng.permutation(list(data.COLOURS))[:2])) in shown:
            pass
        place = list(data.PLACES)[number // 2 % len(data.PLACES)] if number % 2 else None
        yield caption_of(*pair, place), data.Scene((data.Thing(shape, pair[0]),), pair[1], place)


def place_of(mask: np.ndarray) -> str:
    """Name of the place that is nearest to the middle of a mask."""
    middle = np.argwhere(mask).mean(axis=0)[::-1] + 0.5 - data.SIZE / 2
    return min(data.PLACES, key=lambda place: np.linalg.norm(middle - _REACH * np.array(data.PLACES[place])))


def score_new(image: np.ndarray, scene: data.Scene) -> dict[str, bool]:
    """What a picture of one shape gets right; "place" is there where one was asked for."""
    found = score.score_single(image, scene, SHAPES)
    if scene.place is not None:
        found["place"] = place_of(score.object_mask(image)) == scene.place
    return found


def measure(
    sd, file: str | Path, count: int = 40, embedding: bool = False, shape: str = SHAPE
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Shares in percent by name, and the pictures of the new shape; image i has the seed i.

    ``file`` is a LoRA, or with ``embedding`` the vectors of the trigger, which stay in ``sd``. "changed" is the mean
    difference that the file makes to pictures of prompts without the trigger, in levels of 255.
    """
    known = data.held_out_examples(count, seed=3)
    before = [np.array(sd.generate(caption, seed=seed)[0]) for seed, (caption, _, _) in enumerate(known)]
    right, images = defaultdict(list), []
    attached = sd.load_embedding(file, TRIGGER) if embedding else sd.load_lora(str(file))
    for seed, (caption, scene) in enumerate(prompts(count, shape=shape)):
        images.append(np.array(sd.generate(caption, seed=seed)[0]))
        for name, is_right in score_new(images[-1], scene).items():
            right[name].append(is_right)
    for seed, ((caption, _, scene), old) in enumerate(zip(known, before, strict=True)):
        image = np.array(sd.generate(caption, seed=seed)[0])
        right["known right without it"].append(all(score.score_single(old, scene, SHAPES).values()))
        right["known right with it"].append(all(score.score_single(image, scene, SHAPES).values()))
        right["changed"].append(np.abs(image.astype(int) - old).mean() / 100)
    if not embedding:
        attached.detach()
    return {name: 100 * float(np.mean(values)) for name, values in right.items()}, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("draw", "measure"))
    parser.add_argument("path", type=Path, help="the folder to write, or the file to measure")
    parser.add_argument("--embedding", action="store_true", help="the file is an embedding, and no LoRA")
    parser.add_argument("--shape", choices=SHAPES, default=SHAPE, help="the new thing (arrow)")
    parser.add_argument("--count", type=int, default=40, help="pictures of the new shape, and of known ones")
    parser.add_argument("--sheet", type=Path, help="PNG for the pictures of the new shape")
    args = parser.parse_args()
    if args.command == "draw":
        return draw(args.path, args.shape)
    from stable_diffusion import StableDiffusion
    from stable_diffusion.models import cpu

    cpu.tune()
    figures, images = measure(StableDiffusion("tiny"), args.path, args.count, args.embedding, args.shape)
    for name, value in figures.items():
        print(f"{name:24} {value:6.2f} {'levels' if name == 'changed' else '%'}")
    if args.sheet is not None:
        rows = [np.hstack(images[first : first + 8]) for first in range(0, len(images) - 7, 8)]
        Image.fromarray(np.vstack(rows)).save(args.sheet)


if __name__ == "__main__":
    sys.exit(main())

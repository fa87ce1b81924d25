"""A procedural dataset of captioned 64x64 images whose captions can be checked by looking at pixels.

An image is one or two flat shapes on a background. Every choice (shape, colour, size, place, style, background,
wording) comes from one seeded generator, so that the n-th image of a seed is always the same. Shapes are signed
distance fields (negative inside, in units of the shape's radius): antialiased edges without supersampling.

A fixed tenth of all (colour, shape, background) triples is held out: the training never draws an object of that colour
and shape on that background, whatever the caption says. The evaluation asks for nothing else, so it measures
composition and not memory.
"""

import hashlib
import multiprocessing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

SIZE = 64  # pixels, both ways

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "orange": (250, 135, 20),
    "yellow": (250, 225, 50),
    "green": (30, 150, 60),
    "cyan": (60, 215, 220),
    "blue": (35, 70, 220),
    "purple": (125, 35, 165),
    "pink": (250, 140, 195),
    "brown": (115, 65, 30),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "grey": (140, 140, 140),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring", "moon")
SIZES: dict[str, tuple[float, float]] = {"small": (10.0, 11.5), "medium": (14.5, 17.0), "large": (20.5, 22.5)}  # radii
PLACES: dict[str, tuple[int, int]] = {
    "centre": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
}
RELATIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
NIGHT = (22, 26, 70)  # the night sky at its top; lighter towards the horizon
DARK = ("black", "blue", "purple", "brown")  # not drawn on the night sky

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


@dataclass(frozen=True)
class Thing:
    """One object: what it is and where it lies. Centre and radius in pixels."""

    shape: str
    colour: str
    size: str | None = None  # None: the caption does not say
    style: str = "plain"  # plain | outlined | striped
    cx: float = SIZE / 2
    cy: float = SIZE / 2
    radius: float = 16.0


@dataclass(frozen=True)
class Scene:
    """What one image shows. `background` is a colour, "night sky" or "<colour> to <colour> gradient"."""

    things: tuple[Thing, ...]
    background: str
    place: str | None = None  # of a single object; None: the caption does not say
    relation: str | None = None  # of the first of two objects to the second
    names_background: bool = True


def held_out(colour: str, shape: str, background: str) -> bool:
    """True for the fixed tenth of the triples that training never sees."""
    return hashlib.sha256(f"{colour}/{shape}/{background}".encode()).digest()[0] < 26


# --- signed distances: x, y in radii from the centre, y down; negative inside ---


def _polygon(points: list[tuple[float, float]], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Exact distance to a closed polygon (Inigo Quilez, 'sdPolygon')."""
    squared = np.full_like(x, np.inf)
    sign = np.ones_like(x)
    for (ax, ay), (bx, by) in zip(points, points[-1:] + points[:-1], strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        above_a, below_b, leftward = y >= ay, y < by, ex * wy > ey * wx
        crosses = (above_a & below_b & leftward) | ~(above_a | below_b | leftward)
        sign = np.where(crosses, -sign, sign)
    return sign * np.sqrt(squared)


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.95


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.76) - 0.22


def _moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 0.98, 0.80 - np.hypot(x - 0.50, y))


_STAR = [
    (r * np.sin(k * np.pi / 5), 0.06 - r * np.cos(k * np.pi / 5))
    for k in range(10)
    for r in [1.06 if k % 2 == 0 else 0.45]
]
_A = np.linspace(0, 2 * np.pi, 32, endpoint=False)
_HEART = [
    (
        float(16 * np.sin(a) ** 3 / 17),
        float(-(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)) / 16 - 0.12),
    )
    for a in _A
]
_B = 0.32  # half the width of the cross's bars
_CROSS = [
    (-_B, -1),
    (_B, -1),
    (_B, -_B),
    (1, -_B),
    (1, _B),
    (_B, _B),
    (_B, 1),
    (-_B, 1),
    (-_B, _B),
    (-1, _B),
    (-1, -_B),
    (-_B, -_B),
]
_ARROW = [(0, -1), (0.95, 0.02), (0.4, 0.02), (0.4, 0.95), (-0.4, 0.95), (-0.4, 0.02), (-0.95, 0.02)]  # never trained
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0, -0.92), (1.0, 0.82), (-1.0, 0.82)],
    "diamond": [(0, -1.08), (0.82, 0), (0, 1.08), (-0.82, 0)],
    "star": _STAR,
    "heart": _HEART,
    "cross": _CROSS,
    "arrow": _ARROW,
}
_CURVES = {"circle": _circle, "ring": _ring, "moon": _moon}


def distance(shape: str, cx: float, cy: float, radius: float) -> np.ndarray:
    """[64, 64] signed distance in pixels from each pixel's centre to the shape's edge."""
    x, y = (_X - cx) / radius, (_Y - cy) / radius
    field = _CURVES[shape](x, y) if shape in _CURVES else _polygon(_POLYGONS[shape], x, y)
    return (field * radius).astype(np.float32)


def coverage(shape: str, cx: float, cy: float, radius: float) -> np.ndarray:
    """[64, 64] share of each pixel that lies inside the shape, 0..1."""
    return np.clip(0.5 - distance(shape, cx, cy, radius), 0, 1)


# --- pixels ---


def _paint_background(background: str, rng: np.random.Generator) -> np.ndarray:
    down = (_Y / SIZE)[..., None]
    if background == "night sky":
        image = np.float32(NIGHT) + down * np.float32([22, 24, 40])
        for _ in range(rng.integers(5, 9)):  # few, soft stars: 16x16 latents hold no finer ones
            sx, sy = rng.uniform(3, SIZE - 3, 2)
            glow = np.exp(-((_X - sx) ** 2 + (_Y - sy) ** 2) / (2 * rng.uniform(1.0, 1.5) ** 2))[..., None]
            image = image + glow * (np.float32([235, 235, 205]) - image)
        return image
    if background.endswith("gradient"):
        top, bottom = (np.float32(COLOURS[c]) for c in background.removesuffix(" gradient").split(" to "))
        return top + down * (bottom - top)
    return np.float32(COLOURS[background]) * (1.03 - 0.06 * down)


def _paint(image: np.ndarray, thing: Thing) -> np.ndarray:
    colour = np.float32(COLOURS[thing.colour])
    field = distance(thing.shape, thing.cx, thing.cy, thing.radius)
    if thing.style == "outlined":
        width = max(3.2, 0.2 * thing.radius)
        field = np.abs(field + width / 2) - width / 2
    across = ((_X - thing.cx) + (_Y - thing.cy)) / thing.radius  # light falls from the top left
    paint = colour * (1 - 0.05 * across[..., None])
    if thing.style == "striped":
        period = max(9.0, 0.62 * thing.radius)
        stripe = np.clip(0.5 + (np.abs((_Y - thing.cy) % period - period / 2) - period / 4), 0, 1)[..., None]
        pale = (
            np.float32([250, 250, 250]) if thing.colour not in ("white", "yellow", "grey") else np.float32([60, 60, 60])
        )
        paint = paint + stripe * 0.6 * (pale - paint)
    inside = np.clip(0.5 - field, 0, 1)[..., None]
    return image + inside * (paint - image)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """uint8 [64, 64, 3]."""
    image = _paint_background(scene.background, rng)
    for thing in scene.things:
        image = _paint(image, thing)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


# --- captions ---


def _pick(rng: np.random.Generator, options):  # a tuple, list or dict's keys
    options = list(options)
    return options[int(rng.integers(len(options)))]


def with_article(words: str) -> str:
    """The words after "a", or after "an" where they begin with a vowel."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def _noun(thing: Thing, rng: np.random.Generator) -> str:
    style = "" if thing.style == "plain" else thing.style + " "
    size = "" if thing.size is None else {"large": _pick(rng, ("large", "big"))}.get(thing.size, thing.size) + " "
    words = size + thing.colour + " " + style + thing.shape
    if style and rng.random() < 0.5:
        words = size + style + thing.colour + " " + thing.shape
    return with_article(words)


def _behind(background: str, rng: np.random.Generator) -> str:
    if background == "night sky":
        return _pick(rng, (" in a night sky", " in the night sky", " on a night sky"))
    if background.endswith("gradient"):
        return f" on {with_article(background)}" if rng.random() < 0.6 else f" on {with_article(background)} background"
    return _pick(
        rng,
        (f" on {with_article(background)} background",) * 4
        + (f" on {background}", f" against {with_article(background)} background"),
    )


def caption(scene: Scene, rng: np.random.Generator, varied: bool = True) -> str:
    """Words for a scene; `varied` adds openings such as "a picture of" now and then."""
    nouns = [_noun(thing, rng) for thing in scene.things]
    if scene.relation is not None:
        middle = {
            "left": ("left of", "left of", "to the left of"),
            "right": ("right of", "right of", "to the right of"),
            "above": ("above", "above", "over"),
            "below": ("below", "below", "under"),
        }[scene.relation]
        words = f"{nouns[0]} {_pick(rng, middle)} {nouns[1]}"
    else:
        words = nouns[0]
    if scene.place is not None:
        words += {"centre": _pick(rng, (" in the centre", " in the middle"))}.get(
            scene.place, _pick(rng, (f" at the {scene.place}", f" on the {scene.place}"))
        )
    if scene.names_background:
        words += _behind(scene.background, rng)
    if varied and rng.random() < 0.12:
        words = _pick(rng, ("a picture of ", "a drawing of ", "an image of ")) + words
    return words


# --- what is drawn ---


def _single(rng: np.random.Generator, background: str, style: str) -> Scene:
    colours = [c for c in COLOURS if c not in background.split() and not (background == "night sky" and c in DARK)]
    said = rng.random() < 0.5
    size = _pick(rng, SIZES)
    radius = rng.uniform(*SIZES[size]) if said else rng.uniform(13.0, 19.0)
    place = _pick(rng, PLACES) if rng.random() < 0.4 else None
    dx, dy = PLACES[place or "centre"]
    reach = min(15.0, 30.5 - radius)
    jitter = 1.5 if place is not None else min(6.0, reach)
    cx, cy = (SIZE / 2 + d * reach + rng.uniform(-jitter, jitter) for d in (dx, dy))
    low, high = 1.07 * radius + 1, SIZE - 1.07 * radius - 1
    thing = Thing(
        _pick(rng, SHAPES), _pick(rng, colours), size if said else None, style,
        float(np.clip(cx, low, high)), float(np.clip(cy, low, high)), float(radius),
    )  # fmt: skip
    return Scene((thing,), background, place, names_background=style == "plain" or rng.random() < 0.8)


def _double(rng: np.random.Generator, background: str) -> Scene:
    colours = rng.permutation([c for c in COLOURS if c != background])[:2]
    relation = _pick(rng, ("left", "right", "left", "right", "above", "below"))
    dx, dy = RELATIONS[relation]
    things = []
    for sign, colour in zip((1, -1), colours, strict=True):
        radius = rng.uniform(11.0, 14.0)
        cx = SIZE / 2 + sign * dx * 15.5 + rng.uniform(-1.5, 1.5) * (1 if dx else 2)
        cy = SIZE / 2 + sign * dy * 15.5 + rng.uniform(-1.5, 1.5) * (1 if dy else 2)
        things.append(Thing(_pick(rng, SHAPES), str(colour), cx=float(cx), cy=float(cy), radius=float(radius)))
    return Scene(tuple(things), background, relation=relation, names_background=bool(rng.random() < 0.6))


def draw_scene(rng: np.random.Generator) -> Scene:
    """One random scene, held-out triples included: 60 % plain single objects, 20 % pairs, 20 % styles."""
    kind, background = rng.random(), _pick(rng, COLOURS)
    if kind < 0.60:
        return _single(rng, background, "plain")
    if kind < 0.80:
        return _double(rng, background)
    if kind < 0.86:
        return _single(rng, background, "outlined")
    if kind < 0.91:
        return _single(rng, background, "striped")
    if kind < 0.955:
        return _single(rng, "night sky", "plain")
    return _single(rng, " to ".join(rng.permutation(list(COLOURS))[:2]) + " gradient", "plain")


def is_held_out(scene: Scene) -> bool:
    return any(held_out(thing.colour, thing.shape, scene.background) for thing in scene.things)


def example(seed: int, index: int) -> tuple[str, np.ndarray, Scene]:
    """Training example `index` of `seed`: caption, uint8 [64, 64, 3], and the scene. Never a held-out triple."""
    rng = np.random.default_rng((seed, index))
    while is_held_out(scene := draw_scene(rng)):
        pass
    return caption(scene, rng), render(scene, rng), scene


def held_out_examples(n: int, seed: int = 0, kind: str = "single") -> list[tuple[str, np.ndarray, Scene]]:
    """The first n held-out examples of a seed.

    `kind`: "single" (plain single objects), "beside" (two objects left or right of one another, background named).
    """
    rng, found = np.random.default_rng((seed, 0x7E57)), []
    while len(found) < n:
        background = _pick(rng, COLOURS)
        if kind == "single":
            scene = _single(rng, background, "plain")
        else:
            scene = replace(_double(rng, background), names_background=True)
            if scene.relation not in ("left", "right"):
                continue
        if is_held_out(scene):
            found.append((caption(scene, rng, varied=False), render(scene, rng), scene))
    return found


def _draw_part(args: tuple[str, int, int, int]) -> list[str]:
    path, seed, first, last = args
    images = np.lib.format.open_memmap(path, mode="r+")
    captions = []
    for index in range(first, last):
        words, image, _ = example(seed, index)
        images[index] = image
        captions.append(words)
    return captions


def make_dataset(work: Path, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Draws `count` examples once: images.npy uint8 [count, 64, 64, 3] and captions.txt, one line each."""
    images, captions = work / "images.npy", work / "captions.txt"
    if not captions.exists():
        np.lib.format.open_memmap(images, mode="w+", dtype=np.uint8, shape=(count, SIZE, SIZE, 3)).flush()
        parts = [(str(images), seed, first, min(first + 1000, count)) for first in range(0, count, 1000)]
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            lines = [words for part in pool.imap(_draw_part, parts) for words in part]
        captions.write_text("\n".join(lines) + "\n")
    return np.load(images, mmap_mode="r"), captions.read_text().splitlines()

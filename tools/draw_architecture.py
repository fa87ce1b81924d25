"""Draw the picture of the architecture from the imports of today: python -m tools.draw_architecture

A box is a folder of the package, an arrow leads to a folder that it imports from. An import that a chain of other
arrows implies is omitted. The texts in the boxes are those of the list in ARCHITECTURE.md. The boxes and arrows are
stored in the picture too, for the test that compares them with the code.
"""

import ast
import json
import math
import re
from collections.abc import Sequence
from graphlib import TopologicalSorter
from itertools import pairwise, permutations, product
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "stable_diffusion"
PICTURE = ROOT / "docs" / "pictures" / "architecture.png"
MODULES = "stable_diffusion/*.py"  # the box of the modules in the package's root

WIDTH, ROW, GAP = 1000, 112, 36  # pixels: the picture, a row of boxes with the space below it, between two boxes
_BOX, _MARGIN = (440, 66), 12
_SCALE, _SMOOTH = 2, 2  # stored for a screen of high density, and drawn larger than that
_TEXT, _QUIET, _LINE, _FILL = "#111111", "#333333", "#4a5a70", "#f2f5f9"

Arrows = dict[str, set[str]]
Place = tuple[str, ...]  # (name of a box,), or (name, target) where a long arrow passes a row
Rows = Sequence[Sequence[Place]]
Point = tuple[float, float]


def imports() -> Arrows:
    """Read which folders each folder imports from."""
    found: Arrows = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.name == "__main__.py":  # starts the commands
            continue
        path = file.relative_to(PACKAGE).parts
        here = _folder(path[0])
        targets = found.setdefault(here, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                module = [*path[: len(path) - node.level], *filter(None, (node.module or "").split("."))]
                targets |= {_folder([*module, alias.name][0]) for alias in node.names} - {here}
    return found


def _folder(name: str) -> str:
    return f"{name}/" if (PACKAGE / name).is_dir() else MODULES


def direct(arrows: Arrows) -> Arrows:
    """Omit each arrow that a chain of other arrows implies."""
    below: Arrows = {}
    for name in TopologicalSorter(arrows).static_order():
        below[name] = arrows[name].union(*(below[target] for target in arrows[name]))
    return {name: to - set().union(*(below[target] for target in to)) for name, to in arrows.items()}


def boxes() -> dict[str, str]:
    """Return the name and the text of each box."""
    tree = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    texts = dict(re.findall(r"^  (\w+/) +(.+?)(?: {2,}<-.*)?$", tree, re.MULTILINE))
    modules = [file.name for file in sorted(PACKAGE.glob("*.py")) if not file.name.startswith("__")]
    return {name: ", ".join(modules) if name == MODULES else texts[name] for name in sorted(imports())}


def described() -> str:
    """Return the boxes and arrows of today as JSON."""
    arrows = {name: sorted(to) for name, to in sorted(direct(imports()).items())}
    return json.dumps({"boxes": boxes(), "arrows": arrows})


def layers(arrows: Arrows) -> Rows:
    """Place the boxes in rows from the top, each above all that it imports from, so that few arrows cross."""
    row: dict[str, int] = {}
    for name in reversed(list(TopologicalSorter(arrows).static_order())):
        row[name] = max((row[other] + 1 for other in row if name in arrows[other]), default=0)
    rows: list[list[Place]] = [[] for _ in range(max(row.values()) + 1)]
    for name in sorted(row):
        rows[row[name]].append((name,))
        for target in sorted(arrows[name]):
            for between in range(row[name] + 1, row[target]):
                rows[between].append((name, target))
    return min(map(list, product(*map(permutations, rows))), key=lambda chosen: _disorder(chosen, arrows))


def _disorder(rows: Rows, arrows: Arrows) -> tuple[int, float]:
    """Return how many arrows cross, and how far all of them lead to the side."""
    crossings, length = 0, 0.0
    for above, below in pairwise(rows):
        pairs = [(i, k) for i, a in enumerate(above) for k, b in enumerate(below) if _leads(arrows, a, b)]
        crossings += sum(i < other_i and k > other_k for i, k in pairs for other_i, other_k in pairs)
        length += sum(abs((i + 0.5) / len(above) - (k + 0.5) / len(below)) for i, k in pairs)
    return crossings, round(length, 6)


def _leads(arrows: Arrows, above: Place, place: Place) -> bool:
    if len(place) == 2:
        return above in (place, place[:1])
    return above[1] == place[0] if len(above) == 2 else place[0] in arrows[above[0]]


def draw() -> Image.Image:
    """Draw the picture."""
    arrows = direct(imports())
    rows = layers(arrows)
    sizes = {place: _width(len(places)) for places in rows for place in places}
    centres = {
        place: (WIDTH * (i + 0.5) / len(places), _MARGIN + y * ROW + _BOX[1] / 2)
        for y, places in enumerate(rows)
        for i, place in enumerate(places)
    }
    factor = _SCALE * _SMOOTH
    height = len(rows) * ROW - (ROW - _BOX[1]) + 2 * _MARGIN
    picture = Image.new("RGB", (WIDTH * factor, height * factor), "white")
    pen = ImageDraw.Draw(picture)
    starts, ends = _ends(rows, arrows, centres, sizes)
    for (above, below), start in starts.items():
        _arrow(pen, start, ends[above, below], has_head=len(below) == 1)
    for place, centre in centres.items():
        if len(place) == 2:
            continue
        _box(pen, place[0], boxes()[place[0]], centre, sizes[place])
    small = picture.resize((WIDTH * _SCALE, height * _SCALE), Image.Resampling.LANCZOS)
    return small.quantize(32, dither=Image.Dither.NONE)


def _width(number: int) -> float:
    return min(_BOX[0], WIDTH / number - GAP)


def _ends(rows: Rows, arrows: Arrows, centres: dict[Place, Point], sizes: dict[Place, float]) -> tuple[dict, dict]:
    """Return where each arrow leaves its box and where it arrives: side by side in the order of the other ends."""
    pairs = [(a, b) for upper, lower in pairwise(rows) for a in upper for b in lower if _leads(arrows, a, b)]
    result: tuple[dict, dict] = ({}, {})
    for side, points in enumerate(result):
        for place, (x, y) in centres.items():
            others = sorted((p for p in pairs if p[side] == place), key=lambda pair: centres[pair[1 - side]][0])
            for i, pair in enumerate(others):
                step = sizes[place] / (len(others) + 1)
                half = 0 if len(place) == 2 else _BOX[1] / 2 * (-1 if side else 1)
                points[pair] = (x + step * (i - (len(others) - 1) / 2), y + half)
    return result


def _arrow(pen: ImageDraw.ImageDraw, start: Point, end: Point, has_head: bool) -> None:
    factor = _SCALE * _SMOOTH
    (x0, y0), (x1, y1) = ((x * factor, y * factor) for x, y in (start, end))
    angle, size = math.atan2(y1 - y0, x1 - x0), 11 * factor
    back = (x1 - size * math.cos(angle), y1 - size * math.sin(angle))
    pen.line([(x0, y0), back if has_head else (x1, y1)], fill=_LINE, width=round(1.6 * factor))
    if has_head:
        side = 0.42 * size
        sine, cosine = side * math.sin(angle), side * math.cos(angle)
        pen.polygon(
            [(x1, y1), (back[0] - sine, back[1] + cosine), (back[0] + sine, back[1] - cosine)],
            fill=_LINE,
        )


def _box(pen: ImageDraw.ImageDraw, name: str, text: str, centre: Point, width: float) -> None:
    factor = _SCALE * _SMOOTH
    left, top, right, bottom = (
        factor * value
        for value in (centre[0] - width / 2, centre[1] - _BOX[1] / 2, centre[0] + width / 2, centre[1] + _BOX[1] / 2)
    )
    pen.rounded_rectangle((left, top, right, bottom), 8 * factor, fill=_FILL, outline=_LINE, width=round(1.4 * factor))
    middle = centre[0] * factor
    title, font = ImageFont.load_default(19 * factor), ImageFont.load_default(13 * factor)
    number = len(_wrapped(text, font, (width - 20) * factor))
    lines = next(
        lines for room in range(80, int(width)) if len(lines := _wrapped(text, font, room * factor)) <= number
    )  # about equally long
    line, gap = 16 * factor, 22 * factor
    y = (top + bottom) / 2 - (gap + line * len(lines)) / 2
    pen.text((middle, y + gap / 2), name, fill=_TEXT, font=title, anchor="mm", stroke_width=1)
    for i, words in enumerate(lines):
        pen.text((middle, y + gap + line * (i + 0.5)), words, fill=_QUIET, font=font, anchor="mm")


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def main() -> None:
    """Write the picture."""
    info = PngImagePlugin.PngInfo()
    info.add_text("architecture", described())
    draw().save(PICTURE, pnginfo=info, optimize=True)


if __name__ == "__main__":
    main()

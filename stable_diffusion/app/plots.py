"""Comparison grids: the images of lists side by side, with what differs written at the columns and rows."""

import argparse
import logging
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_log = logging.getLogger("stable_diffusion")

_LARGEST_SIDE = 16383  # pixels; what a WebP file can hold
_GAP = 8
_FONT_SHARE, _FONT_SIZES = 1 / 24, (12, 40)  # of an image's width, and the least and most in pixels
_LINE = 1.25  # font sizes
_LABEL_WIDTH = 9  # font sizes: what a label is given where the images are narrower
_MOST_LINES = 4
_LONGEST_LABEL = 400  # letters that are looked at
# What Pillow's own font has beside ASCII, and what can be written with that.
_MORE_LETTERS = "©«°±´·»‘’“”…‹›⁄™"
_DASHES = str.maketrans("–—−", "---")


@dataclass(frozen=True)
class Plot:
    """A grid: the labels of its columns and rows, and the number of the image of each (row, column).

    ``rows`` is empty where one thing differs only. ``title`` says what is shared by the images of this grid, if there
    are several grids.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: dict[tuple[int, int], int]


def compare(images: Sequence[tuple[argparse.Namespace, int]]) -> list[Plot]:
    """The grids that show what differs among images; none where no flag had several values.

    The first such flag of the command line makes the columns, the second the rows, and each combination of what further
    ones say makes a grid. After the flags several prompts are one more, and then several images of one setting.

    Args:
        images: the job and the seed of each image, in the order in which ``draw`` is given the images.
    """
    axes = _axes(images)
    if not axes:
        return []
    columns, rows = dict(axes[0]), dict(axes[1]) if len(axes) > 1 else {}
    column_of, row_of = ({value: i for i, value in enumerate(values)} for values in (columns, rows))
    found: dict[tuple, dict[tuple[int, int], int]] = {}
    for i in range(len(images)):
        row = row_of[axes[1][i][0]] if rows else 0
        found.setdefault(tuple(axis[i] for axis in axes[2:]), {})[row, column_of[axes[0][i][0]]] = i
    return [
        Plot(", ".join(label for _, label in shared), tuple(columns.values()), tuple(rows.values()), cells)
        for shared, cells in found.items()
    ]


def _axes(images: Sequence[tuple[argparse.Namespace, int]]) -> list[list[tuple[Any, str]]]:
    """Of each thing that differs among the images its value and label for each image."""
    names = list(dict.fromkeys(name for job, _ in images for name in job.lists))
    if not names:
        return []
    axes = []
    for name in names:
        values = [seed if name == "seed" else getattr(job, name) for job, seed in images]
        axes.append([(value, _label(name, value)) for value in values])
    if len({job.number for job, _ in images}) > 1:
        axes.append([(job.number, _written(job.prompt) or f"prompt {job.number + 1}") for job, _ in images])
    if "seed" not in names and any(job.n_images > 1 for job, _ in images):
        same = len({job.seeds for job, _ in images}) == 1
        places = [(job.seeds.index(seed), seed) for job, seed in images]
        axes.append([(i, _label("seed", seed) if same else f"image {i + 1}") for i, seed in places])
    return axes


def _label(name: str, value: Any) -> str:
    if value is None:
        return f"{name} default"
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {_written(str(value))}"


def _written(text: str) -> str:
    """Text in letters that the font has: accents are left out. Empty where too little is left to be read."""
    plain = unicodedata.normalize("NFKD", text[:_LONGEST_LABEL].translate(_DASHES))
    plain = " ".join("".join(c for c in plain if not unicodedata.combining(c)).split())
    known = "".join(c if (c.isascii() and c.isprintable()) or c in _MORE_LETTERS else "?" for c in plain)
    return "" if 2 * sum(a != b for a, b in zip(known, plain, strict=True)) >= len(known) else known


def draw(plot: Plot, images: Sequence[Image.Image], n_rows: int = 1) -> Image.Image | None:
    """The grid as a picture on white: cells of the size of its largest image, wider where labels need it.

    Needed at once are the grid and all of its images, in full size. Where one thing differs only, the images are laid
    in ``n_rows`` rows, each with its label above. None, and a warning, where a side would be over 16383 pixels.
    """
    width, height = (max(images[i].size[axis] for i in plot.cells.values()) for axis in (0, 1))
    text = _Text(min(max(round(width * _FONT_SHARE), _FONT_SIZES[0]), _FONT_SIZES[1]))
    label = _LABEL_WIDTH * text.size
    column = max(width, min(max(map(text.width, plot.columns)), label))
    sides = [text.wrap(row, max(width, label), max(1, height // text.line)) for row in plot.rows]
    left = _GAP + max((text.width(line) + _GAP for side in sides for line in side), default=0)
    bands, cells = _bands(plot, [text.wrap(head, column, _MOST_LINES) for head in plot.columns], n_rows)
    right = left + len(bands[0]) * (column + _GAP)
    title = text.wrap(plot.title, right - 2 * _GAP, _MOST_LINES)
    bottom = _GAP + len(title) * text.line
    tops = []  # of the images of each row
    for band in bands:
        tops.append(bottom + (max(map(len, band)) * text.line + _GAP // 2 if any(band) else 0))
        bottom = tops[-1] + height + _GAP
    if max(right, bottom) > _LARGEST_SIDE:
        _log.warning("a grid of %d x %d pixels is too large to be drawn: the images are without one", right, bottom)
        return None
    canvas = Image.new("RGB", (right, bottom), "white")
    text.write(canvas, title, _GAP, _GAP)
    for side, top in zip(sides, tops, strict=False):
        text.write(canvas, side, _GAP, top + (height - len(side) * text.line) // 2)
    middles = [left + i * (column + _GAP) + column // 2 for i in range(len(bands[0]))]
    for band, top in zip(bands, tops, strict=True):
        for head, middle in zip(band, middles, strict=False):
            text.write(canvas, head, middle, top - _GAP // 2 - len(head) * text.line, centred=True)
    for (row, place), i in cells.items():
        image = images[i]
        canvas.paste(image, (middles[place] - image.width // 2, tops[row] + (height - image.height) // 2))
    return canvas


def _bands(plot: Plot, heads: list[Any], n_rows: int) -> tuple[list[list[Any]], dict[tuple[int, int], int]]:
    """What is written above the images of each row, and the number of the image of each (row, column)."""
    if plot.rows:
        return [heads, *([[]] * (len(plot.rows) - 1))], plot.cells
    across = math.ceil(len(heads) / n_rows)
    bands = [heads[i : i + across] for i in range(0, len(heads), across)]
    return bands, {divmod(column, across): i for (_, column), i in plot.cells.items()}


class _Text:
    """Pillow's own font in one size, and what it takes to write with it."""

    def __init__(self, size: int):
        self.size, self.line = size, round(_LINE * size)
        self._font = ImageFont.load_default(size)

    def width(self, text: str) -> int:
        """Pixels of a line."""
        return math.ceil(self._font.getlength(text))

    def wrap(self, text: str, width: int, most: int) -> list[str]:
        """The text in at most so many lines of that width; what does not fit is left out, with dots in its place."""
        lines: list[str] = []
        for word in text.split():
            if lines and self.width(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
            elif len(lines) < most:
                lines.append(word)
            else:
                lines[-1] += f" {word}"  # too long: it is cut below
                break
        return [self._cut(line, width) for line in lines]

    def _cut(self, line: str, width: int) -> str:
        if self.width(line) <= width:
            return line
        while line and self.width(f"{line}…") > width:
            line = line[:-1]
        return f"{line.rstrip()}…"

    def write(self, canvas: Image.Image, lines: Sequence[str], x: int, y: int, *, centred: bool = False) -> None:
        """Lines below each other from ``y``, beginning or centred at ``x``."""
        pen = ImageDraw.Draw(canvas)
        for i, line in enumerate(lines):
            start = x - self.width(line) // 2 if centred else x
            pen.text((start, y + i * self.line), line, fill="black", font=self._font)

"""Draw comparison grids: images side by side, with their differences as labels of columns and rows."""

import logging
import math
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .request import Request

_log = logging.getLogger("stable_diffusion")

_LARGEST_SIDE = 16383  # pixels of a WebP file
_GAP = 8
_FONT_SHARE, _FONT_SIZES = 1 / 24, (12, 40)  # of an image's width, and the least and most in pixels
_LINE = 1.25  # font sizes
_LABEL_WIDTH = 9  # font sizes: room for a label beside narrower images
_MOST_LINES = 4
_LONGEST_LABEL = 400  # letters that are read
# Letters of Pillow's font besides ASCII, and dashes that are replaced.
_MORE_LETTERS = "©«°±´·»‘’“”…‹›⁄™"
_DASHES = str.maketrans("–—−", "---")


@dataclass(frozen=True)
class Plot:
    """Describe a comparison of images by the labels of its columns and rows."""

    title: str  # the settings shared by the images, if there are several grids
    columns: tuple[str, ...]
    rows: tuple[str, ...]  # empty if only one setting differs
    cells: dict[tuple[int, int], int]  # (row, column) -> the index of the image


def compare(requests: Sequence[Request]) -> list[Plot]:
    """Return the grids that compare the images of requests; an empty list if no setting was swept.

    The first difference gives the columns, the second the rows, and each combination of the others gives one grid.
    Settings come first, then prompts, then several images of one setting.
    """
    axes = _axes(requests)
    if not axes:
        return []
    columns, rows = (list(dict.fromkeys(axis)) for axis in (axes[0], axes[1] if len(axes) > 1 else []))
    cells: dict[tuple, dict[tuple[int, int], int]] = {}
    for i, (column, *others) in enumerate(zip(*axes, strict=True)):
        row = rows.index(others[0]) if rows else 0
        cells.setdefault(tuple(others[1:]), {})[row, columns.index(column)] = i
    return [
        Plot(
            title=", ".join(label for _, label in shared),
            columns=tuple(label for _, label in columns),
            rows=tuple(label for _, label in rows),
            cells=numbers,
        )
        for shared, numbers in cells.items()
    ]


def _axes(requests: Sequence[Request]) -> list[list[tuple[Any, str]]]:
    """Return (value, label) of each image for each difference. Labels use only letters of the font."""
    variants = [request.variant for request in requests]
    axes: dict[str, list[tuple[Any, str]]] = {}
    for name in dict.fromkeys(name for variant in variants for name in variant.swept):
        settings = [request.value(name) for request in requests]
        texts = ["default" if v is None else f"{v:g}" if isinstance(v, float) else f"{v}" for v in settings]
        if name == "seed":  # several seeds may be equal
            settings = [(seed, v.seeds[: v.image].count(seed)) for v, seed in zip(variants, settings, strict=True)]
        axes[name] = [(value, f"{name} {text}") for value, text in zip(settings, texts, strict=True)]
    if not axes:
        return []
    if len({variant.prompt for variant in variants}) > 1:
        axes["prompt"] = [(request.variant.prompt, request.text) for request in requests]
    if "seed" not in axes and any(len(variant.seeds) > 1 for variant in variants):
        is_same = len({variant.seeds for variant in variants}) == 1 and len(set(variants[0].seeds)) > 1
        images = [(request.variant.image, request.seed) for request in requests]
        axes["image"] = [(i, f"seed {seed}" if is_same else f"image {i + 1}") for i, seed in images]
    for name, entries in axes.items():
        numbers = {value: i for i, value in enumerate(dict(entries), start=1)}
        axes[name] = [(value, _printable(text) or f"{name} {numbers[value]}") for value, text in entries]
    return list(axes.values())


def _printable(text: str) -> str:
    """Write text in letters of the font, without accents; empty if too little would be readable."""
    letters = unicodedata.normalize("NFKD", text[:_LONGEST_LABEL].translate(_DASHES))
    letters = " ".join("".join(c for c in letters if not unicodedata.combining(c)).split())
    shown = "".join(c if (c.isascii() and c.isprintable()) or c in _MORE_LETTERS else "?" for c in letters)
    return "" if 2 * sum(a != b for a, b in zip(shown, letters, strict=True)) >= len(shown) else shown


def draw(plot: Plot, images: Sequence[Image.Image], n_rows: int = 1) -> Image.Image | None:
    """Draw a grid on white, in cells of the size of its largest image, wider if labels need it.

    If there is only one difference, the images are in ``n_rows`` rows, each with its label above. Returns None, with a
    warning, if a side would exceed 16383 pixels.
    """
    width, height = (max(images[i].size[axis] for i in plot.cells.values()) for axis in (0, 1))
    text = _Text(min(max(round(width * _FONT_SHARE), _FONT_SIZES[0]), _FONT_SIZES[1]))
    label_width = _LABEL_WIDTH * text.size
    column = max(width, min(max(map(text.width, plot.columns)), label_width))
    labels = [text.draw(label, column, _MOST_LINES) for label in plot.columns]
    sides = [text.draw(row, max(width, label_width), max(1, height // text.line)) for row in plot.rows]
    across = len(labels) if plot.rows else math.ceil(len(labels) / n_rows)
    left = _GAP + max((side.width + _GAP for side in sides), default=0)
    right = left + across * (column + _GAP)
    title = text.draw(plot.title, right - 2 * _GAP, _MOST_LINES)
    placed = [(title, _GAP, _GAP)]  # pictures and their corners
    middles = [left + i * (column + _GAP) + column // 2 for i in range(across)]
    bottom = _GAP + title.height
    for row in range(len(sides) or math.ceil(len(labels) / across)):
        header = labels[row * across : (row + 1) * across]  # if rows have labels, only above the first row
        top = bottom + max((label.height + _GAP // 2 for label in header if label.height), default=0)
        for label, middle in zip(header, middles, strict=False):
            placed.append((label, middle - label.width // 2, top - _GAP // 2 - label.height))
        for side in sides[row : row + 1]:
            placed.append((side, _GAP, top + (height - side.height) // 2))
        for i, middle in enumerate(middles):
            number = plot.cells.get((row, i) if plot.rows else (0, row * across + i))
            if number is not None:
                image = images[number]
                placed.append((image, middle - image.width // 2, top + (height - image.height) // 2))
        bottom = top + height + _GAP
    if max(right, bottom) > _LARGEST_SIDE:
        _log.warning("a grid of %d x %d pixels is omitted, the limit is %d a side", right, bottom, _LARGEST_SIDE)
        return None
    canvas = Image.new("RGB", (right, bottom), "white")
    for picture, x, y in placed:
        canvas.paste(picture, (x, y))
    return canvas


class _Text:
    """Measure and draw text in one size of Pillow's font."""

    def __init__(self, size: int):
        self.size, self.line = size, round(_LINE * size)
        self._font = ImageFont.load_default(size)

    def width(self, text: str) -> int:
        return math.ceil(self._font.getlength(text))

    def wrap(self, text: str, width: int, limit: int) -> list[str]:
        """Break text into at most ``limit`` lines of this width; an ellipsis replaces the rest."""
        for letters in range(len(text), 0, -1):
            lines = textwrap.wrap(text, letters, max_lines=limit, placeholder="…")
            if all(self.width(line) <= width for line in lines):
                return lines
        return []

    def draw(self, text: str, width: int, limit: int) -> Image.Image:
        """Draw text black on white, in at most ``limit`` lines of this width."""
        lines = self.wrap(text, width, limit)
        picture = Image.new("RGB", (max(map(self.width, lines), default=0), len(lines) * self.line), "white")
        pen = ImageDraw.Draw(picture)
        for i, line in enumerate(lines):
            pen.text(((picture.width - self.width(line)) // 2, i * self.line), line, fill="black", font=self._font)
        return picture

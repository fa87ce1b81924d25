"""Draw comparison grids: images side by side, with what differs written at the columns and rows."""

import logging
import math
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
_LONGEST_LABEL = 400  # letters that are looked at
# Letters of Pillow's own font beside ASCII, and what is replaced to be written with them.
_MORE_LETTERS = "©«°±´·»‘’“”…‹›⁄™"
_DASHES = str.maketrans("–—−", "---")


@dataclass(frozen=True)
class Plot:
    """Describe a comparison of images by the labels of its columns and rows."""

    title: str  # of what the images share, if there are several grids
    columns: tuple[str, ...]
    rows: tuple[str, ...]  # none if one thing differs only
    cells: dict[tuple[int, int], int]  # (row, column) -> the index of the image


def compare(requests: Sequence[Request]) -> list[Plot]:
    """Return the grids that show how the images of requests differ; none where no setting was swept.

    The first thing that differs makes the columns, the second the rows, and each combination of the others makes a
    grid. Settings come first, then prompts, then several images of one setting.
    """
    axes = _axes(requests)
    if not axes:
        return []
    labels = [dict(axis) for axis in axes]  # {value: label}
    columns, rows = list(labels[0]), list(labels[1]) if len(axes) > 1 else []
    cells: dict[tuple, dict[tuple[int, int], int]] = {}
    for i, (column, *others) in enumerate(zip(*([value for value, _ in axis] for axis in axes), strict=True)):
        row = rows.index(others[0]) if rows else 0
        cells.setdefault(tuple(others[1:]), {})[row, columns.index(column)] = i
    return [
        Plot(
            title=", ".join(names[value] for names, value in zip(labels[2:], shared, strict=True)),
            columns=tuple(labels[0].values()),
            rows=tuple(labels[1].values()) if rows else (),
            cells=numbers,
        )
        for shared, numbers in cells.items()
    ]


def _axes(requests: Sequence[Request]) -> list[list[tuple[Any, str]]]:
    """Return (value, label) of each image for each thing that differs. Labels are in letters that the font has."""
    variants = [request.variant for request in requests]
    axes: dict[str, list[tuple[Any, str]]] = {}
    for name in dict.fromkeys(name for variant in variants for name in variant.swept):
        settings = [request.value(name) for request in requests]
        texts = ["default" if v is None else f"{v:g}" if isinstance(v, float) else f"{v}" for v in settings]
        axes[name] = [(value, f"{name} {text}") for value, text in zip(settings, texts, strict=True)]
    if not axes:
        return []
    if len({variant.prompt for variant in variants}) > 1:
        axes["prompt"] = [(request.variant.prompt, request.text) for request in requests]
    if "seed" not in axes and any(len(variant.seeds) > 1 for variant in variants):
        is_same = len({variant.seeds for variant in variants}) == 1
        images = [(request.variant.image, request.seed) for request in requests]
        axes["image"] = [(i, f"seed {seed}" if is_same else f"image {i + 1}") for i, seed in images]
    for name, entries in axes.items():
        numbers = {value: i for i, value in enumerate(dict(entries), start=1)}
        axes[name] = [(value, _printable(text) or f"{name} {numbers[value]}") for value, text in entries]
    return list(axes.values())


def _printable(text: str) -> str:
    """Write text in letters that the font has, without accents; empty if too little of it could be read."""
    letters = unicodedata.normalize("NFKD", text[:_LONGEST_LABEL].translate(_DASHES))
    letters = " ".join("".join(c for c in letters if not unicodedata.combining(c)).split())
    shown = "".join(c if (c.isascii() and c.isprintable()) or c in _MORE_LETTERS else "?" for c in letters)
    return "" if 2 * sum(a != b for a, b in zip(shown, letters, strict=True)) >= len(shown) else shown


def draw(plot: Plot, images: Sequence[Image.Image], n_rows: int = 1) -> Image.Image | None:
    """Draw a grid on white, in cells of the size of its largest image, wider if labels need it.

    If one thing differs only, the images are laid in ``n_rows`` rows, each with its label above. Returns None, with a
    warning, if a side would have over 16383 pixels.
    """
    width, height = (max(images[i].size[axis] for i in plot.cells.values()) for axis in (0, 1))
    text = _Text(min(max(round(width * _FONT_SHARE), _FONT_SIZES[0]), _FONT_SIZES[1]))
    label_width = _LABEL_WIDTH * text.size
    column = max(width, min(max(map(text.width, plot.columns)), label_width))
    labels = [text.wrap(label, column, _MOST_LINES) for label in plot.columns]
    sides = [text.wrap(row, max(width, label_width), max(1, height // text.line)) for row in plot.rows]
    across = len(labels) if plot.rows else math.ceil(len(labels) / n_rows)
    headers = [labels[i : i + across] for i in range(0, len(labels), across)]  # above the images of each row
    headers += [[]] * (len(plot.rows) - 1)
    left = _GAP + max((text.width(line) + _GAP for side in sides for line in side), default=0)
    right = left + across * (column + _GAP)
    title = text.wrap(plot.title, right - 2 * _GAP, _MOST_LINES)
    bottom = _GAP + len(title) * text.line
    tops = []  # of the images of each row
    for header in headers:
        tops.append(bottom + (max(map(len, header)) * text.line + _GAP // 2 if any(header) else 0))
        bottom = tops[-1] + height + _GAP
    if max(right, bottom) > _LARGEST_SIDE:
        _log.warning("a grid of %d x %d pixels is too large to be drawn: the images are without one", right, bottom)
        return None
    canvas = Image.new("RGB", (right, bottom), "white")
    text.write(canvas, title, _GAP, _GAP)
    for side, top in zip(sides, tops, strict=False):
        text.write(canvas, side, _GAP, top + (height - len(side) * text.line) // 2)
    middles = [left + i * (column + _GAP) + column // 2 for i in range(across)]
    for header, top in zip(headers, tops, strict=True):
        for label, middle in zip(header, middles, strict=False):
            text.write(canvas, label, middle, top - _GAP // 2 - len(label) * text.line, centred=True)
    for (row, place), i in plot.cells.items():
        row, place = row + place // across, place % across
        x, y = middles[place] - images[i].width // 2, tops[row] + (height - images[i].height) // 2
        canvas.paste(images[i], (x, y))
    return canvas


class _Text:
    """Measure, wrap and write text in one size of Pillow's own font."""

    def __init__(self, size: int):
        self.size, self.line = size, round(_LINE * size)
        self._font = ImageFont.load_default(size)

    def width(self, text: str) -> int:
        return math.ceil(self._font.getlength(text))

    def wrap(self, text: str, width: int, limit: int) -> list[str]:
        """Break text into at most ``limit`` lines of this width; dots stand for what does not fit."""
        lines: list[str] = []
        for word in text.split():
            if lines and (len(lines) == limit or self.width(f"{lines[-1]} {word}") <= width):
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return [self._cut(line, width) for line in lines]

    def _cut(self, line: str, width: int) -> str:
        if self.width(line) <= width:
            return line
        while line and self.width(f"{line}…") > width:
            line = line[:-1]
        return f"{line.rstrip()}…"

    def write(self, canvas: Image.Image, lines: Sequence[str], x: int, y: int, *, centred: bool = False) -> None:
        """Write lines below each other from ``y``, beginning or centred at ``x``."""
        pen = ImageDraw.Draw(canvas)
        for i, line in enumerate(lines):
            start = x - self.width(line) // 2 if centred else x
            pen.text((start, y + i * self.line), line, fill="black", font=self._font)

"""Find the areas of an image to repaint: boxes, parts of the mask, and the boxes in a detector's JSON file."""

import math
import re
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ..files.text import parse_json, read_text
from ..images.inpaint import box_mask, mask_parts
from ..options import SettingError
from .inputs import Inputs
from .request import Request

_SMALLEST = 8  # side of a box in pixels
_MOST = 100
_CORNERS = ("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax")  # of ultralytics, of transformers


def detail_masks(request: Request, inputs: Inputs, size: tuple[int, int]) -> list[Image]:
    """Return a mask of ``size`` (width, height) for each place, with a soft edge inside it.

    Raises ValueError for a place that is empty, too small or outside the image, and for too many places.
    """
    masks = []
    for place in request.detail:
        if place == "mask":
            masks += mask_parts(inputs.mask.resize(size))
            continue
        for box in place.split(";"):
            x, y, width, height = (int(number) for number in box.split(","))
            if min(width, height) < _SMALLEST or x + width > size[0] or y + height > size[1]:
                text = f"detail {box} is outside the image of {size[0]}x{size[1]} or smaller than"
                raise SettingError(f"{text} {_SMALLEST}x{_SMALLEST} pixels; give X,Y,W,H inside it", "detail")
            masks.append(box_mask((x, y, width, height), size))
    if not 0 < len(masks) <= _MOST:
        raise SettingError(f"detail has {len(masks)} places, the limits are 1 and {_MOST}", "detail")
    return masks


def read_places(value: str) -> str:
    """Return a box X,Y,W,H or the word mask unchanged; of a JSON file return its boxes, joined by semicolons.

    Raises ValueError, one line, for a file that is unreadable or has no boxes.
    """
    path = Path(value).expanduser()
    if re.fullmatch(r"mask|[\d,;]+", value):
        return value
    try:
        contents = parse_json(f'{{"boxes": {read_text(path)}}}', path)["boxes"]
    except OSError as error:
        text = f"detail {value} is not X,Y,W,H, the word mask or a readable file ({error.strerror})"
        raise ValueError(text) from error
    if isinstance(contents, dict):
        contents = next((entry for entry in contents.values() if isinstance(entry, list)), None)
    places = [_box(path, entry) for entry in contents or ()]
    if not places:
        raise ValueError(f"{path} has no boxes; give a list of [x1, y1, x2, y2], or of objects with a box or bbox")
    return ";".join(places)


def _box(path: Path, entry: Any) -> str:
    """Return an entry of a list as X,Y,W,H: from its corners, or from its sides if it has a category_id (COCO)."""
    box = entry.get("box", entry.get("bbox")) if isinstance(entry, dict) else entry
    if isinstance(box, dict):
        box = next(([box[name] for name in names] for names in _CORNERS if set(names) <= box.keys()), None)
    numbers = box[:4] if isinstance(box, list) else []
    if len(numbers) < 4 or not all(type(n) in (int, float) and 0 <= n < 1 << 20 for n in numbers):
        raise ValueError(f"{path}: {entry!s:.60} is not a box [x1, y1, x2, y2] in pixels")
    left, top, right, bottom = numbers
    if isinstance(entry, dict) and "category_id" in entry:
        right, bottom = left + right, top + bottom
    left, top = math.floor(left), math.floor(top)
    return f"{left},{top},{max(math.ceil(right) - left, 0)},{max(math.ceil(bottom) - top, 0)}"

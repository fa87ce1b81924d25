"""Find the places of a picture that are worked on again: boxes, parts of the mask, and a detector's file of JSON."""

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

_SMALLEST = 8  # pixels of a box's side
_MOST = 100
_CORNERS = ("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax")  # of ultralytics, of transformers


def detail_masks(request: Request, inputs: Inputs, size: tuple[int, int]) -> list[Image]:
    """Return a mask of ``size`` (width, height) for each place, soft at its edge within it.

    Raises ValueError for a place that is empty, too small or outside of the picture, and for too many of them.
    """
    masks = []
    for place in request.detail:
        if place == "mask":
            masks += mask_parts(inputs.mask.resize(size))
            continue
        for box in place.split(";"):
            x, y, width, height = (int(number) for number in box.split(","))
            if min(width, height) < _SMALLEST or x + width > size[0] or y + height > size[1]:
                text = f"detail {box} does not lie in the picture of {size[0]}x{size[1]}, or is smaller than"
                raise SettingError(f"{text} {_SMALLEST}x{_SMALLEST} pixels; give X,Y,W,H within it", "detail")
            masks.append(box_mask((x, y, width, height), size))
    if not 0 < len(masks) <= _MOST:
        raise SettingError(f"detail has {len(masks)} places, of which 1 to {_MOST} are worked on", "detail")
    return masks


def read_places(value: str) -> str:
    """Return a box X,Y,W,H or the word mask as it is, and the boxes of a file of JSON with semicolons between them.

    Raises ValueError, one line, for a file that cannot be read or holds no boxes.
    """
    path = Path(value).expanduser()
    if re.fullmatch(r"mask|[\d,;]+", value):
        return value
    try:
        contents = parse_json(f'{{"boxes": {read_text(path)}}}', path)["boxes"]
    except OSError as error:
        text = f"detail {value} is neither X,Y,W,H nor mask, nor a file that can be read ({error.strerror})"
        raise ValueError(text) from error
    if isinstance(contents, dict):
        contents = next((entry for entry in contents.values() if isinstance(entry, list)), None)
    places = [_box(path, entry) for entry in contents or ()]
    if not places:
        raise ValueError(f"{path} holds no boxes: a list of [x1, y1, x2, y2], or of objects with a box or bbox")
    return ";".join(places)


def _box(path: Path, entry: Any) -> str:
    """Return an entry of a list as X,Y,W,H: its corners, or in COCO's objects, which have a category_id, its sides."""
    box = entry.get("box", entry.get("bbox")) if isinstance(entry, dict) else entry
    if isinstance(box, dict):
        box = next(([box[name] for name in names] for names in _CORNERS if set(names) <= box.keys()), None)
    numbers = box[:4] if isinstance(box, list) else []
    if len(numbers) < 4 or not all(type(n) in (int, float) and 0 <= n < 1 << 20 for n in numbers):
        raise ValueError(f"{path} holds {entry!s:.60}, which is no box [x1, y1, x2, y2] in pixels")
    left, top, right, bottom = numbers
    if isinstance(entry, dict) and "category_id" in entry:
        right, bottom = left + right, top + bottom
    left, top = math.floor(left), math.floor(top)
    return f"{left},{top},{max(math.ceil(right) - left, 0)},{max(math.ceil(bottom) - top, 0)}"

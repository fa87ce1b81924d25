"""Images in base64: input is checked before it is read, output is a complete file."""

import base64
import binascii
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from PIL import ImageChops
from PIL.Image import Image

from .files import encode, opened

T = TypeVar("T")
MOST_PIXELS = 40_000_000


def to_base64(
    image: Image, text: Mapping[str, str] | None = None, form: str = "png", quality: int | None = None
) -> str:
    """Return the file of an image in base64. ``form`` is its suffix, the rest as for :func:`save`."""
    return base64.b64encode(encode(image, f"image.{form}", text, quality)).decode()


def keep(picture: object, folder: str, name: str) -> str:
    """Write an image, bytes or base64 or a data URL, into a folder, and return its path: ``name`` and a suffix.

    Raises ValueError for anything else, and for more than 40 megapixels; such an image is not decoded.
    """
    path = Path(folder, name)
    path.write_bytes(picture if isinstance(picture, bytes) else _decoded(picture))
    with opened(path) as image:
        (width, height), suffix = image.size, image.format.lower()
    if width * height > MOST_PIXELS:
        raise ValueError(f"an image of {width}x{height} is too large; the limit is {MOST_PIXELS / 1e6:.0f} megapixels")
    return str(path.rename(path.with_suffix(f".{suffix}")))


def read_by(read: Callable[[str], T], picture: object) -> T:
    """Call ``read`` with the path of an image given as bytes or base64. Raises ValueError as :func:`keep` does."""
    with TemporaryDirectory() as folder:
        return read(keep(picture, folder, "picture"))


def _decoded(text: object) -> bytes:
    if not isinstance(text, str):
        raise ValueError("an image is not a text; give it in base64")
    head, comma, _ = text[:100].partition(",")
    try:
        return base64.b64decode(text[len(head) + 1 :] if comma and head.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"an image that begins with {text[:20]!r} is not base64; give it without spaces") from None


def repainted(data: bytes) -> bytes | None:
    """Return the file of a mask, white where an image is transparent; None for an image without alpha."""

    def mask(path: str) -> bytes | None:
        with opened(path) as image:
            alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        return None if alpha is None else encode(ImageChops.invert(alpha), "mask.png")

    return read_by(mask, data)

"""Pictures that come and go over HTTP: base64 and uploads into checked files, finished ones into PNG, JPEG or WebP."""

import base64
import binascii
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import ImageChops
from PIL.Image import Image

from ..app.worker import Picture
from ..images.files import encode, opened

MOST_BYTES = 64 * 2**20  # of a body, and so of a picture
MOST_PIXELS = 40_000_000
MOST_SIDE = 8192  # of an enlarged picture


def decoded(text: object) -> bytes:
    """Return the bytes of a picture in base64, also as a data URL. Raises ValueError for anything else."""
    if not isinstance(text, str):
        raise ValueError("a picture is no text; give it in base64")
    head, comma, _ = text[:100].partition(",")
    body = text[len(head) + 1 :] if comma and head.startswith("data:") else text
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(
            f"a picture that begins with {text[:20]!r} is not base64; give it so, without line breaks"
        ) from None


def keep(data: bytes, folder: str, name: str) -> str:
    """Write a picture into a folder, under ``name`` and the suffix of its format, and return its path.

    Raises ValueError for what is no picture, and for one of more than 40 megapixels, which is not decoded.
    """
    path = Path(folder, name)
    path.write_bytes(data)
    with opened(path) as image:
        width, height = image.size
        kind = image.format.lower()
    if width * height > MOST_PIXELS:
        raise ValueError(f"a picture of {width}x{height} is too large; at most {MOST_PIXELS / 1e6:.0f} megapixels")
    return str(path.rename(path.with_suffix(f".{kind}")))


def to_base64(picture: Picture | Image, suffix: str = ".png", quality: int | None = None) -> str:
    """Return a picture in base64, with the texts of how it was made."""
    image, text = (picture.image, picture.text) if isinstance(picture, Picture) else (picture, None)
    return base64.b64encode(encode(image, f"picture{suffix}", text, quality=quality)).decode()


def repainted(data: bytes) -> bytes | None:
    """Return the mask that OpenAI's API means by a picture: white, repainted, where it is transparent; None without."""
    with TemporaryDirectory() as folder, opened(keep(data, folder, "mask")) as image:
        if not image.has_transparency_data:
            return None
        alpha = image.convert("RGBA").getchannel("A")
    return encode(ImageChops.invert(alpha), "mask.png")

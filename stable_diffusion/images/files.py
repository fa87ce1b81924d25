"""Read and write image files: PNG, JPEG and WebP with their metadata texts. Some more formats can be read."""

import logging
import os
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from html import unescape
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from ..files.whole import new_file

_log = logging.getLogger("stable_diffusion")

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)

_JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
_WEBP = {"format": "WEBP", "quality": 95}
_OPTIONS = {".png": {"format": "PNG"}, ".jpg": _JPEG, ".jpeg": _JPEG, ".webp": _WEBP}  # of Pillow's ``save``
SUFFIXES = tuple(_OPTIONS)
# EXIF tags that hold the texts of JPEG and WebP; UserComment is in the EXIF sub-directory. ImageDescription is the
# caption in most viewers; version 0.1 stored its record there.
_DESCRIPTION, _HISTORY, _EXIF_DIRECTORY, _USER_COMMENT = 0x010E, 0x9213, 0x8769, 0x9286
_MAKE, _MODEL = 0x010F, 0x0110
_XMP, _XMP_COMMENT = "XML:com.adobe.xmp", re.compile(r"<exif:UserComment>.{0,200}?<rdf:li[^>]*>([^<]*)<", re.DOTALL)
_BYTE, _UNDEFINED = 1, 7  # types of EXIF values
# Pillow also opens other files; for PostScript, with any suffix, it would run a program.
_READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
# The first bytes of files that are often mistaken for images or renamed to one.
_REFUSED = {
    "empty": rb"\Z",
    "a PostScript file (EPS)": rb"%!PS|\xc5\xd0\xd3\xc6",
    "a PDF": rb"%PDF",
    "a Photoshop file (PSD)": rb"8BPS",
    "a HEIC photo": rb".{4}ftyp(hei|hev|mif1|msf1)",
    "a video": rb".{4}ftyp(?!avi[fs])|\x1aE\xdf\xa3|RIFF.{4}AVI ",
    "a JPEG XL": rb"\xff\x0a|.{4}JXL ",
    "a JPEG 2000": rb".{4}jP  |\xff\x4f\xff\x51",
    "an OpenEXR file": rb"v/1\x01",
    "an icon": rb"\0\0[\x01\x02]\0|icns",
    "a web page": rb"\s*<(!doctype )?html",
    "an SVG drawing": rb"\s*<(svg|\?xml|!--|!doctype svg)",
    "a ZIP archive": rb"PK\x03\x04",
}
_UTF_16, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"
_MOST_PIXELS = 2**26
_LARGEST_EXIF = 65533  # bytes; a JPEG segment has a 16-bit length


def open_image(path: str | os.PathLike, background: Colour = WHITE) -> Image.Image:
    """Read an image file, or the first frame of an animation: upright, RGB, ``background`` behind transparent parts.

    Raises ValueError, one line with the path, for a file that cannot be read.
    """
    with opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)  # a copy would lose the format
        return to_rgb(image, background)


def read_if_path(image: Any, background: Colour = WHITE) -> Any:
    """Read an image file if ``image`` is a path; return anything else unchanged."""
    return open_image(image, background) if isinstance(image, str | os.PathLike) else image


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """Open an image of a known format without decoding it. Each failure in the block becomes a one-line ValueError."""
    path = os.path.expanduser(path)
    if not os.fspath(path).strip():
        raise ValueError("the path of the image is empty; give the path of a PNG, JPEG or WebP file")
    if not os.path.exists(path):  # unlike Path.exists, also False for a path that is too long
        raise ValueError(f"there is no image at {path}; check the path")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is {'a folder' if os.path.isdir(path) else 'not a file'}; give the path of an image")
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata and above 90 megapixels, as phones have; above 180 it raises.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_READ) as image:
                yield image
    except Image.DecompressionBombError:
        remedy = f"the limit is {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels; make it smaller first"
        raise ValueError(f"the image {path} is too large: {remedy}") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path} is {_kind(path)}; save it as PNG or JPEG") from None
    except Exception as error:  # decoders raise SyntaxError, EOFError, struct.error, ... for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the image {path} cannot be read ({reason}); save it again as PNG or JPEG") from None


def _kind(path: str) -> str:
    with open(path, "rb") as file:
        start = file.read(1000)
    known = [name for name, pattern in _REFUSED.items() if re.match(pattern, start, re.DOTALL | re.IGNORECASE)]
    return ", ".join([*known[:1], "not an image that can be read"])


def to_rgb(image: Image.Image, background: Colour = WHITE) -> Image.Image:
    """Convert a PIL image of any mode to RGB, with ``background`` behind its transparent parts.

    Deep grey (16 bits, 32 bits, float) is scaled to 8 bits, never clipped. Colour profiles are ignored. Raises
    ValueError for values that are not finite.
    """
    if is_deep_grey(image):
        image = _to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image.convert("RGBA"))
    rgb = image.convert("RGB")
    rgb.info = {}  # profiles and texts of the input do not describe the output
    return rgb


def is_deep_grey(image: Image.Image) -> bool:
    """Return whether an image is grey of more than 8 bits: modes I, I;16 and F."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey of mode I;16, I or F to mode L. White is the format's maximum, or the first usual one that fits."""
    levels = np.asarray(image).astype(np.float64)
    if not np.isfinite(levels).all():
        raise ValueError(f"an image of mode {image.mode} has values that are not finite")
    low, high = levels.min(), levels.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        low, high = 0, 65535
    elif low >= 0 and high <= 65535:
        whites = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        low, high = 0, next(white for white in whites if high <= white)
    levels = (levels - low) * 255 / max(high - low, 1e-12)
    return Image.fromarray(np.rint(levels).astype(np.uint8))


# --- writing -----------------------------------------------------------------------------------------------------


def check_output(path: str | os.PathLike) -> Path:
    """Check before a run that an image can be written to ``path``; returns a Path. Raises ValueError or OSError."""
    if not os.fspath(path).strip():
        raise ValueError("the output path is empty; give one like image.png")
    path = Path(os.path.expanduser(path))
    if os.path.isdir(path):
        raise ValueError(f"the output {path} is a folder; give the path of a file in it, like {path / 'image.png'}")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"the output {path} has the suffix {path.suffix!r}; choose one of {', '.join(SUFFIXES)}")
    if not os.path.isdir(path.parent):
        raise ValueError(f"the output folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"the output folder {path.parent} is not writable; choose another one")
    try:
        with suppress(FileNotFoundError):
            path.lstat()
    except OSError as error:
        raise OSError(f"the output {path} could not be written ({error.strerror}); choose another name") from None
    return path


def save(
    image: Image.Image,
    path: str | os.PathLike,
    text: Mapping[str, str] | None = None,
    *,
    quality: int | None = None,
    overwrite: bool = True,
) -> None:
    """Write an image in the format of the suffix. The file gets its name only when it is complete.

    Args:
        text: metadata, keyword -> text. JPEG and WebP store only "parameters" and "stable_diffusion", in EXIF. A JPEG
            holds 64 kB of it: texts that do not fit are omitted with a warning, "parameters" first.
        quality: quality of JPEG and WebP, 1 to 100 (default: 95).
        overwrite: replace an existing file. If False, raise FileExistsError, also if another process takes the name
            meanwhile.

    Raises ValueError as :func:`check_output` and for a ``quality`` of PNG, and OSError if writing fails.
    """
    path = check_output(path)
    options = _save_options(path, text, quality)
    try:
        with new_file(path, overwrite=overwrite) as partial, partial.open("wb") as file:
            _write(image, file, options)
    except FileExistsError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise OSError(f"the image {path} could not be written ({error}); try another folder or format") from error


def encode(image: Image.Image, name: str, text: Mapping[str, str] | None = None, quality: int | None = None) -> bytes:
    """Return the bytes of the file that :func:`save` writes under a name."""
    file = BytesIO()
    _write(image, file, _save_options(Path(name), text, quality))
    return file.getvalue()


def _write(image: Image.Image, file: IO[bytes], options: dict[str, Any]) -> None:
    image = to_rgb(image) if options["format"] == "JPEG" and image.mode != "L" else image
    image.save(file, **options)


def _save_options(path: Path, text: Mapping[str, str] | None, quality: int | None) -> dict[str, Any]:
    options = _OPTIONS[path.suffix.lower()]
    is_png = options["format"] == "PNG"
    if quality is not None:
        if is_png or not 1 <= quality <= 100:
            raise ValueError(f"a quality of {quality} for {path.name}: give 1 to 100, for JPEG and WebP")
        options = options | {"quality": quality}
    if not text:
        return options
    if not is_png:
        return options | _exif(text, path, _LARGEST_EXIF if options["format"] == "JPEG" else None)
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in text.items():
        chunks.add_text(keyword, value)  # tEXt for Latin-1, else iTXt
    return options | {"pnginfo": chunks}


# --- texts -------------------------------------------------------------------------------------------------------


def read_text(path: str | os.PathLike) -> dict[str, str]:
    """Read the metadata texts in an image file, of :func:`save` and of other programs. Damaged ones are omitted.

    Raises ValueError for a file that is not an image.
    """
    texts: dict[str, str] = {}
    with opened(path) as image:
        with suppress(Exception):  # as for pixels, damaged metadata raises many kinds of errors
            if image.format == "PNG":
                texts = {key: str(value) for key, value in image.info.items() if isinstance(value, str)}
                if image.width * image.height > _MOST_PIXELS:  # pixels are decoded to reach the texts behind them
                    return texts
                texts |= {key: str(value) for key, value in image.text.items()}
            elif image.format == "JPEG" and "comment" in image.info:
                texts = {"Comment": image.info["comment"].decode("utf-8", "replace").rstrip("\0")}
        with suppress(Exception):
            for key, value in _exif_texts(image.getexif()):
                texts.setdefault(key, value)
        with suppress(Exception):
            xmp = texts.get(_XMP) or image.info.get("xmp", b"").decode("utf-8", "replace")
            if comment := _XMP_COMMENT.search(xmp):
                texts.setdefault("parameters", unescape(comment[1]))
    return texts


def _exif_texts(exif: Image.Exif) -> Iterator[tuple[str, str]]:
    """Yield (keyword, text) of the EXIF tags with the settings of this program and others."""
    description = exif.get(_DESCRIPTION)
    is_record = isinstance(description, str) and description.startswith("{")
    comments = (_decode(directory.get(_USER_COMMENT)) for directory in (exif.get_ifd(_EXIF_DIRECTORY), exif))
    pairs = [("stable_diffusion", exif.get(_HISTORY)), *(("parameters", comment) for comment in comments)]
    pairs.append(("stable_diffusion" if is_record else "ImageDescription", description))
    for value in (exif.get(tag) for tag in (_MAKE, _MODEL)):  # of ComfyUI: "prompt:{...}", "workflow:{...}"
        keyword, colon, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
        pairs += [(keyword, rest)] if colon and rest.startswith("{") else []
    return ((key, value) for key, value in pairs if isinstance(value, str) and value)


def _exif(text: Mapping[str, str], path: Path, limit: int | None) -> dict[str, Any]:
    """Return Pillow's option for EXIF texts of at most ``limit`` bytes; warn of texts that do not fit."""
    texts = {key: text[key] for key in ("stable_diffusion", "parameters") if key in text}
    for subset in (texts, *({key: value} for key, value in texts.items()), {}):
        data = _encode_exif(**subset)
        if limit is None or len(data) <= limit:
            break
    if missing := ", ".join(key for key in texts if key not in subset):
        _log.warning("%s has no room for all metadata: %s is omitted; a PNG keeps it", path.name, missing)
    return {"exif": data} if subset else {}


def _encode_exif(stable_diffusion: str | None = None, parameters: str | None = None) -> bytes:
    """Encode "parameters" as UserComment, as other programs do, and "stable_diffusion" as ImageHistory."""
    exif, comment = Image.Exif(), b""
    if stable_diffusion is not None:
        exif[_HISTORY] = stable_diffusion.encode("ascii", "replace").decode()  # the tag holds ASCII only
    if parameters is not None:
        comment = _UTF_16 + parameters.encode("utf-16-be")
        exif.get_ifd(_EXIF_DIRECTORY)[_USER_COMMENT] = comment
    # Pillow writes the comment as BYTE; readers expect UNDEFINED.
    entries = [struct.pack(">HHI", _USER_COMMENT, type_, len(comment)) for type_ in (_BYTE, _UNDEFINED)]
    return exif.tobytes().replace(*entries, 1)


def _decode(comment: Any) -> Any:
    """Decode a UserComment. UTF-16 has no byte order mark there: the half with more zero bytes is the high one."""
    if not isinstance(comment, bytes):
        return comment
    body = comment[8:]
    if comment.startswith(_UTF_16):
        little = body[1::2].count(0) > body[::2].count(0)
        return body.decode("utf-16-le" if little else "utf-16-be", "replace").lstrip("\ufeff")
    return (body if comment.startswith((_ASCII, bytes(8))) else comment).decode("utf-8", "replace").rstrip("\0")

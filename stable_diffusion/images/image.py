"""Pictures in and out: files <-> PIL images <-> float arrays, sizes, grids.

Inside the library a picture is a PIL image of mode RGB or a float array
[height, width, 3]; everything else that a file can hold is turned into that here, once.
"""

import logging
import math
import os
import secrets
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

_log = logging.getLogger("stable_diffusion")

Colour = tuple[int, int, int]

_WHITE: Colour = (255, 255, 255)
_MULTIPLE = 8  # the VAE halves three times
_SMALLEST_SIDE = 64
_LARGEST_ASPECT = 32
_GAP = 8
UNFINISHED: set[Path] = set()  # files being written; one who leaves without further ado removes them
# Suffix -> (PIL's format, its options).
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}
SUFFIXES = tuple(_FORMATS)
# Where JPEG and WebP keep texts: the tags of EXIF, of which UserComment stands in a directory of its own.
_DESCRIPTION, _EXIF_DIRECTORY, _USER_COMMENT = 0x010E, 0x8769, 0x9286
_UTF_16, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"
_LARGEST_EXIF = 65533  # bytes; a segment of a JPEG says its length in 16 bits


def open_image(path: str | os.PathLike, background: Colour = _WHITE) -> Image.Image:
    """Read a picture as it is meant to be seen: upright, RGB, transparency over `background`, first frame.

    Raises ValueError, one line with the path and the remedy, for whatever cannot be read whole.
    """
    with _opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)  # a copy would forget the format
        return to_rgb(image, background)


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """The image of a file, not yet decoded; ValueError, one line, for whatever goes wrong with it."""
    if not os.fspath(path).strip():
        raise ValueError("the path of the image is empty; give the path of a PNG, JPEG or WebP file")
    if not os.path.exists(path):  # unlike Path.exists it is also False for a path that is too long
        raise ValueError(f"there is no image at {path}; check the path")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is {'a folder' if os.path.isdir(path) else 'not a file'}; give the path of an image")
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, and of 90 megapixels, which a phone takes; from 180 on it raises.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    except Image.DecompressionBombError:
        remedy = f"at most {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels are read; make it smaller first"
        raise ValueError(f"the image {path} is too large: {remedy}") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read; save it as PNG or JPEG") from None
    except Exception as error:  # decoders of damaged files raise all sorts of things
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the image {path} cannot be read ({reason}); save it again as PNG or JPEG") from None


def to_rgb(image: Image.Image, background: Colour = _WHITE) -> Image.Image:
    """A new RGB image of any PIL image; transparent parts show `background`. Colour profiles are ignored.

    Deep grey (16 bit, 32 bit, float) is scaled to 8 bits, never clipped. Raises ValueError for modes without a
    conversion (LAB).
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        rgb = _eight_bits(image).convert("RGB")
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        rgb = Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    elif image.mode == "LAB":
        raise ValueError("an image of mode LAB is not supported; convert it to RGB")
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # profiles and text of the input are not those of what is made of it
    return rgb


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of mode I;16, I or F as mode L. White is what the format says, else the least usual white that holds all."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"an image of mode {image.mode} has values that are not finite")
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        low, high = 0, 65535
    elif low >= 0 and high <= 65535:
        whites = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        low, high = 0, next(white for white in whites if high <= white)
    values = (values - low) * 255 / max(high - low, 1e-12)
    return Image.fromarray(np.rint(values).astype(np.uint8))


def target_size(image_size: tuple[int, int], width: int | None, height: int | None, native: int) -> tuple[int, int]:
    """Size (width, height) in pixels at which a picture of `image_size` (width, height) is worked on.

    Both given: as they are. One given: the other keeps the aspect ratio. None: the picture's own size, but at least 64
    on the short side and at most (2 * native)^2 in area. What is computed is a multiple of 8, and the aspect ratio is
    kept up to that rounding; only a sliver, which cannot have all of it, gives up its aspect ratio.
    """
    if width is not None and height is not None:
        return width, height
    image_width, image_height = image_size
    if width is not None:
        return width, _other_side(width, image_height / image_width)
    if height is not None:
        return _other_side(height, image_width / image_height), height
    area = max(2 * native, _SMALLEST_SIDE) ** 2
    scale = max(1, _SMALLEST_SIDE / min(image_size))
    scale = min(scale, math.sqrt(area / (image_width * image_height)))
    short, long = (max(_SMALLEST_SIDE, _nearest(side * scale)) for side in sorted(image_size))
    long = min(long, area // short // _MULTIPLE * _MULTIPLE)
    short, long = sorted((short, long))
    return (short, long) if image_width <= image_height else (long, short)


def _other_side(side: int, ratio: float) -> int:
    return min(max(_SMALLEST_SIDE, _nearest(side * ratio)), max(_SMALLEST_SIDE, side * _LARGEST_ASPECT))


def _nearest(side: float) -> int:
    return int(side / _MULTIPLE + 0.5) * _MULTIPLE


def fit(
    image: Image.Image, width: int, height: int, mode: str = "crop", background: Colour | int = _WHITE
) -> Image.Image:
    """A new image of exactly `width` x `height` pixels, resized with LANCZOS; a mask linearly, which does not ring.

    Args:
        image: mode RGB, or L (a mask); other modes are turned into RGB.
        mode: "crop" fills the size and cuts what sticks out on both sides alike; "pad" shows all of the image, centred
            on `background`; "stretch" gives up the aspect ratio.
        background: a colour in the mode of the image.
    """
    if width < 1 or height < 1:
        raise ValueError(f"the size {width}x{height} is not positive")
    if image.mode not in ("RGB", "L"):
        image = to_rgb(image)
    how = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS
    if mode == "stretch":
        return image.resize((width, height), how)
    x_scale, y_scale = width / image.width, height / image.height
    if mode == "crop":
        scale = max(x_scale, y_scale)
        left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
        # resize refuses a box that leaves the image by a rounding error
        box = (max(0, left), max(0, top), min(image.width, image.width - left), min(image.height, image.height - top))
        return image.resize((width, height), how, box=box)
    if mode == "pad":
        scale = min(x_scale, y_scale)
        inner = (min(width, max(1, round(image.width * scale))), min(height, max(1, round(image.height * scale))))
        canvas = Image.new(image.mode, (width, height), background)
        canvas.paste(image.resize(inner, how), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        return canvas
    raise ValueError(f"unknown way to fit an image {mode!r}; choose crop, pad or stretch")


def to_array(image: Image.Image) -> np.ndarray:
    """[H, W, 3] float32 in [-1, 1], what the VAE encodes."""
    if image.mode != "RGB":
        image = to_rgb(image)
    return np.asarray(image, dtype=np.float32) / 255 * 2 - 1


def pixels_of(image: Any, unit: int) -> mx.array:
    """[H, W, 3] float32 in [-1, 1] of a PIL image or an array; ValueError unless sides are multiples of ``unit``."""
    pixels = mx.array(to_array(image.convert("RGB")) if hasattr(image, "convert") else image, dtype=mx.float32)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] % unit or pixels.shape[1] % unit:
        raise ValueError(f"image of shape {pixels.shape} must be [H, W, 3] with sides that are multiples of {unit}")
    return pixels


def mask_of(mask: Any, size: tuple[int, int]) -> mx.array:
    """[H, W] float32 in [0, 1] of a grey PIL image or an array; ValueError unless it has the ``size`` of the image."""
    values = mx.array(to_array(mask.convert("RGB"))[..., 0] / 2 + 0.5 if hasattr(mask, "convert") else mask)
    if values.shape != tuple(size):
        raise ValueError(f"mask of shape {values.shape} must be {tuple(size)}, the size of the image")
    if not mx.all((values >= 0) & (values <= 1)):
        raise ValueError("the values of a mask must be from 0, keep, to 1, make new")
    return values.astype(mx.float32)


def from_array(array: Any) -> Image.Image:
    """An RGB image of [H, W, 3] floats in [0, 1] (numpy, MLX or nested lists): rounded, and clipped to that range.

    Raises ValueError for another shape or type, and for values that are not finite: never a black picture by accident.
    """
    values = np.asarray(array)
    if values.ndim != 3 or values.shape[2] != 3 or 0 in values.shape:
        raise ValueError(f"an image is an array [height, width, 3], not {list(values.shape)}")
    if values.dtype.kind != "f":
        raise ValueError(f"an image is an array of floats in [0, 1], not of {values.dtype}")
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        raise ValueError(f"{bad} of {values.size} values of the image are not finite; compute it in float32")
    levels = np.clip(values.astype(np.float32), 0, 1) * np.float32(255)
    return Image.fromarray(np.rint(levels).astype(np.uint8))


def to_images(pixels: Any) -> list[Image.Image]:
    """RGB images of decoded pixels [n, H, W, 3] in [0, 1], which notebooks show by themselves; see `from_array`."""
    return [from_array(array) for array in np.asarray(pixels)]


def grid(images: Sequence[Image.Image], rows: int) -> Image.Image:
    """Images of one size, left to right and top to bottom, in ceil(n / rows) columns.

    Between them are 8 white pixels, around them none: one image is that image. What a last row lacks stays white (black
    would look like a picture that failed). Raises ValueError for rows < 1, no images, or images of several sizes.
    """
    if rows < 1:
        raise ValueError(f"a grid of {rows} rows cannot be drawn; it has at least 1")
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise ValueError(f"a grid is of images of one size, not of {sizes or 'no images'}")
    width, height = sizes[0]
    columns = math.ceil(len(images) / rows)
    rows = math.ceil(len(images) / columns)
    canvas = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), _WHITE)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        canvas.paste(image, (column * (width + _GAP), row * (height + _GAP)))
    return canvas


def check_output(path: str | os.PathLike) -> Path:
    """The path of a picture to be written, checked before any work: suffix, folder, permissions, length of the name.

    Raises ValueError (or OSError), one line with the path and the remedy.
    """
    if not os.fspath(path).strip():
        raise ValueError("the output path is empty; give one like image.png")
    path = Path(path)
    if os.path.isdir(path):
        raise ValueError(f"the output {path} is a folder; give the path of a file in it, like {path / 'image.png'}")
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"the output {path} has the suffix {path.suffix!r}; choose one of {', '.join(_FORMATS)}")
    if not os.path.isdir(path.parent):
        raise ValueError(f"the output folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"the output folder {path.parent} is not writable; choose another one")
    try:
        path.lstat()
    except FileNotFoundError:
        pass
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
    """Write an image in the format of the suffix. The file appears whole or not at all, under its name at the end.

    Args:
        text: keyword -> text, stored as text chunks of a PNG. JPEG and WebP have places for two, "parameters" and
            "stable_diffusion", in EXIF. A JPEG holds 64 kB of it: of what is longer, "stable_diffusion" alone is
            written, or else "parameters" alone, or neither, and a warning says so.
        quality: of JPEG and WebP, 1 to 100; None is 95.
        overwrite: whether a file of that name is replaced. Otherwise FileExistsError is raised, also where another
            process takes the name meanwhile.

    Raises ValueError as `check_output` does and for a `quality` of PNG, and OSError, one line with the path, when
    writing fails.
    """
    path = check_output(path)
    format_, options = _FORMATS[path.suffix.lower()]
    if quality is not None:
        if format_ == "PNG" or not 1 <= quality <= 100:
            raise ValueError(f"a quality of {quality} for {path.name}: it is 1 to 100, for JPEG and WebP")
        options = options | {"quality": quality}
    if text:
        options = options | (_chunks(text) if format_ == "PNG" else _exif(text, path, format_ == "JPEG"))
    if format_ == "JPEG" and image.mode != "L":
        image = to_rgb(image)
    # Not tempfile: its files are readable by their owner only, and would stay so.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    UNFINISHED.add(temporary)
    try:
        with open(temporary, "xb") as file:
            image.save(file, format=format_, **options)
            file.flush()
            os.fsync(file.fileno())  # or a name could outlive a power cut that its content does not
        (os.replace if overwrite else _take)(temporary, path)
    except FileExistsError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise OSError(f"the image {path} could not be written ({error}); try another folder or format") from error
    finally:
        with suppress(OSError):  # of a folder that is gone or no longer ours, the first error tells
            temporary.unlink(missing_ok=True)
        UNFINISHED.discard(temporary)


def _take(temporary: Path, path: Path) -> None:
    """Give a file that is whole its name; FileExistsError where that is taken, whoever was faster."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: the name is taken by an empty file, then by the whole one
        path.touch(exist_ok=False)
        try:
            os.replace(temporary, path)
        except OSError:
            path.unlink()
            raise


# --- texts in files ----------------------------------------------------------------------------------------------


def read_text(path: str | os.PathLike) -> dict[str, str]:
    """The texts that a picture holds: those of `save`, and any others of a PNG. What is damaged is left out.

    Raises ValueError, one line with the path, where there is no picture.
    """
    found: dict[str, str] = {}
    with _opened(path) as image:
        with suppress(Exception):  # as for pixels, damaged metadata raises all sorts of things
            if image.format == "PNG":
                found = {key: str(value) for key, value in image.info.items() if isinstance(value, str)}
                found |= {key: str(value) for key, value in image.text.items()}  # also those behind the pixels
        with suppress(Exception):
            exif = image.getexif()
            comment = exif.get_ifd(_EXIF_DIRECTORY).get(_USER_COMMENT)
            for key, value in (("parameters", _comment(comment)), ("stable_diffusion", exif.get(_DESCRIPTION))):
                if isinstance(value, str) and value:
                    found.setdefault(key, value)
    return found


def _chunks(text: Mapping[str, str]) -> dict[str, Any]:
    """Texts for a PNG: as tEXt where they are Latin-1, else as iTXt."""
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in text.items():
        chunks.add_text(keyword, value)
    return {"pnginfo": chunks}


def _exif(text: Mapping[str, str], path: Path, limited: bool) -> dict[str, Any]:
    """Texts as EXIF: "parameters" in UserComment, where other programs look, "stable_diffusion" in ImageDescription."""
    known = {key: text[key] for key in ("stable_diffusion", "parameters") if key in text}
    for kept in (known, *({key: value} for key, value in known.items()), {}):
        exif = Image.Exif()
        if "stable_diffusion" in kept:
            exif[_DESCRIPTION] = kept["stable_diffusion"].encode("ascii", "replace").decode()  # the tag holds no other
        comment = _UTF_16 + kept["parameters"].encode("utf-16-be") if "parameters" in kept else b""
        if comment:
            exif.get_ifd(_EXIF_DIRECTORY)[_USER_COMMENT] = comment
        # Pillow calls the comment BYTE (1), which readers do not expect: it is UNDEFINED (7).
        entries = [struct.pack(">HHI", _USER_COMMENT, type_, len(comment)) for type_ in (1, 7)]
        data = exif.tobytes().replace(*entries, 1)
        if not limited or len(data) <= _LARGEST_EXIF:
            break
    if left := ", ".join(key for key in known if key not in kept):
        _log.warning("%s has no room for all metadata: %s is left out; a PNG has it", path.name, left)
    return {"exif": data} if kept else {}


def _comment(value: Any) -> str | None:
    """A UserComment as text. UTF-16 has no mark of its byte order there: most texts have bytes of 0 on one side."""
    if not isinstance(value, bytes):
        return value
    body = value[8:]
    if value.startswith(_UTF_16):
        little = body[1::2].count(0) > body[::2].count(0)
        return body.decode("utf-16-le" if little else "utf-16-be", "replace").lstrip("\ufeff")
    return (body if value.startswith((_ASCII, bytes(8))) else value).decode("utf-8", "replace").rstrip("\0")

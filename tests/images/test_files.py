"""Image files: every kind that users have, damaged ones, safe writing, and the texts in them."""

import os
import stat
import struct
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from stable_diffusion.images import files
from stable_diffusion.images.files import check_output, open_image, read_text, save, to_rgb

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray(np.rint(np.stack([x, y, 1 - x], -1) * 255).astype(np.uint8))


def write(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


# --- reading ---------------------------------------------------------------------------------------------------------


def read(image: Image.Image, path, background=WHITE, **options) -> list:
    """Write an image and read it back: the first row of pixels."""
    return pixels(open_image(write(image, path, **options), background)).tolist()[0]


def test_rgb_grey_and_one_bit_are_read_as_they_are(tmp_path):
    picture, ramp = noise(16, 16), np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name in ("a.png", "a.tiff", "a.PNG"):
        assert np.array_equal(pixels(open_image(str(write(picture, tmp_path / name)))), pixels(picture))
        for image, levels in ((Image.fromarray(ramp), ramp), (Image.fromarray(ramp > 100), (ramp > 100) * 255)):
            assert (pixels(open_image(write(image, tmp_path / name))) == levels[..., None]).all()


def test_palette_with_and_without_transparency(tmp_path):
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([*RED, *GREEN, *BLUE])
    assert read(palette, tmp_path / "plain.png") == [[*RED], [*GREEN], [*BLUE]]
    assert read(palette, tmp_path / "one.png", BLACK, transparency=1) == [[*RED], [*BLACK], [*BLUE]]
    several = read(palette, tmp_path / "several.png", transparency=bytes([255, 0, 51]))
    assert several == [[*RED], [*WHITE], [204, 204, 255]]
    assert read(palette, tmp_path / "a.gif", transparency=0)[0] == [*WHITE]


def test_transparent_colour_of_rgb_and_grey(tmp_path):
    picture = Image.fromarray(np.array([[RED, GREEN]], np.uint8))
    assert read(picture, tmp_path / "rgb.png", transparency=GREEN) == [[*RED], [*WHITE]]
    grey = Image.fromarray(np.array([[10, 200]], np.uint8))
    assert read(grey, tmp_path / "grey.png", BLUE, transparency=10) == [[*BLUE], [200] * 3]


def test_alpha_shows_the_background_and_not_what_hides_below(tmp_path):
    image = Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [255, 0, 0, 128]]], np.uint8))
    assert read(image, tmp_path / "rgba.png") == [[255, 0, 0], [255, 255, 255], [255, 127, 127]]
    assert read(image, tmp_path / "rgba.png", BLUE) == [[255, 0, 0], [0, 0, 255], [128, 0, 127]]
    assert read(image.convert("LA"), tmp_path / "la.png")[1] == [*WHITE]
    for hidden in (image.convert("RGBa").crop((1, 0, 2, 1)), Image.new("La", (1, 1)), Image.new("PA", (1, 1))):
        assert pixels(to_rgb(hidden, BLUE)).tolist() == [[[*BLUE]]]


def chunk(tag: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def png_16_bit(array: np.ndarray) -> bytes:
    """A PNG with 16 bits for each of 2 to 4 channels, by hand: Pillow writes none for colour."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 257, 30000, 65535], [128, 129, 255, 256]], np.uint16)
    expected = np.rint(values / 257).astype(int)
    for name in ("grey.png", "grey.tiff"):
        assert (pixels(open_image(write(Image.fromarray(values), tmp_path / name))) == expected[..., None]).all()
    dark = np.full((2, 2), 200, np.uint16)  # stays dark: white is 65535 whatever the values
    assert read(Image.fromarray(dark), tmp_path / "dark.png")[0] == [1, 1, 1]
    for channels in (2, 3, 4):
        deep = np.full((2, 2, channels), 65535, np.uint16)
        deep[..., 0] = 32896
        (tmp_path / "deep.png").write_bytes(png_16_bit(deep))
        assert abs(pixels(open_image(tmp_path / "deep.png"))[0, 0, 0] - 128) <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.int32([0, 128, 255]), [0, 128, 255]),
        (np.int32([0, 25700, 65535]), [0, 100, 255]),
        (np.int32([0, 1_000_000, 2_000_000]), [0, 128, 255]),
        (np.int32([-5, -5, -5]), [0, 0, 0]),
        (np.float32([0.0, 0.5, 1.0]), [0, 128, 255]),
        (np.float32([0.0, 10.0, 255.0]), [0, 10, 255]),
        (np.float32([-1.0, 0.0, 1.0]), [0, 128, 255]),
    ],
)
def test_integer_and_float_grey(tmp_path, values, expected):
    assert read(Image.fromarray(values[None]), tmp_path / "deep.tiff") == [[level] * 3 for level in expected]


def test_other_grey(tmp_path):
    image = Image.fromarray(np.int32([[0, 200]]))  # what older Pillow makes of a 16-bit PNG
    image.format = "PNG"
    assert pixels(to_rgb(image)).max() == 1
    with pytest.raises(ValueError, match="not finite"):
        read(Image.fromarray(np.float32([[0, np.nan]])), tmp_path / "nan.tiff")


def test_cmyk_and_lab_have_their_colours(tmp_path):
    """Cyan ink is no red, and so on; read as RGB, or inverted, these would be other colours."""
    inks = {(255, 0, 0, 0): (0, 255, 255), (0, 255, 255, 0): RED, (0, 0, 0, 255): BLACK, (0, 0, 0, 0): WHITE}
    for ink, colour in inks.items():
        for name in ("a.jpg", "a.tiff"):
            found = read(Image.new("CMYK", (16, 16), ink), tmp_path / name)
            assert np.abs(np.subtract(found, colour)).max() <= 2, ink
    red = Image.new("LAB", (1, 1), (138, 209, 198))  # CIELAB 54, 81, 70
    assert np.abs(np.subtract(read(red, tmp_path / "lab.tiff"), RED)).max() <= 5


def test_profile_and_text_are_not_carried_over(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = open_image(write(noise(4, 4), tmp_path / "a.png", icc_profile=profile))
    assert np.array_equal(pixels(picture), pixels(noise(4, 4))) and picture.info == {}


def test_a_picture_that_lies_on_its_side(tmp_path):
    exif, deep = Image.Exif(), np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    exif[0x0112] = 6  # what is stored on the left is the top
    got = pixels(open_image(write(smooth(48, 32), tmp_path / "a.jpg", exif=exif)))
    assert got.shape == (48, 32, 3) and np.abs(got - np.rot90(pixels(smooth(48, 32)), -1)).mean() < 3
    assert read(Image.fromarray(deep), tmp_path / "deep.png", exif=exif) == [[200] * 3, [0] * 3]


def test_animated_files_give_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    for name in ("a.gif", "a.png", "a.webp"):
        path = write(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert np.abs(pixels(open_image(path)) - RED).max() <= 1, name


def test_a_hundred_megapixels_are_read_and_a_bomb_is_not(tmp_path, monkeypatch):
    path = write(Image.new("RGB", (100, 100)), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)  # warns from here on, raises from twice as much
    assert open_image(path).size == (100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(ValueError, match=r"a\.png is too large: .* megapixels"):
        open_image(path)


def test_what_cannot_be_read(tmp_path):
    png, jpeg = (write(noise(64, 64), tmp_path / name).read_bytes() for name in ("full.png", "full.jpg"))
    contents = {
        "cut.png": png[: len(png) // 2],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "head.png": png[:20],
        "flipped.png": png[:200] + bytes(byte ^ 0xFF for byte in png[200:260]) + png[260:],
        "empty.png": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for path in (*(tmp_path / name for name in contents), tmp_path / "missing.png", tmp_path / ("a" * 5000), tmp_path):
        with pytest.raises(ValueError) as error:
            open_image(path)
        message = str(error.value)
        assert str(path) in message and "\n" not in message and ";" in message, message
    with pytest.raises(ValueError, match="path of the image is empty"):
        open_image("  ")


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"])
def test_formats_that_are_read_whatever_the_suffix(tmp_path, format_):
    options = {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]} if format_ == "MPO" else {}
    path = write(Image.new("RGB", (8, 8), RED), tmp_path / "photo.dat", format=format_, **options)
    assert np.abs(pixels(open_image(path)) - RED).max() <= 4


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript file (EPS)"),
        (b"\xc5\xd0\xd3\xc6" + bytes(26), "a PostScript file (EPS)"),
        (b"%PDF-1.7", "a PDF"),
        (b"8BPS\0\1", "a Photoshop file (PSD)"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC photo"),
        (b"\0\0\0\x18ftypisom", "a video"),
        (b'<?xml version="1.0"?>\n<svg/>', "an SVG drawing"),
        (b"\n<!DOCTYPE html><title>404</title>", "a web page"),
        (b"PK\3\4", "a ZIP archive"),
        (b"", "empty"),
        (b"version https://git-lfs", "not an image that can be read"),
    ],
)
def test_what_is_none_of_them_is_named(tmp_path, start, kind):
    path = tmp_path / "photo.png"
    path.write_bytes(start)
    with pytest.raises(ValueError) as error:
        open_image(path)
    assert str(error.value).startswith(f"{path} is {kind}") and str(error.value).endswith("; save it as PNG or JPEG")


def test_formats_of_pillow_that_run_programs_or_read_other_files_are_not_opened(tmp_path):
    """Only those of the documentation are: Pillow writes some of the others."""
    for name in ("a.eps", "a.pdf", "a.ico", "a.icns", "a.jp2", "a.tga", "a.pcx", "a.dds", "a.sgi", "a.xbm"):
        image = Image.new("1" if name == "a.xbm" else "RGB", (32, 32))
        with pytest.raises(ValueError, match="not an image that can be read"):
            open_image(write(image, tmp_path / name).rename(tmp_path / "a.png"))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a file"):
        open_image(tmp_path / "pipe")


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "format_"), [("A.PNG", "PNG"), ("two.dots.jpeg", "JPEG"), ("a.webp", "WEBP")])
def test_save(tmp_path, name, format_):
    picture = smooth(40, 24)
    save(picture, tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    with Image.open(tmp_path / name) as file:
        assert file.format == format_
    error = np.abs(pixels(open_image(tmp_path / name)) - pixels(picture))
    assert error.max() == 0 if format_ == "PNG" else error.mean() < 2


def test_a_jpeg_keeps_its_colours_sharp(tmp_path):
    stripes = Image.fromarray(np.tile(np.array([RED, BLUE], np.uint8), (32, 16, 1)))
    save(stripes, tmp_path / "a.jpg")  # halved chroma would make every column purple
    assert np.abs(pixels(open_image(tmp_path / "a.jpg")) - pixels(stripes)).mean() < 10


def test_save_replaces_and_has_the_usual_permissions(tmp_path):
    for mode in ("L", "RGBA", "P", "I;16", "1"):
        save(Image.new(mode, (8, 8)), tmp_path / "a.jpg")
        save(Image.new(mode, (8, 8)), tmp_path / "a.png")
    save(noise(8, 8, seed=1), tmp_path / "a.png")
    assert np.array_equal(pixels(open_image(tmp_path / "a.png")), pixels(noise(8, 8, seed=1)))
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize(
    "where, name, failure",
    [
        (files.os, "replace", OSError(28, "No space left on device")),
        (Image.Image, "save", OSError(28, "No space left on device")),
        (Image.Image, "save", KeyboardInterrupt("No space left")),
    ],
)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, name, failure):
    path = tmp_path / "a.png"
    save(noise(8, 8), path)
    monkeypatch.setattr(where, name, Mock(side_effect=failure))
    with pytest.raises(type(failure), match="No space left") as error:
        save(noise(8, 8, seed=1), path)
    assert isinstance(failure, KeyboardInterrupt) or str(path) in str(error.value)
    assert os.listdir(tmp_path) == ["a.png"]
    assert np.array_equal(pixels(open_image(path)), pixels(noise(8, 8)))


def test_an_image_too_large_for_its_format(tmp_path):
    with pytest.raises(OSError, match=r"a\.webp could not be written"):
        save(Image.new("RGB", (20000, 1)), tmp_path / "a.webp")
    assert not list(tmp_path.iterdir())


def test_check_output(tmp_path, monkeypatch):
    assert check_output(str(tmp_path / "A.WebP")) == tmp_path / "A.WebP"
    (tmp_path / "file").write_text("")
    for path, message in (
        ("", "path is empty"),
        (tmp_path, "is a folder"),
        (tmp_path / ".png", "suffix ''; choose one of .png, .jpg, .jpeg, .webp"),
        (tmp_path / "nowhere" / "a.png", "does not exist; create it"),
        (tmp_path / "file" / "a.png", "does not exist"),
        (tmp_path / ("a" * 5000) / "a.png", "does not exist"),
    ):
        for function in (check_output, lambda path: save(noise(8, 8), path)):
            with pytest.raises(ValueError) as error:
                function(path)
            assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(OSError, match=r"could not be written \(File name too long"):
        check_output(tmp_path / f"{'a' * 5000}.png")
    assert os.listdir(tmp_path) == ["file"]  # checking writes nothing
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OSError, match=r"is not writable; choose another one"):
        check_output(tmp_path / "a.png")


# --- texts -----------------------------------------------------------------------------------------------------------

TEXTS = {
    "parameters": "a café: «富士山» 🌋\nNegative prompt: rain\nSteps: 3, Size: 8x8",
    "stable_diffusion": '{"prompt": "\\u5bcc\\ud83c", "steps": 3}',
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_texts_come_back(tmp_path, suffix):
    """All of Unicode that is valid; only NUL ends a text for other readers, and ours."""
    path = tmp_path / f"a.{suffix}"
    letters = "A1111 " * 200 + "".join(map(chr, [*range(1, 0xD800, 41), *range(0xE000, 0x110000, 997)]))
    for texts in (TEXTS, *({name: text} for name, text in TEXTS.items()), {"parameters": letters}, {}):
        save(noise(8, 8), path, texts)
        assert read_text(path) == texts
    with Image.open(path) as file:
        assert not file.getexif()


def test_texts_of_a_png_are_where_others_look(tmp_path):
    """tEXt of Latin-1, iTXt of what is not (PNG specification, 11.3.4)."""
    save(noise(8, 8), tmp_path / "a.png", TEXTS)
    chunks = (tmp_path / "a.png").read_bytes()
    assert b"iTXtparameters\0\0\0\0\0" + TEXTS["parameters"].encode() in chunks
    assert b"tEXtstable_diffusion\0" + TEXTS["stable_diffusion"].encode() in chunks
    save(noise(8, 8), tmp_path / "a.png", {"parameters": "café"})
    assert b"tEXtparameters\0caf\xe9" in (tmp_path / "a.png").read_bytes()


def test_texts_in_exif_are_where_others_look(tmp_path):
    """UserComment (0x9286, of undefined type) with the name of its encoding, ImageHistory (0x9213), and no caption."""
    save(noise(8, 8), tmp_path / "a.jpg", TEXTS)
    with Image.open(tmp_path / "a.jpg") as file:
        data, exif = file.info["exif"].removeprefix(b"Exif\0\0"), file.getexif()
        comment = exif.get_ifd(0x8769)[0x9286]
    assert data.startswith(b"MM\0*") and set(exif) == {0x9213, 0x8769} and exif[0x9213] == TEXTS["stable_diffusion"]
    assert comment == b"UNICODE\0" + TEXTS["parameters"].encode("utf-16-be")  # big-endian, as all of it is
    assert struct.pack(">HHI", 0x9286, 7, len(comment)) in data


@pytest.mark.parametrize(
    "start, encoding, end",
    [
        (b"UNICODE\0", "utf-16-be", b""),
        (b"UNICODE\0", "utf-16-le", b""),
        (b"UNICODE\0\xff\xfe", "utf-16-le", b""),
        (bytes(8), "utf-8", b""),
        (b"ASCII\0\0\0", "utf-8", b"\0"),
        (b"", "utf-8", b""),
    ],
)
def test_comments_as_others_write_them(tmp_path, start, encoding, end):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = start + "a: é, 富".encode(encoding) + end
    assert read_text(write(noise(8, 8), tmp_path / "a.jpg", exif=exif.tobytes())) == {"parameters": "a: é, 富"}


XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description><exif:UserComment>
<rdf:Alt><rdf:li xml:lang="de">{&quot;c&quot;: &quot;a &lt;cat&gt;&quot;}</rdf:li></rdf:Alt></exif:UserComment>"""


@pytest.mark.parametrize(
    "tags, expected",
    [
        ({0x010E: '{"arguments": {}}'}, {"stable_diffusion": '{"arguments": {}}'}),  # of version 0.1
        ({0x010E: "A cat in Rome"}, {"ImageDescription": "A cat in Rome"}),
        ({0x9286: '{"seed": 1}', 0x927C: "fooocus"}, {"parameters": '{"seed": 1}'}),  # Fooocus has it among the others
        ({0x010F: 'workflow:{"a": 1}', 0x0110: 'prompt:{"b": 2}'}, {"workflow": '{"a": 1}', "prompt": '{"b": 2}'}),
        ({0x010F: "Canon", 0x0110: "EOS: 5"}, {}),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_tags_in_which_programs_write(tmp_path, tags, expected, suffix):
    exif = Image.Exif()
    exif.update(tags)
    assert read_text(write(noise(8, 8), tmp_path / f"a.{suffix}", exif=exif.tobytes())) == expected


def test_comments_beside_exif(tmp_path):
    """XMP (Draw Things), and a JPEG's own comment."""
    for name in ("a.jpg", "a.webp"):
        found = read_text(write(noise(8, 8), tmp_path / name, xmp=XMP.encode()))
        assert found == {"parameters": '{"c": "a <cat>"}'}
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", XMP)
    assert read_text(write(noise(8, 8), tmp_path / "a.png", pnginfo=chunks))["parameters"] == '{"c": "a <cat>"}'
    assert read_text(write(noise(8, 8), tmp_path / "b.jpg", comment="é {}".encode())) == {"Comment": "é {}"}


def test_what_a_jpeg_has_no_room_for(tmp_path, caplog):
    """64 kB: the record stays whole as long as it can, then the text; and whatever it is, the picture is written."""
    path = tmp_path / "a.jpg"
    for text, record, kept in (
        (15_000, 30_000, ["parameters", "stable_diffusion"]),
        (20_000, 30_000, ["stable_diffusion"]),
        (20_000, 70_000, ["parameters"]),
        (40_000, 70_000, []),
    ):
        texts = {"parameters": "é" * text, "stable_diffusion": "x" * record}
        caplog.clear()
        save(noise(8, 8), path, texts)
        assert read_text(path) == {name: texts[name] for name in kept}
        assert pixels(open_image(path)).shape == (8, 8, 3)
        left = [name for name in ("stable_diffusion", "parameters") if name not in kept]
        lines = [f"a.jpg has no room for all metadata: {', '.join(left)} is omitted; a PNG keeps it"] if left else []
        assert caplog.messages == lines
    for name in ("a.png", "a.webp"):
        save(noise(8, 8), tmp_path / name, texts)
        assert read_text(tmp_path / name) == texts
    assert caplog.messages == lines


def test_texts_of_other_programs(tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Comment", "é")
    chunks.add_itxt("prompt", "富", zip=True)
    path = write(noise(8, 8), tmp_path / "a.png", pnginfo=chunks, dpi=(72, 72))
    assert read_text(path) == {"Comment": "é", "prompt": "富"}
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk(b"tEXt", b"parameters\0last") + data[-12:])  # before IEND, behind the pixels
    assert read_text(path)["parameters"] == "last"
    assert read_text(write(noise(8, 8), tmp_path / "a.gif", comment=b"x")) == {}


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_damaged_metadata_is_left_out(tmp_path, name):
    """Texts are read as far as they can be, and a JPEG's pixels whatever its EXIF is; a PNG has sums of its chunks."""
    path, generator = tmp_path / name, np.random.default_rng(0)
    save(noise(8, 8), path, TEXTS)
    data = path.read_bytes()
    start, end = (data.index(b"MM\0*"), data.index(b"\xff\xdb")) if name == "a.jpg" else (33, len(data) - 220)
    for _ in range(200):
        damaged = bytearray(data)
        for place in generator.integers(start, end, 3):
            damaged[place] = generator.integers(0, 256)
        path.write_bytes(damaged)
        try:
            assert all(isinstance(text, str) for text in read_text(path).values())
            assert name == "a.png" or open_image(path).size == (8, 8)
        except ValueError as error:
            assert name == "a.png" and name in str(error) and "\n" not in str(error)


def test_quality(tmp_path):
    for suffix in ("jpg", "webp"):
        path, sizes = tmp_path / f"a.{suffix}", {}
        for quality in (1, 50, None, 95):
            save(noise(64, 64), path, quality=quality)
            sizes[quality] = path.stat().st_size
        assert sizes[1] < sizes[50] < sizes[None] == sizes[95]
    for name, quality in (("a.jpg", 0), ("a.webp", 101), ("a.png", 95)):
        with pytest.raises(ValueError, match=f"a quality of {quality} for {name}: give 1 to 100, for JPEG and WebP"):
            save(noise(8, 8), tmp_path / name, quality=quality)

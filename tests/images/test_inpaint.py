"""Masks, crops and borders: what is read, what is worked on, and which pixels come back untouched."""

import math

import numpy as np
import pytest
from PIL import Image

from images.test_files import noise, smooth
from stable_diffusion.images.image import fit
from stable_diffusion.images.inpaint import Canvas, add_borders, adjust_mask, make_canvas, read_mask

SIZE = (96, 64)
NATIVE = 64


def rectangle(box: tuple[int, int, int, int], size: tuple[int, int] = SIZE) -> Image.Image:
    """White in a box (left, top, right, bottom), black elsewhere."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


HALF = np.zeros((SIZE[1], SIZE[0]), dtype=np.uint8)
HALF[:, 48:] = 1  # the right half


@pytest.mark.parametrize(
    "name, pixels, left, right",
    [
        ("faint.png", HALF.astype(np.uint16) * 0x4000, 0, 64),  # never stretched to the whole range
        ("red.png", np.dstack([HALF * 255, HALF * 0, HALF * 0]), 0, 76),  # its brightness, ITU-R 601
        ("half_transparent.png", np.dstack([*[HALF * 0 + 255] * 3, HALF * 128]), 0, 128),
        ("lossy.jpg", HALF * 255, 0, 255),
    ],
)
def test_masks_of_every_kind(tmp_path, name, pixels, left, right):
    Image.fromarray(pixels).save(tmp_path / name)
    mask = read_mask(tmp_path / name, SIZE)
    assert (mask.mode, mask.size) == ("L", SIZE)
    values = array(mask)
    assert set(values[:, :40].flat) == {left} and set(values[:, 56:].flat) == {right}


def test_a_mask_of_another_size_is_resized(tmp_path):
    for size in ((48, 32), (97, 64), (900, 600)):
        rectangle((size[0] // 2, 0, *size), size).save(tmp_path / "mask.png")
        values = array(read_mask(tmp_path / "mask.png", SIZE))
        assert values.shape == (64, 96)
        assert (values[:, :44] == 0).all() and (values[:, 52:] == 255).all()
        assert (np.diff(values, axis=1) >= 0).all()  # no ringing: black stays black up to the edge
    rectangle((0, 0, 1, 1), (100, 64)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask .*mask.png of 100x64 does not fit an image of 96x64"):
        read_mask(tmp_path / "mask.png", SIZE)


def test_inverted():
    mask = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert np.array_equal(array(adjust_mask(mask, invert=True)), 255 - array(mask))
    assert np.array_equal(array(adjust_mask(mask)), array(mask))
    assert set(array(adjust_mask(Image.new("L", SIZE, 100), invert=True, blur=9)).flat) == {155}


def test_soft_edges_end_within_three_deviations():
    values = array(adjust_mask(rectangle((48, 0, 96, 64)), blur=5))
    assert (values[:, :32] == 0).all() and (values[:, 64:] == 255).all()
    slope, where = np.diff(values, axis=1) / 255, np.arange(1, 96) - 48
    assert (slope >= 0).all()
    assert math.sqrt((slope[0] * where**2).sum()) == pytest.approx(5, rel=0.2)


# --- what is worked on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, width, height, worked_on",
    [
        ((512, 256), None, None, (184, 88)),  # at most twice as large as what the model was trained on
        ((96, 64), None, 128, (192, 128)),
    ],
)
def test_sizes_without_a_mask(size, width, height, worked_on):
    place = make_canvas(noise(*size), None, width, height, NATIVE)
    assert place.size == place.image.size == worked_on
    assert place.box == (0, 0, *worked_on) and place.mask is None
    assert place.crop(place.image) is place.image


def test_a_masked_picture_keeps_its_size():
    picture, mask = noise(30, 20), rectangle((3, 3, 10, 10), (30, 20))
    place = make_canvas(picture, mask, None, None, NATIVE)
    assert place.image is picture and place.mask is mask and place.box == (0, 0, 30, 20)
    assert place.size == place.crop(picture).size == place.crop(mask).size == (96, 64)


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_a_masked_picture_that_is_given_a_size(resize):
    """Mask and picture stay together, and around a fitted picture nothing is made anew."""
    picture, mask = Image.new("RGB", SIZE, (0, 0, 0)), rectangle((24, 16, 72, 48))
    picture.paste((255, 255, 255), (24, 16, 72, 48))
    place = make_canvas(picture, mask, 128, 128, NATIVE, resize=resize)
    assert place.size == place.image.size == place.mask.size == (128, 128)
    values = array(place.mask)
    inside = np.asarray(place.image)[..., 0] > 128
    if resize == "pad":
        inside[:22] = inside[-22:] = False  # the white around it
    assert ((values > 128) != inside).mean() < 0.02
    assert (values[:3] == 0).all() and values[64, 64] == 255
    assert (np.diff(values[64, :64]) >= 0).all() and (np.diff(values[:64, 64]) >= 0).all()  # no ringing


@pytest.mark.parametrize(
    "box, padding, cropped",
    [
        ((40, 24, 56, 40), 8, (32, 16, 64, 48)),
        ((40, 24, 56, 40), 500, (0, 0, 96, 64)),  # more than there is
        ((86, 20, 96, 30), 7, (72, 13, 96, 37)),  # at a border it moves inwards and keeps its size
        ((40, 30, 41, 31), 0, (40, 30, 41, 31)),  # one pixel
        ((20, 30, 60, 31), 0, (20, 10, 60, 50)),  # a line is widened to the aspect ratio of the model
        ((30, 10, 31, 50), 2, (8, 8, 52, 52)),
    ],
)
def test_the_part_around_a_mask(box, padding, cropped):
    picture, mask = noise(*SIZE), rectangle(box)
    place = make_canvas(picture, mask, None, None, NATIVE, padding=padding)
    assert place.box == cropped and place.image is picture and place.mask is mask
    width, height = cropped[2] - cropped[0], cropped[3] - cropped[1]
    assert place.size == ((64, 64) if width == height else (80, 64))
    expected = fit(picture.crop(cropped), *place.size, mode="stretch")
    assert np.array_equal(array(place.crop(picture)), array(expected))


def test_the_part_around_a_mask_has_the_aspect_ratio_of_what_is_worked_on():
    place = make_canvas(noise(400, 300), rectangle((200, 150, 220, 170), (400, 300)), None, 192, 128, padding=5)
    assert place.size == (128, 192) and place.box == (195, 137, 225, 182)


def test_grey_counts_as_masked_and_black_does_not():
    mask = Image.new("L", SIZE)
    with pytest.raises(ValueError, match="mask is black everywhere"):
        make_canvas(noise(*SIZE), mask, None, None, NATIVE, padding=0)
    mask.paste(1, (40, 20, 50, 30))
    assert make_canvas(noise(*SIZE), mask, None, None, NATIVE, padding=0).box == (40, 20, 50, 30)


def test_hints_go_with_the_picture():
    """A hint of the picture's own size, or twice as large, is cut where the picture is cut."""
    picture = noise(*SIZE)
    place = make_canvas(picture, rectangle((64, 32, 96, 64)), None, None, NATIVE, padding=0)
    assert place.box == (64, 32, 96, 64)
    assert np.array_equal(array(place.crop(picture)), array(picture.crop(place.box).resize((64, 64), 1)))
    large = Image.new("RGB", (192, 128))
    large.paste((200, 100, 0), (128, 64, 192, 128))
    assert (array(place.crop(large))[10:, 10:] == (200, 100, 0)).all()
    # of another aspect ratio it comes to the picture's as the picture itself would
    square = Image.new("RGB", (64, 64), (0, 0, 255))
    padded = Canvas(picture, None, (0, 0, *SIZE), SIZE).crop(square, "pad")
    assert (array(padded)[:, :15] == 255).all() and (array(padded)[:, 17:79] == (0, 0, 255)).all()


# --- and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, padding, blur", [((50, 40), None, 1.5), ((97, 65), 0, 1.5), ((50, 40), 7, 0)])
def test_kept_pixels_are_the_very_same(size, padding, blur):
    picture = noise(*size)
    mask = adjust_mask(rectangle((20, 10, 40, 31), size), blur=blur)
    place = make_canvas(picture, mask, None, None, NATIVE, padding=padding)
    result, values = place.paste(Image.new("RGB", place.size, (10, 200, 30))), array(mask)
    assert result.size == size
    assert np.array_equal(array(result)[values == 0], array(picture)[values == 0])
    assert (array(result)[values == 255] == (10, 200, 30)).all() and (values == 255).any()


def test_grey_blends_and_without_a_mask_nothing_is_kept():
    picture, mask, made = Image.new("RGB", SIZE, (200, 0, 100)), Image.new("L", SIZE, 64), noise(*SIZE)
    result = make_canvas(picture, mask, None, None, NATIVE).paste(Image.new("RGB", SIZE, (0, 200, 100)))
    assert np.abs(array(result) - (200 - 50.2, 50.2, 100)).max() <= 1
    assert make_canvas(picture, None, None, None, NATIVE).paste(made) is made
    white = make_canvas(noise(97, 65), Image.new("L", (97, 65), 255), None, None, NATIVE)
    assert np.array_equal(array(white.paste(made)), array(fit(made, 97, 65, mode="stretch")))


def test_what_was_made_comes_back_where_it_belongs():
    """A picture that is worked on and not changed is itself again, but for the resizing."""
    picture = smooth(120, 90)
    place = make_canvas(picture, rectangle((70, 50, 110, 80), (120, 90)), None, None, NATIVE, padding=3)
    assert np.abs(array(place.paste(place.crop(picture))) - array(picture)).max() <= 6


# --- borders ---------------------------------------------------------------------------------------------------------


def test_borders():
    picture = noise(*SIZE)
    wider, mask = add_borders(picture, None, (1, 2, 3, 4))
    assert (wider.mode, mask.mode) == ("RGB", "L")
    assert np.array_equal(array(mask), np.pad(np.zeros((64, 96)), ((2, 4), (1, 3)), constant_values=255))
    rows, columns = np.clip(np.arange(70) - 2, 0, 63), np.clip(np.arange(100) - 1, 0, 95)
    assert np.array_equal(array(wider), array(picture)[rows][:, columns])  # the last pixels, again and again


def test_borders_around_a_mask():
    _, mask = add_borders(noise(*SIZE), rectangle((10, 10, 20, 20)), (8, 0, 0, 0))
    values = array(mask)
    assert (values[:, :8] == 255).all() and (values[10:20, 18:28] == 255).all()
    assert (values == 255).sum() == 8 * 64 + 100

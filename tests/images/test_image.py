"""Images as arrays, their sizes, and grids."""

import math

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from images.test_files import BLUE, GREEN, RED, WHITE, noise, pixels
from stable_diffusion.images.image import fit, from_array, grid, mask_of, pixels_of, target_size, to_array

# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "width", "height", "expected"),
    [
        ((500, 333), None, None, (504, 336)),
        ((4032, 3024), None, None, (1176, 888)),
        ((20, 40), None, None, (64, 128)),
        ((640, 480), 320, None, (320, 240)),
        ((640, 480), 100, 7, (100, 7)),
        ((5000, 1), 512, None, (512, 64)),
        ((1, 5000), None, None, (64, 16384)),
    ],
)
def test_target_size(size, width, height, expected):
    assert target_size(size, width, height, 512) == expected


def test_properties_of_target_sizes():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        size = tuple(int(side) for side in np.exp(rng.uniform(0, math.log(12000), 2)))
        native = int(rng.choice([64, 512, 768, 1024]))
        width, height = target_size(size, None, None, native)
        assert width % 8 == height % 8 == 0 and min(width, height) >= 64 and width * height <= (2 * native) ** 2
        if max(size) / min(size) <= (2 * native) ** 2 / 64**2 / 1.3:  # not a sliver: the aspect is kept up to rounding
            scale = (width / size[0], height / size[1])
            assert abs(scale[0] - scale[1]) <= 12.1 / min(size), (size, width, height)
        other = target_size(size, width, None, native)
        assert other[0] == width and other[1] % 8 == 0 and 64 <= other[1] <= 32 * width


BANDS = np.repeat(np.array([RED, GREEN, BLUE]), 100, axis=0).astype(np.uint8)  # 300 pixels


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize(
    ("mode", "bands"), [("crop", [GREEN] * 60), ("stretch", [RED] * 20 + [GREEN] * 20 + [BLUE] * 20)]
)
def test_fit_crops_the_middle_or_stretches(mode, bands, upright):
    picture = np.tile(BANDS, (100, 1, 1))
    image = Image.fromarray(picture.transpose(1, 0, 2) if upright else picture)
    got = pixels(fit(image, 60, 60, mode))
    got = got.transpose(1, 0, 2) if upright else got
    inside = [i for i in range(60) if min(i % 20, 19 - i % 20) >= 4]  # away from the borders, where Lanczos blends
    assert got.shape == (60, 60, 3) and (got[:, inside] == np.array(bands)[inside]).all()


def test_fit_pads():
    got = pixels(fit(Image.new("RGB", (300, 100), RED), 60, 60, "pad", BLUE))
    assert got.shape == (60, 60, 3)
    assert (got[:20] == BLUE).all() and (got[20:40] == RED).all() and (got[40:] == BLUE).all()
    assert (pixels(fit(Image.new("RGB", (10, 30), RED), 30, 30, "pad"))[:, :10] == WHITE).all()


@pytest.mark.parametrize("mode", ["crop", "stretch", "pad"])
def test_fit_of_any_size(mode):
    """What fits is kept; the rest is Lanczos."""
    picture = noise(40, 24)
    assert np.array_equal(pixels(fit(picture, 40, 24, mode)), pixels(picture))
    expected = picture.resize((80, 48), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(fit(picture, 80, 48, mode)), pixels(expected))
    for size, target in (((1, 1), (513, 64)), ((1, 900), (64, 64)), ((5000, 1), (1, 1))):
        assert fit(Image.new("RGB", size, RED), *target, mode).size == target


def test_fit_of_masks_and_other_modes():
    mask = fit(Image.new("L", (30, 10), 200), 20, 20, "pad", 0)
    assert mask.mode == "L" and mask.getpixel((0, 0)) == 0
    assert fit(Image.new("RGBA", (30, 10), (255, 0, 0, 0)), 20, 20).getpixel((5, 5)) == WHITE


def test_fit_refuses():
    with pytest.raises(ValueError, match="choose crop, pad or stretch"):
        fit(noise(8, 8), 8, 8, "zoom")
    with pytest.raises(ValueError, match="size 8x0 is not positive"):
        fit(noise(8, 8), 8, 0)


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_arrays_are_exact():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    array = to_array(Image.fromarray(levels))
    assert array.dtype == np.float32 and np.array_equal(array, 2.0 * (levels.astype(np.float32) / 255.0) - 1.0)
    for back in (array / 2 + 0.5, mx.array(array) / 2 + 0.5, (array / 2 + 0.5).astype(np.float64)):
        assert np.array_equal(pixels(from_array(back)), levels)
    assert to_array(Image.new("L", (5, 4), 255)).shape == (4, 5, 3)
    array[:] = 0  # ours to change


def test_arrays_are_rounded_and_clipped():
    row = np.array([1.49, 1.51, 254.49, 254.51, 300, -20, 0.49]) / 255
    got = pixels(from_array(np.repeat(row[None, :, None], 3, -1)))[0, :, 0]
    assert got.tolist() == [1, 2, 254, 255, 255, 0, 0]
    assert pixels(from_array(mx.full((2, 3, 3), 0.5, mx.float16))).shape == (2, 3, 3)
    assert pixels(from_array([[[0.0, 0.5, 1.0]]])).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("kind", [np.float16, mx.array])
def test_values_that_are_not_finite_are_refused(bad, kind):
    array = np.zeros((4, 4, 3))
    array[1, 2, 0] = bad
    with pytest.raises(ValueError, match="1 of 48 values of the image are not finite"):
        from_array(kind(array))


def test_arrays_that_are_refused():
    for shape in ((4, 4), (4, 4, 4), (0, 4, 3)):
        with pytest.raises(ValueError, match=r"\[height, width, 3\]"):
            from_array(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="uint8"):
        from_array(np.zeros((4, 4, 3), np.uint8))


def test_images_and_masks_from_files_pil_and_arrays(tmp_path):
    """All are the same array; transparent parts are white in an image and kept by a mask."""
    picture = noise(16, 8)
    picture.save(tmp_path / "a.png")
    array, grey = to_array(picture), np.asarray(picture.convert("L"), np.float32) / 255
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), picture, array, mx.array(array)):
        assert np.array_equal(pixels_of(given, 8), array)
    for given in (tmp_path / "a.png", picture, picture.convert("L"), grey):
        assert np.array_equal(mask_of(given, (8, 16)), grey)
    clear = Image.new("RGBA", (16, 8), (200, 200, 200, 0))
    clear.save(tmp_path / "clear.png")
    for given in (clear, tmp_path / "clear.png"):
        assert (np.array(pixels_of(given, 8)) == 1).all() and not np.array(mask_of(given, (8, 16))).any()


def test_images_and_masks_that_do_not_fit():
    for given, unit in ((noise(16, 8), 16), (np.zeros((8, 8)), 8), (np.zeros((8, 8, 4)), 8)):
        with pytest.raises(ValueError, match=f"must be .H, W, 3. with sides that are multiples of {unit}"):
            pixels_of(given, unit)
    with pytest.raises(ValueError, match=r"mask of shape \(16, 8\) must be \(8, 16\)"):
        mask_of(Image.new("L", (8, 16)), (8, 16))
    for level in (-0.01, 1.01, np.nan):
        with pytest.raises(ValueError, match="values of a mask must lie between 0"):
            mask_of(np.full((8, 16), level), (8, 16))
    with pytest.raises(ValueError, match=r"no image at none\.png"):
        pixels_of("none.png", 8)


# --- grids -----------------------------------------------------------------------------------------------------------


def colours(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (10, 6), (i + 1, 0, 0)) for i in range(count)]


@pytest.mark.parametrize(("count", "rows", "columns", "used"), [(4, 1, 4, 1), (5, 2, 3, 2), (3, 9, 1, 3)])
def test_grid(count, rows, columns, used):
    got = pixels(grid(colours(count), rows))
    assert got.shape == (used * 14 - 8, columns * 18 - 8, 3)
    covered = np.zeros(got.shape[:2], bool)
    for i in range(count):
        y, x = i // columns * 14, i % columns * 18
        assert (got[y : y + 6, x : x + 10] == (i + 1, 0, 0)).all()
        covered[y : y + 6, x : x + 10] = True
    assert (got[~covered] == 255).all()  # gaps, and what the last row lacks


def test_grids_that_cannot_be():
    for images, rows, message in (
        (colours(2), 0, "0 rows"),
        ([], 1, "no images"),
        ([*colours(1), noise(8, 8)], 1, "one size"),
    ):
        with pytest.raises(ValueError, match=message):
            grid(images, rows)

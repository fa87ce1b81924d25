"""Canny's edges: OpenCV's own answers, and what must hold for any picture."""

import numpy as np
import pytest

from stable_diffusion.images.canny import canny

# What cv2.Canny of OpenCV 5.0.0 makes of `picture()` between 100 and 200, one bit a pixel, rows after each other.
OPENCV = (
    "000055254a0000d26c52000390c9d40006919209001c1404930060ad092401c319324903041160920e144641a53025a6932a"
    "c86311a2140046202d25001c2d28431830a852943069123501c1c42a05430308c4a21406118924211c63624a4230c64cd004"
    "618c582569c31992c94a1e31325a85026b248aa9"
)


def picture() -> np.ndarray:
    """uint8 [24, 40, 3]: waves of every direction, faint in the upper left, the colours out of step."""
    y, x = np.mgrid[0:24, 0:40]
    waves = [abs((x * x // (k + 2) + (6 * k - 3) * y + x * y // 4) * 5 % 510 - 255) for k in range(3)]
    return np.stack([wave * (2 * y + x + 6) // 92 for wave in waves], axis=2).astype(np.uint8)


def test_pixel_for_pixel_opencv():
    expected = np.unpackbits(np.frombuffer(bytes.fromhex(OPENCV), np.uint8)).reshape(24, 40) * 255
    edges = canny(picture(), 100, 200)
    assert edges.dtype == np.uint8
    np.testing.assert_array_equal(edges, expected)
    grey = picture()[..., 0]
    np.testing.assert_array_equal(canny(grey), canny(np.stack([grey] * 3, axis=2)))
    assert canny(grey[:1, :1]).shape == (1, 1)


def test_a_step_is_one_line_and_counts_four_times_its_height():
    image = np.full((8, 9, 3), 60, np.uint8)
    image[:, 5:, 1] += 50  # between two pixels: one line, left of the step
    np.testing.assert_array_equal(np.unique(np.nonzero(canny(image, 100, 199))[1]), [4])
    assert (canny(image, 100, 199)[:, 4] == 255).all()
    assert not canny(image, 100, 200).any() and not canny(image[:, :5]).any()
    np.testing.assert_array_equal(canny(image.transpose(1, 0, 2), 100, 199), canny(image, 100, 199).T)
    image[5:, 5:, 1] += 10  # 240 from the seventh row on; both thresholds are to be exceeded
    assert canny(image, 199, 239)[:3].any() and not canny(image, 200, 239)[:3].any()


def test_of_equal_neighbours_on_a_diagonal_neither_stays():
    y, x = np.mgrid[:15, :15]
    edges = canny((60 + 40 * (x + y > 10) + 40 * (x + y > 13)).astype(np.uint8), 100, 150)
    assert set((x + y)[3:-3, 3:-3][edges[3:-3, 3:-3] > 0]) == {10, 14}  # and not 11 and 13, which are as strong


def spiral(size: int) -> np.ndarray:
    """A line of one pixel, 30 levels above a grey picture, that winds into its middle."""
    image, y, x = np.full((size, size), 100, np.uint8), 4, 4
    sides = [size - 8, *(side for n in range(size - 8, 12, -8) for side in (n, n - 4))]
    for turn, side in enumerate(sides):
        dy, dx = ((0, 1), (1, 0), (0, -1), (-1, 0))[turn % 4]
        for _ in range(side - 1):
            y, x = y + dy, x + dx
            image[y, x] = 130
    return image


def test_weak_edges_are_kept_all_along_a_path_that_is_strong_at_one_end():
    image = spiral(120)
    length = (image == 130).sum()
    assert length > 1500
    assert canny(image, 100, 100).sum() / 255 > length and not canny(image, 100, 200).any()
    image[4, 5:9] = 200
    assert canny(image, 100, 200).sum() / 255 > length


@pytest.mark.parametrize(
    "image, low, message",
    [
        (np.zeros((4, 4, 3), np.float32), 100, r"not float32 \[4, 4, 3\]"),
        (np.zeros(4, np.uint8), 100, r"not uint8 \[4\]"),
        (np.zeros((0, 4, 3), np.uint8), 100, r"not uint8 \[0, 4, 3\]"),
        (np.zeros((4, 4), np.uint8), 300, "the low threshold 300 is above the high one, 200"),
    ],
)
def test_what_it_does_not_take(image, low, message):
    with pytest.raises(ValueError, match=message):
        canny(image, low, 200)

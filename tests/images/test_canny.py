"""Canny's edges: OpenCV's own answers, a slow second implementation, and what must hold for any picture."""

import math

import numpy as np
import pytest

from stable_diffusion.images.canny import canny

# What cv2.Canny of OpenCV 5.0.0 makes of `picture()`, one bit a pixel, rows after each other.
OPENCV = {
    (100, 200): (
        "000055254a0000d26c52000390c9d40006919209001c1404930060ad092401c319324903041160920e144641a53025a6932a"
        "c86311a2140046202d25001c2d28431830a852943069123501c1c42a05430308c4a21406118924211c63624a4230c64cd004"
        "618c582569c31992c94a1e31325a85026b248aa9"
    ),
    (150, 700): (
        "000000000a000000001200000000140000000009000000001300000000240000000049000000009200000001a5000000132a"
        "00000022140000002d250000002843000000529400000035010000000543000000a21400000124210000024a4200000cd004"
        "0000182569000012c94a0000325a850000248aa9"
    ),
}


def picture() -> np.ndarray:
    """uint8 [24, 40, 3]: waves of every direction, faint in the upper left, the colours out of step."""
    y, x = np.mgrid[0:24, 0:40]
    waves = [abs((x * x // (k + 2) + (6 * k - 3) * y + x * y // 4) * 5 % 510 - 255) for k in range(3)]
    return np.stack([wave * (2 * y + x + 6) // 92 for wave in waves], axis=2).astype(np.uint8)


def slow_canny(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """The definition, pixel by pixel: Sobel, angles in degrees, a walk from every strong pixel."""
    height, width, channels = image.shape

    def value(y: int, x: int, c: int) -> int:
        return int(image[min(max(y, 0), height - 1), min(max(x, 0), width - 1), c])

    def gradient(y: int, x: int, c: int) -> tuple[int, int]:
        side = (1, 2, 1)
        dx = sum(w * (value(y + i - 1, x + 1, c) - value(y + i - 1, x - 1, c)) for i, w in enumerate(side))
        dy = sum(w * (value(y + 1, x + i - 1, c) - value(y - 1, x + i - 1, c)) for i, w in enumerate(side))
        return dx, dy

    pixels = [(y, x) for y in range(height) for x in range(width)]
    slopes = {p: max((gradient(*p, c) for c in range(channels)), key=lambda g: abs(g[0]) + abs(g[1])) for p in pixels}
    strength = {p: abs(dx) + abs(dy) for p, (dx, dy) in slopes.items()}
    thin = set()
    for (y, x), (dx, dy) in slopes.items():
        angle = math.degrees(math.atan2(dy, dx)) % 180
        step_y, step_x = ((0, 1), (1, 1), (1, 0), (1, -1))[round(angle / 45) % 4]
        here = strength[y, x]
        before, after = strength.get((y - step_y, x - step_x), 0), strength.get((y + step_y, x + step_x), 0)
        diagonal = step_y and step_x
        if here > low and here > before and (here > after if diagonal else here >= after):
            thin.add((y, x))
    result, reached = np.zeros((height, width), np.uint8), [p for p in thin if strength[p] > high]
    while reached:
        y, x = reached.pop()
        if (y, x) in thin:
            thin.remove((y, x))
            result[y, x] = 255
            reached += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return result


def pictures(count: int) -> list[np.ndarray]:
    """Noise, few levels (many equal neighbours), and blocks, of odd sizes."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        height, width = rng.integers(1, 26, 2)
        noise = rng.integers(0, 256, (height, width, 3))
        blocks = np.kron(noise, np.ones((5, 4, 1), int))[:height, :width]
        found.append([noise, noise // 86 * 80, blocks][i % 3].astype(np.uint8))
    return found


@pytest.mark.parametrize("low, high", OPENCV)
def test_pixel_for_pixel_opencv(low, high):
    expected = np.unpackbits(np.frombuffer(bytes.fromhex(OPENCV[low, high]), np.uint8)).reshape(24, 40) * 255
    edges = canny(picture(), low, high)
    assert edges.dtype == np.uint8
    np.testing.assert_array_equal(edges, expected)


@pytest.mark.parametrize("low, high", [(0, 0), (50, 400.5), (100, 200), (300, 900), (1500, 2000)])
def test_the_definition_pixel_by_pixel(low, high):
    for image in pictures(12):
        np.testing.assert_array_equal(canny(image, low, high), slow_canny(image, low, high))
        np.testing.assert_array_equal(canny(image[..., 0], low, high), slow_canny(image[..., :1], low, high))


def test_a_step_is_one_line_and_counts_four_times_its_height():
    image = np.full((8, 9, 3), 60, np.uint8)
    image[:, 5:, 1] += 50  # between two pixels: one line, left of the step
    np.testing.assert_array_equal(np.unique(np.nonzero(canny(image, 100, 199))[1]), [4])
    assert (canny(image, 100, 199)[:, 4] == 255).all()
    assert not canny(image, 100, 200).any() and not canny(image[:, :5]).any()
    image[5:, 5:, 1] += 10  # 240 from the seventh row on; both thresholds are to be exceeded
    assert canny(image, 199, 239)[:3].any() and not canny(image, 200, 239)[:3].any()


def spiral(size: int) -> tuple[np.ndarray, int]:
    """A line of one pixel that winds into the middle of a grey picture, 30 levels above it, and its length."""
    image, y, x, length = np.full((size, size), 100, np.uint8), 4, 4, 0
    sides = [size - 8, *(side for n in range(size - 8, 12, -8) for side in (n, n - 4))]
    for turn, side in enumerate(sides):
        dy, dx = ((0, 1), (1, 0), (0, -1), (-1, 0))[turn % 4]
        for _ in range(side - 1):
            y, x, length = y + dy, x + dx, length + 1
            image[y, x] = 130
    return image, length


def test_weak_edges_are_kept_all_along_a_path_that_is_strong_at_one_end():
    image, length = spiral(120)
    assert length > 1500
    assert canny(image, 100, 100).sum() / 255 > length and not canny(image, 100, 200).any()
    image[4, 5:9] = 200
    kept = canny(image, 100, 200)
    assert kept.sum() / 255 > length
    np.testing.assert_array_equal(kept, slow_canny(image[..., None], 100, 200))


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 9, 3), (7, 1), (2, 2)])
def test_the_smallest_pictures(shape):
    assert canny(np.full(shape, 200, np.uint8)).shape == shape[:2]


@pytest.mark.parametrize(
    "image, low, high, message",
    [
        (np.zeros((4, 4, 3), np.float32), 100, 200, "not float32 [4, 4, 3]"),
        (np.zeros((4,), np.uint8), 100, 200, "not uint8 [4]"),
        (np.zeros((0, 4, 3), np.uint8), 100, 200, "not uint8 [0, 4, 3]"),
        (np.zeros((4, 4, 3), np.uint8), 200, 100, "the low threshold 200 is above the high one, 100"),
    ],
)
def test_what_it_does_not_take(image, low, high, message):
    with pytest.raises(ValueError) as caught:
        canny(image, low, high)
    assert message in str(caught.value) and "\n" not in str(caught.value)

"""Sizes of pictures equal those of kohya's scripts (``make_bucket_resolutions`` and ``select_bucket``)."""

import pytest

from stable_diffusion.images.buckets import bucket_sizes, crop_for

XL = """512x1856 512x1920 512x1984 512x2048 576x1664 576x1728 576x1792 640x1536 640x1600 704x1408 704x1472 768x1280
768x1344 832x1216 896x1152 960x1088 1024x1024"""
MIDDLE = """384x1344 384x1408 384x1472 384x1536 448x1216 448x1280 512x1088 512x1152 576x960 576x1024 640x896 704x832
768x768"""
# By the resolution, with sides from a half to twice of it: the sizes as high as wide, or higher, and these turned.
KOHYA = {512: "256x832 256x896 256x960 256x1024 320x704 320x768 384x640 448x576 512x512", 768: MIDDLE, 1024: XL}
CHOICES = {  # of 512 pixels: a picture, its size and what it is resized to
    (4032, 3024): ((576, 448), (597, 448)),
    (3024, 4032): ((448, 576), (448, 597)),
    (1920, 1080): ((640, 384), (683, 384)),
    (600, 600): ((512, 512), (512, 512)),
    (512, 513): ((512, 512), (512, 513)),
    (5000, 700): ((1024, 256), (1829, 256)),
    (301, 1000): ((256, 832), (256, 850)),
    (960, 256): ((960, 256), (960, 256)),
}


@pytest.mark.parametrize("resolution", KOHYA)
def test_sizes_equal_kohyas(resolution):
    sizes = [tuple(map(int, size.split("x"))) for size in KOHYA[resolution].split()]
    assert bucket_sizes(resolution) == sorted({*sizes, *(size[::-1] for size in sizes)})


@pytest.mark.parametrize(("resolution", "unit"), [(64, 8), (72, 16), (520, 64), (1000, 64), (64, 64)])
def test_sizes_are_multiples_within_the_area(resolution, unit):
    sizes = bucket_sizes(resolution, unit)
    assert all(width % unit == height % unit == 0 < width * height <= resolution**2 for width, height in sizes)


@pytest.mark.parametrize("picture", CHOICES)
def test_the_nearest_aspect_is_chosen_then_scaled_and_cut(picture):
    crop = crop_for(picture, bucket_sizes(512))
    assert (crop.size, crop.resized) == CHOICES[picture]
    for start, side, length in zip(crop.corner, crop.size, crop.resized, strict=True):
        assert start >= 0 and length - side - start in (start, start + 1)

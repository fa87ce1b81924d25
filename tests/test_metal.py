"""The default device, which is a GPU on a Mac, against the CPU in float32: pictures, types, what scripts choose.

All of it runs on a CPU too. ``python -m stable_diffusion check`` compares many more operations, and measures.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from oracle import last, relative_error
from stable_diffusion import StableDiffusion
from stable_diffusion.app.metadata import read_record
from test_tiny import FOLDER, RED_ON_BLUE, draw, reads

pytestmark = pytest.mark.gpu
GOLDEN = np.array(Image.open(FOLDER / "golden.png").convert("RGB")).astype(int)
# (largest difference, mean) from the golden image, in levels: on a CPU 1 and 0.0, 4 and 0.05, 38 and 0.5.
LEVELS = {"float32": (8, 0.5), "float16": (8, 0.5), "bfloat16": (64, 1.0)}
SMALL = {"low_memory": True, "unet_bits": 8, "text_bits": 4}  # which changes the picture
CASES = [*((name, {}) for name in LEVELS), ("float32", SMALL)]
CASES += [pytest.param("float16", SMALL, marks=pytest.mark.slow)]  # on a CPU


@pytest.mark.parametrize("name, options", CASES)
def test_the_golden_image(name, options):
    sd = StableDiffusion("tiny", dtype=getattr(mx, name), **options)
    (drawn,) = draw(sd, RED_ON_BLUE, seed=1)
    assert sd.dtype_name == name and reads(drawn) == ("red", "circle", "blue")
    difference = np.abs(drawn - GOLDEN)
    largest, mean = LEVELS[name]
    assert (difference.max() <= largest and difference.mean() <= mean) or (options and difference.mean() <= 3)


def test_noise_is_that_of_the_cpu():
    for shape in [(1, 64, 64, 4), (3, 5, 7)]:
        key = mx.random.key(5)
        ours, theirs = (mx.random.normal(shape, key=key, stream=device) for device in (mx.default_device(), mx.cpu))
        assert relative_error(ours, np.array(theirs)) <= 2e-6


def test_float32_is_float32():
    """Products of 24 bits, not of TF32's 11, which an M5 takes where MLX_ENABLE_TF32 is 1."""
    a, b = (mx.random.normal((256, 256), key=mx.random.key(i)) for i in (1, 2))
    exact = np.array(a).astype(np.float64) @ np.array(b).astype(np.float64)
    assert relative_error(a @ b, exact) <= 2e-6


@pytest.mark.parametrize("is_exact, allowed", [(True, 1e-3), (False, 2e-2)])
def test_convolutions_in_half_precision(monkeypatch, is_exact, allowed):
    """Of the smallest size that MLX computes by Winograd on Metal, with 36 times the error, unless --exact is set."""
    monkeypatch.setenv("MLX_CONV_WINOGRAD_WORKING_SET", str(int(is_exact)))
    x = mx.random.normal((1, 64, 64, 128), key=mx.random.key(0)).astype(mx.float16)
    w = (0.03 * mx.random.normal((128, 3, 3, 128), key=mx.random.key(1))).astype(mx.float16)
    ours = np.array(mx.conv2d(x, w, padding=1)).astype(np.float64)
    exact = np.array(mx.conv2d(x.astype(mx.float32), w.astype(mx.float32), padding=1, stream=mx.cpu))
    assert np.sqrt(((ours - exact) ** 2).mean()) <= allowed * exact.std()


def test_a_model_made_in_one_thread_runs_in_another():
    with ThreadPoolExecutor(1) as pool:
        sd = pool.submit(StableDiffusion, "tiny").result()
    run = {"num_steps": 2, "seed": 3}
    here = last(sd.generate_latents(RED_ON_BLUE, **run))
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(lambda: last(sd.generate_latents(RED_ON_BLUE, **run))).result()
    assert relative_error(there, here) <= 1e-5


def test_scripts_choose_device_and_type(run, tmp_path):
    default = mx.default_device().type.name
    options = ["--model", "tiny", "--steps", 2, "--n_images", 1, "--overwrite", "--output", tmp_path / "a.png"]
    half = {"gpu": "float16", "cpu": "float32"}
    for words, device in (([], default), (["--device", default], default), (["--device", "cpu"], "cpu")):
        run("txt2image", RED_ON_BLUE, *options, *words).succeeded()
        software = read_record(tmp_path / "a.png").details["software"]
        assert (software["device"], software["type"]) == (device, half[device])
    assert "SD_DEVICE" not in os.environ

"""T2I-Adapters against diffusers, and the UNet with their features."""

import mlx.core as mx
import numpy as np
import pytest
from diffusers import T2IAdapter as Oracle
from PIL import Image

from configs import REAL_UNETS
from models.test_unet import inputs, run_oracle, run_ours, unets
from oracle import SCALES, nchw, nhwc, normal, pair, relative_error
from stable_diffusion.models.config import UNetConfig
from stable_diffusion.models.controlnet import T2IAdapter, T2IAdapterConfig
from test_full_size import check, oracle_shapes

FULL = {"channels": [32, 64, 64], "num_res_blocks": 2, "downscale_factor": 8, "adapter_type": "full_adapter"}
ADAPTERS = {
    "full": FULL,
    "grey": FULL | {"in_channels": 1},
    "xl": FULL | {"channels": [32, 64, 64, 64], "downscale_factor": 4, "adapter_type": "full_adapter_xl"},
    "light": FULL | {"channels": [32, 64], "num_res_blocks": 1, "adapter_type": "light_adapter"},
}


def adapters(name: str) -> tuple[T2IAdapter, Oracle]:
    config = ADAPTERS[name]
    return pair("controlnet", {"_class_name": "T2IAdapter"} | config, lambda: Oracle(**config))


@pytest.mark.parametrize("name", ADAPTERS)
def test_equals_diffusers(name):
    """Of odd maps, too: their last row and column is halved alone."""
    ours, oracle = adapters(name)
    for i, scale in enumerate(SCALES):
        image = normal(i + 1, 40, 72, ours.config.in_channels, seed=1, scale=scale)
        features, expected = ours.embed(mx.array(image)), oracle(nchw(image))
        assert [f.shape for f in features] == [nhwc(e).shape for e in expected]
        for mine, theirs in zip(features, expected, strict=True):
            assert relative_error(mine, nhwc(theirs)) <= 1e-4


@pytest.mark.parametrize("name, adapter, factor", [("sd1", "full", 8), ("sd1", "light", 8), ("xl", "xl", 2)])
def test_unet_with_features_equals_diffusers(name, adapter, factor):
    """From image to prediction, on both sides: three features for three blocks, and XL's fourth for the middle."""
    network, oracle = adapters(adapter)
    unet, oracle_unet = unets(name)
    image = normal(2, 8 * factor, 12 * factor, 3, seed=5)
    given, t = inputs(name, 2, 8, 12), [800.0, 3.0]
    features = [0.7 * feature for feature in oracle(nchw(image))]
    theirs = run_oracle(oracle_unet, given, t, down_intrablock_additional_residuals=features)
    ours = run_ours(unet, given, t, features=[0.7 * feature for feature in network.embed(mx.array(image))])
    assert relative_error(ours, nhwc(theirs)) <= 1e-4
    assert relative_error(run_ours(unet, given, t), ours) > 1e-2


def test_grey_adapters_see_colours_in_grey():
    """By the weights of PIL, whose conversion is how the oracle's pipeline is given such images."""
    network, _ = adapters("grey")
    colours = np.random.default_rng(0).integers(0, 256, (40, 72, 3), np.uint8)
    grey = np.asarray(Image.fromarray(colours).convert("L"))[None, ..., None]
    seen = network.embed(mx.array(colours[None] / np.float32(255)))
    for a, b in zip(seen, network.embed(mx.array(grey / np.float32(255))), strict=True):
        assert relative_error(a, b) < 1e-2  # the picture's grey is rounded to whole numbers


def test_what_does_not_fit_is_refused():
    network, _ = adapters("full")
    for shape in ((1, 40, 72, 1), (1, 44, 72, 3), (1, 40, 76, 3), (40, 72, 3)):
        with pytest.raises(ValueError, match=r"\[B, H, W, 3\].*multiples of 8"):
            network.embed(mx.zeros(shape))


PUBLISHED = [  # their family, and their parameters: four bytes each in files of 316 and 308 MB
    ({"adapter_type": "full_adapter_xl", "downscale_factor": 16, "in_channels": 3}, "sdxl-base", 79_028_160),
    ({"adapter_type": "full_adapter", "downscale_factor": 8, "in_channels": 1}, "sd15", 77_000_640),
]


@pytest.mark.parametrize("config, family, count", PUBLISHED)
def test_published_adapters_have_their_names_and_shapes_and_fit_one_family(config, family, count):
    config = config | {"channels": [320, 640, 1280, 1280], "num_res_blocks": 2}
    stored = oracle_shapes(lambda: Oracle(**config))
    assert check("controlnet", {"_class_name": "T2IAdapter"} | config, stored) == count
    read = T2IAdapterConfig.from_dict(config)
    read.check_fits(UNetConfig.from_dict(REAL_UNETS[family]))
    for other in {"sdxl-base", "sd15", "sdxl-refiner"} - {family}:
        with pytest.raises(ValueError, match="T2I-Adapter does not fit the model: its features"):
            read.check_fits(UNetConfig.from_dict(REAL_UNETS[other]))

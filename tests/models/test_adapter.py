"""T2I-Adapters against diffusers, and the UNet that hears them."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import T2IAdapter as Oracle
from diffusers import UNet2DConditionModel as OracleUNet
from PIL import Image

from configs import REAL_UNETS, UNETS
from oracle import SCALES, nchw, nhwc, normal, perturb, relative_error, twin
from stable_diffusion.models.config import UNetConfig
from stable_diffusion.models.controlnet import T2IAdapter, T2IAdapterConfig
from stable_diffusion.models.unet import UNet2DConditionModel
from test_full_size import check, oracle_shapes

FULL = {"channels": [32, 64, 64], "num_res_blocks": 2, "downscale_factor": 8, "adapter_type": "full_adapter"}
ADAPTERS = {
    "full": FULL,
    "grey": FULL | {"in_channels": 1},
    "xl": FULL | {"channels": [32, 64, 64, 64], "downscale_factor": 4, "adapter_type": "full_adapter_xl"},
    "light": FULL | {"channels": [32, 64], "num_res_blocks": 1, "adapter_type": "light_adapter"},
}


def pair(config: dict) -> tuple[T2IAdapter, Oracle]:
    torch.manual_seed(0)
    oracle = perturb(Oracle(**config))
    return twin(T2IAdapter(T2IAdapterConfig.from_dict(config)), oracle), oracle


@pytest.mark.parametrize("name", ADAPTERS)
def test_equals_diffusers(name):
    """Of odd maps, too: their last row and column is halved alone."""
    config = ADAPTERS[name]
    ours, oracle = pair(config)
    for i, scale in enumerate(SCALES):
        image = normal(i + 1, 40, 72, config.get("in_channels", 3), seed=1, scale=scale)
        features, expected = ours.embed(mx.array(image)), oracle(nchw(image))
        assert [f.shape for f in features] == [nhwc(e).shape for e in expected]
        for mine, theirs in zip(features, expected, strict=True):
            assert relative_error(mine, nhwc(theirs)) <= 1e-4


@pytest.mark.parametrize("name, adapter, factor", [("sd1", "full", 8), ("sd1", "light", 8), ("xl", "xl", 2)])
def test_unet_with_features_equals_diffusers(name, adapter, factor):
    """From image to prediction, on both sides: three features for three blocks, and XL's fourth for the middle."""
    network, oracle = pair(ADAPTERS[adapter])
    torch.manual_seed(1)
    oracle_unet = perturb(OracleUNet(**UNETS[name]), seed=1)
    unet = twin(UNet2DConditionModel(UNetConfig.from_dict(UNETS[name])), oracle_unet)
    image = normal(2, 8 * factor, 12 * factor, 3, seed=5)
    x, context = normal(2, 8, 12, 4, seed=1), normal(2, 5, UNETS[name]["cross_attention_dim"], seed=2)
    added = {"text_embeds": normal(2, 32, seed=3), "time_ids": 500 * abs(normal(2, 6, seed=4))}

    def ours(features):
        temb = unet.embed_time(mx.array([800.0, 3.0]), mx.float32, tuple(map(mx.array, added.values())))
        return unet(mx.array(x), temb, mx.array(context), features=features)

    theirs = oracle_unet(
        nchw(x),
        torch.tensor([800.0, 3.0]),
        torch.from_numpy(context),
        down_intrablock_additional_residuals=[0.7 * feature for feature in oracle(nchw(image))],
        added_cond_kwargs={key: torch.from_numpy(value) for key, value in added.items()},
    )
    heard = ours([0.7 * feature for feature in network.embed(mx.array(image))])
    assert relative_error(heard, nhwc(theirs.sample)) <= 1e-4
    assert relative_error(ours(()), heard) > 1e-2


def test_grey_adapters_see_colours_in_grey():
    """By the weights of PIL, whose conversion is how the oracle's pipeline is given such images."""
    network, _ = pair(ADAPTERS["grey"])
    colours = np.random.default_rng(0).integers(0, 256, (40, 72, 3), np.uint8)
    grey = np.asarray(Image.fromarray(colours).convert("L"))[None, ..., None]
    seen = network.embed(mx.array(colours[None] / np.float32(255)))
    for a, b in zip(seen, network.embed(mx.array(grey / np.float32(255))), strict=True):
        assert relative_error(a, b) < 1e-2  # the picture's grey is rounded to whole numbers


def test_what_does_not_fit_is_refused():
    network, _ = pair(ADAPTERS["full"])
    for shape in ((1, 40, 72, 1), (1, 44, 72, 3), (1, 40, 76, 3), (40, 72, 3)):
        with pytest.raises(ValueError, match=r"\[B, H, W, 3\].*multiples of 8"):
            network.embed(mx.zeros(shape))
    unet = UNet2DConditionModel(UNetConfig.from_dict(UNETS["sd1"]))
    with pytest.raises(ValueError, match="5 features for a UNet of 3 down blocks"):
        temb = unet.embed_time(1.0, mx.float32)
        unet(mx.zeros((1, 8, 8, 4)), temb, mx.zeros((1, 5, 32)), features=[mx.zeros((1, 1, 1, 1))] * 5)


@pytest.mark.parametrize("changes", [{"adapter_type": "heavy"}, {"extra": 1}])
def test_configs_that_cannot_be_computed_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=f"adapter config: .*{next(iter(changes))}="):
        T2IAdapterConfig.from_dict(FULL | changes)


# As their config.json has them; four bytes a parameter are the sizes of their files, 316 and 308 MB.
REAL = {
    "t2i-adapter-canny-sdxl-1.0": {
        "adapter_type": "full_adapter_xl",
        "channels": [320, 640, 1280, 1280],
        "downscale_factor": 16,
        "in_channels": 3,
        "num_res_blocks": 2,
    },
    "t2iadapter_canny_sd15v2": {
        "adapter_type": "full_adapter",
        "channels": [320, 640, 1280, 1280],
        "downscale_factor": 8,
        "in_channels": 1,
        "num_res_blocks": 2,
    },
}
COUNTS = {"t2i-adapter-canny-sdxl-1.0": 79_028_160, "t2iadapter_canny_sd15v2": 77_000_640}


@pytest.mark.parametrize("name", REAL)
def test_names_and_shapes_of_the_published_ones(name):
    stored = oracle_shapes(lambda: Oracle(**REAL[name]))
    assert check("controlnet", {"_class_name": "T2IAdapter"} | REAL[name], stored) == COUNTS[name]


@pytest.mark.parametrize(
    "name, family", [("t2i-adapter-canny-sdxl-1.0", "sdxl-base"), ("t2iadapter_canny_sd15v2", "sd15")]
)
def test_each_fits_its_family_and_no_other(name, family):
    config = T2IAdapterConfig.from_dict(REAL[name])
    config.check_fits(UNetConfig.from_dict(REAL_UNETS[family]))
    for other in {"sdxl-base", "sd15", "sdxl-refiner"} - {family}:
        with pytest.raises(ValueError, match="T2I-Adapter does not fit the model: its features"):
            config.check_fits(UNetConfig.from_dict(REAL_UNETS[other]))

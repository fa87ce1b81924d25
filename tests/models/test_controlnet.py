"""ControlNets of every family against diffusers, and the UNet that adds their residuals."""

from functools import cache
from inspect import signature

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel as Oracle

from configs import REAL_UNETS, UNETS
from models import test_unet
from models.test_unet import unets
from oracle import SCALES, nchw, nhwc, normal, pair, relative_error
from stable_diffusion.models.config import UNetConfig
from stable_diffusion.models.controlnet import ControlNetConfig, ControlNetModel, scaled_residuals
from test_full_size import check, oracle_shapes


def of_unet(config: dict, **changes) -> dict:
    """The config of a ControlNet for a UNet, which says nothing of the UNet's second half."""
    return {key: value for key, value in config.items() if key in signature(Oracle.__init__).parameters} | changes


def small(name: str, **changes) -> dict:
    return of_unet(UNETS[name], conditioning_embedding_out_channels=[4, 8, 12, 16]) | changes


CONTROLNETS = {
    "sd1": small("sd1"),
    "sd2-v": small("sd2-v"),
    "xl": small("xl"),
    "xl-mid": small("xl", transformer_layers_per_block=[0, 0, 1]),
    "xl-small": small("xl", transformer_layers_per_block=[0, 0, 0], down_block_types=["DownBlock2D"] * 3),
    "bgr": small("sd1", controlnet_conditioning_channel_order="bgr"),
    "shuffle": small("sd1", global_pool_conditions=True),
    "plain middle": small("sd1", mid_block_type="UNetMidBlock2D"),
    "other images": small("sd1", conditioning_channels=5, conditioning_embedding_out_channels=[6, 10]),
    "heads and waves": small("sd1", num_attention_heads=[2, 4, 8], flip_sin_to_cos=False, freq_shift=1),
}
Residuals = tuple[list[mx.array], mx.array]


@cache
def controlnets(name: str) -> tuple[ControlNetModel, Oracle]:
    def make() -> Oracle:
        oracle = Oracle(**CONTROLNETS[name])
        for parameter in oracle.controlnet_cond_embedding.parameters():
            torch.nn.init.normal_(parameter, std=0.2)  # its last convolution starts at zero
        return oracle

    return pair("controlnet", CONTROLNETS[name], make)


def inputs(name: str, batch: int, height: int, width: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """NumPy inputs of one call; the conditioning is at scale 1, as encoders produce it."""
    config = CONTROLNETS[name]
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    size = (batch, factor * height, factor * width, config.get("conditioning_channels", 3))
    image = np.random.default_rng(5).uniform(0, scale, size).astype(np.float32)
    given = test_unet.inputs("xl" if name.startswith("xl") else "sd1", batch, height, width, scale)
    return given | {"image": image}


def run_oracle(oracle: Oracle, given: dict, t: list[float], scale: float = 1.0, guess: bool = False) -> Residuals:
    added = {key: torch.from_numpy(given[key]) for key in ("text_embeds", "time_ids") if key in given}
    context, image = torch.from_numpy(given["context"]), nchw(given["image"])
    options = {"conditioning_scale": scale, "guess_mode": guess, "added_cond_kwargs": added, "return_dict": False}
    return oracle(nchw(given["x"]), torch.tensor(t), context, image, **options)


def run_ours(net: ControlNetModel, given: dict, t: list[float]) -> Residuals:
    a = {key: mx.array(value) for key, value in given.items()}
    text_time = (a["text_embeds"], a["time_ids"]) if "time_ids" in a else None
    return net(a["x"], net.embed_time(mx.array(t), a["x"].dtype, text_time), a["context"], net.embed(a["image"]))


def worst(ours: Residuals, theirs) -> float:
    """The largest error; those of torch are NCHW."""
    pairs = zip((*ours[0], ours[1]), (*theirs[0], theirs[1]), strict=True)
    return max(relative_error(a, b if isinstance(b, mx.array) else nhwc(b)) for a, b in pairs)


@pytest.mark.parametrize("name", CONTROLNETS)
def test_equals_diffusers(name):
    ours, oracle = controlnets(name)
    for i, (scale, size) in enumerate(zip(SCALES, [(6, 10), (7, 9), (5, 8)], strict=True)):
        given = inputs(name, i + 1, *size, scale)
        t = [999.0, 500.0, 1.0][: i + 1]
        assert worst(run_ours(ours, given, t), run_oracle(oracle, given, t)) <= 1e-4


@pytest.mark.parametrize("name, scale, guess", [("sd1", 0.35, False), ("sd1", 1.0, True), ("shuffle", 0.35, True)])
def test_scales_and_guess_mode_equal_diffusers(name, scale, guess):
    ours, oracle = controlnets(name)
    given, t = inputs(name, 2, 8, 6), [801.0, 20.0]
    residuals = scaled_residuals(run_ours(ours, given, t), scale, guess)
    assert worst(residuals, run_oracle(oracle, given, t, scale, guess)) <= 1e-4


@pytest.mark.parametrize("name, rows, pooled", [("sd1", 3, False), ("inpaint", 1, False), ("no-mid", 3, True)])
def test_unet_with_residuals_equals_diffusers(name, rows, pooled):
    """One row of residuals may serve several images, and one pixel all: diffusers adds them in the same way."""
    unet, oracle = unets(name)
    size, shapes = (5, 8), []
    for i, channels in enumerate(unet.config.skip_channels):
        if i in (3, 6):  # the last map of a block is of half the size, rounded up
            size = (-(-size[0] // 2), -(-size[1] // 2))
        shapes.append((1, 1, channels) if pooled else (*size, channels))
    down = [normal(rows, *shape, seed=i, scale=0.5) for i, shape in enumerate(shapes)]
    middle = normal(rows, *shapes[-1], seed=99, scale=0.5)
    given, t = test_unet.inputs(name, 3, 5, 8), [700.0, 30.0, 1.0]
    residuals = {"down_block_additional_residuals": tuple(map(nchw, down))}
    theirs = test_unet.run_oracle(oracle, given, t, **residuals, mid_block_additional_residual=nchw(middle))
    residuals = [mx.array(r) for r in down], mx.array(middle)
    assert relative_error(test_unet.run_ours(unet, given, t, residuals=residuals), nhwc(theirs)) <= 1e-4


def test_what_does_not_fit_is_refused():
    """Control images of another size or depth."""
    net, _ = controlnets("sd1")
    x, temb, context = mx.zeros((1, 8, 6, 4)), net.embed_time(1.0, mx.float32), mx.zeros((1, 5, 32))
    with pytest.raises(ValueError, match=r"control image's size is \(64, 56\), the output's \(64, 48\)"):
        net(x, temb, context, net.embed(mx.zeros((1, 64, 56, 3))))
    for shape in ((1, 64, 48, 1), (64, 48, 3)):
        with pytest.raises(ValueError, match=r"\[B, H, W, 3\]"):
            net.embed(mx.zeros(shape))


PUBLISHED = {
    "sd15": of_unet(REAL_UNETS["sd15"]),  # lllyasviel/control_v11p_sd15_*
    "sd21": of_unet(REAL_UNETS["sd21"]),  # thibaud/controlnet-sd21-*-diffusers
    "sdxl": of_unet(REAL_UNETS["sdxl-base"]),  # diffusers/controlnet-*-sdxl-1.0, xinsir/controlnet-*-sdxl-1.0
    # Its layers follow from the size of its file: 320 MB in half precision.
    "sdxl-small": of_unet(
        REAL_UNETS["sdxl-base"], transformer_layers_per_block=[0, 0, 0], down_block_types=["DownBlock2D"] * 3
    ),
}
COUNTS = {"sd15": 361_279_120, "sd21": 364_228_240, "sdxl": 1_251_014_160, "sdxl-small": 160_111_120}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_ones_have_their_names_and_shapes_and_fit_one_family(name):
    assert check("controlnet", PUBLISHED[name], oracle_shapes(lambda: Oracle(**PUBLISHED[name]))) == COUNTS[name]
    config = ControlNetConfig.from_dict(PUBLISHED[name])
    assert config.scale == 8
    family = {"sd15": {"sd15", "sd15-inpainting", "lcm-dreamshaper-v7"}, "sd21": {"sd21"}}
    for model, raw in REAL_UNETS.items():
        unet = UNetConfig.from_dict(raw)
        if model in family.get(name, {"sdxl-base", "ssd-1b"}):
            config.check_fits(unet)
        else:
            with pytest.raises(ValueError, match="does not fit the model: it is for"):
                config.check_fits(unet)

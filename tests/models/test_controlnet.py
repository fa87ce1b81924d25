"""ControlNets of every family against diffusers, and the UNet that hears them."""

import json
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel as Oracle
from diffusers import UNet2DConditionModel as OracleUNet

from configs import REAL_UNETS, UNETS
from oracle import SCALES, nchw, nhwc, normal, perturb, relative_error, twin
from stable_diffusion.models.config import UNetConfig
from stable_diffusion.models.controlnet import ControlNetConfig, ControlNetModel, scaled
from stable_diffusion.models.unet import UNet2DConditionModel
from test_full_size import check, oracle_shapes

# What a ControlNet's config does not say is all about the UNet's second half.
_ABSENT = ("sample_size", "out_channels", "up_block_types")


def of_unet(name: str, **changes) -> dict:
    """The config of a ControlNet for a small UNet, whose control images are 8 times as large as latents."""
    shared = {key: value for key, value in UNETS[name].items() if key not in _ABSENT}
    return shared | {"conditioning_embedding_out_channels": [4, 8, 12, 16]} | changes


CONTROLNETS = {
    "sd1": of_unet("sd1"),
    "sd2": of_unet("sd2"),
    "sd2-v": of_unet("sd2-v"),
    "xl": of_unet("xl"),
    "xl-mid": of_unet("xl", transformer_layers_per_block=[0, 0, 1]),
    "xl-small": of_unet("xl", transformer_layers_per_block=[0, 0, 0], down_block_types=["DownBlock2D"] * 3),
    "bgr": of_unet("sd1", controlnet_conditioning_channel_order="bgr"),
    "shuffle": of_unet("sd1", global_pool_conditions=True),
    "plain middle": of_unet("sd1", mid_block_type="UNetMidBlock2D"),
    "other images": of_unet("sd1", conditioning_channels=5, conditioning_embedding_out_channels=[6, 10]),
    "heads and waves": of_unet("sd1", num_attention_heads=[2, 4, 8], flip_sin_to_cos=False, freq_shift=1),
}


@cache
def pair(name: str) -> tuple[ControlNetModel, Oracle]:
    torch.manual_seed(0)
    oracle = perturb(Oracle(**CONTROLNETS[name]))
    for parameter in oracle.controlnet_cond_embedding.parameters():
        parameter.mul_(3)  # or the control image would hardly count: its last convolution starts at zero
    return twin(ControlNetModel(ControlNetConfig.from_dict(CONTROLNETS[name])), oracle), oracle


def inputs(config: dict, batch: int, height: int, width: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """NumPy inputs of one call; the conditioning is at scale 1, as encoders produce it."""
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    size = (batch, factor * height, factor * width, config.get("conditioning_channels", 3))
    given = {
        "x": normal(batch, height, width, 4, seed=1, scale=scale),
        "context": normal(batch, 5, config["cross_attention_dim"], seed=2),
        "image": np.random.default_rng(5).uniform(0, scale, size).astype(np.float32),
    }
    if "addition_embed_type" in config:
        given |= {"text_embeds": normal(batch, 32, seed=3), "time_ids": 500 * abs(normal(batch, 6, seed=4))}
    return given


def run_oracle(
    oracle: Oracle, given: dict, t: list[float], scale: float = 1.0, guess: bool = False
) -> list[np.ndarray]:
    added = {key: torch.from_numpy(given[key]) for key in ("text_embeds", "time_ids") if key in given}
    down, middle = oracle(
        nchw(given["x"]),
        torch.tensor(t),
        torch.from_numpy(given["context"]),
        nchw(given["image"]),
        conditioning_scale=scale,
        guess_mode=guess,
        added_cond_kwargs=added or None,
        return_dict=False,
    )
    return [nhwc(r) for r in (*down, middle)]


def run_ours(net: ControlNetModel, given: dict, t: list[float]) -> tuple[list[mx.array], mx.array]:
    a = {key: mx.array(value) for key, value in given.items()}
    text_time = (a["text_embeds"], a["time_ids"]) if "time_ids" in a else None
    return net(a["x"], net.embed_time(mx.array(t), a["x"].dtype, text_time), a["context"], net.embed(a["image"]))


def worst(ours: tuple[list[mx.array], mx.array], theirs: list[np.ndarray]) -> float:
    return max(relative_error(a, b) for a, b in zip((*ours[0], ours[1]), theirs, strict=True))


@pytest.mark.parametrize("name", CONTROLNETS)
def test_equals_diffusers(name):
    ours, oracle = pair(name)
    for i, scale in enumerate(SCALES):
        given = inputs(CONTROLNETS[name], i + 1, 6, 10, scale)
        t = [999.0, 500.0, 1.0][: i + 1]
        assert worst(run_ours(ours, given, t), run_oracle(oracle, given, t)) <= 1e-4


@pytest.mark.parametrize("name", ["sd1", "bgr", "other images"])
def test_embedded_control_images_equal_diffusers(name):
    ours, oracle = pair(name)
    for i, scale in enumerate(SCALES):
        image = inputs(CONTROLNETS[name], i + 1, 3, 5, scale)["image"]
        theirs = oracle.controlnet_cond_embedding(nchw(image[..., ::-1] if name == "bgr" else image))
        assert relative_error(ours.embed(mx.array(image)), nhwc(theirs)) <= 1e-5


def test_the_control_image_counts():
    """Also that the order of its colours does: which the comparisons above could not see otherwise."""
    net, _ = pair("sd1")
    given = inputs(CONTROLNETS["sd1"], 1, 8, 6)
    before = [np.array(r) for r in flat(run_ours(net, given, [9.0]))]
    assert worst(run_ours(net, given | {"image": given["image"][..., ::-1].copy()}, [9.0]), before) > 1e-2


@pytest.mark.parametrize("size", [(7, 9), (5, 8), (10, 13)])
def test_odd_sizes(size):
    ours, oracle = pair("sd1")
    given = inputs(CONTROLNETS["sd1"], 1, *size)
    assert worst(run_ours(ours, given, [37.0]), run_oracle(oracle, given, [37.0])) <= 1e-4


@pytest.mark.parametrize("name", ["sd1", "shuffle"])
@pytest.mark.parametrize("scale", [1.0, 0.35])
@pytest.mark.parametrize("guess", [False, True])
def test_scales_and_guess_mode_equal_diffusers(name, scale, guess):
    ours, oracle = pair(name)
    given = inputs(CONTROLNETS[name], 2, 8, 6)
    t = [801.0, 20.0]
    assert worst(scaled(run_ours(ours, given, t), scale, guess), run_oracle(oracle, given, t, scale, guess)) <= 1e-4


def test_one_control_image_serves_a_batch():
    net, _ = pair("sd1")
    given = inputs(CONTROLNETS["sd1"], 2, 8, 6)
    one = given | {"image": given["image"][:1]}
    both = given | {"image": np.concatenate([one["image"]] * 2)}
    assert worst(run_ours(net, one, [9.0, 5.0]), [np.array(r) for r in flat(run_ours(net, both, [9.0, 5.0]))]) <= 1e-5


def flat(residuals: tuple[list[mx.array], mx.array]) -> list[mx.array]:
    return [*residuals[0], residuals[1]]


@pytest.mark.parametrize("name", ["sd1", "xl-small"])
def test_half_precision_stays_half_and_close(name):
    ours, oracle = pair.__wrapped__(name)  # not the one that other tests use
    ours.set_dtype(mx.float16)
    given = inputs(CONTROLNETS[name], 2, 8, 8)
    half = {key: value.astype("float16") for key, value in given.items()} | {"image": given["image"]}
    residuals = run_ours(ours, half, [999.0, 3.0])
    assert {r.dtype for r in flat(residuals)} == {mx.float16}
    as_float = [r.astype(mx.float32) for r in residuals[0]], residuals[1].astype(mx.float32)
    assert worst(as_float, run_oracle(oracle, given, [999.0, 3.0])) <= 2e-2


# ---- the UNet that hears it


@cache
def unets(name: str) -> tuple[UNet2DConditionModel, OracleUNet]:
    torch.manual_seed(1)
    oracle = perturb(OracleUNet(**UNETS[name]), seed=1)
    return twin(UNet2DConditionModel(UNetConfig.from_dict(UNETS[name])), oracle), oracle


@pytest.mark.parametrize(
    "name, batch, rows", [("sd1", 1, 1), ("sd1", 3, 3), ("inpaint", 2, 1), ("no-mid", 3, 3), ("xl", 2, 1)]
)
def test_unet_with_residuals_equals_diffusers(name, batch, rows):
    """One row of residuals may serve several images; diffusers adds them in the same way."""
    unet, oracle = unets(name)
    height, width = 5, 8
    shapes = residual_shapes(unet.config, height, width)
    down = [normal(rows, *shape, seed=i, scale=0.5) for i, shape in enumerate(shapes)]
    middle = normal(rows, *shapes[-1], seed=99, scale=0.5)
    x = normal(batch, height, width, UNETS[name].get("in_channels", 4), seed=1)
    context = normal(batch, 5, UNETS[name]["cross_attention_dim"], seed=2)
    t = [700.0, 30.0, 1.0][:batch]
    added = {"text_embeds": normal(batch, 32, seed=3), "time_ids": 500 * abs(normal(batch, 6, seed=4))}
    theirs = oracle(
        nchw(x),
        torch.tensor(t),
        torch.from_numpy(context),
        down_block_additional_residuals=tuple(map(nchw, down)),
        mid_block_additional_residual=nchw(middle),
        added_cond_kwargs={key: torch.from_numpy(value) for key, value in added.items()},
    )

    def ours(residuals):
        temb = unet.embed_time(mx.array(t), mx.float32, tuple(map(mx.array, added.values())))
        return unet(mx.array(x), temb, mx.array(context), residuals=residuals)

    residuals = [mx.array(r) for r in down], mx.array(middle)
    assert relative_error(ours(residuals), nhwc(theirs.sample)) <= 1e-4
    assert mx.array_equal(ours(scaled(residuals, 0.0)), ours(None))


def residual_shapes(config: UNetConfig, height: int, width: int) -> list[tuple[int, int, int]]:
    """The (h, w, C) of each map; a block's last one is of half the size, rounded up."""
    shapes = [(height, width, config.block_out_channels[0])]
    for i, channels in enumerate(config.block_out_channels):
        shapes += [(height, width, channels)] * config.layers_per_block[i]
        if i < len(config.block_out_channels) - 1:
            height, width = -(-height // 2), -(-width // 2)
            shapes.append((height, width, channels))
    return shapes


def test_pooled_residuals_reach_every_position():
    """ControlNet and UNet in a row, both sides: the residuals of "shuffle" have one pixel."""
    net, oracle = pair("shuffle")
    unet, oracle_unet = unets("sd1")
    given = inputs(CONTROLNETS["shuffle"], 2, 8, 6)
    t = [801.0, 20.0]
    *down, middle = run_oracle(oracle, given, t)
    assert {r.shape[1:3] for r in down} == {(1, 1)}
    theirs = oracle_unet(
        nchw(given["x"]),
        torch.tensor(t),
        torch.from_numpy(given["context"]),
        down_block_additional_residuals=tuple(map(nchw, down)),
        mid_block_additional_residual=nchw(middle),
    )
    residuals = scaled(run_ours(net, given, t), 1.0)
    temb = unet.embed_time(mx.array(t), mx.float32)
    ours = unet(mx.array(given["x"]), temb, mx.array(given["context"]), residuals=residuals)
    assert relative_error(ours, nhwc(theirs.sample)) <= 1e-4


# ---- what does not fit


def test_a_control_image_of_another_size_or_depth_is_refused():
    net, _ = pair("sd1")
    x, temb, context = mx.zeros((1, 8, 6, 4)), net.embed_time(1.0, mx.float32), mx.zeros((1, 5, 32))
    with pytest.raises(ValueError, match=r"control image's size is \(64, 56\), the output's \(64, 48\)"):
        net(x, temb, context, net.embed(mx.zeros((1, 64, 56, 3))))
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\]"):
        net.embed(mx.zeros((1, 64, 48, 1)))
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\]"):
        net.embed(mx.zeros((64, 48, 3)))


def test_residuals_of_another_unet_are_refused():
    unet, _ = unets("sd1")
    residuals = [mx.zeros((1, 1, 1, 1))] * 5, mx.zeros((1, 1, 1, 1))
    with pytest.raises(ValueError, match="5 residuals for a UNet of 9 maps"):
        unet(mx.zeros((1, 8, 8, 4)), unet.embed_time(1.0, mx.float32), mx.zeros((1, 5, 32)), residuals=residuals)


def test_xl_without_sizes_is_refused():
    net, _ = pair("xl")
    with pytest.raises(ValueError, match="text_time"):
        net.embed_time(1.0, mx.float32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "ControlNetUnionModel", "num_control_type": 6}, "this is a ControlNetUnionModel"),
        ({"_class_name": "ControlNetModel", "num_control_type": 8}, "several kinds of images"),
        ({"_class_name": "T2IAdapter"}, "this is a T2IAdapter"),
        ({"_class_name": "UNet2DConditionModel"}, "this is a UNet2DConditionModel"),
        ({"controlnet_conditioning_channel_order": "gbr"}, "controlnet_conditioning_channel_order='gbr'"),
        ({"class_embed_type": "projection"}, "class_embed_type='projection'"),
        ({"num_class_embeds": 7}, "num_class_embeds=7"),
        ({"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim=32"),
        ({"addition_embed_type": "text"}, "addition_embed_type='text'"),
        ({"only_cross_attention": True}, "only_cross_attention=True"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift='scale_shift'"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor=2"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"mid_block_type": None}, "mid_block_type=None"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types='AttnDownBlock2D'"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "2 entries for 3 blocks"),
        ({"cross_attention_dim": None}, "missing cross_attention_dim"),
        ({"controlnet_conditioning_embedding": "UniControlNetTaskMOEEmbedding"}, "controlnet_conditioning_embedding="),
    ],
)
def test_configs_that_cannot_be_computed_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match="controlnet config") as error:
        ControlNetConfig.from_dict(CONTROLNETS["sd1"] | changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_keys_without_effect_are_let_through():
    """What diffusers writes beside the config: values that are off, and how the weights were averaged in training."""
    beside = (
        '{"_diffusers_version": "0.20.0", "_name_or_path": "x", "dropout": 0.0, "sample_size": 32, "decay": 0.9999}'
    )
    off = {"class_embed_type": None, "encoder_hid_dim": None, "num_attention_heads": None, "upcast_attention": None}
    defaults = {"conditioning_embedding_out_channels": None, "controlnet_conditioning_channel_order": None}
    config = ControlNetConfig.from_dict(CONTROLNETS["sd1"] | json.loads(beside) | off | defaults)
    assert config.conditioning_embedding_out_channels == (16, 32, 96, 256)
    assert config.scale == 8 and not config.upcast_attention
    assert ControlNetConfig.from_dict(REAL["sd21"]).upcast_attention  # SD 2.1 overflows float16 without it


# ---- the published ones

_REAL_SD15 = {
    "_class_name": "ControlNetModel",
    "_diffusers_version": "0.16.0.dev0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "class_embed_type": None,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "upcast_attention": False,
    "use_linear_projection": False,
}
_REAL_SDXL = _REAL_SD15 | {
    "_diffusers_version": "0.20.0.dev0",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "conditioning_channels": 3,
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "global_pool_conditions": False,
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "upcast_attention": None,
    "use_linear_projection": True,
}
REAL = {
    "sd15": _REAL_SD15,  # lllyasviel/control_v11p_sd15_*
    "sd21": _REAL_SD15  # thibaud/controlnet-sd21-*-diffusers
    | {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "sdxl": _REAL_SDXL,  # diffusers/controlnet-*-sdxl-1.0, xinsir/controlnet-*-sdxl-1.0
    # The layers of the next two follow from the sizes of their files: 545 MB and 320 MB in half precision.
    "sdxl-mid": _REAL_SDXL | {"transformer_layers_per_block": [0, 0, 1]},
    "sdxl-small": _REAL_SDXL | {"transformer_layers_per_block": [0, 0, 0], "down_block_types": ["DownBlock2D"] * 3},
}
COUNTS = {"sd15": 361_279_120, "sd21": 364_228_240, "sdxl": 1_251_014_160, "sdxl-mid": 272_586_000}
COUNTS |= {"sdxl-small": 160_111_120}


@pytest.mark.parametrize("name", REAL)
def test_names_and_shapes_of_the_published_ones(name):
    kept = {key: value for key, value in REAL[name].items() if not key.startswith("_")}
    stored = oracle_shapes(lambda: Oracle(**kept))
    assert check("controlnet", REAL[name], stored) == COUNTS[name]


@pytest.mark.parametrize("name", REAL)
def test_each_fits_its_family_and_no_other(name):
    config = ControlNetConfig.from_dict(REAL[name])
    family = {
        "sd15": {"sd15", "sd15-inpainting", "lcm-dreamshaper-v7"},
        "sd21": {"sd21"},
    }.get(name, {"sdxl-base", "ssd-1b"})
    for model, raw in REAL_UNETS.items():
        unet = UNetConfig.from_dict(raw)
        if model in family:
            config.check_fits(unet)
        else:
            with pytest.raises(ValueError, match="does not fit the model: it is for"):
                config.check_fits(unet)

"""Union ControlNets against diffusers: one network for several kinds of images, alone, together and in a run."""

from functools import cache

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import ControlNetUnionModel as Oracle

from checkpoints import both
from configs import REAL_UNETS
from models.test_controlnet import of_unet, small, worst
from models.test_unet import inputs
from oracle import SCALES, last, nchw, normal, perturb, relative_error, twin
from stable_diffusion import Control, StableDiffusionXL
from stable_diffusion.models.controlnet import ControlNetConfig, ControlNetModel, scaled_residuals
from stable_diffusion.weights.formats.single_file import read_config
from stable_diffusion.weights.load import build
from test_full_size import check, oracle_shapes
from test_parity_images import EULER, picture, reference, shown

PROMPT = "the red cat on the blue"


def union(**changes) -> dict:
    config = small("xl", conditioning_embedding_out_channels=[4, 8, 12, 16], **changes)
    width = config["block_out_channels"][0]
    return config | {"num_trans_channel": width, "num_proj_channel": width, "num_trans_head": 2}


@cache
def unions(count: int = 8, seed: int = 0, **changes) -> tuple[ControlNetModel, Oracle]:
    """A random network with ``count`` kinds, so loud that it matters what it is shown, and diffusers'."""
    torch.manual_seed(seed)
    oracle = perturb(Oracle(**union(num_control_type=count, **changes)), seed)
    for name, parameter in oracle.named_parameters():
        if name.startswith(("controlnet_cond_embedding", "spatial_ch_projs")):
            parameter.data.normal_(std=0.2)
    # The published config says ControlNetModel.
    config = dict(oracle.config) | {"_class_name": "ControlNetModel"}
    return twin(build("controlnet", config), oracle), oracle


CASES = {
    "one": ([3], [0.6], False),
    "two": ([1, 7], [0.5, 1.5], False),
    "guess": ([2], [0.6], True),
    "three in guess mode": ([0, 5, 6], [0.5, 0.0, 2.0], True),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(case):
    kinds, scales, guess = CASES[case]
    ours, oracle = unions(num_trans_layer=2)
    for i, (size, scale) in enumerate(zip([(6, 10), (7, 9), (5, 8)], SCALES, strict=True)):
        given, t, rows = inputs("xl", i + 1, *size, scale), [999.0, 500.0, 1.0][: i + 1], i + 1
        images = [np.abs(normal(1, 8 * size[0], 8 * size[1], 3, seed=k, scale=scale)) for k in kinds]
        flags = torch.zeros(rows, 8)
        flags[:, kinds] = 1
        theirs = oracle(
            nchw(given["x"]),
            torch.tensor(t),
            torch.from_numpy(given["context"]),
            [nchw(np.repeat(image, rows, axis=0)) for image in images],
            control_type=flags,
            control_type_idx=kinds,
            conditioning_scale=list(scales),
            added_cond_kwargs={key: torch.from_numpy(given[key]) for key in ("text_embeds", "time_ids")},
            guess_mode=guess,
            return_dict=False,
        )
        a = {key: mx.array(value) for key, value in given.items()}
        several = len(kinds) > 1
        embedded = ours.fuse([ours.embed(mx.array(im)) for im in images], kinds, scales if several else [1.0])
        text_time, added = (a["text_embeds"], a["time_ids"]), ours.embed_types(kinds, mx.float32)
        temb = ours.embed_time(mx.array(t), mx.float32, text_time, added=added)
        residuals = ours(a["x"], temb, a["context"], embedded)
        assert worst(scaled_residuals(residuals, 1.0 if several else scales[0], guess), theirs) <= 1e-4


# Settings of the controls, and the networks that see them: one for both, or one for each.
RUNS = {
    "two": ([{"kind": "depth", "scale": 0.5}, {"kind": "repaint", "scale": 1.2, "start": 0.3}], [0, 0]),
    "two networks": ([{"kind": 1, "scale": 0.5, "end": 0.6}, {"kind": 4, "scale": 0.7}], [0, 1]),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_equals_diffusers(tmp_path, case):
    choices, nets = RUNS[case]
    names = {"canny": 3, "depth": 1, "repaint": 7}
    numbers = [names.get(choice["kind"]) or int(choice["kind"]) for choice in choices]
    networks = [unions(seed=seed) for seed in range(2)]
    images = [picture(20 + i) for i in range(len(choices))]
    oracles = [networks[i][1] for i in dict.fromkeys(nets)]
    pipeline, together = diffusers.StableDiffusionXLControlNetUnionPipeline, len(oracles) == 1
    pipe = reference(tmp_path, "xl", EULER, pipeline, controlnet=oracles[0] if together else oracles)
    given = {"control_image": images, "control_mode": numbers}
    for theirs, ours, value in (
        ("controlnet_conditioning_scale", "scale", 1.0),
        ("control_guidance_start", "start", 0.0),
        ("control_guidance_end", "end", 1.0),
    ):
        given[theirs] = [choice.get(ours, value) for choice in choices]
    controls = [
        Control(networks[i][0], shown(image), **choice) for i, image, choice in zip(nets, images, choices, strict=True)
    ]
    both(pipe, StableDiffusionXL(tmp_path), steps=3, controls=controls, theirs=given)


def test_scales_of_0_add_nothing_and_one_network_is_run_once(xl_folder, monkeypatch):
    network, _ = unions()
    sd, image = StableDiffusionXL(xl_folder), mx.array(np.abs(normal(32, 48, 3)).clip(0, 1))

    def draw(*choices) -> np.ndarray:
        controls = [Control(network, image, **choice) for choice in choices]
        return last(sd.generate_latents(PROMPT, num_steps=2, latent_size=(4, 6), seed=1, controls=controls))

    plain, one = draw(), draw({"kind": "depth"})
    assert np.array_equal(draw({"kind": "depth", "scale": 0.0}), plain)
    assert np.array_equal(draw({"kind": "depth"}, {"kind": "tile", "scale": 0.0}), one)
    assert np.array_equal(draw({"kind": "depth", "end": 0.4}), plain)
    calls, run = [], ControlNetModel.__call__
    monkeypatch.setattr(ControlNetModel, "__call__", lambda *given: calls.append(1) or run(*given))
    both_kinds = draw({"kind": "depth"}, {"kind": "tile"})
    assert len(calls) == 2
    for other in (plain, one, draw({"kind": "depth"}, {"kind": "canny"})):
        assert relative_error(both_kinds, other) > 1e-3
    with pytest.raises(ValueError, match="share guess mode"):
        draw({"kind": "depth"}, {"kind": "tile", "guess": True})


REFUSED = {
    "needs a control type: openpose, depth, softedge, canny, normal, segment or a number, not None$": (6, None),
    "not tile; that one needs the promax variant$": (6, "tile"),
    "or a number, not 6$": (6, 6),
    "tile, repaint or a number, not pose$": (8, "pose"),
    "repaint, 8 or a number, not 9$": (9, "9"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_unknown_kinds_are_refused(message):
    count, kind = REFUSED[message]
    network = build("controlnet", union(num_control_type=count))
    with pytest.raises(ValueError, match=message):
        Control(network, mx.zeros((64, 96, 3)), kind=kind)


def test_a_kind_is_of_no_use_to_another_network():
    with pytest.raises(ValueError, match="control type 'depth' has no effect"):
        Control(build("controlnet", small("xl")), mx.zeros((64, 96, 3)), kind="depth")


@pytest.mark.parametrize("kinds, count", [(6, 1_255_958_800), (8, 1_256_614_800)])
def test_published_ones_have_their_names_and_shapes_and_are_known_as_files(kinds, count):
    """The config of xinsir/controlnet-union-sdxl-1.0, and of its promax variant."""
    config = {key: value for key, value in of_unet(REAL_UNETS["sdxl-base"]).items() if key != "mid_block_type"}
    config |= {"num_control_type": kinds, "conditioning_embedding_out_channels": [16, 32, 96, 256]}
    stored = oracle_shapes(lambda: Oracle(**config))
    assert check("controlnet", config | {"_class_name": "ControlNetModel"}, stored) == count
    assert stored["transformer_layes.0.attn.in_proj_weight"] == (960, 320)
    read = read_config("controlnet", {name: mx.zeros(shape) for name, shape in stored.items()}, "", "promax")
    assert ControlNetConfig.from_dict(read) == ControlNetConfig.from_dict(config)

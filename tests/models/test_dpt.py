"""The depth estimator against transformers, and the depth channel against diffusers."""

import copy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from PIL import Image
from torch.nn import functional as F
from transformers import DPTConfig as OracleConfig
from transformers import DPTForDepthEstimation as Oracle
from transformers import DPTImageProcessorPil

from oracle import SCALES, nchw, nhwc, normal, perturb, relative_error, twin
from stable_diffusion.diffusion.sample import depth_latents
from stable_diffusion.images.depth import estimate_depth, read_depth
from stable_diffusion.models.dpt import DPTConfig, DPTForDepthEstimation
from stable_diffusion.models.resample import resample
from stable_diffusion.weights.files import open_part
from stable_diffusion.weights.load import build, load_component
from test_full_size import check, oracle_shapes

_BACKBONE = {"model_type": "bit", "layer_type": "bottleneck", "global_padding": "SAME"}
_BACKBONE |= {"embedding_dynamic_padding": True, "out_features": ["stage1", "stage2", "stage3"]}
_SMALL = {"depths": [2, 1, 2], "hidden_sizes": [32, 64, 96], "embedding_size": 16, "num_groups": 4}
TINY = {"is_hybrid": True, "image_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
TINY |= {"num_attention_heads": 4, "backbone_out_indices": [0, 1, 1, 3], "backbone_featmap_shape": [1, 96, 4, 4]}
TINY |= {"neck_hidden_sizes": [32, 64, 24, 40], "reassemble_factors": [1, 1, 1, 0.5], "fusion_hidden_size": 16}
TINY |= {"backbone_config": _BACKBONE | _SMALL}
CONFIGS = {
    "tiny": TINY,
    "large-picture": TINY | {"image_size": 96, "backbone_featmap_shape": [1, 96, 6, 6]},
    "first-layers": TINY | {"backbone_out_indices": [0, 0, 0, 2], "qkv_bias": False, "layer_norm_eps": 0.1},
}
# The published file, without what it says of text generation, labels and training.
_LARGE = {"depths": [3, 4, 9], "hidden_sizes": [256, 512, 1024, 2048], "output_stride": 32}
REAL = {"model_type": "dpt", "is_hybrid": True, "backbone_config": _BACKBONE | _LARGE, "readout_type": "project"}
REAL |= {"backbone_featmap_shape": [1, 1024, 24, 24], "neck_hidden_sizes": [256, 512, 768, 768]}
REAL |= {"neck_ignore_stages": [0, 1], "reassemble_factors": [1, 1, 1, 0.5]}


@cache
def oracle_of(name: str) -> Oracle:
    """A random estimator whose result depends on every part of it."""
    torch.manual_seed(0)
    oracle = Oracle(OracleConfig(**copy.deepcopy(CONFIGS[name])))
    for parameter in oracle.parameters():
        if parameter.ndim in (2, 4):
            torch.nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
        elif parameter.ndim == 3:  # the class token and the positions
            torch.nn.init.normal_(parameter)
    perturb(oracle)
    before = []  # the last ReLU, whose bias is chosen so that it lets about half of the map through
    hook = oracle.head.head[4].register_forward_hook(lambda *args: before.append(args[-1]))
    oracle(nchw(normal(1, *[oracle.config.image_size] * 2, 3)))
    hook.remove()
    oracle.head.head[4].bias -= before[0].mean()
    return oracle


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint's folder with an estimator in it."""
    path = tmp_path_factory.mktemp("checkpoint")
    oracle_of("tiny").save_pretrained(path / "depth_estimator")
    return path


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours with noise."""
    y, x = np.mgrid[:height, :width] / 20
    waves = np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(3 * x)], axis=-1)
    return Image.fromarray(np.uint8(np.clip(127 + 80 * waves + 20 * normal(height, width, 3), 0, 255)))


# --- the network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name):
    oracle = oracle_of(name)
    ours = twin(build("depth_estimator", oracle.config.to_dict()), oracle)
    side = oracle.config.image_size
    for i, scale in enumerate(SCALES):
        x = normal(i % 2 + 1, side, side, 3, seed=i, scale=scale)
        want = oracle(nchw(x)).predicted_depth
        assert 0.2 < float((want > 0).float().mean()) < 0.95
        assert relative_error(ours(mx.array(x)), want) <= 1e-4


def test_parameters_are_those_of_the_published_checkpoint():
    config = OracleConfig(**copy.deepcopy(REAL))
    count = check("depth_estimator", REAL, oracle_shapes(lambda: Oracle(config)))
    assert round(4 * count / 1e6) == 490  # megabytes, as the Hub shows them for depth_estimator/model.safetensors
    assert DPTConfig.from_dict(REAL) == DPTConfig.from_dict(config.to_dict())


def test_pixels_of_another_size_are_refused():
    for shape in ((1, 32, 64, 3), (1, 64, 64, 4), (64, 64, 3)):
        with pytest.raises(ValueError, match=r"takes pixels \[B, 64, 64, 3\], not .* resize them"):
            DPTForDepthEstimation(DPTConfig.from_dict(TINY))(mx.zeros(shape))


# --- resampling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("old, new", [((384, 50), (64, 96)), ((1, 31), (64, 61)), ((97, 7), (1, 8))])
def test_resampling_equals_torch(old, new, cubic, align_corners):
    x = normal(2, *old, 3)
    mode = "bicubic" if cubic else "bilinear"
    want = F.interpolate(nchw(x), size=new, mode=mode, align_corners=align_corners)
    assert relative_error(resample(mx.array(x), new, cubic=cubic, align_corners=align_corners), nhwc(want)) <= 1e-6


# --- from a picture to the UNet's channel ------------------------------------------------------------------------


def load_depth_estimator(source: Path, float16: bool = False) -> DPTForDepthEstimation:
    return load_component(open_part(source, "depth_estimator", float16=float16))


def test_estimating_equals_the_feature_extractor_and_transformers(folder):
    image = picture(40, 168)
    # With the settings of the published preprocessor_config.json.
    size = {"height": 64, "width": 64}
    processor = DPTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2, size=size)
    want = oracle_of("tiny")(processor(images=image, return_tensors="pt").pixel_values).predicted_depth[0]
    model = load_depth_estimator(folder)
    depth = estimate_depth(model, image)
    assert depth.dtype == mx.float32
    assert relative_error(depth, want) <= 1e-4
    pixels = np.asarray(image, np.float32) / 255 * 2 - 1
    for given in (pixels, mx.array(pixels), image.convert("RGBA")):
        assert np.array_equal(estimate_depth(model, given), depth)


def test_the_estimator_loads_from_its_own_folder_and_in_either_precision(folder, tmp_path):
    copied = copy.deepcopy(oracle_of("tiny")).half()
    copied.save_pretrained(tmp_path, variant="fp16")
    full, half = load_depth_estimator(folder), load_depth_estimator(tmp_path, float16=True)
    assert {v.dtype for _, v in tree_flatten(half.parameters())} == {mx.float32}
    image = picture(64, 64)
    assert 0 < relative_error(estimate_depth(half, image), estimate_depth(full, image)) <= 2e-2


@pytest.mark.parametrize("shape, size", [((384, 384), (512, 512)), ((5, 6), (512, 512)), ((1000, 640), (200, 72))])
def test_the_channel_equals_diffusers(shape, size):
    """By diffusers' own method, on the little of its pipeline that it needs."""
    depth = 300 * normal(*shape) + 1000
    prepare, pipe = diffusers.StableDiffusionDepth2ImgPipeline.prepare_depth_map, SimpleNamespace(vae_scale_factor=8)
    given = picture(*size), torch.from_numpy(depth)[None]
    want = nhwc(prepare(pipe, *given, 1, False, torch.float32, torch.device("cpu")))
    got = depth_latents(depth, (size[1] // 8, size[0] // 8))
    assert got.shape == want.shape
    assert (float(got.min()), float(got.max())) == (-1, 1)
    assert relative_error(got, want) <= 1e-5  # the map's mean, three times its spread, takes away a digit
    assert np.array_equal(depth_latents(mx.array(depth), got.shape[1:3]), got)


@pytest.mark.parametrize(
    "depth, message",
    [
        (np.zeros((4, 4, 3)), r"an array \[height, width\], not \[4, 4, 3\]"),
        (np.zeros((0, 4)), r"not \[0, 4\]"),
        (np.full((4, 4), 7.0), "one value everywhere"),
        (np.array([[0.0, np.nan], [np.inf, 1.0]]), "2 of 4 values of the depth map are not finite"),
    ],
)
def test_maps_that_say_nothing_are_refused(depth, message):
    with pytest.raises(ValueError, match=message):
        depth_latents(depth, (2, 2))


# --- maps in files -----------------------------------------------------------------------------------------------

_RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


@pytest.mark.parametrize("values", [_RAMP, _RAMP.astype(np.uint16) * 300, _RAMP.astype(np.float32) / 7], ids=str)
def test_grey_files_keep_all_their_bits(values, tmp_path):
    path = tmp_path / ("map.tiff" if values.dtype == np.float32 else "map.png")
    Image.fromarray(values).save(path)
    read = read_depth(path)
    assert read.dtype == np.float32 and np.array_equal(read, values)


def test_maps_are_read_upright_and_farthest_where_they_are_transparent(tmp_path):
    exif, visible = Image.Exif(), _RAMP > 100
    exif[0x0112] = 6  # a quarter turn
    image = Image.merge("LA", (Image.fromarray(_RAMP), Image.fromarray(np.uint8(visible * 255))))
    image.convert("RGBA").save(tmp_path / "map.png", exif=exif)
    assert np.array_equal(read_depth(tmp_path / "map.png"), np.rot90(np.where(visible, _RAMP, 0), -1))


def test_files_without_depth_are_refused_in_one_line(tmp_path):
    picture(8, 8).save(tmp_path / "colour.png")
    Image.new("I;16", (4, 4), 300).save(tmp_path / "flat.png")
    for name, message in {"colour.png": "a colour image", "flat.png": "is 300 everywhere"}.items():
        with pytest.raises(ValueError, match=rf"^[^\n]*{name}[^\n]*{message}[^\n]*$"):
            read_depth(tmp_path / name)

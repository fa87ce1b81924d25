"""Upscaler networks against torch modules of the published architectures, in all namings of their files."""

import re

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from oracle import perturb, relative_error
from stable_diffusion import load_upscaler
from stable_diffusion.models.upscalers import RRDBNet, RRDBNetConfig, SRVGGConfig, SRVGGNetCompact, tile_side, upscale
from stable_diffusion.weights.load import size_in_bytes


def conv(into: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, padding=1)


class Dense(nn.Module):
    def __init__(self, width: int, growth: int):
        super().__init__()
        for i in range(5):
            self.add_module(f"conv{i + 1}", conv(width + i * growth, growth if i < 4 else width))

    def forward(self, x):
        seen = [x]
        for layer in list(self.children())[:4]:
            seen.append(F.leaky_relu(layer(torch.cat(seen, 1)), 0.2))
        return x + self.conv5(torch.cat(seen, 1)) * 0.2


class Residual(nn.Module):
    def __init__(self, width: int, growth: int):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (Dense(width, growth) for _ in range(3))

    def forward(self, x):
        return x + self.rdb3(self.rdb2(self.rdb1(x))) * 0.2


class ESRGAN(nn.Module):
    """Real-ESRGAN's network: of x2 and x1 each position is a square of pixels."""

    def __init__(self, blocks: int = 2, ups: int = 2, unshuffle: int = 1, width: int = 12, growth: int = 6):
        super().__init__()
        self.unshuffle, self.ups = unshuffle, ups
        self.conv_first = conv(3 * unshuffle**2, width)
        self.body = nn.Sequential(*(Residual(width, growth) for _ in range(blocks)))
        self.conv_body = conv(width, width)
        for i in range(ups):
            self.add_module(f"conv_up{i + 1}", conv(width, width))
        self.conv_hr, self.conv_last = conv(width, width), conv(width, 3)

    def forward(self, x):
        x = self.conv_first(F.pixel_unshuffle(x, self.unshuffle))
        x = x + self.conv_body(self.body(x))
        for i in range(self.ups):
            x = F.leaky_relu(self.get_submodule(f"conv_up{i + 1}")(F.interpolate(x, scale_factor=2)), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))


class Compact(nn.Module):
    def __init__(self, convs: int = 3, scale: int = 4, width: int = 12):
        super().__init__()
        self.scale = scale
        inner = [layer for _ in range(convs) for layer in (conv(width, width), nn.PReLU(width))]
        self.body = nn.Sequential(conv(3, width), nn.PReLU(width), *inner, conv(width, 3 * scale**2))

    def forward(self, x):
        return F.pixel_shuffle(self.body(x), self.scale) + F.interpolate(x, scale_factor=self.scale)


SECOND = {"conv_body": "trunk_conv", "body.": "RRDB_trunk.", ".rdb": ".RDB", "conv_up": "upconv", "conv_hr": "HRconv"}


def second_names(name: str) -> str:
    for new, old in SECOND.items():
        name = name.replace(new, old)
    return name


def first_names(name: str) -> str:
    """Names in ESRGAN's first files with two blocks and two doublings."""
    ends = {"conv_first": "model.0", "conv_body": "model.1.sub.2", "conv_up1": "model.3", "conv_up2": "model.6"}
    ends |= {"conv_hr": "model.8", "conv_last": "model.10"}
    path, _, parameter = name.rpartition(".")
    name = f"{ends.get(path, path)}.{parameter}"
    return re.sub(r"^body\.(\d+)\.rdb(\d)\.conv(\d)\.", r"model.1.sub.\1.RDB\2.conv\3.0.", name)


FILES = {  # the network, how its file names a tensor, and how it is saved
    "x4plus.pth": (ESRGAN, lambda name: name, lambda weights: {"params_ema": weights, "params": {}}),
    "x2plus.safetensors": (lambda: ESRGAN(unshuffle=2), lambda name: name, None),
    "x1.pth": (lambda: ESRGAN(unshuffle=4), lambda name: name, lambda weights: {"params": weights}),
    "x8.pth": (lambda: ESRGAN(ups=3), second_names, lambda weights: weights),
    "esrgan.pth": (ESRGAN, second_names, lambda weights: {"state_dict": weights}),
    "first.pth": (ESRGAN, first_names, lambda weights: weights),
    "first.safetensors": (ESRGAN, first_names, None),
    "realesr-general-x4v3.pth": (Compact, lambda name: name, lambda weights: {"params": weights}),
    "x2.safetensors": (lambda: Compact(5, 2), lambda name: name, None),
}


def write(folder, name: str) -> nn.Module:
    make, rename, wrap = FILES[name]
    network = perturb(make(), seed=3).eval()
    weights = {rename(key): value for key, value in network.state_dict().items()}
    if wrap is None:
        save_file(weights, folder / name)
    else:
        torch.save(wrap(weights), folder / name)
    return network


@pytest.mark.parametrize("name", FILES)
def test_networks_are_those_of_torch(name, tmp_path):
    theirs, ours = write(tmp_path, name), load_upscaler(tmp_path / name)
    for scale, shape in ((1, (2, 8, 12, 3)), (1e-2, (1, 12, 8, 3)), (1e-3, (3, 4, 8, 3))):
        x = np.random.default_rng(1).random(shape, dtype=np.float32) * np.float32(scale)
        with torch.no_grad():
            wanted = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
        made = ours.network(mx.array(x))
        assert made.shape[1] == x.shape[1] * ours.scale
        assert relative_error(made, wanted) <= 1e-4


@pytest.mark.parametrize("name", ["x4plus.pth", "x2plus.safetensors", "realesr-general-x4v3.pth"])
def test_tiles_show_no_seams(name, tmp_path, monkeypatch):
    write(tmp_path, name)
    network = load_upscaler(tmp_path / name).network
    x = mx.array(np.random.default_rng(1).random((133, 170, 3), dtype=np.float32))
    whole = upscale(network, x)
    ran, call = [], type(network).__call__
    monkeypatch.setattr(type(network), "__call__", lambda self, x: ran.append(x.shape) or call(self, x))
    made = upscale(network, x, budget=0)
    assert len(ran) > 1 and tile_side(network, 0) == 128
    assert made.shape == whole.shape and (whole.max() - whole.min()).item() > 0.1
    assert mx.abs(made - whole).max().item() <= 1 / 255


def test_pictures_keep_their_alpha_and_arrays_their_kind(tmp_path):
    write(tmp_path, "realesr-general-x4v3.pth")
    network = load_upscaler(tmp_path / "realesr-general-x4v3.pth")
    picture = Image.effect_noise((10, 7), 60).convert("RGB")
    clear = picture.copy()
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    made, kept = network(picture), network(clear)
    assert made.size == kept.size == (40, 28) and made.mode == "RGB" and kept.mode == "RGBA"
    assert kept.convert("RGB").tobytes() == made.tobytes()
    levels = np.asarray(kept.getchannel("A")).astype(int)
    assert levels[:4].max() < 60 and levels[-4:].min() > 190
    pixels = network(np.asarray(picture, dtype=np.float32) / 255)
    assert np.abs(np.rint(np.array(pixels) * 255) - np.asarray(made)).max() <= 1
    picture.save(tmp_path / "a.png")
    assert network(tmp_path / "a.png").tobytes() == made.tobytes()
    half = load_upscaler(tmp_path / "realesr-general-x4v3.pth", dtype=mx.float16)(picture)
    assert np.abs(np.asarray(half).astype(int) - np.asarray(made)).max() <= 3
    with pytest.raises(ValueError, match=r"must be \[H, W, 3\]"):
        network(np.zeros((2, 3)))


OTHERS = {
    "SwinIR": "layers.0.residual_group.blocks.0.attn.relative_position_bias_table",
    "HAT": "layers.0.residual_group.overlap_attn.relative_position_bias_table",
    "DAT": "before_RG.1.weight",
    "SPAN": "block_1.c1_r.eval_conv.weight",
    "ESRGAN[+]": "body.0.rdb1.conv1x1.weight",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_refused_by_name(name, tmp_path):
    save_file(
        {OTHERS[name]: torch.zeros(1), "conv_first.weight": torch.zeros((8, 3, 3, 3))}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match=f"an upscaler of type {name}.*is not supported: use RRDB or SRVGG"):
        load_upscaler(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"conv_first.weight": (8, 1, 3, 3)}, "is incomplete: body.0.rdb1.conv1.weight is missing"),
        ({"body.0.weight": (8, 3, 3, 3), "body.2.weight": (48, 8, 3, 3)}, "without PReLU,"),
        (
            {"body.0.weight": (8, 1, 3, 3), "body.1.weight": (8,), "body.2.weight": (16, 8, 3, 3)},
            "only RGB upscalers",
        ),
        ({"body.0.weight": (8,)}, "without PReLU|has 1 axes"),
        ({"up_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "holds no upscaler, but unet"),
        ({"nothing": (1,)}, "holds no upscaler, but nothing"),
    ],
)
def test_what_is_none_is_refused(weights, message, tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in weights.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        load_upscaler(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("network", "tensors", "parameters"),
    [  # of RealESRGAN_x4plus, RealESRGAN_x2plus, RealESRGAN_x4plus_anime_6B, realesr-general-x4v3, animevideov3
        (RRDBNet(RRDBNetConfig()), 702, 16_697_987),
        (RRDBNet(RRDBNetConfig(unshuffle=2)), 702, 16_703_171),
        (RRDBNet(RRDBNetConfig(num_block=6)), 192, 4_467_779),
        (SRVGGNetCompact(SRVGGConfig()), 101, 1_213_296),
        (SRVGGNetCompact(SRVGGConfig(num_conv=16)), 53, 621_424),
    ],
)
def test_published_sizes(network, tensors, parameters):
    assert len(tree_flatten(network.parameters())) == tensors
    assert size_in_bytes(network) == 4 * parameters

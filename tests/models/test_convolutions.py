"""On a GPU a map is convolved by the same kernel whatever the batch; shapes alone decide, so no GPU is needed here."""

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import pytest
import torch

from configs import REAL_UNETS, REAL_VAE
from oracle import normal, relative_error
from stable_diffusion.lora.delta import LoRADelta
from stable_diffusion.lora.layers import LoRALayer
from stable_diffusion.models.layers import Conv2d, conv2d, rows_alike
from stable_diffusion.weights.load import build

_SHARED = ("block_out_channels", "cross_attention_dim", "down_block_types")
CONTROLNET = {key: REAL_UNETS["sd15"][key] for key in _SHARED}
CONTROLNET |= {"conditioning_embedding_out_channels": [16, 32, 96, 256]}


def metal_kernel(x: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> str:
    """The kernel that MLX 0.32 takes on Metal, by the rules of ``dispatch_conv_2D_gpu`` in backend/metal/conv.cpp."""
    b, h, w, c = x
    o, kh, kw, _ = weight
    out_h, out_w = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip((h, w), (kh, kw), stride, padding, strict=True))
    unit_stride = tuple(stride) == (1, 1)
    if unit_stride and kh == kw == 3 and c % 32 == 0 and o % 32 == 0 and c + o >= 256 and b * h * w >= 4096:
        return "winograd"
    fits_tiles = (c <= 4 or c % 16 == 0) and (o <= 16 or o % 16 == 0)
    is_large = b * out_h * out_w >= 256
    if unit_stride and is_large and not fits_tiles and (o <= 16 or o % 16 == 0) and kh * kw >= 9:
        return "padded channels"
    if fits_tiles:
        return "implicit"
    return "general" if (c % 16 == 0 and o % 16 == 0) or is_large else "explicit"


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Every convolution on a GPU: the shapes of input and weight, stride and padding."""
    recorded: list[tuple] = []
    convolve = mx.conv2d

    def watched(x, weight, stride=(1, 1), padding=(0, 0)):
        recorded.append((x.shape, weight.shape, tuple(stride), tuple(padding)))
        return convolve(x, weight, stride, padding)

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "conv2d", watched)
    return recorded


def unet(config: dict, size: int) -> Callable[[], object]:
    network, x = build("unet", config), mx.zeros((1, size // 8, size // 8, config["in_channels"]))
    temb = mx.zeros((1, 4 * config["block_out_channels"][0]))
    return lambda: network(x, temb, mx.zeros((1, 77, config["cross_attention_dim"])))


def vae(size: int) -> Callable[[], object]:
    network = build("vae", REAL_VAE)
    return lambda: (
        network.encode(mx.zeros((1, size, size, 3))),
        network.decode(mx.zeros((1, size // 8, size // 8, 4))),
    )


def controlnet(size: int) -> Callable[[], object]:
    network = build("controlnet", CONTROLNET)
    return lambda: network.embed(mx.zeros((1, size, size, 3)))


NETWORKS = {name: lambda size, name=name: unet(REAL_UNETS[name], size) for name in ("sd15", "sd21", "sdxl-base")}
NETWORKS |= {"sd15-inpainting": lambda size: unet(REAL_UNETS["sd15-inpainting"], size)}
NETWORKS |= {"vae": vae, "controlnet": controlnet}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernel_of_a_row_is_that_of_one_row(name, calls):
    """For every convolution of the published networks, lazily: nothing is computed."""
    split = 0
    for size in (96, 256, 512, 768, 1024):
        calls.clear()
        NETWORKS[name](size)()
        for (_, *shape), *rest in set(calls):
            alone = metal_kernel((1, *shape), *rest)
            for rows in range(1, 17):
                calls.clear()
                weight, stride, padding = rest
                y = conv2d(mx.zeros((rows, *shape)), mx.zeros(weight), stride, padding)
                parts = [metal_kernel(*call) for call in calls]
                assert set(parts) == {alone} and len(y) == sum(call[0][0] for call in calls) == rows
                if metal_kernel((rows, *shape), *rest) == alone:
                    assert len(parts) == 1
                split += len(parts) > 1
    assert split > 0


@pytest.mark.parametrize(
    "x, weight, rows",
    [
        ((1, 64, 64, 320), (320, 3, 3, 320), math.inf),  # 4096 positions
        ((1, 63, 65, 320), (320, 3, 3, 320), 1),  # 4095
        ((1, 32, 32, 640), (640, 3, 3, 640), 3),
        ((1, 16, 16, 1280), (1280, 3, 3, 1280), 15),
        ((1, 16, 16, 96), (128, 3, 3, 96), math.inf),  # 224 channels
        ((1, 16, 16, 128), (128, 3, 3, 128), 15),
        ((1, 16, 16, 1280), (1280, 1, 1, 1280), math.inf),
        ((1, 12, 12, 9), (320, 3, 3, 9), 1),
        ((1, 8, 8, 9), (320, 3, 3, 9), 3),
        ((1, 16, 16, 9), (320, 3, 3, 9), math.inf),
        ((1, 8, 8, 4), (320, 3, 3, 4), math.inf),
    ],
)
def test_rows_alike(x, weight, rows):
    assert rows_alike(x, weight, padding=(weight[1] // 2,) * 2) == rows


def test_a_strided_convolution_keeps_its_kernel():
    assert rows_alike((1, 32, 32, 640), (640, 3, 3, 640), (2, 2), (1, 1)) == math.inf
    assert rows_alike((1, 32, 32, 9), (320, 3, 3, 9), (2, 2), (1, 1)) == math.inf  # 256 positions of the output
    assert rows_alike((1, 30, 30, 9), (320, 3, 3, 9), (2, 2), (1, 1)) == 1


@pytest.mark.parametrize("rows, side, c, o", [(2, 32, 128, 128), (7, 32, 128, 128), (5, 8, 9, 16), (4, 64, 128, 128)])
def test_parts_are_the_whole(rows, side, c, o, monkeypatch):
    layer, x = Conv2d(c, o, 3, padding=1), mx.array(normal(rows, side, side, c))
    want = mx.conv2d(x, layer.weight, padding=1) + layer.bias
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert relative_error(layer(x), want) <= 1e-6


def test_a_lora_beside_a_convolution_goes_the_same_way(calls):
    """Its first factor is a convolution too."""
    layer = LoRALayer(Conv2d(320, 320, 3, padding=1))
    lora = type("LoRA", (), {"scale": 1.0})
    factors = {"down": mx.zeros((32, 320, 3, 3)), "up": mx.zeros((320, 32, 1, 1))}
    layer.loras.append(LoRADelta("unet", "conv", factors, 1.0, lora))
    layer(mx.zeros((4, 32, 32, 320)))
    assert [(call[0][0], call[1][0]) for call in calls] == [(3, 320), (1, 320), (3, 32), (1, 32)]


@pytest.mark.parametrize(
    "size, kernel, stride, padding",
    [
        ((7, 5), 3, (1, 1), (1, 1)),
        ((8, 7), 3, (2, 2), (1, 1)),
        ((8, 7), 3, (2, 2), (0, 0)),
        ((9, 8), 1, (2, 1), (0, 0)),
        ((8, 9), 4, (4, 4), (0, 0)),
        ((6, 6), 2, (3, 2), (2, 0)),
    ],
)
def test_gradients_equal_torchs(size, kernel, stride, padding):
    x, weight = normal(2, *size, 5, seed=1), normal(4, kernel, kernel, 5, seed=2)
    theirs = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, weight)]
    y = torch.nn.functional.conv2d(*(a.permute(0, 3, 1, 2) for a in theirs), stride=stride, padding=padding)
    change = normal(*y.permute(0, 2, 3, 1).shape, seed=3)
    (y.permute(0, 2, 3, 1) * torch.from_numpy(change)).sum().backward()
    inputs = [mx.array(x), mx.array(weight)]
    ours = mx.vjp(lambda x, weight: conv2d(x, weight, stride, padding), inputs, [mx.array(change)])[1]
    for gradient, array in zip(ours, theirs, strict=True):
        assert relative_error(gradient, array.grad.numpy()) <= 1e-6

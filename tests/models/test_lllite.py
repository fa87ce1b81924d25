"""ControlNet-LLLite against its formula in torch, with a hook before each layer that it changes."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from checkpoints import both
from configs import REAL_UNETS
from models.test_unet import inputs, run_oracle, run_ours, unets
from oracle import SCALES, last, nchw, nhwc, normal, relative_error
from stable_diffusion import Control, StableDiffusion, StableDiffusionXL
from stable_diffusion.lora.control import check_layers
from stable_diffusion.models import gpu
from stable_diffusion.weights.formats.original import to_diffusers
from stable_diffusion.weights.formats.single_file import read_config
from stable_diffusion.weights.load import build, fill
from test_parity_images import EULER, picture, reference, shown

PROMPT = "the red cat on the blue"
COND, MLP = 6, 5  # widths inside
# Layers of the small UNet: the block in files' names and in diffusers', the layer, how often the latents are halved.
ROWS = """
input_blocks_4_1 down_blocks.1.attentions.0 transformer_blocks.0.attn1.to_q 1
input_blocks_4_1 down_blocks.1.attentions.0 transformer_blocks.0.attn1.to_k 1
input_blocks_5_1 down_blocks.1.attentions.1 transformer_blocks.1.attn2.to_q 1
input_blocks_8_1 down_blocks.2.attentions.1 transformer_blocks.2.attn1.to_v 2
middle_block_1 mid_block.attentions.0 transformer_blocks.0.ff.net.0.proj 2
middle_block_1 mid_block.attentions.0 proj_in 2
output_blocks_4_1 up_blocks.1.attentions.1 transformer_blocks.0.attn1.to_out.0 1
"""
LAYERS = {
    f"{block}_{layer}".replace(".", "_"): (f"{place}.{layer}", int(halved))
    for block, place, layer, halved in map(str.split, ROWS.strip().splitlines())
}
KERNELS = {1: (4, 2), 2: (4, 4), 3: (4, 4, 2)}


def weights(seed: int = 0, depth: int = 0, width: int = 64) -> dict[str, torch.Tensor]:
    """A file for ``LAYERS``. The middle of the small UNet is less deep than XL's: its maps are quarters."""
    torch.manual_seed(seed)
    file = {}
    for name, (_, halved) in LAYERS.items():
        kernels = KERNELS[halved + 1 + depth]
        widths = [3, *[COND // 2] * (len(kernels) - 1), COND]
        for i, kernel in enumerate(kernels):
            file[f"{name}.conditioning1.{2 * i}"] = torch.nn.Conv2d(widths[i], widths[i + 1], kernel, kernel)
        file |= {f"{name}.down.0": torch.nn.Linear(width, MLP), f"{name}.up.0": torch.nn.Linear(MLP, width)}
        file[f"{name}.mid.0"] = torch.nn.Linear(COND + MLP, MLP)
    file = {f"lllite_unet_{name}.{key}": value.data for name, m in file.items() for key, value in m.named_parameters()}
    return {name: 2 * value for name, value in file.items()}


@contextmanager
def changed(unet: torch.nn.Module, file: dict[str, torch.Tensor], image: torch.Tensor, scale: float) -> Iterator[None]:
    """A UNet of diffusers whose layers get changed inputs; ``image`` is [1, 3, H, W] in [0, 1]."""

    def hook(name: str):
        def value(key: str) -> tuple[torch.Tensor, torch.Tensor]:
            return tuple(file[f"lllite_unet_{name}.{key}.{kind}"] for kind in ("weight", "bias"))

        embedded = 2 * image - 1
        for i in (0, 2, 4):
            if f"lllite_unet_{name}.conditioning1.{i}.weight" in file:
                weight, bias = value(f"conditioning1.{i}")
                embedded = torch.nn.functional.conv2d(
                    embedded.relu() if i else embedded, weight, bias, weight.shape[-1]
                )
        embedded = embedded.flatten(2).transpose(1, 2)

        def change(module, inputs):
            (x,) = inputs
            y = torch.nn.functional.linear(x, *value("down.0")).relu()
            y = torch.cat([embedded.expand(len(x), -1, -1), y], dim=2)
            y = torch.nn.functional.linear(y, *value("mid.0")).relu()
            return (x + scale * torch.nn.functional.linear(y, *value("up.0")),)

        return change

    hooks = [unet.get_submodule(path).register_forward_pre_hook(hook(name)) for name, (path, _) in LAYERS.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def network(file: dict[str, torch.Tensor]):
    """The network of a file, without a file."""
    tensors = {name: mx.array(value) for name, value in file.items()}
    own = {name.removeprefix("lllite_unet_"): value for name, value in tensors.items()}
    ours = build("controlnet", read_config("controlnet", tensors, "lllite_unet_", "file"))
    fill(ours, to_diffusers("controlnet", own))
    return ours


def test_equals_the_formula():
    """Several at once change the input of the same layer one after the other, the last one first.

    On a GPU the UNet goes on with joined products.
    """
    unet, oracle = unets("xl")
    gpu.join(unet)
    joined = [module._joined for module in unet.modules() if hasattr(module, "join")]
    counts = [len(one._entries) for one in joined]
    files = [weights(), weights(seed=1)]
    nets = [network(file) for file in files]
    for i, scale in enumerate(SCALES):
        given, t, size = inputs("xl", i + 1, 4, 8, scale), [999.0, 500.0, 1.0][: i + 1], (32, 64)
        image = np.abs(normal(1, *size, 3, seed=i, scale=scale))
        with changed(oracle, files[1], nchw(image), 1.3), changed(oracle, files[0], nchw(image), 0.7):
            theirs = run_oracle(oracle, given, t)
        changed_unet = unet
        for net, factor in zip(nets, (0.7, 1.3), strict=True):
            changed_unet = net.applied(changed_unet, net.embed(mx.array(image)), factor)
        ours = run_ours(changed_unet, given, t)
        assert relative_error(ours, nhwc(theirs)) <= 1e-4
        assert relative_error(run_ours(unet, given, t), ours) > 1e-3  # and the UNet is as before
    assert [len(one._entries) for one in joined] == counts and any(counts) == gpu.is_default()


def test_a_run_equals_diffusers(tmp_path):
    """From a file, at a scale, in one of two steps, beside another that acts always."""
    pipe = reference(tmp_path, "xl", EULER, diffusers.StableDiffusionXLPipeline)
    sd, files, images = StableDiffusionXL(tmp_path), [weights(), weights(seed=1)], [picture(20), picture(21)]
    controls = []
    for i, choice in enumerate([{"scale": 0.7, "end": 0.5}, {"scale": 1.3}]):
        save_file(files[i], tmp_path / f"{i}.safetensors")
        controls.append(Control(sd.load_controlnet(tmp_path / f"{i}.safetensors"), shown(images[i]), **choice))
    tensors, run, calls = [nchw(np.array(shown(image))[None]) for image in images], pipe.unet.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        with ExitStack() as stack:
            stack.enter_context(changed(pipe.unet, files[1], tensors[1], 1.3))
            if len(calls) == 1:
                stack.enter_context(changed(pipe.unet, files[0], tensors[0], 0.7))
            return run(*args, **kwargs)

    pipe.unet.forward = forward
    both(pipe, sd, steps=2, controls=controls)


def test_beside_others(tmp_path, xl_folder):
    """With quantized weights, a LoRA and one row at once; a scale of 0 adds nothing, and the UNet stays as it was."""
    save_file(weights(), tmp_path / "lllite.safetensors")
    sd, image = StableDiffusionXL(xl_folder, unet_bits=8), mx.array(np.abs(normal(40, 72, 3)).clip(0, 1))
    network = sd.load_controlnet(tmp_path / "lllite.safetensors")

    def draw(*controls: Control, **options) -> np.ndarray:
        return last(sd.generate_latents(PROMPT, num_steps=2, latent_size=(5, 9), seed=1, controls=controls, **options))

    plain, changed = draw(), draw(Control(network, image))
    assert relative_error(changed, plain) > 1e-3
    assert np.array_equal(draw(Control(network, image, scale=0.0)), plain)
    assert np.array_equal(draw(), plain) and not sd.sources["unet"].is_edited(sd.unet)
    assert relative_error(draw(Control(network, image, 0.5)), changed) > 1e-4
    sd.low_memory, sd.rows_at_once = True, 1
    assert relative_error(draw(Control(network, image)), changed) <= 1e-4
    with pytest.raises(ValueError, match="token_merging cannot be combined with ControlNet-LLLite"):
        draw(Control(network, image), token_merging=0.5)
    with pytest.raises(ValueError, match="a ControlNet-LLLite has no guess mode"):
        Control(network, image, guess=True)
    with pytest.raises(ValueError, match="control type 'depth' has no effect"):
        Control(network, image, kind="depth")
    with pytest.raises(ValueError, match=r"control images \[1, H, W, 3\], not \(1, 64, 96, 1\)"):
        network.embed(mx.zeros((1, 64, 96, 1)))


def _of_context(file: dict) -> dict:
    return {name.replace("attn2_to_q", "attn2_to_k"): value for name, value in file.items()}


def _of_convolutions(file: dict) -> dict:
    return {name: value[..., None, None] if "down.0.weight" in name else value for name, value in file.items()}


def _without_a_bias(file: dict) -> dict:
    return {name: value for name, value in file.items() if not name.endswith("attn1_to_q.up.0.bias")}


def _cut(file: dict) -> dict:
    return {n: value[:2] if "blocks_5_1" in n and "mid.0.weight" in n else value for n, value in file.items()}


REFUSED = {
    "the ControlNet-LLLite does not fit the model: it changes .*attn2_to_q and 1 more, which": ("sd1", dict),
    "changes down_blocks_1_attentions_1_transformer_blocks_1_attn2_to_k, which": ("xl", _of_context),
    "it changes convolutions, such as .*, which is not supported": ("xl", _of_convolutions),
    r"1 missing: .*attn1_to_q\.up\.0\.bias": ("xl", _without_a_bias),
    r"1 of the wrong shape: .*mid\.0\.weight \(2, 11\) instead of \(5, 11\)": ("xl", _cut),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, sd1_folder, xl_folder, message):
    family, change = REFUSED[message]
    save_file({name: value.contiguous() for name, value in change(weights()).items()}, tmp_path / "lllite.safetensors")
    with pytest.raises(ValueError, match=message):
        StableDiffusion(sd1_folder if family == "sd1" else xl_folder).load_controlnet(tmp_path / "lllite.safetensors")


def test_published_ones_have_the_layers_of_xl():
    """kohya-ss/controlnet-lllite has 32 and 64 inside, for q, k, v of self- and q of cross-attention: 46 MB in half."""
    blocks = [("input_blocks_4", 640, 2), ("input_blocks_5", 640, 2)]
    blocks += [(block, 1280, 10) for block in ("input_blocks_7", "input_blocks_8", "middle_block")]
    parts, shapes = ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn2_to_q"), {}
    for block, width, count in blocks:
        convs = {"0": (16, 3, 4, 4), "2": (32, 16, 4, 4)}
        convs = convs if width == 640 else convs | {"2": (16, 16, 4, 4), "4": (32, 16, 2, 2)}
        layers = {f"conditioning1.{i}": shape for i, shape in convs.items()}
        layers |= {"down.0": (64, width), "mid.0": (64, 96), "up.0": (width, 64)}
        for name in (f"lllite_unet_{block}_1_transformer_blocks_{i}_{part}" for i in range(count) for part in parts):
            for layer, shape in layers.items():
                shapes |= {f"{name}.{layer}.weight": shape, f"{name}.{layer}.bias": shape[:1]}
    net = network({name: mx.zeros(shape) for name, shape in shapes.items()})
    assert len(net.config.layers) == 136 and set(net.config.depths) == {2, 3}
    assert sum(map(math.prod, shapes.values())) == 22_969_600
    check_layers(net, build("unet", REAL_UNETS["sdxl-base"]))
    with pytest.raises(ValueError, match=r"and \d+ more, which"):
        check_layers(net, build("unet", REAL_UNETS["sd15"]))

"""Control-LoRAs: a ControlNet of the model's own UNet and low-rank changes, against diffusers."""

from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file

from configs import REAL_UNETS
from models.test_controlnet import COUNTS, inputs, of_unet, run_oracle, run_ours, worst
from oracle import SCALES, last, normal, perturb, relative_error
from stable_diffusion import Control, StableDiffusion
from stable_diffusion.lora.control import build_control_lora
from stable_diffusion.weights.files import open_part
from stable_diffusion.weights.load import build
from test_full_size import oracle_shapes, write_sparse

RANK, PROMPT = 3, "the red cat on the blue"
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
HEAD = {
    "conv_in": "input_blocks.0.0",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
}
HEAD |= {f"time_embedding.linear_{i + 1}": f"time_embed.{2 * i}" for i in (0, 1)}
HEAD |= {f"add_embedding.linear_{i + 1}": f"label_emb.0.{2 * i}" for i in (0, 1)}


def original(path: str) -> str:
    """The name of a module in Stability AI's files, whose levels have two resnets."""
    match path.split("."):
        case ["controlnet_cond_embedding", "blocks", i]:
            return f"input_hint_block.{2 * int(i) + 2}"
        case ["controlnet_down_blocks", i]:
            return f"zero_convs.{i}.0"
        case ["down_blocks", i, "downsamplers", *_]:
            return f"input_blocks.{3 * int(i) + 3}.0.op"
        case ["down_blocks", i, kind, j, *rest]:
            block = f"input_blocks.{3 * int(i) + int(j) + 1}.{int(kind == 'attentions')}"
        case ["mid_block", kind, j, *rest]:
            block = f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}"
        case _:
            return HEAD[path]
    return ".".join([block, *([RESNET[rest[0]]] if kind == "resnets" else rest)])


def control_lora(unet: torch.nn.Module, controlnet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A file that turns ``unet`` into ``controlnet``, whose matrices and kernels become sums of both kinds."""
    generator, base, file = torch.Generator().manual_seed(3), unet.state_dict(), {"lora_controlnet": torch.zeros(0)}
    for name, value in controlnet.state_dict().items():
        path, kind = name.rsplit(".", 1)
        if name not in base or value.ndim < 2:
            file[f"{original(path)}.{kind}"] = value.clone()
            continue
        up = torch.randn(len(value), RANK, generator=generator) / 10
        down = torch.randn(RANK, *value.shape[1:], generator=generator) / 10
        file[f"{original(path)}.up"] = up[..., None, None] if value.ndim == 4 else up
        file[f"{original(path)}.down"] = down
        value.copy_(base[name] + (up @ down.flatten(1)).reshape(value.shape))
    return file


@pytest.fixture(scope="module", params=["sd1", "xl"])
def made(request, tmp_path_factory) -> tuple:
    """The folder of a checkpoint, diffusers' ControlNet and its Control-LoRA in the folder."""
    folder = tmp_path_factory.mktemp(request.param)
    unet = request.getfixturevalue(f"{request.param}_folder")
    unet = diffusers.UNet2DConditionModel.from_pretrained(unet / "unet")
    config = {**of_unet(dict(unet.config)), "conditioning_embedding_out_channels": [4, 8, 12, 16]}
    torch.manual_seed(0)
    net = perturb(diffusers.ControlNetModel(**{k: v for k, v in config.items() if not k.startswith("_")}))
    for parameter in net.controlnet_cond_embedding.parameters():
        parameter.data.normal_(std=0.2)
    save_file(control_lora(unet, net), folder / "control-lora.safetensors")
    return request.param, request.getfixturevalue(f"{request.param}_folder"), net, folder / "control-lora.safetensors"


def test_is_the_controlnet_of_diffusers(made):
    family, folder, oracle, file = made
    ours = StableDiffusion(folder).load_controlnet(file)
    for i, scale in enumerate(SCALES):
        given, t = inputs(family, i + 1, 4, 6, scale), [999.0, 500.0, 1.0][: i + 1]
        assert worst(run_ours(ours, given, t), run_oracle(oracle, given, t)) <= 1e-4


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
def test_diffusers_reads_the_same(made):
    """Its own reader, which puts the factors beside the weights of the UNet, and forgets the biases there."""
    family, folder, oracle, file = made
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    theirs = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 12, 16))
    theirs.load_lora_adapter(load_file(file), prefix=None)
    for path, module in theirs.named_modules():
        if hasattr(module, "base_layer") and module.base_layer.bias is not None:
            module.base_layer.bias.data.copy_(oracle.get_submodule(path).bias)
    given, ours = inputs(family, 1, 4, 6), StableDiffusion(folder).load_controlnet(file)
    assert worst(run_ours(ours, given, [500.0]), run_oracle(theirs.requires_grad_(False), given, [500.0])) <= 1e-4


def test_is_made_of_the_weights_of_the_run(made, tmp_path):
    """LoRAs that are fused count, quantization does not; and it acts in a run as a whole ControlNet does."""
    _, folder, oracle, file = made
    oracle.save_pretrained(tmp_path / "net")
    image = mx.array(np.abs(normal(40, 56, 3)).clip(0, 1))
    plain, quantized = StableDiffusion(folder), StableDiffusion(folder, unet_bits=4)
    nets = [plain.load_controlnet(tmp_path / "net"), plain.load_controlnet(file), quantized.load_controlnet(file)]
    for (name, a), (_, b), (_, c) in zip(*(tree_flatten(net.parameters()) for net in nets), strict=True):
        assert mx.allclose(a, b, rtol=1e-5, atol=1e-6) and mx.array_equal(b, c), name
    lora = StableDiffusion(folder, loras=[(write_lora(tmp_path / "lora.safetensors"), 1.0)]).load_controlnet(file)
    same, changed = (net.mid_block.attentions[0].transformer_blocks[0].attn1 for net in (nets[1], lora))
    assert relative_error(changed.to_q.weight, same.to_q.weight) > 1e-3
    assert mx.array_equal(changed.to_k.weight, same.to_k.weight)
    run = {"num_steps": 2, "latent_size": (5, 7), "seed": 1}
    whole, lora = (last(plain.generate_latents(PROMPT, controls=[Control(net, image)], **run)) for net in nets[:2])
    assert relative_error(lora, whole) <= 1e-4
    assert relative_error(last(plain.generate_latents(PROMPT, **run)), whole) > 1e-3


def write_lora(path: Path) -> Path:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    save_file({f"{layer}_A.weight": torch.ones(2, 64), f"{layer}_B.weight": torch.ones(64, 2)}, path)
    return path


REFUSED = {
    "the Control-LoRA does not fit the model: .*1 missing: controlnet_mid_block.bias": (
        "middle_block_out.0.bias",
        None,
    ),
    r"1 unexpected: out\.1\.up": (None, "out.1.up"),
    "unet.conv_in: the shapes of its factors do not match": ("input_blocks.0.0.down", None),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(made, tmp_path, message):
    _, folder, _, file = made
    removed, added = REFUSED[message]
    tensors = {name: value for name, value in load_file(file).items() if name != removed}
    save_file(tensors | ({added: torch.zeros(4, 4)} if added else {}), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        StableDiffusion(folder).load_controlnet(tmp_path / "lora.safetensors")
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_another_family_is_refused(made, request):
    family, _, _, file = made
    other = request.getfixturevalue("sd1_folder" if family == "xl" else "xl_folder")
    with pytest.raises(ValueError, match=r"the Control-LoRA does not fit the model: .*use one trained for"):
        StableDiffusion(other).load_controlnet(file)


@pytest.mark.parametrize("name", ["sd15", "sdxl-base"])
def test_published_ones_fit_the_unet_at_full_size(tmp_path, name):
    """control_lora_rank128_v11p_sd15_canny_fp16 and control-lora-canny-rank256, by their names without values."""
    net = oracle_shapes(lambda: diffusers.ControlNetModel(**of_unet(REAL_UNETS[name])))
    unet, rank, file = build("unet", REAL_UNETS[name]), 256 if "xl" in name else 128, {"lora_controlnet": (0,)}
    own = ("controlnet_", "zero")
    for key, shape in net.items():
        path, kind = key.rsplit(".", 1)
        if path.startswith(own) or len(shape) < 2:
            file[f"{original(path)}.{kind}"] = shape
        else:
            least = min(rank, *shape[:2])
            file[f"{original(path)}.up"] = (shape[0], least, *[1] * (len(shape) - 2))
            file[f"{original(path)}.down"] = (least, *shape[1:])
    write_sparse(tmp_path / "lora.safetensors", file)
    built = build_control_lora(open_part(tmp_path / "lora.safetensors", "controlnet"), unet, mx.float16)
    assert sum(value.size for _, value in tree_flatten(built.parameters())) == COUNTS[name.removesuffix("-base")]

"""Checkpoints in the layout of the original code: the module trees of CompVis' UNet and autoencoder, and writers.

The trees are built as that code builds them, module by module. They serve twice: where no list of a published file was
found, and to write small checkpoints, for which diffusers' own converter says which name is which.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.loaders import single_file_utils as oracle

Shapes = dict[str, list[int]]


def unet_tree(
    widths: Sequence[int],
    down: Sequence[Sequence[int]],
    middle: int | None,
    up: Sequence[Sequence[int]],
    *,
    context: int,
    reads: int = 4,
    linear: bool = False,
    vector: int | None = None,
) -> Shapes:
    """Names and shapes of a `UNetModel`.

    Args:
        widths: channels of each level, the finest first.
        down: for each level, the layers of the transformer after each resnet (0: there is none).
        middle: the same for the middle; None where it is a single resnet.
        up: as `down`, for the way back, the coarsest level first.
        context: width of the prompt; reads: channels of the input; linear: projections are no convolutions.
        vector: width of XL's sizes and pooled prompt.
    """
    shapes: Shapes = {}
    temb = 4 * widths[0]

    def add(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = list(shape)
        if bias:
            shapes[f"{name}.bias"] = [shape[0]]

    def resnet(name: str, before: int, after: int) -> None:
        add(f"{name}.in_layers.0", before)
        add(f"{name}.in_layers.2", after, before, 3, 3)
        add(f"{name}.emb_layers.1", after, temb)
        add(f"{name}.out_layers.0", after)
        add(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            add(f"{name}.skip_connection", after, before, 1, 1)

    def transformer(name: str, width: int, layers: int) -> None:
        kernel = () if linear else (1, 1)
        add(f"{name}.norm", width)
        add(f"{name}.proj_in", width, width, *kernel)
        for i in range(layers):
            block = f"{name}.transformer_blocks.{i}"
            for attention, source in (("attn1", width), ("attn2", context)):
                add(f"{block}.{attention}.to_q", width, width, bias=False)
                add(f"{block}.{attention}.to_k", width, source, bias=False)
                add(f"{block}.{attention}.to_v", width, source, bias=False)
                add(f"{block}.{attention}.to_out.0", width, width)
            add(f"{block}.ff.net.0.proj", 8 * width, width)
            add(f"{block}.ff.net.2", width, 4 * width)
            for norm in ("norm1", "norm2", "norm3"):
                add(f"{block}.{norm}", width)
        add(f"{name}.proj_out", width, width, *kernel)

    add("time_embed.0", temb, widths[0])
    add("time_embed.2", temb, temb)
    if vector is not None:
        add("label_emb.0.0", temb, vector)
        add("label_emb.0.2", temb, temb)
    add("input_blocks.0.0", widths[0], reads, 3, 3)
    n, width, skips = 1, widths[0], [widths[0]]
    for level, depths in enumerate(down):
        for depth in depths:
            resnet(f"input_blocks.{n}.0", width, widths[level])
            width = widths[level]
            if depth:
                transformer(f"input_blocks.{n}.1", width, depth)
            skips.append(width)
            n += 1
        if level < len(down) - 1:
            add(f"input_blocks.{n}.0.op", width, width, 3, 3)
            skips.append(width)
            n += 1
    resnet("middle_block.0", width, width)
    if middle is not None:
        transformer("middle_block.1", width, middle)
        resnet("middle_block.2", width, width)
    n = 0
    for level, depths in zip(reversed(range(len(widths))), up, strict=True):
        for i, depth in enumerate(depths):
            resnet(f"output_blocks.{n}.0", width + skips.pop(), widths[level])
            width = widths[level]
            if depth:
                transformer(f"output_blocks.{n}.1", width, depth)
            if level and i == len(depths) - 1:
                add(f"output_blocks.{n}.{2 if depth else 1}.conv", width, width, 3, 3)
            n += 1
    add("out.0", width)
    add("out.2", 4, width, 3, 3)
    return shapes


def tree_of(config: dict) -> Shapes:
    """`unet_tree` of a UNet that diffusers configures so, with attention in the blocks that have it by their type."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    per_level = config.get("transformer_layers_per_block", 1)
    per_level = per_level if isinstance(per_level, list) else [per_level] * len(widths)
    down = [
        [n if "Attn" in kind else 0] * layers for n, kind in zip(per_level, config["down_block_types"], strict=True)
    ]
    up = zip(reversed(per_level), config["up_block_types"], strict=True)
    return unet_tree(
        widths,
        down,
        per_level[-1],
        [[n if "Attn" in kind else 0] * (layers + 1) for n, kind in up],
        context=config["cross_attention_dim"],
        reads=config.get("in_channels", 4),
        linear=config.get("use_linear_projection", False),
        vector=config.get("projection_class_embeddings_input_dim"),
    )


def vae_names(levels: int, layers: int) -> list[str]:
    """Names of an `AutoencoderKL`."""
    norms, modules = ["encoder.norm_out", "decoder.norm_out"], ["quant_conv", "post_quant_conv"]
    for side, blocks, count in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        modules += [f"{side}.conv_in", f"{side}.conv_out", *(f"{side}.mid.attn_1.{m}" for m in ("norm", "q", "k", "v"))]
        modules.append(f"{side}.mid.attn_1.proj_out")
        resnets = [f"{side}.mid.block_1", f"{side}.mid.block_2"]
        resnets += [f"{side}.{blocks}.{i}.block.{j}" for i in range(levels) for j in range(count)]
        modules += [f"{resnet}.{part}" for resnet in resnets for part in ("norm1", "conv1", "norm2", "conv2")]
        ends = range(levels - 1) if blocks == "down" else range(1, levels)
        modules += [f"{side}.{blocks}.{i}.{blocks}sample.conv" for i in ends]
    shortcuts = [f"encoder.down.{i}.block.0.nin_shortcut" for i in range(1, levels)]
    shortcuts += [f"decoder.up.{i}.block.0.nin_shortcut" for i in range(levels - 1)]
    return [f"{module}.{parameter}" for module in norms + modules + shortcuts for parameter in ("weight", "bias")]


def controlnet_names(unet: Shapes) -> list[str]:
    """Names of a `ControlNet` for a UNet: its first half, the hint's convolutions, and those that start at zero."""
    half = [name for name in unet if name.startswith(("time_embed", "input_blocks", "middle_block"))]
    blocks = 1 + max(int(name.split(".")[1]) for name in half if name.startswith("input_blocks"))
    modules = [f"input_hint_block.{i}" for i in range(0, 15, 2)]
    modules += [f"zero_convs.{i}.0" for i in range(blocks)] + ["middle_block_out.0"]
    return half + [f"{module}.{parameter}" for module in modules for parameter in ("weight", "bias")]


# --- what diffusers makes of names -------------------------------------------------------------------------------


_CONVERTERS = {
    "unet": ("model.diffusion_model.", oracle.convert_ldm_unet_checkpoint),
    "vae": ("first_stage_model.", oracle.convert_ldm_vae_checkpoint),
    "controlnet": ("control_model.", oracle.convert_controlnet_checkpoint),
}


def diffusers_names(kind: str, names: Sequence[str], config: dict) -> dict[str, str]:
    """{diffusers' name: original name}, by diffusers' converter: every tensor holds its number."""
    names = list(names)
    numbers = {
        name: torch.full((1, 1, 1, 1) if name.endswith("weight") else (1,), float(i)) for i, name in enumerate(names)
    }
    prefix, convert = _CONVERTERS[kind]
    converted = convert({prefix + name: value for name, value in numbers.items()}, config)
    return {new: names[int(value.flatten()[0])] for new, value in converted.items()}


def write_unet(tensors: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """A UNet's tensors under the original names; all of them, or it fails."""
    names = diffusers_names("unet", list(tree_of(config)), config)
    assert names.keys() == tensors.keys()
    return {names[name]: value for name, value in tensors.items()}


def write_vae(tensors: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """An autoencoder's tensors under the original names, where its attention is 1×1 convolutions."""
    levels = len(config["block_out_channels"])
    names = diffusers_names("vae", vae_names(levels, config["layers_per_block"]), config)
    assert names.keys() == tensors.keys()
    convolved = {name for name, value in tensors.items() if ".attentions." in name and value.ndim == 2}
    return {names[name]: v[..., None, None] if name in convolved else v for name, v in tensors.items()}


def write_open_clip(tensors: dict[str, np.ndarray], unused: int = 0) -> dict[str, np.ndarray]:
    """A text encoder of transformers under OpenCLIP's names, with layers on top that are not used."""
    parts = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    around = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    written = {new: tensors[old] for old, new in around.items()}
    width = len(written["ln_final.weight"])
    projection = tensors.get("text_projection.weight", np.ones((width, width), dtype=np.float32))
    written |= {"text_projection": projection.T.copy(), "logit_scale": np.array(4.6, dtype=np.float32)}
    layers = 1 + max(int(name.split(".")[3]) for name in tensors if ".layers." in name)
    for i in range(layers + unused):
        old, new = f"text_model.encoder.layers.{min(i, layers - 1)}", f"transformer.resblocks.{i}"
        for parameter in ("weight", "bias"):
            fused = [tensors[f"{old}.self_attn.{letter}_proj.{parameter}"] for letter in "qkv"]
            written[f"{new}.attn.in_proj_{parameter}"] = np.concatenate(fused)
            written |= {f"{new}.{part}.{parameter}": tensors[f"{old}.{own}.{parameter}"] for own, part in parts.items()}
    return written

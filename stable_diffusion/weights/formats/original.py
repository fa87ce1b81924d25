"""Rename tensors of the original code bases to the names in diffusers checkpoints, which are our module names.

Single files keep the names of the code that trained them: CompVis' latent diffusion for UNet, autoencoder and
ControlNet (Rombach et al. 2022, Zhang et al. 2023), OpenCLIP for the text encoders of Stable Diffusion 2 and XL. There
a UNet is one list of blocks, which is cut here where a level ends: after a downsampler, or with an upsampler.

    input_blocks   0 conv_in | 1 2 of the finest level | 3 its downsampler | 4 5 | 6 | ...
    middle_block   0 resnet, 1 transformer, 2 resnet
    output_blocks  0 1 2 of the coarsest level, of which the last has the upsampler | 3 4 5 | ...
"""

import re
from collections.abc import Callable, Iterable, Mapping

import mlx.core as mx

RESNET_NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_NAMES = {  # the blocks of a UNet
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "middle_block_out.0": "controlnet_mid_block",
    "input_hint_block.0": "controlnet_cond_embedding.conv_in",
}
_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(in_layers|norm|op|conv)\.")
_CONDITION = re.compile(r"input_hint_block\.(\d+)\.")
_ZERO = re.compile(r"zero_convs\.(\d+)\.0$")

_VAE = (
    (re.compile(r"\.down\.(\d+)\.block\.(\d+)"), r".down_blocks.\1.resnets.\2"),
    (re.compile(r"\.down\.(\d+)\.downsample\."), r".down_blocks.\1.downsamplers.0."),
    (re.compile(r"\.mid\.block_1\."), ".mid_block.resnets.0."),
    (re.compile(r"\.mid\.block_2\."), ".mid_block.resnets.1."),
    (re.compile(r"\.mid\.attn_1\.norm\."), ".mid_block.attentions.0.group_norm."),
    (re.compile(r"\.mid\.attn_1\.([qkv])\."), r".mid_block.attentions.0.to_\1."),
    (re.compile(r"\.mid\.attn_1\.proj_out\."), ".mid_block.attentions.0.to_out.0."),
    (re.compile(r"\.nin_shortcut\."), ".conv_shortcut."),
    (re.compile(r"\.norm_out\."), ".conv_norm_out."),
)
_VAE_UP = re.compile(r"^decoder\.up\.(\d+)\.")

_OPEN_CLIP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = re.compile(r"^transformer\.resblocks\.(\d+)\.(.+)\.(\w+)$")
_OPEN_CLIP_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_SD2_LAYERS = 23  # of OpenCLIP's 24: the image model was trained on the last but one, which is normed in place of it

# The discriminator that an autoencoder was trained against, and its running averages.
_NOT_OF_VAE = ("loss.", "model_ema.")


def to_diffusers(kind: str, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return the tensors of one network under diffusers' names; names that are diffusers' already stay.

    Args:
        kind: "unet", "vae", "text_encoder" (of Stable Diffusion 2, if it is an OpenCLIP), "text_encoder_2" (of XL) or
            "controlnet"; the tensors of any other kind are returned as they are.
        tensors: by their original names, without the prefix that tells networks apart in a file.

    A fused projection becomes three, and OpenCLIP's text projection is transposed. All stays lazy.
    """
    return _CONVERTERS.get(kind, dict)(tensors)


# --- UNet and ControlNet -----------------------------------------------------------------------------------------


def _unet(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    if "input_blocks.0.0.weight" not in tensors:
        return dict(tensors)
    modules = UNET_NAMES | _blocks(tensors, "input", "down_blocks") | _blocks(tensors, "output", "up_blocks")
    modules |= _condition(tensors)
    return _rename(tensors, lambda name: _renamed(name, modules))


def _rename(tensors: Mapping[str, mx.array], new_name: Callable[[str], str]) -> dict[str, mx.array]:
    """Return the tensors under new names. Raises ValueError when two of them would have the same."""
    named: dict[str, mx.array] = {}
    for name, value in tensors.items():
        if named.setdefault(new_name(name), value) is not value:
            raise ValueError(f"{new_name(name)} is there twice, in the original naming and in that of diffusers")
    return named


def _blocks(names: Iterable[str], side: str, blocks: str) -> dict[str, str]:
    """Map the modules of one side of the UNet: {"input_blocks.1.0": "down_blocks.0.resnets.0", ...}."""
    kinds: dict[int, dict[int, str]] = {}
    for name in names:
        if (match := _BLOCK.match(name)) and match[1] == side:
            kinds.setdefault(int(match[2]), {})[int(match[3])] = match[4]
    modules, level, layer = {}, 0, 0
    for n in sorted(kinds):
        for k, kind in kinds[n].items():
            here = f"{side}_blocks.{n}.{k}"
            if kind == "op":
                modules[f"{here}.op"] = f"{blocks}.{level}.downsamplers.0.conv"
            elif kind == "conv":
                modules[f"{here}.conv"] = f"{blocks}.{level}.upsamplers.0.conv"
            else:
                modules[here] = f"{blocks}.{level}.{'resnets' if kind == 'in_layers' else 'attentions'}.{layer}"
        ends = {"op", "conv"} & {*kinds[n].values()}
        level, layer = (level + 1, 0) if ends else (level, layer + 1)
    return modules


def _condition(names: Iterable[str]) -> dict[str, str]:
    """Map the convolutions that a ControlNet's image goes through: every other number is an activation."""
    numbers = sorted({int(match[1]) for name in names if (match := _CONDITION.match(name))})
    modules = {f"input_hint_block.{n}": f"controlnet_cond_embedding.blocks.{i}" for i, n in enumerate(numbers[1:-1])}
    return modules | {f"input_hint_block.{n}": "controlnet_cond_embedding.conv_out" for n in numbers[-1:]}


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    """Rename a parameter by the map of its module or the module around it; the parts of a resnet are renamed too."""
    module, _, parameter = name.rpartition(".")
    if zero := _ZERO.match(module):
        return f"controlnet_down_blocks.{zero[1]}.{parameter}"
    inner: list[str] = []
    while module and module not in modules:
        module, _, last = module.rpartition(".")
        inner.insert(0, last)
    if not module:
        return name
    path = ".".join(inner)
    return ".".join(filter(None, (modules[module], RESNET_NAMES.get(path, path), parameter)))


# --- autoencoder -------------------------------------------------------------------------------------------------


def _vae(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Rename an autoencoder. Its decoder counts levels from the finest, diffusers in the order of computation."""
    levels = 1 + max((int(match[1]) for name in tensors if (match := _VAE_UP.match(name))), default=-1)

    def renamed(name: str) -> str:
        if match := _VAE_UP.match(name):
            block = f"decoder.up_blocks.{levels - 1 - int(match[1])}."
            name = block + name[match.end() :].replace("block.", "resnets.", 1).replace("upsample.", "upsamplers.0.")
        for pattern, replacement in _VAE:
            name = pattern.sub(replacement, name)
        return name

    return _rename({n: v for n, v in tensors.items() if not n.startswith(_NOT_OF_VAE)}, renamed)


# --- text encoders -----------------------------------------------------------------------------------------------


def _open_clip(tensors: Mapping[str, mx.array], layers: int | None) -> dict[str, mx.array]:
    """Rename an OpenCLIP text tower: ``layers`` of it and no projection (Stable Diffusion 2), or all (None: XL)."""
    if "positional_embedding" not in tensors:
        return dict(tensors)
    named: dict[str, mx.array] = {}
    for name, value in tensors.items():
        if match := _OPEN_CLIP_LAYER.match(name):
            number, part, parameter = match.groups()
            here = f"text_model.encoder.layers.{number}"
            if layers is not None and int(number) >= layers:
                continue
            if parameter.startswith("in_proj_"):
                for letter, third in zip("qkv", mx.split(value, 3), strict=True):
                    named[f"{here}.self_attn.{letter}_proj.{parameter.removeprefix('in_proj_')}"] = third
            else:
                named[f"{here}.{_OPEN_CLIP_PARTS.get(part, part)}.{parameter}"] = value
        elif name in ("text_projection", "text_projection.weight"):
            if layers is None:  # the original multiplies by it from the right
                # Copied, since products with a matrix that is only seen as transposed are rounded otherwise.
                named["text_projection.weight"] = mx.contiguous(value.T) if name == "text_projection" else value
        else:
            named[_OPEN_CLIP.get(name, name)] = value
    return named


_CONVERTERS: dict[str, Callable[[Mapping[str, mx.array]], dict[str, mx.array]]] = {
    "unet": _unet,
    "controlnet": _unet,
    "vae": _vae,
    "text_encoder": lambda tensors: _open_clip(tensors, _SD2_LAYERS),
    "text_encoder_2": lambda tensors: _open_clip(tensors, None),
}

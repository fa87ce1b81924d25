"""Rename the tensors of other programs and older versions to the names in diffusers checkpoints, our module names.

Single files keep the names of the code that trained them: CompVis' latent diffusion for UNet, autoencoder and
ControlNet (Rombach et al. 2022, Zhang et al. 2023), OpenCLIP for the text encoders of Stable Diffusion 2 and XL. There
a UNet is one list of blocks, which is split here at the end of each level: after a downsampler, or with an upsampler.

    input_blocks   0 conv_in | 1 2 of the finest level | 3 its downsampler | 4 5 | 6 | ...
    middle_block   0 resnet, 1 transformer, 2 resnet
    output_blocks  0 1 2 of the coarsest level, of which the last has the upsampler | 3 4 5 | ...
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import mlx.core as mx

from ..parts import ADAPTERS, PARTS

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
_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(in_layers|norm|proj_in|op|conv)\.")
_LLLITE = re.compile(r"^(middle_block|input_blocks|output_blocks)(?:_(\d+))?_1_")
_HINT = re.compile(r"input_hint_block\.(\d+)\.")
_ADAPTER_BLOCK = re.compile(r"^body\.(\d{1,4})\.(block|in_conv)")
_LAYER = re.compile(r"^\d{1,4}(?=\.)")
_ZERO = re.compile(r"^zero_convs\.(\d+)\.0\.")

_VAE_NAMES = {
    r"\.down\.(\d+)\.": r".down_blocks.\1.",
    r"_blocks\.(\d+)\.block\.": r"_blocks.\1.resnets.",
    r"\.(up|down)sample\.": r".\1samplers.0.",
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.mid\.attn_1\.norm\.": ".mid_block.attentions.0.group_norm.",
    r"\.mid\.attn_1\.([qkv])\.": r".mid_block.attentions.0.to_\1.",
    r"\.mid\.attn_1\.proj_out\.": ".mid_block.attentions.0.to_out.0.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
    r"\.norm_out\.": ".conv_norm_out.",
}
_VAE_UP = re.compile(r"^decoder\.up\.(\d+)\.")
_NOT_OF_VAE = ("loss.", "model_ema.")  # the discriminator of its training, and running averages

_OPEN_CLIP = {
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^transformer\.resblocks\.(\d+)\.": r"text_model.encoder.layers.\1.",
    r"(\.layers\.\d+)\.ln_([12])\.": r"\1.layer_norm\2.",
    r"(\.layers\.\d+)\.attn\.": r"\1.self_attn.",
    r"(\.layers\.\d+\.mlp)\.c_fc\.": r"\1.fc1.",
    r"(\.layers\.\d+\.mlp)\.c_proj\.": r"\1.fc2.",
}
_OPEN_CLIP_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.")
_SD2_LAYERS = 23  # of OpenCLIP's 24: the image model was trained on the penultimate layer, normalised

# ESRGAN's names (Wang et al. 2018): of its first files, which are a list, and of its second ones.
_ESRGAN = {
    r"^(?:model\.1\.sub|RRDB_trunk)\.(\d+)\.RDB([123])\.conv(\d)\.(?:0\.)?": r"body.\1.rdb\2.conv\3.",
    r"^model\.0\.": "conv_first.",
    r"^trunk_conv\.": "conv_body.",
    r"^HRconv\.": "conv_hr.",
    r"^upconv([123])\.": r"conv_up\1.",
}
_ESRGAN_LIST = re.compile(r"model\.(\d+)\.")
_ESRGAN_BODY = re.compile(r"model\.1\.sub\.(\d+)\.")

# The autoencoder's attention had other names in files of diffusers before 0.18.
_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY = re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.")
_IP_ADAPTER = {r"^adapter_modules\.": "ip_adapter.", r"^image_proj_model\.": "image_proj."}  # as saved in training

# Buffers of old text encoders, and the other parts of a CLIP model.
NOT_OF_TEXT_ENCODER = r"((position_ids|logit_scale|logit_bias|attn_mask)$|(visual|vision_model|visual_projection)\.)"
_NOT_WEIGHTS = re.compile(rf"(^|\.){NOT_OF_TEXT_ENCODER}")
_OF_VISION = ("image_encoder", "safety_checker")
_VISION = re.compile(r"(?!.*\.position_ids$)(vision_model|visual_projection|\w+_embeds)")  # the image half
_NESTED = ("vision_model.vision_model.", "vision_model.")  # a safety checker's, before transformers 5
_BARE_CLIP = "embeddings.token_embedding.weight"  # a text encoder without the prefix, as transformers 5 names it


def to_diffusers(kind: str, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return the weights of one network under the names of today's diffusers, without other tensors.

    Args:
        kind: one of PARTS; tensors of other kinds keep their names.
        tensors: tensors without the network's prefix in a file; diffusers' names are unchanged.

    A fused projection is split into three, and OpenCLIP's text projection is transposed. All tensors stay lazy.
    """
    if kind == "controlnet":
        tensors = {_LLLITE.sub(_lllite_block, name): value for name, value in tensors.items()}
        tensors = _adapter(tensors) if any(name in tensors for name in ADAPTERS) else tensors
    if kind in PARTS and PARTS[kind].original in tensors:
        tensors = _CONVERTERS[kind](tensors)
    if kind == "upscaler":
        return _upscaler(tensors)
    if kind in _OF_VISION:
        return _rename({n: v for n, v in tensors.items() if _VISION.match(n)}, lambda name: name.replace(*_NESTED))
    named = {name: value for name, value in tensors.items() if not _NOT_WEIGHTS.search(name)}
    if _BARE_CLIP in named:
        named = {name if name.startswith("text_projection") else f"text_model.{name}": v for name, v in named.items()}
    return {_LEGACY.sub(lambda m: f"{m[1]}.{_LEGACY_ATTENTION[m[2]]}.", name): v for name, v in named.items()}


def _lllite_block(match: re.Match) -> str:
    """Rename a block of XL's UNet in a ControlNet-LLLite: each level has two resnets and a sampler, or three."""
    if match[1] == "middle_block":
        return "mid_block_attentions_0_"
    side, before = ("down", 1) if match[1] == "input_blocks" else ("up", 0)
    level, layer = divmod(int(match[2]) - before, 3)
    return f"{side}_blocks_{level}_attentions_{layer}_"


def name_half(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Rename half of a TAESD (madebyollin), whose names are layer numbers; other tensors are unchanged.

    The decoder's first layer, which limits the latents, has no weights; diffusers does not count it.
    """
    if "3.conv.0.weight" not in tensors:
        return tensors
    half, first = ("encoder", 0) if "0.weight" in tensors else ("decoder", 1)
    return {_LAYER.sub(lambda m: f"{half}.layers.{int(m[0]) - first}", name): value for name, value in tensors.items()}


def _adapter(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Rename a T2I-Adapter (TencentARC): light ones have stages, others one list of blocks, two for each stage."""
    if "body.0.in_conv.weight" in tensors:
        return {f"adapter.{name.replace('.body.', '.resnets.')}": value for name, value in tensors.items()}

    def place(match: re.Match) -> str:
        stage, block = divmod(int(match[1]), 2)
        return f"body.{stage}." + (f"resnets.{block}.block" if match[2] == "block" else match[2])

    return _rename(tensors, lambda name: f"adapter.{_ADAPTER_BLOCK.sub(place, name)}")


def _unet(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Rename a UNet or a ControlNet: each known module with its contents."""
    modules = UNET_NAMES | _blocks(tensors, "input", "down_blocks") | _blocks(tensors, "output", "up_blocks")
    # The convolutions of a ControlNet's image embedding: every other number is an activation.
    blocks = sorted({int(match[1]) for name in tensors if (match := _HINT.match(name))})
    modules |= {f"input_hint_block.{n}": f"controlnet_cond_embedding.blocks.{i}" for i, n in enumerate(blocks[1:-1])}
    modules |= {f"input_hint_block.{n}": "controlnet_cond_embedding.conv_out" for n in blocks[-1:]}

    def new_name(name: str) -> str:
        path, _, parameter = name.rpartition(".")
        known = rename_module(path, modules, RESNET_NAMES)
        return f"{known}.{parameter}" if known else _ZERO.sub(r"controlnet_down_blocks.\1.", name)

    return _rename(tensors, new_name)


def rename_module(path: str, modules: Mapping[str, str], inner_names: Mapping[str, str]) -> str | None:
    """Rename the longest prefix of a path that is in ``modules``, and the rest; None without a prefix."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        if module := modules.get(".".join(parts[:end])):
            inner = ".".join(parts[end:])
            return ".".join(filter(None, (module, inner_names.get(inner, inner))))
    return None


def _blocks(names: Iterable[str], side: str, blocks: str) -> dict[str, str]:
    """Map the modules of one side of the UNet: {"input_blocks.1.0": "down_blocks.0.resnets.0", ...}."""
    matches = [match for name in names if (match := _BLOCK.match(name)) and match[1] == side]
    kinds = {(int(match[2]), int(match[3])): match[4] for match in matches}
    modules, level, layer = {}, 0, -1
    for (n, k), kind in sorted(kinds.items()):
        here = f"{side}_blocks.{n}.{k}"
        if kind in ("op", "conv"):  # a sampler ends its level
            modules[f"{here}.{kind}"] = f"{blocks}.{level}.{'down' if kind == 'op' else 'up'}samplers.0.conv"
            level, layer = level + 1, -1
        elif kind == "in_layers":
            layer += 1
            modules[here] = f"{blocks}.{level}.resnets.{layer}"
        else:
            modules[here] = f"{blocks}.{level}.attentions.{layer}"
    return modules


def _vae(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Rename an autoencoder. Its decoder counts levels from the finest, diffusers in the order of computation."""
    last = max((int(match[1]) for name in tensors if (match := _VAE_UP.match(name))), default=0)

    def new_name(name: str) -> str:
        name = _VAE_UP.sub(lambda match: f"decoder.up_blocks.{last - int(match[1])}.", name)
        return _substitute(_VAE_NAMES, name)

    return _rename({n: v for n, v in tensors.items() if not n.startswith(_NOT_OF_VAE)}, new_name)


def _upscaler(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Rename an ESRGAN of either older naming to Real-ESRGAN's; ``model`` is a list of its layers."""
    inner = {int(match[1]) for name in tensors if (match := _ESRGAN_BODY.match(name))}
    numbers = sorted({int(match[1]) for name in tensors if (match := _ESRGAN_LIST.match(name))} - {1})
    names = {rf"^model\.1\.sub\.{max(inner, default=0)}\.(?=\w+$)": "conv_body."}
    if len(numbers) > 2:
        *ups, high, last = [rf"^model\.{n}\." for n in numbers[1:]]
        names |= {high: "conv_hr.", last: "conv_last."} | {up: f"conv_up{i}." for i, up in enumerate(ups, start=1)}
    return _rename(tensors, partial(_substitute, _ESRGAN | names))


def _substitute(names: Mapping[str, str], name: str) -> str:
    """Replace each pattern of ``names`` in a name."""
    for pattern, replacement in names.items():
        name = re.sub(pattern, replacement, name)
    return name


def _rename(tensors: Mapping[str, mx.array], new_name: Callable[[str], str]) -> dict[str, mx.array]:
    """Return the tensors under new names. Raises ValueError if two tensors would get the same name."""
    named: dict[str, mx.array] = {}
    for name, value in tensors.items():
        if named.setdefault(new_name(name), value) is not value:
            raise ValueError(f"{new_name(name)} is stored twice, under its original name and its diffusers name")
    return named


def _open_clip(tensors: Mapping[str, mx.array], layers: int | None = None) -> dict[str, mx.array]:
    """Rename an OpenCLIP text tower: ``layers`` of it without projection (Stable Diffusion 2), or all (None: XL)."""
    named: dict[str, mx.array] = {}
    for name, value in tensors.items():
        match = _OPEN_CLIP_LAYER.match(name)
        if layers is not None and (int(match[1]) >= layers if match else name.startswith("text_projection")):
            continue
        if match and ".in_proj_" in name:
            for letter, third in zip("qkv", mx.split(value, 3), strict=True):
                named[name.replace("in_proj_", f"{letter}_proj.")] = third
        elif name == "text_projection":  # the original multiplies from the right
            # Copied, since products with a transposed view are rounded differently.
            named["text_projection.weight"] = mx.contiguous(value.T)
        else:
            named[name] = value
    return _rename(named, partial(_substitute, _OPEN_CLIP))


_CONVERTERS: dict[str, Callable[[Mapping[str, mx.array]], dict[str, mx.array]]] = {
    "unet": _unet,
    "controlnet": _unet,
    "vae": _vae,
    "text_encoder": partial(_open_clip, layers=_SD2_LAYERS),
    "text_encoder_2": _open_clip,
    "ip_adapter": partial(_rename, new_name=partial(_substitute, _IP_ADAPTER)),
}

"""Read and write the names in LoRA files.

Trainers write the same layer, and the same factor of its change, in many ways:

    lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight            kohya
    lora_unet_input_blocks_4_1_proj_in.lora_down.weight                      kohya, with the blocks' original names
    unet.down_blocks.1.attentions.0.proj_in.lora_A.weight                    PEFT, diffusers
    unet.….attn1.processor.to_q_lora.down.weight                             diffusers before 0.18
    diffusion_model.….lora_up.weight, text_encoders.clip_l.transformer.….diff   ComfyUI
    clip_g.….lora_down.weight, bundle_emb.word.clip_l                        OneTrainer
    lora_unet_….hada_w1_a, ….lokr_w2_b, ….lora_mid.weight, ….dora_scale      LyCORIS

A name is a network's prefix, a layer and a role. The tables below list prefixes and roles for both directions. With
underscores for all separators, a layer has one of a few names, which a table made from the model resolves.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from ..weights.formats.original import RESNET_NAMES, UNET_NAMES, rename_module

PREFIXES = {
    "kohya": {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"},
    "kohya-xl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    "peft": {"unet": "unet.", "text_encoder": "text_encoder.", "text_encoder_2": "text_encoder_2."},
}
PEFT_LENGTHS = "lora_magnitude_vector"
_FACTORS = [f"{kind}_{part}{i}" for kind in ("hada", "lokr") for i in "12" for part in "wt"]
_LYCORIS = ["alpha", "dora_scale", "diff", "diff_b", *_FACTORS, *(f"{f}_{side}" for f in _FACTORS for side in "ab")]
_LOCON = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "bias": "lora_up.bias"}
ROLES = {
    "kohya": _LOCON | {role: role for role in _LYCORIS},
    "peft": {"down": "lora_A.weight", "up": "lora_B.weight", "bias": "lora_B.bias", "dora_scale": PEFT_LENGTHS},
    "norms": {"diff": "w_norm", "diff_b": "b_norm"},
}

_NETWORK = re.compile(
    r"(?P<text_encoder_2>lora_te2[._]|text_encoder_2\.|(text_encoders\.)?clip_g\.(transformer\.)?)"
    r"|(?P<text_encoder>lora_te1?[._]|text_encoder\.|(text_encoders\.)?clip_[lh]\.(transformer\.)?|(?=text_model[._]))"
    r"|(?P<unet>lora_unet[._]|unet\.|(model\.)?diffusion_model\.|)"
)
# Layers of CLIP that no text encoder here uses.
UNUSED = re.compile(r"text_encoder(_2)?\.logit_scale|text_encoder\.text_projection")
BUNDLED = re.compile(r"bundle_emb\.([^.]+)\.(?:string_to_param\.)?(.+)")
_NOT_SUPPORTED = {
    r"\.[ab][12](\.weight)?$": "a GLoRA",
    r"\.oft_\w+$|\.oft_R\.|\.boft_": "an OFT",
    r"\.on_input$|\.ia3_l\b": "an IA3",
    r"\.vera_lambda_": "a VeRA",
    r"\.(lora_E|hra_u|fourierft_spectrum|randlora_\w+)\b": "an adapter of another kind",
    r"(double|single)_(blocks|transformer_blocks)": "a LoRA for Flux",
    r"joint_blocks|(^|\.)transformer_blocks\..*\.add_[kqv]_proj|lora_te3_|t5xxl": "a LoRA for Stable Diffusion 3",
    r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)": "a LoRA for Wan",
    r"^lora_prior_": "a LoRA for Stable Cascade",
    r"motion_modules": "a LoRA for AnimateDiff",
    r"^(lora_)?transformer[._]": "a LoRA for a model without UNet",
}
_ENDINGS = {f".{ending.removesuffix('.weight')}": role for table in ROLES.values() for role, ending in table.items()}
# "….lora.down.weight", "…_lora.down.weight", "….lora_linear_layer.down.weight", with an adapter's name before "weight"
_FACTOR = re.compile(r"[._]lora(?:_linear_layer)?[._](down|up|mid|A|B)(?:\.\w+)?\.(weight|bias)$")
_ADAPTER = re.compile(r"(\.(default|weight))+$")


def read_key(name: str) -> tuple[str, str, str] | None:
    """Split a tensor's name into (network, layer with underscores, role); None for a name that is not a LoRA's.

    Roles: "down", "mid", "up" (the low-rank factors), "bias" (beside "up"), "hada_w1_a" ... "lokr_t2", "diff" and
    "diff_b" (complete changes of weight and bias), "alpha", "dora_scale" (the norms m of DoRA).
    """
    name = _ADAPTER.sub("", _FACTOR.sub(r".lora_\1.\2", name))
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
    if ending is None:
        return None
    layer = name.removesuffix(ending).removeprefix("lycoris_").replace("base_model.model.", "")
    prefix = _NETWORK.match(layer)
    layer = re.sub(r"[._]lora(_linear_layer)?$", "", layer[prefix.end() :])
    network = next(name for name, text in prefix.groupdict().items() if text is not None)
    return network, layer.replace(".processor", "").replace(".", "_"), _ENDINGS[ending]


def not_supported(names: Collection[str]) -> str | None:
    """Name an unsupported file, such as "a GLoRA": another kind of file, or one for other models. Else None."""
    kinds = (what for pattern, what in _NOT_SUPPORTED.items() if any(re.search(pattern, name) for name in names))
    return next(kinds, None)


def write_keys(naming: str, network: str, paths: Collection[str]) -> dict[str, str]:
    """Return {path of a layer: its name in a file without the role} for all ``paths`` of a network.

    ``naming`` is "kohya", "kohya-xl" (with the original names of the UNet's blocks) or "peft", which diffusers reads.
    """
    prefix = PREFIXES[naming][network]
    if naming == "peft":
        return {path: prefix + path for path in paths}
    blocks = _original_blocks(paths) if naming == "kohya-xl" else {}
    return {path: prefix + (rename_module(path, blocks, _RESNET) or path).replace(".", "_") for path in paths}


def layer_names(paths: Collection[str]) -> dict[str, str]:
    """Return {each name that files use for a layer, with underscores: its path among ``paths`` in the model}."""
    blocks = _original_blocks(paths)
    names = {path.replace(".", "_"): path for path in paths}
    for path in paths:
        for alias in _aliases(path, blocks):
            names.setdefault(alias.replace(".", "_"), path)
    return names


def _aliases(path: str, blocks: Mapping[str, str]) -> Iterator[str]:
    block, _, projection = path.rpartition(".")
    if projection in _OLD_TEXT:
        yield f"{block}.{_OLD_TEXT[projection]}"
    yield path.removeprefix("text_model.")  # transformers 5 has no such level
    for name in (path, rename_module(path, blocks, _RESNET) or path):
        yield from (name, name.replace("to_out.0", "to_out"))


# The names that diffusers gave to the projections of text encoders while it replaced them itself.
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_RESNET = {ours: original for original, ours in RESNET_NAMES.items()}
_FIRST_CONV = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.resnets\.\d+\.conv1")


def _original_blocks(paths: Collection[str]) -> Mapping[str, str]:
    """Return {a block of a UNet: its original name}: numbered through, each resnet with its attention."""
    names = {ours: original for original, ours in UNET_NAMES.items()}
    resnets = Counter(match.groups() for path in paths if (match := _FIRST_CONV.fullmatch(path)))
    for side, original, number in (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0)):
        for level in range(sum(side == other for other, _ in resnets)):
            block = f"{side}.{level}"
            for i in range(resnets[side, str(level)]):
                names[f"{block}.resnets.{i}"] = f"{original}.{number}.0"
                names[f"{block}.attentions.{i}"] = f"{original}.{number}.1"
                number += 1
            # An upsampler is in the block of the last resnet, after its attention if it has one.
            position = 2 if any(path.startswith(f"{block}.attentions.") for path in paths) else 1
            names[f"{block}.upsamplers.0.conv"] = f"{original}.{number - 1}.{position}.conv"
            names[f"{block}.downsamplers.0.conv"] = f"{original}.{number}.0.op"
            number += side == "down_blocks"
    return names

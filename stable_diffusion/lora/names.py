"""The names in LoRA files -> (network, layer, role), and the layers of a model under all the names that files use.

Trainers write the same layer, and the same factor of its change, in many ways:

    lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight            kohya
    lora_unet_input_blocks_4_1_proj_in.lora_down.weight                      kohya, with the blocks' original names
    unet.down_blocks.1.attentions.0.proj_in.lora_A.weight                    PEFT, diffusers
    unet.….attn1.processor.to_q_lora.down.weight                             diffusers before 0.18
    lora_unet_….hada_w1_a, ….lokr_w2_b, ….lora_mid.weight, ….dora_scale      LyCORIS

With every separator turned into an underscore they name a layer in one of a few ways, so a table made from the model
itself finds it.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import count

_FACTOR = re.compile(r"[._]lora(?:_linear_layer)?[._](down|up|mid|A|B)(?:\.\w+)?\.(weight|bias)$")
_OTHER = re.compile(
    r"\.(alpha|dora_scale|lora_magnitude_vector|diff|diff_b|w_norm|b_norm|(?:hada|lokr)_[wt][12](?:_[ab])?)"
    r"(?:\.(?:default|weight))*$"
)
_ROLES = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}

_NETWORKS = {
    "lora_unet_": "unet",
    "unet.": "unet",
    "diffusion_model.": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "text_encoder.": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoder_2.": "text_encoder_2",
}


def read_key(name: str) -> tuple[str, str, str] | None:
    """A tensor's name -> (network, layer with underscores, role), or None where it is no part of a LoRA.

    Roles: "down", "mid", "up" (the low-rank factors), "bias" (beside "up"), "hada_w1_a" ... "lokr_t2", "diff" and
    "diff_b" (whole changes of weight and bias), "alpha", "dora_scale", "lora_magnitude_vector".
    """
    if found := _FACTOR.search(name):
        role = "bias" if found[2] == "bias" else _ROLES.get(found[1], found[1])
    elif found := _OTHER.search(name):
        role = _ROLES.get(found[1], found[1])
    else:
        return None
    layer = name[: found.start()].removeprefix("lycoris_").replace("base_model.model.", "")
    network = ""
    for prefix, owner in _NETWORKS.items():
        if layer.startswith(prefix):
            network, layer = owner, layer.removeprefix(prefix)
            break
    flat = re.sub(r"[._]lora(_linear_layer)?$", "", layer).replace(".processor", "").replace(".", "_")
    return network or ("text_encoder" if flat.startswith("text_model_") else "unet"), flat, role


def layer_names(network: str, paths: Collection[str]) -> dict[str, str]:
    """{every name that files use for a layer, with underscores: its path among ``paths`` in the model}."""
    aliases = _text_aliases if network.startswith("text_encoder") else _unet_aliases(paths)
    names = {path.replace(".", "_"): path for path in paths}
    for path in paths:
        for alias in aliases(path):
            names.setdefault(alias.replace(".", "_"), path)
    return names


# The names that diffusers gave to the projections of text encoders while it replaced them itself.
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _text_aliases(path: str) -> Iterator[str]:
    yield path.removeprefix("text_model.")  # transformers 5 has no such level
    block, _, projection = path.rpartition(".")
    if projection in _OLD_TEXT:
        yield f"{block}.{_OLD_TEXT[projection]}"


# Rombach et al.'s names, in which kohya's trainer writes XL's blocks.
_ORIGINAL_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ORIGINAL_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def _unet_aliases(paths: Collection[str]):
    blocks = _original_blocks(paths)

    def aliases(path: str) -> Iterator[str]:
        yield path.removesuffix(".0") if path.endswith("to_out.0") else path
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            if (block := ".".join(parts[:end])) in blocks:
                inner = ".".join(parts[end:])
                original = f"{blocks[block]}.{_ORIGINAL_RESNET.get(inner, inner)}".rstrip(".")
                yield original
                yield original.removesuffix(".0") if original.endswith("to_out.0") else original

    return aliases


def _original_blocks(paths: Collection[str]) -> Mapping[str, str]:
    """{a block of the UNet: its original name}. There, blocks are numbered through, each resnet with its attention."""
    prefixes = {".".join(path.split(".")[:end]) for path in paths for end in (1, 2, 3, 4)}
    names = dict(_ORIGINAL_ENDS)

    def walk(side: str, original: str, number: int, samplers: str) -> None:
        for i in count():
            if f"{side}.{i}" not in prefixes:
                return
            for j in count():
                if f"{side}.{i}.resnets.{j}" not in prefixes:
                    break
                names[f"{side}.{i}.resnets.{j}"] = f"{original}.{number}.0"
                names[f"{side}.{i}.attentions.{j}"] = f"{original}.{number}.1"
                number += 1
            if samplers == "downsamplers":
                names[f"{side}.{i}.downsamplers.0.conv"] = f"{original}.{number}.0.op"
                number += 1
            else:  # beside the last resnet, after its attention if it has one
                place = 2 if f"{side}.{i}.attentions.0" in prefixes else 1
                names[f"{side}.{i}.upsamplers.0.conv"] = f"{original}.{number - 1}.{place}.conv"

    walk("down_blocks", "input_blocks", 1, "downsamplers")
    walk("up_blocks", "output_blocks", 0, "upsamplers")
    return names


_LIGHTNING = re.compile(r"sdxl[-_ ]?lightning.*?(\d+)[-_ ]?step", re.IGNORECASE)
_HYPER = re.compile(r"hyper[-_ ]?sd.*?(\d+)[-_ ]?steps?([-_ ]cfg)?", re.IGNORECASE)
_LCM = re.compile(r"(?<![a-z])lcm[-_ ]?lora|lora[-_ ]?lcm|lcm[-_](?:sd|xl)", re.IGNORECASE)


def few_step_defaults(path: str, metadata: Mapping[str, str]) -> dict[str, str | int | float] | None:
    """How the authors run a model with a LoRA that was distilled for few steps; None for any other LoRA.

    Args:
        path: of the file. Where its name is the one that all LoRAs of diffusers have, its folder's name counts, or that
            of the repository in the Hub's cache.
        metadata: the texts in the file; trainers write its name there, which survives a renaming.

    Returns:
        "sampler", "num_steps", "cfg_weight" and, where they matter, "spacing" and "eta": arguments of
        ``generate_latents``. Known are LCM-LoRA (Luo et al. 2023, arXiv:2311.05556: LCM, 2 to 8 steps, no guidance),
        SDXL-Lightning (Lin et al. 2024, arXiv:2402.13929, and its repository: Euler, trailing, no guidance, the number
        of steps in the name) and Hyper-SD (Ren et al. 2024, arXiv:2404.13686, and its repository: DDIM, trailing, no
        guidance; TCD with eta 1 for one step; guidance 5 to 8 where the name says CFG).
    """
    *folders, name = path.split("/")
    texts = [name, *(metadata[key] for key in ("modelspec.title", "ss_output_name") if key in metadata)]
    if name.startswith(("pytorch_lora_weights", "adapter_model")):
        texts += [*folders[-1:], *(folder for folder in folders if folder.startswith("models--"))]
    for text in texts:
        if found := _LIGHTNING.search(text):
            return {"sampler": "euler", "spacing": "trailing", "num_steps": int(found[1]), "cfg_weight": 0.0}
        if found := _HYPER.search(text):
            steps, guidance = int(found[1]), 5.0 if found[2] else 0.0
            if steps == 1:
                return {"sampler": "tcd", "eta": 1.0, "num_steps": 1, "cfg_weight": guidance}
            return {"sampler": "ddim", "spacing": "trailing", "num_steps": steps, "cfg_weight": guidance}
        if _LCM.search(text):
            return {"sampler": "lcm", "num_steps": 4, "cfg_weight": 1.0}
    return None

"""The names in published checkpoints of the original code, and small checkpoints that are written under them.

Which name is which is said by diffusers' own converter.
"""

import gzip
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers.loaders import single_file_utils as oracle

_DATA = Path(__file__).parent / "data" / "published_names.json.gz"
PUBLISHED: dict[str, dict[str, list[int]]] = json.loads(gzip.decompress(_DATA.read_bytes()))  # {network: {name: shape}}

# SSD-1B is XL with fewer layers of transformers (by its published config), and no transformer in the middle.
_SSD_LAYERS = {"input_blocks.7": 4, "input_blocks.8": 4, "output_blocks.0": 4, "output_blocks.1": 4}
_SSD_LAYERS |= {"output_blocks.4": 1, "output_blocks.5": 1}
_SSD_LAYER = re.compile(r"(\w+_blocks\.\d+)\.1\.transformer_blocks\.(\d+)\.|(middle_block\.[12])\.")
PUBLISHED["UNET-SSD-1B"] = {
    name: shape
    for name, shape in PUBLISHED["UNET-XL-SD"].items()
    if not (match := _SSD_LAYER.match(name)) or (match[1] and int(match[2]) < _SSD_LAYERS.get(match[1], 10))
}
_CONVERTERS = {
    "unet": ("model.diffusion_model.", oracle.convert_ldm_unet_checkpoint),
    "vae": ("first_stage_model.", oracle.convert_ldm_vae_checkpoint),
    "controlnet": ("control_model.", oracle.convert_controlnet_checkpoint),
}


@cache
def diffusers_names(kind: str, network: str) -> dict[str, str]:
    """{diffusers' name: original name} of one of PUBLISHED, by diffusers' converter: every tensor holds its number."""
    names = list(PUBLISHED[network])
    prefix, convert = _CONVERTERS[kind]
    numbers = {
        prefix + name: torch.full((1, 1, 1, 1) if name.endswith("weight") else (1,), float(i))
        for i, name in enumerate(names)
    }
    config = {"layers_per_block": 2} | dict.fromkeys(("down_block_types", "up_block_types"), [""] * 4)
    config |= {"addition_embed_type": "text_time"} if "XL" in network else {}
    return {new: names[int(value.flatten()[0])] for new, value in convert(numbers, config).items()}


def write_original(kind: str, network: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a small network under the names that its like, one of PUBLISHED, has in files."""
    names = diffusers_names(kind, network)
    # In files an autoencoder's attention is 1x1 convolutions.
    convolved = {name for name, v in tensors.items() if kind == "vae" and ".attentions." in name and v.ndim == 2}
    return {names[name]: v[..., None, None] if name in convolved else v for name, v in tensors.items()}


def write_open_clip(tensors: dict[str, np.ndarray], unused: int = 0) -> dict[str, np.ndarray]:
    """A text encoder of transformers under OpenCLIP's names, with layers on top that are not used."""
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    around = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    written = {new: tensors[f"text_model.{old}"] for old, new in around.items()}
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

"""Find the files of an IP-Adapter and of the image encoder that it was trained with."""

import os
from pathlib import Path

from ..models.config import CLIPVisionConfig
from ..models.ip_adapter import IPAdapterConfig
from . import hub
from .files import Component, open_part

# On the Hub, by (feature width, whether they are hidden states): ViT-H and bigG.
_VIT_H = "h94/IP-Adapter/models/image_encoder/model.safetensors"
_BIG_G = "h94/IP-Adapter/sdxl_models/image_encoder/model.safetensors"
_ENCODERS = {(1024, False): _VIT_H, (1280, True): _VIT_H, (1280, False): _BIG_G, (1664, True): _BIG_G}


def open_ip_adapter(
    source: str | os.PathLike, image_encoder: str | os.PathLike | None = None, *, float16: bool = False
) -> tuple[Component, Component]:
    """Find an IP-Adapter and its image encoder, and download missing files. No weights are read.

    Args:
        source: a local file, or one on the Hub as ``owner/name:file``.
        image_encoder: a folder, file or Hub id. Default: a folder image_encoder near the file, else from the Hub.

    Raises ValueError or OSError, one line, for files that cannot be found, read or used together.
    """
    name = os.fspath(source)
    if not os.path.exists(os.path.expanduser(name)) and (match := hub.FILE.fullmatch(name)) and match["file"]:
        source = f"{match['repo']}/{match['file']}"
    adapter = open_part(source, "ip_adapter", float16=float16)
    config = IPAdapterConfig.from_dict(adapter.config)
    needed = config.image_width, config.reads_hidden_states
    if image_encoder is None:
        encoder = _beside(adapter.files[0].parent, needed, float16)
        if encoder is None and needed not in _ENCODERS:
            raise ValueError(f"{name} needs features of width {needed[0]}, of an unknown image encoder: give one")
        encoder = encoder or open_part(_ENCODERS[needed], "image_encoder", float16=float16)
    else:
        encoder = open_part(image_encoder, "image_encoder", float16=float16)
    if (width := _width(encoder, needed[1])) != needed[0]:
        text = f"{image_encoder} gives features of width {width}, {name} needs {needed[0]}"
        raise ValueError(f"{text}: give the encoder that it was trained with")
    return adapter, encoder


def _width(encoder: Component, is_state: bool) -> int:
    config = CLIPVisionConfig.from_dict(encoder.config)
    return config.hidden_size if is_state else config.projection_dim


def _beside(folder: Path, needed: tuple[int, bool], float16: bool) -> Component | None:
    """Return the matching encoder in a folder image_encoder: beside the file, above it, or as in h94/IP-Adapter."""
    for place in (folder, folder.parent, folder.parent / "models"):
        if (place / "image_encoder" / "config.json").is_file():
            encoder = open_part(place / "image_encoder", "image_encoder", float16=float16)
            if _width(encoder, needed[1]) == needed[0]:
                return encoder
    return None

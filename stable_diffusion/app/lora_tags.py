"""Read the LoRA tags of prompts, in the form of AUTOMATIC1111's web UI.

    <lora:name>  <lora:name:0.8>  <lora:name:0.5:0.8>  <lora:name:te=0.5:unet=0.8>

The first scale is for the text encoders, the second for the UNet; a single one is for both. <lyco:...> is read as
<lora:...>.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from ..lora.delta import Scale, scale_of
from ..models.config import listed
from .infotext import number

TAG = re.compile(r"\s*<(lora|lyco|hypernet)\\?:([^<>]*)>", re.IGNORECASE)
_COLON = re.compile(r"\\?:")  # in records, colons inside brackets may have a backslash
_COMFYUI = re.compile(r"(?<!\w)embedding:([^\s,:()\[\]{}|]+)")
_NAMED = re.compile(r"(te|unet)=(.*)", re.DOTALL)


def read_loras(prompt: str) -> tuple[tuple[str, Scale], ...]:
    """Return (name, scale) of each LoRA. Raises ValueError for a tag without a name or with an invalid scale."""
    tags = (match for match in TAG.finditer(prompt) if match[1].lower() != "hypernet")
    return tuple(_read(match)[:2] for match in tags)


def write_tag(name: str, scale: Scale) -> str:
    """Write the tag of a LoRA."""
    te, unet = (number(float(scale_of(scale, network))) for network in ("text_encoder", "unet"))
    return f"<lora:{name}:{te}>" if te == unet else f"<lora:{name}:{te}:{unet}>"


def remarks(prompts: Iterable[tuple[str, str]], embeddings: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line for each LoRA and each embedding that has no effect.

    ``prompts`` are pairs (prompt, negative prompt), ``embeddings`` the words of each file.
    """
    prompts = list(prompts)
    lines = [line for pair in prompts for line in _of_tags(*pair)]
    text = TAG.sub("", "\n".join(chain.from_iterable(prompts))).casefold()
    for path, words in embeddings.items():
        if not any(word.casefold() in text for word in words):
            lines.append(f"the embedding {path} has no effect: no prompt contains {listed(words)}")
    known = {word.casefold() for words in embeddings.values() for word in words}
    for name in _COMFYUI.findall(text):
        if known.isdisjoint({name, os.path.splitext(name)[0]}):
            lines.append(f"the prompt names embedding:{name:.60}, which is not loaded; give its file with embedding")
    return list(dict.fromkeys(lines))


def _of_tags(prompt: str, negative_prompt: str) -> Iterator[str]:
    for match in TAG.finditer(prompt):
        tag = match[0].strip()
        if match[1].lower() == "hypernet":
            yield f"{tag:.100}: hypernetworks are not supported; the tag is ignored"
        elif unused := _read(match)[2]:
            yield f"{tag:.100}: {unused:.60} is not supported and ignored"
    if match := TAG.search(negative_prompt):
        yield f"{match[0].strip():.100} has no effect in the negative prompt; write it in the prompt"


def _read(match: re.Match[str]) -> tuple[str, Scale, str]:
    """Return the name of a tag, its scale, and its unsupported items, such as "dyn=8"."""
    name, *items = map(str.strip, _COLON.split(match[2]))
    if not name:
        raise ValueError(f"{match[0].strip():.100} names no LoRA; write <lora:name:0.8>")
    named = dict(found.groups() for item in items if (found := _NAMED.fullmatch(item)))
    places = [item for item in items if "=" not in item]
    te = named.get("te", places[0] if places else "1")
    scales = [te, named.get("unet", places[1] if len(places) > 1 else te)]
    for i, text in enumerate(scales):
        try:
            scales[i] = float(text)
        except ValueError:
            scales[i] = math.nan
        if not math.isfinite(scales[i]):
            raise ValueError(f"{match[0].strip():.100}: the scale {text!r:.40} is not a number; write <lora:name:0.8>")
    unused = [*(item for item in items if "=" in item and not _NAMED.fullmatch(item)), *places[2:]]
    return name, scales[0] if scales[0] == scales[1] else (scales[0], scales[1]), ", ".join(unused)

"""Read the metadata of other programs: the text of the web UI, or JSON objects under many names.

Fooocus, InvokeAI, NovelAI, SwarmUI, Easy Diffusion, Draw Things and mflux differ only in their keys, so one table maps
these to the web UI's names, which ``infotext`` reads. ComfyUI graphs are read if they have one sampler.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import PurePath
from typing import Any

from ..files.text import parse_json
from ..weights.layout import SUFFIXES
from . import infotext

Arguments = tuple[dict[str, Any], dict[str, str]]

_TEXTS = ("parameters", "Comment", "invokeai_metadata", "sd-metadata", "ImageDescription", "Description")
_PROMPT, _NEGATIVE = "Prompt", "Negative prompt"
# The web UI's name -> the keys of other programs, in lower case, without blanks and punctuation.
_KEYS = {
    _PROMPT: ("prompt", "positiveprompt", "c"),
    _NEGATIVE: ("negativeprompt", "uc"),
    "Prompt 2": ("prompt2", "positivestyleprompt"),
    "Negative prompt 2": ("negativeprompt2", "negativestyleprompt"),
    "Steps": ("steps", "numinferencesteps", "numsteps"),
    "Sampler": ("sampler", "samplername"),
    "Schedule type": ("scheduler",),
    "CFG scale": ("guidancescale", "cfgscale", "cfg", "guidance", "scale"),
    "Seed": ("seed", "noiseseed"),
    "Variation seed": ("variationseed",),  # of SwarmUI
    "Variation seed strength": ("variationseedstrength",),
    "Size": ("resolution", "size"),
    "Denoising strength": ("denoisingstrength", "strength", "promptstrength", "denoise"),
    "Eta": ("eta",),
    "Model": ("basemodel", "model", "modelname", "modelweights", "usestablediffusionmodel", "stablediffusionmodel"),
    "VAE": ("vae", "usevaemodel"),
}
_LORAS = ("loras", "lora", "useloramodel", "lorapaths")
_LORA_WEIGHTS = ("loraweights", "loraalpha", "lorascales")
_WRAPPERS = ("sui_image_params", "image")  # of SwarmUI, of InvokeAI 2
# A mark in the texts of a program -> its noise generator, where the texts do not name one; the first match counts. The
# last mark is in the texts of the web UI, which draws its noise on a GPU.
_GENERATORS = {
    "stable-diffusion-mlx": None,
    "Version: Fooocus": "torch",
    "Version: ComfyUI": "torch",
    '"metadata_scheme"': "torch",  # of Fooocus
    '"rand_device": "cpu"': "torch",  # of InvokeAI
    '"sui_image_params"': "torch",  # of SwarmUI, which runs ComfyUI
    '"class_type"': "torch",  # of ComfyUI, except the noise that samplers add
    "\nSteps: ": "cuda",
}
# Of ComfyUI's node for SDXL: a size or a corner -> the keys of its vertical and its horizontal number.
_SIZES = {
    "original_size": ("height", "width"),
    "crop": ("crop_h", "crop_w"),
    "target_size": ("target_height", "target_width"),
}
_GRAPH = "holds a ComfyUI graph; only graphs with one KSampler and plain text prompts can be read"


def read(texts: Mapping[str, str]) -> Arguments | None:
    """Read the texts of an image: values by the names of a request's fields, and all other settings.

    Returns None if there is neither a prompt nor a setting. Raises ValueError for an unsupported graph.
    """
    found = _read(texts)
    if found is None or "RNG" in found[1] or "noise_source" in found[0]:
        return found
    text = "\n".join(texts.values())
    source = next((source for mark, source in _GENERATORS.items() if mark in text), None)
    return (found[0] | ({"noise_source": source} if source else {}), found[1])


def _read(texts: Mapping[str, str]) -> Arguments | None:
    objects = {key: values for key in (*_TEXTS, "prompt", "workflow") if (values := _object(texts.get(key)))}
    for key in (key for key in _TEXTS if key in texts):
        if key in objects:
            prompt = {"prompt": texts.get("Description", "")} if key == "Comment" else {}  # of NovelAI
            found = _arguments(prompt | objects[key])
        else:
            found = infotext.to_arguments(*infotext.read(texts[key]))
        arguments, other = found
        if arguments.keys() - {"prompt", "negative_prompt"} or (arguments["prompt"] and (other or key in objects)):
            return found
    if "prompt" in objects or "workflow" in objects:
        values, of_xl = _read_graph(objects.get("prompt") or objects["workflow"])
        arguments, other = _arguments(values)
        return arguments | of_xl, other
    arguments, other = _arguments(texts)  # of Easy Diffusion: each value is a separate text
    return (arguments, other) if arguments.keys() & {"seed", "steps"} else None


def _object(text: str | None) -> dict[str, Any]:
    """Parse a text as a JSON object, without the objects around its values; {} for another text."""
    values: dict[str, Any] = {}
    with suppress(ValueError):
        values = parse_json(text or "", "a text")
    for wrapper in _WRAPPERS:
        if isinstance(values.get(wrapper), dict):
            values = values | values.pop(wrapper)
    return values


def _arguments(values: Mapping[str, Any]) -> Arguments:
    match values.get("v2"):
        case {"separateOpenClipG": True, "openClipGText": str(text)}:  # of Draw Things
            values = {**values, "prompt_2": text}
    names = {re.sub(r"\W|_", "", key.lower()): key for key in values}
    by_key = {key: values[name] for key, name in names.items()}
    texts = {key: text for key, value in by_key.items() if (text := _text(value))}
    known = {name: texts.pop(key) for name, keys in _KEYS.items() for key in keys if key in texts}
    if "Sampler" not in known and "Schedule type" in known:  # of InvokeAI and diffusers it is the sampler
        known["Sampler"] = known.pop("Schedule type")
    if len(sides := re.findall(r"\d+", known.get("Size", ""))) == 2:
        known["Size"] = "x".join(sides)
    elif {"width", "height"} <= texts.keys():
        known["Size"] = f"{texts.pop('width')}x{texts.pop('height')}"
    loras = {name: weight for name, weight in _loras(by_key) if name not in ("", "None")}
    tags = "".join(f" <lora:{name}:{weight}>" for name, weight in loras.items())
    prompt, negative = known.pop(_PROMPT, ""), known.pop(_NEGATIVE, "")
    arguments, other = infotext.to_arguments(prompt + tags, negative, known)
    return arguments, other | {names[key]: text for key, text in texts.items() if "lora" not in key}


def _text(value: Any) -> str:
    """Write a value as the web UI does; "" for an empty value or another type."""
    match value:
        case bool() | None | "None" | "[]":
            return ""
        case str() | int() | float():
            return infotext.number(value)
        case {"model_name": str(name)} | {"name": str(name)} | {"prompt": str(name)}:
            return name
        case [{"prompt": str()}, *_]:  # of InvokeAI 2
            return ", ".join(map(_text, value))
    return ""


def _loras(by_key: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    names, weights = (
        next((value if isinstance(value, list) else [value] for key in keys if (value := by_key.get(key))), [])
        for keys in (_LORAS, _LORA_WEIGHTS)
    )
    rows = [*zip(names, [*weights, *[1] * len(names)], strict=False)]
    # of Fooocus, in its log "LoRA 1": "name : 0.5", or "True : name : 0.5"
    texts = ((key, value) for key, value in by_key.items() if isinstance(value, str))
    rows += [(text.split(" : ")[-2:], 1) for key, text in texts if re.fullmatch(r"lora(combined)?\d+", key)]
    for name, weight in rows:
        match name:
            case [name, weight, *_]:
                pass
            case {"model": name, "weight": weight} | {"lora": name, "weight": weight}:
                pass
        path = PurePath(_text(name).replace("\\", "/"))
        yield path.stem if path.suffix in SUFFIXES else path.name, _text(weight)


def _read_graph(graph: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a ComfyUI graph with one KSampler, and those for XL by the names of a request's fields."""
    nodes = {
        key: node for key, node in graph.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }
    samplers = [node["inputs"] for node in nodes.values() if str(node.get("class_type")).startswith("KSampler")]
    if len(samplers) != 1:
        raise ValueError(_GRAPH)
    (sampler,) = samplers

    def inputs(source: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        link = source.get(name)
        return nodes.get(str(link[0]), {}).get("inputs", {}) if isinstance(link, list) and link else {}

    encoders = {name: inputs(sampler, name) for name in ("positive", "negative")}
    texts = {name: node.get("text", node.get("text_l")) for name, node in encoders.items()}
    seconds = [node.get("text_g", "") for node in encoders.values()]
    if not all(isinstance(text, str) for text in (texts["positive"], *seconds)):
        raise ValueError(_GRAPH)
    of_xl = _of_xl("", encoders["positive"]) | _of_xl("negative_", encoders["negative"])
    source, loras = inputs(sampler, "model"), []
    while "lora_name" in source and len(loras) < len(nodes):
        loras.append([source["lora_name"], source.get("strength_model", 1)])
        source = inputs(source, "model")
    size = inputs(sampler, "latent_image")
    settings = {
        **{name: value for name, value in sampler.items() if not isinstance(value, list)},
        **{name: size[name] for name in ("width", "height") if name in size},
        "prompt": texts["positive"],
        "negative_prompt": texts["negative"],
        "model": source.get("ckpt_name"),
        "loras": loras,
    }
    return settings, of_xl


def _of_xl(prefix: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the SDXL settings of a ComfyUI node: the second encoder's text, and sizes as (height, width)."""
    found = {}
    if "text_g" in node and node["text_g"] != node.get("text_l"):
        found[f"{prefix}prompt_2"] = node["text_g"]
    for name, keys in _SIZES.items():
        if all(isinstance(node.get(key), int) for key in keys):
            found[prefix + name] = tuple(node[key] for key in keys)
    return found

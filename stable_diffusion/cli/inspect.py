"""Say what a file or a folder is, from names, shapes and configurations.

    python -m stable_diffusion.inspect PATH

PATH is a checkpoint, a network of one, a LoRA or an embedding: a folder, a file, an alias, or a Hub id whose files are
in the cache. No weights are read (of a LoRA its alphas, of an embedding its few vectors), nothing is downloaded. Or it
is a picture, of which is said how it was made, if it says so itself.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..images.image import SUFFIXES as IMAGES
from ..images.image import read_text
from ..lora.files import Change, locate, read_lora
from ..lora.names import read_key
from ..models.config import readable
from ..weights import layout
from ..weights.embeddings import read_embedding
from ..weights.files import Checkpoint, Component, open_checkpoint, open_part, read_tensors
from ..weights.formats.single_file import find, read_config
from ..weights.quantize import read_quantization
from .parser import Parser

Report = dict[str, Any]  # what JSON can hold

_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}  # of encoded prompts
_REFINER = "Stable Diffusion XL refiner"
_READS = {5: "depth maps", 8: "images to edit", 9: "masked images"}  # beside the latent, by a UNet's channels
_UNSEEN = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # what a terminal would follow, or cannot show
_RECORD = "stable_diffusion"  # the text of a picture that is one
_XL_SCALE = 0.13025  # of XL's VAE; all others have 0.18215
_KIND_OF_CLASS = {
    "UNet2DConditionModel": "unet",
    "AutoencoderKL": "vae",
    "AutoencoderTiny": "vae",
    "ControlNetModel": "controlnet",
    "T2IAdapter": "controlnet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
    "DPTForDepthEstimation": "depth_estimator",
}
_TARGETS = re.compile(
    r"(attn1|attn2|self_attn|ff|mlp|proj_in|proj_out|resnets|downsamplers|upsamplers|conv_in|conv_out|time_emb)"
)
_TOLD = ("modelspec.title", "modelspec.architecture", "modelspec.trigger_phrase", "ss_base_model_version")


def inspect(source: str | os.PathLike, *, revision: str | None = None) -> Report:
    """What ``source`` is, as a dictionary that JSON can hold.

    Raises ValueError or OSError, one line, for what is not there, damaged, or of no use to this library.
    """
    with readable(f"{source}"):
        path = Path(source).expanduser()
        if path.is_file():
            return _of_file(path)
        try:
            return _of_checkpoint(open_checkpoint(source, revision=revision))
        except (ValueError, OSError):
            if not (path / layout.INDEX).is_file():
                for attempt in (_of_part, _of_lora):
                    with suppress(ValueError, OSError):
                        return attempt(source)
            raise


# --- checkpoints and their networks ------------------------------------------------------------------------------


def _of_checkpoint(checkpoint: Checkpoint) -> Report:
    unet = checkpoint.components["unet"].config
    report = {"kind": "checkpoint", "family": _family(unet), "pipeline": checkpoint.pipeline}
    if reads := _READS.get(unet.get("in_channels", 4)):
        report["reads"] = reads
    report["prediction"] = checkpoint.scheduler.get("prediction_type", "epsilon")
    report["scheduler"] = checkpoint.scheduler["_class_name"]
    report |= {"steps": checkpoint.steps, "guidance": checkpoint.guidance}
    return report | _networks(checkpoint.components.values())


def _of_part(source: str | os.PathLike) -> Report:
    """A folder or a repository with the files of one network in its root."""
    found = open_part(source, "vae")  # whatever it is, its config says
    kind = _KIND_OF_CLASS.get(_class(found.config))
    if kind is None:
        raise ValueError(f"{source} is a {_class(found.config)}, which this library does not read")
    return _of_network(open_part(source, kind))


def _of_network(component: Component) -> Report:
    report = {"kind": component.name}
    if "cross_attention_dim" in component.config:
        report["family"] = _family(component.config)
    elif component.config.get("scaling_factor") == _XL_SCALE:
        report["family"] = _WIDTHS[2048]
    return report | _networks([component])


def _networks(components: Iterable[Component]) -> Report:
    parts = {component.name: _network(component) for component in components}
    total = {key: sum(part[key] for part in parts.values()) for key in ("parameters", "bytes")}
    return total | {"parts": parts}


def _network(component: Component) -> Report:
    """Sizes and types of a network's weights; packed ones count as what they stand for."""
    tensors = read_tensors(component)
    config = component.config
    quantization = read_quantization(config)
    packed = {name.removesuffix(".scales") for name in tensors if quantization and name.endswith(".scales")}
    parameters = 0
    types: Counter[str] = Counter()
    for name, value in tensors.items():
        layer, _, role = name.rpartition(".")
        if layer not in packed or role not in ("weight", "scales", "biases"):
            parameters += value.size
        elif role == "scales":
            parameters += value.size * quantization[1]
        types[_type(value)] += value.nbytes
    report = {
        "class": _class(config),
        "parameters": parameters,
        "bytes": sum(types.values()),
        "types": dict(types.most_common()),
        "files": len(component.files),
    }
    return report | ({"bits": quantization[0], "group_size": quantization[1]} if quantization else {})


def _class(config: Mapping[str, Any]) -> str:
    return config.get("_class_name") or (config.get("architectures") or ["unknown"])[0]


def _family(config: Mapping[str, Any]) -> str:
    """Of a UNet or a ControlNet: by what it is told beside the prompt, and the width of that."""
    width = config.get("cross_attention_dim", 0)
    width = max(width) if isinstance(width, list) else width
    if config.get("addition_embed_type") == "text_time":
        return _REFINER if width == 1280 else _WIDTHS[2048]
    return _WIDTHS[1024] if config.get("use_linear_projection") else _WIDTHS[768]


def _type(value: mx.array) -> str:
    return str(value.dtype).removeprefix("mlx.core.")


# --- files -------------------------------------------------------------------------------------------------------


def _of_file(path: Path) -> Report:
    if path.suffix.lower() in IMAGES:
        return _of_image(path)
    if path.suffix not in layout.SUFFIXES:
        raise ValueError(f"{path} is no file of weights: these end in {', '.join(layout.SUFFIXES)}")
    try:
        return _of_checkpoint(open_checkpoint(path, tokenizer=path.parent))
    except ValueError as error:
        reason = str(error)  # it lacks a network, or is no checkpoint
    try:
        tensors = read_tensors(Component("file", {}, (path,)))
    except ValueError:
        if path.suffix != ".safetensors":
            with suppress(ValueError):
                return _of_embedding(path)
        raise
    if any(map(read_key, tensors)):
        return _of_lora(path)
    if len(tensors) <= 2:
        with suppress(ValueError):
            return _of_embedding(path)
    components = [
        Component(kind, read_config(kind, tensors, prefix, str(path)), (path,), prefix)
        for kind, prefix in find(tensors, str(path)).items()
    ]
    if len(components) == 1:
        return _of_network(components[0])
    return {"kind": "parts of a checkpoint", "note": reason} | _networks(components)


def _of_image(path: Path) -> Report:
    """The texts of a picture, and of the one that is a record what it says."""
    texts: Report = read_text(path)
    with suppress(ValueError, RecursionError):
        texts |= {"stable_diffusion": json.loads(texts.get("stable_diffusion", ""))}
    return {"kind": "image"} | (texts or {"note": "it does not say how it was made"})


def _of_embedding(path: Path) -> Report:
    word, vectors = read_embedding(path)
    widths = [v.shape[1] for v in vectors]
    family = _WIDTHS[2048] if len(widths) > 1 else _WIDTHS.get(widths[0], "unknown")
    return {"kind": "embedding", "family": family, "word": word, "vectors": len(vectors[0]), "widths": widths}


def _of_lora(source: str | os.PathLike) -> Report:
    path = locate(source)
    lora = read_lora(path)
    tensors = [value for change in lora.changes for value in change.factors.values()]
    ranks = sorted({rank for change in lora.changes if (rank := _rank(change)) is not None})
    alphas = sorted({round(change.multiplier * rank, 6) for change in lora.changes if (rank := _rank(change))})
    targets: dict[str, Counter[str]] = {}
    for change in lora.changes:
        found = _TARGETS.search(change.layer)
        targets.setdefault(change.network, Counter())[found[1] if found else change.layer] += 1
    report = {
        "kind": " and ".join(sorted({_kind(change) for change in lora.changes})),
        "family": _family_of_lora(lora.changes),
        "ranks": ranks,
        "alphas": alphas,
        "parameters": sum(value.size for value in tensors),
        "bytes": sum(value.nbytes for value in tensors),
        "types": dict(Counter(map(_type, tensors))),
        "targets": {network: dict(sorted(kinds.items())) for network, kinds in targets.items()},
    }
    report |= {"not recognised": list(lora.unknown)} if lora.unknown else {}
    return report | {key: lora.metadata[key] for key in _TOLD if key in lora.metadata}


def _kind(change: Change) -> str:
    factors = change.factors
    name = next((name for sign, name in _LORA_KINDS.items() if any(role.startswith(sign) for role in factors)), "LoRA")
    return f"{name} (DoRA)" if {"dora_scale", "lora_magnitude_vector"} & factors.keys() else name


_LORA_KINDS = {"hada": "LoHa", "lokr": "LoKr", "diff": "whole differences"}


def _rank(change: Change) -> int | None:
    """None for changes that have none."""
    roles = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((change.factors[role].shape[0] for role in roles if role in change.factors), None)


def _family_of_lora(changes: Iterable[Change]) -> str:
    """By the width of the prompt that cross-attention reads, or else of a text encoder."""
    widths = {
        change.factors["down"].shape[1]
        for change in changes
        if change.network == "unet" and change.layer.endswith("attn2_to_k") and "down" in change.factors
    }
    if not widths:
        return _WIDTHS[2048] if any(change.network == "text_encoder_2" for change in changes) else "unknown"
    width = widths.pop()
    return _REFINER if width == 1280 else _WIDTHS.get(width, f"unknown (prompts {width} wide)")


# --- command line ------------------------------------------------------------------------------------------------


def _lines(report: Report) -> Iterable[str]:
    """The report as aligned lines of text."""
    rows = [(key, _text(key, value)) for key, value in report.items() if key not in ("parts", "targets", _RECORD)]
    rows += [(key, _text(key, value)) for key, value in _said(report.get(_RECORD, {}))]
    rows += [(network, _text("targets", kinds)) for network, kinds in report.get("targets", {}).items()]
    parts = report.get("parts", {})
    rows += [(name, "") for name in parts]
    width = max(len(key) for key, _ in rows)
    for key, text in rows[: len(rows) - len(parts)]:
        yield f"{key:{width}}  {text}".replace("\n", "\n" + " " * (width + 2))
    columns = [_columns(part) for part in parts.values()]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    for name, row in zip(parts, columns, strict=True):
        cells = (
            f"{cell:>{w}}" if i in (0, 1) else f"{cell:{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield f"{name:{width}}  {'  '.join(cells)}".rstrip()


def _said(record: Any) -> Iterable[tuple[str, Any]]:
    """(name, value) of what a record says, without what is empty or off."""
    for name, value in record.items() if isinstance(record, dict) else [(_RECORD, record)]:
        if isinstance(value, dict) and name != "files":
            yield from _said(value)
        elif isinstance(value, dict):
            yield from value.items()
        elif value not in (None, False, "", []):
            yield name, value


def _columns(part: Report) -> tuple[str, ...]:
    details = [f"{part['bits']} bits in groups of {part['group_size']}"] if "bits" in part else []
    details += [f"{part['files']} files"] if part["files"] > 1 else []
    return (
        _text("parameters", part["parameters"]),
        _text("bytes", part["bytes"]),
        "+".join(name for name in part["types"] if name != "uint32"),  # of packed weights, which the bits tell of
        part["class"],
        ", ".join(details),
    )


def _text(key: str, value: Any) -> str:
    if key == "bytes":
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    if isinstance(value, list):
        return ", ".join(":".join(map(str, v)) if isinstance(v, list) else str(v) for v in value) or "none"
    if key == "parameters" and isinstance(value, int):
        return f"{value:,}"
    return _UNSEEN.sub("\ufffd", str(value))


def make_parser(prog: str | None = None) -> Parser:
    """The parser of this command line, under the name ``prog``."""
    parser = Parser(
        prog=prog or "stable_diffusion.inspect",
        description="Say what a model, a part of one or a LoRA is, or how an image was made.",
    )
    parser.add_argument("path", help="a folder, a file, an image, an alias, or a Hub id that is in the cache")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository (main)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_version()
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: those of the process); returns the exit code."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # read by the Hub's client when it is first needed, which is after this
    try:
        report = {"path": args.path} | inspect(args.path, revision=args.revision)
    except ConnectionError:
        parser.error(f"{args.path} is neither here nor in the Hub's cache: load it once, or give a path")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    text = json.dumps(report, indent=2, ensure_ascii=False) if args.json else "\n".join(_lines(report))
    print(text.encode("utf-8", "backslashreplace").decode())  # a path may hold what is no Unicode
    return 0


if __name__ == "__main__":
    sys.exit(main())

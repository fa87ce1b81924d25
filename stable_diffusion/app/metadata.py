"""Write the settings of an image into its file, and read them: the request, field by field.

"parameters" is the text that many programs read (see ``infotext``). "stable_diffusion" is a record in JSON: the request
of this one image ("arguments"), the values that the model added ("made"), the input files with their hashes ("files"),
and the versions and device ("software").
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from ..diffusion.choice import guidance_scale, read_name
from ..files.text import parse_json
from ..images.files import read_text
from ..lora.files import locate
from ..lora.folders import find_in
from ..models.config import listed
from ..pipeline import StableDiffusion
from ..unconditional import UnconditionalDiffusion
from ..weights.files import open_part
from ..weights.ip_adapters import open_ip_adapter
from ..weights.layout import SUFFIXES, VOCABULARY
from ..weights.parts import FAMILIES, family_of
from ..weights.quantize import read_quantization
from . import foreign, infotext
from .batches import Batch
from .fingerprints import HASHES, fingerprint, lora_hash, model_hash
from .lora_tags import write_tag
from .request import KINDS, Request
from .sources import PICTURES, map_sources, short_names

_open_part, _open_ip_adapter = cache(open_part), cache(open_ip_adapter)


@dataclass(frozen=True)
class Record:
    """Hold the record of an image: values by the names of a request's fields, and all other settings.

    ``other`` are settings of another program that have no field. ``details`` is the whole record.
    """

    path: str
    arguments: Mapping[str, Any]
    other: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def read_record(path: str | os.PathLike) -> Record:
    """Read the settings of an image; raises ValueError, one line, if none are recorded."""
    texts = read_text(path)
    with suppress(ValueError):
        details = parse_json(texts.get("stable_diffusion", ""), path)
        if isinstance(arguments := details.get("arguments"), dict):
            if arguments.pop("float16", None) is False:  # version 0.1 records the type like this
                arguments.setdefault("dtype", "float32")
            return Record(str(path), arguments, details=details)
    remedy = "write a prompt and settings instead"
    try:
        found = foreign.read(texts)
    except ValueError as error:
        raise ValueError(f"{path} {error}; {remedy}") from None
    if found is None:
        raise ValueError(f"{path} does not record how it was made; {remedy}")
    arguments, other = found
    # Other programs read braces and brackets for alternatives as text.
    return Record(str(path), arguments | {"resolved_prompt": arguments.get("prompt")}, other)


def for_model(record: Record, requests: Sequence[Request], model: StableDiffusion) -> list[Request]:
    """Return requests that repeat an image with this model, without web UI settings for other models.

    These are clip skip, for Stable Diffusion 1, and the image guidance scale, for models for instructions.
    """
    if record.details:
        return list(requests)
    unused = {} if family_of(model.sources["unet"].component.config) is FAMILIES["sd1"] else {"clip_skip": 0}
    unused |= {} if model.mode == "instructions" else {"image_cfg": None}
    return [
        r.with_values(**{k: v for k, v in unused.items() if r.value(k) == record.arguments.get(k)}) for r in requests
    ]


def remarks(record: Record, script: str, unknown: list[str], has_model: bool) -> Iterator[str]:
    """Yield a line for each part of a record that a repeated request cannot use."""
    path, details, other = record.path, record.details, dict(record.other)
    if details.get("script", script) != script:
        yield f"{path} was made with {details['script']}; settings that only it has are omitted"
    elif unknown:
        yield f"{path} has unknown settings, which are ignored: {listed(unknown)}"
    if "partial" in details:
        yield f"{path} is a partial image ({details['partial']}); all steps run here"
    if (model := other.pop("Model", None)) and not has_model:
        yield f"{path} was made with the model {model}, which is not chosen automatically; choose one with --model"
    if not details:
        unused = listed(f"{name} {value}" for name, value in other.items())
        source = record.arguments.get("noise_source")
        noise = f"its noise is drawn as {source} draws it" if source else "its random numbers differ"
        text = f"{path} was made by another program: expect a similar picture, not the same ({noise})"
        yield text + (f"; ignored: {unused}" if unused else "")


def changes(record: Record, model: StableDiffusion, batch: Batch) -> Iterator[str]:
    """Yield a line for each file and version that differs from those of the original image."""
    current, before, files = _details(model, batch, 0), record.details.get("software"), record.details.get("files")
    now = current["software"]
    if versions := [f"{name} {before[name]} (now {now[name]})" for name in _changed(before, now)]:
        yield f"{record.path} was made with {listed(versions)}: the picture may differ"
    if isinstance(files, dict):
        before = {
            name: next((files[key] for key in files if f"/{key}".endswith(f"/{name}")), None)
            for name in current["files"]
        }
        others = [name for name, now in current["files"].items() if HASHES & _changed(before[name], now).keys()]
        if others:
            yield f"these files differ from those that {record.path} was made with: {listed(others)}"


def _changed(before: Any, now: Mapping[str, str]) -> dict[str, str]:
    """Return the values of ``now`` that differ from ``before``, which may be missing or damaged."""
    before = before if isinstance(before, dict) else now
    return {name: value for name, value in now.items() if before.get(name, value) != value}


def describe(
    model: StableDiffusion, batch: Batch, index: int, partial: str = "", full_paths: bool = False
) -> dict[str, str]:
    """Return the texts for image ``index`` of a batch: {"parameters": ..., "stable_diffusion": ...}.

    ``model`` is the one of the request, even if a refiner finished the image. ``partial`` is the progress of an
    unfinished image, such as "step 12 of 20". Files are named without their folders, unless ``full_paths``.
    """
    request, details = batch.requests[index], _details(model, batch, index, full_paths)
    details |= {"partial": partial} if partial else {}
    loras = [(_lora_name(source), scale) for source, scale in request.lora] + [*request.prompt_loras]
    tags = "".join(f" {write_tag(name, scale)}" for name, scale in loras)
    others = _others(model, request) | {"Partial": partial or None, "Version": f"stable-diffusion-mlx {__version__}"}
    fields = details["arguments"] | details["made"]
    text = infotext.write(request.text + tags, request.negative_prompt, fields, others)
    return {
        "parameters": text.encode("utf-8", "replace").decode(),
        "stable_diffusion": json.dumps(details, default=str),
    }


def _details(model: StableDiffusion, batch: Batch, index: int, full_paths: bool = False) -> dict[str, Any]:
    request, defaults = batch.requests[index], batch.defaults
    names = {} if full_paths else short_names(request)
    sampler = request.options.sampler or defaults.sampler
    name, schedule = read_name(sampler)
    components = {source.component.name: source for source in model.sources.values()}
    bits = {name: s.quantization or read_quantization(s.component.config) for name, s in components.items()}
    made = {
        "size": batch.size,
        "cfg": guidance_scale(sampler, request.cfg, defaults.cfg_weight),
        "sampler": name,
        "schedule": request.options.schedule or schedule or model.schedule.config.sigma_schedule,
        "bits": {name: quantization[0] for name, quantization in bits.items() if quantization},
        "batch": batch.seeds,
    }
    steps = defaults.num_steps if request.steps is None else request.steps
    short = map_sources(request, lambda field, source: names.get(source, source))
    arguments = short.to_dict() | {"model": short.model, "n_images": 1, "seed": request.seed, "steps": steps}
    if batch.canvas is None:
        arguments["width"], arguments["height"] = batch.size
    else:
        arguments["strength"] = batch.strength
    if not (request.refiner or request.lora or request.prompt_loras):  # these change the defaults
        arguments |= {"cfg": made["cfg"], "sampler": sampler}
    if request.hires:
        arguments |= {"hires_strength": request.hires_strength, "hires_upscaler": short.hires_upscaler}
    if request.refiner:
        arguments["refiner_start"] = request.refiner_start
    return {
        "script": script_of(model, request),
        "arguments": {name: arguments[name] for name in KINDS if name in arguments},
        "made": made,
        "files": {name: known for name, path in _files(model, request, names).items() if (known := fingerprint(path))},
        "software": {
            "stable_diffusion": __version__,
            "mlx": mx.__version__,
            "device": mx.default_device().type.name,
            "type": model.dtype_name,
        },
    }


def script_of(model: StableDiffusion, request: Request) -> str:
    """Return the command that makes a request's images."""
    if isinstance(model, UnconditionalDiffusion):
        return "unconditional"
    return "txt2image" if request.image is None else "image2image"


def _others(model: StableDiffusion, request: Request) -> dict[str, str | None]:
    """Return the settings that other programs record besides the fields of a request, by their names."""
    networks = enumerate([*request.controlnet, *request.ip_adapter])
    nets = {f"ControlNet {i}": f"Model: {_title(net)}, Weight: {x:g}" for i, (net, x) in networks}
    loras = {name: known for name, _, path in _loras(request, {}) if (known := lora_hash(path))}
    model_digest = model_hash(model.sources["unet"].component.files[0])
    hashes = {"model": model_digest} | {f"lora:{name}": known[:10] for name, known in loras.items()}
    return {
        "Model hash": model_digest,
        "Model": _title(request.model),
        "VAE": request.vae and _title(request.vae),
        "Refiner": request.refiner and _title(request.refiner),
        "Postprocess upscaler": request.upscale and _title(request.upscale),
        **nets,
        "Lora hashes": ", ".join(f"{name}: {known}" for name, known in loras.items()) or None,
        "Hashes": json.dumps(hashes, ensure_ascii=False) if loras else None,
    }


def _title(source: str) -> str:
    """Return the name of a file, a folder or a file on the Hub in other programs; a Hub id stays unchanged."""
    path = Path(source.rpartition(":")[2]).expanduser()
    if path.suffix in SUFFIXES:
        return path.stem
    return path.name if path.is_dir() or path.is_absolute() else source


def _lora_name(source: str) -> str:
    return _title(source).rpartition("/")[2]


# --- files; missing ones are omitted ---------------------------------------------------------------------------------


def _files(model: StableDiffusion, request: Request, names: Mapping[str, str]) -> dict[str, Path]:
    """Return the files that an image depends on, by their names in the record: ``names`` replace paths."""
    files, half = {}, model.dtype != mx.float32
    parts = [source.component for source in model.sources.values()]
    networks = [(getattr(request, part.name, None) or request.model, part) for part in parts]
    others = [(source, "controlnet") for source, _ in request.controlnet]
    others += [(source, "upscaler") for source in request.upscalers] + [(request.refiner, "unet")]
    for source, kind in (other for other in others if other[0]):
        with suppress(ValueError, OSError):
            networks.append((source, _open_part(source, kind, float16=half)))
    for source, _ in request.ip_adapter:
        with suppress(ValueError, OSError):
            networks += [(source, part) for part in _open_ip_adapter(source, float16=half)]
    for source, part in networks:
        # Other files, also those beside the source, are named by their place in a folder or repository.
        file = Path(os.path.expanduser(source))
        name = names.get(source, source)
        files |= {name if path == file else f"{name} {part.name}/{path.name}": path for path in part.files}
    files |= {name: path for _, name, path in _loras(request, names)}

    def add(field: str, source: str) -> str:
        files[names.get(source, source)] = Path(source).expanduser()
        return source

    map_sources(request, add, (*PICTURES, "embedding"))
    if request.tokenizer:
        folder, name = Path(request.tokenizer).expanduser(), names.get(request.tokenizer, request.tokenizer)
        files |= {f"{name} {file}": folder / file for file in VOCABULARY}
    return files


def _loras(request: Request, names: Mapping[str, str]) -> Iterator[tuple[str, str, Path]]:
    """Yield (name in a tag, name in the record, file); the record has a prompt's LoRA as "loras people/bob.pt"."""
    for source, _ in request.lora:
        with suppress(ValueError, OSError):
            yield _lora_name(source), names.get(source, source), locate(source)
    folders = [request.lora_dir] if isinstance(request.lora_dir, str) else request.lora_dir or ()
    roots = {folder: Path(os.path.abspath(os.path.expanduser(folder))) for folder in folders}
    for name, _ in request.prompt_loras:
        with suppress(ValueError, OSError):
            path = find_in(folders, name)
            folder = next(folder for folder, root in roots.items() if path.is_relative_to(root))
            yield name, f"{names.get(folder, folder)} {path.relative_to(roots[folder]).as_posix()}", path

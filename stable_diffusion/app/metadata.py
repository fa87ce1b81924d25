"""Write into a picture how it was made, and read it: the request, field by field.

"parameters" is the text that many programs read (see ``infotext``). "stable_diffusion" is a record in JSON: the request
of this one image ("arguments"), what it came to ("made"), the files it was made from with their hashes ("files"), and
what it was computed with ("software").
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from ..diffusion.samplers import read_name
from ..images.files import read_text
from ..lora.files import find_in, locate
from ..pipeline import StableDiffusion
from ..weights.files import open_checkpoint, open_part
from ..weights.quantize import read_quantization
from . import infotext
from .batches import Batch
from .fingerprints import HASH_KINDS, fingerprint, lora_hash, model_hash
from .request import KINDS, Request

_FILE_FIELDS = ("image", "mask", "depth", "control_image", "embedding")


@dataclass(frozen=True)
class Record:
    """Hold the record of a picture: values by the names of a request's fields, and everything else.

    ``other`` are the settings of another program that are no fields. ``details`` is the whole record.
    """

    path: str
    arguments: Mapping[str, Any]
    other: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def table(self, name: str) -> Mapping[str, Any]:
        """Return a part of the details, such as "files"; it is empty where it is missing or damaged."""
        value = self.details.get(name)
        return value if isinstance(value, dict) else {}


def read_record(path: str | os.PathLike) -> Record:
    """Read how a picture was made; ValueError, one line, where it does not say so."""
    texts = read_text(path)
    try:
        details = json.loads(texts.get("stable_diffusion", ""))
    except (ValueError, RecursionError):
        details = None
    if isinstance(details, dict) and isinstance(details.get("arguments"), dict):
        return Record(str(path), details["arguments"], details=details)
    arguments, other = infotext.as_arguments(texts.get("parameters", ""))
    if not (other or arguments.keys() - {"prompt", "negative_prompt"}):
        raise ValueError(f"{path} does not say how it was made; write a prompt, and settings, in its place")
    return Record(str(path), arguments, other)


def remarks(record: Record, script: str, unknown: list[str], has_model: bool) -> Iterator[str]:
    """Yield a line for each thing in a record that a repeated request does not follow."""
    path, details = record.path, record.details
    if details.get("script", script) != script:
        yield f"{path} was made with {details['script']}; what only that has is left out"
    elif unknown:
        yield f"{path} was made with settings that are not known here: {', '.join(unknown)}"
    if "partial" in details:
        yield f"{path} was not finished ({details['partial']}); here all steps are made"
    if record.other:
        if "Model" in record.other and not has_model:
            yield f"{path} was made with the model {record.other['Model']}; --model chooses one, none is chosen for you"
        unused = ", ".join(f"{name} {value}" for name, value in record.other.items() if name != "Model")
        yield f"{path} is by another program, whose noise is another" + (f"; not used: {unused}" if unused else "")


def changes(record: Record, model: StableDiffusion, batch: Batch) -> Iterator[str]:
    """Yield a line for files and versions that are not those with which a picture was made."""
    current = _details(model, batch, 0)
    before, now = record.table("software"), current["software"]
    if others := [
        f"{name} {before[name]} (now {now[name]})" for name in now if before.get(name, now[name]) != now[name]
    ]:
        yield f"{record.path} was made with {', '.join(others)}: the picture may differ"
    before, now = record.table("files"), current["files"]
    if others := [name for name in now if not _is_same(before.get(name), now[name])]:
        yield f"not the files that {record.path} was made from: {', '.join(others)}"


def _is_same(before: Any, now: Mapping[str, str]) -> bool:
    return not isinstance(before, dict) or all(
        before.get(kind, now[kind]) == now[kind] for kind in HASH_KINDS & now.keys()
    )


def describe(model: StableDiffusion, batch: Batch, index: int, partial: str = "") -> dict[str, str]:
    """Return the texts for image ``index`` of a batch: {"parameters": ..., "stable_diffusion": ...}.

    ``model`` is the one of the request, also where a refiner finished the image. ``partial`` says how far an unfinished
    image came, such as "step 12 of 20".
    """
    details = _details(model, batch, index)
    if partial:
        details["partial"] = partial
    request = batch.requests[index]
    tags = "".join(f" <lora:{name}:{infotext.number(scale)}>" for name, scale in request.prompt_loras)
    text = infotext.write(request.text + tags, request.negative_prompt, _settings(model, request, details))
    return {
        "parameters": text.encode("utf-8", "replace").decode(),
        "stable_diffusion": json.dumps(details, default=str),
    }


def _details(model: StableDiffusion, batch: Batch, index: int) -> dict[str, Any]:
    request, setup = batch.requests[index], batch.setup
    defaults = model.defaults
    guidance = defaults.cfg_weight if request.cfg is None else request.cfg
    sampler = request.options.sampler or defaults.sampler
    decided = {"steps": defaults.num_steps if request.steps is None else request.steps, "seed": request.seed}
    if setup.canvas is None:
        decided |= dict(zip(("width", "height"), setup.size, strict=True))
    else:
        decided |= {"strength": setup.strength}
    if not (request.refiner or request.lora or request.prompt_loras):  # these have defaults of their own
        decided |= {"cfg": guidance, "sampler": sampler}
    arguments = request.to_dict() | {"n_images": 1, "model": request.model} | decided
    return {
        "script": "txt2image" if request.image is None else "image2image",
        "arguments": {name: arguments[name] for name in KINDS if name in arguments},
        "made": {
            "size": setup.size,
            "guidance": guidance,
            "sampler": read_name(sampler)[0],
            "schedule": request.options.schedule or read_name(sampler)[1] or model.schedule.config.sigma_schedule,
            "bits": _bits(model),
            "batch": batch.seeds,
        },
        "files": dict(_files(model, request)),
        "software": {
            "stable_diffusion": __version__,
            "mlx": mx.__version__,
            "device": mx.default_device().type.name,
            "type": model.dtype_name,
        },
    }


def _bits(model: StableDiffusion) -> dict[str, int]:
    sources = model.sources.values()
    bits = {s.component.name: s.quantization or read_quantization(s.component.config) for s in sources}
    return {name: quantization[0] for name, quantization in bits.items() if quantization}


# --- files -----------------------------------------------------------------------------------------------------------


def _files(model: StableDiffusion, request: Request) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (name, fingerprint) of each file that decided the image. One that is gone by now is left out."""
    float16 = model.dtype == mx.float16
    files: list[tuple[str, Path]] = []
    for part in (source.component for source in model.sources.values()):
        source = getattr(request, part.name, None) or request.model
        files += [(_name(source, part.name, path), path) for path in part.files]
    others = [*((source, "controlnet") for source, _ in request.controlnet), (request.refiner, "refiner")]
    for source, kind in others:
        with suppress(ValueError, OSError):  # what is gone by now was there when it was read
            files += [(_name(source, kind, path), path) for path in _files_of(source, kind, float16)]
    files += _loras(request)
    for name in _FILE_FIELDS:
        value = getattr(request, name)
        for path in value if isinstance(value, tuple) else () if value is None else (value,):
            path = path.rsplit("=", 1)[0] if name == "embedding" else path
            files.append((path, Path(path).expanduser()))
    for name, path in files:
        if path.is_file() and (known := fingerprint(path)):
            yield name, known


def _loras(request: Request) -> list[tuple[str, Path]]:
    sources: list[tuple[str, Callable[[], Path]]] = [(source, partial(locate, source)) for source, _ in request.lora]
    sources += [(name, partial(find_in, request.lora_dir, name)) for name, _ in request.prompt_loras]
    files = []
    for name, find in sources:
        with suppress(ValueError, OSError):
            files.append((name, find()))
    return files


def _name(source: str, kind: str, path: Path) -> str:
    """Return the name of a file in the record: its path, or its place in a folder or a repository."""
    return source if os.path.isfile(os.path.expanduser(source)) else f"{source} {kind}/{path.name}"


@cache
def _files_of(source: str | None, kind: str, float16: bool) -> tuple[Path, ...]:
    """Return the files of a ControlNet, or of a refiner's UNet."""
    if source is None:
        return ()
    if kind == "controlnet":
        return open_part(source, kind, float16=float16).files
    return open_checkpoint(source, float16=float16).components["unet"].files


# --- for other programs ----------------------------------------------------------------------------------------------


def _settings(model: StableDiffusion, request: Request, details: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings for "parameters", under the names that other programs know; None is left out."""
    arguments, facts = details["arguments"], details["made"]
    loras = [(Path(name).stem, lora_hash(path)) for name, path in _loras(request)]
    nets = enumerate(request.controlnet)
    return {
        "Steps": arguments["steps"],
        "Sampler": infotext.sampler_name(facts["sampler"]),
        "Schedule type": infotext.schedule_name(facts["schedule"]),
        "CFG scale": facts["guidance"],
        "Image CFG scale": request.image_cfg,
        "Seed": request.seed,
        "Size": "{}x{}".format(*facts["size"]),
        "Model hash": model_hash(model.sources["unet"].component.files[0]),
        "Model": _short(request.model),
        "VAE": request.vae and _short(request.vae),
        "Denoising strength": request.hires_strength if request.hires else arguments.get("strength"),
        "Clip skip": request.options.clip_skip + 1 if request.options.clip_skip else None,
        "Mask blur": request.mask_blur or None,
        "Hires upscale": request.hires,
        "Hires steps": request.hires_steps if request.hires else None,
        "Hires upscaler": {"latents": "Latent", "pixels": "Lanczos"}[request.hires_upscaler] if request.hires else None,
        "Refiner": request.refiner and _short(request.refiner),
        "Refiner switch at": request.refiner_start if request.refiner else None,
        **{f"ControlNet {i}": f"Model: {_short(net)}, Weight: {scale:g}" for i, (net, scale) in nets},
        "Lora hashes": ", ".join(f"{name}: {known}" for name, known in loras if known) or None,
        "Partial": details.get("partial"),
        "Version": f"stable-diffusion-mlx {__version__}",
    }


def _short(source: str) -> str:
    path = Path(source).expanduser()
    return path.stem if path.is_file() else path.name if path.is_dir() else source

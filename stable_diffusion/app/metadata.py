"""What is written into a picture: how it was made, for people, for other programs and for ``--from_image``.

"parameters" is the text that many programs read (see ``infotext``). "stable_diffusion" is a record in JSON: all flags
that have a say in the picture, as they were for this one image ("arguments"), what they came to ("made"), the files
that it was made from with their hashes ("files"), and what it was computed with ("software"). A flag that is new is
recorded without further ado.
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..cli.arguments import recorded_flags
from ..diffusion.samplers import read_name
from ..lora.files import find_in, locate
from ..pipeline import StableDiffusion
from ..version import __version__
from ..weights.files import open_checkpoint, open_part
from ..weights.quantize import read_quantization
from . import infotext
from .batches import Work
from .fingerprints import KINDS, fingerprint, lora_hash, model_hash
from .records import recorded


def describe(
    sd: StableDiffusion, args: argparse.Namespace, work: Work, image_index: int, *, partial: str | None = None
) -> dict[str, str]:
    """The texts for one image of a batch: {"parameters": ..., "stable_diffusion": ...}.

    Args:
        sd: the model of ``--model``, also where another one finished the image.
        args: what the scripts were told.
        work: the batch.
        image_index: which image of it.
        partial: how far an unfinished image came, such as "12 of 20 steps".
    """
    record = _record(sd, args, work, image_index)
    if partial is not None:
        record["partial"] = partial
    settings = _settings(sd, args, work.batch.jobs[image_index], record)
    arguments = record["arguments"]
    text = infotext.write(arguments["prompt"], arguments["negative_prompt"], settings)
    return {"parameters": text.encode("utf-8", "replace").decode(), "stable_diffusion": json.dumps(record, default=str)}


def changes(sd: StableDiffusion, args: argparse.Namespace, work: Work) -> Iterator[str]:
    """What is not as it was when the picture of ``--from_image`` was made, a line each."""
    old, new = recorded(args.from_image), _record(sd, args, work, 0)
    before, now = (_table(record, "software") for record in (old, new))
    if others := [
        f"{name} {before[name]} (now {now[name]})" for name in now if before.get(name, now[name]) != now[name]
    ]:
        yield f"{args.from_image} was made with {', '.join(others)}: the picture may differ"
    before, now = (_table(record, "files") for record in (old, new))
    if others := [name for name in now if not _same(before.get(name), now[name])]:
        yield f"not the files that {args.from_image} was made from: {', '.join(others)}"


def _table(record: dict[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _same(before: Any, now: dict[str, str]) -> bool:
    """Whether a file is the one that was recorded, as far as can be said."""
    return not isinstance(before, dict) or all(before.get(kind, now[kind]) == now[kind] for kind in KINDS & now.keys())


# --- the record --------------------------------------------------------------------------------------------------


def _record(sd: StableDiffusion, args: argparse.Namespace, work: Work, image_index: int) -> dict[str, Any]:
    job = work.batch.jobs[image_index]
    arguments = {name: getattr(job, name) for name in recorded_flags("image" in args)}
    tags = "".join(f" <lora:{name}:{infotext.number(scale)}>" for name, scale in job.loras)
    arguments |= {"prompt": job.prompt + tags, "seed": work.batch.seeds[image_index], "n_images": 1}
    arguments |= {"steps": work.given["num_steps"]}
    if work.canvas is None:
        arguments |= dict(zip(("width", "height"), work.size, strict=True))
    else:
        arguments |= {"strength": work.strength}
    guidance = sd.default_guidance if job.cfg is None else job.cfg
    sampler = sd.sampler if job.sampler is None else job.sampler
    if not (args.refiner or args.lora or job.loras):  # these have defaults of their own for what is not said
        arguments |= {"cfg": guidance, "sampler": sampler}
    return {
        "script": "image2image" if "image" in args else "txt2image",
        "arguments": {name: value for name, value in arguments.items() if value is not None},
        "made": {
            "size": work.size,
            "guidance": guidance,
            "sampler": read_name(sampler)[0],
            "schedule": job.schedule or read_name(sampler)[1] or sd.schedule.config.sigma_schedule,
            "bits": _bits(sd),
            "batch": work.batch.seeds,
        },
        "files": dict(_files(sd, args, job, arguments)),
        "software": {
            "stable_diffusion": __version__,
            "mlx": mx.__version__,
            "device": mx.default_device().type.name,
            "type": str(sd.dtype).removeprefix("mlx.core."),
        },
    }


def _bits(sd: StableDiffusion) -> dict[str, int]:
    """Of the networks that are quantized."""
    recipes = sd.recipes.values()
    found = {r.component.name: r.quantization or read_quantization(r.component.config) for r in recipes}
    return {name: quantization[0] for name, quantization in found.items() if quantization}


# --- files -------------------------------------------------------------------------------------------------------


def _files(
    sd: StableDiffusion, args: argparse.Namespace, job: argparse.Namespace, arguments: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, str]]]:
    """(name, fingerprint) of each file that had a say. One that is gone by now is left out."""
    half = sd.dtype == mx.float16
    found: list[tuple[str, Path]] = []
    for part in (recipe.component for recipe in sd.recipes.values()):
        source = getattr(args, part.name, None) or args.model
        found += [(_name(source, part.name, path), path) for path in part.files]
    for source, kind in [*((source, "controlnet") for source, _ in args.controlnet), (args.refiner, "refiner")]:
        with suppress(ValueError, OSError):  # what is gone by now was there when it was read
            found += [(_name(source, kind, path), path) for path in _elsewhere(source, kind, half)]
    found += _loras(args, job)
    found += [(value, Path(value).expanduser()) for value in _paths(arguments)]
    for name, path in found:
        if known := fingerprint(path):
            yield name, known


def _loras(args: argparse.Namespace, job: argparse.Namespace) -> list[tuple[str, Path]]:
    wanted = [(source, partial(locate, source)) for source, _ in args.lora]
    wanted += [(name, partial(find_in, args.lora_dir, name)) for name, _ in job.loras]
    found = []
    for name, find in wanted:
        with suppress(ValueError, OSError):
            found.append((name, find()))
    return found


def _name(source: str, kind: str, path: Path) -> str:
    """What a file is called in the record: as it was given, or by where it is in a folder or a repository."""
    return source if os.path.isfile(os.path.expanduser(source)) else f"{source} {kind}/{path.name}"


@cache
def _elsewhere(source: str | None, kind: str, half: bool) -> tuple[Path, ...]:
    """The files of a ControlNet, or of a refiner's UNet."""
    if source is None:
        return ()
    if kind == "controlnet":
        return open_part(source, kind, float16=half).files
    return open_checkpoint(source, float16=half).components["unet"].files


def _paths(arguments: Mapping[str, Any]) -> Iterator[str]:
    """The values of flags that are files. Some have a weight beside them, or a word behind an equals sign."""
    for name, value in arguments.items():
        for item in value if isinstance(value, list) else [value]:
            path = item[0] if isinstance(item, tuple) and item else item
            if isinstance(path, str) and name not in ("prompt", "negative_prompt"):
                yield from (p for p in (path, path.rsplit("=", 1)[0]) if os.path.isfile(os.path.expanduser(p)))


# --- for other programs ------------------------------------------------------------------------------------------


def _settings(
    sd: StableDiffusion, args: argparse.Namespace, job: argparse.Namespace, record: Mapping[str, Any]
) -> dict[str, Any]:
    """What goes into "parameters", under the names that other programs know; None is left out."""
    said, made = record["arguments"], record["made"]
    hires, refined = "hires" in said, "refiner" in said
    loras = [(Path(name).stem, lora_hash(path)) for name, path in _loras(args, job)]
    return {
        "Steps": said["steps"],
        "Sampler": infotext.sampler_name(made["sampler"]),
        "Schedule type": infotext.schedule_name(made["schedule"]),
        "CFG scale": made["guidance"],
        "Image CFG scale": said.get("image_cfg"),
        "Seed": said["seed"],
        "Size": "{}x{}".format(*made["size"]),
        "Model hash": model_hash(sd.recipes["unet"].component.files[0]),
        "Model": _short(said["model"]),
        "VAE": _short(said["vae"]) if "vae" in said else None,
        "Denoising strength": said["hires_strength"] if hires else said.get("strength"),
        "Clip skip": said["clip_skip"] + 1 if said["clip_skip"] else None,
        "Mask blur": said.get("mask_blur") or None,
        "Hires upscale": said.get("hires"),
        "Hires steps": said.get("hires_steps") if hires else None,
        "Hires upscaler": {"latents": "Latent", "pixels": "Lanczos"}[said["hires_upscaler"]] if hires else None,
        "Refiner": _short(said["refiner"]) if refined else None,
        "Refiner switch at": said["refiner_start"] if refined else None,
        **{f"ControlNet {i}": f"Model: {_short(net)}, Weight: {s:g}" for i, (net, s) in enumerate(said["controlnet"])},
        "Lora hashes": ", ".join(f"{name}: {known}" for name, known in loras if known) or None,
        "Partial": record.get("partial"),
        "Version": f"stable-diffusion-mlx {__version__}",
    }


def _short(source: str) -> str:
    """A model's name: of a path, its last part."""
    path = Path(source).expanduser()
    return path.stem if path.is_file() else path.name if path.is_dir() else source

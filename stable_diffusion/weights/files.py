"""Open checkpoints: an alias, a Hub id, a folder or a single file -> configs, weight files, lazy tensors by name.

Only required files are downloaded. A model that is complete in the cache of ``huggingface_hub`` is opened without a
network call; a folder never needs the client.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..models.config import listed, readable
from . import catalog, hub, layout
from .formats.gguf import read_gguf
from .formats.kinds import kind_of
from .formats.original import name_half, to_diffusers
from .formats.pickles import read_pickle
from .formats.safetensors import read_safetensors
from .formats.single_file import find, read_checkpoint, read_config, with_run, within
from .layout import Checkpoint, Component, Index, Listing, files_in, read_json
from .parts import PARTS, family_of_pipeline

_log = logging.getLogger("stable_diffusion")

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class _Source:
    """Describe where files are: at a local path, or on the Hub by an entry of the catalog."""

    name: str  # for messages
    path: Path | None
    entry: catalog.Entry | None
    float16: bool
    revision: str | None

    def find(self, read: Callable[[Listing], Index], **spec: Any) -> tuple[Path, Index]:
        """Return a folder and the Index that ``read`` finds in it. Missing files are downloaded by a DownloadSpec."""
        path = self.path
        if path is None:
            spec["missing_files"] = lambda *place: read(Listing(*place, self.float16)).missing
            repo, path = hub.fetch(self.entry.repos, hub.DownloadSpec(**spec), self.revision)
            first = self.entry.removed or self.entry.repos[0]
            if repo != first and layout.INDEX in spec["entries"]:
                _log.warning("%s is no longer on the Hub: using its mirror %s", first, repo)
        index = read(Listing(path, files_in(path), self.name, self.float16))
        if index.missing:
            raise ValueError(f"{self.name} is incomplete: {path} has no {listed(index.missing)}")
        return path, index


def open_checkpoint(
    model: str | os.PathLike,
    *,
    float16: bool = False,
    revision: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    prediction: str | None = None,
    parts: Mapping[str, str | os.PathLike] | None = None,
) -> Checkpoint:
    """Find a checkpoint, download missing files, and read its configuration. No weights are read.

    Args:
        model: a folder in diffusers layout, a single file, an alias of the catalog, a Hub id, or owner/name/file on
            the Hub. A path may begin with ``./`` or ``~``. An alias has priority over a folder without a checkpoint.
        float16: prefer weight files in half precision (``*.fp16.safetensors``).
        revision: a branch, tag or commit of the Hub repository.
        tokenizer: a folder with vocab.json and merges.txt, instead of the checkpoint's tokenizers.
        prediction: the UNet's prediction type, one of PREDICTIONS. Default: as recorded in the files.
        parts: networks from other sources, {one of PARTS: a source for ``open_part``}.

    Raises ValueError for an unknown, unsupported, damaged or private model, OSError for a missing file, without network
    or for a full disk.
    """
    if prediction not in (None, *PREDICTIONS):
        raise ValueError(f"prediction {prediction!r} is unknown; choose one of {', '.join(PREDICTIONS)}")
    source = _locate(model, float16, revision)
    name, path = source.name, source.path
    replaced = {kind: open_part(part, kind, float16=float16) for kind, part in (parts or {}).items()}
    if float16 and source.entry and source.entry.half_vae and "vae" not in replaced:
        replaced |= _half_vae(source.entry.half_vae)
    if path is not None and path.is_file():
        with readable(name):  # also configs of parts
            checkpoint = read_checkpoint(path, name, *read_file(path), replaced, prediction)
        if tokenizer is None:  # both kinds of CLIP share a vocabulary, which is not in the file
            tokenizer = hub.fetch((catalog.TOKENIZER,), _VOCABULARY)[1]
    else:
        remedy = "connect once, or use a local folder or the bundled model, tiny"
        checkpoint = _read_folder(source, lambda listing: listing.read_index(replaced), replaced, remedy=remedy)
    _check_vae(checkpoint)
    checkpoint = _as_its_unet_is_run(checkpoint, os.fspath((parts or {}).get("unet", model)))
    if prediction is not None:
        checkpoint.scheduler["prediction_type"] = prediction
    if tokenizer is not None:
        checkpoint.tokenizers.update(dict.fromkeys(checkpoint.tokenizers, Path(os.path.expanduser(tokenizer))))
    return checkpoint


def open_unconditional(model: str | os.PathLike, *, float16: bool = False, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint without prompts, a folder or a Hub id, as ``open_checkpoint`` does."""
    source = _locate(model, float16, revision)
    return _read_folder(source, Listing.read_unconditional, {}, remedy="connect once, or use a local folder")


def open_part(source: str | os.PathLike, kind: str, *, float16: bool = False, revision: str | None = None) -> Component:
    """Find a single network of a ``kind`` in PARTS; other arguments and errors are those of ``open_checkpoint``.

    ``source`` is a Hub id or a folder, with the files in its root or in a folder named ``kind``, or a weights file. A
    folder may hold the two files of a TAESD; either of them stands for both.
    """
    if kind not in PARTS:
        raise ValueError(f"{kind!r} is not a part of a checkpoint; choose one of {', '.join(PARTS)}")
    found = _locate(source, float16, revision)
    name, path = found.name, found.path
    path = _decoder_in(path) if kind == "vae" and path is not None and path.is_dir() else path
    if path is not None and path.is_file():
        tensors, metadata = read_file(path)
        files, tensors = _both_halves(path, tensors) if kind == "vae" else ((path,), tensors)
        prefix = find(tensors, name, kind)[kind]
        config = read_config(kind, tensors, prefix, name)
        if kind == "controlnet" and "shuffle" in path.stem.lower():  # it pools globally, which shapes do not show
            config["global_pool_conditions"] = True
        component = Component(kind, config, files, prefix)
    else:
        tensors, metadata, entries = {}, {}, (f"{kind}/config.json", "config.json")
        about = {"what": f"a repository of a {kind}", "remedy": "connect once, or use a local folder"}
        _, index = found.find(lambda listing: listing.find_part(kind), entries=entries, **about)
        component = index.components[kind]
    return with_run(component, tensors, metadata) if kind == "unet" else component


def _check_vae(checkpoint: Checkpoint) -> None:
    """Set the scaling factor of a VAE from a single file to its family's; ValueError for a decoder without encoder."""
    vae = checkpoint.components["vae"]
    if vae.config.get("num_encoder_blocks") == []:
        raise ValueError(f"{vae.files[0]} is a TAESD decoder, only for previews: put its encoder beside it")
    if vae.config.get("scaling_factor", 1) is None:
        vae.config["scaling_factor"] = family_of_pipeline(checkpoint.pipeline).scaling_factor


def _decoder_in(folder: Path) -> Path:
    """Return the decoder of a TAESD in a folder without another layout; else the folder."""
    decoders = {path.stem: path for end in reversed(layout.SUFFIXES) for path in folder.glob(f"*_decoder{end}")}
    if not decoders or (folder / "config.json").is_file() or (folder / "vae/config.json").is_file():
        return folder
    if len(decoders) > 1:
        raise ValueError(f"{folder} holds several decoders; give the file of one: {listed(sorted(decoders))}")
    return next(iter(decoders.values()))


def _both_halves(path: Path, tensors: dict[str, mx.array]) -> tuple[tuple[Path, ...], dict[str, mx.array]]:
    """Return the files and tensors of a VAE; for half of a TAESD, also those of the other half."""
    here, other = ("encoder", "decoder") if "encoder.layers.0.weight" in tensors else ("decoder", "encoder")
    if f"{here}.layers.0.weight" not in tensors or f"{other}.layers.0.weight" in tensors:
        return (path,), tensors
    beside = path.with_name(path.name.replace(here, other))
    if beside != path and beside.is_file():
        return (path, beside), tensors | read_file(beside)[0]
    if here == "encoder":
        raise ValueError(f"{path} is a TAESD encoder: put its decoder beside it, under the matching name")
    return (path,), tensors


def _as_its_unet_is_run(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Apply the schedule and the few-step settings of a checkpoint's UNet, whose source is ``name``."""
    unet = checkpoint.components["unet"]
    checkpoint.scheduler.update(unet.scheduler)
    if not unet.few_steps:
        return checkpoint
    _log.warning(catalog.describe_settings(name, unet.few_steps))
    return with_few_steps(checkpoint, unet.few_steps)


def with_few_steps(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Checkpoint:
    """Return a checkpoint with the ``settings`` of a few-step model as its defaults."""
    rest = dict(settings)
    sampler, steps, guidance = (rest.pop(key) for key in ("sampler", "num_steps", "cfg_weight"))
    is_edm = checkpoint.scheduler["_class_name"].startswith("EDM")  # its class stands for the noise
    scheduler = checkpoint.scheduler | ({} if is_edm else {"_class_name": catalog.SCHEDULERS[sampler]})
    scheduler |= {"clip_sample": False} if sampler == "ddim" else {}  # the class's default is True
    scheduler |= {"timestep_spacing": rest["spacing"]} if "spacing" in rest else {}
    return replace(checkpoint, scheduler=scheduler, steps=steps, guidance=guidance, few_steps=rest)


def _locate(source: str | os.PathLike, float16: bool, revision: str | None) -> _Source:
    """Find the folder, file or catalog entry of ``source``. A file on the Hub is downloaded."""
    name = os.fspath(source)
    path = os.path.expanduser(name)
    entry = catalog.ALIASES.get(name.lower()) if isinstance(source, str) else None
    is_folder = os.path.isdir(path) and (entry is None or os.path.isfile(os.path.join(path, layout.INDEX)))
    if is_folder or os.path.isfile(path):
        if not is_folder:
            layout.check_suffix(path)
        local, entry = Path(path), None
    elif entry is not None:
        local = entry.folder
    elif isinstance(source, os.PathLike) or name.startswith(("./", "../", "/", "~")):
        raise FileNotFoundError(f"{source}: no such folder or file; check the path, or give a model's name")
    elif name.endswith(layout.SUFFIXES):
        owner, repo, file = [*name.split("/", 2), "", ""][:3]
        if not file:
            raise FileNotFoundError(f"{source}: no such folder or file; for a file on the Hub write owner/name/file")
        remedy = "connect once, or give a file on this machine"
        spec = hub.DownloadSpec(f"a repository with the file {file}", (file,), lambda *place: [], remedy)
        path = hub.fetch((f"{owner}/{repo}",), spec, revision)[1] / file
        return _Source(name, path, None, float16, revision)
    else:
        local, entry = None, catalog.find(name)
    if local is not None and revision is not None:
        raise ValueError(f"{local} is a local path and has no revision {revision!r}: omit it")
    return _Source(name, local, entry, float16, revision)


def _half_vae(repo: str) -> dict[str, Component]:
    try:
        return {"vae": open_part(repo, "vae", float16=True)}
    except (ValueError, OSError) as error:
        _log.warning("%s; using the model's VAE instead of %s", error, repo)
        return {}


def _read_folder(
    source: _Source, read: Callable[[Listing], Index], replaced: Mapping[str, Component], **spec: Any
) -> Checkpoint:
    """Read the configuration of a complete folder and choose its weight files."""
    what, best_files = "a checkpoint in diffusers layout", layout.best_files(source.float16)
    folder, index = source.find(read, what=what, entries=(layout.INDEX,), best_files=best_files, **spec)
    name, entry = source.name, source.entry
    pipeline, place = index.contents["_class_name"], folder / layout.SCHEDULER
    with readable(str(folder / layout.INDEX)):
        scheduler = {"_class_name": index.contents.get("scheduler")[-1]}
    scheduler |= read_json(place if place.is_file() else folder / place.name)
    scheduler |= {"_class_name": layout.UNCONDITIONAL.get(pipeline) or scheduler["_class_name"]}
    layout.check_noise(scheduler, name)
    if entry is not None and entry.steps is not None:
        steps, guidance, few_steps = entry.steps, entry.guidance, {}
    else:
        steps, guidance = catalog.defaults_for(pipeline, scheduler)
        with readable(str(folder / layout.INDEX)):
            stored = index.contents.get("_defaults", {})  # recorded by a conversion
            steps, guidance = stored.get("steps", steps) + 0, stored.get("guidance", guidance) + 0.0
            few_steps = {key: stored[key] for key in ("spacing", "eta", "timesteps") if key in stored}
    return Checkpoint(
        name=name,
        pipeline=pipeline,
        index=index.contents,
        scheduler=scheduler,
        components={**replaced, **index.components},
        tokenizers={part: folder / part for part in index.tokenizers},
        steps=steps,
        guidance=guidance,
        few_steps=few_steps,
    )


_VOCABULARY = hub.DownloadSpec(
    what="the tokenizer of CLIP",
    entries=layout.VOCABULARY[:1],
    missing_files=lambda folder, names, repo: [f for f in layout.VOCABULARY if not (folder / f).is_file()],
    remedy="connect once, or give a folder with both files as tokenizer",
)


def read_file(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the lazy tensors of a file by their names in it, and its metadata.

    The content decides the format, not the file's name. Half of a TAESD gets the names of the whole model. Raises
    ValueError for a file that is damaged or of another kind.
    """
    kind = kind_of(path) or ("pickle" if path.suffix in layout.PICKLES else "safetensors")
    tensors, metadata = {"pickle": read_pickle, "gguf": read_gguf, "safetensors": read_safetensors}[kind](path)
    return name_half(tensors), metadata


def read_tensors(component: Component) -> Mapping[str, mx.array]:
    """Return a component's lazy tensors under diffusers' names; ValueError for damaged or repeated ones."""
    tensors: dict[str, mx.array] = {}
    for path in component.files:
        contents, _ = read_file(path)
        if repeated := sorted(tensors.keys() & contents.keys()):
            raise ValueError(f"{path} and another {component.name} file hold the same tensors: {listed(repeated)}")
        tensors.update(contents)
    named = to_diffusers(component.name, within(tensors, component.prefix))
    if component.config.get("architectures") == ["CLIPTextModel"]:  # this class has no projection
        named.pop("text_projection.weight", None)
    return named

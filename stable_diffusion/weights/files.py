"""Open checkpoints: an alias, a Hub id, a folder or a single file -> configs, weight files, lazy tensors by name.

Only the files that this library reads are downloaded. A model that is complete in the cache of ``huggingface_hub`` is
opened without a network call; a folder never needs the client.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..models.config import listed, readable, short
from . import catalog, hub, layout
from .formats.gguf import read_gguf
from .formats.kinds import kind_of
from .formats.original import name_half, to_diffusers
from .formats.pickles import read_pickle
from .formats.safetensors import read_safetensors
from .formats.single_file import find, read_checkpoint, read_config, with_run
from .layout import Checkpoint, Component, Listing, files_in, read_json
from .parts import PARTS, family_of_pipeline

_log = logging.getLogger("stable_diffusion")

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def open_checkpoint(
    model: str | os.PathLike,
    *,
    float16: bool = False,
    revision: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    prediction: str | None = None,
    parts: Mapping[str, str | os.PathLike] | None = None,
) -> Checkpoint:
    """Find a checkpoint, download what is missing of it, and read its configuration. No weights are read.

    Args:
        model: a folder in diffusers layout, a single file, an alias of the catalog, a Hub id, or owner/name/file on
            the Hub. A path may begin with ``./`` or ``~``; an alias wins over a folder that is no checkpoint.
        float16: prefer weight files in half precision (``*.fp16.safetensors``), where there are both.
        revision: a branch, tag or commit of the Hub repository.
        tokenizer: a folder with vocab.json and merges.txt, in place of the checkpoint's tokenizers.
        prediction: what the UNet predicts, one of PREDICTIONS, in place of what the files say.
        parts: networks to take from elsewhere, {one of PARTS: what ``open_part`` opens}.

    Raises ValueError for what is unknown, unsupported, damaged or private; OSError where a file is missing, the network
    is not reached or the disk is full.
    """
    if prediction not in (None, *PREDICTIONS):
        raise ValueError(f"prediction {prediction!r} is not one of {', '.join(PREDICTIONS)}")
    name, (path, entry) = os.fspath(model), _locate(model, revision)
    replaced = {kind: open_part(source, kind, float16=float16) for kind, source in (parts or {}).items()}
    if float16 and entry and entry.half_vae and "vae" not in replaced:
        replaced |= _half_vae(entry.half_vae)
    if path is not None and path.is_file():
        with readable(name):  # also configs of parts
            checkpoint = read_checkpoint(path, name, *read_file(path), replaced, prediction)
        if tokenizer is None:  # both kinds of CLIP have one vocabulary, which is not in the file
            tokenizer = hub.fetch((catalog.TOKENIZER,), _VOCABULARY)[1]
    else:
        checkpoint = _read_folder(path or _from_hub(entry, float16, revision, replaced), name, float16, entry, replaced)
    _check_vae(checkpoint)
    checkpoint = _as_its_unet_is_run(checkpoint, os.fspath((parts or {}).get("unet", model)))
    if prediction is not None:
        checkpoint.scheduler["prediction_type"] = prediction
    if tokenizer is not None:
        checkpoint.tokenizers.update(dict.fromkeys(checkpoint.tokenizers, Path(os.path.expanduser(tokenizer))))
    return checkpoint


def open_unconditional(model: str | os.PathLike, *, float16: bool = False, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint that makes pictures without prompts, as ``open_checkpoint`` does: a folder or a Hub id."""
    name, (path, entry) = os.fspath(model), _locate(model, revision)
    if path is None:
        spec = hub.DownloadSpec(
            what="a checkpoint in diffusers layout",
            entries=(layout.INDEX,),
            missing_files=lambda *place: Listing(*place, float16).read_unconditional().missing,
            remedy="connect once, or use a local folder",
            best_files=layout.best_files(float16),
        )
        path = hub.fetch(entry.repos, spec, revision)[1]
    if not (path / layout.INDEX).is_file():
        raise ValueError(f"{name} is not a checkpoint in diffusers layout: there is no {path / layout.INDEX}")
    index = Listing(path, files_in(path), name, float16).read_unconditional()
    if index.missing:
        raise ValueError(f"{name} is not complete: {path} has no {listed(index.missing)}")
    pipeline, entry_of = index.contents["_class_name"], index.contents.get("scheduler")
    with readable(str(path / layout.INDEX)):
        scheduler = {"_class_name": entry_of[-1]}
    place = path / layout.SCHEDULER
    scheduler |= read_json(place if place.is_file() else path / place.name)
    scheduler |= {"_class_name": layout.UNCONDITIONAL[pipeline] or scheduler["_class_name"]}
    layout.check_noise(scheduler, name)
    steps = scheduler.get("num_train_timesteps", 1000) if pipeline == "DDPMPipeline" else 50
    return Checkpoint(
        name=name,
        folder=path,
        pipeline=pipeline,
        index=index.contents,
        scheduler=scheduler,
        components=index.components,
        tokenizers={},
        steps=steps,
        guidance=0.0,
    )


def open_part(source: str | os.PathLike, kind: str, *, float16: bool = False, revision: str | None = None) -> Component:
    """Find one network by itself: a VAE, a ControlNet, the UNet of another checkpoint, ...

    ``source`` is a Hub id or a folder, with the files in its root or in a folder named ``kind``, or a file of weights.
    A folder may hold the two files of a TAESD, and one of them stands for both.
    ``kind`` is one of PARTS. All else is as for ``open_checkpoint``.
    """
    if kind not in PARTS:
        raise ValueError(f"{kind!r} is not a part of a checkpoint; the parts are {', '.join(PARTS)}")
    name, (path, entry) = os.fspath(source), _locate(source, revision)
    path = _decoder_in(path) if kind == "vae" and path is not None and path.is_dir() else path
    if path is not None and path.is_file():
        tensors, metadata = read_file(path)
        files, tensors = _both_halves(path, tensors) if kind == "vae" else ((path,), tensors)
        prefix = find(tensors, name, kind)[kind]
        config = read_config(kind, tensors, prefix, name)
        if kind == "controlnet" and "shuffle" in path.stem.lower():  # it pools globally, which no shape says
            config["global_pool_conditions"] = True
        component = Component(kind, config, files, prefix)
        return with_run(component, tensors, metadata) if kind == "unet" else component
    if path is None:
        spec = hub.DownloadSpec(
            what=f"a repository of a {kind}",
            entries=(f"{kind}/config.json", "config.json"),
            missing_files=lambda *place: Listing(*place, float16).find_part(kind)[1],
            remedy="connect once, or use a local folder",
        )
        path = hub.fetch(entry.repos, spec, revision)[1]
    components, missing = Listing(path, files_in(path), name, float16).find_part(kind)
    if missing:
        raise ValueError(f"{name} is not complete: {path} has no {listed(missing)}")
    return with_run(components[kind], {}, {}) if kind == "unet" else components[kind]


def _check_vae(checkpoint: Checkpoint) -> None:
    """Give a VAE that does not say its scale, as single files, that of its family; ValueError for a decoder alone."""
    vae = checkpoint.components["vae"]
    if vae.config.get("num_encoder_blocks") == []:
        raise ValueError(f"{vae.files[0]} is the decoder of a TAESD, for previews alone: its encoder is not beside it")
    if vae.config.get("scaling_factor", 1) is None:
        vae.config["scaling_factor"] = family_of_pipeline(checkpoint.pipeline).scaling_factor


def _decoder_in(folder: Path) -> Path:
    """Return the decoder of a TAESD in a folder that is in no other layout; without one the folder itself."""
    decoders = {path.stem: path for end in reversed(layout.SUFFIXES) for path in folder.glob(f"*_decoder{end}")}
    if not decoders or (folder / "config.json").is_file() or (folder / "vae/config.json").is_file():
        return folder
    if len(decoders) > 1:
        raise ValueError(f"{folder} holds several decoders: name the file, one of {listed(sorted(decoders))}")
    return next(iter(decoders.values()))


def _both_halves(path: Path, tensors: dict[str, mx.array]) -> tuple[tuple[Path, ...], dict[str, mx.array]]:
    """Return the files and tensors of a VAE. Where ``path`` is half a TAESD, the other half is the file beside it.

    A decoder may be alone. Raises ValueError for an encoder that is.
    """
    here, other = ("encoder", "decoder") if "encoder.layers.0.weight" in tensors else ("decoder", "encoder")
    if f"{here}.layers.0.weight" not in tensors or f"{other}.layers.0.weight" in tensors:
        return (path,), tensors
    beside = path.with_name(path.name.replace(here, other))
    if beside != path and beside.is_file():
        return (path, beside), tensors | read_file(beside)[0]
    if here == "encoder":
        raise ValueError(f"{path} is the encoder of a TAESD: its decoder is not beside it, under such a name")
    return (path,), tensors


def _as_its_unet_is_run(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Give a checkpoint the schedule and the defaults of a run that its UNet, the one of ``name``, brings along."""
    unet = checkpoint.components["unet"]
    checkpoint.scheduler.update(unet.scheduler)
    if not unet.few_steps:
        return checkpoint
    _log.warning(catalog.describe_settings(name, unet.few_steps))
    return with_few_steps(checkpoint, unet.few_steps)


def with_few_steps(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Checkpoint:
    """Return a checkpoint that by default is run with the ``settings`` of a model for few steps."""
    rest = dict(settings)
    sampler, steps, guidance = (rest.pop(key) for key in ("sampler", "num_steps", "cfg_weight"))
    is_edm = checkpoint.scheduler["_class_name"].startswith("EDM")  # of which the class stands for the noise
    scheduler = checkpoint.scheduler | ({} if is_edm else {"_class_name": catalog.SCHEDULERS[sampler]})
    scheduler |= {"clip_sample": False} if sampler == "ddim" else {}  # which the class does by default
    scheduler |= {"timestep_spacing": rest["spacing"]} if "spacing" in rest else {}
    return replace(checkpoint, scheduler=scheduler, steps=steps, guidance=guidance, few_steps=rest)


def _locate(source: str | os.PathLike, revision: str | None) -> tuple[Path | None, catalog.Entry | None]:
    """Return (the folder or file that ``source`` is, the catalog's entry for it); a file on the Hub is downloaded.

    Raises OSError for a path that is not there, ValueError for an unknown name or a file that holds no weights.
    """
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
        raise FileNotFoundError(f"{source}: no such folder or file; give one that is there, or a model's name")
    elif name.endswith(layout.SUFFIXES):
        owner, repo, file = [*name.split("/", 2), "", ""][:3]
        if not file:
            raise FileNotFoundError(f"{source}: no such folder or file; one on the Hub is owner/name/file")
        remedy = "connect once, or give a file on this machine"
        spec = hub.DownloadSpec(f"a repository with the file {file}", (file,), lambda *place: [], remedy)
        return hub.fetch((f"{owner}/{repo}",), spec, revision)[1] / file, None
    else:
        return None, catalog.find(name)
    if local is not None and revision is not None:
        raise ValueError(f"{local} is on this machine and has no revision {revision!r}: leave it out")
    return local, entry


def _from_hub(entry: catalog.Entry, float16: bool, revision: str | None, replaced: Mapping[str, Component]) -> Path:
    """Bring a checkpoint into the Hub's cache, except for networks that come from elsewhere; return its folder."""
    spec = hub.DownloadSpec(
        what="a checkpoint in diffusers layout",
        entries=(layout.INDEX,),
        missing_files=lambda *place: Listing(*place, float16).read_index(replaced).missing,
        remedy="connect once, or use a local folder or the bundled model, tiny",
        best_files=layout.best_files(float16),
    )
    repo, folder = hub.fetch(entry.repos, spec, revision)
    first = entry.removed or entry.repos[0]
    if repo != first:
        _log.warning("%s is no longer on the Hub: using its mirror %s", first, repo)
    return folder


def _half_vae(repo: str) -> dict[str, Component]:
    """Return the VAE for half precision, or nothing when it cannot be opened."""
    try:
        return {"vae": open_part(repo, "vae", float16=True)}
    except (ValueError, OSError) as error:
        _log.warning("%s; the model's own VAE is used in place of %s", error, repo)
        return {}


def _read_folder(
    folder: Path, name: str, float16: bool, entry: catalog.Entry | None, replaced: Mapping[str, Component]
) -> Checkpoint:
    """Read the configuration of a complete folder and choose its weight files."""
    listing = Listing(folder, files_in(folder), name, float16)
    if layout.INDEX not in listing.names:
        kind = read_json(folder / "config.json").get("_class_name") if "config.json" in listing.names else None
        alone = f", but is a {short(kind)} alone: give a whole model, and this as a part of it" if kind else ""
        raise ValueError(f"{name} is not a checkpoint in diffusers layout: {folder} has no {layout.INDEX}{alone}")
    index = listing.read_index(replaced)
    if index.missing:
        raise ValueError(f"{name} is not complete: {folder} has no {listed(index.missing)}")
    scheduler = {"_class_name": index.contents["scheduler"][-1]} | read_json(folder / layout.SCHEDULER)
    layout.check_noise(scheduler, name)
    if entry is not None and entry.steps is not None:
        steps, guidance, few_steps = entry.steps, entry.guidance, {}
    else:
        steps, guidance = catalog.defaults_for(index.contents["_class_name"], scheduler)
        with readable(str(folder / layout.INDEX)):
            stored = index.contents.get("_defaults", {})  # what a conversion noted of its source
            steps, guidance = stored.get("steps", steps) + 0, stored.get("guidance", guidance) + 0.0
            few_steps = {key: stored[key] for key in ("spacing", "eta", "timesteps") if key in stored}
    return Checkpoint(
        name=name,
        folder=folder,
        pipeline=index.contents["_class_name"],
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
    """Return the tensors of a file under the names in it, which are read when they are evaluated, and its metadata.

    The content decides how it is read, not the name. Half a TAESD gets its names in the whole. Raises ValueError for a
    file that is damaged or of another kind.
    """
    kind = kind_of(path) or ("pickle" if path.suffix in layout.PICKLES else "safetensors")
    tensors, metadata = {"pickle": read_pickle, "gguf": read_gguf, "safetensors": read_safetensors}[kind](path)
    return name_half(tensors), metadata


def read_tensors(component: Component) -> Mapping[str, mx.array]:
    """Return the tensors of a component under diffusers' names. They are read from the disk when they are evaluated.

    Raises ValueError for a damaged file, or two files with the same tensor.
    """
    tensors: dict[str, mx.array] = {}
    for path in component.files:
        contents, _ = read_file(path)
        if repeated := sorted(tensors.keys() & contents.keys()):
            raise ValueError(f"{path} repeats tensors of another file of {component.name}: {listed(repeated)}")
        tensors.update(contents)
    if prefix := component.prefix:
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    named = to_diffusers(component.name, tensors)
    if component.config.get("architectures") == ["CLIPTextModel"]:  # which has none, whatever is in its file
        named.pop("text_projection.weight", None)
    return named

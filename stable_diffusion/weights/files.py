"""Checkpoints as files: an alias, a Hub id, a folder or a single file -> configs, weight files, lazy tensors by name.

Only the files that this library reads are downloaded. The cache of `huggingface_hub` is asked first: a model that is
complete there is opened without a network call; a folder never needs the client.
"""

import json
import logging
import math
import operator
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from ..models.config import readable
from . import catalog, hub, layout
from .formats.original import to_diffusers
from .formats.pickles import read_pickle
from .formats.single_file import find, read_config, read_contents, scaling_factor
from .names import canonical

_log = logging.getLogger("stable_diffusion")

# Bytes per value of the types that mx.load reads as themselves (it gives 8-bit floats as integers).
_ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "BOOL": 1}
_ITEM_SIZES |= {f"{sign}{8 * size}": size for sign in "IU" for size in (1, 2, 4, 8)}
_MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit

KINDS = ("unet", "vae", "text_encoder", "text_encoder_2", "controlnet", "depth_estimator")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
_VOCABULARY = ("vocab.json", "merges.txt")
_REMEDY = "connect once, or use a local folder or --model tiny"


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint."""

    name: str  # one of KINDS
    config: dict  # config.json
    files: tuple[Path, ...]  # its weights, several when they are sharded
    prefix: str = ""  # of its tensors' names in files that hold other networks too


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all on this machine."""

    name: str  # what was asked for, for messages
    folder: Path  # of the checkpoint; the one that a single file is in
    pipeline: str  # `_class_name` of model_index.json
    index: dict  # model_index.json
    scheduler: dict  # scheduler_config.json
    components: dict[str, Component]
    tokenizers: dict[str, Path]  # "tokenizer", "tokenizer_2" -> folder
    steps: int  # the model's own defaults
    guidance: float
    pad_tokens: dict[str, str] = field(default_factory=dict)  # of tokenizers, in place of what their folder says


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
        model: a folder in diffusers layout, a single file, an alias of the catalog, a Hub id, or a file on the Hub
            (`owner/name/file.safetensors`). What starts with `./`, `../`, `/` or `~` is a path; an alias means its
            model, unless a folder of that name holds a checkpoint.
        float16: prefer weight files in half precision (`*.fp16.safetensors`). Where only one kind exists it is taken.
        revision: a branch, tag or commit of the Hub repository.
        tokenizer: a folder with vocab.json and merges.txt, in place of the checkpoint's own.
        prediction: what the UNet predicts, "epsilon", "v_prediction" or "sample", in place of what the files say.
        parts: networks to take from elsewhere, {one of KINDS: what `open_part` opens}.

    Raises:
        ValueError: unknown model, unsupported pipeline or component, a file that is missing or not readable, a
            repository that does not exist, is private or gated.
        OSError: no such folder, no network and not in the cache, no space on the disk.
    """
    name = os.fspath(model)
    if prediction not in (None, *PREDICTIONS):
        raise ValueError(f"prediction {prediction!r} is not one of {', '.join(PREDICTIONS)}")
    path = _locate(model, revision)
    entry = None if path else catalog.find(name)
    given = {kind: open_part(source, kind, float16=float16) for kind, source in (parts or {}).items()}
    if float16 and entry and entry.half_vae and "vae" not in given:
        given |= _half_vae(entry.half_vae)
    if path is not None and path.is_file():
        checkpoint = _read_single_file(path, name, given, prediction, tokenizer)
    else:
        folder = path or _bundled(entry, revision) or _from_hub(entry, float16, revision, given)
        checkpoint = _read_folder(folder, name, float16, entry, given)
    vae = checkpoint.components["vae"].config
    if vae.get("scaling_factor", 1) is None:  # of a single file, which does not say it
        vae["scaling_factor"] = scaling_factor(checkpoint.pipeline)
    if prediction is not None:
        checkpoint.scheduler["prediction_type"] = prediction
    if tokenizer is not None:
        checkpoint.tokenizers.update(dict.fromkeys(checkpoint.tokenizers, Path(tokenizer).expanduser()))
    return checkpoint


def open_part(source: str | os.PathLike, kind: str, *, float16: bool = False, revision: str | None = None) -> Component:
    """Find one network by itself: a VAE, a ControlNet, the UNet of another checkpoint, ...

    Args:
        source: a Hub id or a folder, with the files in its root or in a folder named ``kind``; or a file of weights,
            here or on the Hub.
        kind: one of KINDS.
        float16, revision: as for `open_checkpoint`.

    Raises ValueError and OSError as `open_checkpoint` does.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not a part of a checkpoint; the parts are {', '.join(KINDS)}")
    name = os.fspath(source)
    folder = _locate(source, revision)
    if folder is None:
        entry = catalog.find(name)
        folder = _bundled(entry, revision) or hub.fetch(entry.repos, _want_part(kind, float16), revision)[1]
    if folder.is_file():
        tensors, _ = _read_file(folder)
        prefix = find(tensors, name, kind)[kind]
        config = read_config(kind, tensors, prefix, name)
        if kind == "controlnet" and "shuffle" in folder.stem.lower():  # the one that works so, which no shape tells
            config["global_pool_conditions"] = True
        return Component(kind, config, (folder,), prefix)
    names = layout.files_in(folder)
    place = layout.place_of(kind, names)
    if place is None:
        raise ValueError(f"{name} has no {kind}: {folder} holds neither {kind}/config.json nor config.json")
    if missing := layout.lacking_of_part(folder, names, kind, float16, name):
        raise ValueError(f"{name} is not complete: {folder} has no {', '.join(missing)}")
    files = layout.weight_files(folder, kind, names, float16, name, place)
    config = layout.read_json(folder / place / "config.json")
    if isinstance(config.get("text_config"), dict):  # a whole CLIP, of which only the text encoder is read
        config = config["text_config"] | {"architectures": ["CLIPTextModelWithProjection"]}
    return Component(kind, config, tuple(folder / file for file in files))


def _locate(source: str | os.PathLike, revision: str | None) -> Path | None:
    """`source` as a folder or a file, or None when it is a name. Brings a file that is on the Hub.

    Raises OSError for a path that is not there, ValueError for a file that holds no weights.
    """
    path = os.path.expanduser(os.fspath(source))
    if os.path.isdir(path):
        is_alias = isinstance(source, str) and source.lower() in catalog.ALIASES
        if not is_alias or os.path.isfile(os.path.join(path, layout.INDEX)):
            return _unless_revised(Path(path), revision)
    elif os.path.isfile(path):
        if not path.endswith(layout.SUFFIXES):
            raise ValueError(f"{source} is no file of weights: these end in {', '.join(layout.SUFFIXES)}")
        return _unless_revised(Path(path), revision)
    elif isinstance(source, os.PathLike) or source.startswith(("./", "../", "/", "~")):
        raise FileNotFoundError(f"{source}: no such folder or file; give one that is there, or a model's name")
    elif source.endswith(layout.SUFFIXES):
        owner, _, rest = source.partition("/")
        repo, _, file = rest.partition("/")
        if not file:
            raise FileNotFoundError(f"{source}: no such folder or file; one on the Hub is owner/name/file")
        return hub.fetch((f"{owner}/{repo}",), _want_file(file), revision)[1] / file
    return None


def _unless_revised(path: Path, revision: str | None) -> Path:
    if revision is not None:
        raise ValueError(f"{path} is on this machine and has no revision {revision!r}: leave it out")
    return path


def _bundled(entry: catalog.Entry, revision: str | None) -> Path | None:
    """The folder of a model that comes with the package."""
    return entry.folder and _unless_revised(entry.folder, revision)


def _want_file(file: str) -> hub.Want:
    return hub.Want(
        what=f"a repository with the file {file}",
        entries=(file,),
        lacking=lambda folder, names, repo: [],
        remedy="connect once, or give a file on this machine",
    )


def _from_hub(entry: catalog.Entry, float16: bool, revision: str | None, without: Collection[str]) -> Path:
    """The folder of a checkpoint in the Hub's cache, with all but the networks that come from elsewhere."""
    want = hub.Want(
        what="a checkpoint in diffusers layout",
        entries=(layout.INDEX,),
        lacking=lambda folder, names, repo: layout.lacking(folder, names, float16, repo, without),
        remedy=_REMEDY,
        assumed=frozenset(layout.assumed_names(float16)),
    )
    repo, folder = hub.fetch(entry.repos, want, revision)
    asked = entry.removed or entry.repos[0]
    if repo != asked:
        _log.warning("%s is no longer on the Hub: using its mirror %s", asked, repo)
    return folder


def _half_vae(repo: str) -> dict[str, Component]:
    """The VAE for half precision, or nothing when it cannot be had."""
    try:
        return {"vae": open_part(repo, "vae", float16=True)}
    except (ValueError, OSError) as error:
        _log.warning("%s; the model's own VAE is used in place of %s", error, repo)
        return {}


def _want_part(kind: str, float16: bool) -> hub.Want:
    places = (f"{kind}/", "")
    return hub.Want(
        what=f"a repository of a {kind}",
        entries=tuple(f"{place}config.json" for place in places),
        lacking=lambda folder, names, repo: layout.lacking_of_part(folder, names, kind, float16, repo),
        remedy="connect once, or use a local folder",
        assumed=frozenset(),
    )


def _read_folder(
    folder: Path, name: str, float16: bool, entry: catalog.Entry | None, given: Mapping[str, Component]
) -> Checkpoint:
    """Read the configuration of a complete folder and choose its weight files."""
    present = layout.files_in(folder)
    if layout.INDEX not in present:
        raise ValueError(f"{name} is not a checkpoint in diffusers layout: {folder} has no {layout.INDEX}")
    if missing := layout.lacking(folder, present, float16, name, given):
        raise ValueError(f"{name} is not complete: {folder} has no {', '.join(missing)}")
    index = layout.read_json(folder / layout.INDEX)
    networks, tokenizers = layout.parts(index, name, given)
    components = dict(given)
    for part in networks:
        files = layout.weight_files(folder, part, present, float16, name)
        config = layout.read_json(folder / part / "config.json")
        components[part] = Component(part, config, tuple(folder / file for file in files))
    scheduler = {"_class_name": index["scheduler"][-1]} | layout.read_json(folder / layout.SCHEDULER)
    steps, guidance = catalog.defaults_for(index["_class_name"], scheduler)
    with readable(str(folder / layout.INDEX)):
        own = index.get("_defaults", {}).get  # what a conversion noted of its source
        steps, guidance = own("steps", steps) + 0, own("guidance", guidance) + 0.0
    return Checkpoint(
        name=name,
        folder=folder,
        pipeline=index["_class_name"],
        index=index,
        scheduler=scheduler,
        components=components,
        tokenizers={part: folder / part for part in tokenizers},
        steps=steps if entry is None or entry.steps is None else entry.steps,
        guidance=guidance if entry is None or entry.guidance is None else entry.guidance,
    )


def _read_single_file(
    path: Path,
    name: str,
    given: Mapping[str, Component],
    prediction: str | None,
    tokenizer: str | os.PathLike | None,
) -> Checkpoint:
    """Read what a file of weights says of itself. Both kinds of CLIP have one vocabulary, which is not in the file."""
    tensors, metadata = _read_file(path)
    contents = read_contents(tensors, metadata, name, {kind: part.config for kind, part in given.items()}, prediction)
    pipeline = contents.index["_class_name"]
    own = {kind: Component(kind, config, (path,), prefix) for kind, (prefix, config) in contents.networks.items()}
    vocabulary = Path() if tokenizer is not None else hub.fetch((catalog.TOKENIZER,), _WANT_VOCABULARY)[1]
    steps, guidance = catalog.defaults_for(pipeline, contents.scheduler)
    if distilled := catalog.distilled(path.stem):
        contents.scheduler.update(distilled[0])
        steps, guidance = distilled[1], 0.0
        _log.info("%s is a distilled model by its name: %d steps without guidance", name, steps)
    return Checkpoint(
        name=name,
        folder=path.parent,
        pipeline=pipeline,
        index=contents.index,
        scheduler=contents.scheduler,
        components=own | given,
        tokenizers=dict.fromkeys(contents.pad_tokens, vocabulary),
        steps=steps,
        guidance=guidance,
        pad_tokens=contents.pad_tokens,
    )


_WANT_VOCABULARY = hub.Want(
    what="the tokenizer of CLIP",
    entries=_VOCABULARY[:1],
    lacking=lambda folder, names, repo: [file for file in _VOCABULARY if not (folder / file).is_file()],
    remedy="connect once, or give a folder with both as tokenizer (--tokenizer)",
)


# --- tensors -----------------------------------------------------------------------------------------------------


def read_tensors(component: Component) -> dict[str, mx.array]:
    """The tensors of a component under the names of diffusers. They are read from the disk when they are evaluated.

    Raises:
        ValueError: a file is corrupt, truncated or of a type that MLX cannot read, or two files hold the same tensor.
    """
    tensors: dict[str, mx.array] = {}
    for path in component.files:
        part, _ = _read_file(path)
        if twice := sorted(tensors.keys() & part.keys()):
            raise ValueError(f"{path} repeats tensors of another file of {component.name}: {', '.join(twice[:3])}")
        tensors.update(part)
    prefix = component.prefix
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return canonical(to_diffusers(component.name, own))


def _read_file(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors of a file under its own names, lazily, and the metadata of a safetensors file."""
    if path.suffix in layout.PICKLES:
        return read_pickle(path), {}
    _check_safetensors(path)
    try:
        return mx.load(str(path), return_metadata=True)
    except RuntimeError as error:
        raise layout.damaged(path, str(error).partition("\n")[0]) from error


def _check_safetensors(path: Path) -> None:
    """Compare the header of a safetensors file with the size of the file.

    MLX reads lazily: without this, a file that was cut off would fail only in the middle of a run.

    Raises:
        ValueError: the header is not readable, or does not describe exactly the bytes that follow it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise layout.damaged(path, f"its {size} bytes do not begin with a header")
        try:
            spans = sorted(_spans(json.loads(file.read(length))))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise layout.damaged(path, "its header is not that of a safetensors file") from error
    position = 0
    for first, end, name, dtype, shape in spans:
        if dtype not in _ITEM_SIZES:
            raise ValueError(f"{path} holds {name} as {dtype}, which this library does not read: save it as F16 or F32")
        fits = all(0 <= length < 2**31 for length in shape)  # MLX counts in 32 bits, and does not check
        if first != position or end - first != math.prod(shape) * _ITEM_SIZES[dtype] or not fits:
            raise layout.damaged(path, f"its header gives the wrong place for {name}")
        position = end
    if 8 + length + position != size:
        raise layout.damaged(path, f"it has {size} bytes and should have {8 + length + position}")


def _spans(header: dict) -> Iterator[tuple[int, int, str, str, list[int]]]:
    """(first byte, end, name, type, shape) of each tensor in a safetensors header. Raises whatever is wrong with it."""
    for name, tensor in header.items():
        if name != "__metadata__":
            first, end = tensor["data_offsets"]
            whole = operator.index  # a size with a point, or in quotes, is none
            yield whole(first), whole(end), name, str(tensor["dtype"]), [whole(length) for length in tensor["shape"]]

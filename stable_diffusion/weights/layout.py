"""Know the diffusers layout of a checkpoint: its networks and tokenizers, and the files that hold them.

    model_index.json
    scheduler/scheduler_config.json
    unet/, vae/, text_encoder/, text_encoder_2/    config.json and weights: safetensors or pickles, perhaps of two
                                                   precisions, or in shards
    tokenizer/, tokenizer_2/                       vocab.json and merges.txt, or tokenizer.json; special tokens

``model_index.json`` decides. Files are named relative to the checkpoint, as on the Hub: "unet/config.json". A part that
is published alone has its files in the root of its repository, or in a subfolder as here.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .formats.safetensors import damaged
from .parts import NETWORKS, PARTS, TOKENIZER_CLASSES

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
VOCABULARY = ("vocab.json", "merges.txt")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SUFFIXES = (".safetensors", *PICKLES)  # of files of weights

# Pipelines with just the networks of this library. ControlNet and others have more, upscalers and SD 3 different ones.
_PIPELINES = re.compile(
    r"StableDiffusion(XL)?(Img2Img|Inpaint|InstructPix2Pix)?Pipeline|StableDiffusion(InpaintPipelineLegacy|"
    r"Depth2ImgPipeline)|LatentConsistencyModel(Img2Img)?Pipeline"
)
_SPECIAL_TOKENS = ("special_tokens_map.json", "tokenizer_config.json")  # not in every repository
_TOKENIZERS = {name: PARTS[name].tokenizer for name in NETWORKS if PARTS[name].tokenizer}
_CLASSES = (
    {name: (*PARTS[name].classes,) for name in NETWORKS}
    | dict.fromkeys(_TOKENIZERS.values(), TOKENIZER_CLASSES)
    | {"scheduler": ()}
)


@dataclass(frozen=True)
class Index:
    """Hold a model_index.json and its parts that are used; all else in it (a safety checker...) is not."""

    contents: dict
    networks: dict[str, str]  # {network: its subfolder, "unet/"}
    tokenizers: list[str]


def read_index(folder: Path, where: str, replaced: Collection[str] = ()) -> Index:
    """Read the model_index.json of a folder, whose entries are [library, class], or [null, null] for a missing part.

    ``where`` is the checkpoint's name, for messages. Networks in ``replaced`` come from elsewhere: they may be missing
    or of any class, and are left out. Raises ValueError for a pipeline or class that is not supported, or a missing
    part.
    """
    index = read_json(folder / INDEX)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or not _PIPELINES.fullmatch(pipeline):
        raise ValueError(
            f"{where} is a {pipeline}, which is not supported: "
            "this library runs Stable Diffusion 1, 2 and XL pipelines and latent consistency models"
        )
    present = []
    for part, classes in _CLASSES.items():
        entry = index.get(part)
        if part in replaced or not isinstance(entry, list) or not entry or entry[-1] is None:
            continue
        if classes and entry[-1] not in classes:
            raise ValueError(f"{where} has a {part} of class {entry[-1]}; supported is {' or '.join(classes)}")
        present.append(part)
    tokenizers = [name for encoder, name in _TOKENIZERS.items() if encoder in present or encoder in replaced]
    for part in ["unet", "vae", "scheduler", *(tokenizers or ["text_encoder"])]:
        if part not in present and part not in replaced:
            raise ValueError(f"{where} is not complete: its {INDEX} names no {part}")
    return Index(index, {part: f"{part}/" for part in present if part in NETWORKS}, tokenizers)


@dataclass(frozen=True)
class Listing:
    """Choose files of a checkpoint or a part of one, out of the names of all its files."""

    folder: Path  # with the files that are on this machine, perhaps not all of them
    names: Collection[str]
    float16: bool  # prefer weights in half precision
    where: str  # the checkpoint's name, for messages

    def weight_files(self, network: str, subfolder: str) -> list[str]:
        """Return the files to read for a network, or the index of its shards where this is not on this machine.

        Raises ValueError where there are none, or the index of shards is damaged.
        """
        choices = weight_choices(network, self.float16, subfolder)
        chosen = next((choice for choice in choices if choice in self.names), None)
        if chosen is None:
            best = next(weight_choices(network, False, subfolder))
            raise ValueError(f"{self.where} is not complete: {best} is missing")
        path = self.folder / chosen
        if not chosen.endswith(".json") or not path.is_file():
            return [chosen]
        suffix = ".bin" if ".bin." in chosen else ".safetensors"
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise damaged(path, "it has no weight_map")
        for shard in shards.values():
            # The index comes from outside: it may name files beside itself and nothing else.
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(suffix):
                raise ValueError(f"{path} names {shard!r}, which is not a {suffix[1:]} file beside it")
        return [f"{subfolder}{shard}" for shard in sorted(set(shards.values()))]

    def missing_files(self, networks: Mapping[str, str], small: Sequence[str] = ()) -> list[str]:
        """List the needed files that are not in the folder: small ones, or where these are there, weights.

        ``networks`` is {network: its subfolder, "unet/" or ""}; ``small`` are files that are needed beside them.
        """
        weights = [file for network, place in networks.items() for file in self.weight_files(network, place)]
        small = [*small, *(f"{place}config.json" for place in networks.values())]
        small += [file for file in weights if file.endswith(".json")]
        missing = [file for file in small if not (self.folder / file).is_file()]
        return missing or [file for file in weights if not (self.folder / file).is_file()]

    def missing_files_of(self, index: Index) -> list[str]:
        """List the missing files of a whole checkpoint, as ``missing_files`` does of some networks."""
        small = [SCHEDULER]
        for tokenizer in index.tokenizers:
            # transformers 5 writes the vocabulary as tokenizer.json alone.
            single = f"{tokenizer}/{VOCABULARY[0]}" not in self.names and f"{tokenizer}/tokenizer.json" in self.names
            small += [f"{tokenizer}/{file}" for file in (("tokenizer.json",) if single else VOCABULARY)]
            small += [f"{tokenizer}/{file}" for file in _SPECIAL_TOKENS if f"{tokenizer}/{file}" in self.names]
        return self.missing_files(index.networks, small)


def weight_choices(network: str, float16: bool, subfolder: str) -> Iterator[str]:
    """Yield the files that may hold a network's weights, or the index of its shards, the best choice first.

    Safetensors of either precision come before pickles.
    """
    stems = ("model", "diffusion_pytorch_model")[:: 1 if PARTS[network].library == "transformers" else -1]
    for suffix in (".safetensors", ".bin"):
        for half in (".fp16", "") if float16 else ("", ".fp16"):
            for stem in stems:
                stem = "pytorch_model" if (stem, suffix) == ("model", ".bin") else stem
                yield f"{subfolder}{stem}{half}{suffix}"
                yield f"{subfolder}{stem}{suffix}.index{half}.json"


def subfolder(kind: str, names: Collection[str]) -> str | None:
    """Return where a repository with these files has a part: "unet/", "" for its root, None when it has none."""
    return next((place for place in (f"{kind}/", "") if f"{place}config.json" in names), None)


def best_files(float16: bool) -> frozenset[str]:
    """Return the files that a repository at best has: where these are at hand, no listing could offer better ones."""
    weights = {next(weight_choices(network, float16, f"{network}/")) for network in NETWORKS}
    return frozenset(weights | {f"{name}/{file}" for name in _TOKENIZERS.values() for file in _SPECIAL_TOKENS})


def files_in(folder: Path) -> set[str]:
    """Return the names of a checkpoint folder's files; a link to nothing is not one."""
    return {path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()}


def read_json(path: Path) -> dict:
    """Read a JSON file whose value is an object. Raises ValueError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise damaged(path, "not a JSON object")
    return value

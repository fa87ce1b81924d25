"""Read the diffusers layout of a checkpoint: its networks and tokenizers, and their files.

    model_index.json
    scheduler/scheduler_config.json
    unet/, vae/, text_encoder/, text_encoder_2/    config.json and weights: safetensors or pickles, perhaps of two
                                                   precisions, or in shards
    tokenizer/, tokenizer_2/                       vocab.json and merges.txt, or tokenizer.json; special tokens

``model_index.json`` lists the parts. Files are named relative to the checkpoint, as on the Hub: "unet/config.json". A
single part has its files in the root of its repository, or in a subfolder as here.
"""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from ..files.text import read_json
from ..models.config import short
from .formats.kinds import kind_of
from .formats.safetensors import damaged
from .parts import NETWORKS, PARTS, STEMS

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
VOCABULARY = ("vocab.json", "merges.txt")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SUFFIXES = (".safetensors", *PICKLES, ".gguf")  # of weights files

# Supported pipelines. ControlNet and others have more networks, upscalers and SD 3 have different ones.
_PIPELINES = re.compile(
    r"StableDiffusion(XL)?(Img2Img|Inpaint|InstructPix2Pix)?Pipeline|StableDiffusion(InpaintPipelineLegacy|"
    r"Depth2ImgPipeline)|LatentConsistencyModel(Img2Img)?Pipeline"
)
UNCONDITIONAL = {  # pipelines without prompts, and the scheduler that a pipeline always uses
    "DDPMPipeline": None,
    "DDIMPipeline": "DDIMScheduler",
    "PNDMPipeline": "PNDMScheduler",
    "LDMPipeline": None,
}
SPECIAL_TOKENS = ("special_tokens_map.json", "tokenizer_config.json")  # not in every repository
_TOKENIZERS = {name: PARTS[name].tokenizer for name in NETWORKS if PARTS[name].tokenizer}
_CLASSES = {name: tuple(PARTS[name].classes) for name in NETWORKS} | {"scheduler": ()}  # of the entries used
_CLASSES |= dict.fromkeys(_TOKENIZERS.values(), ("CLIPTokenizer", "CLIPTokenizerFast"))


def check_noise(scheduler: Mapping, where: str) -> None:
    """Raise ValueError, with the kind of model, for a scheduler_config.json with an unsupported kind of noise."""
    name = scheduler["_class_name"]
    if not isinstance(name, str):
        raise ValueError(f"{where}: its scheduler class, {short(name)}, is not a text; download it again")
    if scheduler.get("sigma_data") is not None and not name.startswith("EDM"):
        kind, needed = f"an EDM model with the scheduler {short(name)}", "an EDMEulerScheduler"
    elif "flow" in f"{name} {scheduler.get('prediction_type')}".lower() or scheduler.get("use_flow_sigmas"):
        kind, needed = "a flow matching model, like Stable Diffusion 3 and Flux", "their noise and samplers"
    else:
        return
    text = f"{where} is {kind}, which is not supported: it needs {needed}"
    raise ValueError(f"{text}; use a model of SD 1, 2 or XL")


def check_suffix(path: str | os.PathLike) -> None:
    """Raise ValueError for a file without the suffix of a weights file."""
    if not os.fspath(path).endswith(SUFFIXES):
        kind_of(Path(path))  # names some other kinds of files
        raise ValueError(f"{path} is not a weights file: these end in {', '.join(SUFFIXES)}")


@dataclass(frozen=True)
class Component:
    """Describe one network of a checkpoint: its config.json and its weights files."""

    name: str  # one of PARTS
    config: dict
    files: tuple[Path, ...]  # several for weights in shards
    prefix: str = ""  # of its tensors' names in files with several networks
    scheduler: dict = field(default_factory=dict)  # settings in a UNet's file for scheduler_config.json
    few_steps: dict = field(default_factory=dict)  # settings of a few-step UNet: fields of RunDefaults


@dataclass(frozen=True)
class Checkpoint:
    """Describe a checkpoint whose files are all on this machine."""

    name: str  # for messages
    pipeline: str  # `_class_name` of model_index.json
    index: dict  # model_index.json
    scheduler: dict  # scheduler_config.json
    components: dict[str, Component]
    tokenizers: dict[str, Path]  # "tokenizer", "tokenizer_2" -> folder
    steps: int  # the model's defaults
    guidance: float
    pad_tokens: dict[str, str] = field(default_factory=dict)  # of tokenizers, instead of their folder's
    few_steps: dict = field(default_factory=dict)  # spacing, eta and timesteps of a few-step model


@dataclass(frozen=True)
class Index:
    """Hold the used networks of a folder, and its model_index.json."""

    components: dict[str, Component]  # empty while files are missing
    missing: list[str]  # required files that are not on this machine: small ones, else weights
    contents: dict = field(default_factory=dict)  # empty for a single part
    tokenizers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Listing:
    """Choose the files of a checkpoint or a part from the names of all files."""

    folder: Path  # holds the local files, possibly incomplete
    names: Collection[str]
    where: str  # the checkpoint's name, for messages
    float16: bool  # prefer weights in half precision

    def read_index(self, replaced: Collection[str] = ()) -> Index:
        """Read model_index.json, with entries [library, class], or [null, null] for a missing part.

        Networks in ``replaced`` come from other sources: they may be missing or of any class, and are omitted.
        Raises ValueError for an unsupported pipeline or class, or a missing part.
        """
        index = self._read_contents()
        pipeline = str(index.get("_class_name"))
        if pipeline in UNCONDITIONAL:
            raise ValueError(f"{self.where} is a {pipeline}, which takes no prompt: use UnconditionalDiffusion")
        if not _PIPELINES.fullmatch(pipeline):
            known = "this library runs Stable Diffusion 1, 2 and XL pipelines and latent consistency models"
            raise ValueError(f"{self.where} is a {pipeline}, which is not supported: {known}")
        present = []
        for part, classes in _CLASSES.items():
            entry = index.get(part)
            if part in replaced or not isinstance(entry, list) or not entry or entry[-1] is None:
                continue
            if classes and entry[-1] not in classes:
                raise ValueError(f"{self.where} has a {part} of class {entry[-1]}; supported: {' or '.join(classes)}")
            present.append(part)
        tokenizers = [name for encoder, name in _TOKENIZERS.items() if encoder in present or encoder in replaced]
        for part in ["unet", "vae", "scheduler", *(tokenizers or ["text_encoder"])]:
            if part not in present and part not in replaced:
                raise ValueError(f"{self.where} is incomplete: its {INDEX} names no {part}")
        small = [SCHEDULER]
        for name in tokenizers:
            # transformers 5 writes the vocabulary only as tokenizer.json.
            is_single = f"{name}/{VOCABULARY[0]}" not in self.names and f"{name}/tokenizer.json" in self.names
            small += [f"{name}/{file}" for file in (("tokenizer.json",) if is_single else VOCABULARY)]
            small += [f"{name}/{file}" for file in SPECIAL_TOKENS if f"{name}/{file}" in self.names]
        networks = {part: f"{part}/" for part in present if part in NETWORKS}
        return self._find(networks, small, contents=index, tokenizers=tokenizers)

    def read_unconditional(self) -> Index:
        """Read the model_index.json of a model without prompts; the oldest have no subfolders."""
        index = self._read_contents()
        if str(index.get("_class_name")) not in UNCONDITIONAL:
            text = f"{self.where} is a {short(index.get('_class_name'))}, not a supported pipeline without prompts"
            raise ValueError(f"{text}; supported: {', '.join(UNCONDITIONAL)}")
        in_folder = "unet/config.json" in self.names
        networks = {"unet": "unet/" if in_folder else ""} | ({"vae": "vqvae/"} if index.get("vqvae") else {})
        scheduler = SCHEDULER if SCHEDULER in self.names else Path(SCHEDULER).name
        small = [scheduler, *(f"{place}config.json" for place in networks.values())]
        if missing := [file for file in small if file not in self.names]:
            return Index({}, missing)
        return self._find(networks, [scheduler], contents=index)

    def find_part(self, kind: str) -> Index:
        """Find a part in a folder ``kind`` or in the root; ValueError if it or its weights are missing."""
        place = next((place for place in (f"{kind}/", "") if f"{place}config.json" in self.names), None)
        if place is None:
            folder = f"{self.folder} holds neither {kind}/config.json nor config.json"
            raise ValueError(f"{self.where} has no {kind}: {folder}")
        return self._find({kind: place}, [])

    def _read_contents(self) -> dict:
        if INDEX in self.names:
            return read_json(self.folder / INDEX)
        kind = read_json(self.folder / "config.json").get("_class_name") if "config.json" in self.names else None
        alone = f", but is only a {short(kind)}: give a whole model, and this as a part of it" if kind else ""
        raise ValueError(f"{self.where} is not a checkpoint in diffusers layout: {self.folder} has no {INDEX}{alone}")

    def _find(self, networks: Mapping[str, str], small: list[str], **contents: Any) -> Index:
        weights = {kind: self._weight_files(kind, place) for kind, place in networks.items()}
        needed = [*small, *(f"{place}config.json" for place in networks.values()), *chain(*weights.values())]
        if missing := [file for file in needed if not (self.folder / file).is_file()]:
            return Index({}, [file for file in missing if file.endswith((".json", ".txt"))] or missing, **contents)
        components = {}
        for kind, files in weights.items():
            config = read_json(self.folder / networks[kind] / "config.json")
            if PARTS[kind].tokenizer and isinstance(config.get("text_config"), dict):  # of a whole CLIP model
                config = config["text_config"] | {"architectures": ["CLIPTextModelWithProjection"]}
            components[kind] = Component(kind, config, tuple(self.folder / file for file in files))
        return Index(components, [], **contents)

    def _weight_files(self, network: str, place: str) -> list[str]:
        """Return the best files for a network, or the index of its shards where this is not on this machine."""
        # Either name may be in the folder of any network; its own comes first.
        stems, choices = sorted(STEMS.values(), key=lambda stem: stem != STEMS[PARTS[network].library]), []
        for suffix in (".safetensors", ".bin"):
            for half in (".fp16", "") if self.float16 else ("", ".fp16"):
                for stem in stems:
                    stem = "pytorch_model" if (stem, suffix) == ("model", ".bin") else stem
                    choices += [f"{place}{stem}{half}{suffix}", f"{place}{stem}{suffix}.index{half}.json"]
                    choices += [f"{place}{stem}{suffix}{half}.index.json", f"{place}{stem}{half}{suffix}.index.json"]
        chosen = next((choice for choice in choices if choice in self.names), None)
        if chosen is None:
            raise ValueError(f"{self.where} is incomplete: {place}{stems[0]}.safetensors is missing")
        path = self.folder / chosen
        if not chosen.endswith(".json") or not path.is_file():
            return [chosen]
        suffix = ".bin" if ".bin." in chosen else ".safetensors"
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise damaged(path, "it has no weight_map")
        for shard in shards.values():
            # The index is untrusted: it may only name files beside itself.
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(suffix):
                raise ValueError(f"{path} names {shard!r}, which is not a {suffix[1:]} file beside it")
        return [f"{place}{shard}" for shard in sorted(set(shards.values()))]


def best_files(float16: bool) -> frozenset[str]:
    """Return the best files that a repository could have: if they are cached, no listing is needed."""
    half = ".fp16" if float16 else ""
    weights = {f"{network}/{STEMS[PARTS[network].library]}{half}.safetensors" for network in NETWORKS}
    return frozenset(weights | {f"{name}/{file}" for name in _TOKENIZERS.values() for file in SPECIAL_TOKENS})


def files_in(folder: Path) -> set[str]:
    """Return the names of a checkpoint folder's files, without broken links."""
    return {path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()}

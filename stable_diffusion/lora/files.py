"""Find and read LoRA files: file -> factors of the changes of a model's layers."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from ..files.text import parse_json, read_json
from ..models.config import listed
from ..weights import hub, layout
from ..weights.embeddings import vectors_of
from ..weights.files import read_file
from ..weights.formats.safetensors import loading_stream
from .delta import LoRADelta, is_complete, rank_of
from .names import BUNDLED, PEFT_LENGTHS, UNUSED, not_supported, read_key

FOLDER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers, of PEFT
_PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True, eq=False)
class LoRAWeights:
    """Hold a LoRA file: the changes of layers, the names of unknown tensors, and the metadata.

    ``embeddings`` are words that were trained with the LoRA, with their vectors [n, C] for each text encoder.
    """

    path: Path
    deltas: tuple[LoRADelta, ...]
    unknown: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, tuple[mx.array, ...]] = field(default_factory=dict)

    @property
    def context_width(self) -> int | None:
        """Return the width of the encoded prompt in cross-attention, which identifies the model family."""
        readers = [d for d in self.deltas if d.network == "unet" and d.layer.endswith("attn2_to_k")]
        factors = (d[role] for d in readers for role in ("down", "hada_w1_b", "diff") if role in d)
        return next((factor.shape[1] for factor in factors if factor.ndim > 1), None)


def read_lora(source: str | os.PathLike) -> LoRAWeights:
    """Read a LoRA, lazily: a file, a folder of diffusers or PEFT, or a Hub id, owner/name or owner/name:file.

    Raises ValueError for a file that is damaged, is not a LoRA, or lacks a factor, and OSError for a file that does not
    exist or cannot be downloaded.
    """
    path = locate(source)
    tensors, metadata = read_file(path)
    if what := not_supported(tensors):
        known = "give a LoRA, LoCon, LoHa, LoKr or DoRA for Stable Diffusion 1, 2 or XL"
        raise ValueError(f"{path} is {what}, which is not supported: {known}")
    grouped: dict[tuple[str, str], dict[str, mx.array]] = {}
    unknown, bundled = [], {}
    for name, tensor in sorted(tensors.items()):
        if match := BUNDLED.fullmatch(name):
            bundled.setdefault(match[1], {})[match[2]] = tensor
            continue
        key = read_key(name)
        if key is None:
            unknown.append(name)
            continue
        network, layer, role = key
        if UNUSED.fullmatch(f"{network}.{layer}"):
            continue
        if tensor.size == 0 or (tensor.ndim == 0 and role != "alpha"):
            raise ValueError(f"{path} is damaged: {name} has the wrong shape, {tensor.shape}")
        if role == "dora_scale":  # PEFT's norms, always of rows, get one axis, others at least two
            shape = (-1,) if PEFT_LENGTHS in name else (len(tensor), *(tensor.shape[1:] or (1,)))
            tensor = mx.reshape(tensor, shape, stream=loading_stream(mx.default_device().type))
        grouped.setdefault((network, layer), {})[role] = tensor
    if incomplete := [".".join(layer) for layer, factors in grouped.items() if not is_complete(factors)]:
        raise ValueError(f"{path} is incomplete: factors are missing for {listed(incomplete)}")
    if not grouped:
        raise ValueError(f"{path} is not a LoRA: it holds {listed(unknown) or 'nothing'}")
    mx.eval([factors["alpha"] for factors in grouped.values() if "alpha" in factors])
    settings = _settings(path, metadata)
    deltas = (_delta(path, *layer, factors, settings) for layer, factors in grouped.items())
    embeddings = {word: vectors_of(vectors, f"{path}, {word}") for word, vectors in bundled.items()}
    return LoRAWeights(path, tuple(deltas), tuple(unknown), metadata, embeddings)


def locate(source: str | os.PathLike) -> Path:
    """Return the file of a LoRA, see :func:`read_lora`. A file on the Hub is downloaded into the cache."""
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))
    if path.is_file():
        layout.check_suffix(path)
        return path
    if path.is_dir():
        if file := next((path / file for file in FOLDER_FILES if (path / file).is_file()), None):
            return file
        raise ValueError(f"{name} holds no LoRA: it has no {' or '.join(FOLDER_FILES)}; give the path of a file")
    hub_file = hub.FILE.fullmatch(name)
    if hub_file is None or (hub_file["file"] is None and path.suffix in layout.SUFFIXES):
        raise FileNotFoundError(f"there is no LoRA at {name}; give a file, a folder, or a Hub id as owner/name:file")
    files = FOLDER_FILES if hub_file["file"] is None else (hub_file["file"],)

    def missing_files(folder: Path, names: set[str], repo: str) -> list[str]:
        return [_PEFT_CONFIG] if _PEFT_CONFIG in names and not (folder / _PEFT_CONFIG).is_file() else []

    spec = hub.DownloadSpec("a LoRA", files, missing_files, "connect once, or give a local file")
    folder = hub.fetch((hub_file["repo"],), spec)[1]
    return next(folder / file for file in files if (folder / file).is_file())


def _settings(path: Path, metadata: Mapping[str, str]) -> dict:
    """Read the settings of the training, in the file (diffusers) or beside it (PEFT): {"unet.lora_alpha": 8, ...}."""
    config = path.with_name(_PEFT_CONFIG)
    if path.name == FOLDER_FILES[1] and config.is_file():
        return read_json(config)
    return parse_json(metadata.get("lora_adapter_metadata", "{}"), f"{path}: lora_adapter_metadata")


def _delta(path: Path, network: str, layer: str, factors: dict[str, mx.array], settings: Mapping) -> LoRADelta:
    """Build the change of a layer. Without alpha in the file, it is read from the settings, or equals the rank."""
    rank, alpha = rank_of(factors), factors.pop("alpha", None)
    if rank is None:
        return LoRADelta(network, layer, factors)
    own = {key.removeprefix(f"{network}."): value for key, value in settings.items() if key.startswith(f"{network}.")}
    settings = {**settings, **own}
    if alpha is not None:
        alpha = alpha.item() if alpha.size == 1 else math.nan
    else:
        alpha = settings.get("lora_alpha")
        if not isinstance(patterns := settings.get("alpha_pattern") or {}, dict):
            raise ValueError(f"the alpha_pattern of {path} is {patterns!r:.60}, not an object; download it again")
        for pattern, value in patterns.items():
            flat = pattern.strip("^$").replace(".", "_")
            alpha = value if layer == flat or layer.endswith(f"_{flat}") else alpha
    try:
        multiplier = 1.0 if alpha is None else float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (TypeError, ValueError, OverflowError):  # JSON holds texts, lists and integers of any size
        multiplier = math.nan
    if not math.isfinite(multiplier):
        raise ValueError(f"the LoRA {path} has alpha {alpha!r:.60} for {network}.{layer}, which is not a number")
    return LoRADelta(network, layer, factors, multiplier)

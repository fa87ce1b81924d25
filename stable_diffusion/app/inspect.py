"""Report the kind and details of a model, a part of one, a LoRA, an embedding or an image.

The report comes from names, shapes and configurations. Only a LoRA's alphas and an embedding's vectors are read.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..diffusion.sample import MODES
from ..files.text import parse_json
from ..images.files import SUFFIXES as IMAGES
from ..images.files import read_text
from ..lora.delta import LoRADelta, rank_of
from ..lora.files import LoRAWeights, read_lora
from ..lora.names import read_key
from ..models.config import readable
from ..weights import layout
from ..weights.embeddings import read_embedding
from ..weights.files import Checkpoint, Component, open_checkpoint, open_part, read_tensors
from ..weights.formats.single_file import find, read_config
from ..weights.parts import FAMILIES, family_of, family_title, part_of_class
from ..weights.quantize import read_quantization

Report = dict[str, Any]  # values that JSON supports

_LAYERS = re.compile(r"attn[12]|self_attn|ff|mlp|(proj|conv)_(in|out)|resnets|(down|up)samplers|time_emb")
_LORA_KINDS = {"hada": "LoHa", "lokr": "LoKr", "diff": "whole differences"}  # by the first letters of a factor's role
_METADATA = ("modelspec.title", "modelspec.architecture", "modelspec.trigger_phrase", "ss_base_model_version")


def inspect(source: str | os.PathLike, *, revision: str | None = None) -> Report:
    """Report the kind and details of ``source``: a folder, a file, an alias or a Hub id.

    Raises ValueError or OSError, one line, for a source that is missing, damaged or not supported.
    """
    with readable(f"{source}"):
        path = Path(os.path.expanduser(source))
        if path.suffix.lower() in IMAGES and not path.is_dir():
            return _inspect_image(path)
        try:
            return _inspect_checkpoint(open_checkpoint(source, revision=revision, tokenizer=path.parent))
        except (ValueError, OSError) as error:
            if path.is_file() and path.suffix in layout.SUFFIXES:
                return _inspect_file(path, str(error))
            if not (path / layout.INDEX).is_file():
                for attempt in (_inspect_part, _inspect_lora):
                    with suppress(ValueError, OSError):
                        return attempt(source)
            raise


def _inspect_image(path: Path) -> Report:
    texts: Report = read_text(path)
    with suppress(ValueError):
        texts |= {"stable_diffusion": parse_json(texts.get("stable_diffusion", ""), path)}
    return {"kind": "image"} | (texts or {"note": "no generation settings are recorded"})


def _inspect_file(path: Path, reason: str) -> Report:
    """Report a file of weights that is not a whole checkpoint; ``reason`` says why."""
    tensors = read_tensors(Component("file", {}, (path,)))
    if any(map(read_key, tensors)):
        return _inspect_lora(path)
    if len(tensors) <= 2:
        with suppress(ValueError):
            return _inspect_embedding(path)
    components = [
        Component(name, read_config(name, tensors, prefix, str(path)), (path,), prefix)
        for name, prefix in find(tensors, str(path)).items()
    ]
    if len(components) == 1:
        return _inspect_network(components[0])
    return {"kind": "parts of a checkpoint", "note": reason} | _sizes(components)


# --- checkpoints and networks ----------------------------------------------------------------------------------------


def _inspect_checkpoint(checkpoint: Checkpoint) -> Report:
    unet, scheduler = checkpoint.components["unet"].config, checkpoint.scheduler
    return {
        "kind": "checkpoint",
        "family": family_of(unet).title,
        "pipeline": checkpoint.pipeline,
        "mode": MODES.get(unet.get("in_channels", 4) - 4, "unknown"),
        "prediction": scheduler.get("prediction_type", "epsilon"),
        "scheduler": scheduler["_class_name"],
        "steps": checkpoint.steps,
        "guidance": checkpoint.guidance,
    } | _sizes(checkpoint.components.values())


def _inspect_part(source: str | os.PathLike) -> Report:
    """Report a folder or a repository whose root has the files of one network."""
    name = _class_name(open_part(source, "vae").config)  # the config names its class, whatever the network
    part = part_of_class(name)
    if part is None:
        raise ValueError(f"{source} is a {name}, which is not supported")
    return _inspect_network(open_part(source, part))


def _inspect_network(component: Component) -> Report:
    report = {"kind": component.name}
    if "cross_attention_dim" in component.config:
        report["family"] = family_of(component.config).title
    elif component.config.get("scaling_factor") == FAMILIES["xl"].scaling_factor:
        report["family"] = FAMILIES["xl"].title
    return report | _sizes([component])


def _sizes(components: Iterable[Component]) -> Report:
    """Report sizes and types of the weights of networks. Quantized weights count as unquantized parameters."""
    parts: dict[str, Report] = {}
    for component in components:
        tensors, quantization = read_tensors(component), read_quantization(component.config)
        parts[component.name] = {
            "class": _class_name(component.config),
            "parameters": sum(_parameters(name, tensor, quantization) for name, tensor in tensors.items()),
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "types": _types(tensors.values()),
            "files": len(component.files),
        }
        if quantization:
            parts[component.name] |= {"bits": quantization[0], "group_size": quantization[1]}
    return {key: sum(part[key] for part in parts.values()) for key in ("parameters", "bytes")} | {"parts": parts}


def _parameters(name: str, tensor: mx.array, quantization: tuple[int, int] | None) -> int:
    """Count the parameters of a tensor. In quantized layers each scale stands for a group, of 32 or more if a float."""
    if quantization and name.endswith(".scales"):
        return tensor.size * (quantization[1] if tensor.dtype == mx.uint8 else max(quantization[1], 32))
    return 0 if quantization and (tensor.dtype == mx.uint32 or name.endswith(".biases")) else tensor.size


def _class_name(config: Mapping[str, Any]) -> str:
    return config.get("_class_name") or (config.get("architectures") or ["unknown"])[0]


def _types(tensors: Iterable[mx.array]) -> dict[str, int]:
    """Return {type: bytes}, the most common first."""
    types: Counter[str] = Counter()
    for tensor in tensors:
        types[str(tensor.dtype).removeprefix("mlx.core.")] += tensor.nbytes
    return dict(types.most_common())


# --- embeddings and LoRAs --------------------------------------------------------------------------------------------


def _inspect_embedding(path: Path) -> Report:
    (word, *_), vectors = read_embedding(path)
    widths = [v.shape[1] for v in vectors]
    family = FAMILIES["xl"].title if len(widths) > 1 else family_title(widths[0])
    return {"kind": "embedding", "family": family, "word": word, "vectors": len(vectors[0]), "widths": widths}


def _inspect_lora(source: str | os.PathLike) -> Report:
    lora = read_lora(source)
    targets: dict[str, Counter[str]] = defaultdict(Counter)
    for delta in lora.deltas:
        layer = _LAYERS.search(delta.layer)
        targets[delta.network][layer[0] if layer else delta.layer] += 1
    ranks = [(rank_of(delta), delta.multiplier) for delta in lora.deltas]
    tensors = [factor for delta in lora.deltas for factor in delta.values()]
    report = {
        "kind": " and ".join(sorted({_lora_kind(delta) for delta in lora.deltas})),
        "family": _lora_family(lora),
        "ranks": sorted({rank for rank, _ in ranks if rank}),
        "alphas": sorted({round(multiplier * rank, 6) for rank, multiplier in ranks if rank}),
        "parameters": sum(factor.size for factor in tensors),
        "bytes": sum(factor.nbytes for factor in tensors),
        "types": _types(tensors),
        "targets": {network: dict(sorted(layers.items())) for network, layers in targets.items()},
    }
    report |= {"not recognised": list(lora.unknown)} if lora.unknown else {}
    return report | {key: lora.metadata[key] for key in _METADATA if key in lora.metadata}


def _lora_kind(delta: LoRADelta) -> str:
    kind = next((_LORA_KINDS[role[:4]] for role in delta if role[:4] in _LORA_KINDS), "LoRA")
    return f"{kind} (DoRA)" if "dora_scale" in delta else kind


def _lora_family(lora: LoRAWeights) -> str:
    """Return the family by the width of the cross-attention context, else by a second text encoder."""
    if lora.context_width is not None:
        return family_title(lora.context_width)
    return FAMILIES["xl"].title if any(delta.network == "text_encoder_2" for delta in lora.deltas) else "unknown"

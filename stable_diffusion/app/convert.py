"""Write a model as a folder in diffusers layout: quantized, in half precision, with LoRAs, from any kind of file.

The folder loads without conversion, and appears only when it is complete. Tensors are read, converted and written one
by one, so memory for one tensor is enough.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..files.whole import check_new, check_space, new_folder
from ..lora.files import read_lora
from ..lora.layers import check_fit, fuse
from ..weights import catalog, layout
from ..weights.files import Checkpoint, open_checkpoint, open_part, read_tensors, with_few_steps
from ..weights.load import load_component
from ..weights.parts import PARTS, STEMS
from ..weights.quantize import in_words, quantization_config, quantize, read_quantization, remaining_quantization
from ..weights.save import stored_tensors, write_json, write_weights
from .engine import chosen_networks
from .request import Request

MAX_SHARD_SIZE = 5_000_000_000  # bytes
_SMALL_FILES = 2**24  # bytes of all other files, an upper bound
_TOKENIZER_FILES = (*layout.VOCABULARY, "tokenizer.json", "added_tokens.json", *layout.SPECIAL_TOKENS)


@dataclass(frozen=True)
class _Network:
    """Hold a network to write: its config.json, and its lazy tensors under the names of the file."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, mx.array]

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def convert(
    request: Request,
    dest: str | os.PathLike,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the model of a request as a folder in diffusers layout, and return the folder.

    Args:
        request: names the model and all changes to it: replaced networks, bits, LoRAs to fuse, and the
            ``dtype`` of the UNet and the text encoders (None: float16). The autoencoder keeps its type.
        dest: the folder to write. It must not exist, or be empty.
        max_shard_size: bytes of a weight file; larger ones are split.
        report: called with one line per network.

    Raises ValueError or OSError, one line, for an unreadable model, an existing destination, weights that overflow in
    ``dtype``, or a full disk. The destination is removed then.
    """
    dest = check_new(Path(dest))  # before anything is downloaded
    dtype = getattr(mx, request.dtype or "float16")
    source = {"float16": dtype != mx.float32, "revision": request.revision}
    replaced = {"tokenizer": request.tokenizer, "prediction": request.prediction}
    checkpoint = open_checkpoint(request.model, parts=chosen_networks(request)["parts"], **source, **replaced)
    networks = _networks(checkpoint, request, dtype)
    for lora in (read_lora(path) for path, scale in request.lora if scale):
        if settings := catalog.few_step_settings(lora.path.as_posix(), lora.metadata):
            checkpoint = with_few_steps(checkpoint, settings)
    entry = checkpoint.index.get("depth_estimator")  # [None, None] if absent
    if isinstance(entry, list) and any(entry):
        estimator = open_part(request.model, "depth_estimator", **source)
        networks.append(_Network(estimator.name, estimator.config, dict(read_tensors(estimator))))
    check_space(dest, sum(network.size for network in networks) + _SMALL_FILES)
    with new_folder(dest) as folder:
        for network in networks:
            report(_write_network(folder / network.name, network, max_shard_size))
        for name, tokenizer in checkpoint.tokenizers.items():
            _write_tokenizer(folder / name, tokenizer, checkpoint.pad_tokens.get(name))
        (folder / "scheduler").mkdir()
        write_json(folder / layout.SCHEDULER, checkpoint.scheduler)
        write_json(folder / layout.INDEX, _index(checkpoint, networks))
    return dest


def _networks(checkpoint: Checkpoint, request: Request, dtype: mx.Dtype) -> list[_Network]:
    """Prepare the networks to write. Nothing of their weights is read yet."""
    components, chosen, networks = checkpoint.components, chosen_networks(request), []
    bits = {"unet": chosen.get("unet_bits"), "vae": None}  # all others are text encoders
    # Most autoencoders run in float32: rounding their weights would change the images.
    modules = {name: load_component(part, None if name == "vae" else dtype) for name, part in components.items()}
    loras = [(read_lora(path), scale) for path, scale in request.lora]
    for lora, scale in loras:
        check_fit(modules, lora, scale, request.lora_partial)
    fuse(modules, loras)
    for name, module in modules.items():
        config = dict(components[name].config)
        library, class_name = _library_and_class(name, config)
        # Other programs need the name of the class, which some configs lack.
        config |= {"_class_name": class_name} if library == "diffusers" else {"architectures": [class_name]}
        quantization = remaining_quantization(components[name], bits.get(name, chosen.get("text_bits")))
        if quantization is not None:
            quantize(module, *quantization)
            config["quantization"] = quantization_config(*quantization)
        networks.append(_Network(name, config, stored_tensors(module)))
    return networks


def _library_and_class(name: str, config: Mapping[str, Any]) -> list[str]:
    part = PARTS[name]
    return [part.library, config.get("_class_name") or (config.get("architectures") or list(part.classes))[0]]


def _write_network(folder: Path, network: _Network, max_shard_size: int) -> str:
    details = [f"{network.size / 1e6:,.1f} MB"]  # the tensors are removed from it as they are written
    folder.mkdir()
    write_json(folder / "config.json", network.config)
    files = write_weights(folder, STEMS[PARTS[network.name].library], network.tensors, max_shard_size)
    if quantization := read_quantization(network.config):
        details.append(in_words(quantization[0]))
    if len(files) > 1:
        details.append(f"{len(files)} files")
    return f"{network.name}: {', '.join(details)}"


def _write_tokenizer(folder: Path, source: Path, pad_token: str | None) -> None:
    """Copy a tokenizer's files, with another ``pad_token``."""
    folder.mkdir()
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if pad_token is not None:
        path = folder / "special_tokens_map.json"
        write_json(path, (layout.read_json(path) if path.is_file() else {}) | {"pad_token": pad_token})


def _index(checkpoint: Checkpoint, networks: Sequence[_Network]) -> dict[str, Any]:
    """Return the model_index.json of the written parts; other parts are null, as in diffusers' files."""
    index = {name: [None, None] if isinstance(entry, list) else entry for name, entry in checkpoint.index.items()}
    index |= {network.name: _library_and_class(network.name, network.config) for network in networks}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in checkpoint.tokenizers}
    index["scheduler"] = ["diffusers", checkpoint.scheduler["_class_name"]]
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    defaults = (checkpoint.steps, checkpoint.guidance)
    if checkpoint.few_steps or defaults != catalog.defaults_for(checkpoint.pipeline, checkpoint.scheduler):
        # The defaults that the catalog has for the source.
        index["_defaults"] = {"steps": defaults[0], "guidance": defaults[1]} | checkpoint.few_steps
    return index

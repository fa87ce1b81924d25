"""Write a model in the form that one wants to keep: quantized, in half precision, or from another kind of file.

    python -m stable_diffusion.convert SOURCE DEST -q

DEST is a folder in diffusers layout. It loads at once, and appears when it is complete. Tensors are read, converted and
written one by one, so that memory for one of them is enough.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..lora.files import read_lora
from ..lora.layers import fuse
from ..weights import catalog, layout
from ..weights.files import Checkpoint, Component, open_checkpoint, open_part, read_tensors
from ..weights.load import load_component
from ..weights.quantize import GROUP_SIZES, quantize_lazily, read_quantization, still_to_do
from ..weights.save import check_new, check_space, new_folder, stored_tensors, write_bytes, write_json, write_weights
from . import types as values
from .flags import add_weights, chosen_bits, chosen_parts
from .parser import Parser

DTYPES = {"float16": mx.float16, "float32": mx.float32, "bfloat16": mx.bfloat16}
MAX_SHARD_SIZE = 5_000_000_000  # bytes
_SMALL_FILES = 2**24  # bytes; all that is not weights, generously
_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    "depth_estimator": ("transformers", "DPTForDepthEstimation"),
}
_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class _Part:
    """A network to write: its config.json, and its lazy tensors as they will stand in the file."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, mx.array]

    @property
    def size(self) -> int:
        return sum(value.nbytes for value in self.tensors.values())


def convert(
    source: str | os.PathLike,
    dest: str | os.PathLike,
    *,
    dtype: str = "float16",
    unet_bits: int | None = None,
    text_bits: int | None = None,
    loras: Sequence[tuple[str | os.PathLike, float]] = (),
    lora_partial: bool = False,
    revision: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    report: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Path:
    """Read a model and write it as a folder in diffusers layout.

    Args:
        source: whatever ``StableDiffusion`` opens.
        dest: the folder to write; it must not exist, or be empty.
        dtype: "float16", "float32" or "bfloat16", the type of the UNet and the text encoders. The autoencoder keeps
            its own, because most are computed in float32 whatever the rest is.
        unet_bits: quantize the UNet to so many bits; text_bits: the same for the text encoders.
        loras: LoRAs to add to the weights, (what ``read_lora`` reads, scale) each.
        lora_partial: add what fits of a LoRA even if some of it does not.
        revision: branch, tag or commit of a Hub repository.
        max_shard_size: bytes of a weight file, beyond which it is split.
        report: is told in a line what has been written.
        options: ``tokenizer``, ``prediction`` and ``parts`` as ``open_checkpoint`` takes them.

    The result generates the images that ``source`` does with the same type and bits, and is made in the memory of a few
    tensors. Unquantized it is read by other programs too. Returns the folder.

    Raises ValueError or OSError, one line, for a source that cannot be read, a destination that is taken, weights that
    do not fit into ``dtype``, or a disk without room; then nothing is left of the destination.
    """
    dest = check_new(Path(dest))  # before anything is downloaded
    half = dtype == "float16"
    checkpoint = open_checkpoint(source, float16=half, revision=revision, **options)
    bits = {"unet": unet_bits, "text_encoder": text_bits, "text_encoder_2": text_bits}
    parts = _prepare(checkpoint, DTYPES[dtype], bits, loras, lora_partial)
    if _is_there(checkpoint.index, "depth_estimator"):
        estimator = open_part(source, "depth_estimator", float16=half, revision=revision)
        parts.append(_Part(estimator.name, estimator.config, read_tensors(estimator)))
    check_space(dest, sum(part.size for part in parts) + _SMALL_FILES)
    with new_folder(dest) as folder:
        for part in parts:
            report(_write_part(folder, part, max_shard_size))
        for name, tokenizer in checkpoint.tokenizers.items():
            _write_tokenizer(folder / name, tokenizer, checkpoint.pad_tokens.get(name))
        (folder / "scheduler").mkdir()
        write_json(folder / layout.SCHEDULER, checkpoint.scheduler)
        write_json(folder / layout.INDEX, _index(checkpoint, parts))  # last: without it there is no checkpoint
    return dest


def _prepare(
    checkpoint: Checkpoint,
    dtype: mx.Dtype,
    bits: Mapping[str, int | None],
    loras: Sequence[tuple[str | os.PathLike, float]],
    partial: bool,
) -> list[_Part]:
    """Plan what is written of each network; nothing of them is read yet."""
    components = checkpoint.components
    modules = {
        # Most autoencoders are computed in float32 whatever the rest is: rounding them would change the images.
        name: load_component(component, None if name == "vae" else dtype)
        for name, component in components.items()
    }
    if loras:
        fuse(modules, [(read_lora(path), scale) for path, scale in loras], partial=partial, keep=False)
    return [_part(components[name], module, bits.get(name)) for name, module in modules.items()]


def _part(component: Component, module: nn.Module, bits: int | None) -> _Part:
    config = _named(component)
    try:
        pending = still_to_do(config, None if bits is None else (bits, GROUP_SIZES[component.name]))
    except ValueError as error:
        raise ValueError(f"{component.name} of {component.files[0].parent}: {error}") from error
    if pending is not None:
        quantize_lazily(module, *pending)
        config["quantization"] = {"bits": pending[0], "group_size": pending[1]}
    return _Part(component.name, config, stored_tensors(module))


def _named(component: Component) -> dict[str, Any]:
    """The config with the name of its class, which is not in all of them and which other programs ask for."""
    library, name = _entry(component.name, component.config)
    return dict(component.config) | ({"_class_name": name} if library == "diffusers" else {"architectures": [name]})


def _write_part(folder: Path, part: _Part, max_shard_size: int) -> str:
    """Write a network; returns a line that says what has been written."""
    place, size = folder / part.name, part.size
    place.mkdir()
    write_json(place / "config.json", part.config)
    stem = "diffusion_pytorch_model" if _CLASSES[part.name][0] == "diffusers" else "model"
    files = write_weights(place, stem, part.tensors, max_shard_size)
    quantized = read_quantization(part.config)
    details = [f"{size / 1e6:,.1f} MB"]
    details += [f"{quantized[0]} bits"] if quantized else []
    details += [f"{len(files)} files"] if len(files) > 1 else []
    return f"{part.name}: {', '.join(details)}"


def _write_tokenizer(folder: Path, source: Path, pad_token: str | None) -> None:
    """Copy a tokenizer's files; ``pad_token`` is for one whose own files say another, or nothing."""
    folder.mkdir()
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            write_bytes(folder / name, (source / name).read_bytes())
    if pad_token is not None:
        path = folder / "special_tokens_map.json"
        write_json(path, (layout.read_json(path) if path.is_file() else {}) | {"pad_token": pad_token})


def _index(checkpoint: Checkpoint, parts: Sequence[_Part]) -> dict[str, Any]:
    """The model_index.json of what has been written: parts that have not are null, as diffusers says it."""
    written = {part.name: _entry(part.name, part.config) for part in parts}
    written |= {name: _entry(name, {}) for name in checkpoint.tokenizers}
    written["scheduler"] = _entry("scheduler", checkpoint.scheduler)
    left_out = {key: [None, None] for key, value in checkpoint.index.items() if isinstance(value, list)}
    index = checkpoint.index | left_out | written
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    own = (checkpoint.steps, checkpoint.guidance)
    if own != catalog.defaults_for(checkpoint.pipeline, checkpoint.scheduler):
        index["_defaults"] = {"steps": own[0], "guidance": own[1]}  # what the catalog knew of the source
    return index


def _entry(name: str, config: Mapping[str, Any]) -> list[str]:
    """[library, class] of a part; its config knows the class, if anything does."""
    library, usual = _CLASSES[name]
    return [library, config.get("_class_name") or (config.get("architectures") or [usual])[0]]


def _is_there(index: Mapping[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and bool(entry) and entry[-1] is not None


# --- command line ------------------------------------------------------------------------------------------------


def make_parser(prog: str | None = None) -> Parser:
    """The parser of this command line, under the name ``prog``."""
    parser = Parser(
        prog=prog or "stable_diffusion.convert", description="Write a model as a folder that loads at once."
    )
    parser.add_argument("source", help="what to convert: a name, a Hub id, a folder or a file")
    parser.add_argument("dest", help="the folder to write, in diffusers layout; it must not exist")
    parser.add_version()
    add_weights(parser.add_argument_group("what is read", "Beside the source, and of what precision it becomes."))
    add = parser.add_argument_group("what is written", "The form of the files.").add_argument
    add("--dtype", choices=DTYPES, default="float16", help="of the UNet and the text encoders (float16)")
    add(
        "--max_shard_size",
        type=values.file_size,
        default=MAX_SHARD_SIZE,
        metavar="SIZE",
        help="of a file of weights, beyond which there are several (5GB)",
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: those of the process); returns the exit code."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    try:
        path = convert(
            args.source,
            args.dest,
            dtype=args.dtype,
            **chosen_bits(args),
            loras=args.lora,
            lora_partial=args.lora_partial,
            revision=args.revision,
            max_shard_size=args.max_shard_size,
            report=lambda line: print(line, file=sys.stderr, flush=True),
            tokenizer=args.tokenizer,
            prediction=args.prediction,
            parts=chosen_parts(args),
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except (RuntimeError, MemoryError) as error:  # what MLX raises where memory runs out or a file vanishes
        parser.fail(1, f"the conversion failed ({str(error) or 'out of memory'}); nothing was written")
    except KeyboardInterrupt:
        parser.fail(130, "interrupted; nothing was written")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

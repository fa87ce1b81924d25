"""Write a model in the form that one wants to keep: quantized, in half precision, or from another kind of file.

    python -m stable_diffusion.convert SOURCE DEST -q

DEST is a folder in diffusers layout. It loads at once, and appears when it is complete. Tensors are read, converted and
written one by one, so that memory for one of them is enough.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import catalog
from .arguments import TEXT_BITS, UNET_BITS, Parser, add
from .weights import layout
from .weights.files import Checkpoint, Component, open_checkpoint
from .weights.load import load_component
from .weights.quantize import BITS, GROUP_SIZES, quantize_lazily, read_quantization, still_to_do
from .weights.save import check_new, check_space, new_folder, stored_tensors, write_bytes, write_json, write_weights

DTYPES = {"float16": mx.float16, "float32": mx.float32, "bfloat16": mx.bfloat16}
MAX_SHARD_SIZE = 5_000_000_000  # bytes
_SMALL_FILES = 2**24  # bytes; all that is not weights, generously
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
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
    revision: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Read a model and write it as a folder in diffusers layout.

    Args:
        source: whatever ``StableDiffusion`` opens.
        dest: the folder to write; it must not exist, or be empty.
        dtype: "float16", "float32" or "bfloat16", the type of the UNet and the text encoders. The autoencoder keeps
            its own, because it is always computed in float32.
        unet_bits: quantize the UNet to so many bits; text_bits: the same for the text encoders.
        revision: branch, tag or commit of a Hub repository.
        max_shard_size: bytes of a weight file, beyond which it is split.
        report: is told in a line what has been written.

    The result generates the images that ``source`` does with the same type and bits, and is made in the memory of a few
    tensors. Unquantized it is read by other programs too. Returns the folder.

    Raises ValueError or OSError, one line, for a source that cannot be read, a destination that is taken, weights that
    do not fit into ``dtype``, or a disk without room; then nothing is left of the destination.
    """
    dest = check_new(Path(dest))  # before anything is downloaded
    checkpoint = open_checkpoint(source, float16=dtype == "float16", revision=revision)
    bits = {"unet": unet_bits, "text_encoder": text_bits, "text_encoder_2": text_bits}
    parts = [_prepare(part, DTYPES[dtype], bits.get(name)) for name, part in checkpoint.components.items()]
    check_space(dest, sum(part.size for part in parts) + _SMALL_FILES)
    with new_folder(dest) as folder:
        for part in parts:
            size = part.size
            files = _write_part(folder, part, max_shard_size)
            quantized = read_quantization(part.config)
            kind = f", {quantized[0]} bits" if quantized else ""
            report(f"{part.name}: {size / 1e6:.1f} MB{kind}" + (f", {len(files)} files" if len(files) > 1 else ""))
        for name, tokenizer in checkpoint.tokenizers.items():
            _write_tokenizer(folder / name, tokenizer, checkpoint.pad_tokens.get(name))
        (folder / "scheduler").mkdir()
        write_json(folder / layout.SCHEDULER, checkpoint.scheduler)
        write_json(folder / layout.INDEX, _index(checkpoint))  # last: without it there is no checkpoint
    return dest


def _prepare(component: Component, dtype: mx.Dtype, bits: int | None) -> _Part:
    """Plan what is written of a network; nothing of it is read yet."""
    if component.name == "vae":
        dtype = None  # it is computed in float32 whatever the rest is, so rounding would change the images
    config = dict(component.config)
    asked = None if bits is None else (bits, GROUP_SIZES[component.name])
    module = load_component(component, dtype)
    try:
        pending = still_to_do(config, asked)
    except ValueError as error:
        raise ValueError(f"{component.name} of {component.files[0].parent}: {error}") from error
    if pending is not None:
        quantize_lazily(module, *pending)
        config["quantization"] = {"bits": pending[0], "group_size": pending[1]}
    return _Part(component.name, config, stored_tensors(module))


def _write_part(folder: Path, part: _Part, max_shard_size: int) -> list[Path]:
    place = folder / part.name
    place.mkdir()
    write_json(place / "config.json", part.config)
    stem = "model" if part.name.startswith("text_encoder") else "diffusion_pytorch_model"
    return write_weights(place, stem, part.tensors, max_shard_size)


def _write_tokenizer(folder: Path, source: Path, pad_token: str | None) -> None:
    """Copy a tokenizer's files; ``pad_token`` is for one whose own files say another, or nothing."""
    folder.mkdir()
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            write_bytes(folder / name, (source / name).read_bytes())
    if pad_token is not None:
        path = folder / "special_tokens_map.json"
        write_json(path, (layout.read_json(path) if path.is_file() else {}) | {"pad_token": pad_token})


def _index(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model_index.json of what has been written: parts that have not are null, as diffusers says it."""
    written = {*checkpoint.components, *checkpoint.tokenizers, "scheduler"}
    index = {
        key: [None, None] if isinstance(value, list) and key not in written else value
        for key, value in checkpoint.index.items()
    }
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    own = (checkpoint.steps, checkpoint.guidance)
    if own != catalog.defaults_for(checkpoint.pipeline, checkpoint.scheduler):
        index["_defaults"] = {"steps": own[0], "guidance": own[1]}  # what the catalog knew of the source
    return index


# --- command line ------------------------------------------------------------------------------------------------


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not match or (size := float(match[1]) * _BYTES[match[2].upper()]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(size)


def _parser() -> Parser:
    parser = Parser(prog="stable_diffusion.convert", description="Write a model as a folder that loads at once.")
    parser.add_argument("source", help="what to convert: a name, a Hub id, a folder or a file")
    parser.add_argument("dest", help="the folder to write, in diffusers layout; it must not exist")
    add(parser, "--dtype", choices=DTYPES, default="float16", help="of the UNet and the text encoders (float16)")
    add(
        parser,
        "--quantize",
        "-q",
        action="store_true",
        help=f"quantize the text encoders to {TEXT_BITS} and the UNet to {UNET_BITS} bits",
    )
    add(parser, "--unet_bits", type=int, choices=BITS, help="quantize the UNet to so many bits")
    add(parser, "--text_bits", type=int, choices=BITS, help="quantize the text encoders to so many bits")
    add(parser, "--revision", help="branch, tag or commit of a Hub repository (main)")
    add(
        parser,
        "--max_shard_size",
        type=_bytes,
        default=MAX_SHARD_SIZE,
        metavar="SIZE",
        help="of a file of weights, beyond which there are several (5GB)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: those of the process); returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    bits = {"unet_bits": UNET_BITS, "text_bits": TEXT_BITS} if args.quantize else {}
    bits |= {name: getattr(args, name) for name in ("unet_bits", "text_bits") if getattr(args, name) is not None}
    try:
        path = convert(
            args.source,
            args.dest,
            dtype=args.dtype,
            revision=args.revision,
            max_shard_size=args.max_shard_size,
            report=lambda line: print(line, file=sys.stderr, flush=True),
            **bits,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.fail(130, "interrupted; nothing was written")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""From the arguments of a script to requests: flags, prompt files, and images to repeat."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..app.engine import Resources
from ..app.metadata import Record, read_record, remarks
from ..app.preview import PreviewSettings
from ..app.request import KINDS, Request, Sweep
from ..app.results import OutputSettings
from ..app.sharing import SharingSettings
from ..app.sources import find_sources
from ..files.text import read_text
from ..images.files import SUFFIXES
from ..models.config import listed
from ..text.alternatives import COMMENT
from ..unconditional import UnconditionalDiffusion
from .flags import FLAGS, FOREIGN, SWEPT
from .parser import Parser, script_parser

# A flag without effect is refused if another flag is missing, both here and in the record of --from_image. If the
# prompts are the reason, it only gives a remark.
_NEEDED = {
    **dict.fromkeys(("canny", "guess_mode", "control_start", "control_end", "control_type"), "controlnet"),
    **dict.fromkeys(("ip_start", "ip_end", "ip_blocks", "ip_mask"), "ip_adapter"),
    **dict.fromkeys(("hires_strength", "hires_steps", "hires_upscaler"), "hires"),
    "refiner_start": "refiner",
    "safety_model": "safety_check",
    **dict.fromkeys(("detail_prompt", "detail_strength", "detail_padding"), "detail"),
    "variation_seed": "variation_strength",
    "no_composite": "mask expand",
    "resize": "image control_image ip_mask",
    "lora_partial": "lora lora_dir",
    "pag_layers": "pag_scale",
    "preview_every": "preview",
    "preview_vae": "preview stepwise",
    **dict.fromkeys(("without", "trust"), "from_image"),
}
_NEEDED_IN_PROMPTS = {
    "lora_dir": ("<lora:", "<lora:name:0.8>"),
    "wildcards": ("__", "__name__"),
    "alternatives": ("{", "{red|blue}"),
}


@dataclass(frozen=True)
class Command:
    """Hold the parsed command of a script. ``lines`` are requests with their swept settings."""

    parser: Parser
    lines: Sequence[tuple[Request, Sweep]]
    resources: Resources
    output: OutputSettings
    preview: PreviewSettings
    sharing: SharingSettings
    record: Record | None
    reads_prompts: bool
    remarks: Sequence[str]
    device: str | None
    preload_models: bool
    json: bool
    verbose: bool


def read(script: str, argv: Sequence[str] | None, prog: str | None = None) -> Command:
    """Read the arguments of a script, a key of ``FOREIGN`` (None: the process's). Exits with one line for a mistake."""
    parser = script_parser(script, prog)
    arguments = vars(parser.parse_args(argv))
    try:
        return _command(parser, script, arguments)
    except (ValueError, OSError) as error:
        parser.error(error)


def _command(parser: Parser, script: str, arguments: dict[str, Any]) -> Command:
    _check(arguments)
    reads_prompts = script != "unconditional"
    base, record, notes = Request() if reads_prompts else Request(model=UnconditionalDiffusion.default_model), None, ()
    if "from_image" in arguments:
        record = read_record(arguments["from_image"])
        base, arguments, notes = _repeated(parser, script, arguments, record)
        followed = {name: value for name, value in record.arguments.items() if name not in arguments}
        record = replace(record, arguments=followed)
    if script == "image2image" and base.image is None and "image" not in arguments:
        raise ValueError('give the image to start from, then a prompt: image2image IMAGE "prompt"')
    _check_needed(script, arguments, base)
    has_file = "prompt_file" in arguments
    if has_file and "prompt" in arguments:
        raise ValueError("give a prompt or a file of them")
    if reads_prompts and not has_file and "prompt" not in arguments and record is None:
        image = arguments.get("image", base.image) if script == "image2image" else None
        if image is not None and not os.path.exists(image):
            raise ValueError(f'there is no image at {image}; write image2image IMAGE "prompt"')
        place = f'give a prompt after the image: image2image {image} "prompt"' if image else "give a prompt in quotes"
        raise ValueError(f"{place}, or --prompt_file FILE")
    lines = _prompt_lines(parser, script, arguments, base) if has_file else [line_of(base, arguments)]
    resources, output, preview, sharing = (
        kind(**{name: arguments[name] for name in kind.__dataclass_fields__.keys() & arguments.keys()})
        for kind in (Resources, OutputSettings, PreviewSettings, SharingSettings)
    )
    switches = {name: name in arguments for name in ("preload_models", "json", "verbose")}
    notes = [*notes, *_unused(arguments, lines)]
    switches |= {"reads_prompts": reads_prompts, "device": arguments.get("device")}
    return Command(parser, lines, resources, output, preview, sharing, record, remarks=notes, **switches)


def _check(arguments: Mapping[str, Any]) -> None:
    """Refuse flags that cannot be combined, besides those that a request refuses."""
    names, output, preview = arguments.keys(), arguments.get("output", "out.png"), arguments.get("preview")
    if "quality" in names and not output.lower().endswith((".jpg", ".jpeg", ".webp")):
        raise ValueError("--quality is for JPEG and WebP: give --output a name that ends in .jpg or .webp")
    if names >= {"low_memory", "preload_models"}:
        raise ValueError("--low_memory loads each network when needed, --preload_models all at once: omit one of them")
    if preview is not None and "safety_check" in names:
        raise ValueError("--preview shows images before --safety_check has seen them: omit one of them")
    if preview is not None and os.path.abspath(preview) == os.path.abspath(output):
        raise ValueError(f"--preview and --output both name {preview}; give the preview another name")


def _check_needed(script: str, arguments: Mapping[str, Any], base: Request) -> None:
    for name in _NEEDED.keys() & arguments.keys():
        needed = _NEEDED[name].split()
        if not any(flag in arguments or (flag in KINDS and base.value(flag)) for flag in needed):
            flags = [f"--{flag}" for flag in needed if flag not in FOREIGN[script]]
            raise ValueError(f"--{name} has no effect without {' or '.join(flags)}")


def _unused(arguments: Mapping[str, Any], lines: Sequence[tuple[Request, Sweep]]) -> Iterator[str]:
    prompts = [text for request, _ in lines for text in (request.prompt, *request.all_text)]
    for name, (mark, example) in _NEEDED_IN_PROMPTS.items():
        if name in arguments and not any(mark in prompt for prompt in prompts):
            yield f"--{name} has no effect: no prompt has {example}"


def line_of(base: Request, arguments: Mapping[str, Any]) -> tuple[Request, Sweep]:
    """Return a request with the flags of a command, and its swept flags in their order."""
    settings = {name: value for name, value in arguments.items() if name in KINDS}
    sweep = Sweep((name, value) for name, value in settings.items() if name in SWEPT and isinstance(value, tuple))
    settings |= {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    settings |= {name: base.value(name) for name in sweep if name != "seed"}
    if "prompt" in settings:
        settings["resolved_prompt"] = None
    return base.with_values(**settings), sweep


def _prompt_lines(parser: Parser, script: str, arguments: dict[str, Any], base: Request) -> list[tuple[Request, Sweep]]:
    """Read a file of prompts: a prompt on each line, and flags of the groups "image", "prompt" and "sizes"."""
    path = Path(os.path.expanduser(arguments["prompt_file"]))
    try:
        lines = read_text(path).split("\n")
    except OSError as error:
        raise ValueError(f"the prompt file {path} cannot be read ({error.strerror}); give a text file") from error
    line_parser = Parser(prog=parser.prog, add_help=False)
    left_out = FOREIGN[script] | {"prompt", "prompt_file", "from_image", "without", "trust", "wildcards", "fixed_seed"}
    line_parser.add_flags("", "", FLAGS["image"] | FLAGS["prompt"] | FLAGS["sizes"], left_out=left_out)
    requests = []
    for number, line in enumerate(lines, start=1):
        line = COMMENT.sub("", line)
        if not line.strip():
            continue
        prompt, _, flags = re.sub(r"(^|\s)(?=--\w)", "\0", line, count=1).partition("\0")
        line_parser.where = f"{path}, line {number}: "
        try:
            line_arguments = vars(line_parser.parse_args(shlex.split(flags)))
            # The flags of the line override those of the command.
            requests.append(line_of(base, arguments | line_arguments | {"prompt": prompt.strip()}))
        except ValueError as error:
            line_parser.error(error)
        if isinstance(arguments.get("seed"), int) and "fixed_seed" not in arguments:  # for the first line only
            arguments = {name: value for name, value in arguments.items() if name != "seed"}
    if not requests:
        raise ValueError(f"the prompt file {path} has no prompt; write one on each line")
    return requests


def _repeated(
    parser: Parser, script: str, arguments: dict[str, Any], record: Record
) -> tuple[Request, dict[str, Any], list[str]]:
    """Return the request recorded in an image, the flags that override parts of it, and remarks."""
    left_out = FOREIGN[script] | {"n_images", "wildcards"}  # the record has the resolved prompt
    recorded = {name: value for name, value in record.arguments.items() if name not in left_out}
    for name in arguments.get("without", ()):
        field_name = name.lstrip("-").replace("-", "_")
        if field_name not in KINDS or field_name in ("image", "prompt"):
            known = listed(sorted((recorded.keys() & KINDS.keys()) - {"image", "prompt"}), most=12)
            raise ValueError(f"--without {name} is not a flag of this picture; choose from {known}")
        recorded.pop(field_name, None)
    has_prompt = bool({"prompt", "prompt_file"} & arguments.keys())
    replaced = ["revision"] if "model" in arguments else []
    replaced += ["lora_dir", "prompt_2"] if has_prompt else []
    replaced += ["negative_prompt_2"] if "negative_prompt" in arguments else []
    recorded = {name: value for name, value in recorded.items() if name not in replaced}
    parser.where = f"{record.path}: "
    request, unknown = Request.from_dict(recorded)
    parser.where = ""
    if script != "unconditional" and not isinstance(recorded.get("prompt"), str) and not has_prompt:
        raise ValueError(f"{record.path} records no prompt; give one")
    if script == "image2image" and "image" in arguments and not has_prompt:
        word = arguments["image"]
        if not os.path.isfile(word) and not word.lower().endswith(SUFFIXES):  # the only word is a prompt
            arguments = {name: value for name, value in arguments.items() if name != "image"} | {"prompt": word}
    if script == "image2image" and request.image is None and "image" not in arguments:
        raise ValueError(f"{record.path} records no image; give one")
    if not {"n_images", "prompt_file"} & arguments.keys() and not isinstance(arguments.get("seed"), tuple):
        arguments = arguments | {"n_images": 1}
    fields, folders = recorded.keys() - arguments.keys(), arguments.get("lora_dir", [])
    files = record.details.get("files")
    request = find_sources(request, fields, record.path, files, folders, trust="trust" in arguments)
    notes = list(remarks(record, script, unknown, "model" in arguments))
    if request.prompt_loras and not record.details and not folders and not has_prompt:
        names = listed([name for name, *_ in request.prompt_loras])
        notes.append(f"{record.path}: its LoRAs are not used ({names}); give their folder with --lora_dir DIR")
        request = request.with_values(prompt=request.text, resolved_prompt=request.text)
    return request, arguments, notes

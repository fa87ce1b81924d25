"""The command lines of txt2image.py and image2image.py.

Results (paths and seeds) go to stdout, progress and remarks to stderr. Bad input ends with one line and exit code 2,
before a model is read; a run that fails on the way ends with one line and exit code 1, an interrupted one with 130.
"""

import argparse
import logging
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
from PIL.Image import Image
from tqdm import tqdm

from . import catalog
from .conditioning import EMPHASES
from .image import check_output, fit, from_array, grid, open_image, save, target_size
from .pipeline import StableDiffusion
from .prompt import expand
from .samplers import find_sampler, options, table
from .schedule import SCHEDULES
from .weights.quantize import BITS

_TEXT_BITS, _UNET_BITS = 4, 8  # what -q stands for
_SIZE_UNIT, _LARGEST_SIDE = 8, 16384
_MANY = 9999  # more of anything is a slip of the keyboard


def txt2image(argv: Sequence[str] | None = None) -> int:
    """Run ``txt2image.py`` with the arguments ``argv`` (None: those of the process); returns the exit code."""
    parser = _Parser(description="Make images from a prompt.")
    parser.add_argument("prompt", type=_text, help="what to show")
    _add_options(parser)
    return _run(parser, parser.parse_args(argv))


def image2image(argv: Sequence[str] | None = None) -> int:
    """Run ``image2image.py`` with the arguments ``argv`` (None: those of the process); returns the exit code."""
    parser = _Parser(description="Change an image towards a prompt.")
    parser.add_argument("image", help="the image to start from (PNG, JPEG, WebP, ...)")
    parser.add_argument("prompt", type=_text, help="what to show")
    group = _add_options(parser)
    _add(
        group,
        "--strength",
        type=_strength,
        default=0.9,
        help="how far to go from the image: above 0, where little changes, to 1, where nothing of it is left (0.9)",
    )
    _add(
        group,
        "--resize",
        choices=("crop", "pad", "stretch"),
        default="crop",
        help="how the image comes to the size that is worked on: cut to fill it, fitted into it, or stretched (crop)",
    )
    return _run(parser, parser.parse_args(argv))


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.fail(2, message)

    def fail(self, code: int, message: str) -> NoReturn:
        """Leave with one line, also where the message quotes a path with line breaks."""
        self.exit(code, f"{self.prog}: error: {' '.join(message.splitlines())}\n")


def _add(group: Any, flag: str, *more: str, **options: Any) -> None:
    """Add an option under its name with underscores and with hyphens."""
    group.add_argument(*dict.fromkeys((flag, flag.replace("_", "-"), *more)), **options)


def _add_options(parser: argparse.ArgumentParser) -> Any:
    """Add what both scripts share; returns the group of options about the picture."""
    picture = parser.add_argument_group("picture")
    _add(picture, "--negative_prompt", type=_text, default="", help="what to steer away from; needs --cfg above 1")
    _add(picture, "--width", type=_side, help="in pixels, a multiple of 8 (the model's own)")
    _add(picture, "--height", type=_side, help="in pixels, a multiple of 8 (the model's own)")
    _add(picture, "--n_images", type=_count, default=4, help="how many images to make (4)")
    _add(picture, "--seed", type=_seed, help="of the first image, the others count on from it (random)")
    _add(picture, "--steps", type=_count, help="sampler steps (the model's own)")
    _add(picture, "--cfg", type=_number, help="guidance scale; 1 and below is none (the model's own)")
    _add(picture, "--sampler", type=_sampler, metavar="NAME", help="how to denoise: --list-samplers (the model's own)")
    _add(picture, "--list_samplers", action=_ListSamplers, nargs=0, help="print the samplers and leave")
    _add(
        picture,
        "--schedule",
        choices=SCHEDULES,
        help="curve of the noise levels (the model's own, or the sampler name's)",
    )
    _add(picture, "--eta", type=_share, help="share of fresh noise, 0 to 1, for the samplers that have one")

    prompt = parser.add_argument_group("prompt")
    _add(prompt, "--clip_skip", type=_whole, default=0, help="text encoder layers to leave out at the end (0)")
    _add(
        prompt,
        "--emphasis",
        choices=EMPHASES,
        default="mean",
        help="how weights act: on the encoded words, keeping their mean; on what is taken from them; brackets are text",
    )
    _add(prompt, "--weight_blocks", action="store_true", help='read "a red:2 cat:1" as blocks with weights')
    _add(
        prompt,
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[=WORD]",
        help="a textual inversion embedding and the word for it in prompts (the file's own); may be given again",
    )
    _add(prompt, "--truncate", action="store_true", help="cut a prompt after its first 75 tokens")
    _add(
        prompt,
        "--alternatives",
        choices=("all", "one"),
        default="all",
        help='of "a {red|blue} cat": make every one, or one that the seed chooses (all)',
    )

    model = parser.add_argument_group("model")
    _add(
        model,
        "--model",
        default="sdxl",
        help=f"one of {', '.join(catalog.names())}, a Hub id, or a folder in diffusers layout (sdxl)",
    )
    _add(model, "--revision", help="branch, tag or commit of a Hub repository (main)")
    _add(model, "--no_float16", dest="float16", action="store_false", help="compute in float32")
    _add(
        model,
        "--quantize",
        "-q",
        action="store_true",
        help=f"quantize the text encoders to {_TEXT_BITS} and the UNet to {_UNET_BITS} bits",
    )
    _add(model, "--unet_bits", type=int, choices=BITS, help="quantize the UNet to so many bits")
    _add(model, "--text_bits", type=int, choices=BITS, help="quantize the text encoders to so many bits")
    _add(model, "--preload_models", action="store_true", help="read all weights before the first step")

    output = parser.add_argument_group("output")
    _add(output, "--output", default="out.png", help="file to write; several images are numbered, this is their grid")
    _add(output, "--n_rows", type=_count, default=1, help="rows of the grid (1)")
    _add(output, "--decoding_batch_size", type=_count, default=1, help="images to decode at once (1)")
    _add(output, "--verbose", "-v", action="store_true", help="say what is chosen, and how much memory was used")
    return picture


def _bounded(convert: Callable[[str], Any], holds: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """An argparse type: a number for which ``holds``; the error names the value and what was ``wanted``."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


_count = _bounded(int, lambda n: 1 <= n <= _MANY, f"a whole number from 1 to {_MANY}")
_whole = _bounded(int, lambda n: 0 <= n <= _MANY, f"a whole number from 0 to {_MANY}")
_seed = _bounded(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
_side = _bounded(
    int, lambda n: 64 <= n <= _LARGEST_SIDE and n % _SIZE_UNIT == 0, f"a multiple of 8 from 64 to {_LARGEST_SIDE}"
)
_number = _bounded(float, math.isfinite, "a number")
_share = _bounded(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
_strength = _bounded(float, lambda x: 0 < x <= 1, "above 0 and at most 1")


def _sampler(name: str) -> str:
    try:
        find_sampler(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


class _ListSamplers(argparse.Action):
    """Print the table of samplers and leave, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(table())
        parser.exit()


_text = _bounded(lambda text: text.encode().decode(), lambda _: True, "valid Unicode; type it in UTF-8")


def _run(parser: _Parser, args: argparse.Namespace) -> int:
    _log_to_stderr(parser.prog, args.verbose)
    try:
        try:
            args.seed = secrets.randbits(32) if args.seed is None else args.seed
            prompts = _prompts(args)
            paths = _image_paths(args, len(prompts) * args.n_images)
            image = open_image(args.image) if "image" in args else None
            if args.sampler is not None:
                options(find_sampler(args.sampler), eta=args.eta)
            sd = _load(args)
            for embedding in args.embedding:
                sd.load_embedding(*embedding.rsplit("=", 1))
            runs = [_start(sd, args, image, prompt, i * args.n_images) for i, prompt in enumerate(prompts)]
        except (ValueError, OSError) as error:
            parser.error(str(error))
        total = sd.number_of_steps(args.steps, getattr(args, "strength", 1.0))
        x_t = mx.concatenate([_denoise(sd, latents, total) for latents in runs])
        _free(sd)
        unet_peak = mx.get_peak_memory()
        _write(sd, x_t, args, paths)
    except (ArithmeticError, ValueError, OSError) as error:
        parser.fail(1, str(error))
    except (RuntimeError, MemoryError) as error:  # what MLX raises, above all where memory runs out
        remedy = "where memory is short, try fewer images, a smaller size or -q"
        parser.fail(1, f"the computation failed ({str(error) or 'out of memory'}); {remedy}")
    except KeyboardInterrupt:
        parser.fail(130, "interrupted; the images named so far are complete")
    logging.getLogger("stable_diffusion").info(
        "peak memory: %.3f GB for the UNet, %.3f GB overall", unet_peak / 1024**3, mx.get_peak_memory() / 1024**3
    )
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that the one given stands for."""
    if args.weight_blocks or args.emphasis == "none":
        return [args.prompt]
    return expand(args.prompt, args.seed if args.alternatives == "one" else None)


def _image_paths(args: argparse.Namespace, count: int) -> list[Path]:
    """The file of each image, checked: ``--output`` itself, or for several that name with numbers."""
    output = check_output(args.output)
    if count == 1:
        return [output]
    return [check_output(output.with_stem(f"{output.stem}_{i}")) for i in range(1, count + 1)]


class _Remarks(logging.StreamHandler):
    """Writes the library's log to stderr, on lines of its own also while a progress bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)


def _log_to_stderr(prog: str, verbose: bool) -> None:
    handler = _Remarks()
    handler.setFormatter(logging.Formatter(f"{prog}: %(message)s"))
    log = logging.getLogger("stable_diffusion")
    log.handlers = [handler]
    log.setLevel(logging.INFO if verbose else logging.WARNING)


def _load(args: argparse.Namespace) -> StableDiffusion:
    quantized = {"unet_bits": _UNET_BITS, "text_bits": _TEXT_BITS} if args.quantize else {}
    asked = {name: getattr(args, name) for name in ("unet_bits", "text_bits") if getattr(args, name) is not None}
    # Half precision is what a GPU is fast at; a CPU is slower at it than at float32.
    float16 = args.float16 and mx.default_device() == mx.gpu
    sd = StableDiffusion(args.model, float16, revision=args.revision, **(quantized | asked))
    if args.preload_models:
        sd.ensure_models_are_loaded()
    return sd


def _start(
    sd: StableDiffusion, args: argparse.Namespace, image: Image | None, prompt: str, index: int
) -> Iterator[mx.array]:
    """The generator of latents for a prompt whose first image is number ``index``; nothing of it is computed here."""
    guidance = sd.default_guidance if args.cfg is None else args.cfg
    if args.negative_prompt and guidance <= 1:
        logging.getLogger("stable_diffusion").warning(
            "the negative prompt has no effect at a guidance scale of %g; give --cfg above 1", guidance
        )
    reading = {name: getattr(args, name) for name in ("clip_skip", "emphasis", "truncate", "weight_blocks")}
    text = sd.encode_prompt(prompt, **reading)
    shared: dict[str, Any] = {
        "n_images": args.n_images,
        "num_steps": args.steps,
        "cfg_weight": args.cfg,
        # An empty one stays text: some models have a way of their own to say nothing.
        "negative_text": sd.encode_prompt(args.negative_prompt, **reading) if args.negative_prompt else "",
        "seed": args.seed + index,
        "sampler": args.sampler,
        "schedule": args.schedule,
        "eta": args.eta,
        "clip_skip": args.clip_skip,
    }
    height, width = (side * sd.pixels_per_latent for side in sd.default_latent_size)
    if image is None:
        size = (args.height or height, args.width or width)
        return sd.generate_latents(text, latent_size=tuple(s // sd.pixels_per_latent for s in size), **shared)
    size = target_size(image.size, args.width, args.height, native=max(width, height))
    if size != image.size:
        logging.getLogger("stable_diffusion").info("the image of %dx%d is worked on at %dx%d", *image.size, *size)
    return sd.generate_latents_from_image(fit(image, *size, mode=args.resize), text, strength=args.strength, **shared)


def _denoise(sd: StableDiffusion, latents: Iterator[mx.array], total: int) -> mx.array:
    """Compute the steps one by one; FloatingPointError names the first whose latents are not finite."""
    for step, x_t in enumerate(tqdm(latents, total=total, unit="step"), start=1):
        mx.eval(x_t)
        if not mx.isfinite(x_t).all():
            half = "compute in float32 with --no-float16"
            remedy = half if sd.dtype == mx.float16 else "check the weights, or take a lower --cfg"
            raise FloatingPointError(f"the latents of step {step} are not finite; {remedy}")
    return x_t


def _free(sd: StableDiffusion) -> None:
    """Let go of what decoding does not need."""
    for name in ("unet", "text_encoder", "text_encoder_1", "text_encoder_2"):
        if hasattr(sd, name):
            delattr(sd, name)
    mx.clear_cache()


def _write(sd: StableDiffusion, latents: mx.array, args: argparse.Namespace, paths: list[Path]) -> None:
    """Decode the latents and write each image as soon as it is there; then, of several, the grid."""
    images: list[Image] = []
    for start in range(0, len(latents), args.decoding_batch_size):
        for pixels in sd.decode(latents[start : start + args.decoding_batch_size]):
            path, seed = paths[len(images)], args.seed + len(images)
            images.append(from_array(pixels))
            save(images[-1], path)
            print(f"{path} seed {seed}", flush=True)
    if len(images) > 1:
        save(grid(images, args.n_rows), args.output)
        print(args.output, flush=True)

"""The command lines of txt2image.py and image2image.py.

Results (paths and seeds) go to stdout, progress and remarks to stderr. Bad input ends with one line and exit code 2,
before a model is read; a run that fails on the way ends with one line and exit code 1, an interrupted one with 130.
"""

import argparse
import logging
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL.Image import Image
from tqdm import tqdm

from .arguments import TEXT_BITS, UNET_BITS, Parser, jobs, read
from .image import check_output, fit, from_array, grid, open_image, save, target_size
from .pipeline import StableDiffusion

_log = logging.getLogger("stable_diffusion")


def txt2image(argv: Sequence[str] | None = None) -> int:
    """Run ``txt2image.py`` with the arguments ``argv`` (None: those of the process); returns the exit code."""
    return _run(*read("Make images from a prompt.", False, argv))


def image2image(argv: Sequence[str] | None = None) -> int:
    """Run ``image2image.py`` with the arguments ``argv`` (None: those of the process); returns the exit code."""
    return _run(*read("Change an image towards a prompt.", True, argv))


def _run(parser: Parser, args: argparse.Namespace) -> int:
    _log_to_stderr(parser.prog, args.verbose)
    try:
        try:
            args.seed = secrets.randbits(32) if args.seed is None else args.seed
            wanted = jobs(parser, args)
            seeds = [job.seed + i for job in wanted for i in range(job.n_images)]
            paths = _image_paths(args, len(seeds))
            image = open_image(args.image) if "image" in args else None
            sd = _load(args)
            runs = [_start(sd, job, image) for job in wanted]
        except (ValueError, OSError) as error:
            parser.error(str(error))
        totals = [sd.number_of_steps(job.steps, getattr(job, "strength", 1.0)) for job in wanted]
        latents = [_denoise(sd, run, total) for run, total in zip(runs, totals, strict=True)]
        _free(sd)
        unet_peak = mx.get_peak_memory()
        _write(sd, latents, args, paths, seeds)
    except (ArithmeticError, ValueError, OSError) as error:
        parser.fail(1, str(error))
    except (RuntimeError, MemoryError) as error:  # what MLX raises, above all where memory runs out
        remedy = "where memory is short, try fewer images, a smaller size or -q"
        parser.fail(1, f"the computation failed ({str(error) or 'out of memory'}); {remedy}")
    except KeyboardInterrupt:
        parser.fail(130, "interrupted; the images named so far are complete")
    peak = mx.get_peak_memory()
    _log.info("peak memory: %.3f GB for the UNet, %.3f GB overall", unet_peak / 1024**3, peak / 1024**3)
    return 0


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
    _log.handlers = [handler]
    _log.setLevel(logging.INFO if verbose else logging.WARNING)


def _load(args: argparse.Namespace) -> StableDiffusion:
    quantized = {"unet_bits": UNET_BITS, "text_bits": TEXT_BITS} if args.quantize else {}
    asked = {name: getattr(args, name) for name in ("unet_bits", "text_bits") if getattr(args, name) is not None}
    # Half precision is what a GPU is fast at; a CPU is slower at it than at float32.
    float16 = args.float16 and mx.default_device() == mx.gpu
    sd = StableDiffusion(args.model, float16, revision=args.revision, **(quantized | asked))
    for embedding in args.embedding:
        sd.load_embedding(*embedding.rsplit("=", 1))
    if args.preload_models:
        sd.ensure_models_are_loaded()
    return sd


def _start(sd: StableDiffusion, job: argparse.Namespace, image: Image | None) -> Iterator[mx.array]:
    """The generator of latents that a job asks for; nothing of it is computed here."""
    guidance = sd.default_guidance if job.cfg is None else job.cfg
    if job.negative_prompt and guidance <= 1:
        _log.warning("the negative prompt has no effect at a guidance scale of %g; give --cfg above 1", guidance)
    reading = {name: getattr(job, name) for name in ("clip_skip", "emphasis", "truncate", "weight_blocks")}
    text = sd.encode_prompt(job.prompt, **reading)
    shared: dict[str, Any] = {
        "n_images": job.n_images,
        "num_steps": job.steps,
        "cfg_weight": job.cfg,
        # An empty one stays text: some models have a way of their own to say nothing.
        "negative_text": sd.encode_prompt(job.negative_prompt, **reading) if job.negative_prompt else "",
        "seed": job.seed,
        "sampler": job.sampler,
        "schedule": job.schedule,
        "eta": job.eta,
        "clip_skip": job.clip_skip,
    }
    height, width = (side * sd.pixels_per_latent for side in sd.default_latent_size)
    if image is None:
        unit = sd.pixels_per_latent
        return sd.generate_latents(
            text, latent_size=((job.height or height) // unit, (job.width or width) // unit), **shared
        )
    size = target_size(image.size, job.width, job.height, native=max(width, height))
    if size != image.size:
        _log.info("the image of %dx%d is worked on at %dx%d", *image.size, *size)
    return sd.generate_latents_from_image(fit(image, *size, mode=job.resize), text, strength=job.strength, **shared)


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


def _write(
    sd: StableDiffusion, latents: list[mx.array], args: argparse.Namespace, paths: list[Path], seeds: list[int]
) -> None:
    """Decode the latents and write each image as soon as it is there; then, of several of one size, the grid."""
    images: list[Image] = []
    for batch in latents:
        for start in range(0, len(batch), args.decoding_batch_size):
            for pixels in sd.decode(batch[start : start + args.decoding_batch_size]):
                path, seed = paths[len(images)], seeds[len(images)]
                images.append(from_array(pixels))
                save(images[-1], path)
                print(f"{path} seed {seed}", flush=True)
    if len({image.size for image in images}) > 1:
        _log.warning("the images are of several sizes: there is no grid of them")
    elif len(images) > 1:
        save(grid(images, args.n_rows), args.output)
        print(args.output, flush=True)

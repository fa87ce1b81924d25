"""The command lines of txt2image.py and image2image.py.

Results (paths and seeds) go to stdout, progress and remarks to stderr. Bad input ends with one line and exit code 2,
before a model is read; a run that fails on the way ends with one line and exit code 1, an interrupted one with 130.
"""

import argparse
import logging
import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL.Image import Image
from tqdm import tqdm

from .arguments import TEXT_BITS, UNET_BITS, Parser, read
from .batches import Batch, Pass, Work, alike, batches, first_pass, hires_pass, prepare_work, read_inputs, refiner_pass
from .budget import choose, set_limits
from .image import check_output, from_array, grid, save
from .jobs import jobs
from .pipeline import StableDiffusion
from .weights.adapters import Attachment
from .weights.files import open_checkpoint

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
            wanted = batches(jobs(parser, args), args.batch_size)
            seeds = [seed for batch in wanted for seed in batch.seeds]
            paths = _image_paths(args, len(seeds))
            inputs = read_inputs(args)
            if args.refiner:  # it is loaded when the base is gone, but what is wrong with it shows now
                open_checkpoint(args.refiner, float16=_float16(args))
            allowed = set_limits(args.memory_limit, args.low_memory)
            sd = _load(args, args.model)
            wanted = [part for batch in wanted for part in alike(sd, batch)]
            nets = [sd.load_controlnet(path) for path, _ in args.controlnet]
            loras = _prompt_loras(sd, args, wanted)
            works = []
            for batch in wanted:
                _set_scales(loras, batch)  # prompts are encoded with them
                works.append(prepare_work(sd, args, inputs, nets, batch))
            _plan_memory(sd, works, allowed)
            runs = _prepared(first_pass(sd, args, inputs, work) for work in works)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        latents = _denoise_all(sd, loras, works, runs)
        if getattr(args, "hires", None):
            runs = _prepared(hires_pass(sd, args, inputs, nets, *pair) for pair in zip(works, latents, strict=True))
            latents = _denoise_all(sd, loras, works, runs)
        nets, works = [], [work.without_controls() for work in works]
        if args.refiner:
            sd.release()
            sd = _load(args, args.refiner)
            runs = _prepared(refiner_pass(sd, args, *pair) for pair in zip(works, latents, strict=True))
            latents = _denoise_all(sd, {}, works, runs)
        sd.release("autoencoder")
        unet_peak = mx.get_peak_memory()
        _write(sd, list(zip(works, latents, strict=True)), args, paths, seeds)
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


def _float16(args: argparse.Namespace) -> bool:
    # Half precision is what a GPU is fast at; a CPU is slower at it than at float32.
    return args.float16 and mx.default_device() == mx.gpu


def _load(args: argparse.Namespace, model: str) -> StableDiffusion:
    """A model as the arguments want it; LoRAs, embeddings and parts are those of ``--model`` alone, but for the VAE."""
    options: dict[str, Any] = {"unet_bits": UNET_BITS, "text_bits": TEXT_BITS} if args.quantize else {}
    options |= {name: getattr(args, name) for name in ("unet_bits", "text_bits") if getattr(args, name) is not None}
    options["low_memory"] = args.low_memory
    names = ("vae",) if model != args.model else ("vae", "unet", "text_encoder", "text_encoder_2")
    parts = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if model != args.model:
        return StableDiffusion(model, _float16(args), parts=parts, **options)
    sd = StableDiffusion(
        model,
        _float16(args),
        revision=args.revision,
        parts=parts,
        tokenizer=args.tokenizer,
        prediction=args.prediction,
        loras=args.lora,
        lora_partial=args.lora_partial,
        **options,
    )
    for embedding in args.embedding:
        sd.load_embedding(*embedding.rsplit("=", 1))
    if args.preload_models:
        sd.ensure_models_are_loaded()
    return sd


def _prompt_loras(sd: StableDiffusion, args: argparse.Namespace, wanted: Sequence[Batch]) -> dict[str, Attachment]:
    """The LoRAs that prompts ask for, by their names, attached with no effect yet."""
    names = dict.fromkeys(name for batch in wanted for job in batch.jobs for name, _ in job.loras)
    if names and args.lora_dir is None:
        raise ValueError(f"the prompt asks for the LoRA {next(iter(names))}; say where LoRAs are: --lora_dir DIR")
    return {name: sd.load_lora(_lora_file(args.lora_dir, name), 0.0, partial=args.lora_partial) for name in names}


def _lora_file(folder: str, name: str) -> Path:
    found = [path for path in sorted(Path(folder).expanduser().glob("*")) if name in (path.name, path.stem)]
    if not found:
        raise ValueError(f"there is no LoRA {name} in {folder}; write the name of a file there, as in <lora:name:0.8>")
    return found[0]


def _set_scales(loras: dict[str, Attachment], batch: Batch) -> None:
    asked = dict(batch.job.loras)
    for name, attachment in loras.items():
        attachment.scale = asked.get(name, 0.0)


def _plan_memory(sd: StableDiffusion, works: Sequence[Work], allowed: int) -> None:
    """Choose how to run where memory is short, and log what the largest of the batches will take."""

    def area(work: Work) -> int:
        return len(work.batch.seeds) * math.prod(work.size)

    work = max(works, key=area)
    size = tuple(side // sd.pixels_per_latent for side in reversed(work.size))
    try:
        found = choose(sd, allowed, len(work.batch.seeds), size, work.given["text"].context.shape[1] // 77)
    except (RuntimeError, TypeError, ValueError) as error:  # MLX calls its way to look at graphs experimental
        _log.info("how much memory this takes cannot be said (%s)", error)
        return
    for need in found:
        _log.info("memory for %s", need)


def _prepared(runs: Iterable[Pass]) -> list[Pass]:
    """All that comes before the steps of the runs, computed."""
    runs = list(runs)
    for latents, _ in runs:
        latents.prepare()
    return runs


def _denoise_all(
    sd: StableDiffusion, loras: dict[str, Attachment], works: Sequence[Work], runs: list[Pass]
) -> list[mx.array]:
    """The last latents of each run. The text encoders are let go of first, and each run after its last step."""
    mx.eval([work.conditioning() for work in works])
    sd.release("unet", "autoencoder")
    done = []
    for work in works:
        _set_scales(loras, work.batch)
        done.append(_denoise(sd, *runs.pop(0)))
    return done


def _denoise(sd: StableDiffusion, latents: Iterator[mx.array], total: int) -> mx.array:
    """Compute the steps one by one; FloatingPointError names the first whose latents are not finite."""
    for step, x_t in enumerate(tqdm(latents, total=total, unit="step"), start=1):
        mx.eval(x_t)
        if not mx.isfinite(x_t).all():
            half = "compute in float32 with --no-float16"
            remedy = half if sd.dtype == mx.float16 else "check the weights, or take a lower --cfg"
            raise FloatingPointError(f"the latents of step {step} are not finite; {remedy}")
    return x_t


def _write(
    sd: StableDiffusion,
    made: Sequence[tuple[Work, mx.array]],
    args: argparse.Namespace,
    paths: Sequence[Path],
    seeds: Sequence[int],
) -> None:
    """Decode the latents and write each image as soon as it is there; then, of several of one size, the grid."""
    images: list[Image] = []
    for work, batch in made:
        for start in range(0, len(batch), args.decoding_batch_size):
            for pixels in sd.decode(batch[start : start + args.decoding_batch_size]):
                path, seed = paths[len(images)], seeds[len(images)]
                image = from_array(pixels)
                if work.canvas is not None:
                    image = work.canvas.finish(image, composite=not args.no_composite)
                images.append(image)
                save(image, path)
                print(f"{path} seed {seed}", flush=True)
    if len({image.size for image in images}) > 1:
        _log.warning("the images are of several sizes: there is no grid of them")
    elif len(images) > 1:
        save(grid(images, args.n_rows), args.output)
        print(args.output, flush=True)

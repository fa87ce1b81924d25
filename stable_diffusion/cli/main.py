"""The command lines of txt2image.py and image2image.py.

What was written goes to stdout, a line for each file (path and seed; with ``--json`` an object), progress and remarks
to stderr. What ends a run early is said there too, in one line, and by the exit code:

====  ==============================================================================================================
   0  all images are written
   1  it failed on the way; the images named on stdout are written
   2  the arguments cannot be followed; nothing was computed
 130  Ctrl-C: what there was of the images is written, and named on stdout. A second one leaves at once
 143  the same for SIGTERM
====  ==============================================================================================================
"""

import argparse
import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..app.batches import Batch, Work, alike, batches, first_pass, parts, prepare_work, read_inputs
from ..app.budget import Asked, at_once, choose, images_at_once, set_limits
from ..app.engine import Runs, prepared, set_scales
from ..app.jobs import jobs
from ..app.metadata import changes
from ..app.preview import Watch
from ..app.progress import Remarks
from ..app.results import Results
from ..lora.files import find_in
from ..lora.layers import Attachment
from ..pipeline import StableDiffusion
from ..weights.files import open_checkpoint
from .arguments import read
from .flags import chosen_bits, chosen_parts
from .interrupts import Interrupts
from .parser import Parser

_log = logging.getLogger("stable_diffusion")

_UNKNOWN_MOST = 4  # images at once where it cannot be said how much memory they take


def txt2image(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run ``txt2image.py`` with the arguments ``argv`` (None: those of the process); returns the exit code."""
    return _run(*read(False, argv, prog))


def image2image(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run ``image2image.py`` with the arguments ``argv`` (None: those of the process); returns the exit code."""
    return _run(*read(True, argv, prog))


def _run(parser: Parser, args: argparse.Namespace) -> int:
    _log_to_stderr(parser.prog, args.verbose)
    with Interrupts(_log.warning) as interrupts:
        try:
            try:
                runs, results = _prepare(parser, args, interrupts)
                interrupts.expect()
            except (ValueError, OSError) as error:
                parser.error(str(error))
            unet_peak = 0
            for made in runs.made():
                unet_peak = unet_peak or mx.get_peak_memory()
                results.add(runs.sd, made)
                if not made.partial:
                    results.add_animation(partial(runs.watch.finish, runs.sd, made.work.batch, made.latents))
            if results.error is not None:
                raise results.error
            if interrupts.code is not None:
                raise KeyboardInterrupt
            results.finish()
        except (ArithmeticError, ValueError, OSError) as error:
            parser.fail(1, str(error))
        except (RuntimeError, MemoryError) as error:  # what MLX raises, above all where memory runs out
            remedy = "where memory is short, try fewer images, a smaller size or -q"
            parser.fail(1, f"the computation failed ({str(error) or 'out of memory'}); {remedy}")
        except KeyboardInterrupt:
            parser.fail(interrupts.code or 130, "interrupted; the files named so far are complete")
    peak = mx.get_peak_memory()
    _log.info("peak memory: %.3f GB for the UNet, %.3f GB overall", unet_peak / 1024**3, peak / 1024**3)
    return 0


def _prepare(parser: Parser, args: argparse.Namespace, interrupts: Interrupts) -> tuple[Runs, Results]:
    """All that comes before the first step. ValueError or OSError for what is wrong with the arguments."""
    args.seed = secrets.randbits(32) if args.seed is None else args.seed
    wanted = batches(jobs(parser, args), args.batch_size)
    results = Results(args, wanted)
    watch = Watch(args, results.add_preview)
    inputs = read_inputs(args)
    if args.refiner:  # it is loaded when the base is gone, but what is wrong with it shows now
        open_checkpoint(args.refiner, float16=_float16(args))
    allowed = set_limits(args.memory_limit, args.low_memory)
    sd = results.model = _load(args, args.model)
    watch.look_at(sd)
    wanted = [part for batch in wanted for part in alike(sd, batch)]
    nets = [sd.load_controlnet(path) for path, _ in args.controlnet]
    loras = _prompt_loras(sd, args, wanted)
    works = []
    for batch in wanted:
        set_scales(loras, batch)  # prompts are encoded with them
        works.append(prepare_work(sd, args, inputs, nets, batch))
    if args.batch_size is None:
        works = _as_memory_allows(sd, args, loras, works, allowed)
    for line in changes(sd, args, works[0]) if args.from_image else ():
        _log.warning("%s", line)
    asked = _asked(sd, args, works)
    fits = _plan_memory(sd, asked, allowed)
    runs = prepared(first_pass(sd, args, inputs, work) for work in works)
    one_by_one = len(works) > 1 and fits and not args.low_memory
    alone = replace(asked, nets=(), larger=None, encodes=False)
    refiner = partial(_load_refiner, args, alone, allowed) if args.refiner else None

    def stopped() -> bool:
        return interrupts.code is not None or results.error is not None

    return Runs(sd, args, inputs, nets, loras, works, runs, one_by_one, refiner, stopped, watch), results


def _log_to_stderr(prog: str, verbose: bool) -> None:
    handler = Remarks()
    handler.setFormatter(logging.Formatter(f"{prog}: %(message)s"))
    _log.handlers = [handler]
    _log.setLevel(logging.INFO if verbose else logging.WARNING)


def _float16(args: argparse.Namespace) -> bool:
    # Half precision is what a GPU is fast at; a CPU is slower at it than at float32.
    return args.float16 and mx.default_device() == mx.gpu


def _load(args: argparse.Namespace, model: str) -> StableDiffusion:
    """A model as the arguments want it; LoRAs, embeddings and parts are those of ``--model`` alone, but for the VAE."""
    options: dict[str, Any] = {"low_memory": args.low_memory, **chosen_bits(args)}
    parts = chosen_parts(args)
    if model != args.model:
        parts = {name: source for name, source in parts.items() if name == "vae"}
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
    return {name: sd.load_lora(find_in(args.lora_dir, name), 0.0, partial=args.lora_partial) for name in names}


def _load_refiner(args: argparse.Namespace, asked: Asked, allowed: int) -> StableDiffusion:
    sd = _load(args, args.refiner)
    _plan_memory(sd, asked, allowed)
    return sd


def _asked(sd: StableDiffusion, args: argparse.Namespace, works: Sequence[Work]) -> Asked:
    """What the largest of the batches asks of a model."""
    work = max(works, key=lambda work: len(work.batch.seeds) * math.prod(work.size))
    size = tuple(side // sd.pixels_per_latent for side in reversed(work.size))
    hires = getattr(args, "hires", None)
    cfg = work.given["cfg_weight"]
    guided = (sd.default_guidance if cfg is None else cfg) > 1
    return Asked(
        len(work.batch.seeds),
        size,
        chunks=work.given["text"].context.shape[1] // 77,
        questions=1 if not guided else 3 if sd.mode == "instructions" else 2,
        nets=[control.network for control in work.given["controls"]],
        larger=tuple(round(side * hires) for side in size) if hires else None,
        encodes=work.canvas is not None or bool(hires and args.hires_upscaler == "pixels"),
    )


def _as_memory_allows(
    sd: StableDiffusion, args: argparse.Namespace, loras: dict[str, Attachment], works: Sequence[Work], allowed: int
) -> list[Work]:
    """The batches in parts of as many images as there is memory for."""
    found: list[Work] = []
    before, most = None, 1
    for work in works:
        asked = _asked(sd, args, [work])
        if asked != before:  # it takes seconds to find out, and most batches of a run are alike
            before, most = asked, _most_images(sd, asked, allowed)
        set_scales(loras, work.batch)
        found += parts(sd, work, most)
    return found


def _most_images(sd: StableDiffusion, asked: Asked, allowed: int) -> int:
    try:
        return images_at_once(sd, allowed, **vars(asked))
    except (RuntimeError, TypeError, ValueError) as error:  # MLX calls its way to look at graphs experimental
        _log.info("how much memory this takes cannot be said (%s)", error)
        return _UNKNOWN_MOST


def _plan_memory(sd: StableDiffusion, asked: Asked, allowed: int) -> bool:
    """Choose how to run where memory is short, and log what each stage will take.

    Returns whether there is memory for the networks of all stages after the first at once.
    """
    try:
        found = choose(sd, allowed, asked)
    except (RuntimeError, TypeError, ValueError) as error:  # MLX calls its way to look at graphs experimental
        _log.info("how much memory this takes cannot be said (%s)", error)
        return True
    for need in found:
        _log.info("memory for %s", need)
    return at_once(sd, found, asked.nets) <= allowed

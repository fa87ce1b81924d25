"""From jobs to runs: which images are made at once, what they are made from, and the passes that make them."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

import mlx.core as mx
from PIL.Image import Image

from ..diffusion.controls import Control
from ..diffusion.sample import Latents
from ..images.depth import read_depth
from ..images.edges import canny
from ..images.image import fit, open_image, to_array
from ..images.inpaint import EMPTY, Canvas, canvas, expand, prepare, read_mask
from ..models.controlnet import ControlNetModel, T2IAdapter
from ..pipeline import StableDiffusion
from ..text.encode import Conditioning

_log = logging.getLogger("stable_diffusion")

# What images of one batch may differ in.
_OWN = ("prompt", "number", "negative_prompt", "seed", "seeds", "n_images", "lists")

Nets = Sequence[ControlNetModel | T2IAdapter]
Pass = tuple[Latents, int]  # the latents of a run, and how many there will be


@dataclass(frozen=True)
class Batch:
    """Images that are made at once: a job and a seed for each. The jobs differ in their prompts alone."""

    jobs: tuple[argparse.Namespace, ...]
    seeds: tuple[int, ...]

    @property
    def job(self) -> argparse.Namespace:
        """What holds for all of them."""
        return self.jobs[0]


@dataclass(frozen=True)
class Inputs:
    """The files that a run works from, read before any model."""

    image: Image | None
    mask: Image | None
    hints: list[Image]
    depth: Any


@dataclass(frozen=True)
class Work:
    """A batch and all that its passes are told; ``size`` (width, height) is what is worked at, in pixels."""

    batch: Batch
    canvas: Canvas | None
    size: tuple[int, int]
    given: dict[str, Any]
    strength: float = 1.0
    depth: Any = None

    def conditioning(self) -> list[mx.array]:
        """What its prompts were encoded to."""
        tables = [value for value in self.given.values() if isinstance(value, Conditioning)]
        return [value for table in tables for value in vars(table).values() if isinstance(value, mx.array)]

    def without_controls(self) -> "Work":
        """The same for a pass that is not steered: it holds on to no network."""
        return replace(self, given=self.given | {"controls": ()})


def batches(jobs: Sequence[argparse.Namespace], size: int | None) -> list[Batch]:
    """All images of the jobs in order, filled into batches of ``size`` (None: of all that have the same settings)."""
    found: list[Batch] = []
    for _, alike_jobs in groupby(jobs, _settings):
        images = [(job, seed) for job in alike_jobs for seed in job.seeds]
        step = len(images) if size is None else size
        found += [Batch(*zip(*images[i : i + step], strict=True)) for i in range(0, len(images), step)]
    return found


def _settings(job: argparse.Namespace) -> dict[str, Any]:
    settings = {name: value for name, value in vars(job).items() if name not in _OWN}
    return settings | {"negative": bool(job.negative_prompt)}


def alike(sd: StableDiffusion, batch: Batch) -> list[Batch]:
    """A batch in parts whose prompts are read in as many chunks: one that is padded to another's is read otherwise."""

    @cache
    def chunks(*texts: str) -> int:
        return max(sd.encode_prompt(text, **_reading(batch.job)).context.shape[1] for text in texts)

    if batch.job.truncate:  # each is one chunk
        return [batch]
    return [
        Batch(*zip(*group, strict=True))
        for _, group in groupby(
            zip(batch.jobs, batch.seeds, strict=True), lambda image: chunks(image[0].prompt, image[0].negative_prompt)
        )
    ]


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Read the files that the arguments name. ValueError or OSError, one line, for what cannot be used."""
    image = mask = depth = None
    if "image" in args:
        image = open_image(args.image)
        mask = None if args.mask is None else prepare(read_mask(args.mask, image.size), invert=args.invert_mask)
        if args.expand:
            image, mask = expand(image, mask, args.expand)
        mask = None if mask is None else prepare(mask, blur=args.mask_blur)
        depth = None if args.depth is None else read_depth(args.depth)
        if mask is not None and mask.getbbox() is None:
            if args.mask_padding is not None:
                raise ValueError(EMPTY)
            _log.warning("the mask is black everywhere: the image is kept as it is")
    hints = [open_image(path) for path in args.control_image]
    return Inputs(image, mask, hints, depth)


def prepare_work(
    sd: StableDiffusion,
    args: argparse.Namespace,
    inputs: Inputs,
    nets: Nets,
    batch: Batch,
) -> Work:
    """Decide what a batch is made from and at what size. ValueError for what does not go together with the model."""
    job = batch.job
    height, width = (side * sd.pixels_per_latent for side in sd.default_latent_size)
    place = None
    if inputs.image is None:
        size = (job.width or width, job.height or height)
    else:
        _check_image_options(sd, args, job)
        place = canvas(
            inputs.image,
            inputs.mask,
            job.width,
            job.height,
            max(width, height),
            resize=job.resize,
            padding=args.mask_padding,
        )
        size = place.size
        if size != inputs.image.size:
            _log.info("the image of %dx%d is worked on at %dx%d", *inputs.image.size, *size)
    given = _prompts(sd, batch) | {
        "num_steps": sd.default_steps if job.steps is None else job.steps,
        "cfg_weight": job.cfg,
        "guidance_interval": job.guidance_interval,
        "deep_cache": job.deep_cache,
        "token_merging": job.token_merging,
        "seed": batch.seeds,
        "sampler": job.sampler,
        "schedule": job.schedule,
        "eta": job.eta,
        "clip_skip": job.clip_skip,
    }

    def shown(hint: Image) -> Image:
        return fit(hint, *size, mode=job.resize) if place is None else place.part(hint, mode=job.resize)

    given["controls"] = _controls(args, nets, [shown(hint) for hint in inputs.hints])
    if place is None:
        return Work(batch, None, size, given)
    forgets = args.expand or sd.mode in ("masks", "instructions")
    strength = job.strength if job.strength is not None else 1.0 if forgets else 0.9
    if args.refiner and _steps(sd, given, strength) < _steps(sd, given | {"denoising_start": args.refiner_start}):
        raise ValueError(
            f"--strength {strength:g} begins with less noise than the refiner at --refiner_start "
            f"{args.refiner_start:g}; raise one of them"
        )
    return Work(batch, place, size, given, strength, _depth(sd, inputs, place, job.resize))


def parts(sd: StableDiffusion, work: Work, size: int) -> list[Work]:
    """The same in batches of at most ``size`` images."""
    jobs, seeds = work.batch.jobs, work.batch.seeds
    if len(seeds) <= size:
        return [work]
    smaller = [Batch(jobs[i : i + size], seeds[i : i + size]) for i in range(0, len(seeds), size)]
    return [replace(work, batch=b, given=work.given | _prompts(sd, b) | {"seed": b.seeds}) for b in smaller]


def _check_image_options(sd: StableDiffusion, args: argparse.Namespace, job: argparse.Namespace) -> None:
    if args.depth is not None and sd.mode != "depth":
        raise ValueError(f"--depth has no effect: {args.model} was not made for depth maps")
    if job.image_cfg is not None and sd.mode != "instructions":
        raise ValueError(f"--image_cfg has no effect: {args.model} was not made for instructions")


def _prompts(sd: StableDiffusion, batch: Batch) -> dict[str, Any]:
    """The encoded prompts of a batch, one for all or one for each image."""
    job = batch.job
    guidance = sd.default_guidance if job.cfg is None else job.cfg
    if job.negative_prompt and guidance <= 1:
        _log.warning("the negative prompt has no effect at a guidance scale of %g; give --cfg above 1", guidance)
    reading = _reading(job)
    texts, negatives = ([getattr(j, name) for j in batch.jobs] for name in ("prompt", "negative_prompt"))
    same = len(set(zip(texts, negatives, strict=True))) == 1
    texts, negatives = (texts[:1], negatives[:1]) if same else (texts, negatives)
    if guidance > 1:
        encoded = sd.encode_prompts(texts, negatives if negatives[0] else "", **reading)
    else:
        encoded = sd.encode_prompt(texts, **reading), ""
    return {"text": encoded[0], "negative_text": encoded[1], "n_images": len(batch.jobs) if same else 1}


def _reading(job: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(job, name) for name in ("clip_skip", "emphasis", "truncate", "weight_blocks")}


def _controls(args: argparse.Namespace, nets: Nets, hints: Sequence[Image]) -> list[Control]:
    """What steers a run whose pictures have the size of the ``hints``."""

    def each(values: Sequence[Any], default: Any) -> list[Any]:
        """One for each net, of one for each, one for all, or none."""
        return list(values) if len(values) == len(nets) else list(values or [default]) * len(nets)

    arrays = [_edges(hint) if args.canny else mx.array(to_array(hint) / 2 + 0.5) for hint in hints]
    starts, ends = each(args.control_start, 0.0), each(args.control_end, 1.0)
    scales = [scale for _, scale in args.controlnet]
    return [
        Control(net, hint, scale, start, end, args.guess_mode)
        for net, hint, scale, start, end in zip(nets, each(arrays, None), scales, starts, ends, strict=True)
    ]


def _edges(hint: Image) -> mx.array:
    """The edges of a hint as an image [H, W, 3] in [0, 1]."""
    return mx.repeat(mx.array(canny(hint))[..., None] / 255, 3, axis=-1)


def first_pass(sd: StableDiffusion, args: argparse.Namespace, inputs: Inputs, work: Work) -> Pass:
    """The run that a batch begins with; nothing of it is computed here."""
    end = args.refiner_start if args.refiner else 1.0
    given = work.given | {"denoising_end": end}
    total = _steps(sd, given, work.strength)
    if work.canvas is None:
        unit = sd.pixels_per_latent
        return sd.generate_latents(latent_size=(work.size[1] // unit, work.size[0] // unit), **given), total
    place = work.canvas
    return sd.generate_latents_from_image(
        place.part(place.picture),
        strength=work.strength,
        mask=None if place.mask is None else place.part(place.mask),
        depth=work.depth,
        image_cfg_weight=work.batch.job.image_cfg,
        **given,
    ), total


def hires_pass(
    sd: StableDiffusion,
    args: argparse.Namespace,
    inputs: Inputs,
    nets: Nets,
    work: Work,
    x: mx.array,
) -> Pass:
    """The run that works again on the enlarged latents ``x`` of a first pass."""
    height, width = (max(1, round(side * args.hires)) for side in x.shape[1:3])
    unit, job = sd.pixels_per_latent, work.batch.job
    hints = [fit(hint, width * unit, height * unit, mode=job.resize) for hint in inputs.hints]
    steps = work.given["num_steps"] if args.hires_steps is None else args.hires_steps
    given = work.given | {"controls": _controls(args, nets, hints), "num_steps": steps}
    larger = sd.upscale(x, (height, width), args.hires_upscaler)
    run = sd.generate_latents_from_image(larger, strength=args.hires_strength, **given)
    return run, _steps(sd, given, args.hires_strength)


def refiner_pass(sd: StableDiffusion, args: argparse.Namespace, work: Work, x: mx.array) -> Pass:
    """The run of the refiner ``sd`` from the latents ``x`` where the base has stopped."""
    given = work.given | _prompts(sd, work.batch) | {"denoising_start": args.refiner_start, "controls": ()}
    return sd.generate_latents(latents=x, latent_size=x.shape[1:3], **given), _steps(sd, given)


def _steps(sd: StableDiffusion, given: Mapping[str, Any], strength: float = 1.0) -> int:
    known = ("num_steps", "sampler", "schedule", "denoising_start", "denoising_end")
    return sd.number_of_steps(strength=strength, **{name: given[name] for name in known if name in given})


def _depth(sd: StableDiffusion, inputs: Inputs, place: Canvas, resize: str) -> Any:
    """The depth map of what is worked on, given or estimated; None for models that are told none."""
    if sd.mode != "depth":
        return None
    if inputs.depth is not None:
        return _part(inputs.depth, inputs.image.size, place, resize)
    try:
        return sd.estimate_depth(place.part(place.picture))
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; give a depth map: --depth FILE") from error


def _part(depth: Any, image_size: tuple[int, int], place: Canvas, resize: str) -> Any:
    """The part of a depth map [H, W] that shows what is worked on of an image; beyond its edges it goes on as it ends.

    ``image_size`` (width, height) is that of the whole image, which was brought to the canvas as ``resize`` says.
    """
    scales = [side / whole for side, whole in zip(place.picture.size, image_size, strict=True)]
    scales = {"crop": [max(scales)] * 2, "pad": [min(scales)] * 2}.get(resize, scales)
    spans = []
    for axis, scale in enumerate(scales):
        side, whole, count = place.picture.size[axis], image_size[axis], depth.shape[1 - axis]
        # Picture and image have the same middle.
        start, stop = (round(((edge - side / 2) / scale + whole / 2) * count / whole) for edge in place.box[axis::2])
        spans.append([min(max(i, 0), count - 1) for i in range(start, max(stop, start + 1))])
    columns, rows = spans
    return depth[rows][:, columns]

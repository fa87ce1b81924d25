"""The runs of a script carried out: which pass of which batch is next, what is done where half precision overflows,
and what there is when a run is stopped.
"""

import argparse
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import mlx.core as mx

from ..lora.layers import Attachment
from ..pipeline import StableDiffusion
from . import progress
from .batches import Batch, Inputs, Nets, Pass, Work, first_pass, hires_pass, refiner_pass
from .preview import Watch

_log = logging.getLogger("stable_diffusion")


@dataclass(frozen=True)
class Made:
    """A batch and its latents [n, h, w, 4] so far, None before its first step.

    ``name`` is its number among several. ``seconds`` is how long its steps took. ``partial`` says how far a batch has
    come that was stopped, and is empty where all of it is done.
    """

    work: Work
    name: str = ""
    latents: mx.array | None = None
    seconds: float = 0.0
    partial: str = ""


@dataclass
class Runs:
    """All passes of all batches, by ``sd`` and then, if there is one, by the refiner that ``load_refiner`` reads.

    ``prepared`` are the first passes of the ``works``. Where ``one_by_one``, a batch goes through its last pass before
    the next one begins, and the networks of all stages stay in memory. Otherwise all batches go through a pass, and
    after the last one the UNet is let go of. ``stopped`` is asked after each step, and ``watch`` sees what
    it came to.
    """

    sd: StableDiffusion
    args: argparse.Namespace
    inputs: Inputs
    nets: Nets
    loras: dict[str, Attachment]
    works: list[Work]
    prepared: list[Pass]
    one_by_one: bool
    load_refiner: Callable[[], StableDiffusion] | None
    stopped: Callable[[], bool]
    watch: Watch

    def made(self) -> Iterator[Made]:
        """Each batch as soon as it is done. Of a run that is stopped, what there is of the batches that have begun.

        Raises FloatingPointError for latents that are not finite.
        """
        mx.eval([work.conditioning() for work in self.works])
        self.sd.release("unet", "autoencoder")
        if self.load_refiner is None:
            yield from self._by_base(self.one_by_one)
        else:
            done = self._by_base(False)
            yield from self._by_refiner([replace(one, work=one.work.without_controls()) for one in done])

    def _by_base(self, one_by_one: bool) -> Iterator[Made]:
        count = len(self.works)
        begun = [Made(work, f"{i}/{count}" if count > 1 else "") for i, work in enumerate(self.works, start=1)]
        for group in _groups(begun, one_by_one):
            done = self._pass(group, self._first, self.prepared)
            if getattr(self.args, "hires", None):
                done = self._pass(done, self._hires)
            yield from self._decodable(done, one_by_one)

    def _by_refiner(self, made: list[Made]) -> Iterator[Made]:
        """The batches as the refiner finishes them, which is read when nothing holds the first model any more."""
        runs: list[Pass] = []
        if not self.stopped():
            self.nets, self.loras, self.works = [], {}, []
            self.sd.release()
            self.sd = self.load_refiner()
            runs = prepared(self._refine(one) for one in made)
            self.sd.release("unet", "autoencoder")
        for group in _groups(made, self.one_by_one):
            yield from self._decodable(self._pass(group, self._refine, runs), self.one_by_one)

    def _decodable(self, made: list[Made], keep: bool) -> Iterator[Made]:
        """The batches that there is something of. The UNet is let go of first, unless the next batch needs it."""
        if not keep:
            self.sd.release("autoencoder")
        yield from (one for one in made if one.latents is not None)

    def _first(self, made: Made) -> Pass:
        return first_pass(self.sd, self.args, self.inputs, made.work)

    def _hires(self, made: Made) -> Pass:
        return hires_pass(self.sd, self.args, self.inputs, self.nets, made.work, made.latents)

    def _refine(self, made: Made) -> Pass:
        return refiner_pass(self.sd, self.args, made.work, made.latents)

    def _pass(self, made: Sequence[Made], begin: Callable[[Made], Pass], runs: list[Pass] | None = None) -> list[Made]:
        """What a pass makes of these batches, whose run ``begin`` gives; the first of ``runs`` are theirs, prepared."""
        if runs is None:
            runs = [] if self.stopped() else prepared(begin(one) for one in made)
        done = []
        for one in made:
            if self.stopped():
                done.append(one if one.partial or one.latents is None else replace(one, partial="the first pass"))
                continue
            set_scales(self.loras, one.work.batch)
            self.watch.begin(one.work.batch)
            start = perf_counter()
            latents, until = self._guarded(runs, partial(begin, one), one.name)
            seconds = one.seconds + perf_counter() - start
            done.append(replace(one, latents=latents, seconds=seconds, partial=until))
        return done

    def _guarded(self, runs: list[Pass], again: Callable[[], Pass], name: str) -> tuple[mx.array, str]:
        """The last latents of the first run, and how far it came if it was stopped; in float32 where it overflows."""
        try:
            return self._steps(runs.pop(0), runs, name)  # nothing holds a run that is over, and its networks
        except FloatingPointError as error:
            if self.sd.dtype == mx.float32:
                raise FloatingPointError(f"{error}; check the weights, or take a lower --cfg") from error
            _log.warning("%s: half precision overflows, from here on the UNet computes in float32", error)
        self.sd.to_float32("unet")
        for net in self.nets:
            net.set_dtype(mx.float32)
        try:
            return self._steps(again(), runs, name)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} in float32 either; try --no-float16, or check the weights") from error

    def _steps(self, run: Pass, later: Sequence[Pass], name: str) -> tuple[mx.array, str]:
        """Compute the steps one by one; FloatingPointError names the first whose latents are not finite."""
        latents, total = run
        bar = progress.steps(latents, total, name=name, later=sum(more for _, more in later))
        for step, x_t in enumerate(bar, start=1):
            mx.eval(x_t)
            if not mx.isfinite(x_t).all():
                raise FloatingPointError(f"the latents of step {step} are not finite")
            self.watch.see(latents.predicted, step, total)
            if self.stopped() and step < total:
                return latents.predicted, f"step {step} of {total}"
        return x_t, ""


def prepared(runs: Iterable[Pass]) -> list[Pass]:
    """All that comes before the steps of the runs, computed."""
    runs = list(runs)
    for latents, _ in runs:
        latents.prepare()
    return runs


def set_scales(loras: dict[str, Attachment], batch: Batch) -> None:
    """Let the LoRAs have the scales that the prompts of a batch ask for."""
    asked = dict(batch.job.loras)
    for name, attachment in loras.items():
        attachment.scale = asked.get(name, 0.0)


def decoded(sd: StableDiffusion, latents: mx.array, at_once: int) -> Iterator[mx.array]:
    """The pixels [H, W, 3] of each image, so many decoded at once; in float32 where half precision overflows.

    Raises FloatingPointError where they are not finite in float32 either.
    """
    for start in range(0, len(latents), at_once):
        part = latents[start : start + at_once]
        pixels = sd.decode(part)
        if not mx.isfinite(pixels).all() and sd.recipes["autoencoder"].dtype != mx.float32:
            _log.warning("half precision overflows in the autoencoder: it decodes in float32 from here on")
            sd.to_float32("autoencoder")
            pixels = sd.decode(part)
        if not mx.isfinite(pixels).all():
            raise FloatingPointError("the decoded pixels are not finite; give another autoencoder with --vae")
        yield from pixels


def _groups(made: list[Made], one_by_one: bool) -> list[list[Made]]:
    return [[one] for one in made] if one_by_one else [made]

"""The command lines of txt2image.py, image2image.py and unconditional.py.

Each written file gives a line on stdout (path and seed; with ``--json`` an object). Progress and remarks go to stderr.
The exit code is 0; 1 if the run failed; 2 if the arguments are refused and nothing was computed; 130 after Ctrl-C and
143 after SIGTERM, which save partial images. Images that are named on stdout are complete.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx

from ..app.batches import Batch
from ..app.engine import Engine, Result, Step, open_model
from ..app.inputs import read_inputs
from ..app.metadata import changes, for_model
from ..app.preview import PreviewSettings, PreviewWriter
from ..app.processes import join
from ..app.progress import ProgressBar
from ..app.request import Request, expand
from ..app.results import ResultWriter, Written, line_of
from ..app.sharing import Ranks
from ..models import cpu
from .arguments import Command, read
from .signals import Stop, signals
from .streams import open_closed, remark, say_if_read, show_log

_log = logging.getLogger("stable_diffusion")
_progress = _log.getChild("progress")  # the plan, time and memory of a run, for a terminal


def _run(script: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a script with the arguments ``argv`` (None: the process's), alone or as one of several ranks.

    A mistake is reported before the first step. Returns the exit code.
    """
    open_closed()
    name = prog or Path(sys.argv[0]).name
    with signals(_log.warning) as stop:
        try:
            with closing(Ranks(join())) as joined:
                stop.is_excused, stop.is_launched = joined.notices_loss, joined.size() > 1
                return _run_as(joined, stop, joined.once(lambda: read(script, argv, prog)))
        except ConnectionError as error:
            remark(f"{name}: error: {error}")
            return 2
        except KeyboardInterrupt:
            remark(f"{name}: error: interrupted; nothing was done")
            return stop.code or 130


txt2image, image2image, unconditional = (partial(_run, name) for name in ("txt2image", "image2image", "unconditional"))


def _run_as(ranks: Ranks, stop: Stop, command: Command) -> int:
    if command.sharing.share == "off":
        ranks.leave()
        ranks = Ranks()
    cpu.tune()
    parser, code = command.parser, 2
    start = f"{parser.prog}: rank {ranks.rank()}" if ranks.rank() else parser.prog
    handler = show_log(start, errors_only=ranks.rank() > 0)  # remarks on the command are the same on all ranks
    _log.setLevel(logging.INFO if command.verbose else logging.WARNING)
    _progress.setLevel(logging.INFO if command.verbose or sys.stderr.isatty() else logging.WARNING)
    try:
        work = ranks.once(lambda: _prepared(command, stop, ranks))
        handler.setLevel(logging.NOTSET)
        code, stop.is_expected = 1, True
        work.run()
    except FloatingPointError as error:
        remedy = "try --dtype float32 (for the text encoders too), another --vae, or check the weights"
        parser.fail(1, f"{error} in float32 either; {remedy}")
    except (ArithmeticError, ValueError, OSError) as error:
        parser.fail(code, error)
    except (RuntimeError, MemoryError) as error:  # what MLX raises, above all where memory runs out
        remedy = "where memory is short, try fewer images, a smaller size or -q"
        parser.fail(1, f"the computation failed ({str(error) or 'out of memory'}); {remedy}")
    except KeyboardInterrupt:
        parser.fail(stop.code or 130, "interrupted; the files named so far are complete")
    return 0


def _prepared(command: Command, stop: Stop, ranks: Ranks) -> "Script":
    cpu.choose_device(command.device)
    work = Script(command, stop, ranks)
    for line in command.remarks:  # a refusal is one line
        _log.warning("%s", line)
    return work


class Script:
    """Execute a command. The constructor does all work before the first step.

    Raises ValueError or OSError for mistakes in the arguments.
    """

    def __init__(self, command: Command, stop: Stop, ranks: Ranks):
        self._stop, self._json, self._start, self._bar = stop, command.json, perf_counter(), ProgressBar()
        self._unet_peak, self._n_images = 0, 0
        self._ranks, self._sharing = ranks, command.sharing
        self._requests = expand(command.lines, ranks.random)
        self._writer = ResultWriter(self._requests, command.output, ranks.began)
        self._previews = PreviewWriter(command.preview if ranks.rank() == 0 else PreviewSettings())
        inputs = read_inputs(self._requests[0])
        self._numbers = range(len(self._requests))  # of the images to generate here
        if ranks.size() > 1:
            self._share()
        elif self._sharing.gather or self._sharing.share in ("steal", "guidance"):
            _log.warning("--share and --gather have no effect on one process; start several with mlx.launch")
        requests = [self._requests[number] for number in self._numbers]
        if not requests:
            return
        resources = command.resources
        if self._sharing.share in ("steal", "guidance"):  # the same batches on all ranks
            resources = replace(resources, batch_size=resources.batch_size or 1)
        self._model = open_model(requests[0], resources.low_memory, command.reads_prompts)
        if ranks.rank() == 0:
            self._model.on_layer = self._bar.load
        if command.preload_models:
            self._model.ensure_models_are_loaded()
        self._previews.open(self._model)
        if command.output.safety_check:
            check = self._model.load_safety_checker(command.output.safety_model)
            self._writer.is_flagged = lambda image: any(check(image))
        if command.record is not None:
            requests = for_model(command.record, requests, self._model)
        self._engine = Engine(self._model, requests, resources, inputs)
        if command.record is not None:
            for line in changes(command.record, self._model, self._engine.batches[0]):
                _log.warning("%s", line)

    def _share(self) -> None:
        """Choose the images to generate here. Raises ValueError if they cannot be shared like this."""
        ranks, sharing, count = self._ranks, self._sharing, len(self._requests)
        if sharing.share == "steal" and self._requests[0].refiner:
            raise ValueError("--share steal cannot be combined with a refiner; use --share even")
        self._numbers = ranks.share(count, sharing.share)
        has_all = sharing.gather or sharing.share == "guidance"
        if self._writer.draws_grid and not has_all:
            _log.warning("no grid is drawn: each Mac keeps its images; --gather collects all on the first")
        self._writer.draws_grid &= has_all and ranks.rank() == 0
        self._writer.keeps_images = has_all

    def run(self) -> None:
        """Generate the images and write each as soon as it is decoded."""
        ranks = self._ranks
        if ranks.size() > 1:
            self._writer.choose_numbers(ranks.gather)
        if self._sharing.share == "guidance" and ranks.size() > 1:
            self._model.group = ranks
        if self._numbers:
            _progress.info("%s", self._plan())
        try:
            self._generate()
        except ConnectionError:
            if not ranks.is_lost:
                raise
        if self._writer.error is not None:
            raise self._writer.error
        if self._stop.is_due:
            raise KeyboardInterrupt
        if ranks.size() > 1:
            self._meet()
        for written in self._writer.finish():
            self._print(written)
        seconds, step = perf_counter() - self._start, self._bar.seconds / max(self._bar.steps, 1)
        memory = f"{self._unet_peak / 1e9:.2f} GB for the UNet, {mx.get_peak_memory() / 1e9:.2f} GB overall"
        images = "1 image" if self._n_images == 1 else f"{self._n_images} images"
        _progress.info("%s in %.1f s, %.2f s/step, peak memory: %s", images, seconds, step, memory)

    def _generate(self) -> None:
        ranks, steals = self._ranks, self._sharing.share == "steal" and self._ranks.size() > 1
        order = ranks.take([batch.numbers for batch in self._engine.batches]) if steals else None
        for result in self._engine.run(self._on_step, order) if self._numbers else ():
            self._unet_peak, self._n_images = self._unet_peak or mx.get_peak_memory(), self._n_images + 1
            self._bar.close()
            if self._model.group is not None and ranks.rank() > 0:
                continue
            number = self._numbers[result.batch.numbers[result.index]]
            for written in self._writer.add(result, self._model, number):
                self._print(written)
            if self._writer.error is None and not result.partial:
                ranks.finish()
            if result.index == len(result.batch.requests) - 1 and not result.partial:
                self._write_animation(result)
        self._bar.close()
        if count := len(self._writer.withheld):
            text = "%d of %d images are omitted: the safety check flagged them; it can be wrong, try another seed"
            _log.warning(text, count, len(self._numbers))

    def _meet(self) -> None:
        """Gather the images and wait for all ranks. Raises ConnectionError if a rank is lost with some images."""
        ranks, gathers = self._ranks, self._sharing.gather and self._sharing.share != "guidance"
        for written in self._writer.gather(ranks.gather, ranks.rank() == 0) if gathers else ():
            self._print(written)
        ranks.leave()
        if self._stop.is_due:
            raise KeyboardInterrupt
        if ranks.is_lost:
            missing = ranks.missing(len(self._requests))
            if missing or (gathers and not self._writer.has_all):
                raise ConnectionError(_lost([self._requests[number] for number in missing]))

    def _plan(self) -> str:
        """Describe the run in one line; values of swept settings are separated by slashes."""
        batches = self._engine.batches

        def each(value: Callable[[Batch], Any]) -> str:
            return "/".join(dict.fromkeys(str(value(batch)) for batch in batches))

        size = each(lambda batch: "{}x{}".format(*batch.size))
        steps = each(lambda batch: batch.request.steps or batch.defaults.num_steps)
        sampler = each(lambda batch: batch.request.options.sampler or batch.defaults.sampler)
        device = "gpu" if mx.default_device() == mx.gpu else "cpu"
        return f"{batches[0].request.model}, {size}, {steps} steps of {sampler}, {device}, {self._model.dtype_name}"

    def _on_step(self, step: Step) -> bool:
        if self._ranks.rank() == 0:
            self._bar(step)
        preview = self._previews(step)
        if preview is not None and self._json:
            record = {"kind": "preview", "path": str(preview), "step": step.number, "steps": step.total}
            self._print(record)
        return self._stop.is_due or self._writer.error is not None

    def _write_animation(self, result: Result) -> None:
        try:
            is_shown = self._writer.withheld.isdisjoint(self._numbers[number] for number in result.batch.numbers)
            if (path := self._previews.finish(result, is_shown)) is not None:
                self._print({"kind": "animation", "path": str(path)})
        except OSError as error:
            self._writer.error = self._writer.error or error

    def _print(self, record: Written) -> None:
        rank = {"rank": self._ranks.rank()} if self._ranks.size() > 1 else {}
        say_if_read(json.dumps(record | rank) if self._json else line_of(record), "the images are")


def _lost(missing: Sequence[Request]) -> str:
    """Describe the images missing from a lost rank, and the flags to generate them."""
    if not missing:
        return "another Mac is lost: all images are written, but some may be missing on the first Mac"
    seeds: dict[str, list[str]] = {}
    for request in missing:
        values = {name: request.value(name) for name in request.variant.swept if name != "seed"}
        flags = "".join(f" --{name} {value}" for name, value in values.items())
        seeds.setdefault(f'"{request.prompt}"{flags}', []).append(str(request.seed))
    ways = [f"{prompt} --seed {','.join(numbers)}" for prompt, numbers in seeds.items()]
    rest = f" and {len(ways) - 3} more" if len(ways) > 3 else ""
    what, it = ("1 image", "it") if len(missing) == 1 else (f"{len(missing)} images", "them")
    return f"another Mac is lost, and {what} may be missing; make {it} with {'; '.join(ways[:3])}{rest}"

"""What a script leaves: images, decoded and written as they come, a line on stdout for each, and their grid."""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ..images.image import from_array, grid
from ..pipeline import StableDiffusion
from .batches import Batch
from .engine import Made, decoded
from .metadata import describe
from .outputs import NotWrittenError, Outputs
from .plots import compare, draw

_log = logging.getLogger("stable_diffusion")


class Results:
    """The files of a run.

    Where they go is checked here: raises ValueError or OSError, one line, before any work. ``model`` is that of
    ``--model``, which is to be set once it is there; it may be another that finishes an image.
    """

    model: StableDiffusion
    error: OSError | None = None  # the first of them

    def __init__(self, args: argparse.Namespace, batches: Sequence[Batch]):
        self._args = args
        planned = [_values(args, batch, k) for batch in batches for k in range(len(batch.seeds))]
        self._outputs = Outputs(args.output, len(planned) > 1, args.overwrite)
        self._outputs.check([values | {"i": i} for i, values in enumerate(planned, start=1)])
        self._wants_grid = len(planned) > 1 and not args.no_grid
        self._jobs = [pair for batch in batches for pair in zip(batch.jobs, batch.seeds, strict=True)]
        self._written: list[dict[str, Any]] = []
        self._images: list[Image] = []  # for the grid

    def add(self, sd: StableDiffusion, made: Made) -> None:
        """Decode the images of a batch, and write each before the next is decoded.

        One that cannot be written leaves an ``error``. The others, which have taken as much work, are not given up.
        """
        args, work = self._args, made.work
        count = len(work.batch.seeds)
        for k, pixels in enumerate(decoded(sd, made.latents, args.decoding_batch_size)):
            image = from_array(pixels)
            if work.canvas is not None:
                image = work.canvas.finish(image, composite=not args.no_composite)
            own = {"i": len(self._written) + 1, "width": image.width, "height": image.height}
            values = _values(args, work.batch, k, sd) | {"steps": work.given["num_steps"]} | own
            mark = "partial" if made.partial else ""
            texts = None if args.no_metadata else describe(self.model, args, work, k, partial=made.partial or None)
            try:
                path = self._outputs.write(image, values, mark=mark, text=texts, quality=args.quality)
            except NotWrittenError as error:
                self.error, path = self.error or error, error.kept
            if self._wants_grid:
                self._images.append(image)
            record = {"kind": mark or "image", "path": str(path)} | values
            record |= {"negative_prompt": work.batch.jobs[k].negative_prompt, "seconds": round(made.seconds / count, 3)}
            self._written.append(record | ({"partial": made.partial} if made.partial else {}))
            ending = f" partial: {made.partial}" if made.partial else ""
            if path is not None:
                self._tell(f"{path} seed {values['seed']}{ending}", self._written[-1])

    def add_preview(self, path: Path, step: int, steps: int) -> None:
        """Name a preview for a program that reads ``--json``; a person sees the file."""
        if self._args.json:
            self._tell("", {"kind": "preview", "path": str(path), "step": step, "steps": steps})

    def add_animation(self, finish: Callable[[], Path | None]) -> None:
        """Name the animation of a batch, if ``finish`` writes one; where it raises OSError, that is the ``error``."""
        try:
            path = finish()
        except OSError as error:
            self.error = self.error or error
            return
        if path is not None:
            self._tell(str(path), {"kind": "animation", "path": str(path)})

    def finish(self) -> None:
        """Draw the grids: those that compare what lists made, or else that of several images of one size."""
        if not self._wants_grid or not self._images:
            return
        rows, plots = self._args.n_rows, compare(self._jobs)
        for number, plot in enumerate(plots, start=1):
            drawn = draw(plot, self._images, rows)
            if drawn is not None:
                self._add_grid(drawn, sorted(plot.cells.values()), "grid" if number == 1 else f"grid_{number}")
        if not plots and len({image.size for image in self._images}) > 1:
            _log.warning("the images are of several sizes: there is no grid of them")
        elif not plots:
            self._add_grid(grid(self._images, rows), range(len(self._images)), "grid")

    def _add_grid(self, image: Image, shown: Sequence[int], mark: str) -> None:
        path = self._outputs.write(image, self._written[shown[0]], mark=mark, quality=self._args.quality)
        images = [self._written[i]["path"] for i in shown]
        found = {"kind": "grid", "path": str(path), "width": image.width, "height": image.height, "images": images}
        self._tell(str(path), found)

    def _tell(self, line: str, record: dict[str, Any]) -> None:
        """Say on stdout what was written. Nothing of a run is given up because nobody reads that any more."""
        line = json.dumps(record) if self._args.json else line
        encoding = sys.stdout.encoding or "utf-8"
        try:
            print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
        except OSError as error:
            _log.warning("stdout cannot be written to (%s); the images are written all the same", error.strerror)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again as it ends


def _values(args: argparse.Namespace, batch: Batch, k: int, sd: StableDiffusion | None = None) -> dict[str, Any]:
    """What is said of image k of a batch, in its name and on stdout; what the model decides, if that is known."""
    job = batch.jobs[k]
    model = re.sub(r"\.(safetensors|ckpt)$", "", Path(args.model).name)
    found = {"seed": batch.seeds[k], "prompt": job.prompt, "model": model}
    names = {"steps": "default_steps", "cfg": "default_guidance", "sampler": "sampler"}
    for name, default in names.items():
        value = getattr(job, name)
        if value is not None or sd is not None:
            found[name] = getattr(sd, default) if value is None else value
    return found | {name: getattr(job, name) for name in ("width", "height") if getattr(job, name) is not None}

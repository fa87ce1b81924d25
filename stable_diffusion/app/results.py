"""The files of a run: images as they come, their grid, and a record of each for programs."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ..images.image import grid
from ..pipeline import StableDiffusion
from .engine import Result
from .metadata import describe
from .outputs import NotWrittenError, Outputs
from .plots import axes_of, compare, draw
from .request import Request

_log = logging.getLogger("stable_diffusion")


@dataclass(frozen=True)
class OutputSettings:
    """Hold where images go and in which form. ``output`` is a file, a folder or a pattern, see ``outputs``."""

    output: str = "out.png"
    overwrite: bool = False
    no_grid: bool = False
    n_rows: int = 1
    quality: int | None = None
    no_metadata: bool = False


@dataclass(frozen=True)
class Written:
    """Hold what to say of a file: a line for people and a record for programs."""

    line: str
    record: dict[str, Any]


class ResultWriter:
    """Write the images of ``requests``, one image each, and their grid.

    Where they go is checked here: raises ValueError or OSError, one line, before any work. An image that cannot be
    written leaves the first ``error``; the others, which have taken as much work, are written.
    """

    def __init__(self, requests: Sequence[Request], settings: OutputSettings):
        self._requests, self._settings = requests, settings
        self._outputs = Outputs(settings.output, len(requests) > 1, settings.overwrite)
        self._outputs.check([{"i": i} | _fields(request) for i, request in enumerate(requests, start=1)])
        self._entries: list[dict[str, Any]] = []
        self._images: list[Image] = []  # for the grid
        self.error: OSError | None = None

    def add(self, result: Result, model: StableDiffusion) -> Iterator[Written]:
        """Write an image. ``model`` is the one of the request, also where a refiner finished the image."""
        request, image = result.request, result.image
        size = {"i": len(self._entries) + 1, "width": image.width, "height": image.height}
        fields = _fields(request, model) | size
        mark = "partial" if result.partial else ""
        texts = None
        if not self._settings.no_metadata:
            texts = describe(model, result.batch, result.index, result.partial)
        try:
            path = self._outputs.write(image, fields, mark=mark, text=texts, quality=self._settings.quality)
        except NotWrittenError as error:
            self.error, path = self.error or error, error.kept
        if self._has_grid():
            self._images.append(image)
        record = {"kind": mark or "image", "path": str(path)} | fields
        record |= {"negative_prompt": request.negative_prompt, "seconds": result.seconds}
        record |= {"partial": result.partial} if result.partial else {}
        self._entries.append(record)
        if path is not None:
            ending = f" partial: {result.partial}" if result.partial else ""
            yield Written(f"{path} seed {request.seed}{ending}", record)

    def finish(self) -> Iterator[Written]:
        """Draw the grids: those that compare swept settings, or the grid of several images of one size."""
        if not self._has_grid() or not self._images:
            return
        plots = compare(_axes(self._requests))
        for number, plot in enumerate(plots, start=1):
            picture = draw(plot, self._images, self._settings.n_rows)
            if picture is not None:
                mark = "grid" if number == 1 else f"grid_{number}"
                yield self._add_grid(picture, sorted(plot.cells.values()), mark)
        if not plots and len({image.size for image in self._images}) > 1:
            _log.warning("the images are of several sizes: there is no grid of them")
        elif not plots:
            yield self._add_grid(grid(self._images, self._settings.n_rows), range(len(self._images)), "grid")

    def _has_grid(self) -> bool:
        return len(self._requests) > 1 and not self._settings.no_grid

    def _add_grid(self, image: Image, shown: Sequence[int], mark: str) -> Written:
        path = self._outputs.write(image, self._entries[shown[0]], mark=mark, quality=self._settings.quality)
        paths = [self._entries[i]["path"] for i in shown]
        size = {"width": image.width, "height": image.height}
        return Written(str(path), {"kind": "grid", "path": str(path)} | size | {"images": paths})


def _fields(request: Request, model: StableDiffusion | None = None) -> dict[str, Any]:
    """Return what is said of an image in its name; without a ``model`` only what the request decides."""
    name = re.sub(r"\.(safetensors|ckpt)$", "", Path(request.model).name)
    fields = {"seed": request.seed, "prompt": request.text, "model": name}
    chosen = {"steps": request.steps, "cfg": request.cfg, "sampler": request.options.sampler}
    if model is not None:
        defaults = {"steps": model.defaults.num_steps, "cfg": model.defaults.cfg_weight, "sampler": model.sampler}
        chosen = {key: defaults[key] if value is None else value for key, value in chosen.items()}
    chosen |= {"width": request.width, "height": request.height}
    return fields | {key: value for key, value in chosen.items() if value is not None}


def _axes(requests: Sequence[Request]) -> list[Any]:
    names = dict.fromkeys(name for request in requests for name in request.variant.swept)
    settings = {name: [request.value(name) for request in requests] for name in names}
    prompts = [(request.variant.prompt, request.text) for request in requests]
    return axes_of(settings, prompts, [(request.seed, request.variant.seeds) for request in requests])

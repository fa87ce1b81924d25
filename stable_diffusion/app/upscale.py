"""Enlarge image files by a network: ``python -m stable_diffusion upscale``."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from ..images.files import check_output, read_text, save
from ..upscaling import load_upscaler
from .results import numbered


def upscale(paths: Sequence[str], upscaler: str, output: str | None, limit: float) -> Iterator[Path]:
    """Enlarge image files within ``limit`` bytes of memory, and yield the path of each as it is written.

    ``output`` is a file, or a folder, which gets the files' names; None is the current folder, with the scale behind
    the names. A name that is taken gets a number. Each keeps the record of how its picture was made, and transparency
    where the format can. Raises ValueError or OSError, one line; for what is wrong with a path before any work.
    """
    texts = [read_text(path) for path in paths]
    network = load_upscaler(upscaler)
    places = [_place(Path(path), output, network.scale) for path in paths]
    if output is not None and len(paths) > 1 and not os.path.isdir(os.path.expanduser(output)):
        raise ValueError(f"the output {output} is one file for {len(paths)} images; give a folder that exists")
    for place in places:
        check_output(place)
    for path, place, text in zip(paths, places, texts, strict=True):
        image = network(path, max(limit - mx.get_active_memory(), 0.0))
        for free in numbered(place):
            with suppress(FileExistsError):
                save(image, free, text, overwrite=False)
                yield free
                break


def _place(path: Path, output: str | None, scale: int) -> Path:
    output = None if output is None else os.path.expanduser(output)
    if output is None:
        return Path(f"{path.stem}_x{scale}.png")
    return Path(output, f"{path.stem}.png") if os.path.isdir(output) else Path(output)

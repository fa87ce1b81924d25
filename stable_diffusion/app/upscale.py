"""Enlarge image files with an upscaler network: ``python -m stable_diffusion upscale``."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx

from ..images.files import check_output, read_text
from ..upscaling import load_upscaler
from .results import save_numbered


def upscale(paths: Sequence[str], upscaler: str, output: str | None, limit: float) -> Iterator[Path]:
    """Enlarge image files within ``limit`` bytes of memory, and yield the path of each as it is written.

    ``output`` is a file, or a folder, where the files keep their names; None is the current folder, with the scale
    appended to the names. Existing files are never overwritten; a number is added. The metadata of the image is kept,
    and its transparency if the format supports it. Raises ValueError or OSError, one line; for mistakes in a path
    before any work.
    """
    texts = [read_text(path) for path in paths]
    network = load_upscaler(upscaler)
    stems = [Path(path).stem for path in paths]
    if output is None:
        places = [Path(f"{stem}_x{network.scale}.png") for stem in stems]
    elif os.path.isdir(place := os.path.expanduser(output)):
        places = [Path(place, f"{stem}.png") for stem in stems]
    elif len(paths) > 1:
        raise ValueError(f"the output {output} is one file for {len(paths)} images; give a folder that exists")
    else:
        places = [Path(place)]
    for place in places:
        check_output(place)
    for path, place, text in zip(paths, places, texts, strict=True):
        image = network(path, max(limit - mx.get_active_memory(), 0.0))
        yield save_numbered(image, place, text=text)

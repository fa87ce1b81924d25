"""What clients of a server may use: the models of listed folders, and sizes and counts up to limits.

A name is a file name without its suffix, a folder, an alias or a Hub id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..lora.folders import files_in
from ..models.config import listed
from ..weights import catalog
from ..weights.layout import SUFFIXES
from .request import Request

_KINDS = {"models": "model", "vaes": "autoencoder", "controlnets": "ControlNet", "upscalers": "upscaler"}


@dataclass(frozen=True)
class Library:
    """Hold sources by name, for each kind; ``lora_folders`` are searched at each use."""

    models: Mapping[str, str] = field(default_factory=dict)
    vaes: Mapping[str, str] = field(default_factory=dict)
    controlnets: Mapping[str, str] = field(default_factory=dict)
    upscalers: Mapping[str, str] = field(default_factory=dict)
    lora_folders: Sequence[str] = ()

    def find(self, kind: str, name: str) -> str:
        """Return the source of a name, which may have a suffix, or the hash that other programs append.

        ``kind`` is the name of a field. Raises ValueError, with the known names, for an unknown one.
        """
        sources, name = getattr(self, kind), str(name)
        name = name.rpartition(" [")[0] or name
        source = sources.get(name, sources.get(name.removesuffix(Path(name).suffix)))
        if source is None:
            known = f"choose {listed(sources)}" if sources else f"the server was started without --{kind}"
            raise ValueError(f"unknown {_KINDS[kind]} {name!r:.80}; {known}")
        return source

    def loras(self) -> dict[str, Path]:
        """Return the files of LoRAs by their names in prompts."""
        return {path.stem: path for folder in self.lora_folders for path in files_in(Path(folder).expanduser())}


@dataclass(frozen=True)
class Limits:
    """Hold the limits of a request; ``pixels`` limits each side of an image."""

    steps: int = 150
    pixels: int = 2048
    images: int = 16

    def check(self, request: Request) -> None:
        """Raise ValueError, with the limit, for a request beyond a limit."""
        for steps in (request.steps, request.hires_steps):
            check_most("steps", steps or 0, self.steps)
        check_most("n_images", request.n_images or 1, self.images)
        self.check_size((request.width or 0, request.height or 0), request)

    def check_size(self, size: tuple[int, int], request: Request) -> None:
        """Raise ValueError for a size (width, height) that a request draws, with its second pass, beyond the limit."""
        for name, side in zip(("width", "height"), size, strict=True):
            check_most(name, side * (request.hires or 1), self.pixels)


def check_most(name: str, value: float, most: float) -> None:
    """Raise ValueError for a value above its limit."""
    if value > most:
        raise ValueError(f"{name} {value:g} is too large, the limit of this server is {most:g}")


def list_sources(places: Sequence[str]) -> dict[str, str]:
    """Return the sources in ``places`` by name: aliases, Hub ids, files, folders of files and of models.

    Paths are absolute, so that responses to other machines can omit the folders.

    Raises ValueError for a place of another kind, or without models.
    """
    sources: dict[str, str] = {}
    for place in places:
        path = Path(place).expanduser().absolute()
        if place.lower() in catalog.ALIASES or not path.exists():
            catalog.find(place)
            sources[place] = place
            continue
        inside = [path] if path.is_file() or _is_model(path) else sorted(path.iterdir())
        inside = [one for one in inside if one.suffix in SUFFIXES or _is_model(one)]
        if not inside:
            raise ValueError(f"no model found in {place}; give a folder of models, a file, an alias or a Hub id")
        sources |= {one.stem if one.is_file() else one.name: str(one) for one in inside}
    return sources


def _is_model(path: Path) -> bool:
    return path.is_dir() and ((path / "model_index.json").is_file() or (path / "config.json").is_file())

"""What a program that serves others lets them name and ask for: models of listed folders, sizes up to limits.

A name is that of a file without its suffix, of a folder, an alias or a Hub id.
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
    """Hold sources by their names, by kind; ``lora_folders`` are searched at each use."""

    models: Mapping[str, str] = field(default_factory=dict)
    vaes: Mapping[str, str] = field(default_factory=dict)
    controlnets: Mapping[str, str] = field(default_factory=dict)
    upscalers: Mapping[str, str] = field(default_factory=dict)
    lora_folders: Sequence[str] = ()

    def find(self, kind: str, name: str) -> str:
        """Return the source of a name, also with a suffix, or with the hash that other programs put behind it.

        ``kind`` is the name of a field. Raises ValueError, with the names that there are, for another.
        """
        sources, name = getattr(self, kind), str(name)
        name = name.rpartition(" [")[0] or name
        source = sources.get(name, sources.get(name.removesuffix(Path(name).suffix)))
        if source is None:
            known = f"choose {listed(sources)}" if sources else f"the server was started without --{kind}"
            raise ValueError(f"there is no {_KINDS[kind]} {name!r:.80}; {known}")
        return source

    def loras(self) -> dict[str, Path]:
        """Return the files of LoRAs by their names in prompts."""
        return {path.stem: path for folder in self.lora_folders for path in files_in(Path(folder).expanduser())}


@dataclass(frozen=True)
class Limits:
    """Hold the most that a request may ask for; ``pixels`` is a side of what is drawn."""

    steps: int = 150
    pixels: int = 2048
    images: int = 16

    def check(self, request: Request) -> None:
        """Raise ValueError, with the limit, for a request that asks for more."""
        factor = request.hires or 1
        rows = [("steps", steps or 0, self.steps) for steps in (request.steps, request.hires_steps)]
        rows += [(name, (getattr(request, name) or 0) * factor, self.pixels) for name in ("width", "height")]
        for row in (*rows, ("n_images", request.n_images or 1, self.images)):
            check_most(*row)


def check_most(name: str, value: float, most: float) -> None:
    """Raise ValueError for a value above the most that is taken."""
    if value > most:
        raise ValueError(f"{name} {value:g} is too much for this server; at most {most:g}")


def list_sources(places: Sequence[str]) -> dict[str, str]:
    """Return the sources by name that ``places`` stand for: aliases, Hub ids, files, folders of files and of models.

    Paths are absolute, of which an answer to another machine can leave out the folders.

    Raises ValueError for a place that is none of these, or has nothing.
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
            raise ValueError(f"there is no model in {place}; give a folder of models, a file, an alias or a Hub id")
        sources |= {one.stem if one.is_file() else one.name: str(one) for one in inside}
    return sources


def _is_model(path: Path) -> bool:
    return path.is_dir() and ((path / "model_index.json").is_file() or (path / "config.json").is_file())

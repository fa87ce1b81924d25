"""Previews during a run, and an animation of its steps.

A preview shows the current estimate of the clean latents. The channels of a latent give the mean colour of its pixels:
a linear map shows one pixel for each latent, at almost no cost. A tiny autoencoder (TAESD) decodes all pixels.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import mlx.core as mx
from PIL.Image import Image, Resampling

from ..files.whole import new_file
from ..images.files import check_output, save
from ..images.image import fit, grid, to_images
from ..models import tiling
from ..models.taesd import AutoencoderTiny
from ..pipeline import StableDiffusion
from ..weights.files import open_part
from ..weights.load import load_component, read_weights
from .engine import Result, Step
from .results import numbered

_log = logging.getLogger("stable_diffusion")

Decode = Callable[[mx.array], mx.array]  # latents [n, h, w, 4] -> pixels [n, H, W, 3] in [0, 1]
Factors = Sequence[Sequence[float]]

# (pixels per latent, scaling factor) -> the factors of each channel for red, green and blue, and a bias, in [-1, 1].
# Those of Stable Diffusion 1, 2 and XL were fitted by ComfyUI (comfy/latent_formats.py, SD15 and SDXL), those of the
# bundled model come from tools/tiny/fit_preview.py.
FACTORS: dict[tuple[int, float], Factors] = {
    (8, 0.18215): (
        (0.3512, 0.3250, -0.2829, -0.2120, 0.0),
        (0.2297, 0.4974, 0.1762, -0.2616, 0.0),
        (0.3227, 0.2350, 0.2721, -0.7177, 0.0),
    ),
    (8, 0.13025): (
        (0.3651, -0.2533, 0.1076, -0.3165, 0.1084),
        (0.4232, -0.0042, 0.1111, -0.2492, -0.0175),
        (0.4341, 0.1068, -0.0362, -0.2188, -0.0011),
    ),
    (4, 0.18215): (
        (0.9470, 0.4947, -0.7020, 0.1484, 0.0849),
        (0.6240, 0.5451, -0.1515, -0.2582, -0.0667),
        (0.1554, 0.3226, 0.1635, 0.2591, -0.0921),
    ),
}

_ENLARGED = 4  # pixels of a preview for each latent, at least, in each direction
_ANIMATIONS = {".gif": {}, ".webp": {"quality": 90}}
_LONGEST_SIDE = 1024  # of an animation, in pixels
_PLAYED, _SHORTEST, _LONGEST, _LAST = 4000, 60, 500, 2000  # milliseconds: all frames, one of them, the last one


def preview_decoder(model: StableDiffusion, vae: str | os.PathLike | None = None) -> Decode:
    """Return a function that decodes previews of a model's latents without its large autoencoder.

    Args:
        vae: a Hub id, folder or file of a TAESD, or of any VAE. None is a linear map of each latent to one pixel,
            unless the model's autoencoder is a TAESD. Unknown latents become grey.

    Raises ValueError or OSError, one line, for a ``vae`` that is missing, unreadable or made for other latents.
    """
    if "autoencoder" not in model.sources:
        return model.decode
    network, dtype = load_component(model.sources["autoencoder"].component), mx.float32
    channels, scale = kind = (network.latent_channels, network.config.scale)
    if vae is not None:
        component = open_part(vae, "vae", float16=model.dtype != mx.float32)
        dtype = mx.float32 if component.config.get("force_upcast", True) else model.dtype
        network = load_component(component, dtype)
        other = (network.latent_channels, network.config.scale)
        if other != kind:
            ours, theirs = (f"{channels} channels, {scale} pixels for each latent" for channels, scale in (kind, other))
            raise ValueError(f"{vae} reads other latents ({theirs}) than this model's ({ours}); choose another VAE")
    elif not isinstance(network, AutoencoderTiny):
        factors = FACTORS.get((scale, network.config.scaling_factor))
        if factors is None or len(factors[0]) != channels + 1:
            _log.warning("the colours of this model's latents are unknown: previews show one channel in grey")
            factors = [[1 / 3] + [0.0] * channels] * 3
        return partial(project, factors=factors)
    read_weights(network)
    return lambda x: mx.clip(tiling.decode(network, x.astype(dtype)).astype(mx.float32) / 2 + 0.5, 0, 1)


def project(latents: mx.array, factors: Factors) -> mx.array:
    """Map latents [n, h, w, C] to pixels [n, h, w, 3] in [0, 1] by ``factors`` [3, C + 1], the last of them a bias."""
    matrix = mx.array(factors)
    return mx.clip((latents @ matrix[:, :-1].T + matrix[:, -1]) / 2 + 0.5, 0, 1)


@dataclass(frozen=True)
class PreviewSettings:
    """Hold the paths of previews and animations. ``preview`` is a file or a folder, ``stepwise`` a .gif or .webp."""

    preview: str | None = None
    preview_every: int = 5
    preview_vae: str | None = None
    stepwise: str | None = None
    n_rows: int = 1
    overwrite: bool = False


class PreviewWriter:
    """Write previews after some steps, and an animation of each batch, as chosen by ``settings``.

    The constructor checks the paths: raises ValueError or OSError, one line, before any work.
    """

    def __init__(self, settings: PreviewSettings):
        self._settings = settings
        self._preview = None if settings.preview is None else _check_preview(settings.preview)
        self._animation = None if settings.stepwise is None else _check_animation(settings.stepwise)
        self._decoder: Decode | None = None
        self._pass = 0
        self._frames: dict[str, list[list[mx.array]]] = {}  # of each pass, by the index of the batch
        self._written: list[Path] = []

    def open(self, model: StableDiffusion) -> None:
        """Prepare previews of a model's latents; raises as :func:`preview_decoder` does."""
        if self._preview is not None or self._settings.preview_vae is not None:
            self._decoder = preview_decoder(model, self._settings.preview_vae)

    def __call__(self, step: Step) -> Path | None:
        """Show a step; step 0 begins a pass of a batch. Returns the path of the written preview, if any."""
        passes = self._frames.setdefault(step.batch.index, [])
        if step.number == 0:
            if step.is_retry:
                passes.pop()
            else:
                self._pass += 1
            passes.append([])
        elif self._animation is not None:
            passes[-1].append(step.predicted)
        is_shown = step.number and (step.number % self._settings.preview_every == 0 or step.number == step.total)
        if self._preview is None or not is_shown:
            return None
        path, (height, width) = self._preview, step.predicted.shape[1:3]
        if os.path.isdir(path):
            path = path / f"{self._pass:02}_{step.number:03}.jpg"
        try:
            images = to_images(self._decoder(step.predicted))
            size = (max(images[0].width, _ENLARGED * width), max(images[0].height, _ENLARGED * height))
            save(self._grid(images, size), path)
        except (OSError, ValueError) as error:  # a run continues without previews
            _log.warning("%s; no more previews are written", error)
            self._preview = path = None
        return path

    def _grid(self, images: Sequence[Image], size: tuple[int, int]) -> Image:
        return grid([fit(image, *size, "stretch") for image in images], self._settings.n_rows)

    def finish(self, result: Result, is_shown: bool = True) -> Path | None:
        """Write the animation of a result's batch if one is set and ``is_shown``; returns its path.

        It is decoded like the images, or by the VAE for previews. All passes get the size of the last one, at most 1024
        pixels. Raises OSError, one line.
        """
        frames = list(chain.from_iterable(self._frames.pop(result.batch.index, [])))
        if not frames or not is_shown:
            return None
        frames[-1] = result.latents  # with multistep samplers it differs from the last estimate
        decode = self._decoder if self._settings.preview_vae is not None else result.model.decode
        sides = [result.model.pixels_per_latent * side for side in result.latents.shape[2:0:-1]]
        is_taken = self._written.__contains__ if self._settings.overwrite else os.path.lexists
        path = next(path for path in numbered(self._animation) if not is_taken(path))
        pictures = []
        try:
            for x in frames:
                images = [image for latents in x for image in to_images(decode(latents[None]))]
                pictures.append(self._grid(images, sides))
                pictures[-1].thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Resampling.LANCZOS)
            write_animation(pictures, path)
        except (OSError, ValueError) as error:  # a full disk, or pixels that are not finite
            raise OSError(f"the animation {path} cannot be written ({error}); the images are not affected") from error
        self._written.append(path)
        return path


def write_animation(frames: Sequence[Image], path: Path) -> None:
    """Write frames of one size as a GIF or WebP, by its suffix; it repeats, with a pause on the last frame.

    The file appears complete or not at all.
    """
    first, *rest = frames
    each = min(max(_PLAYED // len(frames), _SHORTEST), _LONGEST)
    options = _ANIMATIONS[path.suffix.lower()] | {"duration": [each] * len(rest) + [_LAST], "loop": 0}
    with new_file(path) as partial:
        first.save(partial, format=path.suffix[1:], save_all=True, append_images=rest, **options)


def _check_preview(path: str) -> Path:
    path = os.path.expanduser(path)
    if not path.strip() or (Path(path).suffix and not path.endswith(os.sep) and not os.path.isdir(path)):
        return check_output(path)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the folder {path} for previews cannot be created ({error.strerror}); choose another one"
        ) from error
    return check_output(Path(path) / "preview.jpg").parent


def _check_animation(path: str) -> Path:
    path = os.path.expanduser(path)
    if Path(path).suffix.lower() not in _ANIMATIONS:
        raise ValueError(f"the animation {path!r} has the wrong suffix; choose {' or '.join(_ANIMATIONS)}")
    check_output(Path(path).with_suffix(".png"))  # its folder
    if os.path.isdir(path):
        raise ValueError(f"the animation {path} is a folder; choose another name")
    return Path(path)

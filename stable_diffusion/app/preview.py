"""What a run has come to, shown while it goes on (``--preview``) and from step to step afterwards (``--stepwise``).

A step's picture is that of its estimate of the clean latents (``Latents.predicted``). The channels of a latent tell the
mean colour of the pixels that it stands for: a linear map shows one pixel for each latent and costs next to nothing. A
tiny autoencoder (TAESD) shows the pixels themselves.
"""

import argparse
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import mlx.core as mx
from PIL.Image import Image

from ..images.image import UNFINISHED, check_output, fit, grid, save, to_images
from ..models import tiling
from ..models.taesd import AutoencoderTiny
from ..pipeline import StableDiffusion
from ..weights.files import open_part
from ..weights.load import load_component
from . import progress

_log = logging.getLogger("stable_diffusion")

Paint = Callable[[mx.array], mx.array]  # latents [n, h, w, 4] -> pixels [n, H, W, 3] in [0, 1]
Factors = Sequence[tuple[float, float, float]]

# Red, green and blue of each channel and of a bias, in [-1, 1], by what tells the latents of one family from another's:
# (pixels per latent, scaling factor). Those of Stable Diffusion 1, 2 and XL are the ones that ComfyUI has fitted
# (comfy/latent_formats.py, SD15 and SDXL), those of the bundled model come from tools/tiny/fit_preview.py.
FACTORS: dict[tuple[int, float], Factors] = {
    (8, 0.18215): (
        (0.3512, 0.2297, 0.3227),
        (0.3250, 0.4974, 0.2350),
        (-0.2829, 0.1762, 0.2721),
        (-0.2120, -0.2616, -0.7177),
        (0.0, 0.0, 0.0),
    ),
    (8, 0.13025): (
        (0.3651, 0.4232, 0.4341),
        (-0.2533, -0.0042, 0.1068),
        (0.1076, 0.1111, -0.0362),
        (-0.3165, -0.2492, -0.2188),
        (0.1084, -0.0175, -0.0011),
    ),
    (4, 0.18215): (
        (0.9470, 0.6240, 0.1554),
        (0.4947, 0.5451, 0.3226),
        (-0.7020, -0.1515, 0.1635),
        (0.1484, -0.2582, 0.2591),
        (0.0849, -0.0667, -0.0921),
    ),
}

_EVERY = 5  # steps from one preview to the next
_ENLARGED = 4  # pixels that a latent is shown with at least, each way
_ANIMATIONS = {".gif": {}, ".webp": {"quality": 90}}
_LONGEST_SIDE = 1024  # of an animation, in pixels
_PLAYED, _SHORTEST, _LONGEST, _LAST = 4000, 60, 500, 2000  # milliseconds: of all frames, of one, of the last


def painter(sd: StableDiffusion, vae: str | os.PathLike | None = None) -> Paint:
    """How the latents of a model are shown without its own autoencoder, which is large.

    Args:
        vae: a Hub id, folder or file of a TAESD, or of any VAE, to decode them. None is a linear map of each latent to
            one pixel, unless the model's own autoencoder is a TAESD. Latents that nothing is known of become grey.

    Raises ValueError or OSError, one line, for a ``vae`` that cannot be found or read, or is for other latents.
    """
    own = sd.recipes["autoencoder"].plain()  # lazy: it takes no memory
    network, dtype = own, mx.float32
    if vae is not None:
        component = open_part(vae, "vae", float16=sd.dtype == mx.float16)
        dtype = mx.float32 if component.config.get("force_upcast", True) else sd.dtype
        network = load_component(component, dtype)
        kinds = [(kind.latent_channels, kind.config.scale) for kind in (network, own)]
        if kinds[0] != kinds[1]:
            its, ours = (f"{channels} channels, {scale} pixels for each latent" for channels, scale in kinds)
            raise ValueError(f"{vae} is for other latents ({its}) than this model's ({ours}); give another one")
    elif not isinstance(own, AutoencoderTiny):
        return partial(project, factors=_factors(own.latent_channels, own.config.scale, own.config.scaling_factor))

    def decode(latents: mx.array) -> mx.array:
        pixels = tiling.decode(network, latents.astype(dtype)).astype(mx.float32)
        return mx.clip(pixels / 2 + 0.5, 0, 1)

    return decode


def _factors(channels: int, scale: int, scaling_factor: float) -> Factors:
    found = FACTORS.get((scale, scaling_factor))
    if found is None or len(found) != channels + 1:
        _log.warning("nothing is known of this model's latents: previews show one channel, in grey")
        return [(1 / 3,) * 3] + [(0.0,) * 3] * channels
    return found


def project(latents: mx.array, factors: Factors) -> mx.array:
    """Latents [n, h, w, C] -> pixels [n, h, w, 3] in [0, 1]: the ``factors`` of C channels and the bias, clipped."""
    *matrix, bias = mx.array(factors)
    return mx.clip((latents @ mx.stack(matrix) + bias) / 2 + 0.5, 0, 1)


class Watch:
    """Writes what is asked for with ``--preview`` and ``--stepwise``, of the arguments ``args``.

    Where it goes is checked here: raises ValueError or OSError, one line, before any work. ``tell`` is called with each
    preview that is written: its path, the step, and how many there are.
    """

    def __init__(self, args: argparse.Namespace, tell: Callable[[Path, int, int], object] = lambda *_: None):
        self._args, self._tell = args, tell
        self._every = _EVERY if args.preview_every is None else args.preview_every
        self._preview = None if args.preview is None else _check_preview(args.preview, args.output)
        self._animation = None if args.stepwise is None else _check_animation(args.stepwise)
        self._paint: Paint | None = None
        self._run = 0
        self._passes: dict[int, list[list[mx.array]]] = {}  # frames, by the batch they are of
        self._frames: list[mx.array] = []
        self._written: list[Path] = []

    def look_at(self, sd: StableDiffusion) -> None:
        """Make ready to show latents of this model; raises as :func:`painter` does."""
        if self._preview is not None or self._args.preview_vae is not None:
            self._paint = painter(sd, self._args.preview_vae)

    def begin(self, batch: object) -> None:
        """What is seen from here on is a pass of this batch."""
        self._run += 1
        self._frames = []
        self._passes.setdefault(id(batch), []).append(self._frames)

    def see(self, latents: mx.array, step: int, total: int) -> None:
        """What a step took for the images, clean latents [n, h, w, 4]; step 1 begins the pass anew."""
        if self._animation is not None:
            if step == 1:
                self._frames.clear()
            self._frames.append(latents)
        if self._preview is None or (step % self._every and step < total):
            return
        path = self._preview
        if os.path.isdir(path):
            path = path / f"{self._run:02}_{step:03}.jpg"
        try:
            images = to_images(self._paint(latents))
            sides = zip(images[0].size, latents.shape[2:0:-1], strict=True)
            save(self._grid(images, [max(shown, _ENLARGED * side) for shown, side in sides]), path)
        except (OSError, ValueError) as error:  # a run is worth more than its previews
            _log.warning("%s; there will be no more previews", error)
            self._preview = None
        else:
            self._tell(path, step, total)

    def _grid(self, images: Sequence[Image], size: Sequence[int]) -> Image:
        """A grid of images, brought to a ``size`` (width, height)."""
        return grid([fit(image, *size, "stretch") for image in images], self._args.n_rows)

    def finish(self, sd: StableDiffusion, batch: object, latents: mx.array) -> Path | None:
        """Write the animation of a batch that ended in these latents, if one is wanted; returns its path.

        It is decoded like the images themselves, or with ``--preview_vae`` by that. The sizes of all passes become the
        last one's, or less where a frame is above 1024 pixels. Raises OSError, one line.
        """
        seen = [frame for frames in self._passes.pop(id(batch), []) for frame in frames]
        if not seen:
            return None
        seen[-1] = latents  # multistep samplers end beside what they took for the image
        decode = self._paint if self._args.preview_vae is not None else sd.decode
        size = [sd.pixels_per_latent * side for side in latents.shape[2:0:-1]]
        path = next(path for path in _numbered(self._animation) if not self._is_taken(path))
        frames = []
        try:
            for x in progress.steps(seen, len(seen), name="animation"):
                frames.append(_at_most(self._grid([i for one in x for i in to_images(decode(one[None]))], size)))
        except ValueError as error:  # pixels that are not finite
            raise OSError(f"the animation {path} could not be made ({error})") from error
        write_animation(frames, path)
        self._written.append(path)
        return path

    def _is_taken(self, path: Path) -> bool:
        return path in self._written if self._args.overwrite else os.path.lexists(path)


def _at_most(image: Image, longest: int = _LONGEST_SIDE) -> Image:
    shrink = min(1, longest / max(image.size))
    return fit(image, *(round(side * shrink) for side in image.size), mode="stretch")


def write_animation(frames: Sequence[Image], path: Path) -> None:
    """Write frames of one size as a GIF or WebP, by the suffix, that goes on and on and rests on the last frame.

    Like ``image.save``, it writes all or nothing.
    """
    first, *rest = frames
    each = min(max(_PLAYED // len(frames), _SHORTEST), _LONGEST)
    options = _ANIMATIONS[path.suffix.lower()] | {"duration": [each] * len(rest) + [_LAST], "loop": 0}
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    UNFINISHED.add(temporary)
    try:
        with open(temporary, "xb") as file:
            first.save(file, format=path.suffix[1:], save_all=True, append_images=rest, **options)
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise OSError(f"the animation {path} could not be written ({error}); try another folder") from error
    finally:
        temporary.unlink(missing_ok=True)
        UNFINISHED.discard(temporary)


def _numbered(path: Path) -> Iterator[Path]:
    """film.gif, film-2.gif, film-3.gif, ..."""
    yield path
    yield from (path.with_stem(f"{path.stem}-{n}") for n in count(2))


def _check_preview(path: str, output: str) -> Path:
    """The file or folder for previews; a folder that is not there is made."""
    if os.path.abspath(path) == os.path.abspath(output):
        raise ValueError(f"--preview and --output both name {path}; give the preview another name")
    if not path.strip() or (Path(path).suffix and not path.endswith(os.sep) and not os.path.isdir(path)):
        return check_output(path)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise OSError(f"the folder {path} for previews could not be made ({error.strerror}); choose another") from error
    check_output(Path(path) / "preview.jpg")
    return Path(path)


def _check_animation(path: str) -> Path:
    if Path(path).suffix.lower() not in _ANIMATIONS:
        raise ValueError(f"the animation {path!r} has no suffix of one; choose {' or '.join(_ANIMATIONS)}")
    check_output(Path(path).with_suffix(".png"))  # its folder
    if os.path.isdir(path):
        raise ValueError(f"the animation {path} is a folder; choose another name")
    return Path(path)

"""Pictures as the networks see them: latents and encoded captions, computed once, in a fixed order of batches."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..images.files import open_image
from ..images.image import to_array
from ..models import tiling
from ..pipeline import StableDiffusion
from ..text.encode import Conditioning, concatenate
from .buckets import Crop, bucket_sizes, crop_for
from .loss import TrainingBatch, seed_of
from .pictures import Picture
from .settings import TrainingSettings

Row = tuple[int, bool]  # number of a picture, and whether it is mirrored


@dataclass(frozen=True)
class PictureSet:
    """Hold pictures that are shown together, each with its place in a bucket; ``weight`` is that of their loss."""

    pictures: Sequence[Picture]
    crops: Sequence[Crop]
    weight: float = 1.0

    def epoch(self, batch_size: int, seed: int) -> list[tuple[int, ...]]:
        """Return the batches of an epoch: each of one size, and all of them in the random order of a seed."""
        order, buckets = random.Random(seed), {}
        for number, (picture, crop) in enumerate(zip(self.pictures, self.crops, strict=True)):
            buckets.setdefault(crop.size, []).extend([number] * picture.repeats)
        for numbers in buckets.values():
            order.shuffle(numbers)
        batches = [tuple(n[i : i + batch_size]) for n in buckets.values() for i in range(0, len(n), batch_size)]
        order.shuffle(batches)
        return batches

    @cached_property
    def sizes(self) -> dict[tuple[int, int], int]:
        """Return the sizes (width, height) with the number of pictures of each, repeats counted."""
        counts: dict[tuple[int, int], int] = {}
        for picture, crop in sorted(zip(self.pictures, self.crops, strict=True), key=lambda pair: pair[1].size):
            counts[crop.size] = counts.get(crop.size, 0) + picture.repeats
        return counts


class Dataset:
    """Provide the batches of a training, see :class:`stable_diffusion.training.trainer.LoRATrainer`.

    Args:
        sd: the model that encodes the pictures and the captions.
        pictures: from ``read_pictures``.
        settings: of the training.
        prior: pictures of the kind of thing that is trained, which keep what the model knows of it.
        resolution: side of a square in pixels with the area of all sizes; None is the model's.
        flip: show each picture mirrored half of the time.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        pictures: Sequence[Picture],
        settings: TrainingSettings,
        *,
        prior: Sequence[Picture] = (),
        resolution: int | None = None,
        flip: bool = False,
    ):
        self.sd, self.settings, self.flip = sd, settings, flip
        self.resolution = resolution_of(sd) if resolution is None else resolution
        unit = 64 if self.resolution >= 256 else 2 * sd.pixels_per_latent
        sizes = bucket_sizes(self.resolution, unit)
        self.sets = [PictureSet(pictures, [crop_for(p.size, sizes) for p in pictures])]
        if prior:
            self.sets.append(PictureSet(prior, [crop_for(p.size, sizes) for p in prior], settings.prior_weight))
        self._latents: dict[tuple[str, Crop, bool], tuple[mx.array, mx.array]] = {}
        self._captions: dict[str, Conditioning] = {}

    def epoch_length(self) -> int:
        """Return the number of gradients after which each picture has been shown."""
        return len(self.sets[0].epoch(self.settings.batch_size, 0))

    def batches(self, number: int) -> list[TrainingBatch]:
        """Return the batch of a gradient, from 0, and with ``prior`` one of those."""
        result = []
        for which, pictures in enumerate(self.sets):
            length = len(pictures.epoch(self.settings.batch_size, 0))
            seed = seed_of(self.settings.seed, "epoch", which, number // length)
            rows = pictures.epoch(self.settings.batch_size, seed)[number % length]
            seeds = [seed_of(self.settings.seed, "row", which, number, row) for row in range(len(rows))]
            mirrored = [self.flip and seed % 2 == 1 for seed in seeds]
            dropped = [(seed >> 1) / 2**63 < self.settings.caption_dropout for seed in seeds]
            result.append(self.batch(pictures, list(zip(rows, mirrored, strict=True)), dropped))
        return result

    def batch(self, pictures: PictureSet, rows: Sequence[Row], dropped: Sequence[bool] = ()) -> TrainingBatch:
        """Return a batch of pictures of one size; those ``dropped`` have the empty caption."""
        chosen = [(pictures.pictures[n], pictures.crops[n], flip) for n, flip in rows]
        shown = [not drop for drop in dropped] or [True] * len(rows)
        captions = tuple((p.caption or "") * keep for (p, _, _), keep in zip(chosen, shown, strict=True))
        latents = [self._encode(*one) for one in chosen]
        mean, deviation = (mx.stack(arrays).astype(mx.float32) for arrays in zip(*latents, strict=True))
        time_ids = None
        if self.sd.is_xl:
            rows_ = [[*p.size[::-1], c.top, c.left, *c.size[::-1]] for p, c, _ in chosen]
            time_ids = mx.array(rows_, dtype=mx.float32)
        conditioning = None
        if not self.settings.text_encoder_rank:
            conditioning = concatenate([self._caption(text) for text in captions])
        return TrainingBatch(mean, deviation, captions, time_ids, conditioning, pictures.weight)

    # --- what is computed once ---------------------------------------------------------------------------------------

    def prepare(self, cache: Path | None = None) -> Iterator[tuple[int, int]]:
        """Encode all pictures and captions, and yield (number encoded, number of all) after each.

        What was encoded before is read from the folder ``cache``, in which the rest is written. Then the networks that
        only do this are freed.
        """
        flips = (False, True) if self.flip else (False,)
        jobs = [(p, c, flip) for s in self.sets for p, c in zip(s.pictures, s.crops, strict=True) for flip in flips]
        texts = (
            [] if self.settings.text_encoder_rank else ["", *(p.caption or "" for s in self.sets for p in s.pictures)]
        )
        texts, store = list(dict.fromkeys(texts)), _Store(cache, self.sd)
        for done, text in enumerate(texts, start=1):
            self._captions[text] = store.conditioning(text, lambda text=text: self._encode_caption(text))
            yield done, len(texts) + len(jobs)
        for done, (picture, crop, flip) in enumerate(jobs, start=len(texts) + 1):
            key = picture.digest, crop, flip
            self._latents[key] = store.latents(key, lambda job=(picture, crop, flip): self._encode_picture(*job))
            yield done, len(texts) + len(jobs)
        kept = (
            [name for name in self.sd.sources if name != "autoencoder"] if self.settings.text_encoder_rank else ["unet"]
        )
        self.sd.release(keep=kept)

    def _encode(self, picture: Picture, crop: Crop, flip: bool) -> tuple[mx.array, mx.array]:
        key = picture.digest, crop, flip
        if key not in self._latents:
            self._latents[key] = self._encode_picture(picture, crop, flip)
        return self._latents[key]

    def _encode_picture(self, picture: Picture, crop: Crop, flip: bool) -> tuple[mx.array, mx.array]:
        """Return mean and deviation [h, w, 4] of the latents of a picture, float16."""
        image = open_image(picture.path).resize(crop.resized, 1)  # Lanczos
        width, height = crop.size
        image = image.crop((crop.left, crop.top, crop.left + width, crop.top + height))
        pixels = mx.array(to_array(image))[None]
        mean, logvar = self.sd._autoencode(tiling.encode, pixels[:, :, ::-1] if flip else pixels)
        arrays = mean[0].astype(mx.float16), mx.exp(logvar[0].astype(mx.float32) / 2).astype(mx.float16)
        mx.eval(arrays)
        return arrays

    def _caption(self, text: str) -> Conditioning:
        if text not in self._captions:
            self._captions[text] = self._encode_caption(text)
        return self._captions[text]

    def _encode_caption(self, text: str) -> Conditioning:
        """Encode a caption as text, without the signs of prompts, in one chunk."""
        return self.sd.encode_prompt(text, emphasis="none", truncate=True).map(lambda array: array.astype(mx.float16))


class _Store:
    """Keep what was encoded in a folder, by the hash of what it was made from; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, sd: StableDiffusion):
        self._folder, self._sd = folder, sd
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def _models(self) -> dict[str, str]:
        """Return a hash of each network that encodes, of its weights."""
        hashes = {}
        for name in self._sd.sources.keys() - {"unet"}:
            digest = hashlib.sha256()
            for path, array in sorted(tree_flatten(getattr(self._sd, name).parameters())):
                digest.update(path.encode() + bytes(memoryview(array.view(mx.uint8))))
            hashes[name] = digest.hexdigest()
        return hashes

    def latents(self, key: object, make: Callable[[], tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
        """Return the latents of ``key`` from the folder, or make and keep them."""
        found = self._keep(("autoencoder", key), lambda: dict(zip(("mean", "deviation"), make(), strict=True)))
        return found["mean"], found["deviation"]

    def conditioning(self, text: str, make: Callable[[], Conditioning]) -> Conditioning:
        """Return an encoded caption from the folder, or make and keep it."""
        return Conditioning(**self._keep(("text", text), lambda: make().arrays()))

    def _keep(self, key: tuple, make: Callable[[], dict[str, mx.array]]) -> dict[str, mx.array]:
        if self._folder is None:
            return make()
        models = [
            digest for name, digest in sorted(self._models.items()) if (name == "autoencoder") == (key[0] == name)
        ]
        path = self._folder / f"{hashlib.sha256(repr((models, key)).encode()).hexdigest()[:40]}.safetensors"
        if not path.is_file():
            arrays = make()
            partial = path.with_name(f".{path.stem}.partial.safetensors")
            mx.save_safetensors(str(partial), arrays)
            partial.replace(path)
            return arrays
        arrays = mx.load(str(path))
        mx.eval(arrays)
        return arrays


def resolution_of(sd: StableDiffusion) -> int:
    """Return the side in pixels of the square at which a model was trained."""
    height, width = sd.default_latent_size
    return round((height * width) ** 0.5) * sd.pixels_per_latent

"""Pictures as inputs of the networks: latents and encoded captions, computed once, in a fixed order of batches."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from ..images.buckets import Crop, bucket_sizes, crop_for
from ..images.files import open_image
from ..images.folders import Picture
from ..images.image import to_array
from ..lora.delta import scale_of
from ..lora.layers import wrapped_layers
from ..models import tiling
from ..pipeline import StableDiffusion
from ..text.encode import Conditioning, concatenate
from ..weights.cache import ArrayCache, CacheEntry, hash_arrays
from .loss import TrainingBatch, seed_of
from .settings import TrainingSettings

Row = tuple[int, bool]  # number of a picture, and whether it is mirrored


@dataclass(frozen=True)
class PictureSet:
    """Hold a set of pictures, each with its crop for a bucket; ``weight`` is the weight of their loss."""

    pictures: Sequence[Picture]
    crops: Sequence[Crop]
    weight: float = 1.0

    def epoch(self, batch_size: int, seed: int) -> list[tuple[int, ...]]:
        """Return the batches of an epoch, each of one size, in a random order given by the seed."""
        order, buckets = random.Random(seed), {}
        for number, (picture, crop) in enumerate(zip(self.pictures, self.crops, strict=True)):
            buckets.setdefault(crop.size, []).extend([number] * picture.repeats)
        for numbers in buckets.values():
            order.shuffle(numbers)
        batches = [tuple(n[i : i + batch_size]) for n in buckets.values() for i in range(0, len(n), batch_size)]
        order.shuffle(batches)
        return batches

    def epoch_length(self, batch_size: int) -> int:
        """Return the number of batches of an epoch."""
        return sum(-(-count // batch_size) for count in self.sizes.values())

    @cached_property
    def digest(self) -> str:
        """Return a hash of pixels, captions, repeats and crops, in their order."""
        shown = ((p.digest, p.caption, p.repeats, crop) for p, crop in zip(self.pictures, self.crops, strict=True))
        return f"{seed_of(*shown):016x}"

    @cached_property
    def sizes(self) -> dict[tuple[int, int], int]:
        """Return the sizes (width, height) with the number of pictures of each, including repeats."""
        counts: dict[tuple[int, int], int] = {}
        for picture, crop in sorted(zip(self.pictures, self.crops, strict=True), key=lambda pair: pair[1].size):
            counts[crop.size] = counts.get(crop.size, 0) + picture.repeats
        return counts


class Dataset:
    """Provide the batches of a training; see :class:`stable_diffusion.training.trainer.LoRATrainer`.

    Pictures and captions are encoded once, in float16: all by :meth:`prepare`, or each at its first use.

    Args:
        sd: the model that encodes the pictures and the captions.
        pictures: from ``read_pictures``.
        settings: of the training.
        prior: pictures of the same class as the subject, which preserve the model's knowledge of it.
        resolution: side in pixels of a square whose area all sizes share; None is the model's.
        flip: mirror each picture half of the time.
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
        sizes = bucket_sizes(self.resolution, 64 if self.resolution >= 256 else 2 * sd.pixels_per_latent)
        self.sets = [PictureSet(pictures, [crop_for(p.size, sizes) for p in pictures])]
        if prior:
            self.sets.append(PictureSet(prior, [crop_for(p.size, sizes) for p in prior], settings.prior_weight))
        self._epochs: dict[int, tuple[int, list[tuple[int, ...]]]] = {}  # the current one of each set, with its number
        self._cache = ArrayCache()
        self._encoders = ["", ""]  # for a folder: hashes of the encoders of pictures and captions

    @property
    def digest(self) -> str:
        """Return hashes of the pictures of each set, and whether they are mirrored."""
        return " ".join([*(pictures.digest for pictures in self.sets), str(self.flip)])

    def epoch_length(self) -> int:
        """Return the number of gradients after which each picture has been used."""
        return self.sets[0].epoch_length(self.settings.batch_size)

    def batches(self, number: int) -> list[TrainingBatch]:
        """Return the batch of a gradient, counted from 0, and with ``prior`` a batch of prior pictures."""
        result, settings = [], self.settings
        for which, pictures in enumerate(self.sets):
            epoch, place = divmod(number, pictures.epoch_length(settings.batch_size))
            if self._epochs.get(which, (None,))[0] != epoch:
                seed = seed_of(settings.seed, "epoch", which, epoch)
                self._epochs[which] = epoch, pictures.epoch(settings.batch_size, seed)
            rows = self._epochs[which][1][place]
            seeds = [seed_of(settings.seed, "row", which, number, row) for row in range(len(rows))]
            mirrored = [self.flip and seed % 2 == 1 for seed in seeds]
            dropped = [(seed >> 1) / 2**63 < settings.caption_dropout for seed in seeds]
            result.append(self.batch(pictures, list(zip(rows, mirrored, strict=True)), dropped))
        return result

    def batch(self, pictures: PictureSet, rows: Sequence[Row], dropped: Sequence[bool] = ()) -> TrainingBatch:
        """Return a batch of pictures of one size; ``dropped`` ones get the empty caption."""
        chosen = [(pictures.pictures[n], pictures.crops[n], flip) for n, flip in rows]
        captions = [picture.caption or "" for picture, _, _ in chosen]
        for row in (row for row, drop in enumerate(dropped) if drop):
            captions[row] = ""
        latents = [self._cache.get(self._latents(*one)) for one in chosen]
        mean, deviation = (
            mx.stack([arrays[name] for arrays in latents]).astype(mx.float32) for name in ("mean", "deviation")
        )
        time_ids = conditioning = None
        if self.sd.is_xl:  # (height, width) of the picture, (top, left) of the crop, (height, width) of the result
            ids = [[*p.size[::-1], *c.corner[::-1], *c.size[::-1]] for p, c, _ in chosen]
            time_ids = mx.array(ids, dtype=mx.float32)
        if not self.settings.trains_text:
            encoded = concatenate([Conditioning(**self._cache.get(self._caption(text))) for text in captions])
            conditioning = encoded.map(lambda array: array.astype(self.sd.dtype))
        return TrainingBatch(mean, deviation, tuple(captions), time_ids, conditioning, pictures.weight)

    # --- what is computed once ---------------------------------------------------------------------------------------

    def prepare(
        self, cache: Path | None = None, group: mx.distributed.Group | None = None
    ) -> Iterator[tuple[int, int]]:
        """Encode all pictures and captions, and yield (number encoded, number of all) after each.

        Arrays of earlier runs are read from the folder ``cache``, and new ones are written there. Several runs may
        share it. Then the networks that are not trained are freed. Each process of a ``group`` encodes a part, and
        ``exchange`` distributes the parts. Raises OSError if the cache cannot be created or its disk is too full.
        """
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        if cache is not None:
            self._cache = ArrayCache(cache)
            text_encoders = [] if self.settings.trains_text else [name for _, name in self.sd._encoders]
            self._encoders = [self._hash("autoencoder"), self._hash(*text_encoders)]
        captions, latents = self._work()
        work = captions + latents
        self._cache.check_room(work)
        places = range(rank, len(work), size)
        for done, place in enumerate(places, start=1):
            if place - size < len(captions) <= place:  # all captions are encoded
                self.sd.release(keep=["autoencoder"])
            self._cache.get(work[place])
            yield done, len(places)
        self.sd.release()

    def exchange(self, group: mx.distributed.Group) -> None:
        """Send the encoded arrays to all processes: a collective operation, after ``prepare`` in all of them."""
        captions, latents = self._work()
        self._cache.exchange(captions + latents, group)

    def _work(self) -> tuple[list[CacheEntry], list[CacheEntry]]:
        shown = [pair for s in self.sets for pair in zip(s.pictures, s.crops, strict=True)]
        texts = dict.fromkeys(["", *(picture.caption or "" for picture, _ in shown)])
        texts = () if self.settings.trains_text else texts
        flips = (False, True) if self.flip else (False,)
        captions = [self._caption(text) for text in texts]
        return captions, [self._latents(picture, crop, flip) for picture, crop in shown for flip in flips]

    def _latents(self, picture: Picture, crop: Crop, flip: bool) -> CacheEntry:
        """Return "mean" and "deviation" [h, w, 4] of the latents of a picture, mirrored before it is cropped."""
        (width, height), (left, top) = crop.size, crop.corner

        def encode() -> dict[str, mx.array]:
            image = open_image(picture.path).resize(crop.resized, 1)  # Lanczos
            image = image.transpose(0) if flip else image  # left to right
            pixels = mx.array(to_array(image.crop((left, top, left + width, top + height))))[None]

            def moments() -> tuple[mx.array, mx.array]:
                mean, logvar = self.sd._autoencode(tiling.encode, pixels)
                return self.sd.check(mean), logvar

            mean, logvar = self.sd.retry_in_float32("autoencoder", moments)
            return {"mean": mean[0], "deviation": mx.exp(logvar[0].astype(mx.float32) / 2)}

        size = 16 * width * height // self.sd.pixels_per_latent**2
        return CacheEntry((self._encoders[0], picture.digest, crop, flip), size, encode)

    def _caption(self, text: str) -> CacheEntry:
        """Return the encoded prompt of a caption: plain text without prompt syntax, in one chunk."""
        tokenizers = [getattr(self.sd, name) for name, _ in self.sd._encoders]
        ids = tuple((tokenizer.pad_id, *tokenizer.encode(text)) for tokenizer in tokenizers)
        size = 2 * 77 * max(self.sd.unet_config.cross_attention_dim)

        def encode() -> dict[str, mx.array]:
            encoded = self.sd.encode_prompt(text, emphasis="none")
            return encoded.arrays() | {"context": encoded.context[:, :77]}

        return CacheEntry((self._encoders[1], ids), size, encode)

    def _hash(self, *names: str) -> str:
        """Return a hash of all inputs of networks but the data: configs, weights, LoRAs with scales, and words."""
        hashes = []
        for name, network in zip(names, self.sd._use(*names), strict=True):
            deltas = [delta for _, layer in wrapped_layers(network) for delta in layer.loras]
            scales = [(delta.multiplier, scale_of(delta.lora.scale, delta.network)) for delta in deltas]
            source = self.sd.sources[name]
            hashes.append(hash_arrays([network.parameters(), source.words], source.component.config, scales))
        return " ".join(hashes)


def resolution_of(sd: StableDiffusion) -> int:
    """Return the side in pixels of the square on which a model was trained."""
    height, width = sd.default_latent_size
    return round((height * width) ** 0.5) * sd.pixels_per_latent

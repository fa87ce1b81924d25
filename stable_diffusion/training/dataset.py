"""Pictures as the networks see them: latents and encoded captions, computed once, in a fixed order of batches."""

import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..files.whole import check_space, new_file
from ..images.files import open_image
from ..images.image import to_array
from ..lora.delta import scale_of
from ..lora.layers import wrapped_layers
from ..models import tiling
from ..pipeline import StableDiffusion
from ..text.encode import Conditioning, concatenate
from ..weights.formats.safetensors import read_safetensors, write_safetensors
from .buckets import Crop, bucket_sizes, crop_for
from .loss import TrainingBatch, seed_of
from .pictures import Picture
from .settings import TrainingSettings

_log = logging.getLogger("stable_diffusion")

Row = tuple[int, bool]  # number of a picture, and whether it is mirrored


@dataclass(frozen=True)
class _Encoding:
    """Describe something that is encoded once: its kind, what tells it from others of it, its bytes about, and how."""

    kind: str
    key: tuple
    size: int
    encode: Callable[[], dict[str, mx.array]]


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

    def epoch_length(self, batch_size: int) -> int:
        """Return the number of batches of an epoch."""
        return sum(-(-count // batch_size) for count in self.sizes.values())

    @cached_property
    def sizes(self) -> dict[tuple[int, int], int]:
        """Return the sizes (width, height) with the number of pictures of each, repeats counted."""
        counts: dict[tuple[int, int], int] = {}
        for picture, crop in sorted(zip(self.pictures, self.crops, strict=True), key=lambda pair: pair[1].size):
            counts[crop.size] = counts.get(crop.size, 0) + picture.repeats
        return counts


class Dataset:
    """Provide the batches of a training, see :class:`stable_diffusion.training.trainer.LoRATrainer`.

    Pictures and captions are encoded once, in float16: all by :meth:`prepare`, or each when it is first shown.

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
        sizes = bucket_sizes(self.resolution, 64 if self.resolution >= 256 else 2 * sd.pixels_per_latent)
        self.sets = [PictureSet(pictures, [crop_for(p.size, sizes) for p in pictures])]
        if prior:
            self.sets.append(PictureSet(prior, [crop_for(p.size, sizes) for p in prior], settings.prior_weight))
        self._epochs: dict[int, tuple[int, list[tuple[int, ...]]]] = {}  # the current one of each set, with its number
        self._encoded: dict[tuple, dict[str, mx.array]] = {}  # where there is no cache
        self._cache: Path | None = None
        self._models: dict[str, str] = {}  # a hash of what encodes each kind of thing in the cache

    def epoch_length(self) -> int:
        """Return the number of gradients after which each picture has been shown."""
        return self.sets[0].epoch_length(self.settings.batch_size)

    def batches(self, number: int) -> list[TrainingBatch]:
        """Return the batch of a gradient, from 0, and with ``prior`` one of those."""
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
        """Return a batch of pictures of one size; those ``dropped`` have the empty caption."""
        chosen = [(pictures.pictures[n], pictures.crops[n], flip) for n, flip in rows]
        captions = [picture.caption or "" for picture, _, _ in chosen]
        for row in (row for row, drop in enumerate(dropped) if drop):
            captions[row] = ""
        latents = [self._once(self._latents(*one)) for one in chosen]
        mean, deviation = (
            mx.stack([arrays[name] for arrays in latents]).astype(mx.float32) for name in ("mean", "deviation")
        )
        time_ids = conditioning = None
        if self.sd.is_xl:  # (height, width) of the picture, (top, left) of the crop, (height, width) of the result
            ids = [[*p.size[::-1], c.top, c.left, *c.size[::-1]] for p, c, _ in chosen]
            time_ids = mx.array(ids, dtype=mx.float32)
        if not self.settings.trains_text:
            encoded = concatenate([Conditioning(**self._once(self._caption(text))) for text in captions])
            conditioning = encoded.map(lambda array: array.astype(self.sd.dtype))
        return TrainingBatch(mean, deviation, tuple(captions), time_ids, conditioning, pictures.weight)

    # --- what is computed once ---------------------------------------------------------------------------------------

    def prepare(self, cache: Path | None = None) -> Iterator[tuple[int, int]]:
        """Encode all pictures and captions, and yield (number encoded, number of all) after each.

        What was encoded before is read from the folder ``cache``, in which the rest is written. Several runs may share
        it. Then the networks that are not trained are freed. Raises OSError where the cache cannot be made, or its disk
        has no room for it.
        """
        shown = [pair for s in self.sets for pair in zip(s.pictures, s.crops, strict=True)]
        texts = dict.fromkeys(["", *(picture.caption or "" for picture, _ in shown)])
        texts = () if self.settings.trains_text else texts
        flips = (False, True) if self.flip else (False,)
        work = [self._caption(text) for text in texts]
        work += [self._latents(picture, crop, flip) for picture, crop in shown for flip in flips]
        if cache is not None:
            self._open_cache(cache, work)
        for done, encoding in enumerate(work, start=1):
            if done == len(texts) + 1:  # all captions are encoded
                self.sd.release(keep=["autoencoder"])
            self._once(encoding)
            yield done, len(work)
        self.sd.release()

    def _latents(self, picture: Picture, crop: Crop, flip: bool) -> _Encoding:
        """Return "mean" and "deviation" [h, w, 4] of the latents of a picture, which is mirrored before it is cut."""
        (width, height), left, top = crop.size, crop.left, crop.top

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
        return _Encoding("picture", (picture.digest, crop, flip), size, encode)

    def _caption(self, text: str) -> _Encoding:
        """Return the encoded prompt of a caption: read as text, without the signs of prompts, and of one chunk."""
        tokenizers = [getattr(self.sd, name) for name, _ in self.sd._encoders]
        key = tuple((tokenizer.pad_id, *tokenizer.encode(text)) for tokenizer in tokenizers)
        size = 2 * 77 * max(self.sd.unet_config.cross_attention_dim)

        def encode() -> dict[str, mx.array]:
            encoded = self.sd.encode_prompt(text, emphasis="none")
            return encoded.arrays() | {"context": encoded.context[:, :77]}

        return _Encoding("caption", key, size, encode)

    # --- the cache ---------------------------------------------------------------------------------------------------

    def _once(self, encoding: _Encoding) -> dict[str, mx.array]:
        """Return what was encoded before, from memory or from the cache, or encode it in float16 and keep it there."""
        path, place = self._path(encoding), (encoding.kind, encoding.key)
        if place in self._encoded:
            return self._encoded[place]
        if path is not None and path.is_file():
            try:
                arrays, _ = read_safetensors(path)
                mx.eval(arrays)
                return arrays
            except ValueError as error:
                _log.warning("%s; it is made anew", error)
        arrays = {name: array.astype(mx.float16) for name, array in encoding.encode().items()}
        mx.eval(arrays)
        if path is None:
            self._encoded[place] = arrays
            return arrays
        with new_file(path) as partial:
            write_safetensors(partial, list(arrays), dict(arrays))
        return arrays

    def _path(self, encoding: _Encoding) -> Path | None:
        """Return the file of the cache, whose name is a hash of what is encoded and of what encodes it."""
        if self._cache is None:
            return None
        parts = encoding.kind, self._models[encoding.kind], encoding.key
        return self._cache / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:40]}.safetensors"

    def _open_cache(self, folder: Path, work: Sequence[_Encoding]) -> None:
        """Make the folder of the cache, and check that its disk has room for what is not in it yet."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"the cache {folder} cannot be made ({error.strerror}); choose another folder") from None
        self._models["picture"] = self._hash("autoencoder")
        if not self.settings.trains_text:
            self._models["caption"] = self._hash(*(name for _, name in self.sd._encoders))
        self._cache = folder
        missing = (encoding for encoding in work if not self._path(encoding).is_file())
        check_space(folder / "cache", sum(encoding.size for encoding in missing))

    def _hash(self, *names: str) -> str:
        """Return a hash of all that decides what networks compute: configs, weights, LoRAs and words."""
        digest = hashlib.sha256()
        for name, network in zip(names, self.sd._use(*names), strict=True):
            deltas = [delta for _, layer in wrapped_layers(network) for delta in layer.loras]
            scales = [(delta.multiplier, scale_of(delta.lora.scale, delta.network)) for delta in deltas]
            source = self.sd.sources[name]
            digest.update(f"{source.component.config} {scales}".encode())
            words = [(str(number), vectors) for number, vectors in enumerate(source.words)]
            for path, array in sorted(tree_flatten(network.parameters())) + words:
                digest.update(f"{path} {array.shape} {array.dtype}".encode())
                digest.update(memoryview(array.reshape(-1).view(mx.uint8)))
        return digest.hexdigest()


def resolution_of(sd: StableDiffusion) -> int:
    """Return the side in pixels of the square at which a model was trained."""
    height, width = sd.default_latent_size
    return round((height * width) ** 0.5) * sd.pixels_per_latent

"""Pictures come in a fixed order, each as often as it should; what is encoded is kept, and is the same with a cache."""

import logging
from collections import Counter
from functools import partial
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageOps

from checkpoints import SCALED, make
from oracle import normal, relative_error
from stable_diffusion import StableDiffusion
from stable_diffusion.images.buckets import bucket_sizes, crop_for
from stable_diffusion.images.files import open_image
from stable_diffusion.images.folders import Picture, read_pictures
from stable_diffusion.training.dataset import Dataset, PictureSet
from stable_diffusion.training.settings import TrainingSettings
from stable_diffusion.training.trainer import LoRATrainer
from stable_diffusion.weights import cache as module

SIDE = 64  # pixels; sizes are multiples of 16
CAPTIONS = ("the red cat", "(the:1.5) [blue] BREAK cat", "the cat " * 60, "")
SHAPES = [(97, 64), (64, 97), (70, 70), (130, 90)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Picture]:
    folder = tmp_path_factory.mktemp("photos")
    for number, (shape, caption) in enumerate(zip(SHAPES, CAPTIONS, strict=True)):
        pixels = np.random.default_rng(number).integers(0, 256, (shape[1] // 4, shape[0] // 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(shape, 1).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    pictures, lines = read_pictures(folder, SIDE)
    assert not lines
    return pictures


def dataset(sd: StableDiffusion, photos: list[Picture], *, flip: bool = False, prior=(), **settings) -> Dataset:
    return Dataset(sd, photos, TrainingSettings(**settings), resolution=SIDE, flip=flip, prior=prior)


def prepared(data: Dataset, cache: Path | None = None) -> list[tuple[int, int]]:
    return list(data.prepare(cache))


# --- the order -------------------------------------------------------------------------------------------------------


def many() -> PictureSet:
    """61 pictures of three shapes with 1 to 3 repeats."""
    shapes = [((64, 64), (96, 40), (40, 96))[n * n % 3] for n in range(61)]
    pictures = [Picture(Path(f"{n}.png"), f"{n}", 1 + n % 3, shape, f"{n}") for n, shape in enumerate(shapes)]
    return PictureSet(pictures, [crop_for(shape, bucket_sizes(64, 16)) for shape in shapes])


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_an_epoch_shows_each_picture_as_often_as_its_repeats(batch_size):
    pictures = many()
    batches = pictures.epoch(batch_size, 5)
    assert Counter(n for batch in batches for n in batch) == {n: p.repeats for n, p in enumerate(pictures.pictures)}
    assert all(len({pictures.crops[n].size for n in batch}) == 1 and len(batch) <= batch_size for batch in batches)
    assert len(batches) == pictures.epoch_length(batch_size)
    assert sum(len(batch) < batch_size for batch in batches) <= len(pictures.sizes)
    assert batches == pictures.epoch(batch_size, 5) != pictures.epoch(batch_size, 6)


def test_batches_depend_on_their_number_alone(tiny, monkeypatch):
    """So a run that goes on, or looks at some twice, sees what an uninterrupted one sees."""
    monkeypatch.setattr(Dataset, "batch", lambda self, pictures, rows, dropped: (pictures.weight, rows, dropped))
    pictures = many().pictures
    settings = {"batch_size": 2, "caption_dropout": 0.2, "prior_weight": 0.5}
    make_data = partial(dataset, tiny, pictures, flip=True, prior=pictures[:5], **settings)
    data = make_data()
    length = data.epoch_length()
    whole = [data.batches(number) for number in range(3 * length)]
    for number in (2 * length, 5, 5, length - 1, length):
        assert make_data().batches(number) == whole[number] == data.batches(number)
    assert make_data(seed=1).batches(5) != whole[5]
    epochs = [whole[start : start + length] for start in range(0, 3 * length, length)]
    for epoch in epochs:
        counts = Counter(n for (_, rows, _), _ in epoch for n, _ in rows)
        assert counts == {n: p.repeats for n, p in enumerate(pictures)}
        assert [batch[1][0] for batch in epoch] == [0.5] * length
    first, second, third = ([[n for n, _ in rows] for (_, rows, _), _ in epoch] for epoch in epochs)
    assert first != second != third
    rows = [
        (flip, drop)
        for batch in whole
        for _, rows, dropped in batch
        for (_, flip), drop in zip(rows, dropped, strict=True)
    ]
    flips, drops = (np.mean(values) for values in zip(*rows, strict=True))
    assert abs(flips - 0.5) < 4 * (0.25 / len(rows)) ** 0.5
    assert abs(drops - 0.2) < 4 * (0.16 / len(rows)) ** 0.5


# --- what the networks see -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_pixels_are_scaled_mirrored_and_cut_and_xl_is_told(xl, photos, monkeypatch, flip):
    seen = []
    encode = type(xl)._autoencode
    monkeypatch.setattr(xl, "_autoencode", lambda half, pixels: seen.append(pixels) or encode(xl, half, pixels))
    data = dataset(xl, photos)
    batch = data.batch(data.sets[0], [(1, flip)])
    image = open_image(photos[1].path).resize((53, 80), 1)
    image = (ImageOps.mirror(image) if flip else image).crop((2, 0, 50, 80))  # of 5 columns 3 on the right
    np.testing.assert_allclose(np.array(seen[0][0]), np.asarray(image) / 127.5 - 1, atol=1e-6)
    assert batch.time_ids.tolist() == [[97, 64, 0, 2, 80, 48]]
    mean, logvar = xl.autoencoder.encode(seen[0])
    assert relative_error(batch.mean, mean) < 1e-3
    assert relative_error(batch.deviation, mx.exp(logvar / 2)) < 1e-3
    assert batch.mean.dtype == batch.deviation.dtype == mx.float32


@pytest.mark.parametrize("number", range(4))
def test_captions_are_read_as_text(sd, sd1_folder, photos, number):
    """And cut to the length that transformers cuts them to."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(sd1_folder, subfolder="tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(sd1_folder, subfolder="text_encoder")
    text = " ".join(CAPTIONS[number].split())
    ids = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = encoder(ids)[0].numpy()
    data = dataset(sd, photos)
    batch = data.batch(data.sets[0], [(number, False)])
    assert relative_error(batch.conditioning.context, expected) < 1e-3
    dropped = data.batch(data.sets[0], [(number, False)], [True])
    empty = data.batch(data.sets[0], [(3, False)])
    assert dropped.captions == ("",)
    assert mx.array_equal(dropped.conditioning.context, empty.conditioning.context)


def test_values_that_are_not_finite_are_refused(sd, photos, monkeypatch, tmp_path):
    monkeypatch.setattr(sd, "_autoencode", lambda half, pixels: (mx.full((1, 8, 8, 4), mx.inf),) * 2)
    with pytest.raises(FloatingPointError, match="not finite"):
        prepared(dataset(sd, photos), tmp_path)


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    import diffusers

    make(tmp_path / "model", "sd1", diffusers.DDIMScheduler(**SCALED, clip_sample=False))
    return tmp_path / "model"


def test_losses_are_the_same_with_and_without_a_cache(folder, photos, tmp_path):
    losses = []
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        sd = StableDiffusion(folder)
        data = dataset(sd, photos, flip=True, batch_size=2, caption_dropout=0.3, rank=2)
        trainer = LoRATrainer(sd, data, data.settings)
        progress = prepared(data, cache)
        assert progress == [(n + 1, 12) for n in range(12)]
        assert not {"autoencoder", "text_encoder"} & vars(sd).keys()
        trainer = LoRATrainer(sd, data, data.settings)
        batches = [data.batches(number)[0] for number in range(4)]
        losses.append([trainer.loss(batch, list(range(len(batch.captions)))).item() for batch in batches])
        assert not {"autoencoder", "text_encoder"} & vars(sd).keys()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[1] == losses[2]
    assert len(set(losses[0])) == 4


@pytest.mark.parametrize("has_folder", [False, True])
def test_processes_encode_shares_and_exchange_them(folder, photos, tmp_path, monkeypatch, has_folder):
    """Each with a thread here, as all_sum waits for the others."""
    whole = dataset(StableDiffusion(folder), photos)
    work, results, sent, barrier = prepared(whole), [None] * 2, [None] * 2, Barrier(2, timeout=60)

    def encoded(data: Dataset) -> list[np.ndarray]:
        batches = [data.batch(data.sets[0], [(number, False)]) for number in range(4)]
        return [np.array(array) for b in batches for array in (b.mean, b.deviation, b.conditioning.context)]

    def all_sum(array: mx.array, group: SimpleNamespace) -> mx.array:
        sent[group.rank()] = np.array(array)
        barrier.wait()
        total = mx.array(sent[0] + sent[1])
        barrier.wait()
        return total

    def run(rank: int) -> None:
        sd, group = StableDiffusion(folder), SimpleNamespace(rank=lambda: rank, size=lambda: 2)
        data = dataset(sd, photos)
        done = list(data.prepare(tmp_path / f"{rank}" if has_folder else None, group))
        data.exchange(group)
        monkeypatch.setattr(sd, "_autoencode", None)
        results[rank] = len(done), encoded(data)

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    threads = [Thread(target=run, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done for done, _ in results] == [len(work) // 2] * 2
    for _, arrays in results:
        assert all(np.array_equal(one, two) for one, two in zip(arrays, encoded(whole), strict=True))


@pytest.mark.parametrize("trains_text", [False, True])
def test_low_memory_holds_what_encodes_and_what_is_trained(folder, photos, caplog, trains_text):
    sd = StableDiffusion(folder, low_memory=True)
    data = dataset(sd, photos, rank=2, text_encoder_rank=2 * trains_text)
    trainer, held, trained = LoRATrainer(sd, data, data.settings), [], {"unet", *["text_encoder"] * trains_text}
    modules = {name: getattr(sd, name) for name in trained}
    for _ in data.prepare():
        held.append(sd.sources.keys() & vars(sd).keys())
    captions = 0 if trains_text else len(CAPTIONS)
    assert held == [trained | {"text_encoder"}] * captions + [trained | {"autoencoder"}] * (len(held) - captions)
    assert sd.sources.keys() & vars(sd).keys() == trained
    next(trainer)
    assert all(getattr(sd, name) is module for name, module in modules.items())
    assert not caplog.records  # neither of networks that stay nor of long captions, of which is said before


def cached(sd: StableDiffusion, photos: list[Picture], cache: Path) -> int:
    """Prepare a run, and return how many files it adds to the cache."""
    before = set(cache.glob("*"))
    prepared(dataset(sd, photos), cache)
    assert not [file for file in cache.iterdir() if file.suffix != ".safetensors"]
    return len(set(cache.glob("*")) - before)


def add_lora(sd: StableDiffusion, path: Path) -> object:
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    factors = {f"{layer}.lora_{role}.weight": mx.array(normal(*s)) for role, s in (("A", (4, 32)), ("B", (32, 4)))}
    mx.save_safetensors(str(path / "lora.safetensors"), factors)
    return sd.load_lora(path / "lora.safetensors")


def add_word(sd: StableDiffusion, path: Path, value: float = 1.0) -> None:
    mx.save_safetensors(str(path / "cat.safetensors"), {"emb_params": mx.full((2, 32), value)})
    sd.load_embedding(path / "cat.safetensors", "cat")


def test_what_encodes_decides_what_is_found_in_the_cache(folder, photos, tmp_path):
    cache = tmp_path / "cache"
    assert cached(StableDiffusion(folder), photos, cache) == 8
    assert cached(StableDiffusion(folder), photos, cache) == 0
    assert cached(StableDiffusion(folder, low_memory=True), photos, cache) == 0
    sd = StableDiffusion(folder)
    sd.autoencoder.encoder.conv_in.bias += 0.1
    assert cached(sd, photos, cache) == 4
    sd = StableDiffusion(folder)
    handle = add_lora(sd, tmp_path)
    assert cached(sd, photos, cache) == 4
    handle.scale = 0.5
    assert cached(sd, photos, cache) == 4
    handle.detach()
    assert cached(sd, photos, cache) == 0
    add_word(sd, tmp_path)
    assert cached(sd, photos, cache) == 4
    sd = StableDiffusion(folder)
    add_word(sd, tmp_path, 2.0)
    assert cached(sd, photos, cache) == 4
    assert cached(StableDiffusion(folder, text_bits=8), photos, cache) == 4


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: bytes(len(data))])
def test_a_damaged_file_of_the_cache_is_said_and_made_anew(sd, photos, tmp_path, caplog, damage):
    prepared(dataset(sd, photos), tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in list(files)[2:4]:
        path.write_bytes(damage(files[path]))
    prepared(dataset(sd, photos), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    said = [line for line in lines if line.endswith("computing it again")]
    assert len(said) == 2 and all(path.name in " ".join(said) for path in list(files)[2:4])


def test_a_disk_without_room_is_said_before_anything_is_encoded(sd, photos, tmp_path, monkeypatch):
    no_room = lambda path: SimpleNamespace(free=100)  # noqa: E731
    prepared(dataset(sd, photos), tmp_path / "full")
    monkeypatch.setattr("stable_diffusion.files.whole.shutil.disk_usage", no_room)
    prepared(dataset(sd, photos), tmp_path / "full")  # which needs none
    monkeypatch.setattr(sd, "_autoencode", None)
    monkeypatch.setattr(sd, "encode_prompt", lambda *args: None)
    with pytest.raises(OSError, match=r"cache needs 0.00 GB, the disk has 0.00 GB left: free disk space"):
        prepared(dataset(sd, photos), tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be created .*choose another folder"):
        prepared(dataset(sd, photos), tmp_path / "file")


def test_two_runs_share_a_cache(sd, photos, tmp_path, monkeypatch):
    """Also where one is written to while the other writes the same file."""
    write, runs = module.write_safetensors, []

    def written(path, *args):
        if len(runs) < 2:
            runs.append(path)
            prepared(dataset(sd, photos), tmp_path)
        write(path, *args)

    monkeypatch.setattr(module, "write_safetensors", written)
    prepared(dataset(sd, photos), tmp_path)
    assert len(runs) == 2 and len(list(tmp_path.iterdir())) == 8
    monkeypatch.setattr(module, "write_safetensors", None)
    prepared(dataset(sd, photos), tmp_path)

"""Paths that begin with ``~``: every reader and writer of the package knows them, also where no shell expands them."""

from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image

from command_line import names
from stable_diffusion.app.convert import convert
from stable_diffusion.app.inspect import inspect
from stable_diffusion.app.metadata import read_record
from stable_diffusion.app.preview import PreviewSettings, PreviewWriter
from stable_diffusion.app.request import Request
from stable_diffusion.app.results import Outputs
from stable_diffusion.app.wildcards import read_wildcards
from stable_diffusion.images.files import check_output, open_image, save
from stable_diffusion.lora.files import locate
from stable_diffusion.lora.folders import find_in
from stable_diffusion.lora.save import write_lora
from stable_diffusion.text.tokenizer import Tokenizer
from stable_diffusion.weights.catalog import ALIASES
from stable_diffusion.weights.embeddings import read_embedding
from stable_diffusion.weights.files import open_checkpoint, open_part

PICTURE = Image.new("RGB", (8, 8))
ONE = {"i": 1, "seed": 1}  # the fields of an image
READERS = {
    "image": lambda home: open_image(f"{home}/a.png"),
    "record": lambda home: read_record(f"{home}/a.png"),
    "model": lambda home: open_checkpoint(f"{home}/model"),
    "tokenizer": lambda home: Tokenizer.from_folder(f"{home}/model/tokenizer"),
    "vae": lambda home: open_part(f"{home}/model", "vae"),
    "inspect": lambda home: inspect(f"{home}/model"),
    "LoRA": lambda home: locate(f"{home}/word.safetensors"),
    "LoRA by its name": lambda home: find_in(home, "word"),
    "embedding": lambda home: read_embedding(f"{home}/word.safetensors"),
    "wildcards": lambda home: read_wildcards(f"{home}/words")("colour"),
}
WRITERS = {
    "saved": lambda home: save(PICTURE, f"{home}/saved.png"),
    "checked": lambda home: check_output(f"{home}/new.png").write_bytes(b""),
    "a run": lambda home: Outputs(f"{home}/a.png", [{}]).write(PICTURE, {}),
    "a folder of a run": lambda home: Outputs(f"{home}/pictures/", [ONE]).write(PICTURE, ONE),
    "previews": lambda home: PreviewWriter(PreviewSettings(preview=f"{home}/previews")),
    "LoRA": lambda home: write_lora(f"{home}/new.safetensors", {}, None),
    "conversion": lambda home: convert(Request(model="tiny"), f"{home}/converted"),
}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(PICTURE, tmp_path / "a.png", {"parameters": "a cat\nSteps: 3, Sampler: Euler, CFG scale: 4, Seed: 1"})
    (tmp_path / "model").symlink_to(ALIASES["tiny"].folder)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "colour.txt").write_text("red")
    mx.save_safetensors(str(tmp_path / "word.safetensors"), {"word": mx.zeros((2, 768))})
    return tmp_path


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_reading(home, read):
    """It is found there, and nobody's home is one line."""
    read("~")
    with pytest.raises((ValueError, OSError), match=r"^[^\n]*~nobody at all[^\n]*$"):
        read("~nobody at all")


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_writing(home, write, tmp_path, monkeypatch):
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    before = len(names(home))
    write("~")
    assert len(names(home)) == before + 1 and not names(tmp_path / "current")

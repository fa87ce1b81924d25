"""LoRAs are found in folders by their names: which files count, sub-folders, several of one name, and no others."""

import json
import struct
import time
import unicodedata

import pytest

from stable_diffusion.lora.files import read_lora
from stable_diffusion.lora.folders import find_in


def header(**metadata: str) -> bytes:
    text = json.dumps({"__metadata__": metadata}).encode()
    return struct.pack("<Q", len(text)) + text


FILES = [
    "loras/style.safetensors",
    *(f"loras/style.{suffix}" for suffix in ("png", "preview.png", "civitai.info", "json", "txt", "safetensors.part")),
    "loras/._style.safetensors",
    "loras/.trash/hidden.safetensors",
    "loras/half.safetensors.crdownload",
    "loras/style.v1.5.safetensors",
    "loras/two words (v2).safetensors",
    "loras/people/bob.safetensors",
    "loras/people/bob.pt",
    "loras/people/old/ann.ckpt",
    "loras/a/eve.safetensors",
    "loras/b/eve.safetensors",
    "loras/b/style.safetensors",
    "loras/Ink.safetensors",
    f"loras/{unicodedata.normalize('NFD', 'Café')}.safetensors",
    "loras/saved/pytorch_lora_weights.safetensors",
    "more/ann.safetensors",
    "more/only.safetensors",
    "outside/secret.safetensors",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(header())
    (tmp_path / "loras" / "renamed.safetensors").write_bytes(header(ss_network_dim="4", ss_output_name="a b"))
    (tmp_path / "loras" / "linked").symlink_to(tmp_path / "outside" / "folder")
    (tmp_path / "outside" / "folder").mkdir()
    (tmp_path / "outside" / "folder" / "far.safetensors").write_bytes(header())
    (tmp_path / "outside" / "folder" / "back").symlink_to(tmp_path / "loras")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("style", "loras/style.safetensors"),  # the one at the top, and not its preview
        ("style.safetensors", "loras/style.safetensors"),
        ("b/style", "loras/b/style.safetensors"),
        ("style.v1.5", "loras/style.v1.5.safetensors"),
        ("two words (v2)", "loras/two words (v2).safetensors"),
        ("bob", "loras/people/bob.safetensors"),  # the safest of those that differ in the suffix
        ("bob.pt", "loras/people/bob.pt"),
        ("people/bob", "loras/people/bob.safetensors"),
        ("people\\bob", "loras/people/bob.safetensors"),
        ("old/ann", "loras/people/old/ann.ckpt"),
        ("b/eve", "loras/b/eve.safetensors"),
        ("ink", "loras/Ink.safetensors"),
        ("PEOPLE/Bob", "loras/people/bob.safetensors"),
        ("Café", f"loras/{unicodedata.normalize('NFD', 'Café')}.safetensors"),
        ("saved", "loras/saved/pytorch_lora_weights.safetensors"),
        ("far", "loras/linked/far.safetensors"),
        ("a b", "loras/renamed.safetensors"),  # as the web UI writes it, after the name in the file
    ],
)
def test_names_and_paths(here, name, wanted):
    assert find_in("loras", name) == here / wanted


@pytest.mark.parametrize(
    "name",
    [
        "hidden",
        "half",
        ".trash/hidden",
        "style.png",
        "../outside/secret",
        "outside/secret",
        "/etc/passwd",
        "*",
        "",
        "bo",
    ],
)
def test_what_is_no_lora_there(here, name):
    with pytest.raises(ValueError, match=r"^there is no LoRA .* in loras: .*write the name of a file there"):
        find_in("loras", name)


def test_a_likely_name_is_proposed(here):
    with pytest.raises(ValueError, match=r"did you mean style\?"):
        find_in("loras", "stile")
    with pytest.raises(ValueError, match="the LoRA folder nowhere does not exist"):
        find_in(["loras", "nowhere"], "style")


def test_several_folders_and_names_that_are_not_clear(here):
    assert find_in(["loras", "more"], "only") == here / "more" / "only.safetensors"
    assert find_in(("loras", "more"), "ann") == here / "more" / "ann.safetensors", "at the top of a folder"
    assert find_in(["loras", "loras/people"], "old/ann") == here / "loras" / "people" / "old" / "ann.ckpt"
    with pytest.raises(ValueError, match=r"^2 LoRAs are called eve: .*a/eve.*b/eve.*; write more of the path"):
        find_in("loras", "eve")
    (here / "more" / "style.safetensors").write_bytes(header())
    with pytest.raises(ValueError, match="2 LoRAs are called style"):
        find_in(["loras", "more"], "style")
    assert find_in(["loras", "more"], "more/style") == here / "more" / "style.safetensors"
    (here / "loras" / "a" / "eve.safetensors").unlink()
    (here / "loras" / "a" / "eve.safetensors").symlink_to(here / "loras" / "b" / "eve.safetensors")
    assert find_in("loras", "eve").resolve() == here / "loras" / "b" / "eve.safetensors", "one file under two names"


def test_five_thousand_files_are_looked_through_at_once(tmp_path):
    for i in range(5000):
        folder = tmp_path / f"{i % 100}"
        folder.mkdir(exist_ok=True)
        (folder / f"lora{i}.safetensors").touch()
    start = time.perf_counter()
    assert find_in(tmp_path, "lora4321") == tmp_path / "21" / "lora4321.safetensors"
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name", ["notes.txt", "style.png", "/etc/passwd", "lora"])
def test_a_file_of_another_kind_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if not name.startswith("/"):
        (tmp_path / name).write_text("hello")
    with pytest.raises(ValueError, match=rf"^{name} is not a weights file: these end in \.safetensors, ") as error:
        read_lora(name)
    assert "delete" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello there", b"version https://git-lfs.github.com/spec/v1\n", bytes(99)])
def test_what_only_has_the_suffix_is_not_to_be_deleted(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors is ") as error:
        read_lora(tmp_path / "a.safetensors")
    assert "delete" not in str(error.value)

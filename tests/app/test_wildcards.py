"""Folders of wildcards: how their files are read, and what is wrong with them."""

import re

import pytest

from stable_diffusion.app.wildcards import read_wildcards
from stable_diffusion.text.alternatives import expand


def write(folder, **files: bytes) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('_in_', '/')}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text)


def test_a_folder_of_wildcards(tmp_path):
    hair = "\ufeff# of people\nblond\r\n\n  braun, größer \n#red\n"
    write(tmp_path, hair=hair.encode(), clothes_in_hat=b"(fez:1.2)\n")
    lines = read_wildcards(tmp_path)
    assert lines("hair") == ("blond", "braun, größer") and lines("clothes/hat") == ("(fez:1.2)",)
    assert expand("__hair__, __clothes/hat__", wildcards=lines) == ["blond, (fez:1.2)", "braun, größer, (fez:1.2)"]
    assert expand("a cat", wildcards=read_wildcards(str(tmp_path))) == ["a cat"]


def test_a_folder_of_wildcards_says_what_is_wrong(tmp_path):
    write(tmp_path.parent, outside=b"x")
    write(tmp_path, hair=b"a", hairs_in_hat=b"b", coat=b"c", empty=b"# only this\n", latin="größer".encode("latin-1"))
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "bare").mkdir()
    here, unreadable = (
        read_wildcards(tmp_path),
        r"{}.txt (cannot be read \(Is a directory\)|is not readable as UTF-8 text \(.*\))",
    )
    there = re.escape(str(tmp_path))
    for lines, name, message in (
        (here, "hain", rf"unknown wildcard __hain__ in {there}; similar names: .*__hair__"),
        (here, "xyz", rf"unknown wildcard __xyz__ in {there}; some names: __coat__, __empty__, __folder__, __hair__"),
        (here, "hair/x", "unknown wildcard __hair/x__"),
        *((here, name, f"__{name}__ is outside .* {there}") for name in ("../outside", "/etc/hosts", ".", "a//b")),
        *((here, name, unreadable.format(name)) for name in ("latin", "folder")),
        (read_wildcards(tmp_path / "bare"), "a", r"bare; the folder has no .txt files"),
        (here, "empty", "__empty__ has no lines"),
    ):
        with pytest.raises(ValueError, match=message):
            expand(f"__{name}__", wildcards=lines)
    with pytest.raises(ValueError, match=r"the folder of wildcards .*absent does not exist; check the path"):
        read_wildcards(tmp_path / "absent")


def test_patterns_and_names_in_folders_below(tmp_path):
    write(tmp_path, colour=b"red\nblue\nred", colours=b"blue\npink", artists_in_old=b"Monet\n", artists_in_new=b"Koons")
    write(tmp_path, hair_of_cats=b"grey")
    lines = read_wildcards(tmp_path)
    for name, wanted in {
        "colour": ("red", "blue"),
        "colour*": ("red", "blue", "pink"),
        "artists/*": ("Koons", "Monet"),
        "old": ("Monet",),
        "*/n?w": ("Koons",),
        "artists\\old": ("Monet",),
        "[a-b]*": ("Koons", "Monet"),
        "hair_of*": ("grey",),
    }.items():
        assert lines(name) == wanted
    for name in ("old/new", "colourless*", "colou"):
        with pytest.raises(ValueError, match=r"unknown wildcard __.*__ in .*; (some|similar) names: "):
            lines(name)


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_lists_of_another_kind_are_named(tmp_path, suffix):
    (tmp_path / f"animals.{suffix}").write_text('{"cat": ["wild cat"]}')
    write(tmp_path, colour=b"red")
    assert read_wildcards(tmp_path)("*") == ("red",)
    with pytest.raises(ValueError, match=rf"__animals/cat__ .*; animals.{suffix} is not read: write each"):
        read_wildcards(tmp_path)("animals/cat")

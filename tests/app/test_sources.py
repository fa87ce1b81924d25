"""Files and networks that pictures name: without their folders, found again by their hashes, and trusted or not."""

import json
import os
import shutil
from pathlib import Path

import pytest

from cli.test_images import noise, write_lora
from command_line import pixels
from stable_diffusion.app.fingerprints import fingerprint
from stable_diffusion.app.metadata import read_record
from stable_diffusion.app.request import Request
from stable_diffusion.app.sources import short_names
from stable_diffusion.cli import arguments as cli_arguments
from stable_diffusion.images.files import read_text, save
from stable_diffusion.weights import hub

QUICK = ["--width", 64, "--height", 64, "--steps", 1, "--n_images", 1, "--seed", 1]
TAGGED = "red <lora:paint:0.5>"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path) -> Path:
    """Keep the Hub's cache in a folder, and fail where the Hub is asked. Returns the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "fetch", lambda *given: pytest.fail("the Hub is asked"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def made(sd1_folder, tmp_path_factory) -> Path:
    """A folder with a picture, what it was made from in ``private``, and the picture in other formats."""
    from stable_diffusion.cli import main as cli

    folder = tmp_path_factory.mktemp("made")
    private = folder / "private"
    shutil.copytree(sd1_folder, private / "dreams")
    noise().save(private / "in.png")
    write_lora(private / "more.safetensors")
    (private / "loras").mkdir()
    write_lora(private / "loras" / "paint.safetensors", seed=1)
    options = ["--model", private / "dreams", "--lora", f"{private}/more.safetensors:0.5", "--vae", private / "dreams"]
    options += ["--lora_dir", private / "loras", *QUICK, "--steps", 2, "--output", folder / "a.png"]
    assert cli.image2image([str(word) for word in (private / "in.png", TAGGED, *options)]) == 0
    for name in ("a.jpg", "a.webp"):
        save(noise(), folder / name, read_text(folder / "a.png"))
    return folder


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_pictures_name_no_folders(made, name):
    data = (made / name).read_bytes()
    for word in ("private", str(made)):
        assert not [encoding for encoding in ("utf-8", "utf-16-be") if word.encode(encoding) in data]
    record = read_record(made / name)
    said = {
        "model": "dreams",
        "vae": "dreams",
        "lora": [["more.safetensors", 0.5]],
        "lora_dir": ["loras"],
        "image": "in.png",
    }
    assert said.items() <= record.arguments.items()
    files = ["in.png", "more.safetensors", "loras paint.safetensors", "dreams vae/diffusion_pytorch_model.safetensors"]
    assert record.details["files"].keys() >= {*files}


def test_names_are_told_apart():
    paths = ["/a/x.safetensors", "/b/x.safetensors", "../y.pt", "z.pt", "models/z.pt", "owner/name", "~/sdxl"]
    names = short_names(Request(lora=tuple((path, 1.0) for path in paths), embedding=("/e/w=x.pt=word",)))
    found = ["x.safetensors", "b/x.safetensors", "y.pt", "z.pt", "models/z.pt", "owner/name", "./sdxl"]
    assert [names.get(path, path) for path in paths] == found and names["/e/w=x.pt"] == "w=x.pt"


@pytest.mark.parametrize("place", ["here", "beside", "named"])
def test_files_are_found_by_name_and_hash(made, run, tmp_path, place):
    picture, words = shutil.copy(made / "a.png", tmp_path / "a.png"), []
    if place == "named":
        run("image2image", "--from_image", picture, "--output", "b.png").refused(
            "a.png names --", "dreams (not here)", "and 2 more; give these flags yourself, or use --without or --trust"
        )
        words = [made / "private" / "in.png", "--lora", f"{made}/private/more.safetensors:0.5", "--lora_dir"]
        words += [made / "private" / "loras", "--model", made / "private" / "dreams"]
        words += ["--vae", made / "private" / "dreams"]
    else:
        for path in (made / "private").iterdir():
            os.symlink(path, tmp_path / path.name)
    if place == "beside":
        (tmp_path / "elsewhere").mkdir()
        os.chdir(tmp_path / "elsewhere")
    run("image2image", *words, "--from_image", picture, "--output", tmp_path / "b.png").succeeded()
    assert (pixels(tmp_path / "b.png") == pixels(made / "a.png")).all()


def test_a_lora_in_a_sub_folder_is_found_again(run, tmp_path, sd1_folder):
    (tmp_path / "loras" / "people").mkdir(parents=True)
    write_lora(tmp_path / "loras" / "people" / "bob.safetensors", seed=1)
    options = ["--model", sd1_folder, *QUICK]
    run("txt2image", "a star <lora:bob:0.5>", "--lora_dir", "loras", *options, "--output", "a.png").succeeded()
    assert "loras people/bob.safetensors" in read_record("a.png").details["files"]
    run("txt2image", "--from_image", "a.png", *options, "--output", "b.png").succeeded()
    assert (pixels("b.png") == pixels("a.png")).all()


def command(picture: Path, *words: object, script: str = "txt2image") -> cli_arguments.Command:
    return cli_arguments.read(script, ["--from_image", str(picture), *map(str, words)])


def with_record(path: Path, arguments: dict, **more: object) -> Path:
    record = {"script": "txt2image", "arguments": {"prompt": TAGGED, "seed": 1} | arguments}
    save(noise(), path, {"stable_diffusion": json.dumps(record | more)})
    return path


HOSTILE = [
    ({"model": "evil/repo"}, "--model evil/repo (a download)"),
    ({"model": "sd15"}, "--model sd15 (a download)"),
    ({"refiner": "sdxl-refiner"}, "--refiner sdxl-refiner (a download)"),
    ({"model": "tiny", "vae": "evil/vae"}, "--vae evil/vae (a download)"),
    ({"model": "evil/repo/x.safetensors"}, "--model evil/repo/x.safetensors (a download)"),
    ({"lora": [["evil/repo:a.safetensors", 1.0]]}, "--lora evil/repo:a.safetensors (a download)"),
    ({"controlnet": [["evil/net", 1.0]], "control_image": ["/etc/passwd"]}, "--controlnet evil/net (a download), -"),
    ({"lora": [["/proc/self/pagemap", 1.0]]}, "--lora /proc/self/pagemap (another hash)"),
    ({"lora": [["pipe", 1.0]]}, "--lora pipe (another hash)"),
    ({"lora_dir": "private.txt"}, "--lora_dir private.txt (another hash)"),
    ({"lora_dir": "."}, "--lora_dir . (another hash)"),
    ({"tokenizer": "/etc"}, "--tokenizer /etc (another hash)"),
    ({"embedding": ["/etc/passwd=word"]}, "--embedding /etc/passwd (another hash)"),
    ({"embedding": ["a" * 4000]}, "aaa (not here); give"),
    ({"image": "private.txt"}, "--image private.txt (another hash)"),
    ({"image": "a.png", "mask": "\0", "depth": "x.png"}, "--mask \\u0000 (not here), --depth x.png (not here)"),
    ({"lora": [[f"/x/{i}.safetensors", 1.0] for i in range(9)]}, "2.safetensors (not here) and 6 more;"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, words", HOSTILE)
def test_a_stranger_decides_nothing_about_files_and_downloads(arguments, words, tmp_path, capsys, monkeypatch):
    """Nothing is hashed that does not end; what is named by hand or trusted is used."""
    (tmp_path / "private.txt").write_text("secret")
    (tmp_path / "paint.safetensors").write_text("secret")
    os.mkfifo(tmp_path / "pipe")
    script = "image2image" if "image" in arguments else "txt2image"
    files = {"pipe": {"sha256": "0" * 64}, "private.txt": 3, "etc": {"sha256": ["x"], "sampled": None}}
    picture = with_record(tmp_path / "p.png", arguments, files=files)
    with pytest.raises(SystemExit) as leaving:
        command(picture, script=script)
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and words in said and said.count("\n") == 1 and len(said) < 300 + len(str(picture))
    trusted = command(picture, "--trust", script=script).lines[0][0]
    assert {name: trusted.value(name) for name in arguments} == {
        name: tuple(map(tuple, value))
        if isinstance(value[0], list)
        else tuple(value)
        if isinstance(value, list)
        else value
        for name, value in arguments.items()
    }
    left_out = [word for name in arguments if name != "image" for word in ("--without", name)]
    if "image" not in arguments:
        assert command(picture, *left_out, script=script).lines[0][0].model == "sdxl"


def test_what_is_known_needs_no_trust(tmp_path, no_network):
    """The bundled model, what is in the cache, files with a hash of the record, and what is named by hand."""
    write_lora(tmp_path / "paint.safetensors")
    (no_network / "models--me--net" / "snapshots").mkdir(parents=True)
    files = {"x": fingerprint(tmp_path / "paint.safetensors")}
    known = {
        "model": "tiny",
        "lora": [["paint.safetensors", 0.5]],
        "lora_dir": ".",
        "vae": "me/net",
        "revision": "main",
    }
    known |= {"controlnet": [["me/net", 1.0]], "control_image": ["paint.safetensors"], "wildcards": "/etc"}
    picture = with_record(tmp_path / "p.png", known, files=files)
    (request, _), *_ = command(picture).lines
    assert (request.model, request.lora, request.revision) == ("tiny", (("paint.safetensors", 0.5),), "main")
    assert request.wildcards is None
    (request, _), *_ = command(picture, "--model", "me/other", "--lora", "new.pt").lines  # with no revision
    assert (request.model, request.lora, request.revision) == ("me/other", (("new.pt", 1.0),), None)
    (request, _), *_ = command(picture, "red <lora:private:1>").lines  # another prompt
    assert request.lora_dir is None


def test_a_folder_is_not_known_by_files_outside_it(tmp_path, capsys):
    write_lora(tmp_path / "more.safetensors")
    (tmp_path / "dreams").mkdir()
    files = {"dreams ../more.safetensors": fingerprint(tmp_path / "more.safetensors")}
    picture = with_record(tmp_path / "p.png", {"model": "dreams"}, files=files)
    with pytest.raises(SystemExit):
        command(picture)
    assert "--model dreams (another hash)" in capsys.readouterr().err


@pytest.mark.parametrize("revision, is_known", [("main", True), ("abc", True), ("new", False), ("../../x", False)])
def test_a_revision_is_one_in_the_cache(tmp_path, no_network, revision, is_known, capsys):
    folder = no_network / "models--me--net"
    for place in (folder / "refs" / "main", folder / "snapshots" / "abc", tmp_path / "cache" / "x"):
        place.mkdir(parents=True)
    picture = with_record(tmp_path / "p.png", {"model": "me/net", "revision": revision})
    if is_known:
        assert command(picture).lines[0][0].revision == revision
    else:
        with pytest.raises(SystemExit):
            command(picture)
        assert "--model me/net (a download)" in capsys.readouterr().err


def test_loras_of_another_program(tmp_path):
    """They are named, and used where there is a folder of LoRAs."""
    save(noise(), tmp_path / "p.png", {"parameters": f"{TAGGED}\nSteps: 2, Seed: 1, CFG scale: 3"})
    found = command(tmp_path / "p.png")
    assert found.lines[0][0].prompt == "red"
    remark = f"{tmp_path}/p.png: its LoRAs are not used (paint); give their folder with --lora_dir DIR"
    assert found.remarks[-1] == remark
    (request, _), *_ = command(tmp_path / "p.png", "--lora_dir", tmp_path).lines
    assert request.prompt_loras == (("paint", 0.5),)

"""What the command line says of files: lines, JSON and errors."""

import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from PIL import Image

from app.test_inspect import RECORD, SAID, lora, save
from command_line import ROOT
from stable_diffusion.app.convert import convert
from stable_diffusion.app.inspect import inspect
from stable_diffusion.app.request import Request
from stable_diffusion.cli.inspect import main
from stable_diffusion.images.files import save as save_image
from stable_diffusion.weights.files import open_checkpoint


@pytest.fixture
def offline(monkeypatch):
    """The variable that the command line sets is put back."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_picture(tmp_path, capsys, offline, monkeypatch):
    """A terminal is not told what to do; what is 0 or off is said."""
    monkeypatch.chdir(tmp_path)
    path, record = "a.png", RECORD | {"arguments": RECORD["arguments"] | {"seed": 0}}
    texts = {"parameters": SAID, "stable_diffusion": json.dumps(record), "c\x1bc": "d"}
    save_image(Image.new("RGB", (8, 8)), path, texts)
    assert main([path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": path} | inspect(path)
    assert main([path]) == 0
    assert " ".join(capsys.readouterr().out.split()) == (
        "path a.png kind image parameters a cat\\u001b[2J Steps: 1 script txt2image prompt a cat \\udcff seed 0 cfg "
        "2.5 lora x:0.5 float16 False tiny unet/a.safetensors sha256 abc, hub some/one@123 software mlx 0.1 c\\u001bc d"
    )


def test_a_terminal_of_80_columns(tmp_path, capsys, offline):
    """Lines of a text stay lines, long ones are split between words, and only what is longer than a line within one."""
    prompt, name = "a red circle " * 30 + "x" * 200, f"{'long ' * 30}unet/a.safetensors"
    record = {"arguments": {"prompt": f"{prompt}\n\nsecond"}, "files": {name: {"sha256": "0" * 64, "hub": "a/b@c"}}}
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"stable_diffusion": json.dumps(record)})
    assert main([str(tmp_path / "a.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and f"    sha256 {'0' * 64}, hub" in lines
    assert (
        lines[lines.index(" " * 16 + "second") - 1] == ""
        and len({line[:16] for line in lines if "circle" in line}) == 2
    )


def test_lines_are_aligned(capsys, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(Request(model="tiny", unet_bits=8), tmp_path / "new")
    assert main(["new"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = {line.split()[0]: line for line in lines}
    assert head["family"].split(maxsplit=1)[1] == "Stable Diffusion 1" and "epsilon" in head["prediction"]
    table = [line for line in lines if " MB  " in line]
    assert [line.split()[0] for line in table] == ["unet", "vae", "text_encoder"]
    assert len({line.index(" MB") for line in table}) == 1
    assert len({line.index(line.split(maxsplit=1)[1]) for line in lines[: lines.index(table[0])]}) == 1
    assert " ".join(" ".join(lines).split()).count("float16 UNet2DConditionModel 8 bits in groups of 32") == 1


def test_a_lora_in_words(capsys, offline, tmp_path):
    assert main([str(save(tmp_path / "a.safetensors", **lora()))]) == 0
    out = capsys.readouterr().out
    assert "attn2 1, ff 1" in out and "ranks" in out and "LoRA" in out


def test_a_repository_in_the_cache_and_one_that_is_not(tmp_path):
    snapshot = tmp_path / "models--some--one" / "snapshots" / ("0" * 40)
    shutil.copytree(open_checkpoint("tiny").tokenizers["tokenizer"].parent, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}

    def run(name: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "stable_diffusion", "inspect", name]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    found, missing = run("some/one"), run("some/other")
    assert found.returncode == 0 and "StableDiffusionPipeline" in found.stdout
    assert missing.returncode == 2 and missing.stdout == ""
    reason = "some/other is not on this disk and not in the Hub cache; generate with it once, or give a path"
    assert missing.stderr == f"python -m stable_diffusion inspect: error: {reason}\n"


def test_what_it_is_not_is_one_line(tmp_path, capsys, offline):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "evil.ckpt").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    save(tmp_path / "flux.safetensors", **{f"double_blocks.{i}.img_attn.qkv.weight": mx.zeros(3) for i in range(3)})
    for name, said in (
        ("notes.txt", "is not a weights file"),
        ("evil.ckpt", "evil.ckpt"),
        ("flux.safetensors", "is Flux, which is not supported"),
        (".", "has no model_index.json"),
        ("none", "no such folder"),
        ("none.png", "there is no image at"),
    ):
        with pytest.raises(SystemExit) as error:
            main([str(tmp_path / name)])
        out, err = capsys.readouterr()
        assert error.value.code == 2 and out == "" and err.count("\n") == 1
        assert err.startswith("python -m stable_diffusion inspect: error: ") and said in err

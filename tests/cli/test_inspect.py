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


def test_a_picture(tmp_path, capsys, offline):
    """A terminal is not told what to do; what is 0 or off is said."""
    path, record = tmp_path / "a.png", RECORD | {"arguments": RECORD["arguments"] | {"seed": 0}}
    texts = {"parameters": SAID, "stable_diffusion": json.dumps(record), "c\x1bc": "d"}
    save_image(Image.new("RGB", (8, 8)), path, texts)
    assert main([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(path)} | inspect(path)
    assert main([str(path)]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    at = max(len(name) for name in RECORD["files"]) + 2
    names, values = (" ".join(" ".join(line[part] for line in lines).split()) for part in (slice(at), slice(at, None)))
    assert (
        names == "path kind parameters script prompt seed cfg lora float16 tiny unet/a.safetensors software c\\u001bc"
    )
    said = (
        "image a cat\\u001b[2J Steps: 1 txt2image a cat \\udcff 0 2.5 x:0.5 False sha256 abc, hub some/one@123 mlx 0.1"
    )
    assert values == f"{path} {said} d"


def test_lines_are_aligned(capsys, offline, tmp_path):
    folder = convert(Request(model="tiny", unet_bits=8), tmp_path / "new")
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = {line.split()[0]: line for line in lines}
    assert head["family"].split(maxsplit=1)[1] == "Stable Diffusion 1" and "epsilon" in head["prediction"]
    assert len({line.index(line.split(maxsplit=1)[1]) for line in lines[:-3]}) == 1
    table = lines[-3:]
    assert [line.split()[0] for line in table] == ["unet", "vae", "text_encoder"]
    assert len({line.index(" MB") for line in table}) == 1
    assert table[0].endswith("float16  UNet2DConditionModel  8 bits in groups of 32")


def test_a_lora_in_words(capsys, offline, tmp_path):
    assert main([str(save(tmp_path / "a.safetensors", **lora()))]) == 0
    out = capsys.readouterr().out
    assert "attn2 1, ff 1" in out and "ranks" in out and "LoRA" in out


def test_a_repository_in_the_cache_and_one_that_is_not(tmp_path):
    snapshot = tmp_path / "models--some--one" / "snapshots" / ("0" * 40)
    shutil.copytree(open_checkpoint("tiny").folder, snapshot)
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
    reason = "some/other is neither here nor in the Hub's cache: load it once, or give a path"
    assert missing.stderr == f"python -m stable_diffusion inspect: error: {reason}\n"


def test_what_it_is_not_is_one_line(tmp_path, capsys, offline):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "evil.ckpt").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    save(tmp_path / "flux.safetensors", **{f"double_blocks.{i}.img_attn.qkv.weight": mx.zeros(3) for i in range(3)})
    for name, said in (
        ("notes.txt", "is no file of weights"),
        ("evil.ckpt", "evil.ckpt"),
        ("flux.safetensors", "is Flux, which is not supported"),
        (".", "has no model_index.json"),
        ("none", "no such folder"),
    ):
        with pytest.raises(SystemExit) as error:
            main([str(tmp_path / name)])
        out, err = capsys.readouterr()
        assert error.value.code == 2 and out == "" and err.count("\n") == 1
        assert err.startswith("python -m stable_diffusion inspect: error: ") and said in err

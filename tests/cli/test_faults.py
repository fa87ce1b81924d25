"""What can go wrong from outside, in one table: how the scripts end, what they say, and that finished images stay.

Each row is a process of its own, which meets the fault where the row says. A code below zero is the signal that killed
it. In every case all files under a final name are whole, and but for kills no temporary file is left. An image that
cannot be written where it should is kept elsewhere, and no further batch is begun.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from command_line import PROMPT, ROOT

# What a process does before it runs a script. ``at(owner, name, n, action)`` acts as it is called the n-th time.
PREPARE = """
import errno, os, resource, shutil, signal, sys
from pathlib import Path
from stable_diffusion.cli import main as cli
import PIL.Image
from stable_diffusion.models.unet import UNet2DConditionModel as UNet
from stable_diffusion.pipeline import StableDiffusion as Model

out = Path(sys.argv.pop(1))

def at(owner, name, n, action):
    original, calls = getattr(owner, name), []
    def watched(*args, **options):
        calls.append(1)
        if len(calls) == n:
            action(*args)
        return original(*args, **options)
    setattr(owner, name, watched)

def send(number):
    return lambda *_: os.kill(os.getpid(), number)

def fail(number):
    def action(*_):
        raise OSError(number, os.strerror(number))
    return action

def half_and(action):
    def save(picture, file, *_, **__):
        file.write(b"half a picture")
        file.flush()
        action()
    return save

INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
step = (UNet, "__call__")
decode = (Model, "decode")
write = (PIL.Image.Image, "save")
"""
RUN = "\nsys.exit(getattr(cli, sys.argv.pop(1))(sys.argv[1:]))\n"


class Case(NamedTuple):
    what: str
    fault: str = ""  # before the script runs, in its process
    options: str = ""  # beside those for two small images in two batches of three steps
    damage: str = ""  # a file of the checkpoint and what becomes of it: "path:cut", ":empty", ":text", ":gone", ":nan"
    code: int = 0
    says: Sequence[str] = ()  # on stderr
    left: Sequence[str] = ()  # in the folder of --output
    tells: int | None = None  # lines on stdout; None: one for each of ``left``
    elsewhere: Sequence[str] = ()  # in the current folder, which is another one


ALL = ("a.png", "a_1.png", "a_2.png")
UNET = "unet/diffusion_pytorch_model.safetensors"
STOPPED = ("interrupted",)
TWICE = "lambda *_: (send(INT)(), send(INT)(), signal.pause())"

CASES = [
    Case("nothing", left=ALL),
    # --- Ctrl-C and SIGTERM
    Case("Ctrl-C as the model is opened", "at(cli, 'open_model', 1, send(INT))", code=130, says=STOPPED),
    Case("Ctrl-C as a prompt is encoded", "at(Model, 'encode_prompt', 1, send(INT))", code=130, says=STOPPED),
    Case("Ctrl-C in a step", "at(*step, 2, send(INT))", code=130, says=STOPPED, left=["a_1_partial.png"]),
    Case("Ctrl-C in a decoding", "at(*decode, 1, send(INT))", code=130, says=STOPPED, left=["a_1.png"]),
    Case("Ctrl-C in the last writing", "at(*write, 2, send(INT))", code=130, says=STOPPED, left=["a_1.png", "a_2.png"]),
    Case("Ctrl-C twice in the second batch", f"at(*step, 5, {TWICE})", code=130, left=["a_1.png"]),
    Case("Ctrl-C twice in a writing", f"PIL.Image.Image.save = half_and({TWICE})", code=130, tells=0),
    Case("SIGTERM as the model is opened", "at(cli, 'open_model', 1, send(TERM))", code=143, says=STOPPED),
    Case("SIGTERM in a step", "at(*step, 2, send(TERM))", code=143, says=STOPPED, left=["a_1_partial.png"]),
    # --- killed
    Case("killed in a step", "at(*step, 5, send(KILL))", code=-9, left=["a_1.png"]),
    Case("killed in the second writing", "at(*write, 2, half_and(send(KILL)))", code=-9, left=["a_1.png"]),
    Case("killed as the grid is written", "at(*write, 3, half_and(send(KILL)))", code=-9, left=["a_1.png", "a_2.png"]),
    Case("killed as a preview is written", "at(*write, 1, half_and(send(KILL)))", "--preview OUT/p.png", code=-9),
    # --- disks and folders
    Case(
        "no space for the second image",
        "at(*write, 2, fail(errno.ENOSPC))",
        code=1,
        says=["a_2.png", "No space left", "kept as"],
        left=["a_1.png"],
        tells=2,
        elsewhere=["a_2.png"],
    ),
    Case(
        "no space for the grid",
        "at(*write, 3, fail(errno.ENOSPC))",
        code=1,
        says=["a.png", "No space left"],
        left=["a_1.png", "a_2.png"],
        elsewhere=["a.png"],
    ),
    Case(
        "files may grow no further",
        "at(*decode, 1, lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
        code=1,
        says=["a_1.png", "it is lost"],
    ),
    Case(
        "the output folder vanishes",
        "at(*decode, 1, lambda *_: shutil.rmtree(out))",
        code=1,
        says=["a_1.png", "kept as"],
        tells=1,
        elsewhere=["a_1.png"],
    ),
    Case("a folder that may not be written to", "os.access = lambda path, mode: False", code=2, says=["not writable"]),
    Case("nobody reads stdout", "os.close(1); os.dup2(os.pipe()[1], 1); os.closerange(3, 64)", left=ALL, tells=0),
    Case("stdout is full", "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", says=["stdout"], left=ALL, tells=0),
    Case("the current folder is gone", "os.rmdir(os.getcwd())", left=ALL),
    # --- files of the model
    Case("weights cut off", damage=f"{UNET}:cut", code=2, says=["diffusion_pytorch_model.safetensors"]),
    Case("weights that are gone", damage="vae/diffusion_pytorch_model.safetensors:gone", code=2, says=["vae"]),
    Case("a config cut off", damage="unet/config.json:cut", code=2, says=["config.json"]),
    Case("an index that is text", damage="model_index.json:text", code=2, says=["model_index.json"]),
    Case("a vocabulary of no bytes", damage="tokenizer/vocab.json:empty", code=2, says=["vocab.json"]),
    Case("a UNet that is not a number", damage=f"{UNET}:nan", code=1, says=["step 1", "not finite", "another --vae"]),
    # --- files of the user
    Case("a picture cut off", options="image2image IN/cut.png", code=2, says=["cut.png"]),
    Case("a mask that is text", options="image2image IN/whole.png --mask IN/text.png", code=2, says=["text.png"]),
    Case("a picture that is whole", options="image2image IN/whole.png --strength 1", left=ALL),
    Case("a picture that tells nothing", options="--from_image IN/whole.png", code=2, says=["whole.png"]),
    Case("prompts that are no text", options="--prompt_file IN/cut.png", code=2, says=["cut.png", "UTF-8"]),
    Case("a LoRA cut off", options="--lora IN/cut.safetensors", code=2, says=["cut.safetensors"]),
    Case("an embedding cut off", options="--embedding IN/cut.safetensors", code=2, says=["cut.safetensors"]),
]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, sd1_folder) -> Path:
    """Files of a user, most of them damaged."""
    folder = tmp_path_factory.mktemp("inputs")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    picture.save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.safetensors").write_bytes((sd1_folder / UNET).read_bytes()[:1000])
    (folder / "text.png").write_text("not a picture")
    return folder


def damaged(folder: Path, damage: str, tmp_path: Path) -> Path:
    """A copy of a checkpoint in which one file is not what it should be."""
    name, how = damage.split(":")
    path = shutil.copytree(folder, tmp_path / "model", symlinks=False) / name
    if how == "gone":
        path.unlink()
    elif how == "nan":
        tensors = {key: value * float("nan") for key, value in mx.load(str(path)).items()}
        mx.eval(tensors)
        path.unlink()
        mx.save_safetensors(str(path), tensors)
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"not what it was"}[how])
    return tmp_path / "model"


def start(fault: str, script: str, out: Path, arguments: Sequence[str], current: Path) -> subprocess.Popen:
    """Start a script, with a fault in its process."""
    command = [sys.executable, "-c", PREPARE + fault + RUN, str(out), script, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=current, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)


def check_whole(folder: Path) -> list[str]:
    """The pictures in a folder, each of which can be read to its end."""
    found = sorted(path.name for path in folder.glob("*.png")) if folder.is_dir() else []
    for name in found:
        with Image.open(folder / name) as image:
            image.load()
    return found


if not Path("/dev/full").exists():  # Linux has it
    CASES = [case for case in CASES if "/dev/full" not in case.fault]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_fault(case: Case, sd1_folder, inputs, tmp_path):
    out, current = tmp_path / "out", tmp_path / "current"
    out.mkdir()
    current.mkdir()
    model = damaged(sd1_folder, case.damage, tmp_path) if case.damage else sd1_folder
    options = case.options.replace("IN/", f"{inputs}/").replace("OUT/", f"{out}/").split()
    script, image = "txt2image", []
    if options[:1] == ["image2image"]:
        script, image, options = options[0], options[1:2], options[2:]
    prompt = [] if "--prompt_file" in options or "--from_image" in options else [PROMPT]
    size = ["--width", "64", "--height", "64", "--steps", "3", "--cfg", "1"]
    amount = ["--n_images", "2", "--batch_size", "1", "--seed", "1", "--output", f"{out}/a.png"]
    arguments = [*image, *prompt, "--model", str(model), *size, *amount, *options]
    process = start(case.fault, script, out, arguments, current)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == case.code, stderr
    assert not [words for words in case.says if words not in stderr], stderr
    assert "Traceback" not in stderr
    if case.code in (1, 2):
        assert ": error: " in stderr.splitlines()[-1]
    assert check_whole(out) == sorted(case.left)
    told = len(case.left) if case.tells is None else case.tells
    if case.code >= 0:
        assert len(stdout.splitlines()) == told, stdout
    assert check_whole(current) == sorted(case.elsewhere)
    if case.code >= 0:
        left = [path.name for folder in (out, current) if folder.is_dir() for path in folder.iterdir()]
        assert not [name for name in left if name.endswith(".tmp")]


QUICK = ["--width", "64", "--height", "64", "--steps", "1", "--cfg", "1", "--no_grid", "--seed", "1"]


@pytest.mark.parametrize("output", ["a.png", "{seed}.png", "folder/", "--overwrite"])
def test_two_runs_write_to_one_folder_at_once(output, sd1_folder, tmp_path):
    """With --overwrite each name has a whole image of either run; without, the images of both are there."""
    overwrite = output == "--overwrite"
    where = f"{tmp_path}/a.png" if overwrite else f"{tmp_path}/{output}"
    given = [PROMPT, "--model", str(sd1_folder), *QUICK, "--n_images", "3", "--output", where]
    given += ["--overwrite"] if overwrite else []
    told = []
    for process in [start("", "txt2image", tmp_path, given, tmp_path) for _ in range(2)]:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        told += [line.split(" seed ")[0] for line in stdout.splitlines()]
    assert len(told) == 6 and len(set(told)) == (3 if overwrite else 6)
    folder = tmp_path / "folder" if output.endswith("/") else tmp_path
    assert check_whole(folder) == sorted(Path(path).name for path in set(told))


def test_a_run_after_one_that_was_killed(sd1_folder, tmp_path):
    """What the killed one left half-written is in nobody's way."""
    given = [PROMPT, "--model", str(sd1_folder), *QUICK, "--n_images", "1", "--output", f"{tmp_path}/a.png"]
    for fault, code in (("PIL.Image.Image.save = half_and(send(KILL))", -9), ("", 0)):
        process = start(fault, "txt2image", tmp_path, given, tmp_path)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == code, stderr
    assert check_whole(tmp_path) == ["a.png"]

"""What can go wrong from outside, in one table: how the scripts end, what they say, and that finished images stay.

Each row is a process of its own; a code below zero is the signal that killed it. All files under a final name are
whole, and but for kills no temporary file is left.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
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

def half_and(action):
    def save(picture, file, *_, **__):
        file.write(b"half a picture")
        file.flush()
        action()
    return save

def full(n):
    def action(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    at(*write, n, action)

def vanish(*_):
    shutil.rmtree(out)

def no_larger(*_):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

def unread():
    ends = os.pipe()
    os.dup2(ends[1], 1)
    os.close(ends[0])
    os.close(ends[1])

INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
step = (UNet, "__call__")
decode = (Model, "decode")
write = (PIL.Image.Image, "save")
"""
RUN = "\nsys.exit(cli.txt2image(sys.argv[1:]))\n"


class Case(NamedTuple):
    what: str
    fault: str = ""  # before the script runs, in its process
    options: str = ""  # beside those for two small images in two batches of three steps
    damage: str = ""  # a file of the checkpoint and what becomes of it: "path:cut", "path:empty" or "path:nan"
    code: int = 0
    says: str = ""  # on stderr, in pieces between |
    left: str = ""  # names in the folder of --output
    tells: int | None = None  # lines on stdout; None: one for each of ``left``
    elsewhere: str = ""  # names in the current folder, which is another one


ALL = "a.png a_1.png a_2.png"
UNET = "unet/diffusion_pytorch_model.safetensors"
STOPPED = "interrupted"
TWICE = "lambda *_: (send(INT)(), send(INT)(), signal.pause())"
CASES = [
    Case("nothing", left=ALL),
    # --- Ctrl-C and SIGTERM
    Case("Ctrl-C as the model is opened", "at(cli, 'open_model', 1, send(INT))", code=130, says=STOPPED),
    Case("Ctrl-C in the last writing", "at(*write, 2, send(INT))", code=130, says=STOPPED, left="a_1.png a_2.png"),
    Case("Ctrl-C twice in the second batch", f"at(*step, 5, {TWICE})", code=130, left="a_1.png"),
    Case("Ctrl-C twice in a writing", f"PIL.Image.Image.save = half_and({TWICE})", code=130, tells=0),
    Case("SIGTERM in a step", "at(*step, 2, send(TERM))", code=143, says=STOPPED, left="a_1_partial.png"),
    # --- killed
    Case("killed in the second writing", "at(*write, 2, half_and(send(KILL)))", code=-9, left="a_1.png"),
    # --- disks and folders
    Case("no space for one", "full(2)", code=1, says="a_2.png|saved as", left="a_1.png", tells=2, elsewhere="a_2.png"),
    Case("no space for the grid", "full(3)", code=1, says="No space left", left="a_1.png a_2.png", elsewhere="a.png"),
    Case("files may grow no further", "at(*decode, 1, no_larger)", code=1, says="a_1.png|the image is lost"),
    Case("the folder vanishes", "at(*decode, 1, vanish)", code=1, says="saved as", tells=1, elsewhere="a_1.png"),
    Case("a folder that may not be written to", "os.access = lambda path, mode: False", code=2, says="not writable"),
    Case("nobody reads stdout", "unread()", says="stdout cannot be written to (Broken pipe)", left=ALL, tells=0),
    Case("the current folder is gone", "os.rmdir(os.getcwd())", left=ALL),
    # --- files of the model
    Case("weights cut off", damage=f"{UNET}:cut", code=2, says="diffusion_pytorch_model.safetensors"),
    Case("a config cut off", damage="unet/config.json:cut", code=2, says="config.json"),
    Case("a vocabulary of no bytes", damage="tokenizer/vocab.json:empty", code=2, says="vocab.json"),
    Case("a UNet that is not a number", damage=f"{UNET}:nan", code=1, says="step 1|not finite|another --vae"),
    # --- files of the user
    Case("a picture cut off", options="--controlnet x --control_image IN/cut.png", code=2, says="cut.png"),
    Case("a LoRA cut off", options="--lora IN/cut.safetensors", code=2, says="cut.safetensors"),
    Case("an embedding cut off", options="--embedding IN/cut.safetensors", code=2, says="cut.safetensors"),
]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, sd1_folder) -> Path:
    """Files of a user, most of them damaged."""
    folder = tmp_path_factory.mktemp("inputs")
    Image.effect_noise((64, 64), 60).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:500])
    (folder / "cut.safetensors").write_bytes((sd1_folder / UNET).read_bytes()[:1000])
    return folder


def damaged(folder: Path, damage: str, tmp_path: Path) -> Path:
    """A copy of a checkpoint in which one file is not what it should be."""
    name, how = damage.split(":")
    path = shutil.copytree(folder, tmp_path / "model", symlinks=False) / name
    if how == "nan":
        tensors = {key: value * float("nan") for key, value in mx.load(str(path)).items()}
        mx.eval(tensors)
        path.unlink()
        mx.save_safetensors(str(path), tensors)
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if how == "cut" else b"")
    return tmp_path / "model"


def check_whole(folder: Path) -> list[str]:
    """The pictures in a folder, each of which can be read to its end."""
    found = sorted(path.name for path in folder.glob("*.png")) if folder.is_dir() else []
    for name in found:
        with Image.open(folder / name) as image:
            image.load()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_fault(case: Case, sd1_folder, inputs, tmp_path, forked):
    out, current = tmp_path / "out", tmp_path / "current"
    out.mkdir()
    current.mkdir()
    model = damaged(sd1_folder, case.damage, tmp_path) if case.damage else sd1_folder
    options = case.options.replace("IN/", f"{inputs}/").split()
    size = ["--width", "64", "--height", "64", "--steps", "3", "--cfg", "1"]
    amount = ["--n_images", "2", "--batch_size", "1", "--seed", "1", "--output", f"{out}/a.png"]
    arguments = [PROMPT, "--model", str(model), *size, *amount, *options]
    code, stdout, stderr, _ = forked(PREPARE + case.fault + RUN, out, *arguments, cwd=current)
    assert code == case.code, stderr
    assert not [words for words in case.says.split("|") if words not in stderr], stderr
    assert "Traceback" not in stderr
    if case.code in (1, 2):
        assert ": error: " in stderr.splitlines()[-1]
    assert (check_whole(out), check_whole(current)) == (case.left.split(), case.elsewhere.split())
    if case.code >= 0:
        told = len(case.left.split()) if case.tells is None else case.tells
        assert len(stdout.splitlines()) == told, stdout
        assert not [*tmp_path.glob("*/*.partial")]


QUICK = ["--width", "64", "--height", "64", "--steps", "1", "--cfg", "1", "--no_grid", "--seed", "1"]


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_two_runs_write_to_one_folder_at_once(options, sd1_folder, tmp_path):
    """With --overwrite each name has a whole image of either run; without, the images of both are there."""
    given = [PROMPT, "--model", str(sd1_folder), *QUICK, "--n_images", "3", "--output", f"{tmp_path}/a.png", *options]
    told = []
    command, pipes = [sys.executable, "txt2image.py", *given], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for process in [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(2)]:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        told += [line.split(" seed ")[0] for line in stdout.splitlines()]
    assert len(told) == 6 and len(set(told)) == (3 if options else 6)
    assert check_whole(tmp_path) == sorted(Path(path).name for path in set(told))

"""Several ranks on one job, as MLX's launcher starts them: what all of them make is what one makes."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from checkpoints import as_single_file
from image_prompts import image_encoder, random_adapter, write_adapter
from stable_diffusion.app.processes import share
from stable_diffusion.app.sharing import Ranks
from stable_diffusion.cli import main
from stable_diffusion.diffusion.samplers import SAMPLERS

ROOT = Path(__file__).parents[2]
LAUNCHER = Path(sys.executable).parent / "mlx.launch"
TINY = ["--model", "tiny", "--steps", "2", "--batch_size", "1", "--no_metadata"]


def launch(size: int, folder: Path, commands: list, *, launcher: bool = False, **spec) -> tuple[list, str, str]:
    """Run commands on ranks; returns what each wrote of itself (None: nothing), and all of stdout and stderr."""
    (folder / "spec.json").write_text(json.dumps({"commands": commands, **spec}))
    program = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(folder), str(folder / "spec.json")]
    first = free_ports(size)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    options = {"cwd": folder, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if launcher:
        command = [LAUNCHER, "-n", str(size), "--starting-port", str(first), "--", *program]
        started = [subprocess.Popen(command, env=environment, text=True, **options)]
    else:
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(size)]))
        ranks = [environment | {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} for rank in range(size)]
        started = [subprocess.Popen(program, env=rank, text=True, **options) for rank in ranks]
    stopped = spec.get("stops", {})
    going = [process for rank, process in enumerate(started) if str(rank) not in stopped]
    try:
        printed = [process.communicate(timeout=100) for process in going]
    finally:  # also where they hang
        for process in started if stopped else ():
            process.kill()
            process.communicate()
    files = [folder / f"rank-{rank}.json" for rank in range(size)]
    written = [json.loads(file.read_text()) if file.exists() else None for file in files]
    return written, "".join(out for out, _ in printed), "".join(err for _, err in printed)


def free_ports(count: int) -> int:
    """Return the first of ``count`` ports in a row that nobody listens to, far from those of other test processes."""
    for first in range(20000 + os.getpid() * 16 % 40000, 65000, count):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", first))
                other.bind(("127.0.0.1", first + count - 1))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    Image.effect_noise((64, 64), 60).convert("RGB").save(folder / "photo.png")
    image_encoder(folder / "image_encoder")
    unet = diffusers.UNet2DConditionModel.from_pretrained(ROOT / "stable_diffusion" / "tiny" / "unet")
    write_adapter(folder / "plus.safetensors", random_adapter(unet, "plus"))
    (folder / "prompts.txt").write_text("a red circle\na blue heart --seed 9\n\na green star --steps 3\n")
    return folder


# --- what is made -----------------------------------------------------------------------------------------------------

LORA = ["--lora_dir", str(ROOT / "stable_diffusion" / "tiny" / "lora")]
IMAGE_PROMPT = ["--ip_adapter", "IN/plus.safetensors", "--ip_image", "IN/photo.png"]
COMMANDS = {
    "five": ["txt2image", "a red circle", "--seed", "1-5"],
    "one": ["txt2image", "a red circle", "--seed", "7", "--n_images", "1"],
    "grid": ["txt2image", "a red {circle|heart}", "--seed", "3", "--steps", "2,3", "--gather"],
    "pattern": ["txt2image", "a red circle", "--seed", "1,2,1", "--gather", "--output", "OUT/{prompt}.png"],
    "steal": ["txt2image", "a blue star", "--seed", "1-5", "--share", "steal", "--gather", "--hires", "1.5"],
    "file": ["txt2image", "--prompt_file", "IN/prompts.txt", "--n_images", "2", "--seed", "3"],
    "image": ["image2image", "IN/photo.png", "a red heart", "--seed", "4-6", "--output", "OUT/x.png"],
    "lora": ["txt2image", "a green ohwx {<lora:arrow>|<lora:arrow:0.5>}", *LORA, "--seed", "2"],
    "guidance": ["txt2image", "a red circle", "--seed", "5,6", "--share", "guidance", *IMAGE_PROMPT],
}


def arguments(name: str, out: Path, inputs: Path) -> list[str]:
    script, *words = COMMANDS[name]
    words = [word.replace("OUT/", f"{out}/").replace("IN/", f"{inputs}/") for word in words]
    steps = [] if "--steps" in words else TINY[2:4]
    output = [] if "--output" in words else ["--output", f"{out}/{{i}}_{{seed}}.png"]
    return [script, *words, *TINY[:2], *steps, *TINY[4:], *output]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, inputs) -> Path:
    """The files of every command in a process that runs alone."""
    folder = tmp_path_factory.mktemp("alone")
    for name in COMMANDS:
        script, *words = arguments(name, folder / name, inputs)
        words = [word for word in words if word not in ("--gather", "--share", "steal", "guidance")]
        assert getattr(main, script)(words, script) == 0
    return folder


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_together_make_what_one_makes(size, alone, inputs, tmp_path):
    names = COMMANDS if size == 2 else ("five", "one", "steal", "guidance")
    commands = [arguments(name, tmp_path / "out" / name, inputs) for name in names]
    written, _, printed = launch(size, tmp_path, commands, launcher=size == 2)
    assert [rank["codes"] for rank in written] == [[0] * len(names)] * size, printed
    for name in names:
        ours, theirs = files_of(tmp_path / "out" / name), files_of(alone / name)
        if "--gather" not in COMMANDS[name]:  # has no grid of what others have made
            theirs = {file: content for file, content in theirs.items() if "grid" not in file and file != "x.png"}
            ours = {file: content for file, content in ours.items() if "grid" not in file}
        if name == "guidance" and size == 2:  # the rows of a batch are computed apart, and rounded otherwise
            assert ours.keys() == theirs.keys()
            difference = [difference_of(tmp_path / "out" / name / file, alone / name / file) for file in ours]
            assert max(difference) <= 1
        else:
            assert ours == theirs, name
    assert ": rank " not in printed


def difference_of(*files: Path) -> int:
    ours, theirs = (np.array(Image.open(file), int) for file in files)
    return abs(ours - theirs).max()


def test_guidance_is_computed_apart_for_every_sampler(tmp_path):
    written, _, printed = launch(2, tmp_path, [["guidance"]])
    differences = written[0]["codes"][0]
    assert len(differences) == len(SAMPLERS), printed
    assert max(differences.values()) <= 1e-5, differences


def test_a_rank_that_is_slow_leaves_its_work_to_others(tmp_path):
    command = [
        "txt2image",
        "a red circle",
        "--seed",
        "1-6",
        *TINY,
        "--output",
        f"{tmp_path}/{{seed}}.jpg",
        "--overwrite",
    ]
    written, _, errors = launch(2, tmp_path, [command, [*command, "--share", "steal"]], slow={"1": 0.4})
    assert [rank["codes"] for rank in written] == [[0, 0]] * 2, errors
    even, steal = (max(rank["seconds"][i] for rank in written) for i in (0, 1))
    assert steal < even - 0.3


# --- what is lost -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "rank", "call"),
    [("even", 0, 2), ("even", 1, 0), ("even", 1, 5), ("steal", 0, 2), ("steal", 1, 2)],
)
def test_the_others_finish_what_is_theirs_when_a_rank_is_killed(share, rank, call, tmp_path):
    command = ["txt2image", "a red circle", "--seed", "1-4", *TINY, "--output", f"{tmp_path}/out/{{seed}}.png"]
    start = time.monotonic()
    written, _, printed = launch(2, tmp_path, [[*command, "--share", share]], dies={str(rank): call}, launcher=call > 0)
    assert time.monotonic() - start < 60
    assert written[rank] is None and written[1 - rank]["codes"] == [1], printed
    made = {int(file.stem) for file in (tmp_path / "out").iterdir()}
    for file in (tmp_path / "out").iterdir():  # whole, and none is half written
        Image.open(file).load()
    line = next(line for line in printed.splitlines() if "another Mac is lost" in line)
    missing = {int(seed) for seed in line.rpartition("--seed ")[2].split(",")}
    assert missing >= {1, 2, 3, 4} - made, line
    if share == "even":
        assert set(share_of(4, 1 - rank)) <= made - missing, line
    else:  # what nobody had begun is made by the other one
        assert len(made) >= 3


@pytest.mark.parametrize(("signal", "rank"), [("dies", 0), ("dies", 1), ("stops", 1)])
def test_guidance_goes_on_with_the_first_rank_alone(signal, rank, tmp_path):
    """A rank that is stopped has open connections, and says nothing."""
    command = ["txt2image", "a red circle", "--seed", "1,2", *TINY, "--output", f"{tmp_path}/out/{{seed}}.png"]
    written, _, printed = launch(2, tmp_path, [[*command, "--share", "guidance"]], **{signal: {str(rank): 4}})
    assert written[1 - rank]["codes"] == [rank == 0], printed
    assert {"1.png"} | ({"2.png", "1_grid.png"} if rank else set()) == {
        file.name for file in (tmp_path / "out").iterdir()
    }
    assert ("may be missing" if rank == 0 else "recomputing the image") in printed
    assert "computation failed" not in printed


def test_a_rank_that_says_nothing_is_lost_in_low_memory_too(tmp_path):
    """MLX frees buffers when all streams are done, also the one that waits for that rank."""
    words = ["--seed", "1-6", "--low_memory", "--output", f"{tmp_path}/out/{{seed}}.png"]
    silent = {"stops": {"1": 2}, "slow": {"0": 0.03}, "patience": 1}
    written, _, printed = launch(2, tmp_path, [["txt2image", "a red circle", *TINY, *words]], **silent)
    assert written[0]["codes"] == [1], printed
    assert set(files_of(tmp_path / "out")) == {f"{i}.png" for i in range(1, 6, 2)} and "another Mac is lost" in printed


def test_pictures_that_were_not_gathered_are_named(tmp_path):
    command = ["txt2image", "a red circle", "--seed", "1-4", *TINY, "--output", f"{tmp_path}/out/{{seed}}.png"]
    written, _, printed = launch(2, tmp_path, [[*command, "--gather"]], dies={"1": "gather"})
    assert written[1] is None and written[0]["codes"] == [1]
    assert "another Mac is lost" in printed and len(files_of(tmp_path / "out")) == 4


def share_of(count: int, rank: int) -> list[int]:
    return list(range(1, count + 1))[rank::2]


def test_a_mistake_ends_all_ranks_and_is_said_once(tmp_path):
    """Also where it is one of a single rank: there is no such model in its folder."""
    homes = [tmp_path / "home-0", tmp_path / "home-1"]
    for home in homes:
        home.mkdir()
    mx.save_safetensors(str(homes[0] / "home.safetensors"), as_single_file(ROOT / "stable_diffusion" / "tiny"))
    command = ["txt2image", "a red circle", "--seed", "1-4", "--steps", "2", "--output", f"{tmp_path}/out/x.png"]
    tokenizer = ["--tokenizer", str(ROOT / "stable_diffusion" / "tiny" / "tokenizer")]
    mistakes = [["--stepps", "3"], ["--model", "home.safetensors", *tokenizer]]
    written, _, errors = launch(2, tmp_path, [[*command, *words] for words in mistakes])
    assert [rank["codes"] for rank in written] == [[2, 2]] * 2 and not (tmp_path / "out").exists()
    first, second = (line for line in errors.splitlines() if "error" in line)
    assert "--stepps" in first and "home.safetensors" in second, errors


def test_a_full_disk_ends_one_rank_alone(tmp_path):
    command = ["txt2image", "a red circle", "--seed", "1-4", *TINY, "--output", f"{tmp_path}/out/{{seed}}.png"]
    written, _, printed = launch(2, tmp_path, [command], full=1)
    assert [rank["codes"] for rank in written] == [[1], [1]]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"1.png", "3.png"}
    assert "No space left" in printed and "--seed 2,4" in printed


def test_a_process_alone_has_everything():
    ranks = Ranks()
    assert list(ranks.share(5, "even")) == [0, 1, 2, 3, 4] and share("abc") == "abc"
    assert ranks.gather(b"7") == [b"7"] and ranks.once(lambda: 3) == 3
    assert ranks.missing(2) == [0, 1]
    ranks.leave()
    ranks.close()


def test_a_process_alone_begins_no_thread_and_joins_nothing(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a process that runs alone has no others")

    before = {thread.name for thread in threading.enumerate()}
    monkeypatch.setattr(mx.distributed, "init", refuse)
    monkeypatch.setattr(Ranks, "_exchange", refuse)
    monkeypatch.setattr(main.Script, "_on_step", lambda script, step: alive.update(threading.enumerate()))
    alive = set()
    assert main.txt2image(["a red circle", *TINY, "--output", str(tmp_path / "x.png")], "txt2image") == 0
    assert not {thread.name for thread in alive if "_exchange" in thread.name or "_end_silence" in thread.name} - before

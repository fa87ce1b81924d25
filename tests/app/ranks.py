"""Run commands as one of several ranks, for tests/app/test_sharing.py: ``python ranks.py FOLDER SPEC``.

SPEC is a JSON file: "commands", each a script and its arguments; "dies" {rank: the call of on_step at which it is
killed, 0 is before, "gather" when all are made}; "stops" {rank: the same, but stopped}, lost after "patience" seconds;
"slow" {rank: seconds of each such call}; "full", a rank whose disk is full. Each rank writes its exit codes and the
seconds of each command into FOLDER/rank-N.json.
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

from stable_diffusion import StableDiffusion

# isort: split
import mlx.core as mx

from stable_diffusion.app import results, sharing
from stable_diffusion.cli import main
from stable_diffusion.diffusion.samplers import SAMPLERS
from stable_diffusion.images.files import save


def spoil(spec: dict, rank: str) -> None:
    """Make this rank slow, mortal or full."""
    calls, on_step = 0, main.Script._on_step

    def patched(script, step):
        nonlocal calls
        calls += 1
        if calls == spec.get("dies", {}).get(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        if calls == spec.get("stops", {}).get(rank):
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(spec.get("slow", {}).get(rank, 0))
        return on_step(script, step)

    def full(image, path, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    if "stops" in spec:
        sharing._PATIENCE = spec.get("patience", 3)
    if spec.get("dies", {}).get(rank) == "gather":
        results.ResultWriter.gather = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    if spec.get("dies", {}).get(rank) == 0:
        main.read_inputs = lambda request: os.kill(os.getpid(), signal.SIGKILL)
    main.Script._on_step = patched
    results.save = full if rank == str(spec.get("full")) else save


def guidance(rank: str) -> dict[str, float]:
    """Return how far the latents of each sampler are from those of rank 0 alone, over their largest value.

    That one computes a row after the other, as two cores do side by side: two rows together are rounded otherwise. It
    does so when the other one, which would wait as a busy loop, has left.
    """
    sd = StableDiffusion("tiny")
    sd.rows_at_once = 1
    results = []
    for group in (mx.distributed.init(), None)[: 2 if rank == "0" else 1]:
        sd.group = group
        results.append({name: last(sd, name) for name in SAMPLERS})
    together, alone = results[0], results[-1]
    return {name: (mx.abs(alone[name] - x).max() / mx.abs(alone[name]).max()).item() for name, x in together.items()}


def last(sd: StableDiffusion, sampler: str) -> mx.array:
    *_, x_t = sd.generate_latents("a red circle", num_steps=3, seed=1, sampler=sampler)
    mx.eval(x_t)
    return x_t


def run(folder: Path, spec: dict) -> None:
    rank = os.environ["MLX_RANK"]
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # the launcher's may come after a command
    spoil(spec, rank)
    if (home := folder / f"home-{rank}").exists():
        os.chdir(home)
    codes, seconds = [], []
    for script, *arguments in spec["commands"]:
        start = time.perf_counter()
        try:
            codes.append(guidance(rank) if script == "guidance" else getattr(main, script)(arguments, script))
        except SystemExit as leaving:
            codes.append(leaving.code)
        seconds.append(time.perf_counter() - start)
        (folder / f"rank-{rank}.json").write_text(json.dumps({"codes": codes, "seconds": seconds}))


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))

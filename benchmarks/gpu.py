"""Time a step and a decoding in half precision on a GPU, beside torch and diffusers, in one table.

    bash benchmarks/gpu.sh                             on a machine with CUDA: installs, checks, and measures
    python -m benchmarks.gpu [--seconds 400]
    python -m benchmarks.gpu --device cpu --shape tiny

A step is a guidance pair of SD 1.5 at 512 x 512 and of SDXL at 1024 x 1024; weights are random. torch computes
attention by its scaled_dot_product_attention, with maps as they come, in channels_last, and in channels_last and
compiled. Each line has a process of its own, one after the other. The first run, which compiles, is a column of its
own; seconds are the median and the least of those after it. The peak of the memory has the weights in it. A line that
is not done within ``--seconds`` says so.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from .compare.cases import Case

ROOT = Path(__file__).parents[1]
COLUMNS = {
    "this library": (),
    "diffusers": (),
    "diffusers, channels_last": ("channels_last",),
    "diffusers, compiled": ("channels_last", "compiled"),
}
SIZES = {"sd15": 512, "sdxl": 1024, "tiny": 64}
PARTS = ("unet", "vae-decode")
_TURNS, _SECONDS = 10, 10.0  # of a line: the most turns, and the seconds after which none begins


def run(case: Case, column: str, device: str) -> dict[str, float]:
    """Return the figures of one line, measured in this process."""
    if column == "this library":
        from .compare import ours as module

        # isort: split
        from stable_diffusion.models import cpu

        cpu.choose_device(device)
    else:
        import torch

        from .compare import torch_diffusers as module

        if device == "gpu" and not torch.cuda.is_available():
            raise SystemExit("torch finds no GPU")
        module.SETTINGS.update(COLUMNS[column])
    work = module.prepare(case, Path())
    first = work.measure()["seconds"]
    runs, started = [], time.perf_counter()
    while len(runs) < _TURNS and (len(runs) < 2 or time.perf_counter() - started < _SECONDS):
        runs.append(work.measure())
    seconds = [one["seconds"] for one in runs]
    peak = max(one["peak"] for one in runs)
    return {"first": first, "median": statistics.median(seconds), "min": min(seconds), "peak": peak}


def in_a_process(case: Case, column: str, device: str, seconds: float) -> dict[str, Any]:
    """Return the figures of one line, or ``{"failed": why}``."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", device, "--one", case.part, case.shape, column]
    environment = dict(os.environ)
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # torch takes CUDA where it finds it
    options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            out, err = process.communicate(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # also the processes that compile for it
            return {"failed": "no time was left"}
    if process.returncode:
        return {"failed": (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1][:150]}
    return json.loads(out.splitlines()[-1])


def lines(cases: Sequence[Case], columns: Sequence[str], device: str, seconds: float) -> Iterator[str]:
    """Yield the lines of the table as they are measured; what is compiled takes longest, and comes last."""
    end, ours = time.monotonic() + seconds, {}
    yield f"{'float16':44}{'first':>10}{'median':>10}{'min':>10}{'peak':>12}   this library / it"
    compiled = [column for column in columns if "compiled" in COLUMNS[column]]
    rest = [column for column in columns if column not in compiled]
    for case, column in (*product(cases, rest), *product(cases, compiled)):
        title = f"{case.part} {case.shape} {case.size}"
        result = in_a_process(case, column, device, end - time.monotonic())
        if "failed" in result:
            yield f"{title:20}{column:26}{result['failed']}"
            continue
        if column == "this library":
            ours[case] = result["median"]
        times = "".join(f"{result[name]:8.3f} s" for name in ("first", "median", "min"))
        share = f"{ours[case] / result['median']:12.2f}" if case in ours else ""
        yield f"{title:20}{column:24}{times}{result['peak'] / 1e9:9.2f} GB{share}"


def case_of(part: str, shape: str) -> Case:
    return Case(part, shape, SIZES[shape], "float16", 2, vae_dtype="float16")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--shape", choices=SIZES, nargs="+", default=["sd15", "sdxl"])
    parser.add_argument("--columns", choices=COLUMNS, nargs="+", default=list(COLUMNS))
    parser.add_argument("--seconds", type=float, default=400, help="that all lines may take (400)")
    parser.add_argument("--one", nargs=3, metavar=("PART", "SHAPE", "COLUMN"), help="one line, as JSON")
    args = parser.parse_args(argv)
    if args.one:
        part, shape, column = args.one
        print(json.dumps(run(case_of(part, shape), column, args.device)))
        return
    cases = [case_of(part, shape) for shape in args.shape for part in PARTS]
    for line in lines(cases, args.columns, args.device, args.seconds):
        print(line, flush=True)


if __name__ == "__main__":
    main()

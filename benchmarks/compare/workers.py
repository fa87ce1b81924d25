"""Processes that measure, one for each column, of which only one works at a time."""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .cases import Case

MODULES = {"this library": "ours", "mlx-examples": "mlx_examples", "diffusers": "torch_diffusers"}
MODULES["sd.cpp"] = "sd_cpp"
_SPAWN = multiprocessing.get_context("spawn")  # a process that has imported MLX or torch cannot be forked

Result = dict[str, Any]


def measure(
    case: Case,
    folder: Path,
    columns: Sequence[str],
    examples: Path | None,
    *,
    repeats: int,
    seconds: float,
) -> dict[str, Result]:
    """Each column once to warm up, then all in turns, forwards and backwards.

    Turns end after ``repeats`` of them, or when they have taken so many ``seconds``, but not before the second. The
    work is described when it was done once: what a run keeps for all of its steps is there then. Returns for each
    column that has the case its figures, or ``{"failed": why}``. "share" is the time that the case's operations take at
    the rate of float32 products, the highest of any column's, in shares of the median.
    """
    with ExitStack() as stack:
        there = [column for column in columns if has(column, case)]
        counted = {column: count(column, case, folder, examples) for column in there}
        workers = [Worker(column, case, folder, examples) for column in there]
        for worker in workers:
            worker.known |= counted[worker.column]
            stack.callback(worker.end)
            for question in ("prepare", "measure", "describe"):
                worker.ask(question)
        start = time.perf_counter()
        for turn in range(repeats):
            if turn >= 2 and time.perf_counter() - start > seconds:
                break
            for worker in workers[:: -1 if turn % 2 else 1]:
                worker.ask("measure")
        results = {worker.column: worker.result() for worker in workers}
    ours = counted.get("this library") or count("this library", case, folder, examples)
    rate = max((result.get("rate", 0) for result in results.values()), default=0)
    if rate and "operations" in ours:
        for result in results.values():
            if "median" in result:
                result |= {"share": ours["operations"] / rate / result["median"]}
    return results


def has(column: str, case: Case) -> bool:
    """Whether a column can do a case. What MLX calls quantized is its own."""
    if column == "sd.cpp" and case.part not in ("unet", "vae-decode"):
        return False
    return case.weights == "plain" or column in ("this library", "mlx-examples")


def count(column: str, case: Case, folder: Path, examples: Path | None) -> Result:
    """Count the work of a GPU, in a process of its own, in which networks are built for one; it computes nothing.

    Of this library it also counts the "operations" that the layers have as they were published, whatever the column.
    Returns nothing for what is more than a graph, and for columns that do not compute with MLX.
    """
    if column not in ("this library", "mlx-examples") or case.needs_files:
        return {}
    worker = Worker(column, case, folder, examples)
    worker.ask("count")
    worker.end()
    return worker.known


class Worker:
    """A column's process for one case, and what it has answered so far."""

    def __init__(self, column: str, case: Case, folder: Path, examples: Path | None):
        self.column, self.known, self.runs = column, {}, []
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(MODULES[column], case, folder, examples, theirs))
        self.process.start()
        theirs.close()  # so that its end shows here when the process ends

    def ask(self, what: str) -> None:
        """Let the process do its work and wait for it; nothing once it has failed."""
        if "failed" in self.known:
            return
        try:
            self.pipe.send(what)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            answer = {"failed": f"its process ended with code {self.process.exitcode}; memory may have run out"}
        if what == "measure" and "failed" not in answer:
            self.runs.append(answer)
        else:
            self.known |= answer

    def result(self) -> Result:
        if "failed" in self.known:
            return self.known
        taken = {name: [run[name] for run in self.runs] for name in self.runs[0]}
        first, *times = taken["seconds"]
        return self.known | {
            "median": statistics.median(times),
            "min": min(times),
            "max": max(times),
            "peak": max(taken["peak"]),
            "first": first,
            "seconds": times,
            "processor": taken["cpu"][1:],
        }

    def end(self) -> None:
        with suppress(OSError):  # it may have ended
            self.pipe.send(None)
        self.pipe.close()
        self.process.join(timeout=10)
        self.process.kill()


def _serve(module: str, case: Case, folder: Path, examples: Path | None, pipe: Connection) -> None:
    """In the process: answer until nobody asks."""
    try:
        if module == "mlx_examples":
            sys.path.insert(0, str(examples))
        while question := pipe.recv():
            try:
                if question == "count":
                    answer = _count(module, case, folder)
                else:
                    if question == "prepare":
                        work = import_module(f"{__package__}.{module}").prepare(case, folder)
                    answer = {"describe": work.describe, "measure": work.measure, "prepare": dict}[question]()
            except Exception as error:  # whatever a column raises is its result
                answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            pipe.send(answer)
    except (EOFError, KeyboardInterrupt):
        pass


def _count(module: str, case: Case, folder: Path) -> Result:
    from . import gpu_graph, gpu_kernels

    with gpu_graph.as_on_a_gpu():  # before the networks are imported
        column = import_module(f"{__package__}.{module}")
        work = column.prepare(case, folder)
        found = gpu_kernels.totals(gpu_graph.trace_step(work.networks, work.graph))
        if module == "ours":
            with column.as_published():
                work = column.prepare(case, folder)
                kernels = gpu_kernels.kernels(gpu_graph.trace_step(work.networks, work.graph))
            found["operations"] = sum(kernel.flops for kernel in kernels)
        return found


def find_examples(root: Path) -> Path:
    """The folder in a copy of mlx-examples that its package is imported from.

    Raises ValueError where there is none.
    """
    for folder in (root.resolve(), root.resolve() / "stable_diffusion"):
        if (folder / "stable_diffusion" / "model_io.py").is_file():
            return folder
    raise ValueError(
        f"there is no stable_diffusion/stable_diffusion/model_io.py in {root}: give a copy of mlx-examples"
    )


def write_checkpoint(folder: Path, case: Case, *, weights: bool = False) -> None:
    """Write a checkpoint of a case's shape, in a process too: this library must not be imported in the columns' parent.

    Without ``weights`` it has configurations alone, and with them a TAESD beside it.

    Raises RuntimeError where that fails.
    """
    process = _SPAWN.Process(target=_write, args=(folder, case, weights))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"writing a checkpoint to {folder} failed")


def _write(folder: Path, case: Case, weights: bool) -> None:
    from .. import checkpoints

    checkpoints.write_checkpoint(folder, case.shape, weights)
    if weights:
        checkpoints.write_taesd(folder.parent)

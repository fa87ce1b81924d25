"""This library beside mlx-examples, diffusers and stable-diffusion.cpp: time, memory and work, as a table and as JSON.

    python -m benchmarks.compare --mlx-examples DIR                 what matters, in ten minutes on two cores
    python -m benchmarks.compare --full --shape sdxl --size 1024    a part of the whole matrix

Weights are random; shapes and types are the same for every column. Each column has a process of its own, and only one
works at a time: first each once to warm up, then in turns, forwards and backwards. Seconds are the median, the least
and the most of these turns. The peak of the memory has the weights in it: it is that of the arrays which MLX or CUDA
holds, and for torch on a CPU what the process took beside its weights. Kernels, bytes moved and floating-point
operations are those that a Mac's GPU would have to do, counted from the graph by the rules of MLX's sources, and the
times on Macs are a model that is computed from them (``gpu_kernels.py``); both computed, not measured.

"of rate" is how near a column comes to the machine: the time that the layers' operations, as published, would take at
the rate of a large float32 product, in shares of the time that was taken. The rate is the best of those that MLX and
torch reach in this run with the same threads. The operations are counted from the graph and are the same for all
columns, so fewer of them, as by Winograd's algorithm, count as speed.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from typing import Any

from ..shapes import SHAPES
from .cases import PARTS, Case, cases
from .workers import MODULES, Result, find_examples, has, measure, write_checkpoint

_DTYPES = ("float32", "float16", "bfloat16")
_WEIGHTS = ("plain", "quantized")
_PACKAGES = {"diffusers": ("torch", "diffusers", "transformers"), "sd.cpp": ("stable_diffusion_cpp",)}
_REMEDIES = {"mlx-examples": "give --mlx-examples DIR", "diffusers": "pip install torch diffusers transformers"}
_REMEDIES["sd.cpp"] = "pip install stable-diffusion-cpp-python"
QUICK = {
    "only": ("unet", "vae-decode"),
    "shape": ("sd21",),
    "size": (512,),
    "dtype": _DTYPES[:1],
    "rows": (2,),
    "weights": _WEIGHTS[:1],
}
FULL = {
    "only": tuple(PARTS),
    "shape": ("sd15", "sd21", "sdxl"),
    "size": (512, 768, 1024),
    "dtype": _DTYPES,
    "rows": (1, 2),
    "weights": _WEIGHTS,
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _read(argv)
    machine, results = _machine(), []
    print("   ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for case in cases(args.only, {axis: getattr(args, axis) for axis in FULL if axis != "only"}):
            columns = measure(
                case,
                _checkpoint(Path(folder), case, args.columns),
                args.columns,
                args.mlx_examples,
                repeats=args.repeats,
                seconds=args.seconds,
            )
            results.append(asdict(case) | {"columns": columns})
            print(_table(case, columns), flush=True)
            if args.json:  # after every case: what was measured stays if a later one fails
                args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    return int(any("failed" in result for case in results for result in case["columns"].values()))


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help="a small set (the default)")
    preset.add_argument("--full", action="store_true", help="the whole matrix; on a CPU that is days: choose from it")
    parser.add_argument("--only", type=_parts, help=f"of {', '.join(PARTS)}, or how they begin: --only unet,vae")
    parser.add_argument("--shape", nargs="+", choices=SHAPES)
    parser.add_argument("--size", nargs="+", type=int, help="sides in pixels")
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES)
    parser.add_argument("--rows", nargs="+", type=int, choices=(1, 2), help="the UNet's batch; 2 is a guidance pair")
    parser.add_argument("--weights", nargs="+", choices=_WEIGHTS)
    parser.add_argument("--columns", nargs="+", choices=MODULES, help="all that are there, unless it is said")
    parser.add_argument("--mlx-examples", type=Path, metavar="DIR", help="a copy of github.com/ml-explore/mlx-examples")
    parser.add_argument("--repeats", type=int, default=7, help="at most so many turns (7)")
    parser.add_argument("--seconds", type=float, default=60, help="from the third on, none begins after so many (60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    parser.add_argument("--folder", type=Path, help="for checkpoints while it runs, up to 7 GB (the system's own)")
    args = parser.parse_args(argv)
    for name, values in (FULL if args.full else QUICK).items():
        if getattr(args, name) is None:
            setattr(args, name, values)
    there = [column for column in MODULES if _is_there(column, args)]
    args.columns = args.columns or there
    if missing := [column for column in args.columns if column not in there]:
        parser.error(f"there is no {missing[0]}: {_REMEDIES[missing[0]]}")
    if args.repeats < 2:
        parser.error(f"--repeats {args.repeats} is less than 2")
    if args.mlx_examples is not None:
        try:
            args.mlx_examples = find_examples(args.mlx_examples)
        except ValueError as error:
            parser.error(str(error))
    return args


def _parts(text: str) -> tuple[str, ...]:
    beginnings = tuple(text.split(","))
    for beginning in beginnings:
        if not any(part.startswith(beginning) for part in PARTS):
            raise argparse.ArgumentTypeError(f"{beginning!r} is none of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part.startswith(beginnings))


def _is_there(column: str, args: argparse.Namespace) -> bool:
    if column == "mlx-examples":
        return args.mlx_examples is not None
    return all(util.find_spec(name) for name in _PACKAGES.get(column, ()))


def _checkpoint(folder: Path, case: Case, columns: Sequence[str]) -> Path:
    """The files of a case's shape: with weights only where something reads them."""
    weights = case.needs_files or ("sd.cpp" in columns and has("sd.cpp", case))
    path = folder / f"{case.shape}-{'weights' if weights else 'configurations'}"
    if not path.exists():
        write_checkpoint(path, case, weights=weights)
    return path


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {}
    for name in ("mlx", "torch", "diffusers", "stable-diffusion-cpp-python"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name in os.environ}
    return {"machine": f"{platform.system()} {platform.machine()}", "cores": cores} | threads | versions


def _table(case: Case, columns: dict[str, Result]) -> str:
    """A case's figures, a line for each column, and those of this library in shares of the others'."""
    heads = f"{'median':>10}{'min':>10}{'max':>10}   {'peak':>10}{'weights':>10}{'of rate':>9}   on a GPU, computed"
    lines = ["", case.title(), f"  {'':14}{heads}"]
    for column, result in columns.items():
        if "failed" in result:
            lines.append(f"  {column:14}   {result['failed']}")
            continue
        times = "".join(f"{result[name]:8.3f} s" for name in ("median", "min", "max"))
        memory = "".join(f"{result[name] / 1e9:7.3f} GB" for name in ("peak", "weights"))
        share = f"{result['share']:9.0%}" if "share" in result else " " * 9
        lines.append(f"  {column:14}{times}   {memory}{share}   {_counted(result)}".rstrip())
    for column, result in columns.items():
        if "model" in result:
            model = ", ".join(f"{chip} {seconds:.3g} s" for chip, seconds in result["model"].items())
            lines.append(f"  {column} by a model: {model}")
    if rates := [result["rate"] for result in columns.values() if "rate" in result]:
        lines.append(f"  float32 products at {max(rates) / 1e9:.0f} GFLOP/s")
    ours = columns.get("this library", {})
    for column, result in columns.items():
        if column != "this library" and "median" in result and "median" in ours:
            shares = {"time": "median", "memory": "peak", "kernels": "kernels", "bytes": "moved", "FLOP": "flops"}
            said = [f"{name} {ours[key] / result[key]:.2f}" for name, key in shares.items() if key in result]
            lines.append(f"  this library / {column}: {', '.join(said)}")
    return "\n".join(lines)


def _counted(result: Result) -> str:
    if "kernels" not in result:
        return ""
    return f"{result['kernels']} kernels, {result['moved'] / 1e9:.2f} GB, {result['flops'] / 1e12:.3f} TFLOP"


if __name__ == "__main__":
    sys.exit(main())

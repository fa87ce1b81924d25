"""The work of a Mac's GPU, for a step of the UNet and for decoding: a count and a model, computed on any machine.

    python -m benchmarks.gpu_work [--mlx-examples DIR] [--winograd] [--kernels]

The tables are Markdown. ``compare/gpu_kernels.py`` has the rules of the count, and the figures of the chips. Beside
mlx-examples, shares of its work stand in brackets. A step has guidance and is in float16, decoding is in float32 and
one graph; on a Mac, above a gigabyte of maps, this library decodes in slices, which read weights and edges again.
"""

import argparse
import tempfile
from pathlib import Path

from .compare import workers
from .compare.cases import Case

CASES = {
    "SD 1.5, step, 512 × 512": Case("unet", "sd15", 512, "float16"),
    "SD 2.1, step, 512 × 512": Case("unet", "sd21", 512, "float16"),
    "SDXL, step, 512 × 512": Case("unet", "sdxl", 512, "float16"),
    "SDXL, step, 1024 × 1024": Case("unet", "sdxl", 1024, "float16"),
    "decoding, 512 × 512": Case("vae-decode", "sd15", 512),
    "decoding, 1024 × 1024": Case("vae-decode", "sd15", 1024),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlx-examples", type=Path, metavar="DIR", help="a copy of github.com/ml-explore/mlx-examples")
    parser.add_argument(
        "--winograd", action="store_true", help="convolve large maps by Winograd's algorithm, as MLX does"
    )
    parser.add_argument("--kernels", action="store_true", help="also the bytes of each kind of kernel")
    args = parser.parse_args()
    examples = None if args.mlx_examples is None else workers.find_examples(args.mlx_examples)
    columns = ("this library",) if examples is None else ("this library", "mlx-examples")
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            path = Path(folder) / case.shape
            if not path.exists():
                workers.write_checkpoint(path, case)
            for column in columns:
                found = workers.count(column, case, path, examples)
                if "failed" in found:
                    raise SystemExit(f"{name}, {column}: {found['failed']}")
                counts[name, column] = found["winograd"] if args.winograd else found
    print(table(counts))
    if args.kernels:
        for (name, column), found in counts.items():
            print(f"\n{name}, {column}, number and GB by kind:")
            for kind, (number, moved) in sorted(found["kinds"].items(), key=lambda entry: -entry[1][1])[:12]:
                print(f"  {kind:24}{number:6}{moved / 1e9:9.2f}")


def table(counts: dict[tuple[str, str], workers.Result]) -> str:
    """A table of the work, and one of the model's times."""
    chips = next(iter(counts.values()))["model"]
    work = ["| | | kernels | bytes moved | FLOP |", "| --- | --- | --- | --- | --- |"]
    model = [f"| | | {' | '.join(chips)} |", "| --- | --- |" + " --- |" * len(chips)]
    for (name, column), found in counts.items():
        other = counts.get((name, "mlx-examples"), found)

        def share(mine: float, theirs: float, beside: bool = other is not found) -> str:
            return f" ({mine / theirs:.2f})" if beside else ""

        values = (("kernels", 1, "{:,.0f}"), ("moved", 1e9, "{:.2f} GB"), ("flops", 1e12, "{:.3f} T"))
        cells = [shown.format(found[key] / unit) + share(found[key], other[key]) for key, unit, shown in values]
        work.append(f"| {name} | {column} | {' | '.join(cells)} |")
        cells = [f"{found['model'][chip]:.3g} s" + share(found["model"][chip], other["model"][chip]) for chip in chips]
        model.append(f"| {name} | {column} | {' | '.join(cells)} |")
    return "\n".join([*work, "", *model])


if __name__ == "__main__":
    main()

"""Measure time and peak memory of decoding and encoding a picture, beside mlx-examples.

    python -m benchmarks.vae [--sizes 512 1024] [--encode] [--repeats 3] [--mlx-examples DIR] [--seam]

The autoencoder is that of Stable Diffusion at full size, in float32, with random weights, which cost as much as trained
ones. DIR is a clone of ml-explore/mlx-examples, or its folder stable_diffusion. What is compared alternates, so that
a machine that is busy for a while is so for both. Times are medians; memory is the most that MLX took beside the
weights. ``--seam`` decodes in tiles too, and says how far they are from the whole and whether they show.
"""

import argparse
import importlib
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from stable_diffusion import StableDiffusion  # noqa: F401, before MLX: it brings OpenBLAS, where there is one

# isort: split
import mlx.core as mx

from stable_diffusion.models.tiling import blend_tiles, decode, encode, in_slices, plan, spans
from stable_diffusion.models.vae import AutoencoderKL

from .long_prompts import cost, random_module
from .shapes import VAE

_ROWS = 16  # height of a slice, where tiles are compared with the whole


def theirs(folder: Path) -> Any:
    """Return the autoencoder of mlx-examples, whose package has the name of this one."""
    inner = folder / "stable_diffusion"
    sys.path.insert(0, str(inner if (inner / "txt2image.py").exists() else folder))
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "stable_diffusion"}
    config, vae = (importlib.import_module(f"stable_diffusion.{name}") for name in ("config", "vae"))
    for name in [name for name in sys.modules if name.split(".")[0] == "stable_diffusion"]:
        del sys.modules[name]
    sys.modules.update(ours)
    widths = tuple(VAE["block_out_channels"])
    channels = {"latent_channels_in": 4, "latent_channels_out": 8}
    return vae.Autoencoder(config.AutoencoderConfig(block_out_channels=widths, layers_per_block=2, **channels))


def seam(vae: AutoencoderKL, z: mx.array, side: int) -> str:
    """Describe how tiles differ from the whole, in levels of 255, and the largest mean steps at seams and elsewhere."""
    run = partial(in_slices, vae.decoder.layers, rows=_ROWS)
    whole, tiled = vae.decode(z, run), vae.decode(z, lambda z: blend_tiles(run, z, side, 1, 8))
    steps = mx.abs(tiled[:, 1:] - tiled[:, :-1]).mean(axis=(0, 2, 3)).tolist()
    edges = {8 * e - 1 for start, end in spans(z.shape[1], side) for e in (start, end)} & set(range(len(steps)))
    at, elsewhere = max(steps[e] for e in edges), max(s for i, s in enumerate(steps) if i not in edges)
    levels = mx.abs(tiled - whole) * 127.5
    return (
        f"tiles of {8 * side}: {levels.mean().item():.2f} levels from the whole, at most {levels.max().item():.1f}; "
        f"largest step at a seam {127.5 * at:.2f}, elsewhere {127.5 * elsewhere:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512])
    parser.add_argument("--encode", action="store_true", help="encode instead of decode")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mlx-examples", type=Path, metavar="DIR")
    parser.add_argument("--seam", action="store_true", help="compare tiles with the whole")
    args = parser.parse_args()
    mx.random.seed(0)
    vaes = {"this library": random_module("vae", VAE)}
    if args.mlx_examples:
        vaes["mlx-examples"] = theirs(args.mlx_examples)
    mx.eval([vae.parameters() for vae in vaes.values()])
    for size in args.sizes:
        z, x = mx.random.normal((1, size // 8, size // 8, 4)), mx.random.normal((1, size, size, 3))
        mx.eval(z, x)
        of = {name: partial(vae.encode, x) if args.encode else partial(vae.decode, z) for name, vae in vaes.items()}
        ours = vaes["this library"]
        of["this library"] = partial(encode, ours, x) if args.encode else partial(decode, ours, z)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in of}
        for i in range(args.repeats):
            for name in list(of)[:: 1 if i % 2 == 0 else -1]:
                runs[name].append(cost(of[name], time.perf_counter, 1))
        for name, costs in runs.items():
            times, peaks = zip(*costs, strict=True)
            print(
                f"{size} x {size}  {name:12}  {statistics.median(times):7.2f} s ({min(times):.2f} ... {max(times):.2f})"
                f"  {max(peaks) / 1e9:6.3f} GB",
                flush=True,
            )
        half, shape = ("encoder", x.shape) if args.encode else ("decoder", z.shape)
        expected = plan(ours.config, half, shape).peak
        print(f"{size} x {size}  this library expected {expected / 1e9:.3f} GB")
        if args.seam:
            print(f"{size} x {size}  {seam(ours, z, size // 16)}", flush=True)


if __name__ == "__main__":
    main()

"""Compute how long many pictures take on several Macs, and where sharing them stops paying.

    python -m benchmarks.fleet [--seconds 20] [--pictures 64] [--size 1024] [--macs 1 2 4 8] [--link ethernet]
    python -m benchmarks.fleet --picture docs/pictures/fleet.png
    python -m benchmarks.fleet --measure

The first two compute; nothing is measured. A Mac that makes n pictures takes its start and n times the seconds of one.
Gathering sends the pixels of one picture of each Mac around the ring, and then of the next; the two rows of guidance
on two Macs send the UNet's output in each step. ``--seconds`` is the time of a picture on one Mac, as txt2image prints
it with -v.

--measure draws with the bundled model, on one core: in one process, and in two that share the pictures.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Link:
    """Hold the bytes a second that a link carries, and the seconds until the first of them arrives."""

    rate: float
    latency: float


# Nominal rates less a tenth; RDMA over Thunderbolt 5 is told at 80 Gb/s and below 10 microseconds (Apple, macOS 26.2).
LINKS = {
    "wifi": Link(30e6, 5e-3),
    "ethernet": Link(112e6, 3e-4),
    "ethernet10": Link(1.12e9, 1e-4),
    "thunderbolt": Link(9e9, 1e-5),
}
START = 15.0  # seconds until a Mac has read a model from its disk: 7 GB at 0.5 GB/s
_PORT = 47311  # of the first process, where two are measured
CURVE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100)


@dataclass(frozen=True)
class Job:
    """Hold a job: a number of pictures of ``size`` pixels a side, each in ``seconds`` and ``steps`` on one Mac."""

    pictures: int = 64
    seconds: float = 20.0
    size: int = 1024
    steps: int = 30
    start: float = START

    def even(self, macs: int) -> float:
        """Return the seconds until the last Mac is done: it makes one picture more where they do not divide."""
        return self.start + -(-self.pictures // macs) * self.seconds

    def gathering(self, macs: int, link: Link) -> float:
        """Return the seconds in which the pixels of all pictures go around the ring, to the first Mac and all others.

        Each time one picture of each Mac goes over each link but one, in M - 1 messages, after as many small ones.
        """
        return -(-self.pictures // macs) * (macs - 1) * (3 * self.size**2 / link.rate + 2 * link.latency)

    def guidance(self, link: Link, share: float = 0.9) -> float:
        """Return the seconds where two Macs have a row each; ``share`` of a picture's time is the UNet's."""
        output = 4 * 4 * (self.size // 8) ** 2  # float32, four channels
        exchange = self.steps * (output / link.rate + 2 * link.latency)
        one = self.seconds * (share / 2 + 1 - share) + exchange
        return self.start + self.pictures * one


def pays_up_to(job: Job, link: Link, most: int = 100) -> int:
    """Return the number of Macs beyond which another one makes the whole job, gathered, no faster."""
    times = [job.even(macs) + job.gathering(macs, link) for macs in range(1, most + 1)]
    return 1 + times.index(min(times))


def table(job: Job, macs: Sequence[int], link: str) -> None:
    """Print the time of a job on each number of Macs, and its ratio to one Mac."""
    alone = job.even(1)
    work = f"{job.pictures} pictures of {job.size} x {job.size}, {job.seconds:g} s each"
    print(f"{work}, over {link}: computed, not measured")
    print(f"{'Macs':>6}{'time':>12}{'faster':>9}{'with gathering':>18}{'faster':>9}")
    for count in macs:
        shared = job.even(count)
        whole = shared + job.gathering(count, LINKS[link])
        print(f"{count:6}{shared:10.0f} s{alone / shared:9.2f}{whole:16.0f} s{alone / whole:9.2f}")
    pair = job.guidance(LINKS[link])
    print(f"two Macs on each picture (--share guidance): {pair:.0f} s, {alone / pair:.2f} times as fast")
    print(f"gathered, the job is done first with {pays_up_to(job, LINKS[link])} Macs of at most 100")


def draw(job: Job, path: Path) -> None:
    """Draw how much faster a job is done, up to 100 Macs, for several numbers of pictures and links."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(CURVE, CURVE, color="0.8", label="as many times as Macs")
    for pictures in (16, 64, 256, 1024):
        some = Job(pictures, job.seconds, job.size, job.steps, job.start)
        axes.plot(CURVE, [some.even(1) / some.even(macs) for macs in CURVE], marker=".", label=f"{pictures} pictures")
        gathered = [some.even(1) / (some.even(macs) + some.gathering(macs, LINKS["ethernet"])) for macs in CURVE]
        axes.plot(CURVE, gathered, linestyle=":", color=axes.lines[-1].get_color())
    axes.set(xscale="log", yscale="log", xlabel="Macs", ylabel="times as fast as one")
    axes.set_title(f"{job.seconds:g} s a picture; dotted: gathered over Ethernet. Computed, not measured", fontsize=10)
    axes.set_xticks((1, 2, 4, 8, 16, 32, 64, 100), ("1", "2", "4", "8", "16", "32", "64", "100"))
    axes.set_yticks((1, 2, 4, 8, 16, 32, 64), ("1", "2", "4", "8", "16", "32", "64"))
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def measure(pictures: int, steps: int) -> None:
    """Print the pictures a second of one process on one core, and of two on two cores, with the bundled model.

    The two are started without ``mlx.launch``, which keeps a core of this machine busy itself (MLX 0.32).
    """
    rates = [_rate(processes, pictures, steps) for processes in (1, 2)]
    print(f"one process   {rates[0]:8.2f} pictures/s\ntwo processes {rates[1]:8.2f} pictures/s")
    print(f"ratio {rates[1] / rates[0]:.2f}")


def _rate(processes: int, pictures: int, steps: int) -> float:
    """Return the pictures a second from the first of each process on, or starting would count."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "txt2image.py", "a red circle", "--model", "tiny", "--steps", str(steps)]
        program += ["--seed", f"1-{pictures}", "--batch_size", "1", "--output", f"{folder}/{{seed}}.png", "--no_grid"]
        hosts = Path(folder, "hosts.json")
        hosts.write_text(json.dumps([[f"127.0.0.1:{_PORT + rank}"] for rank in range(processes)]))
        ranks = [
            {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)
        ]
        options = {"cwd": Path(__file__).parents[1], "stdout": subprocess.DEVNULL}
        started = [subprocess.Popen(program, env=environment | rank, **options) for rank in ranks]
        for process in started:
            process.wait()
        written = sorted(path.stat().st_mtime for path in Path(folder).glob("*.png"))
        if len(written) < pictures:
            raise SystemExit(f"{processes} processes made {len(written)} of {pictures} pictures")
        return (pictures - processes) / (written[-1] - written[processes - 1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="a picture on one Mac (20)")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--size", type=int, default=1024, help="side in pixels (1024)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--start", type=float, default=START, help="seconds until a Mac has read the model (15)")
    parser.add_argument("--macs", type=int, nargs="+", default=[1, 2, 3, 4, 8, 16, 32, 64, 100])
    parser.add_argument("--link", choices=LINKS, default="ethernet")
    parser.add_argument("--picture", type=Path, help="draw the curve to 100 Macs into this file")
    parser.add_argument("--measure", action="store_true", help="measure one and two processes on this machine")
    args = parser.parse_args(argv)
    job = Job(args.pictures, args.seconds, args.size, args.steps, args.start)
    if args.measure:
        measure(args.pictures, args.steps)
    elif args.picture is not None:
        draw(job, args.picture)
    else:
        table(job, args.macs, args.link)


if __name__ == "__main__":
    main()

"""Time the start: the package's import beside MLX's own, and a script that only shows its help.

    python -m benchmarks.start

Times are processor seconds, the least of several starts, so that a busy machine changes little.
"""

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STARTS = {
    "import mlx.core, mlx.nn": ("-c", "import mlx.core, mlx.nn"),
    "import stable_diffusion": ("-c", "import stable_diffusion"),
    "txt2image.py --help": ("txt2image.py", "--help"),
}


def seconds(*arguments: str, repeats: int = 5) -> float:
    """Return the processor time that Python takes with these arguments."""
    times = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


if __name__ == "__main__":
    for name, arguments in STARTS.items():
        print(f"{name:26} {seconds(*arguments):.2f} s")

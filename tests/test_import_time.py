"""What it costs to start: the package's import beside MLX's own, and a script that only shows its help.

Time is what the processor spent, the least of several starts, so that a busy machine changes little.
"""

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def cost(*arguments: str) -> float:
    """Seconds of processor time that Python takes with these arguments."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(4):
        before = spent()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, timeout=60)
        times.append(spent() - before)
    return min(times)


def test_import():
    assert cost("-c", "import stable_diffusion") <= cost("-c", "import mlx.core, mlx.nn") + 0.35


def test_help():
    assert cost("txt2image.py", "--help") <= 0.6


def test_what_is_rarely_needed_is_not_imported():
    """The Hub's client and the progress bar wait until somebody asks for them."""
    program = "import sys, stable_diffusion; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert "stable_diffusion.pipeline" in loaded
    assert not loaded & {"huggingface_hub", "tqdm", "torch", "requests", "httpx", "multiprocessing"}

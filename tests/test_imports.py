"""Importing the package brings in nothing that is rarely needed; what it costs is printed by benchmarks.start."""

import subprocess
import sys

from command_line import ROOT


def test_what_is_rarely_needed_is_not_imported():
    """The Hub's client and the progress bar wait until somebody asks for them."""
    program = "import sys, stable_diffusion; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert "stable_diffusion.pipeline" in loaded
    assert not loaded & {"huggingface_hub", "tqdm", "torch", "requests", "httpx", "multiprocessing", "argparse"}

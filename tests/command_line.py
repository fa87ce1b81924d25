"""The scripts as tests call them: in this process or in one of their own, and what they leave behind."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from stable_diffusion.cli import main as cli

ROOT = Path(__file__).parents[1]
SCRIPTS = {"txt2image": cli.txt2image, "image2image": cli.image2image, "unconditional": cli.unconditional}
PROMPT = "the red cat"


@dataclass
class Finished:
    """A run that is over: its exit code, the lines of stdout, stderr, and stderr's lines that are no progress bar."""

    code: int
    out: list[str]
    err: str

    @property
    def remarks(self) -> list[str]:
        return [line for line in re.split(r"[\r\n]", self.err) if line.strip() and not re.search(r"\d+%\|", line)]

    def failed(self, code: int, *words: str) -> None:
        """It ended with ``code`` and one line that holds all of ``words``."""
        assert self.code == code, self.err
        assert len(self.remarks) == 1, self.err
        assert re.match(r"\S+: error: ", self.remarks[0])
        assert not [word for word in words if word not in self.remarks[0]], self.remarks[0]

    def refused(self, *words: str) -> None:
        """It did nothing but say so."""
        self.failed(2, *words)
        assert self.out == [] and self.err.count("\n") == 1 and self.err.endswith("\n")

    def succeeded(self) -> "Finished":
        assert self.code == 0, self.err
        return self


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image).astype(int)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def process(script: str, *argv) -> Finished:
    """Run a script as its users do, with warnings as errors."""
    command = [sys.executable, "-W", "error", f"{script}.py", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return Finished(done.returncode, done.stdout.splitlines(), done.stderr)

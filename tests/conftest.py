"""Checkpoints that many tests share: made once, read only."""

from pathlib import Path

import diffusers
import pytest

import stable_diffusion  # noqa: F401  (first: it brings OpenBLAS before anything brings MLX)
from checkpoints import SCALED, make


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory) -> Path:
    """A random SD 1 checkpoint with the DDIM scheduler of the published ones."""
    folder = tmp_path_factory.mktemp("sd1") / "sd"
    make(folder, "sd1", diffusers.DDIMScheduler(**SCALED, set_alpha_to_one=False, steps_offset=1, clip_sample=False))
    return folder


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory) -> Path:
    """A random XL checkpoint with SDXL-Turbo's scheduler."""
    folder = tmp_path_factory.mktemp("xl") / "xl"
    make(folder, "xl", diffusers.EulerAncestralDiscreteScheduler(**SCALED, timestep_spacing="trailing"))
    return folder

"""Checkpoints as single files, made once and read only."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

Made = Callable[[str], tuple[Path, dict[str, np.ndarray]]]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Made:
    """`made(family)`: (folder in diffusers layout, the same as tensors of a single file), made once."""
    from weights.formats.test_single_file import make_both

    return cache(lambda family: make_both(tmp_path_factory.mktemp(family), family))


@pytest.fixture
def single(tmp_path, made) -> Callable[..., Path]:
    """`single(family, more tensors, metadata)`: a file of a checkpoint, perhaps with other tensors."""
    from weights.formats.test_single_file import saved

    def write(family: str, more: dict | None = None, metadata: dict | None = None) -> Path:
        return saved(tmp_path / "model.safetensors", made(family)[1] | (more or {}), metadata)

    return write

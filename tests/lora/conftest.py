"""Models of both families, read once: a test that changes one puts it back."""

from collections.abc import Callable
from pathlib import Path

import pytest

import loras


@pytest.fixture(scope="session")
def sd1(sd1_folder) -> loras.Model:
    return loras.load(sd1_folder, "sd1")


@pytest.fixture(scope="session")
def xl(xl_folder) -> loras.Model:
    return loras.load(xl_folder, "xl")


@pytest.fixture(params=["sd1", "xl"])
def model(request) -> loras.Model:
    return request.getfixturevalue(request.param)


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Write tensors to a file of a LoRA."""
    return lambda tensors, name="lora.safetensors": loras.write(tmp_path, tensors, name)

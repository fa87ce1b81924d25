"""The version: said here, read by ``pyproject.toml``, ``--version`` and what is written into images."""

__version__ = "0.1.0"

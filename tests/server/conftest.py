"""One server for the tests of this folder that need nothing special of it."""

from collections.abc import Iterator

import pytest

from serving import Server, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server on the bundled model."""
    with serving() as started:
        yield started

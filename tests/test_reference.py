"""The reference of Python: fresh, complete, and with the signatures of the source."""

import stable_diffusion
from stable_diffusion.networks import Networks
from tools import reference


def test_the_page_is_fresh():
    text = reference.DOCUMENT.read_text(encoding="utf-8")
    assert text == reference.page(), "docstrings have changed: run python -m tools.reference"


def test_all_that_is_public_or_used_in_the_page_of_tasks_is_in_it():
    names = {name for section in reference.SECTIONS.values() for name in section}
    public = set(stable_diffusion.__all__) - {"__version__", *reference.ALIASES}
    assert public | reference.imported() <= names
    assert reference.imported() >= {"StableDiffusion", "images.canny.canny", "models.cpu.tune"}


def test_signatures_are_those_of_the_source():
    assert reference.signature(Networks.decode) == "decode(x_t: mx.array, *, seamless: str | None = None) -> mx.array"
    shown = reference.signature(Networks.__init__, "Networks")
    assert (
        shown.startswith("Networks(\n    checkpoint: Checkpoint,\n") and "    lora_partial: bool = False,\n)" in shown
    )


def test_docstrings_become_markdown():
    def function(a, b):
        """Do a_thing with ``a`` * 2; see :func:`other.place`.

        Args:
            a, b: numbers
                in two lines.

        Raises ValueError for None.
        """

    assert list(reference._text(function.__doc__)) == [
        "Do a_thing with `a` \\* 2; see `place`.",
        "",
        "Arguments:",
        "",
        "* `a`, `b`: numbers in two lines.",
        "",
        "Raises ValueError for `None`.",
        "",
    ]

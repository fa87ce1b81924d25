"""The examples do what they say, with the bundled model and fewer steps."""

import base64
import io
import json
import re
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from examples import live_preview
from stable_diffusion import StableDiffusion
from tools import notebook


@pytest.fixture
def few_steps(monkeypatch) -> None:
    """No run takes more than four steps."""
    generate = StableDiffusion.generate_latents

    def fewer(sd, *args, num_steps=None, **given):
        return generate(sd, *args, num_steps=4, **given)

    monkeypatch.setattr(StableDiffusion, "generate_latents", fewer)


def middle(image: Image.Image) -> np.ndarray:
    """The mean colour of the middle of a picture."""
    return np.asarray(image.crop((28, 28, 36, 36)), dtype=float).mean(axis=(0, 1))


def stored(cell: dict) -> Image.Image | None:
    """The image that a cell of the notebook shows, as the file has it."""
    found = [output["data"]["image/png"] for output in cell["outputs"] if "data" in output]
    return Image.open(io.BytesIO(base64.b64decode(found[0]))) if found else None


def test_the_walkthrough_runs_without_jupyter(monkeypatch):
    """With fewer steps than in the file. Each cell shows an image of the size that is stored."""
    content = json.loads(notebook.NOTEBOOK.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    monkeypatch.chdir(notebook.NOTEBOOK.parent)
    results, shown = list(notebook.run(content["cells"], STEPS=3, TRAINING_STEPS=2)), 0
    names = results[-1][1]
    for cell, _, _, value in results:
        image = stored(cell)
        if image is not None:
            shown += 1
            assert image.height == value.height and (image.width == value.width or "previews" in str(cell["source"]))
    assert shown == 14 and len(names["losses"]) == 2
    assert names["first"].size == (64, 64) and names["latents"].predicted.shape == (1, 16, 16, 4)
    assert np.abs(np.asarray(names["first"], float) - np.asarray(names["four"][0])).max() <= 2
    assert len({image.tobytes() for image in names["scaled"]}) == 4  # the file that was saved has an effect
    first, last = middle(names["between_prompts"][0]), middle(names["between_prompts"][-1])
    assert first[0] > first[1] + 60 and last[1] > last[0] + 30  # from red to green
    assert mx.abs(names["noise"].std(axis=(1, 2, 3)) - 1).max() < 0.1  # mixed noise has variance 1


def test_the_images_in_the_walkthrough_are_those_of_its_cells():
    """The first image is drawn again as the file says; python -m tools.notebook stores all of them."""
    content = json.loads(notebook.NOTEBOOK.read_text(encoding="utf-8"))
    *_, (cell, _, _, value) = islice(notebook.run(content["cells"]), 3)
    assert np.abs(np.asarray(stored(cell), float) - np.asarray(value)).max() <= 2
    assert notebook.outputs("a\nb", value, 3)[0]["text"] == ["a\n", "b"]
    assert notebook.NOTEBOOK.stat().st_size < 600_000


def test_live_preview_draws_over_itself(few_steps, tmp_path, capsys):
    output = tmp_path / "live.png"
    live_preview.main(["a red circle on a blue background", "--columns", "16", "--output", str(output)])
    shown = re.split(r"\x1b\[9A", capsys.readouterr().out)
    assert len(shown) == 4 + 1 and shown[-1].splitlines()[-1] == str(output)
    assert [picture.splitlines()[-1] for picture in shown[:-1]] == [f"step {i}" for i in (1, 2, 3, 4)]
    for picture in shown:
        lines = picture.splitlines()[:-1]
        assert len(lines) == 8 and all(line.count("▀") == 16 and line.endswith("\x1b[0m") for line in lines)
    with Image.open(output) as image:
        small = np.asarray(image.resize((16, 16)))
    (r, g, b), (red, green, blue) = small[8, 8], small[9, 8]
    assert f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{red};{green};{blue}m▀" in shown[-1].splitlines()[4]

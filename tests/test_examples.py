"""The examples do what they say, with the bundled model and fewer steps."""

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from examples import live_preview
from stable_diffusion import StableDiffusion

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def few_steps(monkeypatch) -> None:
    """No run takes more than four steps."""
    generate = StableDiffusion.generate_latents

    def fewer(sd, *args, num_steps=None, **given):
        return generate(sd, *args, num_steps=4, **given)

    monkeypatch.setattr(StableDiffusion, "generate_latents", fewer)


def cells(name: str) -> list[str]:
    """The code of a notebook, which holds no pictures."""
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def middle(image: Image.Image) -> np.ndarray:
    """The mean colour of the middle of a picture."""
    return np.asarray(image.crop((28, 28, 36, 36)), dtype=float).mean(axis=(0, 1))


def test_the_walkthrough_runs_without_jupyter(few_steps, capsys):
    names: dict = {}
    for code in cells("walkthrough.ipynb"):
        exec(compile(code, "walkthrough.ipynb", "exec"), names)  # a notebook's cells share their names
    assert capsys.readouterr().out.splitlines() == ["(536, 128)"] * 4
    red, _, blue = middle(names["first"])
    assert names["first"].size == (64, 64) and red > 150 > 100 > blue
    assert names["latents"].predicted.shape == (1, 16, 16, 4)

    seeds, prompts = names["between_seeds"], names["between_prompts"]
    assert len(seeds) == len(prompts) == 6 and {image.size for image in seeds + prompts} == {(64, 64)}
    first, last = middle(prompts[0]), middle(prompts[-1])
    assert first[0] > first[1] + 60 and last[1] > last[0] + 30  # from red to green
    *_, x = names["sd"].generate_latents("a large yellow star", seed=1, latents=names["noise"][:1], sampler="dpmpp_2m")
    alone = np.asarray(names["to_images"](names["sd"].decode(x))[0], dtype=float)
    assert np.abs(alone - np.asarray(seeds[0])).max() <= 2  # the way begins at the first seed's picture
    assert mx.abs(names["noise"].std(axis=(1, 2, 3)) - 1).max() < 0.1  # and keeps to noise


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

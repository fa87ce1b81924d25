"""The folders are the architecture: each imports only from those before it, and third-party packages have one home."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tools import draw_architecture

PACKAGE = Path(__file__).parents[1] / "stable_diffusion"
LIBRARY = {"files", "models", "images", "text", "diffusion", "weights", "lora"}
MAY_IMPORT = {
    "files": set(),
    "models": set(),
    "images": {"files"},
    "text": {"files", "models"},
    "diffusion": {"models", "text"},
    "weights": {"files", "models"},
    "lora": {"files", "models", "weights"},
    "": LIBRARY,  # pipeline, options, networks
    "training": LIBRARY | {""},
    "app": LIBRARY | {"", "training"},
    "server": LIBRARY | {"", "app"},
    "cli": LIBRARY | {"", "training", "app", "server"},
}
HOMES = {"huggingface_hub": {"weights"}, "regex": {"text"}, "tqdm": {"app"}, "argparse": {"cli"}, "tomllib": {"cli"}}
HOMES |= {"numpy": {"images", "diffusion", "app"}, "PIL": {"images", "app", "server", ""}, "matplotlib": {"app"}}
HOMES |= {name: {"server"} for name in ("fastapi", "starlette", "uvicorn")}
FILES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py"]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_folder_imports_only_from_those_before_it(file):
    here = file.parts[0] if len(file.parts) > 1 else ""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*file.parts[: len(file.parts) - node.level], *filter(None, (node.module or "").split("."))]
            for name in (".".join([*base, alias.name]) for alias in node.names):
                folder = name.split(".")[0] if (PACKAGE / name.split(".")[0]).is_dir() else ""
                assert folder == here or folder in MAY_IMPORT[here], f"{name} at line {node.lineno}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for name in [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
                assert here in HOMES.get(name.split(".")[0], {here}), f"{name} at line {node.lineno}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_files_and_functions_are_short(file):
    text = (PACKAGE / file).read_text(encoding="utf-8")
    assert text.count("\n") <= 420
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 45, node.name


@pytest.mark.parametrize(("files", "most"), [("training/*.py", 900), ("app/sharing.py", 250), ("server/*.py", 700)])
def test_what_must_stay_small_does(files, most):
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in PACKAGE.glob(files)) <= most


def test_what_is_rarely_needed_is_not_imported():
    """What the import costs is printed by benchmarks.start."""
    program = [sys.executable, "-c", "import sys, stable_diffusion; print(*sys.modules)"]
    done = subprocess.run(program, cwd=PACKAGE.parent, check=True, capture_output=True, text=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "stable_diffusion.pipeline" in loaded
    assert not loaded & {"huggingface_hub", "tqdm", "torch", "requests", "httpx", "multiprocessing", "argparse"}


def test_the_picture_shows_the_imports_of_today():
    with Image.open(draw_architecture.PICTURE) as picture:
        assert picture.text["architecture"] == draw_architecture.described(), "run python -m tools.draw_architecture"


def test_the_picture_omits_arrows_that_follow_from_others():
    arrows = {"top": {"middle", "bottom"}, "middle": {"bottom"}, "bottom": set()}
    assert draw_architecture.direct(arrows) == {"top": {"middle"}, "middle": {"bottom"}, "bottom": set()}
    assert draw_architecture.layers(draw_architecture.direct(arrows)) == [(("top",),), (("middle",),), (("bottom",),)]

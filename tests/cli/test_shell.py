"""What a shell sees: the commands under one name, their help, completion by argcomplete, and the installed package."""

import os
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest

from command_line import ROOT, names, pixels
from stable_diffusion import __main__, __version__
from stable_diffusion.cli import arguments, convert, inspect
from stable_diffusion.cli.parser import script_parser

PARSERS = {
    "txt2image": script_parser("txt2image", "txt2image.py"),
    "image2image": script_parser("image2image", "image2image.py"),
    "convert": convert.make_parser(),
    "inspect": inspect.make_parser(),
}


def flags(command: str) -> list[str]:
    return [name for action in PARSERS[command]._actions for name in action.option_strings]


# --- one name for all ------------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys):
    """Call ``python -m stable_diffusion`` in this process: (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = __main__.run(words)
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    return call


def test_the_commands_are_listed(call):
    code, out, _ = call("--help")
    listed = [line.split()[0] for line in out.partition("commands:\n")[2].splitlines()]
    assert code == 0 and listed == list(PARSERS)
    assert len({line.index(line.split()[1]) for line in out.partition("commands:\n")[2].splitlines()}) == 1


@pytest.mark.parametrize("words", [[], *([command] for command in PARSERS)])
def test_the_version(call, words):
    assert call(*words, "--version") == (0, f"stable-diffusion-mlx {__version__}\n", "")


@pytest.mark.parametrize("command", PARSERS)
def test_each_command_has_its_help_and_its_errors(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0 and out.startswith(f"usage: python -m stable_diffusion {command} ")
    code, out, err = call(command, "--nothing")
    assert (code, out) == (2, "") and err.startswith(f"python -m stable_diffusion {command}: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words, said", [([], "required: command"), (["draw"], "'draw' (choose from"), (["-x"], "required: command")]
)
def test_no_such_command(call, words, said):
    code, out, err = call(*words)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err


def test_a_command_does_what_the_script_does(call, tmp_path):
    out = tmp_path / "out.png"
    run = ("a red circle", "--model", "tiny", "--steps", "1", "--n_images", "1", "--seed", "3", "--output", str(out))
    assert call("txt2image", *run)[:2] == (0, f"{out} seed 3\n")
    code, said, _ = call("inspect", str(out))
    assert code == 0 and "a red circle" in said
    code, said, _ = call("convert", "tiny", str(tmp_path / "half"))
    assert (code, said) == (0, f"{tmp_path}/half\n") and "unet" in names(tmp_path / "half")


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", PARSERS)
def test_help_fits_into_a_terminal(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    text = PARSERS[command].format_help()
    assert [line for line in text.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("command", ["txt2image", "image2image"])
def test_help_is_in_groups_that_say_what_they_are_for(command):
    usual, *groups = (group for group in PARSERS[command]._action_groups if group._group_actions)
    assert {action.dest for action in usual._group_actions} <= {"image", "prompt"}
    titles = [group.title for group in groups[1:]]
    assert titles[:2] == ["picture", "prompt"] and {"model", "memory and time", "output"} <= set(titles)
    assert [group.title for group in groups[1:] if not group.description] == []
    assert [action.dest for group in groups for action in group._group_actions if not action.help] == []


@pytest.mark.parametrize("command", ["txt2image", "image2image"])
def test_the_examples_of_the_help_are_right(command):
    parser = PARSERS[command]
    text = parser.format_help()
    examples = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith(f"  {parser.prog} ")]
    assert len(examples) == 3
    for _, words in examples:
        ((request, _),) = arguments.read(command, shlex.split(words)).lines
        assert request.prompt.startswith("a ")
    assert all(code in text for code in (" 0 ", " 1 ", " 2 ", " 130 "))


# --- completion ------------------------------------------------------------------------------------------------------

COMPLETED = [
    ("txt2image.py --samp", ["--sampler"]),
    ("txt2image.py --prediction v", ["v_prediction"]),
    ("image2image.py photo.jpg --stre", ["--strength"]),
    ("txt2image.py --stre", []),
]


@pytest.mark.parametrize("line, words", COMPLETED)
def test_argcomplete_completes(tmp_path, line, words):
    """As a shell calls it: the words come out on a file descriptor that the environment names."""
    script = line.split()[0]
    environment = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "|"}
    environment |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words")}
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=os.environ | environment, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [word.strip() for word in (tmp_path / "words").read_text().split("|") if word.strip()]
    assert found == words
    assert "PYTHON_ARGCOMPLETE_OK" in (ROOT / script).read_text()[:1024]


# --- installed -------------------------------------------------------------------------------------------------------


def test_the_wheel_works_in_another_folder(tmp_path):
    """The package as pip installs it, far from this folder: its data are there, and its commands make pictures."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "stable_diffusion", source / "stable_diffusion", ignore=shutil.ignore_patterns("__pycache__")
    )
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, tmp_path], cwd=source, check=True, timeout=120, capture_output=True, text=True
    )
    assert "_Warning" not in done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"stable_diffusion_mlx-{__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("stable_diffusion/")}
        archive.extractall(site)
    there = {path.relative_to(source).as_posix() for path in (source / "stable_diffusion").rglob("*") if path.is_file()}
    assert packed == there and any(name.startswith("stable_diffusion/tiny/controlnet/") for name in packed)

    def installed(name: str, *words: str) -> list[str]:
        program = (
            "import sys; from importlib.metadata import entry_points; "
            "(found,) = entry_points(group='console_scripts', name=sys.argv[0]); sys.exit(found.load()())"
        )
        start = f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv[0] = {name!r}; {program}"
        command = [sys.executable, "-W", "error", "-P" if sys.version_info >= (3, 11) else "-I", "-c", start, *words]
        done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    run = ("--model", "tiny", "--steps", "2", "--n_images", "1", "--seed", "1", "--output")
    assert installed("txt2image", "a red circle", *run, f"{tmp_path}/a.png") == [f"{tmp_path}/a.png seed 1"]
    control = ("--controlnet", "tiny", "--control_image", f"{tmp_path}/a.png", "--canny")
    made = installed("stable-diffusion", "txt2image", "a blue star", *control, *run, f"{tmp_path}/b.png")
    assert made == [f"{tmp_path}/b.png seed 1"]
    installed("image2image", f"{tmp_path}/a.png", "a blue circle", *run, f"{tmp_path}/c.png")
    assert all(pixels(tmp_path / f"{name}.png").shape == (64, 64, 3) for name in "abc")

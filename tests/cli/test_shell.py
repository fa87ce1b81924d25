"""What a shell sees: the commands under one name, their help, completion by argcomplete, and the installed package."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from command_line import ROOT, names, pixels
from stable_diffusion import StableDiffusion, __main__, __version__
from stable_diffusion.cli import arguments, check, convert, inspect, serve, train, upscale
from stable_diffusion.cli.parser import script_parser
from stable_diffusion.models import _OLDEST_MLX

PARSERS = {
    "txt2image": script_parser("txt2image", "txt2image.py"),
    "image2image": script_parser("image2image", "image2image.py"),
    "unconditional": script_parser("unconditional", "unconditional.py"),
    "convert": convert.make_parser(),
    "inspect": inspect.make_parser(),
    "upscale": upscale.make_parser(),
    "train": train.make_parser(),
    "serve": serve.make_parser(),
    "check": check.make_parser(),
}
HOW = {"strength", "hires_strength", "detail_strength"}  # whose help begins with "how much"
EVERYDAY = ["model", "negative_prompt", "seed", "steps", "cfg", "width", "height", "n_images", "output", "quantize"]


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
    listed = [line.split()[0] for line in out.split("commands:\n")[1].split("\n\n")[0].splitlines()]
    assert code == 0 and listed == list(PARSERS)


@pytest.mark.parametrize("command", PARSERS)
def test_each_command_has_its_version_its_help_and_its_errors(call, command):
    assert call(command, "--version") == call("--version") == (0, f"stable-diffusion-mlx {__version__}\n", "")
    code, out, _ = call(command, "--help")
    assert code == 0 and out.startswith(f"usage: python -m stable_diffusion {command} ")
    code, out, err = call(command, "--nothing")
    assert (code, out) == (2, "") and err.startswith(f"python -m stable_diffusion {command}: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("version", ["0.29", "0.32.2", "0.32.2.dev20260101+abcdef"])
def test_an_old_mlx_is_refused_in_one_line(call, run, monkeypatch, no_model, version):
    monkeypatch.setattr(mx, "__version__", version)
    said = f"MLX {version} is too old, 0.32.3 or newer is needed: pip install -U mlx"
    for command in PARSERS:
        code, out, err = call(command, *(["tiny", "x"] if command in ("convert", "image2image") else ["tiny"]))
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    run("txt2image", "a cat").refused(said)
    with pytest.raises(ImportError, match=r"0\.32\.3 or newer is needed"):
        StableDiffusion("tiny")


def test_the_requirements_ask_for_the_mlx_that_is_needed():
    for name in ("requirements.txt", "pyproject.toml"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if "mlx" in line and ">=" in line]
        assert len(lines) == 2 and all(f">={_OLDEST_MLX};" in line for line in lines)


def test_no_such_command(call):
    code, out, err = call("draw")
    assert (code, out, err.count("\n")) == (2, "", 1) and "'draw' is unknown; choose one of txt2image" in err


@pytest.mark.parametrize("command", ["", "txt2image", "image2image", "convert", "inspect", "upscale", "train"])
def test_no_arguments_print_the_usage_and_an_example(call, command):
    code, out, err = call(*command.split())
    lines = err.splitlines()
    assert (code, out) == (2, "") and len(lines) <= 4 and max(map(len, lines[:1] + lines[2:])) <= 80
    start = f"python -m stable_diffusion {command}".strip()
    assert lines[0].startswith(f"usage: {start} ") and lines[1].startswith(f"example: {start} ")


def test_check_needs_no_arguments():
    assert check.make_parser().parse_args([]).words == []


# --- streams that are closed, full or read by nobody -----------------------------------------------------------------

MAKE = "txt2image x --model tiny --width 64 --steps 1 --n_images 2 --output {}/a.png"
ALL = ["a.png", "a_1.png", "a_2.png"]
STREAMS = [  # a command and its redirections, the exit code, a word of the one line on stderr, what is written
    (f"{MAKE} >&-", 0, "the images are still written", ALL),
    (f"{MAKE} --json >/dev/full", 0, "No space left", ALL),
    (f"{MAKE} | head -0", 0, "Broken pipe", ALL),
    (f"{MAKE} 2>&-", 0, "", ALL),
    (f"{MAKE} <&- >&- 2>/dev/full", 0, "", ALL),
    ("txt2image x --width 3 2>/dev/full", 2, "", []),
    ("inspect tiny --json >/dev/full", 1, "No space left", []),
    ("inspect tiny --json | head -0", 141, "", []),
    ("check silu | head -0", 141, "", []),
    ("txt2image --list_samplers >&-", 1, "Bad file descriptor", []),
    ("convert tiny {}/a >&- 2>&-", 0, "", ["a"]),
]


@pytest.mark.parametrize("line, code, said, files", STREAMS)
def test_nothing_is_lost_because_nobody_reads(tmp_path, line, code, said, files):
    shell = ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m stable_diffusion {line.format(tmp_path)}"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, names(tmp_path)) == (code, files), done.stderr
    assert said in done.stderr and done.stderr.count("\n") == bool(said)


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", PARSERS)
def test_help_fits_into_a_terminal_and_leaves_no_flag_out(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    parser = PARSERS[command]
    lines = parser.format_help(has_all=True).splitlines()
    assert [line for line in [*lines, *parser.format_help().splitlines()] if len(line) > 80] == []
    shown = set(
        re.findall(r"--\w+", "\n".join(line.strip().split("  ")[0] for line in lines if line.startswith("  -")))
    )
    assert shown >= {name for action in parser._actions for name in action.option_strings[:1] if name[:2] == "--"}
    for action in parser._actions:
        assert action.help and not re.search(r"\([^()]*default(?!: [^()]+\)$)", action.help), action.dest
        assert not re.match(r"of |what |how |where |whether ", action.help) or action.dest in HOW, action.dest
        assert "SHARE" not in str(action.metavar)


def test_help_shows_the_everyday_flags_and_help_all_the_others(call):
    for script in ("txt2image", "image2image"):
        _, out, _ = call(script, "--help")
        short, _, rest = out.partition("\nadvanced: --help_all")
        assert re.findall(r"^  (?:-q, )?--(\w+)", short, re.MULTILINE) == EVERYDAY and rest
        assert "--controlnet" not in out and "--controlnet" in call(script, "--help-all")[1]


@pytest.mark.parametrize("command", ["txt2image", "image2image"])
def test_the_examples_of_the_help_are_right(command):
    parser = PARSERS[command]
    text, start = parser.format_help(), f"  python {parser.prog} "
    examples = [line.removeprefix(start) for line in text.splitlines() if line.startswith(start)]
    assert len(examples) == 3
    for words in examples:
        ((request, _),) = arguments.read(command, shlex.split(words)).lines
        assert request.prompt.startswith("a ")
    assert all(code in text for code in (" 0 ", " 1 ", " 2 ", " 130 "))


# --- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, found",
    [
        ("txt2image.py --prediction v", "v_prediction "),
        ("image2image.py photo.jpg --stre", "--strength "),
    ],
)
def test_argcomplete_completes(tmp_path, line, found):
    """As a shell calls it: the words come out on a file descriptor that the environment names."""
    script, words = line.split()[0], tmp_path / "words"
    environment = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "|"}
    environment |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(words)}
    subprocess.run([sys.executable, script], cwd=ROOT, env=os.environ | environment, timeout=60, check=True)
    assert words.read_text() == found
    assert "PYTHON_ARGCOMPLETE_OK" in (ROOT / script).read_text()[:1024]


# --- installed -------------------------------------------------------------------------------------------------------


def test_the_wheel_works_in_another_folder(tmp_path):
    """The package as pip installs it, far from this folder: its data are there, and its commands make pictures."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    package = source / "stable_diffusion"
    shutil.copytree(ROOT / package.name, package, ignore=shutil.ignore_patterns("__pycache__"))

    def python(code: str, *words, folder: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-W", "error", "-P", "-c", code, *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done

    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    assert "_Warning" not in python(build, tmp_path, folder=source).stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"stable_diffusion_mlx-{__version__}-py3-none-any")
    shutil.unpack_archive(wheel, site, "zip")
    packed, there = ({p.relative_to(root) for p in root.rglob("*.*")} for root in (site / package.name, package))
    assert packed == there and Path("tiny/controlnet/config.json") in packed

    def installed(name: str, *words) -> str:
        start = f"import sys; sys.path.insert(0, {str(site)!r}); from importlib.metadata import entry_points; "
        start += f"(found,) = entry_points(group='console_scripts', name={name!r}); sys.exit(found.load()())"
        return python(start, *words, folder=site).stdout

    run = ("--model", "tiny", "--steps", "2", "--n_images", "1", "--seed", "1", "--output")
    assert installed("txt2image", "a red circle", *run, tmp_path / "a.png") == f"{tmp_path}/a.png seed 1\n"
    control = ("--controlnet", "tiny", "--control_image", tmp_path / "a.png", "--canny")
    installed("stable-diffusion", "txt2image", "a blue star", *control, *run, tmp_path / "b.png")
    installed("image2image", tmp_path / "a.png", "a blue circle", *run, tmp_path / "c.png")
    assert all(pixels(tmp_path / f"{name}.png").shape == (64, 64, 3) for name in "abc")

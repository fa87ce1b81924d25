"""What a shell sees: the commands under one name, their help, the completion of flags, and the installed package."""

import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from command_line import ROOT, names, pixels
from stable_diffusion import __main__, __version__
from stable_diffusion.cli import arguments, completion, convert, inspect

PARSERS = {
    "txt2image": arguments.script_parser(False, "txt2image.py"),
    "image2image": arguments.script_parser(True, "image2image.py"),
    "convert": convert.make_parser(),
    "inspect": inspect.make_parser(),
    "completion": completion.make_parser(),
}


def flags(command: str) -> list[str]:
    return [name for action in PARSERS[command]._actions for name in action.option_strings]


# --- one name for all ------------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys):
    """Call ``python -m stable_diffusion`` in this process: (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = __main__.main(words)
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
        args = arguments.read(command == "image2image", shlex.split(words))[1]
        assert args.prompt.startswith("a ")
    assert all(code in text for code in (" 0 ", " 1 ", " 2 ", " 130 "))


# --- completion ------------------------------------------------------------------------------------------------------

# The words up to the cursor, and what completes the last of them.
COMPLETED = [
    (["txt2image", "--samp"], ["--sampler"]),
    (["./txt2image.py", "--samp"], ["--sampler"]),
    (["image2image", "photo.jpg", "a cat", "--stre"], ["--strength"]),
    (["txt2image", "--stre"], []),
    (["txt2image", "--n-im"], ["--n_images"]),
    (["txt2image", "--sampler", "dpmpp_2m"], ["dpmpp_2m", "dpmpp_2m_sde"]),
    (["txt2image", "--sampler", "=", "dpmpp_2s"], ["dpmpp_2s_a"]),
    (["txt2image", "--model", "sdxl-"], ["sdxl-turbo", "sdxl-base", "sdxl-refiner"]),
    (["txt2image", "--unet-bits", ""], ["2", "3", "4", "5", "6", "8"]),
    (["txt2image", "--output", "a"], []),  # files: bash completes them itself
    (["txt2image", "a"], []),
    (["stable-diffusion", "i"], ["image2image", "inspect"]),
    (["stable-diffusion", "convert", "--dt"], ["--dtype"]),
    (["stable-diffusion", "convert", "tiny", "there", "--dtype", "b"], ["bfloat16"]),
    (["stable-diffusion", "completion", ""], []),
]


def script(shell: str, folder: Path, capsys) -> Path:
    assert completion.main([shell]) == 0
    path = folder / shell
    path.write_text(capsys.readouterr().out)
    return path


def test_bash_completes(tmp_path, capsys):
    lines = [f"source {shlex.quote(str(script('bash', tmp_path, capsys)))}"]
    for words, _ in COMPLETED:
        lines.append(f"COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}")
        lines.append('_stable_diffusion; echo "${COMPREPLY[@]}"')
    lines.append("complete -p txt2image stable-diffusion")
    command = ["bash", "--norc", "-u", "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    out = done.stdout.splitlines()
    assert [line.split() for line in out[:-2]] == [found for _, found in COMPLETED] and done.stderr == ""
    assert all("-o default -F _stable_diffusion" in line for line in out[-2:])


@pytest.mark.parametrize("shell", [shell for shell in completion.SHELLS if shutil.which(shell)])
def test_the_scripts_are_read_by_their_shells(tmp_path, capsys, shell):
    done = subprocess.run(
        [shell, "-n", script(shell, tmp_path, capsys)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", completion.SHELLS)
@pytest.mark.parametrize("command", PARSERS)
def test_every_flag_is_in_every_script(tmp_path, capsys, shell, command):
    lines = script(shell, tmp_path, capsys).read_text().splitlines()
    if shell == "zsh":
        start = lines.index(f"_stable_diffusion_{command}() {{")
        lines = lines[start : lines.index("}", start)]
    for flag in flags(command):
        sign = f" -l {flag[2:]} " if flag.startswith("--") else f" -s {flag[1:]} "
        wanted = {"bash": f"{flag} ", "zsh": f"{flag}[", "fish": sign}[shell]
        found = [line for line in lines if wanted in line.replace('"', " ")]
        assert any(command in line for line in found) if shell != "zsh" else len(found) == 1, flag


def test_fish_completes(tmp_path, capsys):
    """What it should, in its own form, where there is no fish; and with it where there is."""
    path = script("fish", tmp_path, capsys)
    assert "complete -c txt2image -l mask -r" not in path.read_text()
    assert "complete -c image2image -l mask -r -F -d " in path.read_text()
    assert "complete -c txt2image -l seed -x -d " in path.read_text()
    if shutil.which("fish"):
        asked = [words for words, _ in COMPLETED if "=" not in words and "-" not in words[1][2:]]
        lines = [f"source {path}", *(f"complete -C {shlex.quote(shlex.join(w[:-1]) + ' ' + w[-1])}" for w in asked)]
        done = subprocess.run(["fish", "-c", "\necho next\n".join(lines)], capture_output=True, text=True, check=True)
        found = [{line.split("\t")[0] for line in part.splitlines()} for part in done.stdout.split("next\n")[1:]]
        assert {"--sampler"} in found and {"dpmpp_2m", "dpmpp_2m_sde"} in found and {"bfloat16"} in found


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

"""The documents: their commands and programs are run, and what they name is held against the code.

Blocks of ``shell`` and ``python`` run in order, in a folder of their own, on the bundled model: in three steps, unless
they ask for others or draw a picture that the documents show, which is compared. Trainings do not measure the loss. A
comment on the line above a block, which readers do not see, says what is special about it:

    <!-- download -->       its commands run up to where they ask the Hub for a model
    <!-- minutes -->        only the options of its commands are read
    <!-- install -->        changes the machine, and is not run
    <!-- server -->         is run beside a server, in tests/server
    <!-- file: NAME -->     is what the file NAME holds, for the blocks below
"""

import argparse
import ast
import inspect
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from benchmarks import memory
from checkpoints import as_single_file
from command_line import ROOT, SCRIPTS
from ggufs import write_gguf
from image_prompts import image_encoder, random_adapter, write_adapter, write_vision
from models.test_controlnet_union import unions
from models.test_lllite import weights as lllite_weights
from models.test_upscalers import write as write_upscaler
from stable_diffusion import SAMPLERS, __version__
from stable_diffusion.cli.parser import Parser
from stable_diffusion.diffusion.schedule import SCHEDULES
from stable_diffusion.weights import catalog, hub
from stable_diffusion.weights.files import open_checkpoint, read_tensors
from test_unconditional import save
from tools import flags
from weights.formats.test_first_names import write_halves

DOCUMENTS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
TEXTS = {document.relative_to(ROOT).as_posix(): document.read_text(encoding="utf-8") for document in DOCUMENTS}

_BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARKS = {"", "download", "minutes", "install", "server", "file"}
_SHOWN = [path.name for path in (ROOT / "docs" / "pictures").iterdir()]
_OF_MLX = {"--hostfile", "--hosts", "--over", "--backend", "--auto-setup", "--output-hostfile"}
_NOT_RUN = {
    ".venv/bin/pip",
    "pip",
    "eval",
    "apt-get",
    "ruff",
    ".",
    "source",
    "mkdir",
    "export",
    "mlx.launch",
    "mlx.distributed_config",
    "ssh",
    "ssh-keygen",
    "ssh-copy-id",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: ``mark`` and ``name`` are what the comment above it says."""

    mark: str
    name: str
    language: str
    text: str
    line: int

    @property
    def commands(self) -> list[str]:
        lines = [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]
        return [command for line in lines for command in line.split(" && ")]


def blocks(document: str) -> list[Block]:
    text, found = TEXTS[document], []
    for match in _BLOCK.finditer(text):
        mark, _, name = (match[1] or "").partition(": ")
        found.append(Block(mark, name, match[2], match[3], text[: match.start(3)].count("\n") + 1))
    return found


def without_blocks(text: str) -> str:
    return _BLOCK.sub("", text)


# --- commands and programs -------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """Where a test ends a command; no ``except Exception`` holds it up."""


def stop(*args: object, **kwargs: object) -> NoReturn:
    raise Stopped


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder of the commands, with the files that they read: a LoRA for one matrix is among them."""
    shutil.copytree(ROOT / "docs" / "pictures", tmp_path / "docs" / "pictures")
    shutil.copytree(ROOT / "stable_diffusion" / "tiny" / "lora", tmp_path / "stable_diffusion" / "tiny" / "lora")
    Image.effect_noise((80, 64), 60).convert("RGB").save(tmp_path / "photo.jpg")
    (tmp_path / "photos").mkdir()
    Image.effect_noise((512, 512), 60).convert("RGB").save(tmp_path / "photos" / "1.jpg")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), as_single_file(ROOT / "stable_diffusion" / "tiny"))
    parts = open_checkpoint(ROOT / "stable_diffusion" / "tiny").components
    write_gguf(tmp_path / "unet.gguf", dict(read_tensors(parts["unet"])), "Q8_0")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    factors = {f"{layer}_A.weight": mx.full((4, 96), 1 / 96), f"{layer}_B.weight": mx.ones((96, 4))}
    mx.save_safetensors(str(tmp_path / "style.safetensors"), factors)
    unions()[1].save_pretrained(tmp_path / "union")
    save_file(lllite_weights(), tmp_path / "lllite.safetensors")
    save(tmp_path / "cats", "DDPMPipeline", diffusers.DDPMScheduler(num_train_timesteps=100))
    write_vision(tmp_path / "safety_checker", "safety_checker")
    unet = diffusers.UNet2DConditionModel.from_config(ROOT / "stable_diffusion" / "tiny" / "unet")
    write_adapter(tmp_path / "adapter.safetensors", random_adapter(unet, "plus"))
    image_encoder(tmp_path / "image_encoder")
    write_halves(tmp_path)
    write_upscaler(tmp_path, "realesr-general-x4v3.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # inspect sets it for its process
    monkeypatch.setattr(hub, "fetch", stop)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # programs that other tests import
@pytest.mark.parametrize("document", [name for name, text in TEXTS.items() if "```" in text])
def test_what_is_written_runs(document, folder, request, capsys, monkeypatch):
    names: dict[str, Any] = {}
    for block in blocks(document):
        where = f"{document}, line {block.line}"
        assert block.mark in _MARKS, where
        if block.mark == "file":
            (folder / block.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.name).write_text(block.text, encoding="utf-8")
        if block.mark == "server":
            continue
        if block.language == "python":
            if "StableDiffusionXL(" in block.text:  # random weights in place of a download
                stand_in = catalog.Entry(folder=request.getfixturevalue("xl_folder"))
                monkeypatch.setitem(catalog.ALIASES, "sdxl", stand_in)
            exec(compile(block.text, where, "exec"), names)
        elif block.language == "shell":
            for command in block.commands:
                code = execute(command, block.mark, monkeypatch)
                assert code == 0, f"{where}: {command}\n{capsys.readouterr().err}"
    check_pictures(folder)


def only_read(parse: Callable[..., argparse.Namespace], *words: Any) -> argparse.Namespace:
    """Stop a command after its options are read. The first parser reads only the name of the command."""
    options = parse(*words)
    return options if [*vars(options)] == ["command"] else stop()


def execute(command: str, mark: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process, as far as ``mark`` lets it; returns its exit code."""
    program, *words = shlex.split(command)
    if program in _NOT_RUN or words[:2] in (["-m", "pytest"], ["-m", "venv"]):
        files = [word for word in words if re.search(r"\.(py|txt)$", word)]
        assert mark == "install" or all((ROOT / file).is_file() for file in files), command
        return 0
    assert program in ("python", "python3", ".venv/bin/python"), f"this test does not know {program}"
    run, (main, *argv) = (runpy.run_module, words[1:]) if words[0] == "-m" else (runpy.run_path, words)
    if Path(main).stem in SCRIPTS and not {"--steps", *_SHOWN} & set(argv):
        argv += ["--steps", "3"]
    if argv[:1] == ["train"]:
        argv += ["--measure_every", "0"]  # ten times as long as three steps
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [main, *argv])
        if mark == "minutes":
            for kind in (argparse.ArgumentParser, Parser):
                patch.setattr(kind, "parse_args", lambda *given, parse=kind.parse_args: only_read(parse, *given))
        code = 0
        try:
            run(main if words[0] == "-m" else str(ROOT / main), run_name="__main__")
        except Stopped:
            assert mark in ("download", "minutes"), f"{command} asks for a download, and is not marked so"
            return 0
        except SystemExit as leaving:
            code = leaving.code or 0
    assert mark not in ("download", "minutes") or code, f"{command} needs no {mark}"
    return code


def check_pictures(folder: Path) -> None:
    """The pictures that a document shows are those that its commands make."""
    for shown in (ROOT / "docs" / "pictures").iterdir():
        if (made := folder / shown.name).exists():
            with Image.open(made) as ours, Image.open(shown) as theirs:
                assert ours.size == theirs.size, made.name
                difference = np.abs(np.array(ours.convert("RGB"), int) - np.array(theirs.convert("RGB"), int))
            assert difference.mean() <= 1, made.name


def outputs(document: str) -> Iterator[tuple[str, str]]:
    """Name each file that the blocks of a document write, with the command or line of Python that writes it."""
    for block in blocks(document):
        if block.mark == "file":
            yield block.name, block.text
        elif block.language == "python":
            for line in block.text.splitlines():
                yield from ((name, line) for name in re.findall(r'save\w*\(.*?"([\w/.-]+\.\w+)"', line))
        elif block.language == "shell":
            for command in block.commands:
                command = command.replace("docs/pictures/", "").replace(" --overwrite", "")
                for name in re.findall(r"--output (\S+)", command):
                    ends = (".toml", ".csv", ".png", "-loss.png") if " train " in command else ()
                    yield from ((made, command) for made in (name, *(Path(name).stem + end for end in ends)))


def test_no_page_writes_over_the_files_of_another():
    """A reader can run the README and all pages in one folder. Pictures of docs/pictures are compared elsewhere."""
    written: dict[str, tuple[str, str]] = {}
    linked = re.findall(r"\((docs/[\w-]+\.md)", TEXTS["README.md"])
    for document in dict.fromkeys(["README.md", *linked, *TEXTS]):
        for name, command in outputs(document):
            page, before = written.setdefault(name, (document, command))
            shown = name in _SHOWN and " train " not in before + command
            same = page == document or command == before or shown
            assert same, f"{name} of {page} has other content in {document}:\n{before}\n{command}"


# --- what is named ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", TEXTS)
def test_links_lead_somewhere(document):
    text, place = without_blocks(TEXTS[document]), (ROOT / document).parent
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for target in targets:
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (place / path).resolve() if path else ROOT / document
        assert file.is_file() and file.is_relative_to(ROOT), f"{document}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{document}: {target}"
    if document.startswith("docs/"):  # a table of contents at the top, if there is one, is complete
        head = text.split("\n## ")[0]
        listed = re.findall(r"\(#([\w-]+)\)", head)
        assert not listed or listed == anchors(text, level=2), document


def anchors(text: str, level: int | None = None) -> list[str]:
    """The names under which GitHub finds the headings of a document."""
    marks = "#" * level if level else "#+"
    headings = re.findall(rf"^{marks} (.+)$", without_blocks(text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_all_pages_are_to_be_found_from_the_readme():
    found, left = {"README.md"}, ["README.md"]
    while left:
        document = left.pop()
        for target in re.findall(r"\]\(([\w./-]+)", TEXTS[document]):
            page = (ROOT / document).parent.joinpath(target).resolve()
            name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else ""
            if name in TEXTS and name not in found:
                found.add(name)
                left.append(name)
    assert set(TEXTS) == found
    shown = {name for text in TEXTS.values() for name in re.findall(r"pictures/(\w+\.\w+)", text)}
    assert shown == {path.name for path in (ROOT / "docs" / "pictures").iterdir()}


def test_the_list_of_flags_is_that_of_the_parsers():
    text = flags.DOCUMENT.read_text(encoding="utf-8")
    assert text == flags.renewed(text), "the flags have changed: run python -m tools.flags"


@pytest.mark.parametrize("document", TEXTS)
def test_no_flag_is_made_up(document):
    """Wherever a flag is written, some command here has it; those of commands in blocks are read by their parsers."""
    known = set.union(*(flags.flags_of(p) for parsers in flags.COMMANDS.values() for p in parsers.values()))
    known |= {"--medvram", "--lowvram", "--check", "--no-deps", *_OF_MLX}  # of other programs
    for path in (path for folder in ("benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")):
        known |= set(re.findall(r'"(--[a-z][\w-]*)"', path.read_text(encoding="utf-8")))
    written = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXTS[document]))
    assert not {flag for flag in written if not {flag, "--" + flag[2:].replace("-", "_")} & known}


def messages() -> list[str]:
    """All texts in the library's code, with … in place of what is filled in."""
    found = []
    for path in (ROOT / "stable_diffusion").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%\.?\d*[a-z]", "…", node.value))
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
    return found


def test_troubles_are_those_of_the_program():
    quoted = re.findall(r"^\* \*\*`(.+?)`\*\*", TEXTS["docs/troubleshooting.md"], re.MULTILINE)
    assert len(quoted) >= 8
    known = messages()
    for message in (text.replace("...", "…") for text in quoted):
        assert any(message in text for text in known), f"no message of the program holds {message!r}"


def test_exit_codes():
    listed = set(re.findall(r"^\| (\d+) \|", TEXTS["docs/command-line.md"], re.MULTILINE))
    assert listed == {"0", "1", "2", "130", "143"}


def test_the_models():
    rows = re.findall(r"^\| (`.+?`) \| (.+?) \| (\d+) \| (.+?), (.+?) \|$", TEXTS["docs/models.md"], re.MULTILINE)
    listed = {}
    for names, repo, _, steps, guidance in rows:
        listed |= {name: (repo, int(steps), float(guidance)) for name in re.findall(r"`(.+?)`", names)}
    assert list(listed) == list(catalog.ALIASES)
    for name, (repo, steps, guidance) in listed.items():
        entry = catalog.find(name)
        assert repo == entry.repos[0] if entry.repos else "comes with" in repo
        assert entry.steps in (None, steps) and entry.guidance in (None, guidance), name
    for name, steps in re.findall(r"^\| `([\w-]+)` \|.*? \| (\d+), \d+ \|", TEXTS["README.md"], re.MULTILINE):
        assert int(steps) == listed[name][1], name


def test_the_memory_of_the_models():
    rows = list(memory.rows_of_models())
    assert {name for name, *_ in rows} == {*catalog.ALIASES} - {"tiny"}
    details = re.findall(r"^\| (`.+?) \| \S+ GB \| (\d+) \| (.+?) \|$", TEXTS["docs/models.md"], re.MULTILINE)
    listed = {}
    for names, pixels, cells in details:
        listed |= dict.fromkeys(re.findall(r"[\w-]+", names), (int(pixels), cells.split(" | ")))
    short = dict(re.findall(r"^\| `([\w-]+)` \| \S+ GB \| (\S+ GB \| \S+ GB) \|", TEXTS["README.md"], re.MULTILINE))
    assert len(short) >= 5
    for name, pixels, cells in rows:
        assert listed[name] == (pixels, cells), name
        assert short.get(name, " | ".join(cells[:2])) == " | ".join(cells[:2]), name


def test_the_samplers():
    text = TEXTS["docs/samplers.md"]
    table = {}
    for evaluations, *cells in re.findall(r"^\| (one|two)\b.*? \| (.+?) \| (.+?) \|$", text, re.MULTILINE):
        for stochastic, cell in enumerate(cells):
            table |= {name: (evaluations, bool(stochastic)) for name in re.findall(r"`(\w+)`", cell)}
    assert table == {name: (("one", "two")[s.evaluations - 1], s.stochastic) for name, s in SAMPLERS.items()}
    assert {name for name in SCHEDULES if f"`{name}`" in text} == set(SCHEDULES)


def test_every_folder_and_module_of_the_root_is_in_the_tree():
    package = ROOT / "stable_diffusion"
    tree = set(re.findall(r"^  (\w+)(?:/|\.py) ", TEXTS["ARCHITECTURE.md"], re.MULTILINE))
    folders = {path.parent.name for path in package.glob("*/__init__.py")} | {"tiny"}
    modules = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    assert tree == folders | modules


def test_places_in_the_architecture_exist():
    """What stands in backticks and looks like a name in the code is one."""
    files = [*(ROOT / "stable_diffusion").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for name in re.findall(r"`([\w./]+)`", without_blocks(TEXTS["ARCHITECTURE.md"])):
        if "/" in name:
            assert (ROOT / name).exists() or (ROOT / "stable_diffusion" / name).exists(), name
        elif name.endswith((".py", ".json", ".md")):
            assert any(path.name == name for path in ROOT.rglob(name)), name
        else:
            assert all(re.search(rf"\b{part}\b", code) for part in name.split(".")), name


def test_the_names_in_diffusers():
    section = TEXTS["docs/other-programs.md"].split("\n## The arguments\n")[1]
    cells = [row.split("|")[4] for row in section.replace("\\|", "").splitlines() if row.startswith("| ")]
    names = set(re.findall(r"`(\w+)[=`]", " ".join(cells[1:])))
    assert len(names) >= 20
    pipelines = [getattr(diffusers, name) for name in dir(diffusers) if re.match(r"StableDiffusion\w*Pipeline$", name)]
    schedulers = [diffusers.DPMSolverMultistepScheduler]
    known = set()
    for cls in [*pipelines, *schedulers]:
        known |= set(dir(cls)) | set(inspect.signature(cls.__init__).parameters)
        known |= set(inspect.signature(cls.__call__).parameters)
    assert names <= known, names - known


# --- the repository ---------------------------------------------------------------------------------------------------


def test_the_workflow_runs_the_commands_of_the_readme():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["tests"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    documented = [block.text.strip() for block in blocks("README.md") if "pytest" in block.text]
    assert len(documented) == 1 and documented[0] in commands
    assert documented[0] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    style = next(line for block in blocks("CONTRIBUTING.md") for line in block.text.splitlines() if "ruff" in line)
    assert style.replace("ruff", ".venv/bin/ruff") in commands
    oldest = [word for step in workflow["jobs"]["lower-bounds"]["steps"] for word in step.get("run", "").split()]
    assert all((ROOT / word).exists() for word in oldest if word.startswith("tests/"))
    systems = job["strategy"]["matrix"]["os"]
    assert any(name.startswith("macos") for name in systems) and any(name.startswith("ubuntu") for name in systems)


def test_the_requirements_are_those_of_the_package():
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").replace('"', "'").splitlines()
    assert listed == tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def test_the_newest_version_of_the_changes_is_the_package():
    assert re.findall(r"^## (\d+\.\d+\.\d+\S*)", TEXTS["CHANGELOG.md"], re.MULTILINE)[0] == __version__


@pytest.mark.parametrize("document", TEXTS)
def test_documents_are_for_everybody(document):
    text = TEXTS[document]
    assert not re.search(r"(?<![\w.~])/(work|root|tmp|home|Users|mnt)/", text)
    assert not re.search(r"[\U0001F300-\U0001FAFF\u2600-\u27BF]", text)
    assert not re.search(r"\b(TODO|FIXME|XXX|TBD)\b", text)
    long = [line for line in without_blocks(text).splitlines() if len(line) > 120 and not re.match(r"[|<*]|!\[", line)]
    assert not long, long

"""Write docs/reference.md from the docstrings of the package: python -m tools.reference

The page has the names that the package and its training export, and those that docs/python.md imports. Signatures are
those of the source, so that they do not depend on the version of Python.
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stable_diffusion
import stable_diffusion.training

DOCUMENT = Path(__file__).parents[1] / "docs" / "reference.md"
TASKS = DOCUMENT.with_name("python.md")
WIDTH = 120

# The sections of the page, with the names in each. A name outside of the package's root has its module.
SECTIONS = {
    "Models": ("StableDiffusion", "StableDiffusionXL", "UnconditionalDiffusion", "diffusion.sample.Latents"),
    "Settings of a run": ("Options", "SAMPLERS", "SizeConditioning", "Control", "ImagePrompt", "Conditioning"),
    "Images": ("to_images", "load_upscaler", "Upscaler", "images.canny.canny"),
    "Training": tuple(f"training.{name}" for name in stable_diffusion.training.__all__),
    "Machine": ("models.cpu.tune",),
}
ALIASES = {"MicroConditioning": "SizeConditioning"}  # names of earlier versions
RESULTS = ("Latents", "Upscaler")  # classes that a program receives, and does not make
RECORDS = ("Options", "SizeConditioning", "Control", "ImagePrompt")  # shown without methods, which the library uses

_HEAD = """
All public classes and functions, written by `python -m tools.reference` from their docstrings.
[Python](python.md) shows them in use, one task at a time.

In the signatures, `mx` is `mlx.core`. A `Prompt` is `{prompt}`. Square brackets hold shapes: n images of H x W pixels,
or of h x w positions of latents. A setting that is `None` has the default of the model.
"""


def page() -> str:
    """Return the text of the page."""
    contents = " · ".join(f"[{title}](#{title.lower().replace(' ', '-')})" for title in SECTIONS)
    prompt = re.search(r"^Prompt = (.+)$", inspect.getsource(stable_diffusion.options), re.MULTILINE)[1]
    lines = ["# Python reference", ""]
    for text in (contents, *_HEAD.split("\n\n")):
        lines += [*_wrapped(text.strip().replace("{prompt}", prompt)), ""]
    for title, names in SECTIONS.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += _entry(name)
    return "\n".join(lines).rstrip() + "\n"


def _entry(path: str) -> Iterator[str]:
    """Yield the lines for a class, a function or a table."""
    module, _, name = f"stable_diffusion.{path}".rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    module = "stable_diffusion.training" if module.startswith("stable_diffusion.training") else module
    yield from (f"### {name}", "", f"`from {module} import {name}`", "")
    for alias in (alias for alias, meant in ALIASES.items() if meant == name):
        yield from (f"`{alias}` is the same class: its name in version 0.1.", "")
    if isinstance(thing, dict):
        yield from _wrapped(f"The samplers, by name: {', '.join(f'`{key}`' for key in thing)}.")
        yield ""
    elif inspect.isclass(thing):
        yield from _class(thing)
    else:
        yield from (*_block(signature(thing)), *_text(thing.__doc__))


def _class(cls: type) -> Iterator[str]:
    if fields := _fields(cls):
        yield from _block(f"{cls.__name__}({_joined(fields, len(cls.__name__) + 2)})")
    elif "__init__" in vars(cls) and cls.__name__ not in RESULTS:
        yield from _block(signature(cls.__init__, cls.__name__))
    yield from _text(cls.__doc__)
    for name, member in _members(cls):
        yield from (f"#### {_title(cls, name)}", "")
        if isinstance(member, property):
            yield from (f"A property, `{_source(_parsed(member.fget).returns)}`.", "")
        else:
            yield from _block(signature(member, cls.__name__.lower() if name == "__call__" else name))
        yield from _text(member.__doc__)


def _title(cls: type, name: str) -> str:
    return f"Calling the {cls.__name__}" if name == "__call__" else f"{cls.__name__}.{name}"


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties, of the class first and then of those it is made from in this package."""
    if cls.__name__ in RECORDS:
        return
    seen = set()
    ours = [base for base in cls.__mro__ if base.__module__.startswith("stable_diffusion")]
    shown = {path.rpartition(".")[2] for names in SECTIONS.values() for path in names}
    for base in ours:
        if base is not cls and base.__name__ in shown:
            return  # its members stand there
        for name, member in vars(base).items():
            function = getattr(member, "__func__", member)
            is_public = not name.startswith("_") or name == "__call__"
            if is_public and name not in seen and getattr(function, "__doc__", None):
                seen.add(name)
                if isinstance(member, property) or inspect.isfunction(function):
                    yield name, function


def signature(function: Any, name: str | None = None) -> str:
    """Return the signature of a function as its source has it, in lines of at most 120 characters."""
    tree = _parsed(function)
    arguments = tree.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    parts = [_parameter(one, default) for one, default in zip(plain, defaults, strict=True)]
    if plain and plain[0].arg in ("self", "cls"):
        del parts[0]
    if arguments.vararg:
        parts.append(f"*{_parameter(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += map(_parameter, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        parts.append(f"**{_parameter(arguments.kwarg, None)}")
    result = f" -> {_source(tree.returns)}" if tree.returns and name != "__init__" else ""
    name = name or function.__name__
    return f"{name}({_joined(parts, len(name) + len(result) + 2)}){result}"


def _parsed(thing: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))).body[0]


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = argument.arg + (f": {_source(argument.annotation)}" if argument.annotation else "")
    if default is None:
        return text
    return text + (" = " if argument.annotation else "=") + _source(default)


def _source(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value[:1].isupper():
        return node.value  # an annotation in quotes
    return re.sub(r"'([^'\"]*)'", r'"\1"', ast.unparse(node))


def _fields(cls: type) -> list[str]:
    """Return the fields of a dataclass as its source has them."""
    if "__dataclass_fields__" not in vars(cls):
        return []
    fields = [
        node
        for node in _parsed(cls).body
        if isinstance(node, ast.AnnAssign) and node.target.id in cls.__dataclass_fields__
    ]
    shown = [node for node in fields if "ClassVar" not in ast.unparse(node.annotation)]
    return [_source(node) for node in shown if not node.target.id.startswith("_")]


def _joined(parts: list[str], beside: int) -> str:
    """Return parameters in one line, or each in its line where they are too long."""
    line = ", ".join(parts)
    return (
        line if len(line) + beside <= WIDTH else "\n" + "".join(f"    {part},\n" for part in parts).replace("*,,", "*,")
    )


def _block(text: str) -> list[str]:
    return ["```py", text, "```", ""]


def _text(docstring: str) -> Iterator[str]:
    """Yield a docstring as Markdown: the sections of arguments and attributes become lists."""
    in_list = False
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        title, _, rest = paragraph.partition("\n")
        if title in ("Args:", "Attributes:", "Yields:", "Returns:"):
            in_list = title in ("Args:", "Attributes:")
            yield from ({"Args:": "Arguments:"}.get(title, title), "")
            paragraph = textwrap.dedent(rest)
        else:
            in_list = in_list and paragraph.startswith(" ")
        items = re.split(r"\n(?=\S)", textwrap.dedent(paragraph)) if in_list else []
        for item in items:
            name, _, meaning = item.partition(": ")
            names = ", ".join(f"`{one}`" for one in name.split(", "))
            yield from _wrapped(f"* {names}: {_markdown(meaning)}", indent="  ")
        if not items:
            yield from _wrapped(_markdown(paragraph))
        yield ""


def _wrapped(text: str, indent: str = "") -> list[str]:
    whole = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, **whole)


def _markdown(text: str) -> str:
    """Return the text of a docstring as Markdown shows it, with its references to code in backticks."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"``\1``", " ".join(text.split()))
    pieces = re.split(r"(``.+?``)", re.sub(r"(?<!`)\b(None|True|False)\b(?!`)", r"``\1``", text))
    return "".join(p[1:-1] if p.startswith("``") else re.sub(r"([*<|]|\b_|_\b)", r"\\\1", p) for p in pieces)


def imported(document: Path = TASKS) -> set[str]:
    """Return what the programs of a document import or use from the package, as names below it."""
    found = set()
    for block in re.findall(r"^```python\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "stable_diffusion":
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    path = f"{node.module}.{name}".partition(".")[2]
                    is_module = inspect.ismodule(getattr(module, name))
                    used = re.findall(rf"\b{name}\.(\w+)", block) if is_module else []
                    found |= {f"{path}.{attribute}" for attribute in used} if is_module else {path}
    return found


def main() -> None:
    """Write the page."""
    DOCUMENT.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Scripts with which bash, zsh and fish complete the commands of this package, made from their parsers.

    source <(stable-diffusion completion bash)
    source <(stable-diffusion completion zsh)
    stable-diffusion completion fish | source

They complete `stable-diffusion`, `txt2image` and `image2image`, which `pip install` brings, and the scripts of that
name where they are called as commands.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..diffusion.samplers import SAMPLERS
from ..weights import catalog
from . import convert, inspect
from .arguments import script_parser
from .parser import Parser

_SCRIPTS = ("txt2image", "image2image")
_NAMES = ("stable-diffusion", *_SCRIPTS, *(f"{name}.py" for name in _SCRIPTS))
_KNOWN = {"sampler": tuple(SAMPLERS), "model": tuple(catalog.names()), "refiner": tuple(catalog.names())}
_NO_FILES = ("N", "SCALE", "SHARE", "PIXELS", "GB", "TEXT", "FACTOR", "NAME", "START,END", "L,T,R,B", "SIZE")


@dataclass(frozen=True)
class _Flag:
    """A flag as a shell needs to know it; ``values`` are what it may be, or what there is beside files."""

    names: tuple[str, ...]
    about: str
    takes_value: bool
    values: tuple[str, ...]
    files: bool
    repeats: bool


def _flags(parser: argparse.ArgumentParser) -> list[_Flag]:
    return [_flag(action) for action in parser._actions if action.option_strings]


def _flag(action: argparse.Action) -> _Flag:
    values = _KNOWN.get(action.dest, tuple(map(str, action.choices or ())))
    takes = action.nargs != 0
    files = takes and not action.choices and action.metavar not in _NO_FILES
    about = (action.help or "").partition(";")[0]
    return _Flag(tuple(action.option_strings), about, takes, values, files, isinstance(action, argparse._AppendAction))


def _commands() -> dict[str, list[_Flag]]:
    """The flags of each command."""
    parsers = {"txt2image": script_parser(False), "image2image": script_parser(True)}
    parsers |= {"convert": convert.make_parser(), "inspect": inspect.make_parser(), "completion": make_parser()}
    return {name: _flags(parser) for name, parser in parsers.items()}


# --- bash ----------------------------------------------------------------------------------------------------------

# Files are what bash completes by itself where this finds nothing (-o default). Written for the bash 3.2 of macOS.
_BASH = """\
_stable_diffusion() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[0]##*/}} words=
    command=${{command%.py}}
    COMPREPLY=()
    if [[ $command == stable-diffusion ]]; then
        command=${{COMP_WORDS[1]}}
        if ((COMP_CWORD == 1)); then
            COMPREPLY=($(compgen -W "{commands}" -- "$cur"))
            return
        fi
    fi
    if [[ $cur == = ]]; then # of --flag=value
        cur=
    elif [[ $prev == = ]]; then
        prev=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    [[ $prev == --* ]] && prev=${{prev#--}} && prev=--${{prev//-/_}}
    case $command:$prev in
{values}
    esac
    if [[ -z $words && $cur == -* ]]; then
        [[ $cur == --* ]] && cur=${{cur#--}} && cur=--${{cur//-/_}}
        case $command in
{flags}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _stable_diffusion {names}
"""


def _bash(commands: dict[str, list[_Flag]]) -> str:
    values = [
        f'        {"|".join(f"{command}:{name}" for name in flag.names)}) words="{" ".join(flag.values)}" ;;'
        for command, flags in commands.items()
        for flag in flags
        if flag.values
    ]
    flags = [
        f'            {command}) words="{" ".join(name for flag in flags for name in flag.names)}" ;;'
        for command, flags in commands.items()
    ]
    return _BASH.format(
        commands=" ".join(commands), values="\n".join(values), flags="\n".join(flags), names=" ".join(_NAMES)
    )


# --- zsh -----------------------------------------------------------------------------------------------------------

_ZSH = """\
#compdef {names}

{functions}

_stable_diffusion() {{
    local command=${{words[1]:t:r}}
    if [[ $command == stable-diffusion ]]; then
        if ((CURRENT == 2)); then
            compadd {commands}
            return
        fi
        command=$words[2]
        shift words
        ((CURRENT--))
    fi
    (($+functions[_stable_diffusion_$command])) && _stable_diffusion_$command
}}

if [[ $funcstack[1] == _stable_diffusion ]]; then
    _stable_diffusion "$@"
else
    compdef _stable_diffusion {names}
fi
"""


def _zsh(commands: dict[str, list[_Flag]]) -> str:
    functions = (
        "\n".join((f"_stable_diffusion_{command}() {{", "    _arguments \\", *_zsh_lines(flags), "}"))
        for command, flags in commands.items()
    )
    return _ZSH.format(names=" ".join(_NAMES), functions="\n\n".join(functions), commands=" ".join(commands))


def _zsh_lines(flags: Iterable[_Flag]) -> Iterator[str]:
    for flag in flags:
        about = "".join(f"\\{sign}" if sign in "[]:\\" else sign for sign in flag.about)
        value = f":value:{_zsh_values(flag)}" if flag.takes_value else ""
        others = f"({' '.join(flag.names)})" if len(flag.names) > 1 else ""
        for name in flag.names:
            spec = ("*" if flag.repeats else others) + f"{name}[{about}]{value}"
            yield f"        {_quoted(spec)} \\"
    yield "        '*:file:_files'"


def _zsh_values(flag: _Flag) -> str:
    known = f"({' '.join(flag.values)})"
    if flag.files:
        return f' _alternative "known\\:known\\:{known}" "files\\:file\\:_files"' if flag.values else "_files"
    return known if flag.values else " "


# --- fish ----------------------------------------------------------------------------------------------------------


def _fish(commands: dict[str, list[_Flag]]) -> str:
    lines = [f"complete -c stable-diffusion -n __fish_use_subcommand -x -a {_quoted(' '.join(commands))}"]
    for command, flags in commands.items():
        places = [f"-c stable-diffusion -n {_quoted(f'__fish_seen_subcommand_from {command}')}"]
        places += [f"-c {name}" for name in _NAMES if Path(name).stem == command]
        lines += [f"complete {place} {_fish_options(flag)}" for place in places for flag in flags]
    return "\n".join(lines) + "\n"


def _fish_options(flag: _Flag) -> str:
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names]
    value = [("-r -F" if flag.files else "-x") if flag.takes_value else ""]
    value += [f"-a {_quoted(' '.join(flag.values))}"] if flag.values else []
    return " ".join(filter(None, (*names, *value, f"-d {_quoted(flag.about)}")))


def _quoted(text: str) -> str:
    """In single quotes, as all of these shells read them."""
    return "'" + text.replace("'", "'\\''") + "'"


# --- command line ----------------------------------------------------------------------------------------------------

SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}


def make_parser(prog: str | None = None) -> Parser:
    """The parser of this command line, under the name ``prog``."""
    parser = Parser(
        prog=prog or "stable_diffusion.completion",
        description="Print a script with which a shell completes flags and their values.",
        epilog="examples:\n  source <(%(prog)s bash)\n  source <(%(prog)s zsh)\n  %(prog)s fish | source",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell to print it for")
    parser.add_version()
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: those of the process); returns the exit code."""
    print(SHELLS[make_parser(prog).parse_args(argv).shell](_commands()), end="")
    return 0

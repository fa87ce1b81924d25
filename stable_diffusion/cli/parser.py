"""Parsers of the command lines, made from the table of flags; errors are one line."""

import argparse
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, NoReturn

from .. import __version__
from ..diffusion.choice import table
from ..models import check_mlx
from ..options import SettingError
from .flags import ABOUT, EVERYDAY, FLAGS, FOREIGN, HELP_OF
from .foreign_flags import COUNTERPARTS
from .mistakes import explained, stray_words, unknown_choice, unknown_flag
from .streams import in_one_line, say
from .values import CHOICES_OF_FLAGS, TYPES, prompt

_HYPHENS = re.compile(r"\A--(\w[\w-]*)(?=\Z|=)")  # a flag, without the value after "="
_UNREAD = 141  # 128 + SIGPIPE, the exit code of commands that do not handle this signal
_EXAMPLES = {  # the first one runs without a download
    "txt2image": (
        '"a red circle" --model tiny',
        '"a lighthouse in a storm" --model sd15',
        '"a harbour at dawn" -q --low_memory',
    ),
    "image2image": (
        'photo.jpg "a fireplace" --strength 0.5',
        'photo.jpg "a door" --mask door.png',
        'photo.jpg "a lake" --expand 128,0,128,0',
    ),
    "unconditional": (
        "--model google/ddpm-cat-256 --seed 7",
        "--model CompVis/ldm-celebahq-256",
    ),
}
_SCRIPTS = {  # the words of their usage, and a description
    "txt2image": (['"prompt"'], "Draw images from a prompt."),
    "image2image": (["image", '"prompt"'], "Change an image towards a prompt."),
    "unconditional": ([], "Draw images with a model that reads no prompt."),
}
EXIT_CODES = "exit codes:\n  0 done; 1 failed during the run; 2 refused, nothing was done; 130 interrupted\n"
_CONSTANTS = {"no_float16": ("dtype", "float32"), "cpu": ("device", "cpu")}
_EVERYDAY = "everyday flags"  # the group that --help shows, where there is one


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Format help for 80 columns: a script after "python", short flags first, the value once."""

    def __init__(self, prog: str, **options: Any) -> None:
        options |= {"max_help_position": 26, "width": min(80, get_terminal_size().columns) - 2}
        super().__init__(_command(prog), **options)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(sorted(action.option_strings, key=len))
        default = self._get_default_metavar_for_optional(action)
        return names if action.nargs == 0 else f"{names} {self._format_args(action, default)}"


def _underscores(word: str) -> str:
    """Return a flag with underscores instead of hyphens, or any other word unchanged."""
    return _HYPHENS.sub(lambda flag: f"--{flag[1].replace('-', '_')}", word)


def _command(prog: str) -> str:
    """Return the words that a user types for the program ``prog``."""
    return f"python {prog}" if prog.endswith(".py") else prog


class _HelpAll(argparse.Action):
    """Print the help of all flags, and exit."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        parser.say(parser.format_help(has_all=True), end="")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Parse flags that are named with underscores and may be written with hyphens.

    The result contains only the given flags. An error begins with ``where``, the source of the arguments. ``types`` and
    ``choices`` map the names of flags to their types and choices.
    """

    where = ""
    hint = "--help: all flags"  # ends the usage that a command without arguments prints
    counterparts: Mapping[str, str] = COUNTERPARTS  # names of flags in other programs -> flags here

    def __init__(self, *, examples: Sequence[str] = (), codes: str = EXIT_CODES, **options: Any) -> None:
        self.types, self.choices, self.examples = TYPES, CHOICES_OF_FLAGS, examples
        if examples:
            lines = ["examples:", *(f"  %(prog)s {example}" for example in examples), "", codes]
            options["epilog"] = options.get("epilog", "") + "\n".join(lines)
        super().__init__(formatter_class=HelpFormatter, argument_default=argparse.SUPPRESS, **options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # also the first value of a list: --seed -1,5
        if self.add_help:
            version = f"stable-diffusion-mlx {__version__}"
            self.add_argument("--version", action="version", version=version, help="print the version and exit")

    def add_groups(
        self,
        groups: Mapping[str, Mapping[str, str]],
        about: Mapping[str, str],
        everyday: Sequence[str] = (),
        left_out: Collection[str] = (),
    ) -> None:
        """Add groups of flags, except those with the names ``left_out``; ``everyday`` ones are a group for --help."""
        usages = {usage.split()[0][2:]: (usage, text) for flags in groups.values() for usage, text in flags.items()}
        if everyday:
            self.hint = "--help: everyday flags; --help_all: all of them"
            self.add_argument("--help_all", action=_HelpAll, nargs=0, help="print all flags, by task, and exit")
            self.add_flags(_EVERYDAY, None, dict(usages[name] for name in everyday), left_out)
        for title, flags in groups.items():
            self.add_flags(title, about[title], flags, {*left_out, *everyday})

    def add_flags(
        self, title: str, about: str | None, flags: Mapping[str, str], left_out: Collection[str] = ()
    ) -> None:
        """Add a group of flags (usage -> help), except those with the names ``left_out``."""
        group = None
        for usage, help_text in flags.items():
            words = usage.removesuffix(" ...").split()
            names = [word for word in words if word.startswith("-")]
            name = names[0].removeprefix("--")
            if name in left_out:
                continue
            options = {"type": self.types.get(name), "choices": self.choices.get(name)}
            if len(words) > len(names):
                options |= {"metavar": words[-1], "action": "append" if usage.endswith(" ...") else "store"}
            elif name not in self.choices:
                options = {"action": "store_true"}
            if name in _CONSTANTS:
                dest, const = _CONSTANTS[name]
                options = {"action": "store_const", "const": const, "dest": dest}
            if name == "prompt":
                options |= {"action": _Once}
            group = group or self.add_argument_group(title, about)
            group.add_argument(*names, help=help_text, **options)

    def format_help(self, has_all: bool = False) -> str:
        """Return the help: the everyday flags where there are some, else or with ``has_all`` all flags."""
        formatter, groups = self._get_formatter(), [*self._action_groups]
        groups.append(groups.pop(groups.index(self._optionals)))  # --help and --version stand last
        is_short = not has_all and any(group.title == _EVERYDAY for group in groups)
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in groups:
            if not is_short or group.title == _EVERYDAY or group in (self._positionals, self._optionals):
                formatter.start_section(group.title)
                formatter.add_text(group.description)
                formatter.add_arguments(group._group_actions)
                formatter.end_section()
            if is_short and group.title == _EVERYDAY:
                formatter.add_text("advanced: --help_all lists all flags, by task")
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse arguments after replacing hyphens in flags by underscores."""
        words = list(sys.argv[1:] if args is None else args)
        positionals = self._positionals._group_actions
        if not words and not self.where and self.examples and any(action.nargs != "*" for action in positionals):
            self.exit(2, self._brief_usage())
        end = words.index("--") if "--" in words else len(words)
        known = self._option_string_actions
        problems = [unknown_flag(word, known, self.counterparts, not self.add_help) for word in words[:end]]
        if found := [*dict.fromkeys(filter(None, problems))]:
            self.error("; ".join(found[:3]))
        words[:end] = map(_underscores, words[:end])
        result = super().parse_known_args(words, namespace)
        try:
            check_mlx()
        except ImportError as error:
            self.error(error)
        return result

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse arguments, or explain the mistake in unknown words."""
        result, rest = self.parse_known_args(args, namespace)
        if not rest:
            return result
        words = [*map(_underscores, sys.argv[1:] if args is None else args)]
        self.error(stray_words(words, rest, getattr(result, "prompt", None), self))

    def _brief_usage(self) -> str:
        """Return the usage in few lines, for a command without arguments."""
        return f"{self.format_usage()}example: {_command(self.prog)} {self.examples[0]}\n{self.hint}\n"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, unknown_choice(action.dest, value, [*action.choices]))

    def say(self, text: str, end: str = "\n") -> None:
        """Print the result of a command, or exit: with 141 (SIGPIPE) if nobody reads it, else with 1 and a line."""
        try:
            say(text, end)
        except BrokenPipeError:
            super().exit(_UNREAD)
        except OSError as error:
            super().exit(1, f"{self.prog}: error: stdout cannot be written to ({error.strerror})\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit after stdout has been written, such as the help."""
        self.say("", end="")
        super().exit(status, message)

    def error(self, message: str | Exception) -> NoReturn:
        """Exit with code 2 and one line."""
        self.fail(2, explained(message, self) if isinstance(message, str) else message)

    def fail(self, code: int, message: str | Exception) -> NoReturn:
        """Exit with one line, even if the message quotes a path with line breaks; settings become flags."""
        text = str(message).replace("partial=True", "--lora_partial")
        if isinstance(message, SettingError):
            text = re.sub(rf"\b({'|'.join(message.names)})\b", r"--\1", text)
        self.exit(code, in_one_line(f"{self.prog}: error: {self.where}{text}") + "\n")


class _Once(argparse.Action):
    """Store a value, and refuse a second one: the prompt may come with or without a flag."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, value: Any, option_string: Any = None) -> None:
        if self.dest in namespace:
            first = getattr(namespace, self.dest)
            parser.error(
                f"the {self.dest} is given twice: {first[:80]!r} and {value[:80]!r}; put the whole prompt in quotes"
            )
        setattr(namespace, self.dest, value)


def script_parser(script: str, prog: str | None = None) -> Parser:
    """Return the parser of a script, a key of ``FOREIGN``, under the name ``prog`` (None: the process's)."""
    words, description = _SCRIPTS[script]
    usage = " ".join(["%(prog)s", *words, "[flags]"])
    parser = Parser(prog=prog, usage=usage, description=description, examples=_EXAMPLES[script])
    if "image" in words:
        parser.add_argument("image", nargs="?", help="image to start from (PNG, JPEG, WebP, ...)")
    if '"prompt"' in words:
        parser.add_argument("prompt", type=prompt, nargs="?", action=_Once, help="text to draw, in quotes")
    parser.add_argument("--list_samplers", action="version", version=table(), help="print the samplers and exit")
    everyday = [name for name in EVERYDAY if name not in FOREIGN[script]]
    texts = HELP_OF.get(script, {})
    groups = {title: {usage: texts.get(usage, text) for usage, text in flags.items()} for title, flags in FLAGS.items()}
    parser.add_groups(groups, ABOUT, everyday, FOREIGN[script])
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser

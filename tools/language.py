"""Measure the language of the documents, the docstrings, the help and the messages: python -m tools.language

It prints the average number of words in a sentence of each document, the fraction of public docstrings that begin with
a verb, and each place of a word that is not used here. tests/test_language.py sets the limits.
"""

import argparse
import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools import flags

ROOT = Path(__file__).parents[1]
LONGEST = 20  # words in a sentence of a document, on average

# Words that are not used here. Plainer ones: omitted for "left out", FRACTION for "share of", exit for "leave".
AVOIDED = (
    "so many",
    "of its own",
    "but for",
    "anew",
    "le(?:t|ts|tting) go of",
    "told",
    "asked",
    "shares? of",
    "(?-i:SHARE)",
    "and leaves?",
    "leaves (?:with|at once)",
    "left out",
    "as it was",
    "the way",
    "its very",
    "none is",
    "there (?:is|are) none",
    "misshapen",
)
_PATTERN = re.compile(rf"\b(?:{'|'.join(AVOIDED)})\b".replace(" ", r"\s+"), re.IGNORECASE)
QUESTIONS = ("What", "How", "Where", "Whether", "Which", "If")  # no docstring of a function begins with one

# First words of docstrings. A verb that is missing here only lowers the figure.
VERBS = frozenset(
    """
    Accept Act Add Adopt Allow Answer Append Apply Ask Assign Attach Attend Await Begin Blend Bound Bring Build
    Cache Calculate Call Cancel Carry Cast Change Check Choose Clear Clip Close Collect Combine Compare Complete
    Compose Compute Control Convert Convolve Copy Correct Count Create Crop Cut Decide Decode Delete Denoise
    Deny Dequantize Descend Describe Detach Detect Divide Do Double Download Draw Drop Embed Encode Encrypt End
    Enlarge Enter Erase Escape Estimate Evaluate Exchange Execute Exit Expand Explain Express Extend Fetch Fill
    Filter Find Finish Fit Flag Fold Follow Form Format Forward Free Fuse Gather Generate Get Give Go Group
    Guess Halve Hand Handle Hash Have Hold Identify Ignore Improve Initialize Insert Integrate Interpolate
    Invert Iterate Join Judge Keep Key Label Lay Leave Lengthen Let Limit List Listen Load Look Make Map Mark
    Mask Match Measure Merge Move Multiply Name Noise Normalize Note Notice Offer Open Order Pad Paint Parse
    Part Pass Paste Pause Perform Permute Pick Place Plan Play Predict Prepare Preserve Print Process Project
    Provide Put Quantize Raise Read Rebuild Receive Recognise Recognize Recompute Record Reduce Refine Refuse
    Register Release Remember Remind Remove Rename Render Reorder Repeat Replace Reply Report Represent Require
    Rescale Reset Reshape Resize Resolve Respond Restore Resume Retry Return Reverse Rotate Round Run Sample
    Save Say Scale Schedule Search See Select Send Separate Serve Set Share Shift Show Shrink Shut Skip Smooth
    Solve Sort Space Split Spread Start State Step Stop Store Subtract Sum Supply Swap Switch Take Tell Test
    Tile Time Tokenize Track Train Transform Translate Transpose Trim Truncate Try Tune Turn Undo Unpack Update
    Upscale Use Wait Walk Warn Watch Weigh Widen Work Wrap Write Yield Zero
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Text:
    """Hold a text that people read, and the place where it stands."""

    place: str
    text: str


def documents(root: Path = ROOT) -> dict[str, str]:
    """Read the documents, and the texts of notebooks, by their paths."""
    paths = [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]
    found = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    for path in sorted((root / "examples").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        found[path.relative_to(root).as_posix()] = "\n\n".join(texts)
    return found


def prose(document: str) -> str:
    """Return a document without blocks of code, pictures, comments and the targets of links; code is one word."""
    text = re.sub(r"^ *```.*?^ *```$", "", document, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)|<img[^>]*>", "", text, flags=re.DOTALL)
    text = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "code", text, flags=re.DOTALL)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def sentences(document: str) -> list[str]:
    """Return the sentences of a document; headings and tables have none, and each point of a list ends one."""
    lines = ["" if re.match(r"\s*(?:#|\|)", line) else line for line in prose(document).splitlines()]
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.) )", "\n".join(lines))
    found = []
    for block in blocks:
        text = re.sub(r"\b(et al|e\.g|i\.e|vs|sec|eq|alg|fig)\.", r"\1", " ".join(block.split()))
        found += re.split(r"(?<=[.!?])[)\"'*]*\s+(?=\S)", text)
    return [sentence for sentence in found if count_words(sentence) > 1]


def count_words(sentence: str) -> int:
    """Count the words of a sentence; a sign by itself is none."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def words_a_sentence(document: str) -> float:
    """Return the average number of words in a sentence of a document."""
    counts = [count_words(sentence) for sentence in sentences(document)]
    return sum(counts) / max(1, len(counts))


def helps() -> Iterator[Text]:
    """Yield the texts of ``--help`` of all commands."""
    for title, parsers in flags.COMMANDS.items():
        for parser in parsers.values():
            yield from _help_of(parser, f"{title} --help")


def _help_of(parser: argparse.ArgumentParser, place: str) -> Iterator[Text]:
    for text in (parser.description, parser.epilog):
        yield Text(place, text or "")
    for group in parser._action_groups:
        yield Text(place, f"{group.title or ''} {group.description or ''}")
    for action in parser._actions:
        values = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
        yield Text(f"{place}, {'/'.join(action.option_strings) or action.dest}", " ".join(filter(None, values)))
        yield Text(f"{place}, {'/'.join(action.option_strings) or action.dest}", action.help or "")


def messages(root: Path = ROOT) -> Iterator[Text]:
    """Yield the texts in the code of the package, such as those of errors and of the log; docstrings are not here."""
    for path in sorted((root / "stable_diffusion").rglob("*.py")):
        yield from messages_of(path.read_text(encoding="utf-8"), path.relative_to(root).as_posix())


def messages_of(code: str, place: str) -> Iterator[Text]:
    """Yield the texts in a program."""
    tree = ast.parse(code)
    statements = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # a docstring is one
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in statements:
            yield Text(f"{place}:{node.lineno}", node.value)


def docstrings(root: Path = ROOT) -> Iterator[tuple[Text, bool]]:
    """Yield the docstrings of public functions and classes of the package, and whether it is that of a function."""
    for path in sorted((root / "stable_diffusion").rglob("*.py")):
        yield from _docstrings(ast.parse(path.read_text(encoding="utf-8")), path.relative_to(root).as_posix())


def _docstrings(tree: ast.AST, place: str) -> Iterator[tuple[Text, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            is_function = not isinstance(node, ast.ClassDef)
            if text := ast.get_docstring(node):
                yield Text(f"{place}:{node.lineno}", text), is_function
            if not is_function:
                yield from _docstrings(node, place)


def begins_with_verb(docstring: str) -> bool:
    """Return whether the first word of a docstring is a verb in the imperative."""
    return re.match(r"\W*(\w*)", docstring)[1] in VERBS


def avoided(texts: Iterator[Text] | list[Text]) -> list[str]:
    """Return each place of a word that is not used here, with the word."""
    found = (f"{text.place}: {match[0]!r}" for text in dict.fromkeys(texts) for match in _PATTERN.finditer(text.text))
    return list(found)


def main() -> None:
    """Print the figures."""
    found = documents()
    for name, text in found.items():
        print(f"{words_a_sentence(text):5.1f} words a sentence  {name}")
    whole = [count_words(sentence) for text in found.values() for sentence in sentences(text)]
    print(f"{sum(whole) / len(whole):5.1f} words a sentence in all documents")
    texts = [text.text for text, _ in docstrings()]
    verbs = sum(map(begins_with_verb, texts))
    print(f"{100 * verbs / len(texts):5.1f} % of {len(texts)} public docstrings begin with a verb")
    asking = [text.place for text, is_function in docstrings() if is_function and text.text.startswith(QUESTIONS)]
    print(f"{len(asking):5d} functions whose docstring begins with {', '.join(QUESTIONS)}", *asking, sep="\n      ")
    for kind, places in (
        ("documents", avoided([Text(name, prose(text)) for name, text in found.items()])),
        ("help", avoided(helps())),
        ("messages", avoided(messages())),
    ):
        print(f"{len(places):5d} words that are not used here, in {kind}", *places, sep="\n      ")


if __name__ == "__main__":
    main()

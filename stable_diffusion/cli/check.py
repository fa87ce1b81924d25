"""Check this machine: ``python -m stable_diffusion check``. Nothing is downloaded."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any

from ..app.check import SECONDS, Measurement, find_checks, findings, measure
from ..app.memory import set_limits
from ..models import cpu
from .parser import Parser

_TYPES = ("float32", "float16", "bfloat16")


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of this command line, under the name ``prog``."""
    parser = Parser(
        prog=prog or "python -m stable_diffusion check",
        usage="%(prog)s [word ...] [flags]",
        description="Compare the results of this machine with references, and print a table.",
        examples=("silu", "--json"),
        codes="exit codes:\n  0 all within the bounds; 1 some are not; 2 unknown check\n",
    )
    parser.add_argument(
        "words", nargs="*", default=[], metavar="word", help="run only checks whose names contain all of these words"
    )
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: the process's), and return the exit code."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    try:
        cpu.choose_device()
    except ValueError as error:
        parser.error(error)
    cpu.tune()
    limit = set_limits(None, low_memory=False)
    checks = find_checks(args.words)
    if not checks:
        parser.error(f"no check has {' and '.join(map(repr, args.words))} in its name; omit the words to run all")
    results: list[Measurement] = []
    measured = (results.append(result) or result for result in map(measure, checks))
    try:
        if args.json:
            record = {"findings": list(findings(limit)), "checks": [_as_json(result) for result in measured]}
            parser.say(json.dumps(record, indent=2))
        else:
            for line in chain((f"* {line}" for line in findings(limit)), [""], _table(measured)):
                parser.say(line)
    except KeyboardInterrupt:
        parser.fail(130, f"interrupted after {len(results)} of {len(checks)} values")
    failed = sum(not result.passed for result in results)
    if not args.json:
        parser.say(f"\n{len(results)} values, {failed or 'none'} outside the bounds")
    return 1 if failed else 0


def _table(results: Iterable[Measurement]) -> Iterator[str]:
    """Yield the lines of a Markdown table, each as soon as its values are known."""
    yield f"| check | {' | '.join(_TYPES)} | unit |"
    yield "| --- " * (len(_TYPES) + 2) + "|"
    for check, values in groupby(results, key=lambda result: (result.check.name, result.check.unit)):
        cells = {str(value.check.dtype).removeprefix("mlx.core."): _cell(value) for value in values}
        yield f"| {check[0]} | {' | '.join(cells.get(name, '') for name in _TYPES)} | {check[1]} |"


def _cell(result: Measurement) -> str:
    """Return a value with its bounds, in bold if outside."""
    check = result.check
    if result.error:
        return f"**{result.error.replace('|', '/')}**"
    if check.unit == SECONDS:
        return f"{result.value:.3g}"
    text = f"{result.value:.2g}, at most {check.highest:g}"
    text += f", at least {check.lowest:g}" if check.lowest else ""
    return text if result.passed else f"**{text}**"


def _as_json(result: Measurement) -> dict[str, Any]:
    check = result.check
    numbers = {"value": result.value, "lowest": check.lowest, "highest": check.highest}
    return {
        "name": check.name,
        "type": str(check.dtype).removeprefix("mlx.core."),
        "unit": check.unit,
        **{name: number if math.isfinite(number) else None for name, number in numbers.items()},
        "passed": result.passed,
        **({"error": result.error} if result.error else {}),
    }

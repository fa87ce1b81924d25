"""Run the cells of the notebook and store their outputs in its file: python -m tools.notebook

It needs no Jupyter. Run it after a change of examples/walkthrough.ipynb, and look at the images.
"""

import ast
import base64
import contextlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "examples" / "walkthrough.ipynb"


def run(cells: list[dict[str, Any]], **parameters: object) -> Iterator[tuple[dict[str, Any], dict[str, Any], str, Any]]:
    """Run the code cells one by one, in one set of names.

    Yield each cell, the names, the text that it printed and the value of its last line. ``parameters`` override the
    names that a cell with the tag "parameters" sets.
    """
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        *body, last = ast.parse("".join(cell["source"])).body
        printed, value = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            if isinstance(last, ast.Expr):
                exec(compile(ast.Module(body, []), cell["id"], "exec"), names)
                value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
            else:
                exec(compile(ast.Module([*body, last], []), cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= parameters
        yield cell, names, printed.getvalue(), value


def outputs(printed: str, value: object, count: int) -> list[dict[str, Any]]:
    """Describe what a cell printed and the image that is its value, as Jupyter stores them."""
    found: list[dict[str, Any]] = []
    if printed:
        found.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)})
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.save(file, "PNG", optimize=True)
        data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": [f"{value.size} image"]}
        found.append({"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    return found


def main() -> None:
    """Write the outputs."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    os.chdir(NOTEBOOK.parent)
    start = time.perf_counter()
    for count, (cell, _, printed, value) in enumerate(run(notebook["cells"]), start=1):
        cell["execution_count"], cell["outputs"] = count, outputs(printed, value, count)
        print(f"cell {count}: {time.perf_counter() - start:.1f} s after the start", flush=True)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

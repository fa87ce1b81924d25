"""What docs/server.md shows runs beside a server."""

import subprocess

import pytest
from PIL import Image

from command_line import ROOT
from test_documentation import blocks

BLOCKS = [block for block in blocks("docs/server.md") if block.mark == "server"]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.language)
def test_what_is_written_runs(block, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = block.text.replace("http://127.0.0.1:7860", server.url)
    assert server.url in text
    if block.language == "python":
        exec(compile(text, "docs/server.md", "exec"), {})
        with Image.open("circle.png") as drawn, Image.open(ROOT / "docs" / "pictures" / "circle.png") as shown:
            assert drawn.size == shown.size
    else:
        done = subprocess.run(text, shell=True, check=True, capture_output=True, text=True, timeout=120)
        assert '"images":["iVBOR' in done.stdout

"""Text files as editors write them: byte order marks, UTF-16, and ends of lines."""

import json
import os
from pathlib import Path

import pytest

from stable_diffusion.app.request import expand
from stable_diffusion.app.wildcards import read_wildcards
from stable_diffusion.cli import arguments
from stable_diffusion.files.text import read_json, read_text
from stable_diffusion.lora.files import _settings
from stable_diffusion.text.tokenizer import Tokenizer

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16"]
# Characters that are no ends of lines, though str.splitlines takes them for some.
ODD = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i"


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_prompts_and_wildcards(tmp_path, encoding, end):
    lines = ["# my list", "größe", "", f"  {ODD}  ", "猫 # a cat", "last"]
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    file = tmp_path / "list.txt"
    file.write_bytes((mark + end.join(lines)).encode(encoding))
    assert read_wildcards(tmp_path)("list") == ("größe", ODD, "猫 # a cat", "last")
    command = arguments.read("txt2image", ["--prompt_file", str(file), "--n_images", "1"])
    assert [image.text for image in expand(command.lines)] == ["größe", ODD, "猫", "last"]


@pytest.mark.parametrize("data", ["größe".encode("latin-1"), "a cat\n".encode("utf-16-le"), b"\xff\xfe\x00"])
def test_other_encodings_are_refused(tmp_path, capsys, data):
    file = tmp_path / "list.txt"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"list.txt is not readable as UTF-8 text .*; save it in UTF-8"):
        read_wildcards(tmp_path)("list")
    with pytest.raises(SystemExit):
        arguments.read("txt2image", ["--prompt_file", str(file)])
    assert "list.txt is not readable as UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_and_vocabularies(tmp_path, encoding):
    config = tmp_path / "adapter_config.json"
    config.write_bytes(json.dumps({"lora_alpha": 8}).encode(encoding))
    assert read_json(config) == {"lora_alpha": 8} == _settings(tmp_path / "adapter_model.safetensors", {})
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b": 3, "a": 4, "ab</w>": 5, "b</w>": 6}
    (tmp_path / "vocab.json").write_bytes(json.dumps(vocab).encode(encoding))
    (tmp_path / "merges.txt").write_bytes("#version: 0.2\r\na b</w>\r\n".encode(encoding))
    assert Tokenizer.from_folder(tmp_path).encode("ab") == [5]


def test_a_pipe_is_read_once(tmp_path):
    read, write = os.pipe()
    os.write(write, b"one\ntwo")
    os.close(write)
    assert read_text(Path(f"/dev/fd/{read}")) == "one\ntwo"
    os.close(read)

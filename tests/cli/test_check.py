"""The command line of the self-test: the table, JSON and exit codes."""

import json

import pytest

from stable_diffusion.cli.check import main
from stable_diffusion.models import layers


def test_the_table_can_be_pasted_and_the_exit_code_is_0(capsys):
    assert main(["silu", "scale"]) == 0
    *lines, _, total = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert lines[0].startswith("* MLX ") and {line.count("|") for line in table} == {6}
    assert table[0] == "| check | float32 | float16 | bfloat16 | unit |"
    assert table[2].startswith("| silu, scale 0.01 | ") and ", at most 1e-06 | " in table[2]
    assert total == "12 values, none outside the bounds"


def test_what_is_outside_a_bound_is_bold_and_the_exit_code_is_1(capsys, monkeypatch):
    monkeypatch.setattr(layers, "silu", lambda x: 1.1 * x)
    assert main(["silu", "scale 20"]) == 1
    out = capsys.readouterr().out
    assert out.count("**") == 6 and out.endswith("3 values, 3 outside the bounds\n")

    def breaks(x):
        raise RuntimeError("a | b")

    monkeypatch.setattr(layers, "silu", breaks)
    assert main(["silu", "scale 20"]) == 1
    assert "**RuntimeError: a / b**" in capsys.readouterr().out


def test_json(capsys):
    assert main(["--json", "time", "attention"]) == 0
    record = json.loads(capsys.readouterr().out)
    (check,) = record["checks"]
    assert check["unit"] == "s" and check["value"] > 0 and check["highest"] is None and check["passed"] is True
    assert record["findings"]


def test_a_name_that_no_check_has_is_refused(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["silu", "nonsense"])
    assert leaving.value.code == 2 and "'silu' and 'nonsense'" in capsys.readouterr().err


def test_ctrl_c_ends_it_in_one_line(capsys, monkeypatch):
    def interrupted(x):
        raise KeyboardInterrupt

    monkeypatch.setattr(layers, "silu", interrupted)
    with pytest.raises(SystemExit) as leaving:
        main(["silu", "scale 20"])
    assert leaving.value.code == 130 and capsys.readouterr().err.endswith(": interrupted after 0 of 3 values\n")


def test_an_unknown_device_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("SD_DEVICE", "tpu")
    with pytest.raises(SystemExit) as leaving:
        main(["silu"])
    assert leaving.value.code == 2 and "'tpu' is unknown" in capsys.readouterr().err

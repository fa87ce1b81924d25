"""JSON of strangers is read within limits; tests/app/test_text_files.py has the encodings and ends of lines."""

import pytest

from stable_diffusion.files.text import parse_json, read_json


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "more than 20 levels"),
        ('{"a":' * 480 + "1" + "}" * 480, "more than 20 levels"),
        ('{"a": [' + "[" * 20 + "]" * 20 + "]}", "more than 20 levels"),
        ('{"a": ' + "1" * 5000 + "}", "a number of 5000 digits"),
        ('{"a": "' + "x" * 10_000_000 + '"}', "more than 10 MB"),
        ("[1]", "holds a list, not an object"),
        ("null", "holds a NoneType"),
    ],
    ids=lambda text: text[:20],
)
def test_json_of_strangers(text, problem):
    with pytest.raises(ValueError) as error:
        parse_json(text, "a.json")
    message = str(error.value)
    assert message.startswith("a.json ") and problem in message and len(message) < 200 and "\n" not in message


def test_json(tmp_path):
    """Numbers that are no numbers, the last of equal keys, and 20 levels are what they are elsewhere."""
    assert parse_json('{"a": 1, "a": [2, -0.5, 1e400, null]}', "x") == {"a": [2, -0.5, float("inf"), None]}
    parse_json('{"a":' * 20 + "1" + "}" * 20, "x")
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"\xc3\xa4": 1}\r\n')
    assert read_json(tmp_path / "a.json") == {"ä": 1}
    (tmp_path / "a.json").write_bytes(b"\xff{\0")
    with pytest.raises(ValueError, match=r"^[^\n]*a\.json is not readable as UTF-8 text"):
        read_json(tmp_path / "a.json")

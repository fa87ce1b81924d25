"""What the commands print is printable, whatever is in names, prompts and files of strangers."""

import json
import logging
import re
import shutil

import mlx.core as mx
import pytest
from PIL import Image

from stable_diffusion.__main__ import run
from stable_diffusion.cli.streams import LONGEST, LineFormatter, in_one_line, printable
from stable_diffusion.images.files import save
from stable_diffusion.models.config import listed
from stable_diffusion.weights.catalog import ALIASES

EVIL = "\x1b]0;owned\x07\x9b31m\u202etxt\r\x85\ud83d"  # the title of a window, colours, turned text, half a character
SHOWN = "\\u001b]0;owned\\u0007\\u009b31m\\u202etxt"  # up to where a line ends
TINY = ["--model", "tiny", "--steps", "1", "--n_images", "1", "--output", "OUT/a.png"]


@pytest.fixture
def folder(tmp_path):
    """Files of a stranger: a LoRA, a model, a picture and a list of prompts."""
    delta = {"lora_unet_x.lora_down.weight": mx.zeros((4, 8)), "lora_unet_x.lora_up.weight": mx.zeros((8, 4))}
    name = EVIL.encode("utf-8", "ignore").decode()  # safetensors holds no halves of characters
    mx.save_safetensors(str(tmp_path / "lora.safetensors"), delta | {f"{name}.weight": mx.zeros(3)})
    shutil.copytree(ALIASES["tiny"].folder, tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    (tmp_path / "model/model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", EVIL]}))
    # pytest-xdist cannot send a log with halves of characters
    record = {"arguments": {"prompt": "x", "steps": 1, f"x{name}": 1}, EVIL: EVIL, "files": {EVIL: {EVIL: EVIL}}}
    texts = {"stable_diffusion": json.dumps(record), "c\x1b]0;owned": EVIL[:15]}
    save(Image.new("RGB", (8, 8)), tmp_path / "a.png", texts)
    (tmp_path / "prompts.txt").write_text(f"x --width {name}3\n", encoding="utf-8")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / f"{EVIL[:15]}.txt").write_text("x")
    return tmp_path


CASES = {  # words of a command, its exit code
    "a path that is not there": (["inspect", f"./{EVIL}"], 2),
    "a flag": (["txt2image", "x", f"--{EVIL}"], 2),
    "a value": (["txt2image", "x", "--sampler", EVIL], 2),
    "a prompt": (["txt2image", f"x {EVIL}", *TINY], 2),
    "names of wildcards": (["txt2image", "a __nothing__", "--wildcards", "OUT/words", *TINY], 2),
    "a line of prompts": (["txt2image", "--prompt_file", "OUT/prompts.txt", *TINY], 2),
    "names of tensors": (["txt2image", "x", "--lora", "OUT/lora.safetensors", *TINY], 2),
    "tensors of a LoRA": (["inspect", "OUT/lora.safetensors"], 0),
    "a class": (["inspect", "OUT/model"], 2),
    "a record": (["inspect", "OUT/a.png"], 0),
    "a record in JSON": (["inspect", "OUT/a.png", "--json"], 0),
    "a remark": (["txt2image", "--from_image", "OUT/a.png", *TINY[:-4], "--output", "OUT/b.png"], 0),
    "the name of a picture": (["txt2image", "x", *TINY[:-1], f"OUT/{EVIL[:15]}.png"], 0),
    "the name of a picture in JSON": (["txt2image", "x", "--json", *TINY[:-1], f"OUT/{EVIL[:15]}.png"], 0),
    "what is converted": (["convert", "tiny", f"OUT/{EVIL[:15]}"], 0),
}


@pytest.mark.parametrize("words, code", CASES.values(), ids=CASES)
def test_nothing_reaches_the_terminal_that_it_obeys(folder, capsys, words, code, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        found = run([word.replace("OUT", str(folder)) for word in words])
    except SystemExit as error:
        found = error.code
    out, err = capsys.readouterr()
    assert found == code, err
    assert re.fullmatch(r"[\n\t\x20-\x7e]*", out + err) and "]0;owned" in out + err, out + err
    assert "Traceback" not in err and (code == 0 or err.count("\n") == 1)
    if "--json" in words:
        assert "\x1b" in json.dumps(json.loads(out), ensure_ascii=False).replace("\\u001b", "\x1b")


def test_printable():
    """All that is text stays: marks, emoji and their joiners, other scripts, lines and columns."""
    text = "naïve 富士山 שלום e\u0301 \U0001f469\u200d\U0001f680\ufe0f\n\ta\u00adb"
    assert printable(text) == text
    assert printable(EVIL) == f"{SHOWN}\\u000d\\u0085\\ud83d"
    assert json.loads(f'"{printable(EVIL)}"') == EVIL
    assert in_one_line(ValueError("a\nb\r\nc\u2028d\x1b")) == "a b c d\\u001b"
    deep, ending = "/" + "folder/" * 30 + "unet/w.safetensors", "https://a/b/c/d " * 5
    assert in_one_line(f"unet ({deep}): {ending}") == f"unet (.../unet/w.safetensors): {ending}"


def test_no_message_is_longer_than_300_characters():
    """Lists are a count and the first three; of anything else that is long, the beginning and the end are shown."""
    names = [f"down_blocks.{i}.attentions.1.transformer_blocks.0.attn1.to_q" for i in range(500)]
    assert listed(["a", "b", "c"]) == "a, b, c" and listed("abcd") == "a, b, c and 1 more" and listed([]) == ""
    assert listed(names).startswith(f"{names[0]}, {names[1]}") and listed(names).endswith("and 498 more")
    assert len(listed(["x" * 10_000] * 9)) < 120
    message = f"the model is missing {', '.join(names)}; choose another file"
    shown = in_one_line(message)
    assert len(shown) == LONGEST == 300 and shown.startswith(message[:100]) and shown.endswith("; choose another file")
    for level, length in ((logging.WARNING, 300), (logging.INFO, len(message))):
        record = logging.LogRecord("x", level, "", 0, message, (), None)
        assert len(LineFormatter("%(message)s").format(record)) == length

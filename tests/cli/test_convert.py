"""Converting: the same images, files that diffusers reads, and a folder that is complete or not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from stable_diffusion import StableDiffusion, StableDiffusionXL
from stable_diffusion.cli.convert import convert, main
from stable_diffusion.cli.types import file_size
from stable_diffusion.lora.files import read_lora
from stable_diffusion.lora.layers import fuse
from stable_diffusion.weights import save
from stable_diffusion.weights.files import open_checkpoint, read_tensors
from stable_diffusion.weights.quantize import quantize

ROOT = Path(__file__).parents[2]


def image(sd: StableDiffusion) -> np.ndarray:
    """A small step with every part in use."""
    (x,) = sd.generate_latents("the red cat", 1, 1, cfg_weight=3.0, negative_text="blue", latent_size=(2, 2), seed=3)
    return np.array(sd.decode(x))


def weights(sd: StableDiffusion) -> dict[str, mx.array]:
    return {
        f"{part}.{name}": value
        for part in ("unet", "autoencoder", "text_encoder", "text_encoder_1", "text_encoder_2")
        if hasattr(sd, part)
        for name, value in tree_flatten(getattr(sd, part).parameters())
    }


def same(a: StableDiffusion, b: StableDiffusion) -> bool:
    """Equal names, types and values of all weights."""
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(
        value.dtype == theirs[name].dtype and mx.array_equal(value, theirs[name]).item() for name, value in ours.items()
    )


# --- the same images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("float16", [True, False])
def test_converted_is_quantized_at_load_bit_for_bit(tmp_path, sd1_folder, xl_folder, float16):
    dtype, bits = ("float16" if float16 else "float32"), {"unet_bits": 8, "text_bits": 4}
    for name, source, cls in (("sd1", sd1_folder, StableDiffusion), ("xl", xl_folder, StableDiffusionXL)):
        folder = convert(source, tmp_path / name, dtype=dtype, **bits)
        expected, made = cls(source, float16, **bits), cls(folder, float16)
        assert same(made, expected)
        if not float16 or name == "sd1":  # half precision is slow without a GPU
            assert np.array_equal(image(made), image(expected))
        assert same(cls(folder, float16, **bits), made)  # asking for what is there changes nothing
        assert not same(cls(source, float16), made)


def test_the_bundled_model_too(tmp_path):
    folder = convert("tiny", tmp_path / "small", unet_bits=4, text_bits=8)
    made = StableDiffusion(folder, True)
    assert same(made, StableDiffusion("tiny", True, unet_bits=4, text_bits=8))
    assert (made.default_steps, made.default_guidance) == (20, 4.0)  # the catalog knows the source, not the folder


@pytest.mark.parametrize("defaults", ["fast", {"steps": None}, {"guidance": []}])
def test_damaged_defaults(tmp_path, defaults):
    index = convert("tiny", tmp_path / "small") / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_defaults": defaults}))
    with pytest.raises(ValueError, match=r"model_index\.json"):
        open_checkpoint(tmp_path / "small")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_only_what_is_computed_in_half_precision_is_stored_so(tmp_path, sd1_folder, dtype):
    folder = convert(sd1_folder, tmp_path / "new", dtype=dtype)
    for part, expected in {"unet": dtype, "text_encoder": dtype, "vae": "float32"}.items():
        (file,) = open_checkpoint(folder).components[part].files
        assert {value.dtype for value in mx.load(str(file)).values()} == {getattr(mx, expected)}
    if dtype != "bfloat16":
        half = dtype == "float16"
        assert same(StableDiffusion(folder, half), StableDiffusion(sd1_folder, half))


def test_shards_are_read_and_written(tmp_path, xl_folder):
    sharded = convert(xl_folder, tmp_path / "shards", dtype="float32", max_shard_size=300_000)
    assert len(open_checkpoint(sharded).components["unet"].files) > 3
    whole = convert(sharded, tmp_path / "whole", dtype="float32")
    assert len(open_checkpoint(whole).components["unet"].files) == 1
    for folder in (sharded, whole):
        assert same(StableDiffusionXL(folder), StableDiffusionXL(xl_folder))


def test_a_converted_folder_converts_again(tmp_path, sd1_folder):
    once = convert(sd1_folder, tmp_path / "once", unet_bits=8)
    again = convert(once, tmp_path / "again", unet_bits=8)
    assert same(StableDiffusion(once, True), StableDiffusion(again, True))
    with pytest.raises(ValueError, match=r"^unet of .*once/unet: its weights are stored in 8 bits, not in the 4"):
        convert(once, tmp_path / "other", unet_bits=4)
    assert sorted(os.listdir(tmp_path)) == ["again", "once"]


# --- other programs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_diffusers_reads_what_it_wrote(tmp_path, family, sd1_folder, xl_folder):
    source = sd1_folder if family == "sd1" else xl_folder
    cls = diffusers.StableDiffusionPipeline if family == "sd1" else diffusers.StableDiffusionXLPipeline
    folder = convert(source, tmp_path / "new", dtype="float32", max_shard_size=400_000)
    ours, theirs = cls.from_pretrained(folder), cls.from_pretrained(source)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if family == "xl" else [])):
        a, b = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a), part
    assert ours.scheduler.config == theirs.scheduler.config
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()


def test_the_small_files(tmp_path):
    folder = convert("tiny", tmp_path / "new", unet_bits=8)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None] and index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert json.loads((folder / "unet" / "config.json").read_text())["quantization"] == {"bits": 8, "group_size": 32}
    assert "quantization" not in json.loads((folder / "text_encoder" / "config.json").read_text())
    source = open_checkpoint("tiny").folder
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        assert (folder / "tokenizer" / name).read_bytes() == (source / "tokenizer" / name).read_bytes()


# --- other sources, and LoRAs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 8])
def test_a_lora_is_in_the_weights(tmp_path, sd1_folder, bits):
    path, tensors = tmp_path / "red.safetensors", {}
    layers = {"down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": 32, "up_blocks_1_attentions_0_proj_in": 64}
    for i, (layer, width) in enumerate(layers.items()):
        for j, (side, shape) in enumerate({"down": (2, width), "up": (width, 2)}.items()):
            value = mx.random.normal(shape, key=mx.random.key(2 * i + j))
            tensors[f"lora_unet_{layer}.lora_{side}.weight"] = value
    mx.save_safetensors(str(path), tensors)
    dest = tmp_path / "new"
    quantized = [] if bits is None else ["--unet_bits", str(bits)]
    assert main([str(sd1_folder), str(dest), "--dtype", "float32", "--lora", f"{path}:0.5", *quantized]) == 0
    expected, made = StableDiffusion(sd1_folder), StableDiffusion(dest)
    fuse({"unet": expected.unet}, [(read_lora(path), 0.5)], keep=False)
    if bits is not None:
        quantize(expected.unet, bits, 32)
    assert same(made, expected)
    assert not same(made, StableDiffusion(sd1_folder, unet_bits=bits))


def test_parts_and_prediction_from_elsewhere(tmp_path, sd1_folder, xl_folder):
    parts = {"vae": xl_folder / "vae"}
    folder = convert(sd1_folder, tmp_path / "new", dtype="float32", prediction="v_prediction", parts=parts)
    config = json.loads((folder / "vae" / "config.json").read_text())
    assert config == json.loads((xl_folder / "vae" / "config.json").read_text())
    assert StableDiffusion(folder).schedule.config.prediction_type == "v_prediction"


def test_a_single_file(tmp_path, sd1_folder):
    """What stands in no file, the small files of a folder, is made."""
    checkpoint = open_checkpoint(sd1_folder)
    tensors = {
        f"{name}.{key}": value
        for name, part in checkpoint.components.items()
        for key, value in read_tensors(part).items()
    }
    attention = "vae.encoder.mid_block.attentions.0.to_q.weight"  # a 1×1 convolution in files of the original code
    mx.save_safetensors(str(tmp_path / "one.safetensors"), tensors | {attention: tensors[attention][..., None, None]})
    folder, vocabulary = tmp_path / "new", str(checkpoint.tokenizers["tokenizer"])
    arguments = ["--dtype", "float32", "--tokenizer", vocabulary]
    assert main([str(tmp_path / "one.safetensors"), str(folder), *arguments]) == 0
    assert same(StableDiffusion(folder), StableDiffusion(sd1_folder))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"] and index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    special = json.loads((folder / "tokenizer" / "special_tokens_map.json").read_text())
    assert special["pad_token"] == "<|endoftext|>"
    for name, part in open_checkpoint(folder).components.items():
        written = {f"{name}.{key}": value for key, value in mx.load(str(part.files[0])).items()}
        assert written.keys() == {key for key in tensors if key.startswith(f"{name}.")}
        assert all(mx.array_equal(tensors[key], value).item() for key, value in written.items())


# --- all or nothing ----------------------------------------------------------------------------------------------

_DIES = """
import os, signal, sys
from stable_diffusion.cli.convert import main
from stable_diffusion.weights import save

owner = {"fsync": os, "contiguous": save.mx, "rename": save.Path}[sys.argv[1]]
name, count = sys.argv[1], int(sys.argv[2])
original = getattr(owner, name)

def last(*arguments):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

setattr(owner, name, last)
sys.exit(main(sys.argv[3:]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    """A Python process of its own."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


# Of the bundled model 12 files are written: config.json and weights of 3 networks, 4 of the tokenizer, 2 more.
@pytest.mark.parametrize(
    "moment",
    [("fsync", 1), ("contiguous", 1), ("contiguous", 250), ("fsync", 4), ("fsync", 11), ("rename", 1)],
    ids=str,
)
def test_killed_and_started_again(tmp_path, moment):
    dest = tmp_path / "new"
    killed = run("-c", _DIES, moment[0], str(moment[1]), "tiny", str(dest), "-q")
    assert killed.returncode == -9, killed.stderr
    assert os.listdir(tmp_path) == [".new.partial"]
    if moment[0] != "rename":  # by then all of it is there
        with pytest.raises(ValueError, match=r"has no model_index\.json"):
            open_checkpoint(tmp_path / ".new.partial")
    assert main(["tiny", str(dest), "-q"]) == 0
    assert os.listdir(tmp_path) == ["new"]
    assert same(StableDiffusion(dest, True), StableDiffusion("tiny", True, unet_bits=8, text_bits=4))


def test_killed_after_the_end(tmp_path):
    """Synced last is the folder that the new one is in: after the 12 files, the 5 folders in it, and itself."""
    assert run("-c", _DIES, "fsync", "19", "tiny", str(tmp_path / "new")).returncode == -9
    assert os.listdir(tmp_path) == ["new"]
    assert same(StableDiffusion(tmp_path / "new", True), StableDiffusion("tiny", True))


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from stable_diffusion.cli.convert import main; main(sys.argv[1:])"
    )
    result = run("-c", code, "tiny", str(tmp_path / "new"))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("stable_diffusion.cli.convert: error: ") and "File too large" in result.stderr
    assert os.listdir(tmp_path) == []


def test_as_a_program(tmp_path):
    result = run("-m", "stable_diffusion.cli.convert", "tiny", str(tmp_path / "new"), "-q")
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'new'}\n")
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["unet:", "vae:", "text_encoder:"]
    assert "8 bits" in result.stderr.splitlines()[0]


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as error:
        main(list(arguments))
    assert error.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("stable_diffusion.cli.convert: error: ")
    return line


@pytest.mark.parametrize(
    "error, code", [(RuntimeError("[read] gone"), 1), (MemoryError(), 1), (KeyboardInterrupt(), 130)]
)
def test_what_fails_on_the_way_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, error, code):
    def fail(value: mx.array) -> mx.array:
        raise error

    monkeypatch.setattr(save.mx, "contiguous", fail)
    with pytest.raises(SystemExit) as exit:
        main(["tiny", str(tmp_path / "new")])
    err = capsys.readouterr().err
    assert exit.value.code == code and err.count("\n") == 1 and "nothing was written" in err
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room_is_seen_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: type("", (), {"free": 10_000_000})())
    assert "needs 0.02 GB and its disk has 0.01 GB left: make room" in refused(capsys, "tiny", str(tmp_path / "new"))
    assert os.listdir(tmp_path) == []


def test_a_destination_that_is_taken(tmp_path, capsys):
    """It is refused before the source is looked for."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    assert "is not empty: choose another name, or remove it" in refused(capsys, "nothing", str(tmp_path / "full"))
    assert "is a file" in refused(capsys, "nothing", str(tmp_path / "full" / "mine"))
    assert "there is no folder" in refused(capsys, "nothing", str(tmp_path / "no" / "where"))
    assert os.listdir(tmp_path / "full") == ["mine"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["no-such-model"], "unknown model 'no-such-model'"),
        (["./no-such-folder"], "./no-such-folder"),
        (["tiny", "--unet_bits", "7"], "invalid choice: 7"),
        (["tiny", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["tiny", "--max_shard_size", "many"], "'many' is not a size such as 5GB or 500MB"),
        (["tiny", "--lora", "no-such.safetensors:0.5"], "there is no LoRA at no-such.safetensors"),
        (["tiny", "--revision", "main"], "revision"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, arguments, named):
    source, *options = arguments
    assert named in refused(capsys, source, str(tmp_path / "new"), *options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1.5g", 1_500_000_000), ("300MB", 3 * 10**8), ("7", 7)])
def test_sizes(text, size):
    assert file_size(text) == size

"""What is written: the files, tensor by tensor, and the folder, all or nothing."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import safetensors
from mlx.utils import tree_flatten

from configs import UNETS
from models.test_taesd import SMALL as TAESD
from oracle import perturb, tensors
from stable_diffusion.weights import save
from stable_diffusion.weights.files import Component
from stable_diffusion.weights.load import build, fill, load_component
from stable_diffusion.weights.quantize import quantize, remaining_quantization
from stable_diffusion.weights.save import check_space, new_folder, stored_tensors, write_weights

ONE_FILE = 10**12
TEXT = {"architectures": ["CLIPTextModelWithProjection"], "hidden_size": 64, "intermediate_size": 128}
TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "projection_dim": 32}


def values(module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def same(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> bool:
    """Equal names, types and values."""
    return ours.keys() == theirs.keys() and all(
        a.dtype == theirs[name].dtype and mx.array_equal(a, theirs[name]).item() for name, a in ours.items()
    )


# --- files -------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_diffusers_has(tmp_path):
    """A network that no conversion of a whole model writes; tests/app/test_convert.py has the others."""
    oracle = tensors(perturb(diffusers.AutoencoderTiny.from_config(TAESD)))
    module = build("vae", TAESD)
    fill(module, oracle)
    (file,) = write_weights(tmp_path, "model", stored_tensors(module), ONE_FILE)
    with safetensors.safe_open(file, "np") as reader:
        assert reader.metadata() == {"format": "pt"}
        written = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118  (it is no dictionary)
    assert written.keys() == oracle.keys()
    for key, value in oracle.items():
        assert written[key].shape == value.shape and np.array_equal(written[key], value), key


@pytest.mark.parametrize("bits", [None, 3, 8])
def test_written_and_loaded_again(tmp_path, bits):
    for name, config, group in (("unet", UNETS["sd1"], 32), ("text_encoder_2", TEXT, 64)):
        module = build(name, config)
        module.set_dtype(mx.float16 if bits else mx.bfloat16)
        if bits:
            config = config | {"quantization": {"bits": bits, "group_size": group}}
            quantize(module, bits, group)
        kept = values(module)
        files = write_weights(tmp_path, name, stored_tensors(module), ONE_FILE)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        again = load_component(Component(name, config, tuple(files)), mx.float16 if bits else None)
        assert mx.get_peak_memory() - before < 2**16  # still lazy
        assert same(values(again), kept)


def test_shards(tmp_path):
    module = build("unet", UNETS["sd1"])
    kept = values(module)
    total = sum(value.nbytes for value in kept.values())
    limit = total // 3
    assert max(value.nbytes for value in kept.values()) < limit
    files = write_weights(tmp_path, "diffusion_pytorch_model", stored_tensors(module), limit)
    count = len(files)
    assert 3 <= count <= 4
    assert [f.name for f in files] == [
        f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
    ]
    assert all(file.stat().st_size <= limit + 2**16 for file in files)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert {name: index["weight_map"][name] for name in kept} == index["weight_map"]
    for name, file in index["weight_map"].items():
        assert name in mx.load(str(tmp_path / file))
    assert same(values(load_component(Component("unet", UNETS["sd1"], tuple(files)), None)), kept)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    files = write_weights(tmp_path, "model", {"a": mx.ones(10), "b": mx.ones(1000), "c": mx.ones(10)}, 500)
    assert [set(mx.load(str(file))) for file in files] == [{"b"}, {"a", "c"}]


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    size = 2**18
    weights = {f"{i:03}": mx.random.normal((size,), key=mx.random.key(i)).astype(mx.float16) for i in range(64)}
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    write_weights(tmp_path, "model", weights, ONE_FILE)
    assert not weights
    assert mx.get_peak_memory() - before < 16 * size


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_values_that_are_not_finite_are_refused(tmp_path, dtype):
    for bad in (math.inf, -math.inf, math.nan, *([1e5] if dtype == mx.float16 else [])):
        value = mx.array([[1.0, 2.0], [3.0, bad]]).astype(dtype)
        with pytest.raises(ValueError, match="second is not finite in "):
            write_weights(tmp_path, "model", {"first": mx.ones(2), "second": value}, ONE_FILE)
    write_weights(tmp_path, "model", {"x": mx.array([65504.0, -65504.0]).astype(dtype)}, ONE_FILE)


# --- quantized parts: what is refused ----------------------------------------------------------------------------


def quantized(tmp_path: Path, change: dict, **tensors: mx.array | None) -> Component:
    """A quantized text encoder whose ``quantization`` and tensors are changed; None takes a tensor away."""
    module = quantize(build("text_encoder_2", TEXT), 4, 64)
    weights = stored_tensors(module) | tensors
    files = write_weights(tmp_path, "model", {k: v for k, v in weights.items() if v is not None}, ONE_FILE)
    stored = {"bits": 4, "group_size": 64} | change
    return Component("text_encoder_2", TEXT | {"quantization": stored}, tuple(files))


def refused(component: Component, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        load_component(component, *arguments)
    assert "\n" not in str(error.value) and str(component.files[0]) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("change", [{"bits": 7}, {"bits": "4"}, {"group_size": 48}, {"bits": [4]}, "q4"])
def test_unknown_quantization_is_refused(tmp_path, change):
    component = quantized(tmp_path, change if isinstance(change, dict) else {})
    if isinstance(change, str):
        component.config["quantization"] = change
    assert "is not one that this library reads" in refused(component)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    layer = "text_model.encoder.layers.0.mlp.fc1"
    assert f"missing: {layer}.biases" in refused(quantized(tmp_path, {}, **{f"{layer}.biases": None}))
    assert "misshapen" in refused(quantized(tmp_path, {"group_size": 32}))
    message = refused(quantized(tmp_path, {}, **{f"{layer}.weight": mx.zeros((128, 7), dtype=mx.uint32)}))
    assert f"{layer}.weight (128, 7)" in message and f"unexpected: {layer}.biases, {layer}.scales" in message
    message = refused(quantized(tmp_path, {}, **{f"{layer}.weight": mx.zeros((128, 8))}))
    assert f"1 of the wrong type: {layer}.weight of" in message
    missing = quantized(tmp_path, {})
    config = {key: value for key, value in missing.config.items() if key != "quantization"}
    assert "unexpected" in refused(Component(missing.name, config, missing.files))


def test_other_bits_than_stored_are_refused_and_the_same_change_nothing(tmp_path):
    component = quantized(tmp_path, {})
    with pytest.raises(ValueError, match="stored in 4 bits, not in 8"):
        remaining_quantization(component, 8)
    assert remaining_quantization(component, 4) is None
    assert remaining_quantization(replace(component, config=TEXT), 4) == (4, 64)


# --- the folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_appears_when_it_is_complete(tmp_path, monkeypatch, is_there):
    dest, synced = tmp_path / "new", []
    monkeypatch.setattr(os, "fsync", synced.append)
    if is_there:  # and empty
        dest.mkdir()
    with new_folder(dest) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not dest.exists() or os.listdir(dest) == []
        assert synced == []
    assert (dest / "sub" / "file").read_text() == "x" and len(synced) == 4  # the file and the folders around it
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_run_that_fails(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("x")
        raise error
    assert os.listdir(tmp_path) == []


def test_a_place_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for path, reason in {"full": "not empty", "file": "is a file", "no/where": "there is no folder"}.items():
        with pytest.raises(ValueError, match=reason), new_folder(tmp_path / path):
            raise AssertionError("it was let in")
    with pytest.raises(ValueError, match="not empty"), new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("x")
        (tmp_path / "full").rename(tmp_path / "new")  # meanwhile
    assert sorted(os.listdir(tmp_path)) == ["file", "new"] and os.listdir(tmp_path / "new") == ["mine"]


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path):
    for name in (".new.partial", ".other.partial"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "old").write_text("x")
    with new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("x")
    assert os.listdir(tmp_path / "new") == ["file"]
    assert (tmp_path / ".other.partial" / "unet" / "old").exists() and not (tmp_path / ".new.partial").exists()


def test_two_runs_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from stable_diffusion.weights.save import new_folder\n"
        "with new_folder(Path(sys.argv[1])): pass"
    )
    with new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("x")
        other = subprocess.run([sys.executable, "-c", code, tmp_path / "new"], capture_output=True, text=True)
        assert "is being written by another run" in other.stderr
    assert os.listdir(tmp_path / "new") == ["file"]


def test_the_disk_is_asked_before(tmp_path, monkeypatch):
    check_space(tmp_path / "new", 1)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: type("", (), {"free": 2_000_000_000})())
    with pytest.raises(OSError, match=r"needs 5.10 GB and its disk has 2.00 GB left: make room"):
        check_space(tmp_path / "new", 5_100_000_000)

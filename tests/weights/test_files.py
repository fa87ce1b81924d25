"""Local checkpoints: what is read from a folder, what is refused, and files that are not what they claim."""

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hub_server import SD_PARTS, XL_PARTS, checkpoint_files, safetensors, shard, to_json, write
from stable_diffusion.weights import catalog
from stable_diffusion.weights.files import Component, open_checkpoint, read_file, read_tensors
from stable_diffusion.weights.formats.safetensors import check_safetensors

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files():
    return checkpoint_files()


def refused(model, **options) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        open_checkpoint(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- folders -----------------------------------------------------------------------------------------------------


def test_folder_is_read(tmp_path, files):
    write(tmp_path, files)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.name == str(tmp_path)
    assert checkpoint.pipeline == checkpoint.index["_class_name"] == "StableDiffusionPipeline"
    assert checkpoint.scheduler == {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000}
    assert checkpoint.tokenizers == {"tokenizer": tmp_path / "tokenizer"}
    assert list(checkpoint.components) == ["unet", "vae", "text_encoder"]
    config, file = {"_class_name": "UNet2DConditionModel", "part": "unet"}, "unet/diffusion_pytorch_model.safetensors"
    assert checkpoint.components["unet"] == Component("unet", config, (tmp_path / file,))
    assert (checkpoint.steps, checkpoint.guidance) == (50, 7.5)


def test_xl_and_refiner(tmp_path):
    write(tmp_path, checkpoint_files(pipeline="StableDiffusionXLPipeline", parts=XL_PARTS))
    base = open_checkpoint(tmp_path)
    assert list(base.components) == ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert list(base.tokenizers) == ["tokenizer", "tokenizer_2"]
    assert (base.steps, base.guidance) == (50, 5.0)
    parts = XL_PARTS | {"text_encoder": [None, None], "tokenizer": [None, None]}
    write(tmp_path / "refiner", checkpoint_files(pipeline="StableDiffusionXLImg2ImgPipeline", parts=parts))
    refiner = open_checkpoint(tmp_path / "refiner")
    assert list(refiner.components) == ["unet", "vae", "text_encoder_2"]
    assert list(refiner.tokenizers) == ["tokenizer_2"]


@pytest.mark.parametrize(
    ("halves", "float16", "expected"),
    [(("", ".fp16"), False, ""), (("", ".fp16"), True, ".fp16"), (("",), True, ""), ((".fp16",), False, ".fp16")],
)
def test_precision(tmp_path, halves, float16, expected):
    write(tmp_path, checkpoint_files(halves=halves))
    components = open_checkpoint(tmp_path, float16=float16).components
    assert [path.name for path in components["unet"].files] == [f"diffusion_pytorch_model{expected}.safetensors"]
    assert [path.name for path in components["text_encoder"].files] == [f"model{expected}.safetensors"]


def test_either_name_of_a_weight_file(tmp_path, files):
    files["unet/model.safetensors"] = files.pop("unet/diffusion_pytorch_model.safetensors")
    files["text_encoder/diffusion_pytorch_model.safetensors"] = files.pop("text_encoder/model.safetensors")
    components = open_checkpoint(write(tmp_path, files)).components
    assert [path.name for path in components["unet"].files] == ["model.safetensors"]
    assert [path.name for path in components["text_encoder"].files] == ["diffusion_pytorch_model.safetensors"]


INDICES = [  # as diffusers and transformers have spelled them
    "{}.safetensors.index.json",
    "{}.safetensors.index.fp16.json",
    "{}.safetensors.fp16.index.json",
    "{}.fp16.safetensors.index.json",
]


@pytest.mark.parametrize("spelling", INDICES)
@pytest.mark.parametrize("float16", [False, True])
def test_shards(tmp_path, files, spelling, float16):
    files, stem = shard(files, "unet"), "unet/diffusion_pytorch_model"
    files[spelling.format(stem)] = files.pop(INDICES[0].format(stem))
    write(tmp_path, files)
    unet = open_checkpoint(tmp_path, float16=float16).components["unet"]
    assert len(unet.files) == 2
    tensors = read_tensors(unet)
    assert {name: tensor[0].item() for name, tensor in tensors.items()} == {"weight_0": 0.0, "weight_1": 1.0}
    unet.files[1].unlink()
    assert unet.files[1].name in refused(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, {"a": 1}, {"a": "../b.safetensors"}, {"a": "b.bin"}])
def test_bad_index_of_shards(tmp_path, files, weight_map):
    files = shard(files, "unet")
    files["unet/diffusion_pytorch_model.safetensors.index.json"] = to_json({"weight_map": weight_map})
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in refused(write(tmp_path, files))


def test_scheduler_class_may_stand_in_the_index_only(tmp_path, files):
    files["scheduler/scheduler_config.json"] = b"{}"
    assert open_checkpoint(write(tmp_path, files)).scheduler == {"_class_name": "PNDMScheduler"}


NEEDED = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "tokenizer/merges.txt"]


@pytest.mark.parametrize("name", NEEDED)
def test_missing_file_is_named(tmp_path, files, name):
    del files[name], files["tokenizer/tokenizer.json"]
    assert f"has no {name}" in refused(write(tmp_path, files))


def test_vocabulary_in_one_file(tmp_path, files):
    del files["tokenizer/vocab.json"], files["tokenizer/merges.txt"]
    assert open_checkpoint(write(tmp_path, files)).tokenizers == {"tokenizer": tmp_path / "tokenizer"}


def test_missing_weights_are_named(tmp_path, files):
    del files["vae/diffusion_pytorch_model.safetensors"], files["vae/diffusion_pytorch_model.bin"]
    assert "vae/diffusion_pytorch_model.safetensors is missing" in refused(write(tmp_path / "b", files))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_bad_json_is_named(tmp_path, files, content):
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        message = refused(write(tmp_path, files | {name: content}))
        assert message.startswith(f"{tmp_path / name} ") and "download it again" in message


OTHERS = ["FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusionUpscalePipeline", "StableDiffusionGLIGENPipeline"]


@pytest.mark.parametrize("pipeline", [*OTHERS, None, ["StableDiffusionPipeline"]])
def test_unsupported_pipeline_is_refused_by_name(tmp_path, pipeline):
    message = refused(write(tmp_path, checkpoint_files(pipeline=pipeline)))
    assert f"is a {pipeline}, which is not supported" in message


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (
            {"_class_name": "EulerDiscreteScheduler", "sigma_data": 0.5},
            "an EDM model with the scheduler 'Euler",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "is a flow matching model"),
        (
            {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
            "is a flow matching model",
        ),
        ({"_class_name": [1]}, "its scheduler class, [1], is not a text"),
    ],
)
def test_noise_of_another_kind_is_refused_by_name(tmp_path, files, scheduler, message):
    files["scheduler/scheduler_config.json"] = to_json(scheduler)
    text = refused(write(tmp_path, files))
    assert message in text and str(tmp_path) in text and len(text) < 300


def test_a_part_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert "has no model_index.json, but is only a 'FluxTransformer2DModel'" in refused(tmp_path)


MODES = ["Img2Img", "Inpaint", "InstructPix2Pix", "Depth2Img", "XL", "XLImg2Img", "XLInpaint"]
SUPPORTED = [*(f"StableDiffusion{mode}Pipeline" for mode in MODES), "StableDiffusionInpaintPipelineLegacy"]


@pytest.mark.parametrize("pipeline", [*SUPPORTED, "LatentConsistencyModelPipeline"])
def test_supported_pipelines(tmp_path, pipeline):
    assert open_checkpoint(write(tmp_path, checkpoint_files(pipeline=pipeline))).pipeline == pipeline


@pytest.mark.parametrize(
    "part, cls", [("unet", "SD3Transformer2DModel"), ("text_encoder", "T5EncoderModel"), ("tokenizer", "T5Tokenizer")]
)
def test_unsupported_part_is_refused_by_name(tmp_path, part, cls):
    message = refused(write(tmp_path, checkpoint_files(parts=SD_PARTS | {part: ["library", cls]})))
    assert f"has a {part} of class {cls}; supported: " in message


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", "scheduler"])
def test_part_that_the_index_leaves_out(tmp_path, files, part):
    index = json.loads(files["model_index.json"])
    for entry in ([None, None], [], None):
        files["model_index.json"] = to_json(index | {part: entry})
        assert f"its model_index.json names no {part}" in refused(write(tmp_path, files))


# --- names and paths ---------------------------------------------------------------------------------------------


NOWHERE = ["../none", "/none", "~/none", "~nobody-here/none", Path("sdxl"), "m.safetensors", "./m.pt"]


@pytest.mark.parametrize("model", NOWHERE)
def test_path_that_is_not_there(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{model}: no such folder" in refused(model)


def test_file_is_no_checkpoint(tmp_path):
    for name, message in (("model.safetensors", "is damaged"), ("model.zip", "not a weights file")):
        (tmp_path / name).write_bytes(b"?")
        assert message in refused(tmp_path / name)


KINDS = [  # what other programs and servers leave under the names of weights
    (b"", "is empty: download it again"),
    (b"GGUF\1\0\0\0" + bytes(40), "its GGUF header is invalid"),
    (b"\n<!DOCTYPE html><html>Not found</html>", "is a web page, not the file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 34\n", "is only a Git LFS pointer"),
    (b'{"error": "Repository not found"}', "is JSON text"),
    (b"\x08\x07\x12\x07pytorch" + bytes(40), "is an ONNX model"),
    (b"\x89HDF\r\n\x1a\n" + bytes(40), "is an HDF5 file"),
    (b"\x89PNG\r\n\x1a\n" + bytes(40), "is a PNG image"),
    (b"\x1f\x8b\x08" + bytes(40), "is a gzip archive: unpack it"),
    (b"PK\3\4" + bytes(40), "is not loaded"),
    (bytes(40), ""),
]


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "bin", "onnx"])
@pytest.mark.parametrize("content, message", KINDS)
def test_another_file_under_a_name_of_weights(tmp_path, suffix, content, message):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    for text in (refused(path), refused("tiny", parts={"unet": path})):
        is_known = suffix != "onnx" or not content.startswith((b"PK", b"GGUF"))
        assert str(path) in text and (message if is_known else "not a weights file") in text and len(text) < 300
        assert "delete" not in text or message == ""


def test_the_content_decides_and_not_the_name(tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "pickle.safetensors")
    torch.save({"a": torch.arange(3.0)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for suffix in ("ckpt", "bin", "pt"):
        (tmp_path / f"safe.{suffix}").write_bytes(safetensors(a=mx.arange(3.0)))
    for path in tmp_path.iterdir():
        assert read_file(path)[0]["a"].tolist() == [0, 1, 2], path
    dangerous = pickle.dumps({"a": print})
    (tmp_path / "x.safetensors").write_bytes(dangerous)
    with pytest.raises(ValueError, match=r"x\.safetensors is not loaded: "):
        read_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("model", ["", "\0", "x" * 5000])
def test_unknown_name(model):
    assert "unknown model" in refused(model)


def test_relative_folder_and_home(tmp_path, monkeypatch, files):
    write(tmp_path / "models" / "mine", files)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in ("models/mine", "~/models/mine"):
        assert open_checkpoint(model).name == model
    monkeypatch.chdir(tmp_path / "models" / "mine")
    assert open_checkpoint(".").tokenizers["tokenizer"] == Path("tokenizer")


def test_alias_wins_over_a_folder_that_is_no_checkpoint(tmp_path, monkeypatch, files):
    write(tmp_path / "bundled", files)
    monkeypatch.setitem(catalog.ALIASES, "tiny", catalog.Entry(folder=tmp_path / "bundled", steps=20, guidance=4.0))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    checkpoint = open_checkpoint("tiny")
    assert checkpoint.tokenizers["tokenizer"].parent == tmp_path / "bundled"
    assert (checkpoint.steps, checkpoint.guidance) == (20, 4.0)
    write(tmp_path / "tiny", files)
    assert open_checkpoint("tiny").tokenizers["tokenizer"].parent == Path("tiny")


def test_revision_is_for_the_hub(tmp_path, files):
    assert "has no revision 'v1'" in refused(write(tmp_path, files), revision="v1")


def test_folder_needs_no_hub_client(tmp_path, files):
    write(tmp_path, files)
    program = """
import sys
from stable_diffusion.weights.files import open_checkpoint, read_tensors
read_tensors(open_checkpoint(sys.argv[1]).components["unet"])
assert "huggingface_hub" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True, timeout=60)


# --- tensors -----------------------------------------------------------------------------------------------------


def component(path: Path, *contents: bytes) -> Component:
    files = tuple(path / f"{i}.safetensors" for i in range(len(contents)))
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    return Component("unet", {}, files)


def test_tensor_in_two_files(tmp_path):
    part = component(tmp_path, safetensors(a=mx.zeros(2), b=mx.zeros(2)), safetensors(b=mx.zeros(2)))
    with pytest.raises(ValueError, match=r"1\.safetensors and another unet file hold the same tensors: b"):
        read_tensors(part)


GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
}


def file_of(header: object, data: int = 32, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def changed(tensor: str = "b", **values: object) -> dict:
    return GOOD | {tensor: GOOD[tensor] | values}


DAMAGED = [
    b"",
    b"\0\0\0",
    struct.pack("<Q", 10),
    # The header, and its length.
    file_of(b""),
    file_of(GOOD, length=1 << 63),
    file_of(GOOD, length=20),
    file_of(b"x" * 50),
    file_of(b"\xff" * 50),
    file_of([GOOD]),
    file_of(b"[" * 100_000),
    file_of(b'{"__metadata__": {"a": "' + b"[" * 200_001 + b'"}}', data=0),
    file_of({"__metadata__": {"a": [1]}}, data=0),
    file_of({"__metadata__": 5}, data=0),
    # Other files.
    b"<!DOCTYPE html><html><body>404</body></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3438167534\n",
    bytes(1000),
    # The data.
    file_of(GOOD, data=31),
    file_of(GOOD, data=33),
    # What a tensor says of itself.
    file_of(GOOD | {"b": 3}),
    file_of(GOOD | {"b": {"shape": [4], "data_offsets": [24, 32]}}),
    file_of(changed(data_offsets=[24])),
    file_of(changed(data_offsets=["x", None])),
    file_of(changed(data_offsets=["24", "32"])),
    file_of(changed(data_offsets=[24, 32.5])),
    file_of(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}'),
    file_of(changed(data_offsets=[24, 40])),
    file_of(changed("a", data_offsets=[-24, 0])),
    file_of(changed(data_offsets=[16, 24])),  # over the other
    file_of(changed("a", shape=[2], data_offsets=[0, 8])),  # a hole
    file_of(changed(shape=[5])),
    file_of(changed(shape=[1 << 62, 1 << 62])),
    file_of(changed(shape=[-2, -2])),
    file_of(changed(shape=4)),
    file_of(changed(shape=["x"])),
]


def test_the_file_before_it_is_damaged(tmp_path):
    tensors = read_tensors(component(tmp_path, file_of({"__metadata__": {"format": "pt"}, **GOOD})))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (2, 3), "b": (4,)}


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_file(tmp_path, content):
    (path,) = component(tmp_path, content).files
    with pytest.raises(ValueError) as caught:
        check_safetensors(path)  # before MLX sees it: what MLX notices differs between its versions
    message = str(caught.value)
    assert message.startswith(f"{path} is damaged (") and "\n" not in message
    has_header = " bytes instead of " in message or "wrong position" in message
    assert message.endswith(
        "download it again, or choose another" if not has_header else f"delete {path} and download it again"
    )
    assert has_header or content not in (file_of(GOOD, data=31), file_of(changed(shape=[5])))


@pytest.mark.parametrize("dtype", ["C64", "F8_E8M0", ["F16"]])
def test_type_that_is_not_read(tmp_path, dtype):
    with pytest.raises(ValueError, match=r"holds b as .*, which is not supported: save it as F16 or F32"):
        read_tensors(component(tmp_path, file_of(changed(dtype=dtype))))


# Every value of the types that MLX does not compute in.
EIGHTS = torch.arange(256, dtype=torch.uint8)
TYPES = {dtype: EIGHTS.view(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
TYPES[torch.float64] = torch.tensor([0.1, -1e300, 1e-300, torch.nan, torch.inf, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("dtype", TYPES)
def test_types_that_mlx_does_not_compute_in(tmp_path, dtype, suffix):
    path, values = tmp_path / f"x.{suffix}", TYPES[dtype]
    tensors = {"x": values, "half": torch.arange(5).half(), "square": values[:4].reshape(2, 2), "one": values[3]}
    if suffix == "ckpt":
        torch.save(tensors, path)
    else:
        save_file({name: value.clone() for name, value in tensors.items()}, path, metadata={"format": "pt", "a": "b"})
    ours, metadata = read_file(path)
    assert metadata.get("a", "b") == "b" and ours.keys() == tensors.keys()
    for name, theirs in tensors.items():
        assert ours[name].dtype == (mx.float32 if dtype == torch.float64 and name != "half" else mx.float16)
        assert np.array_equal(np.array(ours[name]), theirs.to(torch.float32).numpy(), equal_nan=True), name


def test_scaled_values_of_8_bits(tmp_path):
    """The two ways of ComfyUI: a scale for a layer or for each of its rows; marks and scales of activations go."""
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:120].reshape(4, 30)
    scales = {"a.scale_weight": torch.tensor(0.37), "b.weight_scale": torch.tensor([1.0, 2.0, 0.5, 3.0])}
    tensors = {"a.weight": weight, "b.weight": weight.clone(), "a.bias": torch.ones(4).half()} | scales
    marks = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn), "a.scale_input": torch.tensor(1.0)}
    marks["b.comfy_quant"] = torch.zeros(10, dtype=torch.uint8)
    save_file(tensors | marks, tmp_path / "x.safetensors")
    ours, _ = read_file(tmp_path / "x.safetensors")
    assert ours.keys() == {"a.weight", "b.weight", "a.bias"}
    assert np.array_equal(ours["a.weight"], weight.float() * scales["a.scale_weight"])
    assert np.array_equal(ours["b.weight"], weight.float() * scales["b.weight_scale"][:, None])
    for wrong in ({"b.weight_scale": torch.ones(3)}, {"b.weight": torch.ones(4, 2, dtype=torch.uint8)}):
        save_file(tensors | marks | wrong, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"x\.safetensors holds b\..*: use"):
            read_file(tmp_path / "x.safetensors")


def test_sizes_are_checked_before_anything_is_made_of_them(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(b'{"__metadata__": {"a": "' + b"x" * 2**24 + b'"}}'))
    with pytest.raises(ValueError, match="has a header of 16,777,243 bytes; the limit is 16,777,216"):
        read_file(path)
    many = {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_001)}
    path.write_bytes(file_of(many, data=0))
    with pytest.raises(ValueError, match="holds 20,001 tensors; the limit is 20,000"):
        read_file(path)

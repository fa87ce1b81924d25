"""Files of IP-Adapters: as they are published and as others keep them; their image encoders; what is refused."""

import json

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from PIL import Image

from configs import UNETS
from image_prompts import KINDS, image_encoder, random_adapter, write_adapter
from oracle import relative_error
from stable_diffusion import StableDiffusion
from stable_diffusion.weights.files import open_part
from stable_diffusion.weights.ip_adapters import open_ip_adapter

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def nested() -> dict:
    """{kind: the tensors of an adapter for SD 1}."""
    unet = diffusers.UNet2DConditionModel(**UNETS["sd1"])
    return {kind: random_adapter(unet, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, nested):
    """The layout of h94/IP-Adapter: an encoder for models/, another for sdxl_models/."""
    root = tmp_path_factory.mktemp("ip")
    image_encoder(root / "models" / "image_encoder")
    image_encoder(root / "sdxl_models" / "image_encoder", hidden_size=128, projection_dim=96)
    for kind, tensors in nested.items():
        write_adapter(root / "models" / f"{kind}.safetensors", tensors)
        write_adapter(root / "models" / f"{kind}.bin", tensors)
        write_adapter(root / "sdxl_models" / f"{kind}_vit-h.safetensors", tensors)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_same_tokens(kind, sd, folder, nested, tmp_path):
    trained = {"image_proj_model": nested[kind]["image_proj"], "adapter_modules": nested[kind]["ip_adapter"]}
    sources = [folder / "models" / f"{kind}{suffix}" for suffix in (".safetensors", ".bin")]
    sources += [folder / "sdxl_models" / f"{kind}_vit-h.safetensors"]
    for suffix in (".safetensors", ".pt"):
        sources.append(write_adapter(folder / "models" / f"trained-{kind}{suffix}", trained))
    encoder = folder / "models" / "image_encoder"
    results = [sd.encode_image_prompt(sd.load_ip_adapter(source), [PICTURE] * 2) for source in sources]
    alone = write_adapter(tmp_path / "adapter.safetensors", nested[kind])
    for given in (encoder, encoder / "model.safetensors"):
        results.append(sd.encode_image_prompt(sd.load_ip_adapter(alone, given), [PICTURE] * 2))
    tokens = {"plain": 4, "plus": 5, "full-face": 10}[kind]
    for mine, negative in results[:-1]:
        assert mine.shape == (2, tokens, 32) and negative.shape == (1, tokens, 32)
        assert np.array_equal(mine, results[0][0]) and np.array_equal(negative, results[0][1])
    assert results[-1][0].shape == (2, tokens, 32)  # of an encoder without a config, which has other heads here


def test_half_precision_and_low_memory(folder, sd1_folder, sd):
    half = StableDiffusion(sd1_folder, float16=True, low_memory=True)
    adapter = half.load_ip_adapter(folder / "models" / "plus.safetensors")
    assert {v.dtype for _, v in tree_flatten(adapter.parameters())} == {mx.float16}
    tokens, _ = half.encode_image_prompt(adapter, PICTURE)
    assert adapter.encoder.network is None and tokens.dtype == mx.float16
    full = sd.load_ip_adapter(folder / "models" / "plus.safetensors")
    assert 0 < relative_error(tokens, sd.encode_image_prompt(full, PICTURE)[0]) <= 2e-2
    assert full.encoder.network is full.encoder.build(keep=True)


_OPEN = """
import json, sys
from stable_diffusion.weights.ip_adapters import open_ip_adapter
parts = open_ip_adapter(sys.argv[1])
print(json.dumps([str(part.files[0]).partition("/snapshots/")[2].partition("/")[2] for part in parts]))
"""


def test_a_file_on_the_hub_brings_its_encoder_which_then_is_in_the_cache(hub, nested, tmp_path):
    wide = nested["plain"]["image_proj"] | {"proj.weight": torch.zeros(128, 1024)}  # ViT-H's width
    adapter = write_adapter(tmp_path / "a.safetensors", nested["plain"] | {"image_proj": wide})
    image_encoder(tmp_path / "encoder", projection_dim=1024)
    encoder = (tmp_path / "encoder" / "model.safetensors").read_bytes()
    names = ["models/ip-adapter_sd15.safetensors", "models/image_encoder/model.safetensors"]
    hub.add("h94/IP-Adapter", {names[0]: adapter.read_bytes(), names[1]: encoder, "README.md": b"not needed"})
    for expected in (sorted(names), []):
        out, _ = hub.run(_OPEN, f"h94/IP-Adapter:{names[0]}", home=tmp_path)
        assert json.loads(out) == names and hub.fetched() == expected
        hub.requests.clear()


@pytest.mark.parametrize(
    "kind, width, place", [("plain", 1024, ""), ("plus", 1280, ""), ("plain", 1280, "sdxl_"), ("plus", 1664, "sdxl_")]
)
def test_the_published_encoder_is_known_by_its_width(kind, width, place, nested, tmp_path, monkeypatch):
    key = "proj.weight" if kind == "plain" else "proj_in.weight"
    wide = nested[kind]["image_proj"] | {key: torch.zeros(len(nested[kind]["image_proj"][key]), width)}
    path = write_adapter(tmp_path / "adapter.bin", nested[kind] | {"image_proj": wide})

    def record(source, *args, **kwargs):
        if source != path:
            raise FileNotFoundError(source)
        return open_part(source, *args, **kwargs)

    monkeypatch.setattr("stable_diffusion.weights.ip_adapters.open_part", record)
    with pytest.raises(FileNotFoundError, match=f"^h94/IP-Adapter/{place}models/image_encoder/model.safetensors$"):
        open_ip_adapter(path)


_FACE = {"proj.0.weight": torch.zeros(64, 512), "proj.2.weight": torch.zeros(128, 64), "norm.weight": torch.ones(32)}
_CHANGES = {
    "faceid": (_FACE, {}, "a FaceID adapter, which needs a face detector"),
    "faceid-lora": ({}, {"0.to_q_lora.down.weight": torch.zeros(4, 32)}, "a FaceID adapter"),
    "faceid-plus": (_FACE | {"perceiver_resampler.proj_in.weight": torch.zeros(32, 96)}, {}, "a FaceID adapter"),
    "instant-id": ({"proj.weight": torch.zeros(128, 512)}, {}, "a FaceID adapter"),
    "other-encoder": (
        {"proj.weight": torch.zeros(128, 56)},
        {},
        "features of width 56, of an unknown image encoder",
    ),
    "unknown": ({"pos_emb.weight": torch.zeros(9)}, {}, "1 unexpected: image_proj.pos_emb.weight"),
    "short": ({}, {"1.to_v_ip.weight": None}, "1 missing: ip_adapter.1.to_v_ip.weight"),
}


@pytest.mark.parametrize("name", _CHANGES)
def test_what_is_not_supported_is_refused_in_one_line(name, nested, folder, sd):
    image_proj, layers, message = _CHANGES[name]
    changes = {"image_proj": image_proj, "ip_adapter": layers}
    parts = {part: rows | changes[part] for part, rows in nested["plain"].items()}
    parts = {part: {key: value for key, value in rows.items() if value is not None} for part, rows in parts.items()}
    if "proj.0.weight" in image_proj:
        parts["image_proj"] = image_proj
    with pytest.raises(ValueError, match=rf"^[^\n]*{name}[^\n]*{message}[^\n]*$"):
        sd.load_ip_adapter(write_adapter(folder / "models" / f"{name}.safetensors", parts))


def test_sources_that_are_no_adapter_or_do_not_fit(folder, sd, xl, tmp_path):
    adapter, models = folder / "models" / "plain.safetensors", folder / "models"
    big = folder / "sdxl_models" / "image_encoder"
    for load, message in (
        (
            lambda: sd.load_ip_adapter(adapter, big),
            "features of width 96, .* needs 80",
        ),
        (lambda: xl.load_ip_adapter(adapter), "its tokens have 32 channels, the model's prompts 64"),
        (lambda: sd.load_ip_adapter(models / "image_encoder" / "model.safetensors"), "holds no ip_adapter"),
        (lambda: sd.load_ip_adapter(models), "has no ip_adapter"),
        (lambda: sd.load_controlnet(adapter), "an IP-Adapter, not a model: load it as an IP-Adapter"),
    ):
        with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
            load()

"""Image prompts in runs, against diffusers; what has no effect; where and when they act; batches and small memory."""

from functools import cache
from pathlib import Path

import diffusers
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import loras
from checkpoints import both
from image_prompts import image_encoder, random_adapter, write_adapter
from oracle import last, relative_error
from stable_diffusion import Control, ImagePrompt, StableDiffusion
from stable_diffusion.models import gpu as on_gpu
from stable_diffusion.models.unet import attentions
from test_parity_combined import write_lora
from test_parity_images import EULER, control_nets, mask, picture, reference, shown

PROMPT = "the red cat"
SMALL = {"num_steps": 3, "latent_size": (6, 8), "seed": 3}


@cache
def region(left: int, top: int, right: int, bottom: int) -> Image.Image:
    image = Image.new("L", (96, 64))
    image.paste(255, (left, top, right, bottom))
    return image


def values(image: Image.Image) -> mx.array:
    return mx.array(np.asarray(image, np.float32) / 255)


# The family; for each adapter its kind, the number of pictures and the options of ImagePrompt; what is beside them.
PLAIN, PLUS, FACE = ("plain", 1, {}), ("plus", 1, {}), ("full-face", 1, {"scale": 0.6})
TWO = (("plain", 2, {"scale": 0.5}), ("plus", 1, {"scale": 1.2}))
STYLE, LAYOUT = ("plus", 1, {"scales": "style"}), ("plain", 1, {"scales": "layout"})
PARTS = ("plain", 1, {"scales": {"mid": 0.5, "down_blocks.1": 2.0, "up.block_1.attentions_2": -1}})
CASES = {
    "sd1 plain": ("sd1", [PLAIN], {}),
    "sd1 plus, two pictures": ("sd1", [("plus", 2, {"scale": 0.7})], {"n_images": 2}),
    "sd1 full face, no guidance": ("sd1", [FACE], {"guidance": 1.0}),
    "sd1 two adapters, ControlNet": ("sd1", TWO, {"controlnet": True}),
    "sd1 mask of the image": ("sd1", [PLAIN], {"inpaint": True}),
    "sd1 instructions": ("pix2pix", [PLAIN], {}),
    "sd1 parts": ("sd1", [PARTS], {}),
    "xl plain": ("xl", [PLAIN], {"n_images": 2}),
    "xl plus, LoRA": ("xl", [PLUS], {"lora": True}),
    "xl style and layout of two": ("xl", [STYLE, LAYOUT], {}),
    "xl both of one": ("xl", [("plus", 1, {"scales": "style+layout"})], {}),
    "xl two masks": ("xl", [("plus", 2, {"masks": True}), ("plain", 1, {"scale": 0.4})], {"controlnet": True}),
}
OF_DIFFUSERS = {  # set_ip_adapter_scale's words
    "style": {"up": {"block_0": [0.0, 1.0, 0.0]}},
    "layout": {"down": {"block_2": [0.0, 1.0]}},
    "style+layout": {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
    "parts": {"mid": 0.5, "down": {"block_1": 2.0}, "up": {"block_1": [0.0, 0.0, -1.0]}},
}


def pipeline_of(folder: Path, family: str, beside: dict):
    xl = family == "xl"
    kind = (
        "InstructPix2Pix" if family == "pix2pix" else ("XL" if xl else "") + "ControlNet" * beside.get("controlnet", 0)
    )
    kind += "Inpaint" * beside.get("inpaint", 0)
    more = {"controlnet": control_nets(family, 1)[0][0]} if "controlnet" in beside else {}
    pipe = reference(folder / "sd", family, EULER, getattr(diffusers, f"StableDiffusion{kind}Pipeline"), **more)
    pipe.register_modules(image_encoder=image_encoder(folder / "image_encoder"))
    pipe.register_modules(feature_extractor=CLIPImageProcessorPil(size=42, crop_size=42))
    return pipe


@pytest.mark.parametrize("case", CASES)
def test_a_run_equals_diffusers(tmp_path, case):
    family, prompts, beside = CASES[case]
    pipe = pipeline_of(tmp_path, family, beside)
    tensors = [random_adapter(pipe.unet, kind, seed) for seed, (kind, _, _) in enumerate(prompts)]
    changes = write_lora(pipe, tmp_path / "lora.safetensors") if "lora" in beside else []
    pipe.unet._load_ip_adapter_weights(tensors, low_cpu_mem_usage=False)
    sd = StableDiffusion(tmp_path / "sd", loras=[(tmp_path / "lora.safetensors", 1.0)] if "lora" in beside else [])
    ours, given, scales, masks = [], [], [], []
    for number, (tensor, (_, count, options)) in enumerate(zip(tensors, prompts, strict=True)):
        adapter = sd.load_ip_adapter(write_adapter(tmp_path / f"{number}.safetensors", tensor))
        pictures, options = [picture(30 + 10 * number + i, (50, 60)) for i in range(count)], dict(options)
        has_masks = options.pop("masks", False)  # with edges where linear interpolation differs from cubic
        regions = (
            [region(0, 0, 39, 41), region(23, 15, 96, 64)][:count] if has_masks else [region(0, 0, 96, 64)] * count
        )
        masks.append(IPAdapterMaskProcessor().preprocess(regions, height=64, width=96).permute(1, 0, 2, 3))
        if has_masks:  # diffusers adds up what comes of each picture
            ours += [
                ImagePrompt(adapter, one, mask=values(where), **options)
                for one, where in zip(pictures, regions, strict=True)
            ]
        else:
            ours.append(ImagePrompt(adapter, pictures if count > 1 else pictures[0], **options))
        given.append(pictures)
        named = options.get("scales", options.get("scale", 1.0))
        scales.append(OF_DIFFUSERS["parts" if isinstance(named, dict) else named] if "scales" in options else named)
    pipe.set_ip_adapter_scale(scales)
    theirs = {"ip_adapter_image": given}
    if "two masks" in case:
        theirs["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    run = {name: beside[name] for name in ("n_images", "guidance") if name in beside}
    if "controlnet" in beside:
        run["controls"] = [Control(control_nets(family, 1)[1][0], shown(picture(20)), scale=0.5)]
        theirs |= {"image": picture(20), "controlnet_conditioning_scale": 0.5}
    if "inpaint" in beside:
        run |= {"image": picture(), "mask": mask(), "strength": 0.75}
    if family == "pix2pix":
        run["image"] = picture()
    with loras.added(changes):
        both(pipe, sd, steps=4 if "inpaint" in beside else 3, theirs=theirs, image_prompts=ours, **run)


# --- alone ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory, sd) -> Path:
    folder = tmp_path_factory.mktemp("ip")
    image_encoder(folder / "image_encoder")
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd.source, subfolder="unet")
    return write_adapter(folder / "plus.safetensors", random_adapter(unet, "plus"))


@pytest.fixture(scope="module")
def adapter(sd, file):
    return sd.load_ip_adapter(file)


def draw(sd, *prompts: ImagePrompt, **keywords) -> np.ndarray:
    return last(sd.generate_latents(PROMPT, image_prompts=prompts, **SMALL | keywords))


NO_EFFECT = {
    "scale": {"scale": 0.0},
    "mask": {"mask": mx.zeros((48, 64))},
    "parts": {"scales": {"mid": 0, "up": 0.0}},
    "late": {"start": 0.9},
    "early": {"end": 0.3},
}


@pytest.mark.parametrize("case", NO_EFFECT)
def test_without_effect_nothing_changes(sd, adapter, case):
    plain, acting = draw(sd), draw(sd, ImagePrompt(adapter, picture()))
    assert np.array_equal(draw(sd, ImagePrompt(adapter, picture(), **NO_EFFECT[case])), plain)
    assert relative_error(acting, plain) > 1e-2


def test_what_names_and_masks_say(sd, adapter):
    """A full mask is none; the longer name wins; two halves of the steps are all."""
    image = picture()
    whole = draw(sd, ImagePrompt(adapter, image))
    assert relative_error(draw(sd, ImagePrompt(adapter, image, mask=mx.ones((48, 64)))), whole) <= 1e-5
    named = {"up_blocks.1.attentions.0": 0.0, "up": 1.0, "down": 1.0, "mid": 1.0}
    prompt, numbers = ImagePrompt(adapter, image, scale=0.5, scales=named), attentions(sd.unet, "cross")
    without = {number for words, number in numbers.items() if words[:4] == ("up", "1", "attentions", "0")}
    assert without and set(prompt.layers(sd.unet)) == set(numbers.values()) - without
    assert {scale for *_, scale in prompt.layers(sd.unet).values()} == {0.5}
    assert (
        relative_error(draw(sd, ImagePrompt(adapter, image, start=0.3), ImagePrompt(adapter, image, end=0.4)), whole)
        <= 1e-5
    )


@pytest.mark.parametrize(
    "way", ["low memory", "deep cache", "float16", "quantized", "merging", "interval", "parts of a prompt"]
)
def test_ways_to_run(sd1_folder, sd, file, way):
    """Each is told from its own run without the picture, and draws what it draws otherwise."""
    image, options = picture(), {"deep cache": {"deep_cache": 2}, "merging": {"token_merging": 0.5}}.get(way, {})
    options |= {"guidance_interval": (0.4, 1.0)} if way == "interval" else {}
    other = StableDiffusion(sd1_folder, low_memory=way == "low memory", float16=way == "float16")
    if way == "quantized":
        nn.quantize(other.unet, group_size=32, bits=8)
    text = "the red cat AND a blue one:0.5" if way == "parts of a prompt" else PROMPT
    prompts = [ImagePrompt(other.load_ip_adapter(file), image)]
    plain, acting = (
        last(other.generate_latents(text, image_prompts=given, **SMALL | options)) for given in ((), prompts)
    )
    assert relative_error(acting, plain) > 1e-2
    if way in ("low memory", "float16", "quantized"):
        usual = draw(sd, ImagePrompt(sd.load_ip_adapter(file), image))
        assert relative_error(acting, usual) <= {"low memory": 1e-5}.get(way, 5e-2)
    if way != "quantized":
        other.release()
        assert "unet" not in vars(other)  # it was not changed by hand


def test_a_gpu_computes_the_same(sd1_folder, file, request):
    """With joined products, where a head has as many zeros behind it as a fused kernel takes."""
    model = StableDiffusion(sd1_folder)
    prompt = ImagePrompt(model.load_ip_adapter(file), picture(), mask=mx.eye(48, 64))
    want = draw(model, prompt)
    request.getfixturevalue("gpu")
    on_gpu.join(model.unet)
    assert relative_error(draw(model, prompt), want) <= 1e-4


def test_each_image_of_a_batch_has_its_tokens(sd, adapter):
    tokens, negative = sd.encode_image_prompt(adapter, [picture(1), picture(2)])
    together = draw(sd, ImagePrompt(adapter, tokens=(tokens, negative)), n_images=2)
    for i in range(2):
        alone = draw(sd, ImagePrompt(adapter, picture(1 + i)), seed=3 + i)
        assert relative_error(together[i : i + 1], alone) <= 1e-5
    assert relative_error(together[0], together[1]) > 1e-2


REFUSED = {
    "no cross-attention in 'up_blocks.0.attentions.1'; choose from down.0": {"scales": "style"},
    "'styles' is unknown; give style, layout": {"scales": "styles"},
    "the scale 'a' of 'mid' is not a finite": {"scales": {"mid": "a"}},
    r"not an array \[H, W\]": {"mask": "mask.png"},
    r"shape \(6, 8\) does not fit: this run needs \(48, 64\)": {"mask": mx.ones((6, 8))},
    "cannot act from 0.5 to 0.5": {"start": 0.5, "end": 0.5},
    "scale nan of an IP-Adapter": {"scale": float("nan")},
    "needs an image": {"image": None},
    "3 image prompts for 1 images": {"tokens": (mx.zeros((3, 5, 32)), mx.zeros((1, 5, 32)))},
    "must be a list of ImagePrompt": None,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_computed(sd, adapter, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        given = (
            adapter if REFUSED[message] is None else ImagePrompt(**{"adapter": adapter, "image": 1} | REFUSED[message])
        )
        sd.generate_latents(PROMPT, image_prompts=[given], **SMALL)

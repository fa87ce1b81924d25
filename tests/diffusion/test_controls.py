"""Controls of all kinds beside seamless pictures, image prompts and LoRAs."""

from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from checkpoints import both
from image_prompts import image_encoder, random_adapter, write_adapter
from lora.test_control import control_lora
from models.test_controlnet import of_unet
from models.test_lllite import LAYERS, changed, weights
from oracle import last, nchw, normal, perturb, relative_error
from stable_diffusion import Control, ImagePrompt, StableDiffusionXL
from test_parity_images import EULER, picture, reference, shown

RUN = {"num_steps": 2, "latent_size": (8, 16), "sampler": "euler", "seed": 1}
IMAGE = mx.array(np.abs(normal(64, 128, 3, seed=4)).clip(0, 1))


@pytest.fixture(scope="module")
def files(tmp_path_factory, xl_folder) -> dict[str, Path]:
    """Networks for the small XL model: the Control-LoRA is the ControlNet too."""
    folder = tmp_path_factory.mktemp("controls")
    unet = diffusers.UNet2DConditionModel.from_pretrained(xl_folder / "unet")
    config = {key: value for key, value in of_unet(dict(unet.config)).items() if not key.startswith("_")}
    torch.manual_seed(0)
    net = perturb(diffusers.ControlNetModel(**config | {"conditioning_embedding_out_channels": [4, 8, 12, 16]}))
    for parameter in net.controlnet_cond_embedding.parameters():
        parameter.data.normal_(std=0.2)
    save_file(control_lora(unet, net), folder / "control-lora.safetensors")
    net.save_pretrained(folder / "net")
    shape = {"channels": (32, 64, 64, 64), "downscale_factor": 16}
    perturb(diffusers.T2IAdapter(adapter_type="full_adapter_xl", **shape), seed=7).save_pretrained(folder / "t2i")
    save_file(weights(), folder / "lllite.safetensors")
    names = {"ControlNet": "net", "Control-LoRA": "control-lora.safetensors", "T2I-Adapter": "t2i"}
    return {kind: folder / name for kind, name in names.items()} | {"LLLite": folder / "lllite.safetensors"}


@pytest.mark.parametrize("kind", ["ControlNet", "T2I-Adapter", "LLLite"])
def test_seamless(xl, files, kind):
    """A shift of the noise and of the control image is one of the picture."""
    network, noise = xl.load_controlnet(files[kind]), mx.array(normal(1, 8, 16, 4, seed=1))

    def draw(shift: int, seamless: str | None, scale: float = 1.0) -> np.ndarray:
        control = Control(network, mx.roll(IMAGE, 8 * shift, 1), scale)
        given = {"latents": mx.roll(noise, shift, 2), "controls": [control], "seamless": seamless}
        return np.roll(last(xl.generate_latents("the red cat", **RUN | given)), -shift, 2)

    assert relative_error(draw(4, "x"), draw(0, "x")) <= 1e-5
    assert relative_error(draw(4, None), draw(0, None)) > 1e-3
    assert relative_error(draw(0, "x", scale=0.0), draw(0, "x")) > 1e-3


def test_an_image_prompt_beside_a_lllite(tmp_path, files):
    pipe = reference(tmp_path / "sd", "xl", EULER, diffusers.StableDiffusionXLPipeline)
    pipe.register_modules(image_encoder=image_encoder(tmp_path / "image_encoder"))
    pipe.register_modules(feature_extractor=CLIPImageProcessorPil(size=42, crop_size=42))
    tensors = random_adapter(pipe.unet, "plain")
    sd = StableDiffusionXL(tmp_path / "sd")
    adapter = sd.load_ip_adapter(write_adapter(tmp_path / "adapter.safetensors", tensors))
    prompt, control = (
        ImagePrompt(adapter, picture(30)),
        Control(sd.load_controlnet(files["LLLite"]), shown(picture(20))),
    )
    pipe.unet._load_ip_adapter_weights([tensors], low_cpu_mem_usage=False)
    with changed(pipe.unet, weights(), nchw(np.array(control.image)[None]), 1.0):
        both(
            pipe, sd, steps=2, controls=[control], image_prompts=[prompt], theirs={"ip_adapter_image": [[picture(30)]]}
        )


def test_an_image_prompt_beside_a_control_lora(xl, files, tmp_path):
    """It draws what the whole ControlNet draws, which reads no picture."""
    image_encoder(tmp_path / "image_encoder")
    unet = diffusers.UNet2DConditionModel.from_pretrained(xl.source, subfolder="unet")
    adapter = xl.load_ip_adapter(write_adapter(tmp_path / "adapter.safetensors", random_adapter(unet, "plain")))
    prompts = [ImagePrompt(adapter, picture(30))]

    def draw(kind: str, **options) -> np.ndarray:
        controls = [Control(xl.load_controlnet(files[kind]), IMAGE)]
        return last(xl.generate_latents("the red cat", controls=controls, **RUN | options))

    made = draw("Control-LoRA", image_prompts=prompts)
    assert relative_error(made, draw("ControlNet", image_prompts=prompts)) <= 1e-4
    assert relative_error(made, draw("Control-LoRA")) > 1e-3


def test_a_lora_beside_a_lllite(xl_folder, files, tmp_path):
    """Attached to the layers whose inputs change, it draws what it draws when it is fused."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(xl_folder / "unet")
    lora, generator = {}, torch.Generator().manual_seed(3)
    for path, _ in LAYERS.values():
        rows, columns = unet.get_submodule(path).weight.shape
        lora[f"unet.{path}.lora_A.weight"] = torch.randn((2, columns), generator=generator) / 8
        lora[f"unet.{path}.lora_B.weight"] = torch.randn((rows, 2), generator=generator) / 2
    save_file(lora, tmp_path / "lora.safetensors")
    attached, fused = (StableDiffusionXL(xl_folder, loras=of) for of in ([], [(tmp_path / "lora.safetensors", 0.7)]))

    def draw(sd: StableDiffusionXL) -> np.ndarray:
        controls = [Control(sd.load_controlnet(files["LLLite"]), IMAGE)]
        return last(sd.generate_latents("the red cat", controls=controls, **RUN))

    without = draw(attached)
    handle = attached.load_lora(tmp_path / "lora.safetensors", 0.7)
    assert relative_error(draw(attached), draw(fused)) <= 1e-4
    assert relative_error(without, draw(fused)) > 1e-3
    handle.detach()
    assert np.array_equal(draw(attached), without)

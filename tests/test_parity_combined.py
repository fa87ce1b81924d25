"""Kinds of guidance, FreeU, second prompts and sizes, each beside a ControlNet, a LoRA or a mask, against diffusers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from safetensors.torch import save_file

import loras
from checkpoints import SCALED, both, encoded_mean, make
from stable_diffusion import Control, SizeConditioning, StableDiffusion
from test_parity_images import EULER, control_nets, mask, picture, shown

ANY_FAMILY = {"guidance_rescale": 0.7, "freeu": (1.3, 1.4, 0.9, 0.2), "pag_scale": 2.0}
TEXTS = {"prompt_2": "a cat", "negative_prompt_2": "the red"}
SIZES = {"original_size": (100, 200), "target_size": (50, 60)}
SIZES |= {"negative_original_size": (64, 32), "negative_target_size": (70, 80)}
FEATURES = {name: {name: value} for name, value in ANY_FAMILY.items()}
FEATURES |= {"texts and sizes": TEXTS, "all": ANY_FAMILY | TEXTS}
BESIDE = ["controlnet", "lora", "mask", "mask of the UNet"]
FAMILIES = {"sd1": "inpaint", "xl": "xl-inpaint"}  # each with the one whose UNet reads masks
ROWS = [(family, beside, name) for family in FAMILIES for beside in BESIDE for name in FEATURES]
ROWS = [row for row in ROWS if row[0] == "xl" or row[2] != "texts and sizes"]
OF_PAG = ("lora", "mask of the UNet")  # the rest is in diffusion/test_perturbed_attention.py
ROWS = [row for row in ROWS if row[1] in OF_PAG or row[2] != "pag_scale"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Callable[[str], tuple[dict, Path]]:
    """The parts of a random checkpoint in torch, and its folder; each family is made once."""
    known: dict[str, tuple[dict, Path]] = {}

    def get(family: str) -> tuple[dict, Path]:
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            cls, options = EULER
            known[family] = make(folder, family, cls(**SCALED, **options)).components, folder
        return known[family]

    return get


@contextmanager
def rescaled(pipe, scale: float) -> Iterator[None]:
    """A pipeline that knows no guidance_rescale, with diffusers' function for it between guidance and scheduler."""
    predicted, step = [], pipe.scheduler.step

    def rescaled_step(guided, *args, **kwargs):
        return step(rescale_noise_cfg(guided, predicted[-1][1:2], scale), *args, **kwargs)

    hook = pipe.unet.register_forward_hook(lambda module, args, output: predicted.append(output[0]))
    with mock.patch.object(pipe.scheduler, "step", rescaled_step):
        yield
    hook.remove()


def write_lora(pipe, path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A LoRA for the attentions of the UNet and the first encoder; returns torch's weights and what it adds to them."""
    encoder = "lora_te1" if hasattr(pipe, "text_encoder_2") else "lora_te"
    tensors, changes, generator = {}, [], torch.Generator().manual_seed(3)
    for prefix, network in {"lora_unet": pipe.unet, encoder: pipe.text_encoder}.items():
        for name, layer in network.named_modules():
            if name.endswith(("to_k", "to_v", "q_proj")):
                down = 0.3 * torch.randn((4, layer.in_features), generator=generator)
                up = 0.3 * torch.randn((layer.out_features, 4), generator=generator)
                key = f"{prefix}_{name}".replace(".", "_")
                tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
                changes.append((layer.weight, up @ down))
    save_file(tensors, path)
    return changes


def keywords(family: str, beside: str, feature: str) -> tuple[dict, dict, dict]:
    """The options of a run here, those of diffusers alone, and the parts of its pipeline that are no checkpoint's."""
    ours, theirs, more = {}, {}, {} if family == "xl" else {"requires_safety_checker": False}
    if beside == "controlnet":
        (net,), (our_net,) = control_nets(family, 1)
        more["controlnet"], ours["controls"] = net, [Control(our_net, shown(picture(20)), scale=0.5)]
        theirs |= {"image": picture(20), "controlnet_conditioning_scale": 0.5}
    if beside.startswith("mask"):
        ours |= {"image": picture(), "mask": mask(), "strength": 0.75}
    if "pag_scale" in FEATURES[feature]:
        theirs["pag_scale"] = FEATURES[feature]["pag_scale"]
    ours |= {name: value for name, value in FEATURES[feature].items() if family == "xl" or name in ANY_FAMILY}
    if "prompt_2" in ours:  # with an image diffusers takes the prompt's crop for the negative one too
        crops = {"crop": (3, 4), "negative_crop": (3, 4) if "image" in ours else (5, 6)}
        theirs |= TEXTS | SIZES | {f"{name}s_coords_top_left": corner for name, corner in crops.items()}
        ours["size_conditioning"] = SizeConditioning(**SIZES, **crops)
    return ours, theirs, more


@pytest.mark.parametrize("family, beside, feature", ROWS)
def test_a_feature_beside_another(opened, tmp_path, family, beside, feature):
    parts, folder = opened(FAMILIES[family] if beside == "mask of the UNet" else family)
    ours, theirs, more = keywords(family, beside, feature)
    kind = ("XL" if family == "xl" else "") + ("ControlNet" if beside == "controlnet" else "")
    kind += ("PAG" if "pag_scale" in ours else "") + ("Inpaint" if "image" in ours else "")
    parts = {name: part for name, part in parts.items() if family == "xl" or name != "image_encoder"}
    pipe, lora = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(**parts, **more), tmp_path / "lora.safetensors"
    pipe.set_progress_bar_config(disable=True)
    encoded_mean(pipe)
    with ExitStack() as stack:
        if beside == "lora":
            stack.enter_context(loras.added(write_lora(pipe, lora)))
        if "guidance_rescale" in ours:
            stack.enter_context(rescaled(pipe, ours["guidance_rescale"]))
        if "freeu" in ours:
            pipe.enable_freeu(**dict(zip(("b1", "b2", "s1", "s2"), ours["freeu"], strict=True)))
            stack.callback(pipe.disable_freeu)
        sd = StableDiffusion(folder, loras=[(lora, 1.0)] if beside == "lora" else [])
        both(pipe, sd, steps=3 if "image" in ours else 2, theirs=theirs, **ours)

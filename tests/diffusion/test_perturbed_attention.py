"""Perturbed-attention guidance (Ahn et al. 2024): its rows, the layers that it perturbs, and runs against diffusers."""

import diffusers
import mlx.core as mx
import numpy as np
import pytest

from checkpoints import both
from oracle import last, normal, relative_error
from stable_diffusion import Control, StableDiffusion
from stable_diffusion.diffusion.guidance import guidance_batches
from stable_diffusion.models.layers import Attention
from stable_diffusion.models.unet import find_attentions
from stable_diffusion.text.encode import Conditioning, PromptRow
from test_parity_images import DDIM, EULER, control_nets, mask, picture, reference, shown

PROMPT = "the red cat"
SMALL = {"num_steps": 4, "latent_size": (6, 8), "seed": 3}
PAG = {"pag_scale": 3.0, "pag_layers": ("mid", "up")}


def table(*rows: PromptRow, seed: int = 0) -> Conditioning:
    return Conditioning(mx.array(normal(len(rows), 77, 32, seed=seed)), rows=rows)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [0.0, 1.0])
def test_rows_of_two_images(rescale):
    """Cond, perturbed and uncond rows; the deviation that guidance is rescaled to is the one of the cond rows."""
    tables = table(PromptRow(0), PromptRow(1)), table(PromptRow(), seed=1)
    (batch,) = guidance_batches(5, 2, *tables, 7.5, pag_scale=3.0, rescale=rescale)
    assert batch.images.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.is_cond.tolist() == [1, 1, 0] * 2 and batch.is_perturbed.tolist() == [0, 1, 0] * 2
    out = mx.array(normal(6, 3, 2, 4, seed=9))
    cond, perturbed, uncond = (out[first::3] for first in range(3))
    want = uncond + 7.5 * (cond - uncond) + 3.0 * (cond - perturbed)
    if rescale:
        want = want * mx.std(cond, axis=(1, 2, 3), keepdims=True) / mx.std(want, axis=(1, 2, 3), keepdims=True)
    assert relative_error(batch.combine(out), want) <= 1e-5
    assert [part.is_perturbed.tolist() for part in batch.split(2)] == [[0, 1], [0, 0], [1, 0]]


def test_without_a_negative_prompt_it_guides_alone():
    """The parts of a prompt have their weighted mean; there is no rescaling, as in diffusers."""
    tables = table(PromptRow(0, 1.0), PromptRow(0, 0.5)), None
    batches = guidance_batches(10, 1, *tables, 1.0, pag_scale=3.0, interval=(0.2, 0.5), rescale=0.7)
    assert [batch.steps for batch in batches] == [(0, 1, *range(5, 10)), (2, 3, 4)]
    assert [batch.is_perturbed.tolist() for batch in batches] == [[0, 0], [0, 0, 1, 1]]
    first, second, *perturbed = out = mx.array(normal(4, 3, 2, 4, seed=9))
    mean, other = (first + 0.5 * second) / 1.5, (perturbed[0] + 0.5 * perturbed[1]) / 1.5
    assert relative_error(batches[1].combine(out)[0], mean + 3.0 * (mean - other)) <= 1e-5


# --- layers ----------------------------------------------------------------------------------------------------------


def test_a_perturbed_row_attends_to_its_own_positions():
    layer, x = Attention(8, 2), mx.array(normal(3, 5, 8))
    out = layer(x.reshape(-1, 8), 3, is_perturbed=mx.array([0, 1, 0])).reshape(x.shape)
    assert relative_error(out[1], layer.to_out[0](layer.to_v(x[1]))) <= 1e-6
    plain = layer(x.reshape(-1, 8), 3).reshape(x.shape)
    assert mx.array_equal(out[::2], plain[::2]) and relative_error(out[1], plain[1]) > 0.1


def test_names_of_layers(sd):
    """As modules, as diffusers' pipelines once had them, and in short."""
    paths = [path for path, _ in sd.unet.named_modules() if path.endswith("attn1")]
    for name in ("mid", "mid_block", "down_blocks.1", "down.block_1", "up.1.attentions_0", "up_blocks", "up"):
        full = name.replace(".block_", "_blocks.").replace("up.1", "up_blocks.1").replace("_0", ".0")
        modules = dict(sd.unet.named_modules())
        want = {modules[path].number for path in paths if path.startswith(full)}
        assert want and find_attentions(sd.unet, [name]) == want
    assert len(find_attentions(sd.unet, ["mid", "down", "up"])) == len(paths)
    for name in ("middle", "down_blocks.7", "/"):
        with pytest.raises(ValueError, match=f"no self-attention in '{name}'; choose from down.*, mid, up"):
            find_attentions(sd.unet, ["mid", name])


# --- runs ------------------------------------------------------------------------------------------------------------


OF_BATCHES = [
    {"n_images": 2},
    {"text": ["a red cat AND the blue", "the (red:1.5) cat AND a cat"]},
    {"n_images": 2, "cfg_weight": 1.0},
    {"deep_cache": 2, "n_images": 2},
    {"token_merging": 0.5, "guidance_rescale": 0.7},
    {"guidance_interval": (0.25, 0.75)},
]


@pytest.mark.parametrize(
    "model, keywords", [*(("sd", keywords) for keywords in OF_BATCHES), *(("xl", k) for k in OF_BATCHES[:2])], ids=str
)
def test_runs_do_not_depend_on_their_batch(request, model, keywords, monkeypatch):
    """Row by row, and each image alone, come the same latents, which are others than without."""
    sd = request.getfixturevalue(model)
    run = {"text": PROMPT, "cfg_weight": 5.0, "negative_text": "blue"} | SMALL | {"num_steps": 3} | PAG | keywords
    together, plain = last(sd.generate_latents(**run)), last(sd.generate_latents(**run | {"pag_scale": 0.0}))
    assert relative_error(plain, together) > 1e-2
    texts = run.pop("text") if isinstance(run["text"], list) else [run.pop("text")] * run.pop("n_images", 1)
    seeds = range(3, 3 + len(texts))
    alone = [
        last(sd.generate_latents(t, **run | {"seed": s, "n_images": 1})) for t, s in zip(texts, seeds, strict=True)
    ]
    assert relative_error(np.concatenate(alone), together) <= 1e-5
    monkeypatch.setattr(sd, "rows_at_once", 1)
    assert relative_error(last(sd.generate_latents(texts, **run | {"n_images": 1})), together) <= 1e-4


def test_steps_outside_the_interval_have_one_row(sd, unet):
    last(sd.generate_latents(PROMPT, guidance_interval=(0.25, 0.75), cfg_weight=1.0, **PAG, **SMALL))
    assert [call.rows for call in unet.calls] == [1, 2, 2, 1]


RUNS = {  # pipelines of diffusers, and keywords of both
    "StableDiffusionPAGPipeline": {"n_images": 2},
    "StableDiffusionXLPAGPipeline": {"n_images": 2},
    "StableDiffusionPAGImg2ImgPipeline": {"image": picture(), "strength": 0.6},
    "StableDiffusionXLPAGImg2ImgPipeline": {"image": picture(), "strength": 0.6},
    "StableDiffusionPAGInpaintPipeline": {"image": picture(), "mask": mask(), "strength": 0.6},
    "StableDiffusionXLPAGInpaintPipeline": {"image": picture(), "mask": mask(), "strength": 0.6},
    "StableDiffusionControlNetPAGPipeline": {},
    "StableDiffusionXLControlNetPAGPipeline": {},
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": {"image": picture(), "strength": 0.6},
    "StableDiffusionControlNetPAGInpaintPipeline": {"image": picture(), "mask": mask(), "strength": 0.6},
}


WITHOUT_GUIDANCE = (
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionControlNetPAGPipeline",
)


@pytest.mark.parametrize("name, guidance", [*((n, 5.0) for n in RUNS), *((n, 1.0) for n in WITHOUT_GUIDANCE)])
def test_pipelines(tmp_path, name, guidance):
    family, run, given, more = "xl" if "XL" in name else "sd1", RUNS[name], {"pag_scale": 3.0}, {}
    if "ControlNet" in name:
        (net,), (ours,) = control_nets(family, 1)
        more, run = {"controlnet": net}, run | {"controls": [Control(ours, shown(picture(20)), scale=0.7)]}
        given |= {"controlnet_conditioning_scale": 0.7}
        given |= {"control_image" if "image" in run else "image": picture(20)}
    scheduler = EULER if family == "xl" else DDIM
    pipeline = getattr(diffusers, name)
    pipe = reference(tmp_path / "sd", family, scheduler, pipeline, pag_applied_layers=["mid", "up_blocks.1"], **more)
    pag = {"pag_scale": 3.0, "pag_layers": ("mid", "up_blocks.1")}
    both(pipe, StableDiffusion(tmp_path / "sd"), steps=4, guidance=guidance, theirs=given, **pag, **run)


def test_rescaled_guidance(tmp_path):
    pipe = reference(tmp_path / "sd", "sd1", EULER, diffusers.StableDiffusionPAGPipeline)
    given = {"pag_scale": 2.0, "guidance_rescale": 0.7}
    both(pipe, StableDiffusion(tmp_path / "sd"), steps=3, theirs=given, **given)


def test_the_unet_that_takes_the_guidance_scale(tmp_path):
    pipe = reference(tmp_path / "lcm", "lcm", EULER, diffusers.StableDiffusionPAGPipeline)
    run = {"steps": 3, "guidance": 8.5, "negative_text": "", "pag_scale": 2.0}
    both(pipe, StableDiffusion(tmp_path / "lcm"), theirs={"pag_scale": 2.0}, **run)

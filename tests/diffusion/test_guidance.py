"""Classifier-free guidance: the rows of the UNet's batch, their combination, its interval and its rescaling."""

from io import StringIO

import diffusers
import mlx.core as mx
import numpy as np
import pytest
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from checkpoints import SCALED, both, make
from oracle import last, nchw, nhwc, normal, picture, relative_error
from stable_diffusion import StableDiffusion
from stable_diffusion.diffusion.guidance import guidance_batches
from stable_diffusion.text.encode import Conditioning, PromptRow
from stable_diffusion.text.prompt import Span

PROMPT = "the red cat"
SMALL = {"num_steps": 4, "latent_size": (6, 8), "seed": 3}
GUIDED = {"cfg_weight": 7.0, "negative_text": "blue"}


def table(*rows: PromptRow, seed: int = 0) -> Conditioning:
    return Conditioning(mx.array(normal(len(rows), 77, 32, seed=seed)), rows=rows)


def outputs(count: int) -> mx.array:
    return mx.array(normal(count, 3, 2, 4, seed=9))


# --- batches ---------------------------------------------------------------------------------------------------------


def test_two_images_of_one_prompt():
    positive, negative = table(PromptRow()), table(PromptRow(), seed=1)
    (batch,) = guidance_batches(5, 2, positive, negative, 7.5)
    assert (
        batch.steps == (0, 1, 2, 3, 4)
        and batch.images.tolist() == [0, 0, 1, 1]
        and batch.is_cond.tolist() == [1, 0, 1, 0]
    )
    pair = mx.concatenate([positive.context, negative.context])
    assert mx.array_equal(batch.conditioning.context, mx.concatenate([pair, pair]))
    cond_a, uncond_a, cond_b, uncond_b = out = outputs(4)
    want = mx.stack([uncond_a + 7.5 * (cond_a - uncond_a), uncond_b + 7.5 * (cond_b - uncond_b)])
    assert relative_error(batch.combine(out), want) <= 1e-6


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_an_image_is_combined_as_if_alone(rescale):
    """Bit for bit, whatever else is in the batch: no product of matrices rounds by its size, or in TF32 on a GPU."""
    conditioning, out = (table(PromptRow()), table(PromptRow(), seed=1)), mx.array(normal(8, 32, 32, 4, seed=9))
    (batch,), (single,) = (guidance_batches(5, n, *conditioning, 7.3, rescale=rescale) for n in (4, 1))
    alone = [single.combine(out[row : row + 2]) for row in range(0, 8, 2)]
    together, graph = batch.combine(out), StringIO()
    mx.export_to_dot(graph, together)
    assert "Multiply" in graph.getvalue() and "Matmul" not in graph.getvalue()
    assert mx.array_equal(together, mx.concatenate(alone))


def test_without_guidance_the_rows_are_the_images():
    (batch,) = guidance_batches(5, 2, table(PromptRow(0), PromptRow(1)), None, 1.0)
    out = outputs(2)
    assert batch.images.tolist() == [0, 1] and batch.weights is None and batch.combine(out) is out


def test_prompts_of_parts():
    """Each part guides times its weight; without guidance the output is their weighted mean."""
    positive, negative = table(PromptRow(0, 1.0), PromptRow(0, 0.5)), table(PromptRow(), seed=1)
    (guided,) = guidance_batches(5, 1, positive, negative, 4.0)
    first, second, uncond = out = outputs(3)
    want = uncond + 4.0 * (first - uncond) + 2.0 * (second - uncond)
    assert relative_error(guided.combine(out), want[None]) <= 1e-5
    (mean,) = guidance_batches(5, 1, positive, None, 1.0)
    assert relative_error(mean.combine(out[:2]), (first + 0.5 * second)[None] / 1.5) <= 1e-6
    opposed = table(PromptRow(0, 1.0), PromptRow(0, -1.0))
    guidance_batches(5, 1, opposed, negative, 4.0)
    for needed in ({"negative": None}, {"negative": negative, "rescale": 0.7}):
        with pytest.raises(ValueError, match="weights of the prompt's parts sum to 0"):
            guidance_batches(5, 1, opposed, guidance=4.0, **needed)


def test_two_scales():
    """Brooks et al. 2023, eq. 3."""
    tables = [table(PromptRow(), seed=seed) for seed in range(3)]
    (batch,) = guidance_batches(5, 1, *tables[:2], 7.0, uncond_image=tables[2], image_guidance=1.5)
    cond, uncond, uncond_image = out = outputs(3)
    want = uncond_image + 1.5 * (uncond - uncond_image) + 7.0 * (cond - uncond)
    assert relative_error(batch.combine(out), want[None]) <= 1e-5 and batch.is_cond.tolist() == [1, 0, 0]


def test_a_batch_for_each_range_of_steps():
    positive = table(PromptRow(0, spans=(Span(end=0.5),)), PromptRow(0, spans=(Span(0.5),)))
    batches = guidance_batches(10, 1, positive, table(PromptRow(), seed=1), 5.0, interval=(0.3, 0.8), rescale=0.7)
    assert [batch.steps for batch in batches] == [(0, 1, 2), (3, 4), (5, 6, 7), (8, 9)]
    assert [batch.is_cond.tolist() for batch in batches] == [[1], [1, 0], [1, 0], [1]]
    assert [batch.rescale for batch in batches] == [0, 0.7, 0.7, 0]
    first = [batch.conditioning.context[0] for batch in batches]
    want = [positive.context[i] for i in (0, 0, 1, 1)]
    assert all(mx.array_equal(a, b) for a, b in zip(first, want, strict=True))


@pytest.mark.parametrize(
    "steps, before, turns, wanted",
    [
        (7, 0, 3, [(0, 3, 6), (1, 4), (2, 5)]),
        (4, 6, 3, [(0, 3), (1,), (2,)]),  # step 6 of the whole run is the first one's again
        (4, 7, 3, [(0, 3), (1,), (2,)]),
        (3, 0, 5, [(0,), (1,), (2,)]),
    ],
)
def test_rows_that_take_turns_have_a_batch_each(steps, before, turns, wanted):
    positive = table(*(PromptRow(0, spans=(Span(phase=i, period=turns),)) for i in range(turns)))
    batches = guidance_batches(steps, 1, positive, table(PromptRow(), seed=1), 5.0, steps_before=before)
    assert [batch.steps for batch in batches] == wanted
    for i, batch in enumerate(batches):
        assert mx.array_equal(batch.conditioning.context[0], positive.context[(before + i) % turns])


# --- rescaling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_rescaling_is_that_of_diffusers(rescale):
    positive, negative = table(PromptRow(0), PromptRow(1)), table(PromptRow(), seed=1)
    (batch,) = guidance_batches(5, 2, positive, negative, 7.5, rescale=rescale)
    out = outputs(4) * mx.array([1.0, 0.5, 2.0, 3.0])[:, None, None, None]  # images of different deviations
    cond, uncond = (nchw(np.array(out[first::2])) for first in (0, 1))
    guided = uncond + 7.5 * (cond - uncond)
    want = rescale_noise_cfg(guided, cond, guidance_rescale=rescale)
    assert relative_error(batch.combine(out), nhwc(want)) <= 1e-6


def test_rescaling_by_the_mean_of_a_prompts_parts():
    positive, negative = table(PromptRow(0, 1.0), PromptRow(0, 0.5)), table(PromptRow(), seed=1)
    (batch,) = guidance_batches(5, 1, positive, negative, 7.5, rescale=1.0)
    out = outputs(3)
    mean = (out[0] + 0.5 * out[1]) / 1.5
    assert mx.std(batch.combine(out)).item() == pytest.approx(mx.std(mean).item(), rel=1e-5)


@pytest.mark.parametrize("family, prediction", [("sd1", "v_prediction"), ("xl", "epsilon")])
def test_rescaling_in_a_pipeline(tmp_path, family, prediction):
    kind = diffusers.EulerDiscreteScheduler if family == "xl" else diffusers.DDIMScheduler
    scheduler = kind(**SCALED, prediction_type=prediction, timestep_spacing="leading", steps_offset=1)
    pipe = make(tmp_path / "sd", family, scheduler)
    both(pipe, StableDiffusion(tmp_path / "sd"), steps=4, guidance_rescale=0.7, theirs={"guidance_rescale": 0.7})


@pytest.mark.parametrize(
    "zero_snr, prediction, given, expected",
    [
        (True, "v_prediction", {}, 0.7),
        (True, "v_prediction", {"guidance_rescale": 0.0}, 0.0),
        (True, "v_prediction", {"guidance_rescale": 0.3}, 0.3),
        (False, "v_prediction", {}, 0.0),
    ],
)
def test_a_checkpoint_with_zero_terminal_snr_is_rescaled(tmp_path, zero_snr, prediction, given, expected):
    """Lin et al. 2024 recommend 0.7 for their v-prediction models; what is given wins, and a 0 is given too."""
    options = {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr, "timestep_spacing": "trailing"}
    pipe = make(tmp_path / "sd", "sd1", diffusers.DDIMScheduler(**SCALED, **options, clip_sample=False))
    sd = StableDiffusion(tmp_path / "sd")
    both(pipe, sd, steps=3, theirs={"guidance_rescale": expected}, **given)


# --- the interval ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "interval, rows", [((0, 0.5), [2, 2, 1, 1]), ((0.2, 0.3), [1, 2, 1, 1]), ((0.5, 0.5), [1] * 4)]
)
def test_steps_outside_the_interval_have_the_rows_of_the_prompt(sd, unet, interval, rows):
    """Up to the first step that differs from a run's with or without guidance, the latents are that run's."""
    ours = [np.array(x) for x in sd.generate_latents(PROMPT, guidance_interval=interval, **GUIDED, **SMALL)]
    assert [call.rows for call in unet.calls] == rows
    other = {"cfg_weight": 1.0} if rows[0] == 1 else GUIDED
    want = [np.array(x) for x in sd.generate_latents(PROMPT, **other, **SMALL)]
    is_same = [relative_error(a, b) <= 1e-5 for a, b in zip(ours, want, strict=True)]
    assert is_same == [rows[: i + 1] == rows[:1] * (i + 1) for i in range(4)]


def test_the_interval_is_of_the_steps_that_an_image_takes(sd, unet):
    run = {"strength": 0.5, "num_steps": 8, "seed": 1, "guidance_interval": (0.5, 1)}
    last(sd.generate_latents_from_image(picture(), PROMPT, **GUIDED, **run))
    assert [call.rows for call in unet.calls] == [1, 1, 2, 2]

"""DeepCache: all of the UNet in every N-th step, its last layer in the others, told what came into it before."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from oracle import normal, relative_error
from stable_diffusion import Control, StableDiffusion
from stable_diffusion.diffusion.deep_cache import DeepCache
from stable_diffusion.diffusion.denoiser import denoiser
from stable_diffusion.diffusion.guidance import stages
from stable_diffusion.models.layers import Context
from stable_diffusion.text.encode import Conditioning

PROMPT = "the red cat"
SMALL = {"latent_size": (6, 8), "seed": 3, "cfg_weight": 5.0}


@pytest.fixture(scope="module")
def sd(sd1_folder) -> StableDiffusion:
    return StableDiffusion(sd1_folder)


@pytest.fixture(scope="module")
def xl(xl_folder) -> StableDiffusion:
    return StableDiffusion(xl_folder)


@pytest.fixture
def calls(sd):
    """What the UNet is asked, call by call: (its arguments, whether all of it runs)."""
    made = []
    unet = sd.unet

    def watched(x, t, context, *, deep=None, **told):
        made.append(((x, t, context, told), not deep))
        return unet(x, t, context, deep=deep, **told)

    watched.network = unet
    sd.unet = watched
    yield made
    sd.unet = unet


def last(latents) -> np.ndarray:
    return np.array(list(latents)[-1])


def asked_of(unet, rows: int, seed: int) -> dict:
    """What to ask a UNet: ``rows`` questions about latents of a size that is no multiple of 8."""
    config = unet.config
    asked = {"x": normal(rows, 10, 14, config.in_channels, seed=seed), "t": np.array([500.0 + seed] * rows)}
    asked |= {"context": normal(rows, 77, config.cross_attention_dim[0], seed=7)}
    asked = {name: mx.array(value, mx.float32) for name, value in asked.items()}
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        asked["text_time"] = mx.array(normal(rows, pooled, seed=8)), mx.ones((rows, 6)) * 64
    return asked


def by_hand(unet, asked: dict, other: dict) -> mx.array:
    """The definition: the last layer, at this call's latents and time, takes what came into it in the ``other``."""
    *_, last_block = unet.up_blocks
    resnet, seen = last_block.resnets[-1], []

    class Recorded:
        """Stands in the place of the last resnet and keeps what it is given."""

        def __call__(self, x, *more):
            seen.append((x, more))
            return resnet(x, *more)

    last_block.resnets[-1] = Recorded()
    try:
        unet(**other)
        unet(**asked)
    finally:
        last_block.resnets[-1] = resnet
    width = last_block.resnets[-1].conv1.weight.shape[0]
    (before, _), (now, more) = seen
    assert before.shape[-1] > width
    deep = before.shape[-1] - unet.conv_in.weight.shape[0]
    x = resnet(mx.concatenate([before[..., :deep], now[..., deep:]], axis=-1), *more)
    if "attentions" in last_block:
        x = last_block.attentions[-1](x, Context(asked["context"]))
    norm = unet.conv_norm_out(x)
    return unet.conv_out(norm * mx.sigmoid(norm))


@pytest.mark.parametrize("model", ["sd", "xl"])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_last_layer_takes_what_was_kept(request, model, rows):
    unet = request.getfixturevalue(model).unet
    first, second = asked_of(unet, rows, seed=0), asked_of(unet, rows, seed=1)
    deep: list[mx.array] = []
    assert mx.array_equal(unet(**first, deep=deep), unet(**first)) and len(deep) == 1
    out = unet(**second, deep=deep)
    assert relative_error(out, by_hand(unet, second, first)) <= 1e-5
    assert relative_error(out, unet(**second)) > 1e-3  # it is an approximation
    assert relative_error(out, unet(**first)) > 1e-3  # that hears its own question
    assert mx.array_equal(unet(**first, deep=deep), unet(**first))  # what is kept is what the call itself would take
    assert len(deep) == 1


def test_nothing_else_is_computed(sd, tmp_path):
    """With what was kept, an answer depends on no weight of the middle, and its graph is a part of the whole."""
    asked, deep = asked_of(sd.unet, 2, seed=0), []
    mx.eval(sd.unet.parameters(), asked, sd.unet(**asked, deep=deep), deep)

    def operations(**more) -> int:
        mx.export_to_dot(str(tmp_path / "graph.dot"), sd.unet(**asked, **more))
        return (tmp_path / "graph.dot").read_text().count("shape=rectangle")

    assert operations(deep=deep) < 0.5 * operations()
    convolution = sd.unet.mid_block.resnets[0].conv1
    before = convolution.weight
    convolution.weight = before * float("nan")
    try:
        assert mx.isnan(sd.unet(**asked)).any() and not mx.isnan(sd.unet(**asked, deep=deep)).any()
    finally:
        convolution.weight = before


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_a", "lms"])
def test_every_step_is_exact_at_1(sd, sampler):
    options = SMALL | {"num_steps": 4, "sampler": sampler}
    exact = [np.array(x) for x in sd.generate_latents(PROMPT, **options)]
    one = [np.array(x) for x in sd.generate_latents(PROMPT, deep_cache=1, **options)]
    assert all(np.array_equal(a, b) for a, b in zip(exact, one, strict=True))


@pytest.mark.parametrize("every", [2, 3, 9])
def test_all_of_the_unet_runs_in_every_nth_step(sd, calls, every):
    made = [np.array(x) for x in sd.generate_latents(PROMPT, num_steps=7, deep_cache=every, **SMALL)]
    whole = [whole for _, whole in calls]
    assert whole == [step % every == 0 for step in range(7)]
    exact = [np.array(x) for x in sd.generate_latents(PROMPT, num_steps=7, **SMALL)]
    assert np.array_equal(made[0], exact[0]) and relative_error(made[1], exact[1]) > 1e-5


def test_whole_steps_answer_as_the_unet_does(sd):
    """What the run takes for the image in steps 0, N, 2N is what the UNet makes of that step's latents."""
    steps = sd.schedule.steps(5)
    told = Conditioning(mx.array(normal(1, 77, 32, seed=0)))
    asked = stages(5, 1, told, Conditioning(mx.array(normal(1, 77, 32, seed=1))), 4.0)
    cached = denoiser(sd.unet, sd.schedule, steps, mx.float32, asked, deep_cache=2)
    exact = denoiser(sd.unet, sd.schedule, steps, mx.float32, asked)
    for step, sigma in enumerate(steps.sigmas[:-1]):
        x = mx.array(normal(1, 6, 8, 4, seed=step)) * (sigma**2 + 1) ** 0.5
        same = mx.array_equal(cached(x, sigma), exact(x, sigma))
        assert same == (step % 2 == 0)


def test_where_the_questions_change_all_of_the_unet_runs(sd, calls):
    options = {"num_steps": 8, "deep_cache": 3, "guidance_interval": (0.25, 0.75)}
    last(sd.generate_latents(PROMPT, **options, **SMALL))
    assert [whole for _, whole in calls] == [True, False, True, False, False, True, True, False]
    assert [len(asked[0]) for asked, _ in calls] == [1, 1, 2, 2, 2, 2, 1, 1]


def test_questions_in_parts_keep_a_map_each(sd, calls):
    together = last(sd.generate_latents(PROMPT, num_steps=4, deep_cache=2, **SMALL))
    assert [whole for _, whole in calls] == [True, False] * 2
    sd.rows_at_once = 1
    try:
        parts = last(sd.generate_latents(PROMPT, num_steps=4, deep_cache=2, **SMALL))
    finally:
        sd.rows_at_once = None
    assert [whole for _, whole in calls[4:]] == [True, True, False, False] * 2
    assert relative_error(parts, together) <= 1e-4


@pytest.mark.parametrize("sampler", ["heun", "dpm2", "dpmpp_sde"])
def test_samplers_with_two_evaluations(sd, calls, sampler):
    """Each level is asked about twice or more; of every cycle of levels the first answer is whole."""
    made = last(sd.generate_latents(PROMPT, num_steps=6, deep_cache=3, sampler=sampler, **SMALL))
    exact = last(sd.generate_latents(PROMPT, num_steps=6, sampler=sampler, **SMALL))
    assert np.isfinite(made).all() and relative_error(made, exact) < 1
    assert sum(whole for _, whole in calls[: len(calls) // 2]) == 2


def test_a_batch_is_its_images(sd):
    batch = last(sd.generate_latents(PROMPT, n_images=2, num_steps=4, deep_cache=2, **SMALL))
    single = last(sd.generate_latents(PROMPT, num_steps=4, deep_cache=2, **SMALL | {"seed": 4}))
    assert relative_error(batch[1:], single) <= 1e-4


def test_from_an_image_in_xl(xl):
    image = mx.array(np.clip(normal(48, 64, 3, seed=0, scale=0.3), -1, 1))
    run = {"strength": 0.75, "num_steps": 8, "seed": 1, "cfg_weight": 3.0}
    exact = [np.array(x) for x in xl.generate_latents_from_image(image, PROMPT, **run)]
    cached = [np.array(x) for x in xl.generate_latents_from_image(image, PROMPT, deep_cache=3, **run)]
    assert len(cached) == 6 and np.array_equal(cached[0], exact[0])
    assert 1e-5 < relative_error(cached[-1], exact[-1]) < 1


class Net:
    """Stands in for a ControlNet. From its second answer on, what it says of the deeper maps is not a number."""

    config = SimpleNamespace(global_pool_conditions=False)

    def __init__(self, unet, outermost: float):
        self._unet, self._outermost, self._asked = unet, outermost, 0

    def embed(self, hint: mx.array) -> mx.array:
        return hint

    def __call__(self, x, t, context, seen, text_time=None):
        temb = self._unet.embed_time(t, mx.float32, context)
        (first, *rest), middle = self._unet.encode(self._unet.conv_in(x), temb, context)
        deeper = 0.1 if self._asked == 0 else float("nan")
        self._asked += 1
        return [mx.full(first.shape, self._outermost), *(mx.full(r.shape, deeper) for r in rest)], middle * deeper


def test_controlnets_are_heard_where_something_is_computed(sd, calls):
    def latents(outermost: float) -> list[np.ndarray]:
        control = Control(Net(sd.unet.network, outermost), mx.ones((48, 64, 3)))
        run = sd.generate_latents(PROMPT, num_steps=2, deep_cache=2, controls=[control], **SMALL)
        return [np.array(x) for x in run]

    quiet, loud = latents(0.0), latents(1.0)
    assert [whole for _, whole in calls] == [True, False] * 2
    assert all(relative_error(a, b) > 1e-4 for a, b in zip(loud, quiet, strict=True))


@pytest.mark.parametrize("every", [0, -1])
def test_numbers_that_make_no_sense(sd, every):
    with pytest.raises(ValueError, match=rf"deep_cache {every} must be at least 1"):
        sd.generate_latents(PROMPT, deep_cache=every, **SMALL)


def test_runs_keep_nothing_of_each_other():
    first, second = DeepCache(2), DeepCache(2)
    context = Context(mx.zeros((1, 1, 1)))
    kept = first(0, context)["deep"]
    kept.append(mx.zeros(1))
    assert first(1, context)["deep"] is kept and not first(2, context)["deep"]
    assert not second(1, context)["deep"] and DeepCache(1)(0, context) == {}


def test_on_the_command_line(run, sd1_folder, tmp_path):
    options = ["--model", sd1_folder, "--steps", 4, "--seed", 1, "--n_images", 1, "--width", 64, "--height", 64]
    files = [tmp_path / f"{every}.png" for every in (1, 3)]
    for every, file in zip((1, 3), files, strict=True):
        run("txt2image", PROMPT, *options, "--deep-cache", every, "--output", file).succeeded()
    assert files[0].read_bytes() != files[1].read_bytes()

"""The memory plan against what MLX reports: predictions from graphs that are never evaluated."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from configs import UNETS
from models.test_controlnet import CONTROLNETS
from models.test_vae import SD as VAE
from oracle import normal
from peaks import peaks
from stable_diffusion import StableDiffusionXL
from stable_diffusion.app import budget
from stable_diffusion.app.budget import Asked, at_once, choose, images_at_once, needs, set_limits
from stable_diffusion.app.memory import CPU, METAL, peak
from stable_diffusion.diffusion.controls import Control
from stable_diffusion.weights.load import build
from stable_diffusion.weights.quantize import size_in_bytes

F32 = mx.float32
AHEAD = 10**12  # a limit of memory that is never reached, so that MLX works ahead
RUNS = 20  # of what is measured
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 500,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "projection_dim": 256,
}


@pytest.fixture(autouse=True)
def limits():
    """MLX's limits, as they were before."""
    memory, cache = mx.get_memory_limit(), mx.set_cache_limit(0)
    yield
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)


def measured(module, call, shapes, limit: int) -> list[int]:
    arrays = [mx.zeros(shape, dtype) for shape, dtype in shapes]
    mx.eval(module.parameters(), arrays)
    return peaks(call, *arrays, runs=RUNS, limit=limit)


def unet_case(family: str, rows: int, size: tuple[int, int]):
    unet = build("unet", UNETS[family])
    config = unet.config
    shapes = [
        ((rows, *size, config.in_channels), F32),
        ((rows,), F32),
        ((rows, 77, config.cross_attention_dim[0]), F32),
    ]
    if family == "xl":
        shapes += [((rows, 32), F32), ((rows, 6), F32)]
    return unet, lambda x, t, context, *more: unet(x, t, context, text_time=more or None), shapes


@pytest.mark.parametrize(
    "family, rows, size", [("xl", 2, (24, 24)), ("xl", 2, (40, 24)), ("xl", 4, (24, 40)), ("sd2", 2, (16, 24))]
)
def test_a_step_of_the_unet(family, rows, size):
    unet, call, shapes = unet_case(family, rows, size)
    most, found = peak(unet, call, *shapes, limit=0), measured(unet, call, shapes, 0)
    # Where the scores of attention decide, MLX computes on them in place or not, as the machine is busy.
    assert most / (1.6 if family == "sd2" else 1.1) <= min(found) and max(found) <= 1.1 * most
    assert max(measured(unet, call, shapes, AHEAD)) == pytest.approx(peak(unet, call, *shapes), rel=0.1)


@pytest.mark.parametrize("prompts", [1, 2, 4])
def test_a_text_encoder(prompts):
    encoder = build("text_encoder", TEXT)

    def call(ids: mx.array) -> mx.array:
        return encoder(ids).last_hidden_state

    shapes = [((prompts, 77), mx.int32)]
    strict, ahead = (peak(encoder, call, *shapes, limit=limit) for limit in (0, AHEAD))
    found = measured(encoder, call, shapes, 0)
    # Which buffers are taken over depends on what the thread that computes is done with.
    assert 0.7 * strict <= min(found) and max(found) <= strict
    assert 0.85 * ahead <= max(measured(encoder, call, shapes, AHEAD)) <= ahead


def test_nothing_is_evaluated_or_changed():
    unet, call, shapes = unet_case("xl", 2, (128, 128))
    weight = unet.conv_in.weight
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert peak(unet, call, *shapes) > 2**28
    assert mx.get_peak_memory() - before < 2**16 and unet.conv_in.weight is weight


def test_more_is_taken_for_more():
    def predicted(rows: int, size: tuple[int, int], family: str = "sd2", **options) -> int:
        unet, call, shapes = unet_case(family, rows, size)
        return peak(unet, call, *shapes, **options)

    assert predicted(1, (16, 16), limit=0) < predicted(2, (16, 16), limit=0) < predicted(2, (32, 16), limit=0)
    assert predicted(2, (16, 16), limit=0) < predicted(2, (16, 16))  # MLX works ahead
    on_metal, here = (predicted(2, (64, 64), "xl", backend=one, limit=0) for one in (METAL, CPU))
    assert on_metal < here  # where convolutions are unfolded


def test_a_run_is_planned_and_made_cheaper(xl_folder, caplog):
    sd = StableDiffusionXL(xl_folder, unet_bits=8)
    set_limits(8e9, low_memory=False)
    asked = Asked(2, (24, 24))
    caplog.set_level("INFO", "stable_diffusion")
    plain = needs(sd, 10**12, asked)
    assert [need.stage for need in plain] == ["text encoding", "a step of the UNet", "decoding"]
    assert plain[0].weights > plain[1].weights == sd.recipes["unet"].size()
    assert "GB of weights" in str(plain[1])
    assert choose(sd, 10**12, asked) == plain and sd.rows_at_once is None and sd.memory_limit == 10**12
    assert not caplog.records
    small = choose(sd, plain[1].total - 1, asked)
    assert sd.rows_at_once == 1 and small[1].working < plain[1].working / 2
    caplog.clear()
    choose(sd, 10**6, asked)
    (line,) = caplog.messages
    assert "needs about" in line and "may take 0.0 GB" in line and "--low_memory" in line


def test_graphs_are_looked_at_only_where_it_matters(xl_folder, monkeypatch):
    sd = StableDiffusionXL(xl_folder)
    asked = Asked(3, (24, 24))
    looked = needs(sd, 1, asked)[1]
    monkeypatch.setattr(budget, "_of_unet", None)
    bound = needs(sd, 10**12, asked)[1]
    assert bound.weights == looked.weights and bound.working > 2 * looked.working
    assert images_at_once(sd, 10**12, 3, (24, 24)) == 3
    assert images_at_once(sd, 10**12, 9, (24, 24)) == 5  # and 4, or the first would wait for the ninth
    with pytest.raises(TypeError):
        needs(sd, bound.total - 1, asked)


def test_a_run_with_all_that_there_is(xl_folder, caplog):
    sd = StableDiffusionXL(xl_folder)
    caplog.set_level("INFO", "stable_diffusion")
    net = build("controlnet", CONTROLNETS["xl"])
    plain = {need.stage: need for need in needs(sd, 10**12, Asked(1, (16, 24)))}
    asked = Asked(1, (16, 24), nets=[net], larger=(32, 40), encodes=True)
    full = {need.stage: need for need in needs(sd, 10**12, asked)}
    stages = ["text encoding", "encoding", "a step of the UNet", "a step of the second pass", "decoding"]
    assert list(full) == stages
    step, second = (full[stage] for stage in stages[2:4])
    size = size_in_bytes(net)
    assert step.weights == second.weights == plain[stages[2]].weights + size + sd.recipes["autoencoder"].size()
    assert plain[stages[2]].working < step.working < second.working
    assert full["decoding"].working != plain["decoding"].working  # bands for the large one
    found = list(full.values())
    most = max(need.working for need in found[1:])
    assert at_once(sd, found, [net]) == second.weights + most
    # The network that was looked at is as it was.
    assert all(isinstance(value, mx.array) for _, value in tree_flatten(net.parameters()))


@pytest.mark.parametrize("steered", [False, True])
def test_a_run_takes_what_was_planned(xl_folder, steered, caplog):
    caplog.set_level("INFO", "stable_diffusion")
    sd = StableDiffusionXL(xl_folder)
    nets = [build("controlnet", CONTROLNETS["xl"])] if steered else []
    size = (24, 32)
    controls = [Control(net, mx.zeros((8 * size[0], 8 * size[1], 3))) for net in nets]
    latents = sd.generate_latents("a cat", 2, 3, 5.0, latent_size=size, seed=1, controls=controls)
    latents.prepare()
    mx.eval(sd.unet.parameters(), *(net.parameters() for net in nets), *(c.hint for c in controls))
    mx.set_memory_limit(0)
    plan = needs(sd, 10**12, Asked(2, size, nets=nets))
    step = next(need for need in plan if need.stage == "a step of the UNet")
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for x_t in latents:
        mx.eval(x_t)
    assert mx.get_peak_memory() - before == pytest.approx(step.working, rel=0.1)


def test_batches_fill_the_memory(xl_folder):
    sd = StableDiffusionXL(xl_folder)
    set_limits(8e9, low_memory=False)
    mx.set_memory_limit(0)
    size = (24, 24)
    weights = sd.recipes["unet"].size() + sd.recipes["autoencoder"].size()
    alone, five = (budget._of_unet(sd, Asked(n, size), 2 * n, size) for n in (1, 5))
    assert images_at_once(sd, weights + alone // 2, 9, size) == 1  # one has to be, whatever it takes
    assert images_at_once(sd, weights + 1.05 * five, 5, size) == 5
    assert images_at_once(sd, weights + 1.05 * five, 6, size) == 3  # and 3, rather than 5 and 1
    assert 4 <= images_at_once(sd, weights + 1.05 * five, 100, size) <= 5
    sd.rows_at_once = 1
    assert images_at_once(sd, 10**12, 5, size) == 1


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("half", ["decode", "encode"])
def test_decoding_and_encoding_keep_to_the_limit(xl_folder, half, low_memory):
    sd = StableDiffusionXL(xl_folder, low_memory=low_memory)
    given = mx.array(normal(1, 48, 56, 4) if half == "decode" else np.clip(normal(1, 384, 448, 3), -1, 1))

    def most() -> int:
        return max(peaks(getattr(sd, half), given, limit=mx.get_memory_limit()))

    mx.eval(given, sd.autoencoder.parameters())
    assert getattr(sd, half)(given).shape == ((1, 384, 448, 3) if half == "decode" else (1, 48, 56, 4))
    free = most()
    for share in (0.5, 0.25):
        sd.memory_limit = mx.get_active_memory() + share * free
        assert most() <= share * free


def test_limits_are_set():
    assert set_limits(6e9, low_memory=False) == 6e9 == mx.get_memory_limit()
    assert mx.set_cache_limit(0) == 6e9 // 8
    set_limits(6e9, low_memory=True)
    assert mx.get_memory_limit() == (0 if mx.default_device() == mx.cpu else 6e9)
    assert 1e8 < set_limits(None, low_memory=False) < 1e13


def test_decoding():
    vae = build("vae", VAE)
    shapes = [((1, 12, 16, 4), F32)]
    planned = peak(vae, vae.decode, *shapes, limit=0)
    assert measured(vae, vae.decode, shapes, 0) == pytest.approx([planned] * RUNS, rel=0.1)

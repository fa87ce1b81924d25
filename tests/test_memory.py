"""The memory plan against what MLX reports: predictions from graphs that are never evaluated."""

import mlx.core as mx
import pytest

from configs import UNETS
from models.test_vae import SD as VAE
from stable_diffusion import StableDiffusionXL
from stable_diffusion.budget import choose, needs, set_limits
from stable_diffusion.memory import METAL, peak
from stable_diffusion.weights.load import build

F32 = mx.float32
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


def measured(module, call, shapes, limit: int) -> int:
    arrays = [mx.zeros(shape, dtype) for shape, dtype in shapes]
    mx.eval(module.parameters(), arrays)
    mx.set_memory_limit(limit)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(call(*arrays))
    return mx.get_peak_memory() - before


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
    waiting = peak(unet, call, *shapes, limit=0)
    assert waiting == pytest.approx(measured(unet, call, shapes, 0), rel=0.1)
    # How far MLX works ahead where it need not wait depends on what else the machine does.
    assert 0.9 * waiting <= measured(unet, call, shapes, 10**12) <= 1.1 * peak(unet, call, *shapes)


@pytest.mark.parametrize("prompts", [1, 2, 4])
def test_a_text_encoder(prompts):
    encoder = build("text_encoder", TEXT)

    def call(ids: mx.array) -> mx.array:
        return encoder(ids).last_hidden_state

    # Of buffers as small as these MLX holds sometimes one more and sometimes one less, from run to run.
    shapes = [((prompts, 77), mx.int32)]
    assert 1 <= measured(encoder, call, shapes, 0) / peak(encoder, call, *shapes, limit=0) <= 1.6


def test_nothing_is_evaluated_or_changed():
    unet, call, shapes = unet_case("xl", 2, (128, 128))
    weight = unet.conv_in.weight
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert peak(unet, call, *shapes) > 2**28
    assert mx.get_peak_memory() - before < 2**16 and unet.conv_in.weight is weight


def test_more_is_taken_for_more():
    def predicted(rows: int, size: tuple[int, int], **options) -> int:
        unet, call, shapes = unet_case("sd2", rows, size)
        return peak(unet, call, *shapes, **options)

    assert predicted(1, (16, 16), limit=0) < predicted(2, (16, 16), limit=0) < predicted(2, (32, 16), limit=0)
    assert predicted(2, (16, 16), limit=0) < predicted(2, (16, 16))  # MLX works ahead
    assert predicted(2, (32, 32), backend=METAL, limit=0) < predicted(2, (32, 32), limit=0)  # which unfolds nothing


def test_a_run_is_planned_and_made_cheaper(xl_folder, caplog):
    sd = StableDiffusionXL(xl_folder, unet_bits=8)
    set_limits(8e9, low_memory=False)
    plain = needs(sd, 2, (24, 24))
    assert [need.stage for need in plain] == ["text encoding", "a step of the UNet", "decoding"]
    assert plain[0].weights > plain[1].weights == sd.recipes["unet"].size()
    assert "GB of weights" in str(plain[1])
    assert choose(sd, 10**12, 2, (24, 24)) == plain and sd.rows_at_once is None and not caplog.records
    small = choose(sd, plain[1].total - 1, 2, (24, 24))
    assert sd.rows_at_once == 1 and small[1].working < plain[1].working / 2
    caplog.clear()
    choose(sd, 10**6, 2, (24, 24))
    (line,) = caplog.messages
    assert "needs about" in line and "may take 0.0 GB" in line and "--low_memory" in line


def test_limits_are_set():
    assert set_limits(6e9, low_memory=False) == 6e9 == mx.get_memory_limit()
    assert mx.set_cache_limit(0) == 6e9 // 8
    set_limits(6e9, low_memory=True)
    assert mx.get_memory_limit() == (0 if mx.default_device() == mx.cpu else 6e9)
    assert 1e8 < set_limits(None, low_memory=False) < 1e13


def test_decoding():
    vae = build("vae", VAE)
    shapes = [((1, 12, 16, 4), F32)]
    assert peak(vae, vae.decode, *shapes, limit=0) == pytest.approx(measured(vae, vae.decode, shapes, 0), rel=0.2)

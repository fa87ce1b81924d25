"""The memory plan: constants against what MLX reports, batches that fit, limits that are kept, refused or exceeded."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.memory import half_precision
from benchmarks.shapes import SHAPES, VAE
from command_line import PROMPT
from oracle import normal
from peaks import peaks
from stable_diffusion import StableDiffusion, StableDiffusionXL
from stable_diffusion.app.engine import Engine, Resources
from stable_diffusion.app.memory import RunShape, fit, images_that_fit, plan, set_limits, step_bytes
from stable_diffusion.app.request import Request, expand
from stable_diffusion.models import tiling
from stable_diffusion.models.config import AutoencoderConfig, UNetConfig
from stable_diffusion.models.unet import UNet2DConditionModel
from stable_diffusion.options import SettingError


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A Mac of 8 GB, as far as the plan asks for it."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    known = {"memory_size": 2**33, "max_recommended_working_set_size": 2**34 // 3}
    monkeypatch.setattr(mx, "device_info", lambda: known)


def planned_step(shape: str, side: int, rows: int, dtype: mx.Dtype = mx.float16) -> int:
    config = UNetConfig.from_dict(SHAPES[shape]["unet"])
    model = SimpleNamespace(unet_config=config, rows_at_once=None, dtype=dtype)
    return step_bytes(model, RunShape(1, (side, side), rows=rows), (side, side))


@pytest.mark.parametrize("size, rows_at_once", [((24, 16), 1), ((32, 32), None)])
def test_a_step_takes_what_was_planned(size, rows_at_once):
    """MLX computes in place or not as the machine is busy, so the most of several runs is taken."""
    sd = StableDiffusion("tiny")
    sd.rows_at_once = rows_at_once
    sd.ensure_models_are_loaded()
    mx.set_memory_limit(0)
    planned = next(s for s in plan(sd, RunShape(2, size), 10**12) if s.stage == "a step of the UNet").working
    found = []
    for _ in range(5):
        latents = sd.generate_latents("a red circle", 2, 2, 5.0, latent_size=size, seed=1)
        latents.prepare()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for x_t in latents:
            mx.eval(x_t)
        found.append(mx.get_peak_memory() - before)
    assert planned == pytest.approx(max(found), rel=0.25)


@pytest.mark.parametrize(
    "shape, side, rows, measured", [("sd15", 32, 1, 116e6), ("sd15", 32, 2, 126e6), ("sd15", 64, 1, 197e6)]
)
def test_a_step_of_a_published_shape(shape, side, rows, measured):
    """As ``python -m benchmarks.memory`` has measured them."""
    mx.set_memory_limit(0)
    assert planned_step(shape, side, rows) == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(
    "shape, side, rows, low_memory, computed",
    [
        ("sdxl", 128, 1, False, 1.42e9),
        ("sdxl", 128, 1, True, 0.38e9),
        ("sdxl", 128, 2, False, 1.62e9),
        ("sdxl", 64, 1, False, 0.74e9),
        ("sd15", 64, 2, False, 0.95e9),
    ],
)
def test_a_step_on_metal(gpu, shape, side, rows, low_memory, computed):
    """As MLX 0.32's rules on command buffers and Winograd convolutions, applied to the graph, give it."""
    set_limits(None, low_memory)
    planned = planned_step(shape, side, rows)
    assert planned == pytest.approx(computed, rel=0.25)
    assert planned_step(shape, side, rows, mx.float32) == pytest.approx(2 * planned, rel=0.01)


@pytest.mark.parametrize("pixels, computed", [(64, 0.23e9), (96, 0.45e9)])
def test_a_small_picture_on_metal_is_decoded_as_one_graph(gpu, pixels, computed):
    """Computed as for a step: 2.4 GB at 256 and 3.5 GB at 448 pixels, so these are decoded in slices."""
    config = AutoencoderConfig.from_dict(VAE)

    def decoding(pixels: int) -> tiling.VAEPlan:
        return tiling.plan(config, "decoder", (1, pixels // 8, pixels // 8, 4), 5e9)

    assert decoding(pixels).rows is None and decoding(pixels).peak == pytest.approx(computed, rel=0.25)
    sliced = {pixels: decoding(pixels) for pixels in (128, 256, 448, 512)}
    assert all(plan.rows and plan.tile is None for plan in sliced.values())
    peaks = [plan.peak for plan in sliced.values()]
    assert sorted(peaks) == peaks and peaks[0] < 0.3e9 and peaks[-1] < 1e9


def test_xl_at_1024_fits_a_mac_of_8_gb(gpu):
    """Macs below 36 GB recommend two thirds of their memory: a run may take 5.15 GB, and a fifth is left of it."""
    model = half_precision(SHAPES["sdxl"], {"unet": 8, "text_encoder": 4, "text_encoder_2": 4})
    model.low_memory, model.rows_at_once = True, 1
    limit = set_limits(None, low_memory=True)
    assert limit == pytest.approx(5.15e9, rel=0.01)
    text, step, decoding = plan(model, RunShape(1, (128, 128)), limit)
    assert text.total < 1e9 and decoding.total < 3e9
    assert step.weights == pytest.approx(3.18e9, rel=0.01) and step.total < 0.8 * limit


def test_a_run_is_planned_and_fitted(xl_folder, caplog):
    sd = StableDiffusionXL(xl_folder, unet_bits=8)
    set_limits(8e9, low_memory=False)
    shape = RunShape(2, (24, 24))
    caplog.set_level("INFO", "stable_diffusion")
    stages = plan(sd, shape, 10**12)
    assert [stage.stage for stage in stages] == ["text encoding", "a step of the UNet", "decoding"]
    text = sd.sources["text_encoder_1"].size + sd.sources["text_encoder_2"].size
    assert (stages[0].weights, stages[1].weights) == (text, sd.sources["unet"].size)
    assert fit(sd, shape, 10**12, False) and sd.rows_at_once is None and sd.memory_limit == 10**12
    assert len(caplog.messages) == 3 and all("GB of weights" in line for line in caplog.messages)
    limit = stages[1].weights + stages[1].working // 2
    assert not fit(sd, shape, limit, False)
    small = plan(sd, shape, limit)
    assert sd.rows_at_once == 1 and small[1].working < stages[1].working / 3
    caplog.clear()
    fit(sd, shape, 10**6, False)
    (line,) = (message for message in caplog.messages if "needs about" in message)
    assert "the limit is 0.0 GB" in line
    with pytest.raises(SettingError, match=r"needs about .* GB, the limit is 0.0 GB; quantize"):
        fit(sd, shape, 10**6, True)


@pytest.mark.parametrize("options", [("--memory_limit", 0.01), ("--memory_limit", 0.002, "--low_memory")])
def test_a_limit_that_cannot_be_kept_is_refused(run, tmp_path, options):
    done = run("txt2image", "x", "--model", "tiny", *options, "--output", tmp_path / "a.png")
    done.refused("needs about", "the limit is", "--quantize", "--low_memory")


def test_all_stages_of_a_run(xl_folder):
    xl = StableDiffusionXL(xl_folder)
    size, vae = xl.sources["unet"].size, xl.sources["autoencoder"].size
    shape = RunShape(1, (16, 24), controls=[size], larger=(32, 40), encodes=True)
    *_, simple, _ = plan(xl, RunShape(1, (16, 24)), 10**12)
    stages = plan(xl, shape, 10**12)
    names = ["text encoding", "encoding", "a step of the UNet", "a step of the second pass", "decoding"]
    assert [stage.stage for stage in stages] == names
    _, _, step, second, _ = stages
    assert step.weights == second.weights == simple.weights + size + vae
    assert simple.working < step.working < second.working
    assert fit(xl, shape, 2 * size + vae + max(stage.working for stage in stages[1:]), False)
    xl.rows_at_once = 1  # no fewer rows can help
    second = plan(xl, shape, 10**12)[3]
    assert not fit(xl, shape, 2 * size + vae + second.working - 1, False)


def test_batches_fill_the_memory(xl_folder):
    sd = StableDiffusionXL(xl_folder)
    size = (24, 24)
    weights = sd.sources["unet"].size + sd.sources["autoencoder"].size
    one = step_bytes(sd, RunShape(1, size), size)
    assert images_that_fit(sd, RunShape(9, size), weights + one // 2) == 1  # one has to be, whatever it takes
    assert images_that_fit(sd, RunShape(5, size), weights + 5 * one) == 5
    assert images_that_fit(sd, RunShape(6, size), weights + 5 * one) == 3  # and 3, rather than 5 and 1
    assert images_that_fit(sd, RunShape(9, size), 10**12) == 5  # and 4, or the first would wait for the ninth
    sd.rows_at_once = 1
    assert images_that_fit(sd, RunShape(5, size), 10**12) == 1


# --- what the plan has missed ----------------------------------------------------------------------------------------


@pytest.fixture
def rows(monkeypatch) -> list[int]:
    """The rows of each call of the UNet."""
    return spied_rows(monkeypatch)


def spied_rows(monkeypatch) -> list[int]:
    seen, unet = [], UNet2DConditionModel.__call__

    def spied(self, x, *args, **kwargs):
        seen.append(len(x))
        return unet(self, x, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "__call__", spied)
    return seen


def engine_for(sd: StableDiffusion, n_images: int, **resources) -> Engine:
    request = Request(prompt=PROMPT, seed=1, n_images=n_images, width=64, height=64, steps=2, cfg=4.0)
    return Engine(sd, expand([(request, {})]), Resources(**resources))


OUT_OF_MEMORY = [
    "[metal::malloc] Attempting to allocate 9 bytes",
    "[METAL] Execution failed: Insufficient Memory",
]


@pytest.fixture(scope="module")
def wanted(sd) -> list[np.ndarray]:
    """Images in batches of three, all of whose rows run at once."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        rows = spied_rows(monkeypatch)
        images = [np.array(result.image) for result in engine_for(sd, 6, batch_size=3).run()]
    assert set(rows) == {6}
    return images


@pytest.mark.parametrize("error", [*map(RuntimeError, OUT_OF_MEMORY), MemoryError()])
def test_where_memory_runs_out_fewer_rows_run_at_once(sd, wanted, monkeypatch, caplog, rows, error):
    unet = UNet2DConditionModel.__call__

    def breaks(self, x, *args, **kwargs):
        if len(x) > 2:
            raise error
        return unet(self, x, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "__call__", breaks)
    begun = []
    images = [r.image for r in engine_for(sd, 6, batch_size=3).run(lambda s: begun.append((s.number, s.is_retry)))]
    assert rows == [1] * 24  # 6 became 3, which are too many, and 1; the second batch begins with 1
    assert begun == [(0, False), (0, True), (0, True), (1, False), (2, False), (0, False), (1, False), (2, False)]
    assert all(np.abs(np.array(a).astype(int) - b).max() <= 1 for a, b in zip(images, wanted, strict=True))
    said = [line.split(": running ")[1] for line in caplog.messages if "memory ran out" in line]
    assert said == [f"the {rows} rows of the UNet's batch {fewer} at a time" for rows, fewer in ((6, 3), (3, 1))]
    assert sd.rows_at_once is None


def test_other_errors_are_not_tried_again(sd, monkeypatch, caplog):
    def breaks(self, *args, **kwargs):
        raise RuntimeError("[metal] the device is gone")

    monkeypatch.setattr(UNet2DConditionModel, "__call__", breaks)
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(engine_for(sd, 2).run())
    assert caplog.messages == []


@pytest.mark.parametrize("excess, wanted", [(0.9, [4] * 8), (2.0, [4] * 2 + [2] * 12), (9.0, [4] * 2 + [1] * 24)])
def test_the_first_step_corrects_the_plan(sd, monkeypatch, caplog, rows, excess, wanted):
    """Where a step takes twice what is left beside the weights, the next batches run half as many rows at once."""
    engine = engine_for(sd, 8, batch_size=2)
    mx.reset_peak_memory()
    peak = 10**6 + int(excess * (engine._limit - 10**6))
    monkeypatch.setattr(mx, "get_peak_memory", lambda: peak if rows else 0)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 10**6)
    list(engine.run())
    with pytest.raises(ValueError, match="has already run; create another"):
        next(engine.run())
    assert rows == wanted and sd.rows_at_once is None
    assert ["a step took" in line for line in caplog.messages] == [True] * (excess > 1)


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half, low_memory", [("decode", False), ("encode", True)])
def test_decoding_and_encoding_keep_to_the_limit(xl_folder, half, low_memory):
    sd = StableDiffusionXL(xl_folder, low_memory=low_memory)
    given = mx.array(normal(1, 48, 56, 4) if half == "decode" else np.clip(normal(1, 256, 320, 3), -1, 1))

    def compute() -> mx.array:
        computed = getattr(sd, half)(given)
        assert computed.shape == ((1, 384, 448, 3) if half == "decode" else (1, 32, 40, 4))
        return computed

    def most() -> int:
        return max(peaks(compute, runs=2, limit=mx.get_memory_limit()))

    mx.eval(given, sd.autoencoder.parameters())
    free = most()
    for share in (0.5, 0.25):
        sd.memory_limit = mx.get_active_memory() + share * free
        assert most() <= share * free


def test_limits_are_set():
    assert set_limits(6e9, low_memory=False) == 6e9 == mx.get_memory_limit()
    assert mx.set_cache_limit(0) == 6e9 // 8
    set_limits(6e9, low_memory=True)
    assert mx.get_memory_limit() == 0
    assert 1e8 < set_limits(None, low_memory=False) < 1e13


def test_limits_of_a_mac(gpu, monkeypatch):
    assert set_limits(None, low_memory=False) == int(0.9 * (2**34 // 3)) == mx.get_memory_limit()
    assert set_limits(None, low_memory=True) == int(0.9 * (2**34 // 3)) and mx.get_memory_limit() == 0
    large = {"memory_size": 2**36, "max_recommended_working_set_size": 0.875 * 2**36}
    monkeypatch.setattr(mx, "device_info", lambda: large)
    assert set_limits(None, low_memory=False) == 0.75 * 2**36

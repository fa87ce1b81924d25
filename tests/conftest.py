"""What many tests share: checkpoints, made once and read only, and the scripts, called in this process."""

import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["SD_DEVICE"] = "cpu"  # of scripts; what is marked "gpu" runs without
os.environ["MLX_ENABLE_TF32"] = "0"  # or an M5 multiplies float32 with 11 bits
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of several processes; streams side by side have their own tests

from stable_diffusion.models import cpu  # first: it loads OpenBLAS before anything loads MLX

# isort: split
import mlx.core as mx

from command_line import SCRIPTS, Finished
from forked import Forks
from hub_server import Hub
from stable_diffusion import StableDiffusion, StableDiffusionXL
from stable_diffusion.app import engine

cpu.tune()
_DEVICE = mx.default_device()
cpu.choose_device()  # before any model is opened, which fixtures of a module do before a test begins
_SETTERS = (mx.set_memory_limit, mx.set_cache_limit)
_LIMITS = [set_limit(0) for set_limit in _SETTERS]  # what they were before


@pytest.fixture(autouse=True)
def process_settings(request, monkeypatch) -> Iterator[None]:
    """Give back what a test or a script sets for its process: the device, the library's log, MLX's limits
    and its convolutions.

    Numbers are compared on the CPU; tests marked ``gpu`` have the default device.
    """
    log = logging.getLogger("stable_diffusion")
    handlers, level = log.handlers, log.level
    for set_limit, limit in zip(_SETTERS, _LIMITS, strict=True):
        set_limit(limit)
    monkeypatch.setenv("MLX_CONV_WINOGRAD_WORKING_SET", "0")  # MLX's own; --exact sets it
    if request.node.get_closest_marker("gpu"):
        monkeypatch.delenv("SD_DEVICE")
        mx.set_default_device(_DEVICE)
    yield
    log.handlers, log.level = handlers, level
    mx.set_default_device(mx.cpu)


@pytest.fixture
def gpu(monkeypatch) -> Iterator[None]:
    """What the package computes on a GPU, computed here, without a compiler, which takes a second for each kernel.

    A GPU sums rows in a thousand parts, so rounding does not add up as it does in MLX's layer norm for a CPU, and its
    kernel of attention has scores in float32, whatever the type.
    """
    attend = mx.fast.scaled_dot_product_attention

    def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
        y = x.astype(mx.float64)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * mx.rsqrt(mx.square(y).mean(axis=-1, keepdims=True) + eps)
        y = y if weight is None else y * weight + bias
        return y.astype(x.dtype)

    def attention(q: mx.array, k: mx.array, v: mx.array, **options) -> mx.array:
        return attend(*(x.astype(mx.float32) for x in (q, k, v)), **options).astype(q.dtype)

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.fast, "layer_norm", layer_norm)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    mx.disable_compile()
    yield
    mx.enable_compile()


def pytest_configure(config: pytest.Config) -> None:
    """What each of the processes needs that run the tests.

    That is Ctrl-C, which a shell lets its background jobs ignore, and a temporary folder of its own: MLX keeps the code
    that it compiles there, and another process may read it half-written.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        folder = Path(tempfile.gettempdir(), f"stable-diffusion-tests-{worker}")
        folder.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = str(folder)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each core, four at most, for the whole suite; what is asked for by name runs in this one."""
    return min(4, os.cpu_count() or 1) if config.args == config.getini("testpaths") else 0


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory) -> Path:
    """A random SD 1 checkpoint with the DDIM scheduler of the published ones."""
    import diffusers  # here, and in the next fixture: the process that only hands out the tests does without it

    from checkpoints import SCALED, make

    folder = tmp_path_factory.mktemp("sd1") / "sd"
    make(folder, "sd1", diffusers.DDIMScheduler(**SCALED, set_alpha_to_one=False, steps_offset=1, clip_sample=False))
    return folder


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory) -> Path:
    """A random XL checkpoint with SDXL-Turbo's scheduler."""
    import diffusers

    from checkpoints import SCALED, make

    folder = tmp_path_factory.mktemp("xl") / "xl"
    make(folder, "xl", diffusers.EulerAncestralDiscreteScheduler(**SCALED, timestep_spacing="trailing"))
    return folder


@pytest.fixture(scope="module")
def sd(sd1_folder) -> StableDiffusion:
    return StableDiffusion(sd1_folder)


@pytest.fixture(scope="module")
def xl(xl_folder) -> StableDiffusionXL:
    return StableDiffusionXL(xl_folder)


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion:
    return StableDiffusion("tiny")


@pytest.fixture
def run(capsys) -> Callable[..., Finished]:
    """Call a script in this process."""

    def call(script: str, *argv) -> Finished:
        try:
            code = SCRIPTS[script]([str(a) for a in argv])
        except SystemExit as leaving:
            code = leaving.code
        out, err = capsys.readouterr()
        return Finished(code, out.splitlines(), err)

    return call


@pytest.fixture(scope="session")
def forked() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def hub(forked) -> Iterator[Hub]:
    with Hub(forked) as server:
        yield server


@pytest.fixture
def no_model(monkeypatch) -> None:
    """A test fails where a script opens a model."""

    def opened(*args, **kwargs):
        raise AssertionError("a model was opened")

    monkeypatch.setattr(engine, "StableDiffusion", opened)
    monkeypatch.setattr("stable_diffusion.pipeline.open_checkpoint", opened)

"""Parts of a batch side by side, as on a CPU of two cores, whatever this one has; and what switches them on."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from models.test_controlnet import CONTROLNETS
from oracle import last, normal, relative_error
from stable_diffusion.diffusion.controls import Control
from stable_diffusion.models import cpu
from stable_diffusion.models.unet import UNet2DConditionModel
from stable_diffusion.weights.load import build

PROMPT = "the red cat"
SMALL = {"num_steps": 3, "latent_size": (6, 8), "seed": 7}


@pytest.fixture
def two_cores(monkeypatch) -> list[int]:
    """The threads that products are set to, one after the other, on two cores."""
    counts: list[int] = []
    monkeypatch.setattr(cpu, "_openblas", SimpleNamespace(openblas_set_num_threads=counts.append))
    monkeypatch.setattr(cpu, "_cores", 2)
    return counts


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, str]]:
    """The rows of each call of the UNet, and the stream of its graph."""
    recorded: list[tuple[int, str]] = []
    call = UNet2DConditionModel.__call__

    def watched(unet, x, *args, **kwargs):
        recorded.append((len(x), str(mx.default_stream(mx.cpu))))
        return call(unet, x, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "__call__", watched)
    return recorded


@pytest.mark.parametrize(
    "which, options",
    [
        ("sd", {"n_images": 3, "sampler": "heun"}),
        ("sd", {"deep_cache": 2, "sampler": "euler_a"}),
        ("sd", {"guidance_interval": (0.3, 1.0), "n_images": 2}),
        ("sd", {"controlled": True}),
        ("xl", {"cfg_weight": 5.0, "token_merging": 0.5}),
    ],
)
def test_images_are_those_of_one_batch(which, options, request):
    pipeline = request.getfixturevalue(which)
    options = dict(options)
    if options.pop("controlled", False):
        image = mx.array(np.abs(normal(48, 64, 3)).clip(0, 1))
        options["controls"] = [Control(build("controlnet", CONTROLNETS["sd1"]), image, guess=True)]
    together = last(pipeline.generate_latents(PROMPT, **SMALL, **options))
    request.getfixturevalue("two_cores")
    aside = last(pipeline.generate_latents(PROMPT, **SMALL, **options))
    assert relative_error(aside, together) <= 1e-5


def test_each_part_has_its_stream_and_products_one_core(sd, two_cores, calls):
    last(sd.generate_latents(PROMPT, n_images=2, **SMALL))
    first, second = calls[:2]
    assert [rows for rows, _ in calls] == [2] * 6 and calls == [first, second] * 3
    assert first[1] == str(mx.default_stream(mx.cpu)) != second[1]
    assert two_cores == [1] * 6 + [2]


@pytest.mark.parametrize(
    "setting, rows, count",
    [("guidance of 1", 1, 3), ("low memory", 2, 3), ("rows one by one", 1, 6), ("before tuning", 2, 3)],
)
def test_batches_that_are_not_parted_have_all_cores(setting, rows, count, sd, two_cores, calls, monkeypatch):
    if setting == "low memory":
        mx.set_memory_limit(0)
    if setting == "before tuning":
        monkeypatch.setattr(cpu, "_cores", 1)
    monkeypatch.setattr(sd, "rows_at_once", 1 if setting == "rows one by one" else None)
    last(sd.generate_latents(PROMPT, **SMALL, cfg_weight=1.0 if setting == "guidance of 1" else 7.5))
    assert calls == [(rows, str(mx.default_stream(mx.cpu)))] * count
    assert set(two_cores) == (set() if setting == "before tuning" else {2})


def test_products_get_their_cores_back(sd, two_cores):
    latents = sd.generate_latents(PROMPT, **SMALL)
    mx.eval(next(latents))
    assert two_cores[-1] == 1
    del latents
    assert two_cores[-1] == 2


def test_a_run_in_another_thread(sd, two_cores):
    results = []
    here = last(sd.generate_latents(PROMPT, **SMALL))
    thread = threading.Thread(target=lambda: results.append(last(sd.generate_latents(PROMPT, **SMALL))))
    thread.start()
    thread.join()
    assert relative_error(results[0], here) <= 1e-6


@pytest.mark.parametrize(
    "name, variable, chosen",
    [(None, None, "gpu"), ("cpu", None, "cpu"), (None, "cpu", "cpu"), ("gpu", "cpu", "gpu"), (None, "", "gpu")],
)
def test_the_device_is_that_of_the_call_or_of_the_environment(monkeypatch, name, variable, chosen):
    devices = [mx.Device(mx.gpu)]  # where there is one
    monkeypatch.setattr(mx, "is_available", lambda device: True)
    monkeypatch.setattr(mx, "set_default_device", devices.append)
    monkeypatch.delenv("SD_DEVICE") if variable is None else monkeypatch.setenv("SD_DEVICE", variable)
    cpu.choose_device(name)
    assert devices[-1] == getattr(mx, chosen)


@pytest.mark.parametrize("name, tools, compiles", [("cpu", True, True), ("cpu", False, False), ("gpu", False, True)])
def test_a_mac_without_command_line_tools_opens_no_dialog(monkeypatch, name, tools, compiles):
    """On its CPU MLX would call the compiler, in whose place macOS asks whether to install it."""
    calls = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: SimpleNamespace(returncode=0 if tools else 2))
    monkeypatch.setattr(mx, "disable_compile", lambda: calls.append("disabled"))
    monkeypatch.setattr(mx, "is_available", lambda device: True)
    monkeypatch.setattr(mx, "set_default_device", lambda device: None)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(getattr(mx, name)))
    cpu.choose_device(name)
    assert calls == ([] if compiles else ["disabled"])


@pytest.mark.skipif(cpu._openblas is None, reason="there is no OpenBLAS")
def test_importing_the_package_switches_nothing_on():
    code = """
import stable_diffusion
from stable_diffusion.models import cpu
import mlx.core as mx
mx.set_default_device(mx.cpu)
print(cpu._openblas.openblas_get_num_threads(), cpu.parts(4))
cpu.tune()
print(cpu._openblas.openblas_get_num_threads(), cpu.parts(4))
"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": str(Path(cpu.__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "1", "2", "2"]


@pytest.mark.parametrize("setting, expected", [(None, "0"), ("1", "1")])
def test_float32_is_not_rounded_unless_the_user_has_it_so(setting, expected):
    """MLX reads the variable at its first product; whatever module of the package comes first sets it."""
    environment = {key: value for key, value in os.environ.items() if key != "MLX_ENABLE_TF32"}
    environment |= {} if setting is None else {"MLX_ENABLE_TF32": setting}
    environment["PYTHONPATH"] = str(Path(cpu.__file__).parents[2])
    code = """
import os, sys
sys.modules["mlx.core"] = None
try:
    import stable_diffusion
except ImportError:
    print(os.environ["MLX_ENABLE_TF32"])
"""
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [expected]

"""The self-test of a machine: what it computes is right on both backends' ways, and what is broken it finds."""

from itertools import groupby

import mlx.core as mx
import pytest

from stable_diffusion.app import check, memory
from stable_diffusion.app.check import Check, find_checks, findings, measure
from stable_diffusion.app.check_kernels import kernel_cases
from stable_diffusion.models import layers, tiling


def failed(*words: str) -> set[str]:
    """The types in which checks fail that have these words in their names."""
    checks = find_checks(words)
    assert checks
    return {str(result.check.dtype).removeprefix("mlx.core.") for result in map(measure, checks) if not result.passed}


@pytest.mark.parametrize("way", ["cpu", "gpu"])
def test_every_kernel_is_within_its_bound_in_float32(way, request):
    """At the shapes of the check but the largest, which would take long here."""
    small = {case.name for case in kernel_cases() if mx.float32 in case.on_cpu}
    if way == "gpu":
        request.getfixturevalue("gpu")
    checks = [c for c in find_checks() if c.name in small and c.dtype == mx.float32]
    assert len(checks) == len(small) > 50
    assert [(r.check.name, r.value, r.error) for r in map(measure, checks) if not r.passed] == []


@pytest.mark.gpu
@pytest.mark.parametrize("words", [("product",), ("convolution", " 1 x 32 x 32"), ("norm",), ("small", "SDXL")])
def test_this_machine_computes_what_it_should(words):
    assert failed(*words) == set()


@pytest.mark.parametrize("words", [("attention", "1025"), ("norm", "320"), ("3 to 320",), ("small", "1.5", "2 rows")])
def test_half_precision_is_within_its_bounds(words):
    assert {c.dtype for c in find_checks(words)} >= {mx.float32, mx.float16}
    assert failed(*words) == set()


def test_checks_of_one_name_follow_one_another_in_different_types(gpu):
    """So that they are one line of the table. A GPU has all the checks of a CPU, and larger ones."""
    names = []
    for name, group in groupby(find_checks(), key=lambda c: c.name):
        types = [c.dtype for c in group]
        assert len(types) == len(set(types))
        names.append(name)
    assert len(names) == len(set(names))


def test_the_picture_is_that_of_the_package():
    assert failed("bundled") == set()


def test_a_wrong_epsilon_is_found(monkeypatch):
    right = layers.GroupNorm.__init__
    wrong = lambda norm, groups, channels, eps: right(norm, groups, channels, 1.1 * eps)  # noqa: E731
    monkeypatch.setattr(layers.GroupNorm, "__init__", wrong)
    assert failed("group norm", "scale 0.001") == {"float32", "float16", "bfloat16"}


def test_a_scale_in_half_precision_is_found(monkeypatch):
    def scaled(x: mx.array, mean: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
        return x * scale.astype(x.dtype) + (shift - mean * scale).astype(x.dtype)

    monkeypatch.setattr(layers.GroupNorm.normalize, "__defaults__", (scaled,))
    assert failed("group norm", "mean 100") == {"float16", "bfloat16"}


def test_a_transposed_weight_is_found(monkeypatch):
    right = layers.conv2d
    monkeypatch.setattr(layers, "conv2d", lambda x, weight, *rest: right(x, weight.swapaxes(1, 2), *rest))
    assert failed("convolution", "to 4") == {"float32", "float16", "bfloat16"}


def test_rows_that_depend_on_the_batch_are_found(monkeypatch):
    right = layers.GroupNorm._mean
    wrong = lambda norm, x: mx.zeros_like(right(norm, x)) + right(norm, x).mean(axis=0)  # noqa: E731
    monkeypatch.setattr(layers.GroupNorm, "_mean", wrong)
    assert failed("small", "SDXL", "batch") == {"float32", "float16"}


def test_slices_that_do_not_fit_together_are_found(monkeypatch):
    wrong = lambda slices, height: (mx.pad(x, [(0, 0), (1, 1), (0, 0), (0, 0)]) for x in slices)  # noqa: E731
    monkeypatch.setattr(tiling, "_windows", wrong)
    assert failed("small", "slices") == {"float32", "float16"}


@pytest.fixture
def narrow(monkeypatch):
    """A narrow UNet, whose memory is planned as SD 1.5's: by its widths."""
    part, config = check._NETWORKS["UNet of SD 1.5"]
    widths = {"block_out_channels": [32, 64, 128, 128], "cross_attention_dim": 64, "attention_head_dim": 2}
    monkeypatch.setitem(check._NETWORKS, "UNet of SD 1.5", (part, config | widths))
    check._random_network.cache_clear()
    yield "UNet of SD 1.5"
    check._random_network.cache_clear()


@pytest.mark.parametrize("factor, passes", [(1, True), (0.6, False), (2.5, False)])
def test_a_wrong_memory_constant_is_found(monkeypatch, narrow, factor, passes):
    right = memory.step_bytes
    monkeypatch.setattr(memory, "step_bytes", lambda *args: factor * right(*args))
    assert failed("memory of a step") == (set() if passes else {"float32"})


@pytest.mark.parametrize("limit", [0, None])
def test_memory_is_measured_as_on_a_gpu(gpu, narrow, limit):
    before = mx.get_memory_limit()
    assert check._step_memory(narrow, mx.float16, side=16, rows=2, limit=limit) > 0
    assert mx.get_memory_limit() == before


def test_an_exception_is_a_result():
    def breaks() -> float:
        raise RuntimeError("[METAL] the GPU\nstopped")

    result = measure(Check("a", mx.float32, breaks))
    assert not result.passed and result.error == "RuntimeError: [METAL] the GPU stopped"
    assert not measure(Check("b", mx.float32, lambda: float("nan"))).passed


def test_the_findings_are_said_in_words(gpu, monkeypatch):
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    monkeypatch.setenv("MLX_CONV_WINOGRAD_WORKING_SET", "1")
    info = {"device_name": "Apple M5", "memory_size": 16e9, "max_recommended_working_set_size": 11.5e9}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    text = "\n".join(findings(10.4e9))
    for words in ("MLX 0.", "Apple M5", "memory 16.0 GB, recommended 11.5 GB, memory limit of a run: 10.4 GB"):
        assert words in text
    assert (
        "TF32 is on: from the M5 on, float32 products keep 11 bits" in text and "Winograd convolutions are off" in text
    )

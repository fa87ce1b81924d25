"""Weights that one thread opens can be read by another, once, and building a module leaves MLX's random state alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from configs import UNETS
from stable_diffusion.weights.files import Component, read_tensors
from stable_diffusion.weights.load import build, load_component, loading_stream, read_weights
from stable_diffusion.weights.quantize import quantize
from weights.test_load import write


def in_a_thread(function, *args):
    """The result of a call in another thread, which ends as threads that used MLX have to."""
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(function, *args).result(timeout=60)
        finally:
            pool.submit(mx.synchronize)
            pool.submit(mx.clear_streams).result(timeout=60)


@pytest.fixture(scope="module")
def component(tmp_path_factory) -> Component:
    return write(tmp_path_factory.mktemp("threads"), "unet", UNETS["sd1"])


def values(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(module.parameters())}


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_opened_in_one_thread_and_read_in_another(component):
    expected = values(load_component(component, mx.float16))
    assert same(in_a_thread(values, load_component(component, mx.float16)), expected)
    assert same(values(in_a_thread(load_component, component, mx.float16)), expected)
    here, there = load_component(component, mx.float16), in_a_thread(load_component, component, mx.float16)
    in_a_thread(read_weights, here)
    read_weights(there)
    assert same(values(here), expected) and same(values(there), expected)


def test_quantized_in_another_thread(component):
    def quantized(module: nn.Module) -> nn.Module:
        read_weights(quantize(module, 8, 32))  # in the thread that quantizes
        return module

    expected = values(quantized(load_component(component)))
    assert same(values(in_a_thread(quantized, load_component(component))), expected)


def test_pickles_are_read_in_another_thread(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.arange(4, dtype=torch.float64)}
    torch.save(tensors, tmp_path / "x.ckpt")
    ours = read_tensors(Component("file", {}, (tmp_path / "x.ckpt",)))
    read = in_a_thread(lambda: {name: np.array(value) for name, value in ours.items()})
    assert same(read, {name: value.numpy() for name, value in tensors.items()})


def test_many_threads_read_one_module(component):
    expected = values(load_component(component, mx.float16))
    for _ in range(5):
        module, barrier = load_component(component, mx.float16), threading.Barrier(4)

        def read(module=module, barrier=barrier):
            barrier.wait(timeout=60)
            read_weights(module)
            return values(module)

        with ThreadPoolExecutor(4) as pool:
            results = [pool.submit(in_a_thread, read) for _ in range(4)]
            assert all(same(result.result(timeout=60), expected) for result in results)


def test_one_stream_for_a_device():
    assert loading_stream(mx.cpu) == in_a_thread(loading_stream, mx.cpu)


@pytest.mark.parametrize("make", [lambda c: build(c.name, c.config), load_component], ids=["build", "load_component"])
def test_the_random_state_stays(component, make):
    mx.random.seed(2**63 + 12345)
    expected = mx.random.uniform(shape=(3,)).tolist(), mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(2**63 + 12345)
    before = mx.random.uniform(shape=(3,)).tolist()
    make(component)
    assert (before, mx.random.uniform(shape=(3,)).tolist()) == expected
    with pytest.raises(ValueError, match="config"):
        make(Component("unet", UNETS["xl"] | {"block_out_channels": "wide"}, (Path("none"),)))

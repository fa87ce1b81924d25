"""Random generators of other programs: to the bit against torch on the CPU, and against published values for CUDA."""

import math
import time

import numpy as np
import pytest
import torch

from stable_diffusion.diffusion.generators import CudaGenerator, TorchGenerator, philox


def on_cpu(seed: int, *shapes: tuple[int, ...]) -> None:
    """One generator and torch's, drawn from in turn, must agree to the bit."""
    ours, theirs = TorchGenerator(seed), torch.Generator().manual_seed(seed)
    for shape in shapes:
        want = torch.randn(shape, generator=theirs).numpy()
        assert np.array_equal(ours.normal(want.size).reshape(shape), want), shape


# torch has other functions for processors without AVX2.
BUILD = torch.backends.cpu.get_cpu_capability()
x86 = pytest.mark.skipif(BUILD not in ("AVX2", "AVX512"), reason=f"torch for {BUILD} rounds otherwise")
SHAPES = [(4, 4, 128, 128), (1, 4, 64, 96), (1, 4, 9, 13), (16,), (17,), (31,), (32,), (15,), (1,), (7, 2)]


@x86
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32 + 5, 2**63 - 1])
def test_draws_of_the_cpu(seed):
    for shape in SHAPES:
        on_cpu(seed, shape)


@x86
def test_draws_follow_each_other_whatever_their_sizes():
    """An odd number of doubles leaves one for the next small draw, also over a large one."""
    on_cpu(3, (3,), (40,), (5,), (1,), (1, 4, 8, 12), (15,), (15,), (16,), (1,), (1, 4, 128, 128), (2,))
    on_cpu(4, *[(1, 4, 8, 8)] * 200)  # longer than the twister's state


def test_draws_of_the_cpu_for_other_processors():
    want = torch.randn(1024, generator=torch.Generator().manual_seed(9)).numpy()
    assert np.abs(TorchGenerator(9).normal(1024) - want).max() <= 3e-6


# The known answers of the authors' library, Random123 (kat_vectors, philox4x32 10): counter, key, result.
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("counter, key, want", ANSWERS)
def test_philox(counter, key, want):
    assert [int(word) for word in philox(np.array(counter, dtype=np.uint64), key)] == list(want)


def test_draws_of_cuda():
    """``torch.randn(3, 4, device="cuda")`` after ``torch.manual_seed(0)``, as A1111's rng_philox publishes it."""
    want = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564, -0.62285122, -0.32838709]
    want += [-1.07454231, -0.36314407, -1.67105067, 2.26550497]
    assert np.abs(CudaGenerator(0).normal(12) - want).max() <= 3e-7


def test_rare_draws_of_cuda():
    """The smallest and the largest words, as cuRAND makes them into normal values (curand_normal.h, curand_box_muller).

    There u = x 2^-32 + 2^-33 and v = y 2^-31 pi + 2^-32 pi, in (0, 1) and (0, 2 pi), and the value is
    sqrt(-2 log u) sin v. The words x and y are those of Philox, which has a test by its published answers. Of 2^22
    values some have words within 2^10 of the ends, where half a word changes a value by 1e-5 and more.
    """
    count = 1 << 22
    words = philox([np.zeros(count, np.uint64)] * 2 + [np.arange(count, dtype=np.uint64), np.uint64(0)], (3, 0))
    got, extreme = CudaGenerator(3).normal(count), []
    for word in (words[0], words[1]):
        order = np.argsort(word)
        extreme += [*order[:20], *order[-20:]]
    for i in extreme:
        u, v = (int(word[i]) * 2.0**-32 + 2.0**-33 for word in words[:2])
        assert got[i] == pytest.approx(math.sqrt(-2 * math.log(u)) * math.sin(2 * math.pi * v), rel=3e-7), i


def test_draws_of_cuda_follow_each_other():
    """Each call is the next count; a value does not depend on how many are drawn, and a seed has 64 bits."""
    generator, small = CudaGenerator(5), CudaGenerator(5)
    draws = [generator.normal(4096) for _ in range(3)]
    assert all(np.array_equal(small.normal(7), draw[:7]) for draw in draws)
    u, v, *_ = philox(np.array([1, 0, 6, 0], dtype=np.uint64), (5, 0))  # of the second call the seventh value
    want = math.sqrt(-2 * math.log((int(u) + 0.5) / 2**32)) * math.sin(2 * math.pi * (int(v) + 0.5) / 2**32)
    assert draws[1][6] == np.float32(want)
    assert abs(np.corrcoef(draws)[np.triu_indices(3, 1)]).max() < 0.05
    assert not np.array_equal(CudaGenerator(5 + 2**32).normal(16), draws[0][:16])
    assert abs(np.std(draws) - 1) < 0.02


@pytest.mark.parametrize("kind", [TorchGenerator, CudaGenerator])
def test_draws_are_fast(kind):
    start = time.process_time()
    assert kind(1).normal(4 * 4 * 128 * 128).dtype == np.float32
    assert time.process_time() - start < 1

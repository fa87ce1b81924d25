"""Brownian motion against torchsde's, and the noise of samplers that is drawn from it."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchsde

from stable_diffusion import Options
from stable_diffusion.diffusion.brownian import BrownianMotion
from stable_diffusion.diffusion.generators import CudaGenerator, TorchGenerator

pytestmark = pytest.mark.filterwarnings("ignore:Should have t")  # of torchsde, for times beyond its rounded ends
SHAPE = (4, 8, 6)
COUNT = math.prod(SHAPE)
SPAN = tuple(map(float, np.float32([0.0291671, 14.614642])))


def torch_tree(seed: int, span: tuple[float, float] = SPAN) -> torchsde.BrownianTree:
    """The tree of k-diffusion, A1111's web UI, ComfyUI and diffusers."""
    return torchsde.BrownianTree(t0=span[0], t1=span[1], w0=torch.zeros(SHAPE), entropy=seed, tol=1e-6, pool_size=24)


def intervals(random: np.random.Generator) -> list[tuple[float, float]]:
    """Long, short and neighbouring intervals, and all of it."""
    times = np.sort(random.uniform(*SPAN, 12))
    long = [sorted(random.uniform(*SPAN, 2)) for _ in range(8)]
    short = [(time, time + length) for time in times[:-1] for length in (0.01, 2.5e-5, 5e-6)]
    return [tuple(map(float, np.float32(ends))) for ends in (*long, *short, *pairwise(times), SPAN)]


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 8, 2**63 - 1])
def test_increments_are_those_of_torchsde(seed):
    """To the rounding of its float32, in which an increment is the rest of a larger one."""
    tree, motion = torch_tree(seed), BrownianMotion(TorchGenerator, seed, SPAN)
    for start, end in intervals(np.random.default_rng(seed)):
        want = tree(start, end).numpy().reshape(-1)
        assert np.abs(motion.increment(start, end, COUNT) - want).max() <= 4e-6, (start, end)
        assert np.array_equal(motion.increment(end, start, COUNT), -motion.increment(start, end, COUNT))


def test_increments_from_the_generator_of_a_gpu(monkeypatch):
    """A1111's web UI replaces torchsde's normal numbers by those that it is set to."""

    def randn(size, dtype, device, seed):
        return torch.from_numpy(CudaGenerator(int(seed)).normal(math.prod(size)).reshape(size))

    monkeypatch.setattr("torchsde._brownian.brownian_interval._randn", randn)
    tree, motion = torch_tree(3), BrownianMotion(CudaGenerator, 3, SPAN)
    for start, end in intervals(np.random.default_rng(0))[:12]:
        assert np.abs(motion.increment(start, end, COUNT) - tree(start, end).numpy().reshape(-1)).max() <= 4e-6


def test_increments_have_the_variance_of_their_length():
    motion = BrownianMotion(TorchGenerator, 1, SPAN)
    for start, end in ((0.03, 0.04), (0.5, 3.0), (7.0, 14.6)):
        assert abs(np.std(motion.increment(start, end, 40_000)) / math.sqrt(end - start) - 1) < 0.02
    first, second = motion.increment(0.5, 3.0, 40_000), motion.increment(3.0, 9.0, 40_000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


SAMPLERS = ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"]


@pytest.mark.parametrize("source", ["torch", "cuda"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_of_a_step(sd, sampler, source):
    """It is the increment per root of the length, from the higher level to the lower one; ENSD is not for it.

    A step of dpmpp_sde has two halves, which meet in the geometric mean of its levels. diffusers' dpmpp_2m_sde draws
    from the image's generator.
    """
    options = Options(sampler=sampler, noise_source=source, eta_noise_seed_delta=31337)
    run = sd._plan(options, 5, (7, 2), 2, strength=0.6)
    levels = [float(sigma) for sigma in run.steps.sigmas]
    if sampler == "dpmpp_sde":
        levels = [one for pair in pairwise(levels) for one in (pair[0], math.sqrt(pair[0] * pair[1]))]
    whole = sd._plan(options, 5, 0).steps.sigmas
    generator = {"torch": TorchGenerator, "cuda": CudaGenerator}[source]
    motions = [BrownianMotion(generator, seed, (whole[-2], whole[0])) for seed in (7, 2)]
    for number, (high, low) in enumerate(pairwise(levels[: 2 if len(levels) < 5 else 4])):
        got = np.array(run.step_noise(number, (2, 8, 6, 4))).transpose(0, 3, 1, 2).reshape(2, -1)
        want = [motion.increment(high, low, COUNT) / math.sqrt(high - low) for motion in motions]
        assert (np.abs(got - want).max() <= 5e-3) == ((sampler, source) != ("dpmpp_2m_sde", "torch"))

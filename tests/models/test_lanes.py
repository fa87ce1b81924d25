"""Shares of a step's questions side by side, as on a CPU of two cores, whatever this one has."""

import threading

import mlx.core as mx
import numpy as np
import pytest

from models.test_controlnet import CONTROLNETS
from oracle import normal, relative_error
from stable_diffusion import StableDiffusion, StableDiffusionXL
from stable_diffusion.diffusion import sample as sampling
from stable_diffusion.diffusion.controls import Control
from stable_diffusion.models import lanes
from stable_diffusion.models.lanes import Lanes
from stable_diffusion.weights.load import build

PROMPT = "the red cat"
SMALL = {"num_steps": 3, "latent_size": (6, 8), "seed": 7}


@pytest.fixture(scope="module")
def sd(sd1_folder) -> StableDiffusion:
    return StableDiffusion(sd1_folder)


@pytest.fixture(scope="module")
def xl(xl_folder) -> StableDiffusionXL:
    return StableDiffusionXL(xl_folder)


@pytest.fixture
def threads(monkeypatch) -> list[int]:
    """What products are given, one after the other."""
    given: list[int] = []
    monkeypatch.setattr(lanes.blas, "set_threads", given.append)
    return given


@pytest.fixture
def two_cores(monkeypatch, threads) -> list[int]:
    monkeypatch.setattr(sampling, "Lanes", lambda: Lanes(2))
    return threads


@pytest.fixture
def asked(sd, monkeypatch) -> list[tuple[int, str]]:
    """The rows of each question to the UNet, and the stream of its graph."""
    found: list[tuple[int, str]] = []
    unet = sd.unet

    def watched(x, *args, **told):
        found.append((len(x), str(mx.default_stream(mx.cpu))))
        return unet(x, *args, **told)

    monkeypatch.setattr(sd, "unet", watched)
    return found


def last(latents) -> np.ndarray:
    return np.array(list(latents)[-1])


@pytest.mark.parametrize(
    "which, options",
    [
        ("sd", {}),
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
        hint = mx.array(np.abs(normal(48, 64, 3)).clip(0, 1))
        options["controls"] = [Control(build("controlnet", CONTROLNETS["sd1"]), hint, guess=True)]
    together = last(pipeline.generate_latents(PROMPT, **SMALL, **options))
    request.getfixturevalue("two_cores")
    aside = last(pipeline.generate_latents(PROMPT, **SMALL, **options))
    assert relative_error(aside, together) <= 1e-5


def test_each_share_has_its_stream_and_products_one_core(sd, two_cores, asked):
    last(sd.generate_latents(PROMPT, n_images=2, **SMALL))
    first, second = asked[:2]
    assert [rows for rows, _ in asked] == [2] * 6 and asked == [first, second] * 3
    assert first[1] == str(mx.default_stream(mx.cpu)) != second[1]
    assert two_cores == [1] * 6 + [2]


@pytest.mark.parametrize("limit, options, rows", [(None, {"cfg_weight": 1.0}, 1), (0, {}, 2)])
def test_one_question_and_low_memory_have_all_cores(sd, two_cores, asked, limit, options, rows):
    if limit is not None:
        mx.set_memory_limit(limit)
    last(sd.generate_latents(PROMPT, **SMALL, **options))
    assert asked == [(rows, str(mx.default_stream(mx.cpu)))] * 3
    assert set(two_cores) == {2}


def test_rows_one_by_one_stay_so(sd, two_cores, asked, monkeypatch):
    monkeypatch.setattr(sd, "rows_at_once", 1)
    last(sd.generate_latents(PROMPT, **SMALL))
    assert asked == [(1, str(mx.default_stream(mx.cpu)))] * 6 and not two_cores


def test_products_get_their_cores_back(sd, two_cores):
    latents = sd.generate_latents(PROMPT, **SMALL)
    mx.eval(next(latents))
    assert two_cores[-1] == 1
    del latents
    assert two_cores[-1] == 2


def test_a_run_in_another_thread(sd, two_cores):
    found = []
    here = last(sd.generate_latents(PROMPT, **SMALL))
    thread = threading.Thread(target=lambda: found.append(last(sd.generate_latents(PROMPT, **SMALL))))
    thread.start()
    thread.join()
    assert relative_error(found[0], here) <= 1e-6


def test_without_cores_to_share_nothing_is_touched(sd, threads, asked, monkeypatch):
    monkeypatch.setattr(sampling, "Lanes", lambda: lanes.ONE)
    last(sd.generate_latents(PROMPT, **SMALL))
    assert [rows for rows, _ in asked] == [2] * 3 and not threads

"""Objects made in one thread and used in another, generators iterated elsewhere, and programs that end with 0."""

import asyncio
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from command_line import ROOT
from oracle import normal, relative_error
from stable_diffusion import Control, StableDiffusion

RUN = {"num_steps": 2, "latent_size": (6, 8), "seed": 3, "cfg_weight": 3.0}
PROMPT = "the red cat"


def elsewhere(function: Callable[[], Any]) -> Any:
    """Return the result of a function, called in a new thread."""
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def last(latents) -> np.ndarray:
    for x_t in latents:
        mx.eval(x_t)
    return np.array(x_t)


def drawn(sd: StableDiffusion, **run) -> np.ndarray:
    return np.array(sd.decode(mx.array(last(sd.generate_latents(PROMPT, **RUN | run)))))


OPTIONS = [{}, {"low_memory": True}, {"unet_bits": 8, "text_bits": 4}, {"low_memory": True, "unet_bits": 8}]


@pytest.fixture(params=OPTIONS, ids=str)
def options(request) -> dict:
    return request.param


def test_made_here_and_used_in_a_worker(xl_folder, options):
    want = drawn(StableDiffusion(xl_folder, **options))
    sd = StableDiffusion(xl_folder, **options)
    assert np.array_equal(elsewhere(lambda: drawn(sd)), want)
    assert np.array_equal(drawn(sd), want)


def test_made_in_a_worker_and_used_here(xl_folder, options):
    want = drawn(StableDiffusion(xl_folder, **options))
    sd = elsewhere(lambda: StableDiffusion(xl_folder, **options))
    assert np.array_equal(drawn(sd), want)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_generator_made_here_and_iterated_there(sd1_folder, options, prepared):
    sd = StableDiffusion(sd1_folder, **options)
    want = last(sd.generate_latents(PROMPT, **RUN))
    latents = sd.generate_latents(PROMPT, **RUN)
    if prepared:
        latents.prepare()
    assert np.array_equal(elsewhere(lambda: last(latents)), want)


def test_a_generator_that_changes_threads_on_its_way(sd1_folder):
    sd = StableDiffusion(sd1_folder)
    run = RUN | {"num_steps": 5, "sampler": "dpmpp_2m"}
    want = last(sd.generate_latents(PROMPT, **run))
    latents = sd.generate_latents(PROMPT, **run)

    def step() -> np.ndarray:
        x_t = next(latents)
        mx.eval(x_t)
        return np.array(x_t)

    *_, x = [step() if i % 2 else elsewhere(step) for i in range(5)]
    assert np.array_equal(x, want)


@pytest.mark.parametrize("low_memory", [False, True])
def test_two_workers_on_one_object(sd1_folder, low_memory):
    sd = StableDiffusion(sd1_folder, low_memory=low_memory)
    want = [drawn(StableDiffusion(sd1_folder, low_memory=low_memory), seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(2) as pool:
        images = list(pool.map(lambda seed: drawn(sd, seed=seed), range(4)))
    assert all(np.array_equal(a, b) for a, b in zip(images, want, strict=True))


def test_to_thread(sd1_folder):
    sd = StableDiffusion(sd1_folder)
    want = drawn(sd)

    async def both() -> list[np.ndarray]:
        return await asyncio.gather(*(asyncio.to_thread(drawn, sd) for _ in range(2)))

    assert all(np.array_equal(image, want) for image in asyncio.run(both()))


def test_a_lora_a_controlnet_and_a_prompt_from_elsewhere(sd1_folder, tmp_path):
    from test_parity_images import control_nets

    control_nets("sd1", 1)[0][0].save_pretrained(tmp_path / "net")
    image = mx.array(np.random.default_rng(0).uniform(size=(48, 64, 3)).astype(np.float32))
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = StableDiffusion(sd1_folder).unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.shape[0]
    factors = {"lora_A": normal(4, width, seed=0), "lora_B": normal(width, 4, seed=1)}
    tensors = {f"unet.{layer}.{name}.weight": mx.array(value) for name, value in factors.items()}
    mx.save_safetensors(str(tmp_path / "lora.safetensors"), tensors)

    def load(sd: StableDiffusion) -> tuple:
        sd.load_lora(tmp_path / "lora.safetensors", 0.7)
        return sd.load_controlnet(tmp_path / "net"), sd.encode_prompts(PROMPT, "blue")

    def run(sd: StableDiffusion, network, prompts) -> np.ndarray:
        return last(
            sd.generate_latents(*prompts[:1], negative_text=prompts[1], controls=[Control(network, image)], **RUN)
        )

    here = StableDiffusion(sd1_folder)
    want = run(here, *load(here))
    for low_memory in (False, True):
        sd = StableDiffusion(sd1_folder, low_memory=low_memory)
        assert relative_error(run(sd, *elsewhere(lambda sd=sd: load(sd))), want) <= 1e-5
    sd = StableDiffusion(sd1_folder)
    loaded = load(sd)
    assert np.array_equal(elsewhere(lambda: run(sd, *loaded)), want)


def test_looking_for_a_network_reads_nothing(xl_folder):
    sd = StableDiffusion(xl_folder, low_memory=True)
    before = mx.get_active_memory()
    assert hasattr(sd, "unet") and sd.unet.config.in_channels == 4
    assert mx.get_active_memory() - before < 2**16


PROGRAM = """
import asyncio, sys, threading
from concurrent.futures import ThreadPoolExecutor
import mlx.core as mx
from stable_diffusion import StableDiffusion
from stable_diffusion.models import cpu
{setup}
def draw(seed=1):
    sd = StableDiffusion("tiny")
    *_, x = sd.generate_latents("a red circle", num_steps=2, seed=seed)
    return sd.decode(x).shape

{work}
"""
WORK = {
    "thread": "t = threading.Thread(target=draw); t.start(); t.join()",
    "pool": "pool = ThreadPoolExecutor(2); list(pool.map(draw, range(4)))",
    "pool that ends": "with ThreadPoolExecutor(2) as pool: list(pool.map(draw, range(4)))",
    "asyncio": "async def main(): await asyncio.to_thread(draw)\nasyncio.run(main())",
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("setup", ["", "cpu.tune()"], ids=["as it is", "tuned"])
def test_programs_with_workers_end_with_0(work, setup):
    program = PROGRAM.format(setup=setup, work=textwrap.dedent(WORK[work]))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")

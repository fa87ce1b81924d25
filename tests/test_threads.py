"""Objects made in one thread and used in another, generators iterated elsewhere, and programs that end with 0."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from command_line import ROOT
from oracle import last, normal, relative_error
from stable_diffusion import Control, StableDiffusion

RUN = {"num_steps": 2, "latent_size": (6, 8), "seed": 3, "cfg_weight": 3.0}
PROMPT = "the red cat"
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def elsewhere(function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a function, called in a new thread that then ends."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def drawn(sd: StableDiffusion, **run) -> np.ndarray:
    return np.array(sd.decode(mx.array(last(sd.generate_latents(PROMPT, **RUN | run)))))


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> str:
    """A file of a LoRA for a layer that all checkpoints here have."""
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    factors = {"lora_A": mx.array(normal(4, 64, seed=0)), "lora_B": mx.array(normal(64, 4, seed=1))}
    mx.save_safetensors(str(path), {f"unet.{LAYER}.{name}.weight": value for name, value in factors.items()})
    return str(path)


@pytest.fixture(params=["plain", "low memory", "quantized", "lora"])
def options(request, lora) -> dict:
    settings = {"low memory": {"low_memory": True}, "quantized": {"unet_bits": 8, "text_bits": 4}}
    return (settings | {"plain": {}, "lora": {"loras": [(lora, 0.7)]}})[request.param]


def test_made_in_one_thread_and_used_in_another(xl_folder, options):
    want = drawn(StableDiffusion(xl_folder, **options))
    sd = StableDiffusion(xl_folder, **options)
    assert np.array_equal(elsewhere(drawn, sd), want)
    assert np.array_equal(drawn(sd), want)
    assert np.array_equal(drawn(elsewhere(lambda: StableDiffusion(xl_folder, **options))), want)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_generator_made_here_and_iterated_there(sd1_folder, options, prepared):
    sd = StableDiffusion(sd1_folder, **options)
    want = last(sd.generate_latents(PROMPT, **RUN))
    latents = sd.generate_latents(PROMPT, **RUN)
    if prepared:
        latents.prepare()
    assert np.array_equal(elsewhere(last, latents), want)


@pytest.mark.parametrize("low_memory", [False, True])
def test_generators_that_are_interleaved_and_change_threads(sd1_folder, low_memory):
    sd = StableDiffusion(sd1_folder, low_memory=low_memory)
    runs = [RUN | {"num_steps": 4, "sampler": "dpmpp_2m", "seed": seed} for seed in range(2)]
    want = [last(sd.generate_latents(PROMPT, **run)) for run in runs]

    def step(latents) -> np.ndarray:
        return np.array(next(latents))

    generators = [sd.generate_latents(PROMPT, **run) for run in runs]
    *_, found = [[step(g) if (i + n) % 2 else elsewhere(step, g) for n, g in enumerate(generators)] for i in range(4)]
    assert np.array_equal(found, want)


@pytest.mark.parametrize("low_memory", [False, True])
def test_two_workers_on_one_object(sd1_folder, low_memory):
    sd = StableDiffusion(sd1_folder, low_memory=low_memory)
    want = [drawn(StableDiffusion(sd1_folder, low_memory=low_memory), seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(2) as pool:
        images = list(pool.map(lambda seed: drawn(sd, seed=seed), range(4)))

    async def both() -> list[np.ndarray]:
        return await asyncio.gather(*(asyncio.to_thread(drawn, sd, seed=seed) for seed in range(2)))

    images += asyncio.run(both())
    assert all(np.array_equal(a, b) for a, b in zip(images, want + want[:2], strict=True))


def test_a_lora_a_controlnet_a_word_and_a_prompt_from_elsewhere(sd1_folder, lora, tmp_path):
    from test_parity_images import control_nets

    control_nets("sd1", 1)[0][0].save_pretrained(tmp_path / "net")
    image = mx.array(np.random.default_rng(0).uniform(size=(48, 64, 3)).astype(np.float32))
    mx.save_safetensors(str(tmp_path / "word.safetensors"), {"emb_params": mx.array(normal(2, 32))})

    def load(sd: StableDiffusion) -> tuple:
        sd.load_lora(lora, 0.7)
        loaded = sd.load_controlnet(tmp_path / "net"), *sd.encode_prompts(PROMPT, "blue")
        sd.load_embedding(tmp_path / "word.safetensors")  # last: nothing computes it in this thread
        return loaded

    def run(sd: StableDiffusion, network, positive, negative) -> np.ndarray:
        assert np.array_equal(sd.encode_prompts("a word", "blue")[1].context, negative.context)
        controls = [Control(network, image)]
        return last(sd.generate_latents(positive, negative_text=negative, controls=controls, **RUN))

    here = StableDiffusion(sd1_folder)
    want = run(here, *load(here))
    for low_memory in (False, True):
        sd = StableDiffusion(sd1_folder, low_memory=low_memory)
        assert relative_error(run(sd, *elsewhere(load, sd)), want) <= 1e-5
    sd = StableDiffusion(sd1_folder)
    assert np.array_equal(elsewhere(run, sd, *load(sd)), want)


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
    "asyncio": "async def main(): await asyncio.to_thread(draw)\nasyncio.run(main())",
}


@pytest.mark.parametrize("work, setup", [*((work, "") for work in WORK), ("pool", "cpu.tune()")])
def test_programs_with_workers_end_with_0(work, setup):
    program = PROGRAM.format(setup=setup, work=WORK[work])
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")

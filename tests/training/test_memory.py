"""Gradients that are computed with little memory are those that are computed with much."""

from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from benchmarks import training
from benchmarks.shapes import UNETS
from checkpoints import SCALED, make
from oracle import normal, relative_error
from stable_diffusion import StableDiffusion
from stable_diffusion.app.memory import training_bytes
from stable_diffusion.models import layers
from stable_diffusion.training.settings import TrainingSettings
from stable_diffusion.training.trainer import LoRATrainer

from .test_step import CAPTIONS, FAMILIES, Data, batch, randomized


@pytest.fixture(scope="module", params=["sd1", "xl"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    make(folder, request.param, diffusers.DDIMScheduler(**SCALED | FAMILIES[request.param], clip_sample=False))
    return folder


def trainer_of(folder, model=None, **settings) -> LoRATrainer:
    sd = StableDiffusion(folder, **model or {})
    data = Data(batch(sd, CAPTIONS, encoded=not settings.get("text_encoder_rank")))
    trainer = LoRATrainer(sd, data, TrainingSettings(rank=2, **settings))
    randomized(trainer)
    return trainer


@pytest.mark.parametrize("scores", [2**26, 4 * 50 * 77], ids=["at once", "in parts"])
@pytest.mark.parametrize("device", [mx.cpu, mx.gpu], ids=["cpu", "gpu"])
def test_gradients_of_attention_equal_torchs(device, scores, monkeypatch):
    monkeypatch.setattr(layers, "_SCORES", scores)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    q, k, v, weights = (normal(2, 3, n, 40, seed=n + i) for i, n in enumerate((50, 77, 77, 50)))
    ours = mx.grad(lambda q, k, v: (layers.attention(q, k, v) * mx.array(weights)).sum(), (0, 1, 2))
    theirs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    (torch.nn.functional.scaled_dot_product_attention(*theirs) * torch.from_numpy(weights)).sum().backward()
    for gradient, x in zip(ours(*map(mx.array, (q, k, v))), theirs, strict=True):
        assert relative_error(gradient, x.grad.numpy()) <= 1e-5


CASES = {
    "plain": ({}, {}, 1e-6),
    "all layers": ({}, {"targets": "all", "conv_rank": 2}, 1e-6),
    "dora": ({}, {"dora": True}, 1e-6),
    "text encoders": ({}, {"text_encoder_rank": 2}, 1e-6),
    "quantized": ({"unet_bits": 8, "text_bits": 4}, {}, 1e-6),
    "bfloat16": ({"dtype": mx.bfloat16}, {}, 1e-2),
}


# XL has one more encoder and more blocks in a transformer; its layers are those of the others.
ROWS = [("sd1", case) for case in CASES] + [("xl", "plain"), ("xl", "text encoders")]


@pytest.mark.parametrize("folder, case", ROWS, indirect=["folder"])
def test_checkpointing_changes_no_gradient(folder, case):
    model, settings, tolerance = CASES[case]
    trainer = trainer_of(folder, model, **settings)
    trainer.recompute(False)
    loss, gradients, _ = trainer._gradients()
    trainer.recompute(True)
    again, others, _ = trainer._gradients()
    assert again == pytest.approx(loss, rel=tolerance)
    wanted, found = dict(tree_flatten(gradients)), dict(tree_flatten(others))
    largest = max(mx.abs(gradient).max().item() for gradient in wanted.values())
    assert found.keys() == wanted.keys() and largest > 0
    for name, gradient in wanted.items():
        assert found[name].dtype == mx.float32, name
        assert np.abs(np.array(found[name]) - np.array(gradient)).max() <= tolerance * largest, name


def test_a_model_that_is_trained_still_draws_with_every_option(folder):
    trainer = trainer_of(folder, checkpointing="on")
    options = {"num_steps": 2, "cfg_weight": 3.0, "seed": 1, "latent_size": (8, 8), "token_merging": 0.5}

    def picture() -> np.ndarray:
        for x_t in trainer.sd.generate_latents("a (red:-1) cat", pag_scale=2.0, **options):
            mx.eval(x_t)
        return np.array(x_t)

    checkpointed = picture()
    trainer.recompute(False)
    assert np.array_equal(checkpointed, picture())


def test_networks_are_kept_as_long_as_their_trainer(folder, caplog):
    """Then they are freed, and come back with what was trained, until that is detached."""
    trainer = trainer_of(folder)
    sd, lora = trainer.sd, trainer.lora
    next(trainer)

    def output() -> np.ndarray:
        (latents,) = sd.generate_latents("a cat", num_steps=1, seed=1, latent_size=(8, 8))
        return np.array(latents)

    trained = output()
    sd.release()
    assert vars(sd)["unet"] is trainer.model["unet"]
    del trainer
    sd.release()
    assert "unet" not in vars(sd) and np.array_equal(output(), trained)
    lora.detach()
    sd.release()
    assert not np.array_equal(output(), trained) and not caplog.records


SMALL = {
    "sd15": UNETS["sd15"] | {"block_out_channels": [64, 128, 256, 256]},
    "sdxl-base": UNETS["sdxl-base"] | {"block_out_channels": [64, 128, 256], "attention_head_dim": [2, 4, 8]},
}


@pytest.mark.parametrize("shape, share", [("sd15", 0.85), ("sdxl-base", 0.6)])
def test_the_memory_of_a_step_is_predicted(shape, share, monkeypatch):
    """Within a half more or less; with checkpointing it is a ``share``, large where most is scores of attention."""
    monkeypatch.setitem(UNETS, shape, SMALL[shape])
    measured = {}
    for checkpointing in ("off", "on"):
        step = training.ours(shape, 128, 1, 4, checkpointing)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        step()
        measured[checkpointing] = mx.get_peak_memory() - before
        predicted = training_bytes(step.__self__.sd.unet, 1, (16, 16), checkpointing == "on")
        assert 1 / 1.5 <= measured[checkpointing] / predicted <= 1.5, checkpointing
    assert measured["on"] <= share * measured["off"]


def test_the_benchmark_measures_diffusers_too(monkeypatch):
    monkeypatch.setitem(UNETS, "sd15", SMALL["sd15"])
    for checkpointing in ("off", "on"):
        training.theirs("sd15", 64, 1, 4, checkpointing)()


def test_xl_can_be_trained_in_12_gb():
    lines = list(training.metal(16))
    assert "\n".join(lines) in (Path(__file__).parents[2] / "docs/figures/memory.md").read_text("utf-8")
    rows = [line.split(" | ") for line in lines]
    assert len(rows) == 6
    assert rows[-1][:2] == ["| SDXL, 1024 x 1024", "`-q`"] and float(rows[-1][3].split()[0]) <= 12

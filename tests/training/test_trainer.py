"""The parts of a training step against their published formulas, and the trainer as a library."""

from dataclasses import dataclass, replace

import diffusers
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from checkpoints import SCALED
from oracle import normal
from stable_diffusion import StableDiffusion, training
from stable_diffusion.models.layers import Group
from stable_diffusion.training import LoRATrainer, TrainingSettings
from stable_diffusion.training.loss import TrainingBatch, add_noise, loss_weight
from stable_diffusion.training.trainer import _OPTIMIZERS

SETTINGS = TrainingSettings(steps=5, batch_size=3, rank=2, learning_rate=1e-2, warmup=0.0)


def kohya_weights(alphas_cumprod: np.ndarray, gamma: float, is_v: bool) -> np.ndarray:
    """kohya's scripts, library/custom_train_functions.py: prepare_scheduler_for_custom_training, apply_snr_weight."""
    snr = (np.sqrt(alphas_cumprod) / np.sqrt(1.0 - alphas_cumprod)) ** 2
    return np.minimum(snr, gamma) / (snr + 1 if is_v else snr)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_kohyas(prediction, gamma):
    alphas = diffusers.DDPMScheduler(**SCALED).alphas_cumprod.double().numpy()
    ours = [loss_weight(alpha / (1 - alpha), gamma, prediction) for alpha in alphas]
    np.testing.assert_allclose(ours, kohya_weights(alphas, gamma, prediction == "v_prediction"), rtol=1e-6)


def test_min_snr_weights_at_zero_terminal_snr_are_finite():
    alphas = diffusers.DDPMScheduler(**SCALED, rescale_betas_zero_snr=True).alphas_cumprod.double().numpy()
    alphas[-1] = 0.0  # diffusers has 2^-24 there
    for prediction, last in (("epsilon", 1.0), ("v_prediction", 0.0)):
        ours = np.array([loss_weight(alpha / (1 - alpha), 5.0, prediction) for alpha in alphas])
        assert np.isfinite(ours).all() and ours[-1] == last and abs(ours[-2] - last) < 1e-2


RATES = [
    ({"warmup": 0.0}, {0: 1.0, 5: 1.0, 9: 1.0}),
    ({"warmup": 0.3}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 9: 1.0}),
    ({"warmup": 0.25}, {0: 1 / 3, 1: 2 / 3, 2: 1.0, 3: 1.0}),
    ({"warmup": 1.0}, {0: 1 / 11, 9: 10 / 11}),
    ({"warmup": 0.0, "lr_schedule": "cosine"}, {0: 1.0, 5: 0.5, 9: (1 + np.cos(0.9 * np.pi)) / 2}),
    ({"warmup": 0.2, "lr_schedule": "cosine"}, {0: 1 / 3, 1: 2 / 3, 2: 1.0, 6: 0.5}),
]


@pytest.mark.parametrize("values, expected", RATES)
def test_learning_rates(values, expected):
    settings = TrainingSettings(steps=10, learning_rate=1e-3, **values)
    assert {step: settings.rate(step) for step in expected} == pytest.approx(
        {step: 1e-3 * share for step, share in expected.items()}
    )


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_optimizers_decrease_a_convex_loss(name):
    model = Group(x=mx.array(normal(6, 4)))
    optimizer = _OPTIMIZERS[name](TrainingSettings(optimizer=name, learning_rate=0.02, weight_decay=0.0))
    losses = []
    for _ in range(50):
        losses.append(mx.square(model.x - 0.5).sum().item())
        optimizer.update(model, {"x": 2 * (model.x - 0.5)})
    assert losses[:11] == sorted(losses[:11], reverse=True)
    assert losses[-1] < 0.4 * losses[0]


def test_the_noise_of_a_picture():
    """It comes from the picture's seed alone, has deviation 1, and its offset is one number a channel."""
    mean, deviation = mx.array(normal(2, 32, 24, 4)), mx.full((2, 32, 24, 4), 0.5)
    batch = TrainingBatch(mean, deviation, ("", ""))
    plain, offset = (add_noise(batch, [7, 8], replace(SETTINGS, noise_offset=value), 1000) for value in (0.0, 0.1))
    alone = add_noise(batch.rows(slice(1, None)), [8], SETTINGS, 1000)
    assert mx.array_equal(alone.noise[0], plain.noise[1]) and mx.array_equal(alone.latents[0], plain.latents[1])
    assert alone.timesteps == plain.timesteps[1:]
    for sample in (plain.noise, (plain.latents - mean) / 0.5):
        assert abs(sample.mean().item()) < 0.05 and abs(mx.std(sample).item() - 1) < 0.05
    difference = np.array(offset.noise - plain.noise)
    assert np.ptp(difference, axis=(1, 2)).max() < 1e-6 and 0.02 < np.std(difference) < 0.3
    seeds = np.random.default_rng(0).integers(0, 2**63, 4000)
    small = TrainingBatch(mx.zeros((4000, 1, 1, 4)), mx.zeros((4000, 1, 1, 4)), ("",) * 4000)
    counts = np.histogram(add_noise(small, [int(seed) for seed in seeds], SETTINGS, 1000).timesteps, 10, (0, 1000))[0]
    assert counts.sum() == 4000 and abs(counts - 400).max() < 80


class Data:
    """Other latents for each gradient, in two parts as with prior pictures."""

    def __init__(self, sd: StableDiffusion):
        self.conditioning = sd.encode_prompt(["a red circle", "a blue star", ""])

    def batches(self, number: int) -> list[TrainingBatch]:
        mean, deviation = mx.array(normal(3, 4, 6, 4, seed=number)), mx.full((3, 4, 6, 4), 0.1)
        batch = TrainingBatch(mean, deviation, ("a", "b", ""), None, self.conditioning)
        return [batch, replace(batch.rows(slice(0, 2)), weight=0.5)]


def trainer_of(sd: StableDiffusion, **values) -> LoRATrainer:
    trainer = LoRATrainer(sd, Data(sd), replace(SETTINGS, **values))
    for i, delta in enumerate(trainer.lora.deltas):
        delta["up"] = mx.array(normal(*delta["up"].shape, seed=i, scale=0.1))
    return trainer


def flat(gradients) -> np.ndarray:
    return np.concatenate([np.array(gradient).ravel() for _, gradient in tree_flatten(gradients)])


def test_accumulated_gradients_are_their_mean():
    single, double = trainer_of(StableDiffusion("tiny")), trainer_of(StableDiffusion("tiny"), accumulate=2)
    losses, parts = [], []
    for single.step in (0, 1):
        loss, gradients, _ = single._gradients()
        losses.append(loss)
        parts.append(flat(gradients))
    loss, gradients, norm = double._gradients()
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert np.abs(flat(gradients) - np.mean(parts, axis=0)).max() <= 1e-6 * np.abs(parts).max()
    assert norm == pytest.approx(np.linalg.norm(flat(gradients)), rel=1e-5)


@dataclass
class Processes:
    """Stand for one of several processes."""

    number: int
    count: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


def test_several_processes_make_the_step_of_one(monkeypatch):
    trainer = trainer_of(StableDiffusion("tiny"))
    expected, gradients, _ = trainer._gradients()
    trainer.group = mx.distributed.init()
    alone, same, _ = trainer._gradients()
    assert alone == expected and np.array_equal(flat(same), flat(gradients))
    monkeypatch.setattr("mlx.nn.average_gradients", lambda tree, group: tree)
    for count in (2, 3, 7):  # of seven, two have no pictures
        results = []
        for number in range(count):
            trainer.group = Processes(number, count)
            results.append(trainer._gradients())
        assert np.mean([loss for loss, _, _ in results]) == pytest.approx(expected, rel=1e-5)
        mean = np.mean([flat(part) for _, part, _ in results], axis=0)
        assert np.abs(mean - flat(gradients)).max() <= 1e-5 * np.abs(flat(gradients)).max()


def test_other_loras_stay_and_detach_gives_the_model_back(tmp_path):
    sd = StableDiffusion("tiny")

    def draw() -> np.ndarray:
        return np.array(list(sd.generate_latents("a red circle", num_steps=2, seed=1))[-1])

    path = tmp_path / "other.safetensors"
    training.save_lora(trainer_of(StableDiffusion("tiny")), path)
    other = sd.load_lora(path)
    before, frozen = draw(), [np.array(delta["up"]) for delta in other.deltas]
    trainer = LoRATrainer(sd, Data(sd), SETTINGS)
    assert np.array_equal(draw(), before)
    steps = iter(trainer)
    assert trainer.step == 0 and next(steps).number == 1 and trainer.step == 1
    assert [step.number for step in steps] == [2, 3, 4, 5]
    assert all(np.array_equal(delta["up"], value) for delta, value in zip(other.deltas, frozen, strict=True))
    assert len(trainer.factors()) == 2 * len(trainer.lora.deltas)
    assert np.abs(draw() - before).max() > 1e-3
    trainer.lora.scale = 0.0
    assert np.array_equal(draw(), before)
    trainer.lora.detach()
    assert np.array_equal(draw(), before)

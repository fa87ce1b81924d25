"""A LoRA learns: the loss falls in a few steps, and the bundled one draws what it was trained to draw."""

from pathlib import Path

import numpy as np
import pytest

import stable_diffusion
from stable_diffusion import StableDiffusion
from stable_diffusion.images.folders import read_pictures
from stable_diffusion.training.dataset import Dataset
from stable_diffusion.training.loss import seed_of
from stable_diffusion.training.settings import TrainingSettings
from stable_diffusion.training.trainer import LoRATrainer
from stable_diffusion.weights.files import read_file
from tools.tiny import data, new_thing, score

LORA = Path(stable_diffusion.__file__).parent / "tiny" / "lora" / "arrow.safetensors"


def measured_losses(folder: Path, steps: int, every: int, **bits: int) -> list[float]:
    """Train with the pictures of a folder; return the loss at noise that is always the same, each ``every`` steps."""
    sd = StableDiffusion("tiny", **bits)
    settings = TrainingSettings(steps=steps, batch_size=4, rank=3, learning_rate=3e-3, caption_dropout=0)
    pictures, _ = read_pictures(folder, 64)
    data = Dataset(sd, pictures, settings)
    trainer = LoRATrainer(sd, data, settings)
    batches = [data.batch(data.sets[0], [(number, False)] * 4) for number in range(4)]

    def measured() -> float:
        """Mean loss of four pictures, each at four levels of noise."""
        losses = [
            trainer.loss(batch, [seed_of("fixed", n, draw) for draw in range(4)]) for n, batch in enumerate(batches)
        ]
        return float(np.mean([loss.item() for loss in losses]))

    found = [measured()]
    for step in trainer:
        assert not step.skipped
        if step.number % every == 0:
            found.append(measured())
    assert len(pictures) == 12 and trainer.step == steps
    return found


def test_the_loss_of_new_pictures_is_halved_in_40_steps_and_falls_as_fast_with_quantized_weights(tmp_path):
    """Quantized as by -q, 8 bits for the UNet and 4 for the text encoder: within 5 % (measured: 1 %)."""
    new_thing.write_pictures(tmp_path, new_thing.new_pictures())
    exact = measured_losses(tmp_path, steps=40, every=20)
    quantized = measured_losses(tmp_path, steps=20, every=20, unet_bits=8, text_bits=4)
    assert exact[-1] < 0.5 * exact[0]
    for one, other in zip(quantized, exact, strict=False):
        assert one != other and abs(one - other) < 0.05 * other


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion:
    return StableDiffusion("tiny")


def test_the_bundled_lora_draws_the_new_thing_for_its_word(tiny):
    """At least 90 % of 20 pictures each have shape, colours and place (measured over 40: 92.5, 100, 100)."""
    count = 20
    attached = tiny.load_lora(str(LORA))
    try:
        found = [
            new_thing.score_new(np.array(tiny.generate(caption, seed=seed, num_steps=10)[0]), scene)
            for seed, (caption, scene) in enumerate(new_thing.prompts(count))
        ]
        attached.scale = 0.0  # it is the LoRA that knows the word
        plain = [
            new_thing.score_new(np.array(tiny.generate(caption, seed=seed, num_steps=10)[0]), scene)
            for seed, (caption, scene) in enumerate(new_thing.prompts(4))
        ]
    finally:
        attached.detach()
    for name in ("colour", "background", "shape", "place"):
        right = [one[name] for one in found if name in one]
        assert len(right) >= count // 2 and np.mean(right) >= 0.9, (name, right)
    assert not any(one["shape"] for one in plain)


def test_the_bundled_lora_leaves_other_prompts_alone(tiny):
    """They draw what they name, and differ by at most 12 of 255 levels on average (measured over 40: 3.1)."""
    known = data.held_out_examples(6, seed=4)
    attached = tiny.load_lora(str(LORA))
    try:
        for seed, (caption, _, scene) in enumerate(known):
            images = []
            for attached.scale in (0.0, 1.0):
                images.append(np.array(tiny.generate(caption, seed=seed, num_steps=10)[0]).astype(int))
            without, image = images
            assert 0 < np.abs(image - without).mean() <= 12, caption
            assert all(score.score_single(image, scene, new_thing.SHAPES).values()), caption
    finally:
        attached.detach()


def test_the_bundled_lora_names_its_word_and_its_model():
    _, texts = read_file(LORA)
    assert texts["modelspec.trigger_phrase"] == new_thing.TRIGGER
    assert texts["ss_network_dim"] == "3" and texts["ss_num_train_images"] == "12"
    assert LORA.stat().st_size <= 80_000

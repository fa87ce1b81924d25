"""A training that was interrupted, at any moment, ends as an uninterrupted one does, to the bit."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from PIL import Image

from stable_diffusion import StableDiffusion
from stable_diffusion.cli import train
from stable_diffusion.training import (
    Dataset,
    LoRATrainer,
    TrainingSettings,
    load_state,
    read_pictures,
    save_lora,
    save_state,
)
from stable_diffusion.training.loss import TrainingBatch

SETTINGS = TrainingSettings(steps=4, batch_size=2, rank=2, learning_rate=1e-2, warmup=0.4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Four pictures, which make three batches of three sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate([(48, 48), (64, 32), (40, 40), (32, 64)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def trainer_of(photos: Path, settings: TrainingSettings, prior: bool = False, **model) -> LoRATrainer:
    """Return the trainer of a new process."""
    sd = StableDiffusion("tiny", **model)
    pictures, _ = read_pictures(photos, 32, trigger="ohwx")
    data = Dataset(sd, pictures, settings, prior=pictures[:2] if prior else (), resolution=32, flip=True)
    list(data.prepare(photos.parent / "cache"))  # so that a picture is encoded once in all these tests
    return LoRATrainer(sd, data, settings)


def steps(trainer: LoRATrainer, count: int) -> list[float]:
    return [step.loss for _, step in zip(range(count), trainer, strict=False)]


CASES = {
    "plain": {},
    "accumulate": {"accumulate": 2},
    "ema, cosine": {"ema": 0.9, "lr_schedule": "cosine"},
    "quantized": {"unet_bits": 8, "dora": True},
    "text encoders, prior": {"text_encoder_rank": 2, "prior": True, "caption_dropout": 0.3},
    "float16": {"dtype": mx.float16, "noise_offset": 0.1},
    "adafactor": {"optimizer": "adafactor", "conv_rank": 2},
    "lion": {"optimizer": "lion", "loss": "huber"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_an_uninterrupted_one(case, photos, tmp_path):
    values = dict(CASES[case])
    model = {name: values.pop(name) for name in ("prior", "unet_bits", "dtype") if name in values}
    settings = replace(SETTINGS, **values)
    whole, second = (trainer_of(photos, settings, **model) for _ in range(2))
    if case == "float16":
        whole.scale = 64.0  # after gradients that overflowed
    losses = steps(whole, 2)
    save_state(whole, tmp_path / "first.safetensors")
    losses += steps(whole, 4)
    load_state(second, tmp_path / "first.safetensors")
    assert steps(second, 4) == losses[2:]  # over the end of an epoch
    assert len(set(losses)) == 4 and np.isfinite(losses).all()
    for trainer, name in ((whole, "a"), (second, "b")):
        save_lora(trainer, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    states = whole.state(), second.state()
    assert states[0].keys() == states[1].keys()
    assert all(mx.array_equal(array, states[1][name]).item() for name, array in states[0].items())


KILLED = """
import os, signal, sys
from stable_diffusion.cli import train
import mlx.core as mx

save = mx.save_safetensors

def killed(file, *rest):
    save(file, *rest)
    if "000004" in file.name:
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)

mx.save_safetensors = killed
train.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_to_the_same_file(photos, tmp_path):
    flags = [photos, "--model", "tiny", "--resolution", "64", "--trigger", "ohwx", "--steps", "6", "--rank", "2"]
    flags = [str(flag) for flag in [*flags, "--save_every", "2", "--measure_every", "0", "--warmup", "0", "--output"]]
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    whole, output = (tmp_path / folder / "me.safetensors" for folder in ("whole", "killed"))
    program = [sys.executable, "-c", KILLED, *flags, output]
    done = subprocess.run(program, cwd=Path(__file__).parents[2], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not output.exists()
    assert [path.name for path in tmp_path.glob("killed/[!.]*state*")] == ["me-000002.state.safetensors"]
    assert list(tmp_path.glob("killed/.*partial*")), "killed before the checkpoint was begun"
    assert train.main([*flags, str(output), "--resume", "latest"]) == 0
    assert train.main([*flags, str(whole)]) == 0
    assert output.read_bytes() == whole.read_bytes()


@pytest.fixture(scope="module")
def checkpoint(photos, tmp_path_factory) -> Path:
    trainer = trainer_of(photos, SETTINGS)
    next(trainer)
    folder = tmp_path_factory.mktemp("state")
    save_lora(trainer, folder / "lora.safetensors")
    save_state(trainer, folder / "whole.safetensors")
    content = (folder / "whole.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(content[:-100])
    (folder / "damaged.safetensors").write_bytes(content[:8] + b"x" + content[9:])
    (folder / "empty.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("name", ["lora", "truncated", "damaged", "empty", "missing"])
def test_what_is_no_whole_checkpoint_is_refused(name, photos, checkpoint):
    trainer = trainer_of(photos, SETTINGS)
    with pytest.raises((ValueError, OSError)) as caught:
        load_state(trainer, checkpoint / f"{name}.safetensors")
    assert name in str(caught.value) and len(str(caught.value)) <= 300 and "\n" not in str(caught.value)
    assert trainer.step == 0


OTHERS = {"rank": 3, "targets": "attention+ff", "optimizer": "lion", "seed": 1, "batch_size": 1, "ema": 0.9}


@pytest.mark.parametrize("name", [*OTHERS, "model"])
def test_a_checkpoint_of_another_run_is_refused(name, photos, checkpoint):
    trainer = trainer_of(photos, SETTINGS if name == "model" else replace(SETTINGS, **{name: OTHERS[name]}))
    if name == "model":  # such as a merged LoRA: it differs in an attention alone
        layer = trainer.sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.base
        layer.weight = layer.weight * 1.01
    with pytest.raises(ValueError, match=f"with {name} ") as caught:
        load_state(trainer, checkpoint / "whole.safetensors")
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)
    assert trainer.step == 0


@pytest.mark.parametrize("change", ["caption", "repeats", "size", "pixels", "flip", "fewer", "prior"])
def test_other_pictures_are_refused(change, photos, checkpoint):
    trainer = trainer_of(photos, SETTINGS)
    (first, *rest), flip, side = trainer.data.sets[0].pictures, change != "flip", 40 if change == "size" else 32
    values = {"caption": {"caption": "a cat"}, "repeats": {"repeats": 2}, "pixels": {"digest": "another"}}
    pictures = rest if change == "fewer" else [replace(first, **values.get(change, {})), *rest]
    prior = rest if change == "prior" else ()
    trainer.data = Dataset(trainer.sd, pictures, SETTINGS, prior=prior, resolution=side, flip=flip)
    with pytest.raises(ValueError, match="other pictures, captions") as caught:
        load_state(trainer, checkpoint / "whole.safetensors")
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value) and trainer.step == 0


def test_steps_and_checkpointing_may_change(photos, checkpoint):
    trainer = trainer_of(photos, replace(SETTINGS, steps=8, checkpointing="on"))
    load_state(trainer, checkpoint / "whole.safetensors")
    assert [step.number for step in trainer] == list(range(2, 9))


class Spoiled:
    """A dataset whose latents are not finite in some steps."""

    def __init__(self, data: Dataset, numbers: range):
        self.data, self.numbers, self.sets, self.digest = data, numbers, data.sets, data.digest

    def batches(self, number: int) -> list[TrainingBatch]:
        batches = self.data.batches(number)
        return [replace(b, mean=mx.nan * b.mean) if number in self.numbers else b for b in batches]


def test_a_step_without_a_finite_loss_changes_nothing(photos):
    trainer = trainer_of(photos, replace(SETTINGS, steps=20, ema=0.9))
    trainer.data = Spoiled(trainer.data, range(2, 6))
    kept = {}
    for step in trainer:
        state = {name: np.array(array) for name, array in trainer.state().items() if not name.startswith("run")}
        assert step.skipped == (3 <= step.number <= 6)
        if step.skipped:
            assert all(np.array_equal(state[name], kept[name]) for name in state)
        else:
            assert not all(np.array_equal(state[name], kept.get(name)) for name in state)
        kept = state
        if step.number == 8:
            break
    trainer.data.numbers = range(8, 100)
    assert all(next(trainer).skipped for _ in range(4))
    with pytest.raises(FloatingPointError, match="steps 9 to 13"):
        next(trainer)


def test_skipped_steps_count_on_in_a_resumed_run(photos, tmp_path):
    trainers = [trainer_of(photos, replace(SETTINGS, steps=20)) for _ in range(2)]
    for trainer in trainers:
        trainer.data = Spoiled(trainer.data, range(2, 100))
    steps(trainers[0], 5)
    save_state(trainers[0], tmp_path / "state.safetensors")
    load_state(trainers[1], tmp_path / "state.safetensors")
    with pytest.raises(FloatingPointError, match="steps 3 to 7"):
        steps(trainers[1], 10)


def test_gradients_that_overflow_are_computed_again_with_a_smaller_scale(photos):
    trainer, whole = (trainer_of(photos, SETTINGS, dtype=mx.float16) for _ in range(2))
    trainer.scale = 2.0**40
    step, expected = next(trainer), next(whole)
    assert not step.skipped and 1 <= trainer.scale < 2.0**40
    assert step.loss == pytest.approx(expected.loss, rel=1e-6)


def test_half_precision_gradients(photos):
    """The bounds are on |difference| / |gradient| over all factors."""
    gradients = {}
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        trainer = trainer_of(photos, SETTINGS, dtype=dtype)
        noise = [mx.random.normal(f.shape, key=mx.random.key(i)) for i, f in enumerate(trainer.factors().values())]
        pairs = zip(trainer.factors(), noise, strict=True)
        trainer.model.update(tree_unflatten([(name, 0.1 * values) for name, values in pairs]))
        _, tree, _ = trainer._gradients()
        gradients[dtype] = np.concatenate([np.array(g).ravel() for _, g in tree_flatten(tree)])
    for dtype, bound in ((mx.float16, 0.01), (mx.bfloat16, 0.1)):
        error = np.linalg.norm(gradients[dtype] - gradients[mx.float32]) / np.linalg.norm(gradients[mx.float32])
        print(dtype, error)
        assert error <= bound

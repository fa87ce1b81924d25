"""A textual inversion trains the vectors of a new word and nothing else, as torch and diffusers would."""

import re

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from checkpoints import SCALED, make
from oracle import nchw, normal, relative_error
from stable_diffusion import StableDiffusion
from stable_diffusion.images.folders import read_pictures
from stable_diffusion.training.dataset import Dataset
from stable_diffusion.training.loss import TrainingBatch, add_noise, seed_of
from stable_diffusion.training.save import averaged, load_state, save_lora, save_state
from stable_diffusion.training.settings import TrainingSettings
from stable_diffusion.training.trainer import LoRATrainer
from stable_diffusion.weights.embeddings import read_embedding, write_embedding
from tools.tiny import new_thing

TOLERANCE = 1e-4
WORD, COUNT = "ohwx", 3
CAPTIONS = ("the ohwx cat on blue", "two ohwx, red", "")


@pytest.fixture(scope="module", params=["sd1", "xl"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    make(folder, request.param, diffusers.DDIMScheduler(**SCALED, clip_sample=False))
    return folder


class Data:
    """The same batch in every step."""

    digest = ""

    def __init__(self, is_xl: bool):
        n = len(CAPTIONS)
        mean, deviation = normal(n, 8, 6, 4, seed=1), np.abs(normal(n, 8, 6, 4, seed=2))
        time_ids = mx.array(np.abs(normal(n, 6, seed=3)) * 64) if is_xl else None
        self.batch = TrainingBatch(mx.array(mean), mx.array(deviation), CAPTIONS, time_ids)

    def batches(self, number: int) -> list[TrainingBatch]:
        return [self.batch]


def trainer_for(folder, older=(), **settings) -> LoRATrainer:
    """Return a trainer of ``WORD`` for a model into which the files ``older`` of other words are loaded first."""
    settings = {"embedding": f"{WORD}:{COUNT}", "warmup": 0.0, "learning_rate": 1e-3} | settings
    sd = StableDiffusion(folder, **({"text_bits": 8} if settings.pop("quantized", False) else {}))
    for file in older:
        sd.load_embedding(file)
    return LoRATrainer(sd, Data(sd.is_xl), TrainingSettings(**settings))


def everything_else(sd: StableDiffusion) -> dict[str, np.ndarray]:
    return {
        f"{part}.{name}": np.array(array)
        for part in sd.sources
        for name, array in tree_flatten(getattr(sd, part).parameters())
    }


class Torch:
    """The same step with diffusers' pipeline, into which the vectors are put as it loads them."""

    def __init__(self, folder, vectors: dict[str, np.ndarray], settings: TrainingSettings):
        self.is_xl, self.settings = len(vectors) == 2, settings
        cls = diffusers.StableDiffusionXLPipeline if self.is_xl else diffusers.StableDiffusionPipeline
        self.pipe = cls.from_pretrained(folder)
        self.tables, self.vectors = {}, {}
        pairs = zip(vectors.items(), ("", "_2"), strict=False)
        for module in (self.pipe.unet, self.pipe.text_encoder, getattr(self.pipe, "text_encoder_2", None)):
            if module is not None:
                module.requires_grad_(False)
        for (name, value), suffix in pairs:
            encoder, tokenizer = (getattr(self.pipe, part + suffix) for part in ("text_encoder", "tokenizer"))
            tensor = torch.tensor(value)
            self.pipe.load_textual_inversion(tensor, token=WORD, text_encoder=encoder, tokenizer=tokenizer)
            self.tables[name] = encoder.get_input_embeddings().weight.requires_grad_(True)
            self.vectors[name] = torch.nn.Parameter(tensor)
        self.optimizer = torch.optim.AdamW(self.vectors.values(), lr=settings.learning_rate, weight_decay=0.01)

    def step(self, batch: TrainingBatch, seeds: list[int]) -> tuple[float, dict[str, np.ndarray]]:
        """Make a step, and return the loss and the gradients before they are clipped."""
        sample = add_noise(batch, seeds, self.settings, 1000)
        x0, noise, t = nchw(np.array(sample.latents)), nchw(np.array(sample.noise)), torch.tensor(sample.timesteps)
        added = None
        if self.is_xl:
            context, _, pooled, _ = self.pipe.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
            added = {"text_embeds": pooled, "time_ids": torch.from_numpy(np.array(batch.time_ids))}
        else:
            context, _ = self.pipe.encode_prompt(list(CAPTIONS), "cpu", 1, False)
        noised = self.pipe.scheduler.add_noise(x0, noise, t)
        output = self.pipe.unet(noised, t, context, added_cond_kwargs=added).sample
        loss = torch.nn.functional.mse_loss(output, noise)
        loss.backward()
        gradients = {}
        for name, table in self.tables.items():
            self.vectors[name].grad = table.grad[-COUNT:].clone()
            gradients[name], table.grad = table.grad[-COUNT:].numpy().copy(), None
        torch.nn.utils.clip_grad_norm_(self.vectors.values(), self.settings.clip_norm)
        self.optimizer.step()
        for name, table in self.tables.items():
            table.data[-COUNT:] = self.vectors[name].data
        return loss.item(), gradients


def test_a_step_equals_torchs_and_changes_nothing_else(folder):
    trainer = trainer_for(folder, min_snr=0.0)
    shapes = {name: factor.shape for name, factor in trainer.factors().items()}
    start = {name: normal(*shape, seed=i, scale=0.5) for i, (name, shape) in enumerate(shapes.items())}
    trainer.model.update({name: mx.array(value) for name, value in start.items()})
    before = everything_else(trainer.sd)
    theirs = Torch(folder, start, trainer.settings)
    for number in range(3):
        seeds = [seed_of(trainer.settings.seed, number, 0, row) for row in range(len(CAPTIONS))]
        loss, wanted = theirs.step(trainer.data.batch, seeds)
        _, gradients, _ = trainer._gradients()
        assert gradients.keys() == wanted.keys() == shapes.keys()
        for name in wanted:
            assert relative_error(gradients[name], wanted[name]) <= TOLERANCE, name
        assert next(trainer).loss == pytest.approx(loss, rel=TOLERANCE)
        for name, vectors in trainer.factors().items():
            assert relative_error(vectors, theirs.vectors[name].detach().numpy()) <= TOLERANCE, name
            assert np.abs(np.array(vectors) - start[name]).max() > number * 0.8e-3
    after = everything_else(trainer.sd)
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def test_the_first_vectors_are_the_mean_of_all_or_a_words(folder):
    for settings, text in (({}, None), ({"initial_word": "the red"}, "the red")):
        trainer = trainer_for(folder, **settings)
        for tokenizer, name in trainer.sd._encoders:
            table = np.array(getattr(trainer.sd, name).text_model.embeddings.token_embedding.weight)
            ids = [getattr(trainer.sd, tokenizer).encode(text)[i] for i in (0, 1, 0)] if text else [slice(None)] * 3
            wanted = np.stack([table[one].reshape(-1, table.shape[1]).mean(axis=0) for one in ids])
            assert relative_error(trainer.factors()[name], wanted) <= 1e-6
    with pytest.raises(ValueError, match="initial_word ' ' has no tokens; give a word"):
        trainer_for(folder, initial_word=" ")


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_file_is_read_by_this_library_and_by_diffusers(folder, tmp_path, ema):
    trainer = trainer_for(folder, steps=2, ema=ema, learning_rate=0.1)
    list(trainer)
    file = tmp_path / "file.safetensors"
    save_lora(trainer, file, {"modelspec.trigger_phrase": WORD})
    words, vectors = read_embedding(file)
    assert words == (WORD, "file")
    for ours, kept in zip(vectors, (trainer.average or trainer.factors()).values(), strict=True):
        assert np.array_equal(ours, kept) and ours.shape[0] == COUNT
    fresh = StableDiffusion(folder)
    fresh.load_embedding(file)
    encoded = fresh.encode_prompt("the ohwx cat")
    if not ema:
        assert np.array_equal(encoded.context, trainer.sd.encode_prompt("the ohwx cat").context)
    assert relative_error(encoded.context, diffusers_encoding(folder, file, "the ohwx cat")) <= TOLERANCE


def diffusers_encoding(folder, file, prompt: str) -> np.ndarray:
    """Encode a prompt after loading a file as diffusers' documentation has it."""
    if (folder / "tokenizer_2").exists():
        pipe, tensors = diffusers.StableDiffusionXLPipeline.from_pretrained(folder), load_file(file)
        for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
            parts = {name: getattr(pipe, name + suffix) for name in ("text_encoder", "tokenizer")}
            pipe.load_textual_inversion(tensors[key], token=WORD, **parts)
        return pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0].detach().numpy()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_textual_inversion(file)
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0].detach().numpy()


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(folder, tmp_path):
    def fresh() -> LoRATrainer:
        return trainer_for(folder, steps=3, accumulate=2, ema=0.9, quantized=True)

    whole, second = fresh(), fresh()
    losses = [next(whole).loss]
    save_state(whole, tmp_path / "a.state.safetensors")
    losses += [step.loss for step in whole]
    load_state(second, tmp_path / "a.state.safetensors")
    assert [step.loss for step in second] == losses[1:]
    for one, other in ((whole.factors(), second.factors()), (whole.average, second.average)):
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    encoded = [trainer.sd.encode_prompt(WORD).context for trainer in (whole, second)]
    assert np.array_equal(*encoded)


def test_words_from_files_keep_their_vectors(folder, tmp_path):
    """Of the words of one encoder only the new one changes, where others were loaded before it and after it."""
    widths = {name: factor.shape[1] for name, factor in trainer_for(folder).factors().items()}
    files, prompts = [], ("the before cat", "the after cat", "the ohwx cat")
    for i, name in enumerate(("before", "after")):
        vectors = [mx.array(normal(2, width, seed=i)) for width in widths.values()]
        write_embedding(tmp_path / f"{name}.safetensors", name, vectors)
        files.append(tmp_path / f"{name}.safetensors")
    trainer = trainer_for(folder, older=files[:1], steps=2, learning_rate=0.1)
    trainer.sd.load_embedding(files[1])
    start = [np.array(trainer.sd.encode_prompt(prompt).context) for prompt in prompts]
    list(trainer)
    for _ in range(2):  # the second time with text encoders that are read again
        now = [np.array(trainer.sd.encode_prompt(prompt).context) for prompt in prompts]
        assert [np.array_equal(*pair) for pair in zip(start, now, strict=True)] == [True, True, False]
        for _, name in trainer.sd._encoders:
            delattr(trainer.sd, name)
    save_lora(trainer, tmp_path / "new.safetensors", {"modelspec.trigger_phrase": WORD})
    fresh = StableDiffusion(folder)
    fresh.load_embedding(tmp_path / "new.safetensors")
    assert np.array_equal(now[2], fresh.encode_prompt(prompts[2]).context)


def test_the_vectors_outlive_the_release_of_their_text_encoder(folder):
    trainer = trainer_for(folder, steps=1, learning_rate=0.1)
    next(trainer)
    before = trainer.sd.encode_prompt(WORD).context
    trainer.sd.release()
    assert np.array_equal(before, trainer.sd.encode_prompt(WORD).context)
    trainer.sd.release(keep=["unet"])
    with averaged(trainer):
        pass
    assert np.array_equal(before, trainer.sd.encode_prompt(WORD).context)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"embedding": "ohwx:0"},
            "embedding 'ohwx:0' is not valid; write WORD or WORD:N, no blanks",
        ),
        ({"embedding": "ohwx:76"}, "is not valid"),
        ({"embedding": "a b"}, "is not valid"),
        ({"embedding": "a:b"}, "is not valid"),
        ({"embedding": "(a)"}, "is not valid"),
        ({"embedding": ""}, "is not valid"),
        (
            {"embedding": "ohwx", "rank": 4},
            "rank is for a LoRA and cannot be combined with embedding; omit one",
        ),
        ({"embedding": "ohwx", "text_encoder_rank": 4}, "text_encoder_rank is for a LoRA"),
        ({"initial_word": "toy"}, "initial_word has no effect without embedding; give the new word as embedding"),
    ],
)
def test_settings_that_fit_no_word(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainingSettings(**settings)


def test_the_learning_rate_of_a_word_is_higher():
    rates = [TrainingSettings(**one).learning_rate for one in ({}, {"embedding": "ohwx"})]
    assert rates == [1e-4, 2e-3]
    assert TrainingSettings(embedding="ohwx", learning_rate=1e-4).learning_rate == 1e-4


def test_the_number_of_vectors():
    words = ("ohwx", "ohwx:1", "<a-b>:75")
    assert [TrainingSettings(embedding=word).new_word for word in words] == [("ohwx", 4), ("ohwx", 1), ("<a-b>", 75)]


def test_a_word_learns_from_pictures(tmp_path):
    """What the bundled model can say of a new shape by words alone: the loss at the same noise falls by a tenth."""
    arrow = [(32, 16), (47, 32), (38, 32), (38, 47), (26, 47), (26, 32), (17, 32)]
    for colour, background in (("red", "white"), ("blue", "yellow"), ("green", "pink"), ("yellow", "blue")):
        image = Image.new("RGB", (64, 64), background)
        ImageDraw.Draw(image).polygon(arrow, fill=colour)
        image.save(tmp_path / f"{colour}.png")
        (tmp_path / f"{colour}.txt").write_text(f"a {colour} {WORD} in the centre on a {background} background")
    sd = StableDiffusion("tiny")
    settings = {"steps": 20, "batch_size": 2, "learning_rate": 0.02, "caption_dropout": 0.0}
    data = Dataset(sd, read_pictures(tmp_path, 64)[0], settings := TrainingSettings(embedding=WORD, **settings))
    trainer = LoRATrainer(sd, data, settings)
    batch = data.batch(data.sets[0], [(number, False) for number in range(4)] * 4)

    def measured() -> float:
        return trainer.loss(batch, [seed_of("measured", draw) for draw in range(16)]).item()

    before = measured()
    list(trainer)
    assert measured() < 0.9 * before


def test_a_word_learns_a_shape_from_pictures_and_draws_it(tmp_path):
    """At least 9 of 10 pictures with the word show a moon, in pairs of colours not shown; before, at most half."""
    new_thing.write_pictures(tmp_path, new_thing.new_pictures(shape="moon"))
    sd = StableDiffusion("tiny")
    settings = {"steps": 30, "batch_size": 4, "learning_rate": 0.02, "lr_schedule": "cosine", "caption_dropout": 0.0}
    data = Dataset(sd, read_pictures(tmp_path, 64)[0], settings := TrainingSettings(embedding=WORD, **settings))
    trainer = LoRATrainer(sd, data, settings)

    def share(count: int) -> float:
        drawn = [
            (np.array(sd.generate(caption, seed=seed, num_steps=10)[0]), scene)
            for seed, (caption, scene) in enumerate(new_thing.prompts(count, shape="moon"))
        ]
        return float(np.mean([all(new_thing.score_new(image, scene).values()) for image, scene in drawn]))

    assert share(4) <= 0.5
    list(trainer)
    assert share(10) >= 0.9

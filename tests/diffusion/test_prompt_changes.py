"""Prompts that change within a run: which text the UNet reads in each step."""

import mlx.core as mx
import pytest

from oracle import last, picture
from stable_diffusion import SAMPLERS

WORDS = {"r": "red", "b": "blue", "c": "cat", "-": ""}
SMALL = {"latent_size": (4, 4), "seed": 1, "cfg_weight": 1.0}
CHANGES = [
    # A number without a point is a step, one with a point a fraction.
    ("[red:blue:3]", 5, "rrrbb"),
    ("[red:blue:1]", 5, "rbbbb"),
    ("[red:blue:1.0]", 5, "rrrrr"),
    ("[red:blue:0]", 3, "bbb"),
    ("[red:blue:-1]", 3, "bbb"),
    ("[red:blue:5]", 5, "rrrrr"),
    ("[red:blue:99]", 3, "rrr"),
    ("[red:blue: 2 ]", 3, "rrb"),
    ("[red:2]", 4, "--rr"),
    ("[red::2]", 4, "rr--"),
    ("[red:blue:0.5]", 5, "rrrbb"),
    ("[red:blue:1.5]", 3, "rrr"),
    ("[[red:blue:1]:cat:0.5]", 4, "rbcc"),
    ("[red:[blue:cat:3]:0.25]", 4, "rbbc"),
    # Between bars the text takes turns, one step each.
    ("[red|blue]", 5, "rbrbr"),
    ("[red|blue|cat|blue]", 6, "rbcbrb"),
    ("[red|]", 4, "r-r-"),
    ("[|red|]", 4, "-r--"),
    ("[[red|blue]:cat:2]", 4, "rbcc"),
    ("[cat:[red|blue]:1]", 4, "cbrb"),
    ("[[red|blue]|cat]", 4, "rcrc"),
    ("[red|[blue:cat:0.5]]", 6, "rbrcrc"),
]


def letters(sd, unet, latents, row: int = 0) -> list[str]:
    """A letter for each evaluation of each step: the word that a row of the batch reads."""
    known = {letter: sd.encode_prompt(word).context[0] for letter, word in WORDS.items()}
    steps, done = [], len(unet.calls)
    for _ in latents:
        read = [call.encoded[row] for call in unet.calls[done:]]
        steps.append("".join(a for text in read for a, want in known.items() if mx.array_equal(text, want)))
        done = len(unet.calls)
    return steps


@pytest.mark.parametrize("prompt, steps, wanted", CHANGES)
def test_the_text_of_each_step(sd, unet, prompt, steps, wanted):
    assert letters(sd, unet, sd.generate_latents(prompt, num_steps=steps, **SMALL)) == [*wanted]


TURNS = [("[red|blue]", "rbrb"), ("[red:blue:0.5]", "rrbb"), ("[red:blue:1]", "rbbb")]
SEVERAL = [name for name, row in SAMPLERS.items() if row.evaluations > 1 or name == "pndm"]


@pytest.mark.parametrize(
    "sampler, prompt, wanted",
    [*((name, *TURNS[0]) for name in SAMPLERS), *((name, *turns) for name in SEVERAL for turns in TURNS[1:])],
)
def test_all_evaluations_of_a_step_read_the_same(sd, unet, sampler, prompt, wanted):
    steps = letters(sd, unet, sd.generate_latents(prompt, num_steps=4, sampler=sampler, **SMALL))
    assert [*map(set, steps)] == [*map(set, wanted)]
    if SAMPLERS[sampler].evaluations == 2:
        assert [*map(len, steps)] == [2, 2, 2, 1]


def test_guidance_ends_with_a_step(sd, unet):
    run = {"num_steps": 4, "sampler": "heun", "guidance_interval": (0.25, 0.5)}
    last(sd.generate_latents("cat", **SMALL | {"cfg_weight": 3.0}, **run))
    assert [call.rows for call in unet.calls] == [1, 1, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("rows_at_once", [None, 1])
def test_each_row_of_a_batch_takes_its_turns(sd, unet, monkeypatch, rows_at_once):
    """Parts that AND joins, negative prompts, and images with prompts of their own."""
    monkeypatch.setattr(sd, "rows_at_once", rows_at_once)
    prompts, negatives = ["red AND [cat|blue] :0.5", "[cat|red]"], ["[blue|(cat:1)|red]", "[red:1]"]
    run = {"num_steps": 4, "cfg_weight": 3.0, "negative_text": negatives}
    wanted = ["rrrr", "cbcb", "bcrb", "crcr", "-rrr"]
    if rows_at_once is None:
        for row, word in enumerate(wanted):
            assert letters(sd, unet, sd.generate_latents(prompts, **SMALL | run), row) == [*word]
    else:
        steps = letters(sd, unet, sd.generate_latents(prompts, **SMALL | run))
        assert steps == ["".join(word[step] for word in wanted) for step in range(4)]


def test_each_text_is_encoded_once(sd, monkeypatch):
    network, texts = sd.text_encoder, []
    monkeypatch.setattr(sd, "text_encoder", lambda ids: texts.append(ids) or network(ids))
    last(sd.generate_latents("[red|blue|cat|blue] [cat:red:5]", num_steps=12, **SMALL))
    assert len(texts) == 6


def test_an_image_that_is_worked_on_counts_the_steps_it_takes(sd, unet):
    for prompt, wanted in (("[red:blue:2]", "rrbb"), ("[red:blue:0.75]", "rrrb"), ("[red|blue]", "rbrb")):
        run = {"strength": 0.5, "num_steps": 8, "seed": 1, "cfg_weight": 1.0}
        assert letters(sd, unet, sd.generate_latents_from_image(picture(32, 32), prompt, **run)) == [*wanted]


def test_a_model_that_continues_a_run_counts_its_steps(sd, unet):
    """As the refiner does, which reads on where the base has stopped."""
    for prompt, wanted in (("[red:blue:7]", "rrrrrrrb"), ("[red:blue:0.75]", "rrrrrrbb"), ("[red|blue]", "rbrbrbrb")):
        first = sd.generate_latents(prompt, num_steps=8, denoising_end=0.65, **SMALL)
        run = SMALL | {"num_steps": 8, "denoising_start": 0.65, "latents": mx.array(last(first))}
        assert letters(sd, unet, sd.generate_latents(prompt, **run)) == [*wanted[first.n_steps :]]
        assert first.n_steps == 5


@pytest.mark.parametrize("prompt, wanted", [("[red|blue]", "FF--FF--FF"), ("[red:blue:3]", "F--F---F--")])
def test_each_text_has_maps_of_its_own(sd, unet, prompt, wanted):
    """With DeepCache all of the UNet runs where a text is read first, and where its map is too old."""
    last(sd.generate_latents(prompt, num_steps=10, deep_cache=4, **SMALL))
    assert "".join("-F"[call.full] for call in unet.calls) == wanted

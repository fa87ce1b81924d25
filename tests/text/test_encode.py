"""Prompts with weights, of any length, and in lists: what reaches the UNet."""

import logging

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from oracle import last, normal, relative_error
from stable_diffusion import Conditioning, StableDiffusion
from stable_diffusion.models.layers import Attention, Context
from stable_diffusion.text.encode import concatenate, count_chunks, encode, same_length
from stable_diffusion.text.prompt import parts

LONG = " ".join(["the red cat on the blue"] * 40)  # 240 tokens: four chunks
SMALL = {"num_steps": 2, "latent_size": (4, 4), "seed": 1}


def context(sd: StableDiffusion, text: str, **options) -> np.ndarray:
    return np.array(sd.encode_prompt(text, **options).context)


def padded(tokenizer, text: str) -> mx.array:
    """The ids of a short prompt as the text encoder reads them, [1, 77]."""
    ids = tokenizer.tokenize(text)
    return mx.array([ids + [tokenizer.pad_id] * (77 - len(ids))])


@pytest.mark.parametrize("text", ["the red cat", "", "x" * 50])
def test_without_weights_nothing_changes(sd, text):
    plain = np.array(sd.text_encoder(padded(sd.tokenizer, text)).last_hidden_state)
    for emphasis in ("mean", "values", "none"):
        encoded = sd.encode_prompt(text, emphasis=emphasis)
        assert np.array_equal(encoded.context, plain) and encoded.v_context is None
    assert np.array_equal(context(sd, f"({text}:1)"), plain)


def test_weights_follow_the_formula_of_the_web_ui(sd):
    """The mean is restored in each chunk apart."""
    plain = context(sd, "the red BREAK cat on")
    weighted = plain.copy()
    weighted[:, 2] *= 1.4  # start, "the", "red"
    weighted[:, 78:80] *= np.array([0.3, -2])[None, :, None]  # behind the start of the second chunk
    for chunk in (slice(77), slice(77, 154)):
        weighted[:, chunk] *= plain[:, chunk].mean() / weighted[:, chunk].mean()
    assert relative_error(context(sd, "the (red:1.4) BREAK (cat:0.3) (on:-2)"), weighted) <= 1e-5


def test_weights_of_both_encoders_of_xl(xl):
    text, weighted = "the red cat", []
    for tokenizer, encoder in ((xl.tokenizer_1, xl.text_encoder_1), (xl.tokenizer_2, xl.text_encoder_2)):
        state = np.array(encoder(padded(tokenizer, text)).hidden_states[-2])
        mean = state.mean()
        state[:, 3] *= -0.5
        weighted.append(state * (mean / state.mean()))
    ours = xl.encode_prompt("the red (cat:-0.5)")
    assert relative_error(ours.context, np.concatenate(weighted, axis=-1)) <= 1e-5
    assert np.array_equal(ours.pooled, xl.encode_prompt(text).pooled)


def test_emphasis_on_values_leaves_the_keys(sd):
    plain, ours = context(sd, "the red cat"), sd.encode_prompt("the (red:-2) cat", emphasis="values")
    wanted = plain.copy()
    wanted[:, 2] *= -2
    assert np.array_equal(ours.context, plain) and relative_error(ours.v_context, wanted) <= 1e-6
    layer, x, keys = Attention(16, 2, 32), mx.array(normal(1, 5, 16)), mx.array(normal(1, 7, 32))
    plain, ours = (layer(x[0], 1, Context(keys, v)) - layer.to_out[0].bias for v in (keys, -2 * keys))
    assert relative_error(ours, -2 * plain) <= 1e-5
    prompts = [sd.encode_prompt(text, emphasis="values") for text in ("the red cat", "the (red:3) cat")]
    plain, more = (last(sd.generate_latents(prompt, cfg_weight=3.0, **SMALL)) for prompt in prompts)
    assert relative_error(more, plain) > 1e-3


def test_brackets_as_text_and_breaks(sd):
    assert np.array_equal(context(sd, "the (red:2) cat", emphasis="none"), context(sd, r"the \(red:2\) cat"))
    two = np.concatenate([context(sd, "the red "), context(sd, " cat")], axis=1)
    assert relative_error(context(sd, "the red BREAK cat"), two) <= 1e-5


def test_long_prompts_of_xl_are_chunks_of_both_encoders(xl, xl_folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(xl_folder)
    states, pooled = [], None
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(LONG, add_special_tokens=False).input_ids
        rows = [[tokenizer.bos_token_id, *ids[i : i + 75], tokenizer.eos_token_id] for i in range(0, 240, 75)]
        rows = [row + [tokenizer.pad_token_id] * (77 - len(row)) for row in rows]
        with torch.no_grad():
            output = encoder(torch.tensor(rows), output_hidden_states=True)
        states.append(output.hidden_states[-2].reshape(1, 4 * 77, -1))
        pooled = output[0][:1]  # the second encoder's is what counts, of the first chunk
    ours = xl.encode_prompt(LONG)
    assert relative_error(ours.context, torch.cat(states, dim=-1)) <= 1e-4
    assert relative_error(ours.pooled, pooled) <= 1e-4


def test_the_pair_gets_the_same_number_of_chunks(sd):
    long, short, empty = (context(sd, text)[0] for text in (LONG, "blue", ""))
    both = sd.encode_prompt(["blue", LONG])
    assert len(both) == 2 and np.array_equal(both.context, [np.concatenate([short, empty, empty, empty]), long])
    for positive, negative in ((LONG, "blue"), ("blue", LONG)):
        (*_, x) = sd.generate_latents(positive, negative_text=negative, cfg_weight=4.0, **SMALL)
        assert bool(mx.isfinite(x).all())


def test_what_is_cut_is_said_once(xl, caplog):
    cut = xl.encode_prompt(" ".join(["cat"] * 75 + ["blue", "red"]), truncate=True)
    assert cut.context.shape[1] == 77
    xl.encode_prompt(LONG)
    xl.encode_prompt("cat", truncate=True)
    (message,) = caplog.messages
    assert "this part of it is ignored: 'blue red'" in message


def test_the_log_says_how_a_prompt_was_read(xl, caplog):
    caplog.set_level(logging.INFO, "stable_diffusion")
    xl.encode_prompt("the (red:1.3) cat BREAK [blue]")
    whole = ["prompt, chunk 1 of 2, 3 tokens: the | red:1.3 | cat", "prompt, chunk 2 of 2, 1 tokens: blue:0.909"]
    assert caplog.messages == whole
    xl.encode_prompt("the BREAK cat", truncate=True)
    assert caplog.messages[3:] == ["prompt, chunk 1 of 1, 1 tokens: the"]


def test_weight_blocks_are_a_mean(sd, xl):
    ours = sd.encode_prompt(["the red:3 cat:1", f"blue:1 {LONG}:-2"], weight_blocks=True)
    assert len(ours.rows) == len(ours) == 2
    assert relative_error(ours.context[0, :77], 0.75 * context(sd, "the red")[0] + 0.25 * context(sd, "cat")[0]) <= 1e-5
    blue = sd.encode_prompt(["blue", LONG]).context[0]  # padded
    assert relative_error(ours.context[1], -blue + 2 * context(sd, LONG)[0]) <= 1e-5
    red, cat, mean = (
        np.array(xl.encode_prompt(text, weight_blocks=True).pooled) for text in ("red", "cat", "red:-1 cat:3")
    )
    assert relative_error(mean, -0.5 * red + 1.5 * cat) <= 1e-5


MANY = ["the red cat", "the (red:1.4) cat BREAK on", LONG, "", "[red:blue:0.5] AND (the cat:-1) :0.5", "the red cat"]


@pytest.mark.parametrize("emphasis", ["mean", "values", "none"])
def test_many_prompts_are_encoded_as_they_are_alone(xl, emphasis):
    batches = []
    encoders = [(xl.tokenizer_1, xl.text_encoder_1), (xl.tokenizer_2, xl.text_encoder_2)]
    counters = [(t, lambda ids, e=encoder: batches.append(len(ids)) or e(ids)) for t, encoder in encoders]
    options = {"xl": True, "emphasis": emphasis}
    alone = [encode(text, encoders, **options) for text in MANY]
    expected = concatenate(same_length(alone, lambda: encode("", encoders, xl=True).context))
    together = encode(MANY, counters, **options)
    assert together.rows == expected.rows and len(together) == len(MANY)
    for name in ("context", "pooled", "v_context"):
        ours, theirs = getattr(together, name), getattr(expected, name)
        assert (ours is None) == (theirs is None) == (name == "v_context" and emphasis != "values")
        assert ours is None or np.array_equal(ours, theirs)
    # Each encoder runs once on every different prompt or part of one; "" pads the shorter ones.
    chunks = [1, 1, 4, 1, 1] if emphasis == "none" else [1, 2, 4, 1, 1, 1, 1]
    assert batches == [n for n in chunks for _ in encoders]
    del batches[:]
    encode(["red", "blue"], counters, **options)  # of one length: nothing pads
    assert batches == [1] * 4


@pytest.mark.parametrize("options", [{}, {"emphasis": "none"}, {"truncate": True}, {"weight_blocks": True}])
def test_chunks_are_counted_without_an_encoder(sd, options):
    for text in (*MANY, "the BREAK cat AND red", f"{LONG}:2 cat:1"):
        assert 77 * count_chunks(text, sd.tokenizer, **options) == context(sd, text, **options).shape[1]


def test_parts_guide_together(sd):
    """One step of DDIM is linear in the prediction: a AND b = a + b - the negative prompt alone."""
    run = SMALL | {"num_steps": 1}
    guided = {"cfg_weight": 3.0, "negative_text": "on", **run}
    a, b, less = (last(sd.generate_latents(t, **guided)) for t in ("the red", "cat", "the red AND cat:-0.5"))
    alone = last(sd.generate_latents("on", cfg_weight=1.0, **run))
    assert relative_error(less, a - 0.5 * (b - alone)) <= 1e-4
    mean, a, b = (last(sd.generate_latents(t, cfg_weight=1.0, **run)) for t in ("the red AND cat:3", "the red", "cat"))
    assert relative_error(mean, 0.25 * a + 0.75 * b) <= 1e-4
    with pytest.raises(ValueError, match="sum to 0"):
        next(sd.generate_latents("the red AND cat:-1", cfg_weight=1.0, **run))


def test_changes_at_the_ends_are_none(sd):
    plain = [last(sd.generate_latents(t, **SMALL)) for t in ("red", "blue")]
    assert np.array_equal(last(sd.generate_latents("[red:blue:1.0]", **SMALL)), plain[0])
    assert np.array_equal(last(sd.generate_latents("[red:blue:0]", **SMALL)), plain[1])
    first, second = sd.generate_latents("[red:blue:0.5]", **SMALL)
    assert np.array_equal(first, next(sd.generate_latents("red", **SMALL)))
    assert not np.array_equal(second, plain[0]) and not np.array_equal(second, plain[1])


def test_lists_of_prompts(sd):
    prompts, negatives = ["the red cat", "blue"], ["on", "the"]
    together = last(sd.generate_latents(prompts, n_images=2, negative_text=negatives, cfg_weight=3.0, **SMALL))
    assert together.shape == (4, 4, 4, 4)
    for i in range(4):
        options = {"negative_text": negatives[i // 2], "cfg_weight": 3.0} | SMALL | {"seed": 1 + i}
        assert relative_error(together[i : i + 1], last(sd.generate_latents(prompts[i // 2], **options))) <= 1e-4
    with pytest.raises(ValueError, match="2 negative prompts for 3 prompts"):
        next(sd.generate_latents(["a", "b", "c"], negative_text=negatives, cfg_weight=3.0, **SMALL))


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_encoded_prompts_take_the_place_of_text(name, request, monkeypatch):
    pipeline = request.getfixturevalue(name)
    encoded, negative = pipeline.encode_prompt(["the red cat", "blue"]), pipeline.encode_prompt("on")
    assert isinstance(encoded, Conditioning) and len(encoded) == 2
    want = last(pipeline.generate_latents(["the red cat", "blue"], negative_text="on", cfg_weight=3.0, **SMALL))
    for attribute in (attribute for pair in pipeline._encoders for attribute in pair):
        monkeypatch.delattr(pipeline, attribute)
    ours = last(pipeline.generate_latents(encoded, negative_text=negative, cfg_weight=3.0, **SMALL))
    assert np.array_equal(ours, want)


def test_options_out_of_range(sd):
    with pytest.raises(ValueError, match="the prompt is missing"):
        sd.encode_prompt([])
    for clip_skip in (-1, 99):
        with pytest.raises(ValueError, match=f"clip_skip {clip_skip} is outside 0 ... "):
            sd.encode_prompt("a", clip_skip=clip_skip)


# --- the second encoder ----------------------------------------------------------------------------------------------


def test_the_second_encoder_reads_its_own_text(xl):
    """The first half of the context is the first encoder's, the rest and the pooled vector the second's."""
    ours = xl.encode_prompt("red", prompt_2="cat")
    first, second = map(xl.encode_prompt, ("red", "cat"))
    assert np.array_equal(ours.context[..., :32], first.context[..., :32])
    assert np.array_equal(ours.context[..., 32:], second.context[..., 32:])
    assert np.array_equal(ours.pooled, second.pooled)
    assert np.array_equal(xl.encode_prompt("red", prompt_2="red").context, first.context)
    long = xl.encode_prompt("red", prompt_2=LONG).context
    assert long.shape[1] == xl.encode_prompt(LONG).context.shape[1]
    assert np.array_equal(long[..., 32:], xl.encode_prompt(LONG).context[..., 32:])
    assert xl.count_chunks("red", LONG) == xl.count_chunks(LONG) == long.shape[1] // 77


@pytest.mark.parametrize(
    "text, text_2, wanted",
    [
        ("[a:b:2]", "x", "ax ax bx bx bx bx"),
        ("[a:b:2]", "[x:y:4]", "ax ax bx bx by by"),
        ("[a|b]", "[x|y|z]", "ax by az bx ay bz"),
        ("[a|b]", "[x|y]", "ax by ax by ax by"),
        ("[a|b]", "[x:y:0.5]", "ax bx ax by ay by"),
    ],
)
def test_both_texts_change_by_themselves(text, text_2, wanted):
    for step, letters in enumerate(wanted.split()):
        read = [part for part in parts(text, text_2=text_2) if any(span.holds(step, 6) for span in part.spans)]
        assert ["".join(piece.text for pieces in part.of_encoders for piece in pieces) for part in read] == [letters]


def test_parts_that_guide_together_have_a_second_text_each():
    read = parts("a AND b :0.5", text_2="x AND y :7")
    assert [(*(pieces[0].text.strip() for pieces in part.of_encoders), part.weight) for part in read] == [
        ("a", "x", 1.0),
        ("b", "y", 0.5),
    ]
    assert [part.of_encoders[1][0].text for part in parts("a AND b", text_2="x")] == ["x", "x"]
    with pytest.raises(ValueError, match="has 3 parts and the first one's 2; give it one part, or the same number"):
        parts("a AND b", text_2="x AND y AND z")


def test_second_texts_that_are_refused(sd, xl):
    with pytest.raises(ValueError, match="need a model with two text encoders"):
        sd.encode_prompt("red", prompt_2="cat")
    with pytest.raises(ValueError, match="need a model with two text encoders"):
        next(iter(sd.generate_latents("red", cfg_weight=3.0, negative_prompt_2="cat", num_steps=1)))
    with pytest.raises(ValueError, match="2 prompts of the second encoder for 1; give one, or one for each"):
        xl.encode_prompt("red", prompt_2=["cat", "blue"])
    with pytest.raises(ValueError, match="needs a text prompt"):
        next(iter(xl.generate_latents(xl.encode_prompt("red"), prompt_2="cat", num_steps=1)))
    with pytest.raises(ValueError, match="prompt_2 3 is not a prompt"):
        xl.generate_latents("red", prompt_2=3)

"""What must hold of the pipeline whatever the weights are."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from oracle import last, normal, picture, relative_error
from stable_diffusion import SAMPLERS, SizeConditioning, StableDiffusion, StableDiffusionXL
from stable_diffusion.models.unet import UNet2DConditionModel
from stable_diffusion.models.vae import AutoencoderKL

PROMPT = "the red cat"
SMALL = {"num_steps": 3, "latent_size": (6, 8)}


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The rows of each call of the UNet."""
    rows, call = [], UNet2DConditionModel.__call__
    monkeypatch.setattr(
        UNet2DConditionModel, "__call__", lambda unet, x, *a, **k: rows.append(len(x)) or call(unet, x, *a, **k)
    )
    return rows


def test_the_generator_costs_nothing_until_it_is_evaluated(sd, calls):
    sd.ensure_models_are_loaded()
    before = mx.random.state[0].tolist()
    latents = sd.generate_latents(PROMPT, seed=1, **SMALL)
    assert not calls
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    x_t = next(latents)
    assert len(calls) == 1 and x_t.shape == (1, 6, 8, 4) and x_t.dtype == mx.float32
    assert mx.get_peak_memory() - active < 2**16  # a graph, and no value of it
    assert mx.random.state[0].tolist() == before


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(sd, sampler):
    together = last(sd.generate_latents(PROMPT, n_images=2, seed=7, sampler=sampler, **SMALL))
    for i in range(2):
        alone = last(sd.generate_latents(PROMPT, seed=7 + i, sampler=sampler, **SMALL))
        assert relative_error(together[i : i + 1], alone) <= 1e-4
    assert relative_error(together[:1], together[1:2]) > 0.1


def test_seeds(sd):
    zero, one = (last(sd.generate_latents(PROMPT, seed=s, **SMALL)) for s in (0, 1))
    assert np.array_equal(zero, last(sd.generate_latents(PROMPT, seed=0, **SMALL)))
    assert not np.array_equal(zero, one)
    random = [last(sd.generate_latents(PROMPT, **SMALL)) for _ in range(2)]
    assert not np.array_equal(*random)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_guidance_of_one_is_the_prompt_alone(sd, weight, calls):
    plain = last(sd.generate_latents(PROMPT, cfg_weight=weight, seed=3, **SMALL))
    ignored = last(sd.generate_latents(PROMPT, cfg_weight=weight, negative_text="blue", seed=3, **SMALL))
    assert np.array_equal(plain, ignored) and set(calls) == {1}
    guided = last(sd.generate_latents(PROMPT, cfg_weight=1.0 + 1e-6, negative_text="blue", seed=3, **SMALL))
    assert relative_error(guided, plain) <= 1e-4 and calls[-1] == 2


def test_strength_zero_is_the_round_trip_through_the_autoencoder(sd):
    (only,) = sd.generate_latents_from_image(picture(), PROMPT, strength=0, num_steps=5)
    want = mx.clip(sd.autoencoder(picture()[None]) / 2 + 0.5, 0, 1)
    assert np.array_equal(sd.decode(only), want)


@pytest.mark.parametrize("strength, count", [(0.001, 1), (0.1, 1), (0.29, 2), (0.58, 5), (1.0, 10), (1, 10)])
def test_number_of_steps_from_an_image(sd, strength, count):
    steps = list(sd.generate_latents_from_image(picture(), PROMPT, strength=strength, num_steps=10))
    assert len(steps) == count == sd.number_of_steps(10, strength)
    assert int(50 * 0.58) == 28 and sd.number_of_steps(50, 0.58) == 29  # a rounding error


def test_any_size_and_the_models_own(sd, xl):
    for size in ((5, 9), (1, 3), (7, 16)):
        x = last(sd.generate_latents(PROMPT, num_steps=1, latent_size=size))
        assert x.shape == (1, *size, 4) and sd.decode(mx.array(x)).shape == (1, 8 * size[0], 8 * size[1], 3)
    assert sd.default_latent_size == (8, 8) and xl.default_latent_size == (16, 16)
    assert last(xl.generate_latents(PROMPT, num_steps=1)).shape == (1, 16, 16, 4)


def test_images_are_in_range(sd):
    image = sd.decode(mx.array(normal(2, 4, 4, 4, scale=30.0)))
    assert image.dtype == mx.float32 and float(image.min()) >= 0 and float(image.max()) <= 1


def test_an_autoencoder_that_overflows_while_it_encodes_computes_in_float32(monkeypatch, caplog):
    sd, encode = StableDiffusion("tiny"), AutoencoderKL.encode
    pixels = mx.random.uniform(-1, 1, (1, 64, 64, 3), key=mx.random.key(1))
    expected = sd.encode(pixels)
    sd.sources["autoencoder"].dtype = mx.float16
    del sd.autoencoder

    def overflows(self, x: mx.array, *run) -> tuple[mx.array, mx.array]:
        mean, logvar = encode(self, x, *run)
        return mean * (mx.inf if x.dtype == mx.float16 else 1), logvar

    monkeypatch.setattr(AutoencoderKL, "encode", overflows)
    assert relative_error(sd.encode(pixels), expected) <= 1e-5
    assert (
        sd.dtype == sd.sources["autoencoder"].dtype == mx.float32
        and "switching the autoencoder to float32" in caplog.text
    )


def test_micro_conditioning_reaches_the_unet(xl, monkeypatch):
    seen, embed_time = [], UNet2DConditionModel.embed_time

    def watched(unet, t, dtype, text_time, guidance):
        seen.append(text_time[1])
        return embed_time(unet, t, dtype, text_time, guidance)

    monkeypatch.setattr(UNet2DConditionModel, "embed_time", watched)
    micro = SizeConditioning(original_size=(100, 200), crop=(3, 4), target_size=(50, 60))
    run = {"num_steps": 1, "latent_size": (6, 8), "cfg_weight": 2.0}
    negative = SizeConditioning(crop=(3, 4), negative_original_size=(9, 8), negative_crop=(0, 0))
    for given in (None, micro, negative):
        mx.eval(*xl.generate_latents(PROMPT, micro=given, **run))
    assert seen[0].tolist() == [[48, 64, 0, 0, 48, 64]] * 2
    assert seen[1].tolist() == [[100, 200, 3, 4, 50, 60]] * 2
    assert seen[2].tolist() == [[48, 64, 3, 4, 48, 64], [9, 8, 0, 0, 48, 64]]


def test_parts_may_be_used_and_deleted(sd1_folder, xl_folder):
    sd = StableDiffusion(sd1_folder)
    assert {type(sd.tokenizer).__name__, type(sd.text_encoder).__name__} == {"Tokenizer", "CLIPTextModel"}
    latents = list(sd.generate_latents(PROMPT, seed=1, **SMALL))
    del sd.text_encoder, sd.unet, sd.sampler
    assert sd.decode(latents[-1]).shape == (1, 48, 64, 3)
    xl = StableDiffusionXL(xl_folder)
    xl.ensure_models_are_loaded()
    for name in ("text_encoder_1", "text_encoder_2", "tokenizer_1", "tokenizer_2"):
        delattr(xl, name)
    assert not hasattr(xl, "text_encoder")


@pytest.mark.parametrize("unet_bits, text_bits, bound", [(8, None, 0.1), (8, 4, 0.6)])
def test_quantized_is_close(sd1_folder, sd, unet_bits, text_bits, bound):
    quantized = StableDiffusion(sd1_folder, unet_bits=unet_bits, text_bits=text_bits)
    assert any(isinstance(m, nn.QuantizedLinear) for m in quantized.unet.modules())
    error = relative_error(
        last(quantized.generate_latents(PROMPT, seed=2, **SMALL)), last(sd.generate_latents(PROMPT, seed=2, **SMALL))
    )
    assert 0 < error <= bound


BAD_RUNS = [
    ({"n_images": 0}, "n_images 0 is not a whole number of at least 1"),
    ({"num_steps": [4, 8]}, r"num_steps \[4, 8\] is not a whole number"),
    ({"seed": -1}, "seed -1 is not a whole number of at least 0"),
    ({"seed": 1.5}, "seed 1.5 is not a whole number"),
    ({"seed": [1, -2], "n_images": 2}, "seed -2 is not a whole number"),
    ({"cfg_weight": float("nan")}, "cfg_weight nan is not a finite number"),
    ({"eta": float("nan")}, "eta nan is not a number from 0 to 1"),
    ({"s_noise": float("inf")}, "s_noise inf is not a number of at least 0"),
    ({"negative_text": None}, "negative_text None is not a prompt"),
    ({"latent_size": 64}, r"latent_size 64 must be \(height, width\)"),
    ({"deep_cache": 0}, "deep_cache 0 is not a whole number of at least 1"),
    ({"guidance_interval": (0.6, 0.5)}, r"guidance_interval .* 0 <= start <= end <= 1"),
    ({"guidance_interval": (0, float("nan"))}, r"guidance_interval .* 0 <= start <= end <= 1"),
    ({"guidance_interval": (0.5,)}, r"guidance_interval .* 0 <= start <= end <= 1"),
    ({"pag_scale": -1}, "pag_scale -1 is not a number of at least 0"),
    ({"pag_layers": ()}, "is not a tuple of names"),
    ({"pag_layers": ("mid", "")}, "is not a tuple of names"),
    ({"freeu": (1.5, 1.6, 0.9)}, "is not a tuple of four factors"),
    ({"freeu": (1.5, 1.6, 0.9, -1)}, "freeu -1 is not a number from 0 to 10"),
    ({"guidance_rescale": 2}, "guidance_rescale 2 is not a number from 0 to 1"),
    ({"num_steps": 1001}, "1001 steps"),
    ({"latent_size": (0, 8)}, "latent_size"),
    ({"sampler": "magic"}, "sampler 'magic' is unknown"),
    ({"spacing": "odd"}, "spacing 'odd' is unknown"),
    ({"latents": mx.zeros((1, 4, 4, 4)), "latent_size": (8, 8)}, "do not fit"),
]


@pytest.mark.parametrize("arguments, message", BAD_RUNS, ids=[message for _, message in BAD_RUNS])
def test_bad_arguments_are_refused_at_the_call(sd, arguments, message):
    with pytest.raises(ValueError, match=message):
        sd.generate_latents(PROMPT, **arguments)


BAD_RUNS_FROM_IMAGES = [
    ({"strength": float("nan")}, r"strength nan is not a number from 0 to 1"),
    ({"image": mx.zeros((48, 60, 3))}, r"must be \[H, W, 3\] with sides that are multiples of 8"),
]


@pytest.mark.parametrize("arguments, message", BAD_RUNS_FROM_IMAGES)
def test_bad_arguments_from_an_image_are_refused_at_the_call(sd, arguments, message):
    with pytest.raises(ValueError, match=message):
        sd.generate_latents_from_image(**{"image": picture(), "text": PROMPT} | arguments)

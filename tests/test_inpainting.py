"""What must hold of runs from images, with masks, ControlNets and in two passes, whatever the weights are."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from oracle import last, normal, picture, relative_error
from stable_diffusion import SAMPLERS, Control, StableDiffusion
from stable_diffusion.app.inputs import upscale
from test_parity_images import control_nets

PROMPT = "the red cat"
HEIGHT, WIDTH = 48, 64
SMALL = (HEIGHT // 8, WIDTH // 8)


@pytest.fixture(scope="module")
def net():
    return control_nets("sd1", 1)[1][0]


def flat(value: float) -> mx.array:
    return mx.full((HEIGHT, WIDTH), value)


def corner() -> mx.array:
    """1 in the upper left quarter."""
    values = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
    values[:24, :32] = 1
    return mx.array(values)


def hint(seed: int = 1) -> mx.array:
    return mx.array(abs(normal(HEIGHT, WIDTH, 3, seed=seed)) % 1)


def from_image(sd: StableDiffusion, **options):
    given = {"strength": 0.7, "num_steps": 4, "cfg_weight": 3.0, "seed": 3} | options
    return sd.generate_latents_from_image(picture(), given.pop("text", PROMPT), **given)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_masks_of_white_of_black_and_of_both(sd, sampler):
    """White is image to image, black is the image's own latents, and with both each holds where it is."""
    plain, white, black, both = (
        [np.array(x) for x in from_image(sd, sampler=sampler, mask=mask, num_steps=3, cfg_weight=1.0)]
        for mask in (None, flat(1), flat(0), corner())
    )
    x0 = np.array(sd.encode(picture()[None]))
    assert len(plain) == len(white) == len(black) == len(both)
    assert all(np.array_equal(*pair) for pair in zip(plain, white, strict=True))
    assert np.array_equal(black[-1], x0)
    assert np.array_equal(both[-1][:, 3:], black[-1][:, 3:]) and np.array_equal(both[-1][:, :, 4:], black[-1][:, :, 4:])
    assert relative_error(both[-1][:, :3, :4], black[-1][:, :3, :4]) > 0.1


def test_a_masked_image_does_not_depend_on_its_batch(sd):
    given = {"mask": corner(), "sampler": "dpmpp_sde", "num_steps": 3}
    together = last(from_image(sd, n_images=3, seed=7, **given))
    chosen = last(from_image(sd, n_images=2, seed=[9, 7], **given))
    assert relative_error(together[1:2], last(from_image(sd, seed=8, **given))) <= 1e-4
    assert relative_error(chosen, together[[2, 0]]) <= 1e-4
    assert relative_error(together[:1, :3, :4], together[1:2, :3, :4]) > 0.1


def test_one_pixel_of_a_mask_is_a_latent(sd):
    """The mask may be a picture."""
    pixel, cell = np.zeros((2, HEIGHT, WIDTH), dtype=np.float32)
    pixel[17, 33] = cell[16:24, 32:40] = 1
    made = last(from_image(sd, mask=Image.fromarray((pixel * 255).astype(np.uint8))))
    new = made != np.array(sd.encode(picture()[None]))
    assert new[0, 2, 4].all() and new.sum() == 4
    assert np.array_equal(made, last(from_image(sd, mask=cell)))


# --- ControlNets -----------------------------------------------------------------------------------------------------


def test_a_controlnet_without_effect(sd, net):
    """Of no strength, or for a share of the steps in which no whole step lies."""
    given = {"sampler": "heun", "num_steps": 3, "seed": 1, "latent_size": SMALL}
    plain = last(sd.generate_latents(PROMPT, **given))
    for changes in ({"scale": 0}, {"scale": 0, "guess": True}, {"start": 0.4, "end": 0.6}):
        weak = Control(net, hint(), **changes)
        assert np.array_equal(last(sd.generate_latents(PROMPT, controls=[weak], **given)), plain)
    strong = last(sd.generate_latents(PROMPT, controls=[Control(net, hint())], **given))
    assert relative_error(strong, plain) > 0.01


def test_masks_controls_and_weighted_prompts_together(sd, net):
    """In one batch of two prompts, each image is what it is alone."""
    prompts = ["the (red:1.4) cat AND the blue :0.5", "[the cat:the red:0.5]"]
    given = {"mask": corner(), "controls": [Control(net, hint(), 0.7), Control(net, hint(2), 0.5, end=0.6)]}
    given |= {"num_steps": 5, "negative_text": "(blue:1.2)", "sampler": "dpmpp_2m"}
    together = last(from_image(sd, text=prompts, seed=[4, 9], **given))
    for i, (prompt, seed) in enumerate(zip(prompts, (4, 9), strict=True)):
        alone = last(from_image(sd, text=prompt, seed=seed, **given))
        assert relative_error(together[i : i + 1], alone) <= 1e-4
    x0 = np.array(sd.encode(picture()[None]))
    assert np.array_equal(together[:, 3:], np.concatenate([x0, x0])[:, 3:])
    without = last(from_image(sd, text=prompts, seed=[4, 9], **given | {"controls": ()}))
    assert relative_error(together, without) > 1e-3


# --- two passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, share", [("euler", 0.001), ("heun", 0.4), ("ddim", 0.999), ("euler", 1.0)])
def test_a_run_that_goes_on_is_one_run(sd, sampler, share):
    """With the same model and a sampler that remembers nothing; at 1 the first run is all of it."""
    given = {"num_steps": 5, "seed": 2, "latent_size": SMALL, "sampler": sampler, "cfg_weight": 1.0}
    whole = [np.array(x) for x in sd.generate_latents(PROMPT, **given)]
    first = list(sd.generate_latents(PROMPT, denoising_end=share, **given))
    second = list(sd.generate_latents(PROMPT, denoising_start=share, latents=first[-1], **given))
    assert relative_error(second[-1], whole[-1]) <= 1e-4
    counts = [sd.number_of_steps(5, sampler=sampler, **{f"denoising_{at}": share}) for at in ("end", "start")]
    assert sum(counts) == 5 and [len(first), len(second)] == [max(count, 1) for count in counts]
    if share == 1:
        assert all(np.array_equal(*pair) for pair in zip(first, whole, strict=True))
        assert np.array_equal(second[0], whole[-1])


def test_a_run_from_an_image_that_another_goes_on_with(sd):
    given = {"num_steps": 6, "sampler": "euler", "cfg_weight": 3.0, "seed": 2}
    whole = last(from_image(sd, strength=0.8, **given))
    *_, x = from_image(sd, strength=0.8, denoising_end=0.5, **given)
    rest = sd.generate_latents(PROMPT, denoising_start=0.5, latents=x, latent_size=SMALL, **given)
    assert relative_error(last(rest), whole) <= 1e-4


def test_a_second_pass_that_changes_nothing(sd):
    first = list(sd.generate_latents(PROMPT, n_images=2, num_steps=2, seed=0, latent_size=SMALL))[-1]
    assert upscale(sd, first, SMALL, "latents") is first
    (same,) = sd.generate_latents_from_image(first, PROMPT, n_images=2, strength=0)
    assert np.array_equal(same, first)
    # the less strength, the nearer, down to the first pass itself
    distances = []
    for sigma in (1.0, 0.1, 0.01, 0.001):
        again = sd.generate_latents_from_image(first, PROMPT, n_images=2, strength=1, sigmas=[sigma, 0.0], seed=1)
        distances.append(relative_error(last(again), first))
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-2


def test_latents_to_work_on_one_for_each_image_or_one_for_all(sd):
    first = list(sd.generate_latents(PROMPT, n_images=2, num_steps=2, seed=0, latent_size=SMALL))[-1]
    given = {"num_steps": 3, "strength": 0.7, "cfg_weight": 3.0}
    each = last(sd.generate_latents_from_image(first, PROMPT, n_images=2, seed=5, **given))
    for i in range(2):
        alone = last(sd.generate_latents_from_image(first[i : i + 1], PROMPT, seed=5 + i, **given))
        assert relative_error(each[i : i + 1], alone) <= 1e-4
    shared = last(sd.generate_latents_from_image(first[:1], PROMPT, n_images=2, seed=5, **given))
    assert relative_error(shared[:1], each[:1]) <= 1e-4 and relative_error(shared[1:], each[1:]) > 1e-2


def test_enlarged(sd):
    x = mx.array(normal(2, *SMALL, 4))
    for how in ("latents", "pixels"):
        larger = upscale(sd, x, (12, 16), how)
        apart = mx.concatenate([upscale(sd, x[i : i + 1], (12, 16), how) for i in range(2)])
        assert larger.shape == (2, 12, 16, 4) and relative_error(larger, apart) <= 1e-4
    ones = upscale(sd, mx.ones((1, *SMALL, 4)), (9, 11), "latents")  # the middle of four is their mean
    assert relative_error(ones, np.ones((1, 9, 11, 4))) <= 1e-6


# --- what is refused -------------------------------------------------------------------------------------------------

BAD_FROM_IMAGE = [
    ({"mask": mx.zeros((HEIGHT, WIDTH + 8))}, r"mask of shape \(48, 72\) must be \(48, 64\)"),
    ({"mask": flat(1.01)}, "values of a mask must lie between 0"),
    ({"seed": [1, 2]}, "2 seeds for 1 images"),
    ({"latents": mx.zeros((2, *SMALL, 4))}, "do not fit"),
    ({"denoising_end": 0.0}, "cannot denoise from 0.0 to 0.0"),
    ({"denoising_end": 1.5}, "denoising_end 1.5 is not a number from 0 to 1"),
]


@pytest.mark.parametrize("options, message", BAD_FROM_IMAGE)
def test_bad_runs_from_images_are_refused_at_the_call(sd, options, message):
    with pytest.raises(ValueError, match=message):
        from_image(sd, **options)


def test_bad_runs_are_refused_at_the_call(sd):
    latents = mx.zeros((1, *SMALL, 4))
    for options, message in (
        ({"denoising_start": 0.5}, "denoising_start 0.5 needs the latents"),
        ({"denoising_start": 0.5, "latents": latents[:, :2]}, "do not fit"),
        ({"denoising_start": 0.8, "denoising_end": 0.5, "latents": latents}, "cannot denoise from 0.8 to 0.5"),
        ({"seed": []}, "0 seeds for 1 images"),
    ):
        with pytest.raises(ValueError, match=message):
            sd.generate_latents(PROMPT, latent_size=SMALL, **options)


def test_a_mask_needs_an_image(sd):
    with pytest.raises(ValueError, match="a mask needs an image, not latents"):
        sd.generate_latents_from_image(mx.zeros((1, *SMALL, 4)), PROMPT, mask=flat(1))
    with pytest.raises(ValueError, match="2 initial latents for 3 images"):
        sd.generate_latents_from_image(mx.zeros((2, *SMALL, 4)), PROMPT, n_images=3)


def test_control_images_of_the_wrong_size(sd, net):
    for shape in ((WIDTH, HEIGHT, 3), (1, HEIGHT, WIDTH, 3)):
        controls = [Control(net, mx.zeros(shape))]
        for run in (from_image, lambda sd, **given: sd.generate_latents(PROMPT, latent_size=SMALL, **given)):
            with pytest.raises(ValueError, match=r"image of shape .* does not fit: this run needs \(48, 64, 3\)"):
                run(sd, controls=controls)


BAD_NUMBERS = {"scale inf .* finite number": {"scale": float("inf")}, "from 0.5 to 0.5": {"start": 0.5, "end": 0.5}}
BAD_NUMBERS |= {"from -0.1 to": {"start": -0.1}, "to nan": {"end": float("nan")}}


@pytest.mark.parametrize("message", BAD_NUMBERS)
def test_controls_with_bad_numbers(net, message):
    with pytest.raises(ValueError, match=message):
        Control(net, hint(), **BAD_NUMBERS[message])

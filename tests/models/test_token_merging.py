"""Token merging: against a loop over positions, and in the UNet where it belongs."""

import mlx.core as mx
import numpy as np
import pytest

from oracle import normal, relative_error
from stable_diffusion.models.token_merging import attend_merged

PROMPT = "the red cat"
SMALL = {"latent_size": (8, 10), "seed": 3, "num_steps": 2, "cfg_weight": 5.0}


def by_hand(attend, x: np.ndarray, size: tuple[int, int], ratio: float) -> np.ndarray:
    """Position by position. ``attend`` must not care about their order."""
    height, width = size
    into = [r * width + c for r in range(0, height, 2) for c in range(0, width, 2)]
    rest = [i for i in range(height * width) if i not in into]
    out = np.zeros_like(x)
    for tokens, results in zip(x, out, strict=True):
        unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
        alike = {i: max((float(unit[i] @ unit[j]), j) for j in into) for i in rest}
        merged = sorted(rest, key=lambda i: -alike[i][0])[: int(ratio * len(tokens))]
        groups = {j: [j, *(i for i in merged if alike[i][1] == j)] for j in into}
        groups |= {i: [i] for i in rest if i not in merged}
        means = np.stack([tokens[group].mean(axis=0) for group in groups.values()])
        for group, result in zip(groups.values(), np.array(attend(mx.array(means)[None]))[0], strict=True):
            results[group] = result
    return out


@pytest.mark.parametrize("size, ratio", [((4, 6), 0.0), ((4, 6), 0.25), ((5, 7), 0.75), ((1, 4), 0.5)])
def test_against_a_loop(size, ratio):
    x = normal(2, size[0] * size[1], 16, seed=1)

    def attend(y: mx.array) -> mx.array:  # to every position, its own value a little more
        return mx.softmax(y @ y.swapaxes(1, 2), axis=-1) @ y + 0.5 * y

    def rows(y: mx.array, b: int) -> mx.array:  # of one matrix, as the UNet's attention takes them
        return attend(y.reshape(b, -1, 16)).reshape(y.shape)

    merged = attend_merged(rows, mx.array(x).reshape(-1, 16), (2, *size), ratio)
    assert relative_error(merged.reshape(x.shape), by_hand(attend, x, size, ratio)) <= 1e-5


def test_in_half_precision():
    x = mx.array(normal(24, 16, seed=1))
    half = attend_merged(lambda y, b: y, x.astype(mx.float16), (1, 4, 6), 0.5)
    assert half.dtype == mx.float16 and half.shape == x.shape


def test_only_the_largest_self_attentions_of_the_unet_see_less(sd, monkeypatch):
    lengths: set[int] = set()
    attention = type(sd.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1)
    call = attention.__call__

    def watched(self, x, b, context=None, **perturbed):
        if context is None:
            lengths.add(len(x) // b)
        return call(self, x, b, context, **perturbed)

    monkeypatch.setattr(attention, "__call__", watched)
    x, context = mx.array(normal(1, 8, 12, 4, seed=0)), mx.array(normal(1, 77, 32, seed=1))
    temb = sd.unet.embed_time(500.0, mx.float32)
    out = sd.unet(x, temb, context, tome_ratio=0.5)
    merged = lengths.copy()
    lengths.clear()
    assert relative_error(out, sd.unet(x, temb, context)) > 1e-4
    assert 96 in lengths and merged == (lengths - {96}) | {48}


def test_nothing_merged_is_exact_and_an_image_depends_on_no_other(sd):
    plain, none, batch = (
        list(sd.generate_latents(PROMPT, n_images=2, **SMALL | options))[-1]
        for options in ({}, {"token_merging": 0.0}, {"token_merging": 0.5})
    )
    single = list(sd.generate_latents(PROMPT, token_merging=0.5, **SMALL | {"seed": 4}))[-1]
    assert mx.array_equal(plain, none) and relative_error(batch[1:], single) <= 1e-3
    assert 1e-5 < relative_error(batch, plain) < 1

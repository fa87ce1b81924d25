"""Image prompts in a run (IP-Adapter, Ye et al. 2023): which cross-attentions they act on, how much, when, where."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.ip_adapter import ImageTokens, IPAdapter
from ..models.unet import UNet2DConditionModel, attentions, find_attentions
from .controls import Acting
from .guidance import GuidanceBatch

Tokens = tuple[mx.array, mx.array]

# The parts of XL's UNet for the style and the layout of an image prompt (InstantStyle, Wang et al. 2024).
_STYLE, _LAYOUT = {"up_blocks.0.attentions.1": 1.0}, {"down_blocks.2.attentions.1": 1.0}
PRESETS = {"style": _STYLE, "layout": _LAYOUT, "style+layout": _STYLE | _LAYOUT}


def read_scales(text: str) -> Mapping[str, float] | str:
    """Read the ``scales`` of an image prompt: the name of a preset, or "up_blocks.0=1,mid=0.5"."""
    if text in PRESETS:
        return text
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    try:
        return {name: float(number) for name, number in pairs}
    except ValueError:
        remedy = f"give {', '.join(PRESETS)}, or parts of the UNet: up_blocks.0=1,mid=0.5"
        raise ValueError(f"{text!r} names no scales of an image prompt; {remedy}") from None


@dataclass(frozen=True)
class ImagePrompt(Acting):
    """Describe an image prompt, which acts beside the text prompt. Several image prompts add up.

    Args:
        adapter: the result of ``StableDiffusion.load_ip_adapter``.
        image: a path, a PIL image or an array [H, W, 3] in [-1, 1]; or a list of them, which are combined.
        scale: factor on the adapter's attention output; at 0 it has no effect.
        start: fraction of the steps, 0 ... 1, at which the image prompt begins to act.
        end: fraction of the steps at which it ends.
        mask: an array [H, W] in [0, 1], of the output's size. The image prompt acts where it is 1.
        scales: factors for parts of the UNet, named as in ``pag_layers``: {"up_blocks.0": 1, "mid": 0.5}. All other
            parts have 0. A preset, "style", "layout" or "style+layout", names the parts of SDXL (InstantStyle, Wang et
            al. 2024). Default: 1 for all.
        tokens: the result of ``encode_image_prompt``, instead of the image: tokens for all images of a run [1, M, D] or
            for each of them [n, M, D].

    Raises ValueError for numbers out of range, an unknown preset, or if both image and tokens are missing.
    """

    adapter: IPAdapter
    image: Any = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: mx.array | None = None
    scales: Mapping[str, float] | str | None = None
    tokens: Tokens | None = None

    def __post_init__(self) -> None:
        self.check_strength("an IP-Adapter")
        if self.image is None and self.tokens is None:
            raise ValueError("an image prompt needs an image: ImagePrompt(adapter, image)")
        if self.mask is not None and getattr(self.mask, "ndim", 0) != 2:
            raise ValueError("an image prompt's mask is not an array [H, W]; give one in [0, 1], of the output's size")
        if isinstance(self.scales, str) and self.scales not in PRESETS:
            text = f"scales {self.scales!r} is unknown; give {', '.join(PRESETS)}"
            raise ValueError(f'{text} or names of parts with factors: {{"up_blocks.0": 1}}')
        for name, factor in self._factors.items():
            if not isinstance(factor, int | float) or not math.isfinite(factor):
                raise ValueError(f"the scale {factor!r} of {name!r} is not a finite number")

    @property
    def _factors(self) -> Mapping[str, float]:
        return PRESETS[self.scales] if isinstance(self.scales, str) else self.scales or {}

    def encoded(self, encode: Callable[[IPAdapter, Any], Tokens]) -> "ImagePrompt":
        """Return the prompt with the tokens from ``encode``; tokens of several images are joined."""
        if self.tokens is not None:
            return self
        tokens, negative = encode(self.adapter, self.image)
        return replace(self, image=None, tokens=(tokens.flatten(0, 1)[None], negative))

    def layers(self, unet: UNet2DConditionModel) -> dict[int, tuple[nn.Linear, nn.Linear, float]]:
        """Return the projections and the scale of each cross-attention with a nonzero scale, by number.

        If two names match a layer, the longer one counts. Raises ValueError for a part without cross-attention.
        """
        numbers = list(attentions(unet, "cross").values())
        scales = dict.fromkeys(numbers, self.scale if self.scales is None else 0.0)
        for name, factor in sorted(self._factors.items(), key=lambda pair: len(pair[0])):
            scales |= dict.fromkeys(find_attentions(unet, [name], "cross"), self.scale * factor)
        rows = zip(numbers, self.adapter.keys_and_values, strict=True)
        return {number: (*pair, scales[number]) for number, pair in rows if scales[number]}

    def of_rows(self, rows: GuidanceBatch, unet: UNet2DConditionModel, dtype: mx.Dtype) -> ImageTokens:
        """Return the tokens of a batch's rows: image tokens for conditional rows, negative tokens for the others."""
        tokens, negative = self.tokens
        tokens = tokens[rows.images] if len(tokens) > 1 else tokens
        negative = mx.tile(negative, (1, tokens.shape[1] // negative.shape[1], 1))
        of_rows = mx.where(rows.is_cond[:, None, None], tokens, negative)
        return ImageTokens(of_rows.astype(dtype), self.layers(unet), self.mask)


def check_image_prompts(
    prompts: Sequence[ImagePrompt], unet: UNet2DConditionModel, n_images: int, size: tuple[int, int]
) -> None:
    """Raise ValueError for image prompts that do not fit the UNet, or a run of ``n_images`` of ``size`` (H, W)."""
    for prompt in prompts:
        prompt.adapter.config.check_fits(unet.config)
        prompt.layers(unet)
        if prompt.tokens is not None and len(prompt.tokens[0]) not in (1, n_images):
            raise ValueError(f"{len(prompt.tokens[0])} image prompts for {n_images} images; give one, or one for each")
        if prompt.mask is not None and prompt.mask.shape != size:
            raise ValueError(f"a mask of shape {prompt.mask.shape} does not fit: this run needs {size}")

"""A checkpoint's parts, read and ready to be asked: networks, tokenizers, noise schedule; and what is added to them."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import mlx.core as mx

from .conditioning import Conditioning, concatenate, encode, same_length
from .config import ScheduleConfig, readable
from .depth import estimate_depth, load_depth_estimator
from .models.clip import CLIPTextModel
from .samplers import sampler_for
from .schedule import Schedule
from .start import MODES
from .tokenizer import Tokenizer
from .weights.embeddings import read_embedding
from .weights.files import open_checkpoint
from .weights.load import load_component

_log = logging.getLogger("stable_diffusion")

_UNET_GROUP, _TEXT_GROUP = 32, 64  # values that share a quantization scale

# The pipelines in which diffusers reads any steps_offset as 1: old files lack it, and were trained with 1.
_OFFSET_ONE = {f"StableDiffusion{mode}Pipeline" for mode in ("", "Img2Img", "Inpaint")}


class DiffusionModel:
    """What ``StableDiffusion`` is without its generators of latents; see there.

    ``mode`` says what the UNet works from, one of ``start.MODES``.
    """

    default_model: str

    def __init__(
        self,
        model: str | PathLike | None = None,
        float16: bool = False,
        *,
        revision: str | None = None,
        unet_bits: int | None = None,
        text_bits: int | None = None,
    ):
        self._source, self._revision = self.default_model if model is None else model, revision
        checkpoint = open_checkpoint(self._source, float16=float16, revision=revision)
        self.dtype = mx.float16 if float16 else mx.float32
        with readable("scheduler config"):
            levels = ScheduleConfig.from_dict(checkpoint.scheduler)
            if checkpoint.pipeline in _OFFSET_ONE:
                levels = replace(levels, steps_offset=1)
            self.schedule = Schedule(levels)
        self.sampler = self._default_sampler()
        self.default_steps, self.default_guidance = checkpoint.steps, checkpoint.guidance
        parts, tokenizers = checkpoint.components, checkpoint.tokenizers
        self._encoders: list[tuple[str, str]] = []
        for name in sorted(tokenizers):
            encoder = name.replace("tokenizer", "text_encoder")
            suffix = "" if len(tokenizers) == 1 else "_2" if name.endswith("_2") else "_1"
            self._encoders.append((f"tokenizer{suffix}", f"text_encoder{suffix}"))
            setattr(self, f"tokenizer{suffix}", Tokenizer.from_folder(tokenizers[name]))
            quantization = None if text_bits is None else (text_bits, _TEXT_GROUP)
            setattr(self, f"text_encoder{suffix}", load_component(parts[encoder], self.dtype, quantization))
        self.unet = load_component(parts["unet"], self.dtype, None if unet_bits is None else (unet_bits, _UNET_GROUP))
        self.autoencoder = load_component(parts["vae"], mx.float32)
        self._unet_config, self._scale = self.unet.config, self.autoencoder.config.scale
        extra = self._unet_config.in_channels - self.autoencoder.latent_channels
        if extra not in MODES:
            raise ValueError(f"a UNet with {extra} channels beside the latents is not supported")
        self.mode = MODES[extra]
        self._zero_empty_prompt = bool(checkpoint.index.get("force_zeros_for_empty_prompt", False))
        self._scores_aesthetics = bool(checkpoint.index.get("requires_aesthetics_score", False))

    def _default_sampler(self) -> str:
        config = self.schedule.config
        name, exact = sampler_for(config.class_name, config.algorithm_type)
        if not exact or config.not_followed:
            asked = ", ".join((config.class_name, *config.not_followed))
            _log.info("the checkpoint asks for %s; the nearest sampler here is %s", asked, name)
        return name

    @property
    def default_latent_size(self) -> tuple[int, int]:
        """(height, width) of the latents that the model was trained on; pixels are 8 times as many."""
        size = 64 if self._unet_config.sample_size is None else self._unet_config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def pixels_per_latent(self) -> int:
        """Pixels of an image for one position of its latent, in each direction: 8 for the published models."""
        return self._scale

    def ensure_models_are_loaded(self) -> None:
        """Read all weights now rather than when they are first needed."""
        mx.eval([getattr(self, encoder).parameters() for _, encoder in self._encoders])
        mx.eval(self.unet.parameters(), self.autoencoder.parameters())

    def decode(self, x_t: mx.array) -> mx.array:
        """Latents [n, h, w, 4] -> images [n, 8h, 8w, 3], float32 in [0, 1]."""
        return mx.clip(self.autoencoder.decode(x_t.astype(mx.float32)) / 2 + 0.5, 0, 1)

    def estimate_depth(self, image: Any) -> mx.array:
        """The depth map [S, S] of a picture, larger is nearer, by the estimator that comes with checkpoints for depth.

        The estimator is read for this and let go of. Raises ValueError or OSError where the checkpoint has none.
        """
        return estimate_depth(load_depth_estimator(self._source, revision=self._revision), image)

    def encode_prompt(
        self,
        text: str | Sequence[str],
        *,
        clip_skip: int = 0,
        emphasis: str = "mean",
        truncate: bool = False,
        weight_blocks: bool = False,
    ) -> Conditioning:
        """Encode prompts with every text encoder, to be given to ``generate_latents`` in place of the text.

        The encoders may be deleted afterwards. The arguments, the result (a row for each prompt) and the errors are
        those of :func:`stable_diffusion.conditioning.encode`.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("there is no prompt; give one, which may be empty")
        options = {"clip_skip": clip_skip, "emphasis": emphasis, "truncate": truncate, "weight_blocks": weight_blocks}
        encoded = [encode(one, self._text_encoders(), xl=self._is_xl, **options) for one in texts]
        return concatenate(self._same_length(encoded))

    def load_embedding(self, path: str | PathLike, word: str | None = None) -> str:
        """Add a textual inversion embedding (Gal et al. 2023); returns the word that stands for it in prompts.

        Args:
            path: a .safetensors file, see :func:`stable_diffusion.weights.embeddings.read_embedding`.
            word: the word; None is the file's own.

        Raises ValueError where the file is no embedding or its width is not that of this model's text encoders.
        """
        name, vectors = read_embedding(path)
        word = name if word is None else word
        encoders = self._text_encoders()
        if self._is_xl and len(encoders) == 1:  # the refiner reads with OpenCLIP-G alone
            vectors = vectors[-1:]
        if len(vectors) != len(encoders):
            raise ValueError(f"{path} has vectors for {len(vectors)} text encoders; this model has {len(encoders)}")
        try:
            for (tokenizer, encoder), table in zip(encoders, vectors, strict=True):
                tokenizer.add(word, encoder.text_model.embeddings.add(table))
        except ValueError as error:
            raise ValueError(f"{path} is for another family of models: {error}") from error
        return word

    def _text_encoders(self) -> list[tuple[Tokenizer, CLIPTextModel]]:
        return [(getattr(self, tokenizer), getattr(self, encoder)) for tokenizer, encoder in self._encoders]

    def _same_length(self, conditionings: list[Conditioning]) -> list[Conditioning]:
        """The same with as many chunks as the longest of them has."""
        return same_length(conditionings, lambda: self.encode_prompt("").context)

    @property
    def _is_xl(self) -> bool:
        return self._unet_config.addition_embed_type == "text_time"

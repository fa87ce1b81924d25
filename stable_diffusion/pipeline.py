"""StableDiffusion: a checkpoint's parts, composed into a generator of latents."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import mlx.core as mx

from .conditioning import Conditioning, MicroConditioning, concatenate, encode, same_length
from .config import ScheduleConfig, readable
from .denoise import consistency, denoiser
from .guidance import guidance_embedding, stages
from .image import to_array
from .plan import Run, plan, share_of_steps
from .samplers import Noise, States, read_name, sampler_for
from .schedule import Schedule
from .tokenizer import Tokenizer
from .weights.embeddings import read_embedding
from .weights.files import open_checkpoint
from .weights.load import load_component

_log = logging.getLogger("stable_diffusion")

Prompt = str | Sequence[str] | Conditioning

_UNET_GROUP, _TEXT_GROUP = 32, 64  # values that share a quantization scale


class StableDiffusion:
    """Stable Diffusion 1.x, 2.x or XL, whichever ``model`` is.

    Args:
        model: an alias ("sdxl", "sd15", "tiny", ...), a Hub id or a folder in diffusers layout; None is the class's
            default model.
        float16: compute text encoders and UNet in half precision, and read half-precision files. The autoencoder
            stays in float32, where it cannot overflow.
        revision: branch, tag or commit of a Hub repository.
        unet_bits: quantize the UNet to so many bits (2, 3, 4, 5, 6 or 8).
        text_bits: the same for the text encoders.

    The parts are attributes that may be used, quantized or deleted on their own: ``unet``, ``autoencoder``,
    ``sampler`` (a name) and ``schedule``; ``text_encoder`` and ``tokenizer``, which XL has twice, as ``..._1`` and
    ``..._2``. Weights are read when they are first needed.

    Raises ValueError or OSError, one line, for a model that cannot be found, read or run.
    """

    default_model = "stabilityai/stable-diffusion-2-1-base"

    def __init__(
        self,
        model: str | PathLike | None = None,
        float16: bool = False,
        *,
        revision: str | None = None,
        unet_bits: int | None = None,
        text_bits: int | None = None,
    ):
        checkpoint = open_checkpoint(self.default_model if model is None else model, float16=float16, revision=revision)
        self.dtype = mx.float16 if float16 else mx.float32
        with readable("scheduler config"):
            levels = ScheduleConfig.from_dict(checkpoint.scheduler)
            if checkpoint.pipeline.startswith("StableDiffusion") and "XL" not in checkpoint.pipeline:
                # Old files of SD 1 and 2 lack the offset, or say 0, and were trained with 1; diffusers' pipelines know.
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

    def number_of_steps(self, num_steps: int | None = None, strength: float = 1.0) -> int:
        """How many latents a run yields: ``num_steps`` (None: the model's default), of which an image takes its share.

        That share is rounded down as diffusers does, but it is at least one step while ``strength`` is above 0.
        """
        return share_of_steps(self.default_steps if num_steps is None else num_steps, strength)

    def ensure_models_are_loaded(self) -> None:
        """Read all weights now rather than when they are first needed."""
        mx.eval([getattr(self, encoder).parameters() for _, encoder in self._encoders])
        mx.eval(self.unet.parameters(), self.autoencoder.parameters())

    def generate_latents(
        self,
        text: Prompt,
        n_images: int = 1,
        num_steps: int | None = None,
        cfg_weight: float | None = None,
        negative_text: Prompt = "",
        latent_size: tuple[int, int] | None = None,
        seed: int | None = None,
        *,
        sampler: str | Callable[..., States] | None = None,
        schedule: str | None = None,
        spacing: str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
        s_noise: float | None = None,
        clip_skip: int = 0,
        micro: MicroConditioning | None = None,
        latents: mx.array | None = None,
        noise: Noise | None = None,
    ) -> Iterator[mx.array]:
        """Turn a prompt into latents, one yield for each step.

        Args:
            text: the prompt, in the language of ``prompt.py``; or a list of prompts; or what ``encode_prompt`` made.
            n_images: how many images to make of each prompt, all at once.
            num_steps: sampler steps; None is the model's default.
            cfg_weight: scale of classifier-free guidance (Ho & Salimans 2022). At 1 or below there is none, and
                ``negative_text`` has no effect. None is the model's default.
            negative_text: what to steer away from: one for all, or a list with one for each prompt.
            latent_size: (height, width) of the latents, an eighth of the pixels; None is the model's own.
            seed: of the first image; image i uses ``seed + i`` and does not depend on the others. None is random.
            sampler: a name in ``SAMPLERS``, or as others write it ("DPM++ 2M Karras"), or a function with the
                signature of those in ``samplers``; None is the checkpoint's own.
            schedule: the curve of the noise levels, one of ``schedule.SCHEDULES``; None is the sampler name's, if it
                has one, or the checkpoint's own.
            spacing: of the timesteps: "leading", "trailing" or "linspace"; None is the checkpoint's own.
            timesteps: the steps themselves, descending, in place of their number and spacing.
            sigmas: the same as noise levels, of which the last is where the run ends.
            eta: fraction of fresh noise for the samplers that have one.
            s_noise: factor on that noise.
            clip_skip: how many of the text encoder's last layers to leave out.
            micro: SDXL's size conditioning.
            latents: the initial noise [n, h, w, 4], unit normal, in place of the seed's.
            noise: ``noise(step, shape)`` gives what a stochastic sampler injects, in place of the seed's.

        Yields:
            Latents [n, h, w, 4], float32, not yet computed, in the scale of training (variance preserving); the last
            is the image, and ``decode`` shows any of them.

        Raises:
            ValueError: a number out of range, an unknown name, or latents of the wrong shape.
        """
        total = n_images * _rows(text)
        run = self._plan(
            sampler,
            schedule,
            cfg_weight,
            n_images=total,
            num_steps=num_steps,
            seed=seed,
            spacing=spacing,
            timesteps=timesteps,
            sigmas=sigmas,
            eta=eta,
            s_noise=s_noise,
            latents=latents,
            noise=noise,
        )
        size = self.default_latent_size if latent_size is None else tuple(latent_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"latent_size {latent_size} must be (height, width), each at least 1")
        self._check_latents(latents, total, size)

        def start() -> mx.array:
            return run.scale * run.initial_noise((*size, self.autoencoder.latent_channels))

        return self._sample(run, start, size, text, negative_text, clip_skip, micro)

    def generate_latents_from_image(
        self,
        image: Any,
        text: Prompt,
        n_images: int = 1,
        strength: float = 0.8,
        num_steps: int | None = None,
        cfg_weight: float | None = None,
        negative_text: Prompt = "",
        seed: int | None = None,
        *,
        sampler: str | Callable[..., States] | None = None,
        schedule: str | None = None,
        spacing: str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
        s_noise: float | None = None,
        clip_skip: int = 0,
        micro: MicroConditioning | None = None,
        latents: mx.array | None = None,
        noise: Noise | None = None,
    ) -> Iterator[mx.array]:
        """Change an image towards a prompt (Meng et al. 2022): noise it part of the way, then denoise it.

        Args:
            image: [H, W, 3] in [-1, 1], or a PIL image; both sides multiples of 8.
            strength: how much of the way, 0 ... 1. Of ``num_steps`` this fraction is done, at least one step; at 0 the
                image's own latents are the only yield.

        The other arguments, the yields and the errors are those of :meth:`generate_latents`; ``latents`` is the noise
        added to the image.
        """
        pixels = mx.array(to_array(image.convert("RGB")) if hasattr(image, "convert") else image, dtype=mx.float32)
        unit = self.pixels_per_latent
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] % unit or pixels.shape[1] % unit:
            raise ValueError(f"image of shape {pixels.shape} must be [H, W, 3] with sides that are multiples of {unit}")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength {strength} is outside 0 ... 1")
        total = n_images * _rows(text)
        run = self._plan(
            sampler,
            schedule,
            cfg_weight,
            n_images=total,
            num_steps=num_steps,
            seed=seed,
            strength=strength,
            spacing=spacing,
            timesteps=timesteps,
            sigmas=sigmas,
            eta=eta,
            s_noise=s_noise,
            latents=latents,
            noise=noise,
        )
        size = (pixels.shape[0] // unit, pixels.shape[1] // unit)
        self._check_latents(latents, total, size)

        def start() -> mx.array:
            # The mean of the posterior: its spread is far below one grey level, and a run needs no further randomness.
            mean, _ = self.autoencoder.encode(pixels[None])
            x0 = mx.broadcast_to(mean, (total, *mean.shape[1:]))
            return x0 + run.steps.sigmas[0] * run.initial_noise(x0.shape[1:]) if len(run.steps) else x0

        return self._sample(run, start, size, text, negative_text, clip_skip, micro)

    def decode(self, x_t: mx.array) -> mx.array:
        """Latents [n, h, w, 4] -> images [n, 8h, 8w, 3], float32 in [0, 1]."""
        return mx.clip(self.autoencoder.decode(x_t.astype(mx.float32)) / 2 + 0.5, 0, 1)

    def _plan(
        self,
        sampler: str | Callable[..., States] | None,
        schedule: str | None,
        cfg_weight: float | None,
        **choices: Any,
    ) -> Run:
        sampler = self.sampler if sampler is None else sampler
        if schedule is None and isinstance(sampler, str):
            schedule = read_name(sampler)[1]
        if schedule == "align_your_steps" and self._is_xl:
            schedule = "align_your_steps_xl"
        return plan(
            self.schedule,
            sampler=sampler,
            schedule=schedule,
            guidance=self.default_guidance if cfg_weight is None else cfg_weight,
            default_steps=self.default_steps,
            **choices,
        )

    def _check_latents(self, latents: mx.array | None, n_images: int, size: tuple[int, ...]) -> None:
        wanted = (n_images, *size, self.autoencoder.latent_channels)
        if latents is not None and latents.shape != wanted:
            raise ValueError(f"latents of shape {latents.shape} do not fit: this run needs {wanted}")

    def _sample(
        self,
        run: Run,
        start: Callable[[], mx.array],
        size: tuple[int, ...],
        text: Prompt,
        negative_text: Prompt,
        clip_skip: int,
        micro: MicroConditioning | None,
    ) -> Iterator[mx.array]:
        x = start()
        if not len(run.steps):
            yield x
            return
        conditioning, negative = self._condition(
            run, size, text, negative_text, clip_skip, micro or MicroConditioning()
        )
        parts = stages(len(run.steps), run.n_images, conditioning, negative, run.guidance)
        denoise = denoiser(self.unet, self.schedule, run.steps, self.dtype, parts)
        if run.sampler.consistency:
            denoise = consistency(denoise, self.schedule, run.steps)
        sigmas = run.steps.sigmas
        states = run.sampler.run(denoise, x, sigmas, run.step_noise, **run.sampler_options)
        for x, sigma in zip(states, sigmas[1:], strict=True):
            yield x / math.sqrt(sigma**2 + 1)

    def _condition(
        self,
        run: Run,
        size: tuple[int, ...],
        text: Prompt,
        negative_text: Prompt,
        clip_skip: int,
        micro: MicroConditioning,
    ) -> tuple[Conditioning, Conditioning | None]:
        """What the UNet is told of the prompts and, where guidance needs it, of the negative ones."""
        positive = self._read(text, clip_skip)
        if dim := self._unet_config.time_cond_proj_dim:
            embedding = guidance_embedding(run.guidance, dim).astype(self.dtype)
            positive = replace(positive, guidance=mx.repeat(embedding, len(positive.rows), axis=0))
        positive = self._with_sizes(positive, size, micro, micro.aesthetic_score)
        if run.guidance <= 1 or dim:
            return positive, None
        negative = self._read(negative_text, clip_skip)
        if self._zero_empty_prompt and isinstance(negative_text, str) and not negative_text:
            negative = negative.map(mx.zeros_like)
        if len(negative) not in (1, len(positive)):
            raise ValueError(f"{len(negative)} negative prompts for {len(positive)} prompts; give one, or one for each")
        negative = self._with_sizes(negative, size, micro, micro.negative_aesthetic_score)
        positive, negative = self._same_length([positive, negative])
        return positive, negative

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
        encoders = [(getattr(self, tokenizer), getattr(self, encoder)) for tokenizer, encoder in self._encoders]
        options = {"clip_skip": clip_skip, "emphasis": emphasis, "truncate": truncate, "weight_blocks": weight_blocks}
        return concatenate(self._same_length([encode(t, encoders, xl=self._is_xl, **options) for t in texts]))

    def load_embedding(self, path: str | PathLike, word: str | None = None) -> str:
        """Add a textual inversion embedding (Gal et al. 2023); returns the word that stands for it in prompts.

        Args:
            path: a .safetensors file, see :func:`stable_diffusion.weights.embeddings.read_embedding`.
            word: the word; None is the file's own.

        Raises ValueError where the file is no embedding or its width is not that of this model's text encoders.
        """
        name, vectors = read_embedding(path)
        word = name if word is None else word
        encoders = [(getattr(self, tokenizer), getattr(self, encoder)) for tokenizer, encoder in self._encoders]
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

    def _read(self, text: Prompt, clip_skip: int) -> Conditioning:
        return text if isinstance(text, Conditioning) else self.encode_prompt(text, clip_skip=clip_skip)

    def _same_length(self, conditionings: list[Conditioning]) -> list[Conditioning]:
        """The same with as many chunks as the longest of them has."""
        return same_length(conditionings, lambda: self.encode_prompt("").context)

    @property
    def _is_xl(self) -> bool:
        return self._unet_config.addition_embed_type == "text_time"

    def _with_sizes(
        self, conditioning: Conditioning, size: tuple[int, ...], micro: MicroConditioning, score: float
    ) -> Conditioning:
        """Add XL's time ids; other models have none."""
        if not self._is_xl:
            return conditioning
        pixels = tuple(self.pixels_per_latent * side for side in size)
        last = (score,) if self._scores_aesthetics else micro.target_size or pixels
        ids = mx.array(
            [[*(micro.original_size or pixels), *micro.crop, *last]] * len(conditioning.rows), dtype=mx.float32
        )
        return replace(conditioning, time_ids=ids)


class StableDiffusionXL(StableDiffusion):
    """The same, with SDXL-Turbo as the model that None stands for."""

    default_model = "stabilityai/sdxl-turbo"


def _rows(text: Prompt) -> int:
    return 1 if isinstance(text, str) else len(text)

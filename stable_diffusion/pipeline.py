"""StableDiffusion: a checkpoint's parts, composed into a generator of latents."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from .diffusion.controls import Control
from .diffusion.guidance import guidance_embedding
from .diffusion.initial import Start, from_image
from .diffusion.run import Run, plan
from .diffusion.sample import Latents, Pairs, sample
from .diffusion.samplers import Noise, States, read_name
from .images.image import mask_of, pixels_of
from .model import DiffusionModel, Prompt
from .text.encode import Conditioning, MicroConditioning, with_sizes


@dataclass(frozen=True)
class _Told:
    """What a run is told besides its steps."""

    text: Prompt
    negative_text: Prompt
    clip_skip: int
    micro: MicroConditioning
    controls: Sequence[Control]
    image_guidance: float = 1.0


class StableDiffusion(DiffusionModel):
    """Stable Diffusion 1.x, 2.x or XL, whichever ``model`` is.

    Args:
        model: an alias ("sdxl", "sd15", "tiny", ...), a Hub id, a folder in diffusers layout, or a file with a whole
            checkpoint (.safetensors, .ckpt); None is the class's default model.
        float16: compute text encoders and UNet in half precision, and read half-precision files. The autoencoder
            stays in float32 unless its config says that it does not overflow ("force_upcast": false).
        revision: branch, tag or commit of a Hub repository.
        unet_bits: quantize the UNet to so many bits (2, 3, 4, 5, 6 or 8).
        text_bits: the same for the text encoders.
        parts: networks to take from elsewhere, by the names "unet", "vae", "text_encoder", "text_encoder_2": Hub ids,
            folders or files. A "vae" may be a TAESD.
        tokenizer: a folder with vocab.json and merges.txt, for checkpoints in one file, which hold none.
        prediction: what the UNet predicts, "epsilon", "v_prediction" or "sample", where the checkpoint does not say so.
        loras: LoRAs to add to the weights before they are quantized, each (file, folder or Hub id, scale); see also
            ``load_lora``.
        lora_partial: take what fits of a LoRA, and do not raise for what does not.
        low_memory: keep in memory only the networks of one stage, of encoding, denoising and decoding, and read them
            again when they are next used (see ``release``); ask the UNet one question at a time (``rows_at_once``).

    The parts are attributes that may be used, quantized or deleted on their own: ``unet``, ``autoencoder``,
    ``sampler`` (a name) and ``schedule``; ``text_encoder`` and ``tokenizer``, which XL has twice, as ``..._1`` and
    ``..._2``. Weights are read when they are first needed. ``memory_limit`` is None or the bytes that decoding and
    encoding may leave in use, weights and all: where it is short they work on smaller parts of a picture.

    Raises ValueError or OSError, one line, for a model that cannot be found, read or run.
    """

    default_model = "stabilityai/stable-diffusion-2-1-base"

    def number_of_steps(self, num_steps: int | None = None, strength: float = 1.0, **choices: Any) -> int:
        """How many latents a run yields: ``num_steps`` (None: the model's default), of which an image takes its share.

        That share is rounded down as diffusers does, but it is at least one step while ``strength`` is above 0.
        ``choices`` are other arguments of the run that have a say in it: sampler, schedule, denoising_start...
        """
        choices = {"sampler": None, "schedule": None, "cfg_weight": None, "guidance_interval": (0.0, 1.0)} | choices
        return self._plan(**choices, n_images=1, num_steps=num_steps, seed=0, strength=strength).length

    def generate_latents(
        self,
        text: Prompt,
        n_images: int = 1,
        num_steps: int | None = None,
        cfg_weight: float | None = None,
        negative_text: Prompt = "",
        latent_size: tuple[int, int] | None = None,
        seed: int | Sequence[int] | None = None,
        *,
        sampler: str | Callable[..., States] | None = None,
        schedule: str | None = None,
        spacing: str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
        s_noise: float | None = None,
        clip_skip: int = 0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        deep_cache: int = 1,
        token_merging: float = 0.0,
        micro: MicroConditioning | None = None,
        controls: Sequence[Control] = (),
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
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
            seed: of the first image; image i uses ``seed + i`` and does not depend on the others. Or a list with a seed
                for each image. None is random.
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
            guidance_interval: (start, end), the shares of the steps between which there is guidance (Kynkäänniemi et
                al. 2024); before and after them the UNet is asked half as much, for the prompt alone.
            deep_cache: an approximation that saves time: all of the UNet runs in every so many steps only, and its last
                layer in the others (Ma et al. 2023); 1 is exact. See ``deep_cache.py``.
            token_merging: another one: the share of positions, 0 ... 0.75, that the UNet's largest self-attentions
                merge with others like them (Bolya & Hoffman 2023); 0 is exact. See ``models/token_merging.py``.
            micro: SDXL's size conditioning.
            controls: ControlNets with what they are shown.
            denoising_end: stop when this share of the noise is gone: another model goes on from there.
            denoising_start: go on there, from the ``latents`` that the run before yielded last.
            latents: the initial noise [n, h, w, 4], unit normal, in place of the seed's.
            noise: ``noise(step, shape)`` gives what a stochastic sampler injects, in place of the seed's.

        Yields:
            Latents [n, h, w, 4], float32, not yet computed, in the scale of training (variance preserving); the last
            is the image, and ``decode`` shows any of them.

        Raises:
            ValueError: a number out of range, an unknown name, or latents of the wrong shape.
        """
        if self.mode != "text":
            raise ValueError(f"this checkpoint works from an image and {self.mode}: use generate_latents_from_image")
        total = n_images * _rows(text)
        run = self._plan(
            sampler,
            schedule,
            cfg_weight,
            n_images=total,
            num_steps=num_steps,
            seed=seed,
            denoising_start=denoising_start,
            denoising_end=denoising_end,
            spacing=spacing,
            timesteps=timesteps,
            sigmas=sigmas,
            eta=eta,
            s_noise=s_noise,
            guidance_interval=guidance_interval,
            deep_cache=deep_cache,
            token_merging=token_merging,
            latents=latents,
            noise=noise,
        )
        size = self.default_latent_size if latent_size is None else tuple(latent_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"latent_size {latent_size} must be (height, width), each at least 1")
        if denoising_start and latents is None:
            raise ValueError(f"denoising_start {denoising_start} needs the latents that the run before yielded")
        self._check(latents, total, size, controls)

        def start() -> Start:
            x = run.initial_noise((*size, self._latent_channels))
            if not denoising_start:
                return Start(run.scale * x)
            return Start(math.sqrt(run.steps.sigmas[0] ** 2 + 1) * x if len(run.steps) else x)

        told = _Told(text, negative_text, clip_skip, micro or MicroConditioning(), controls)
        return self._sample(run, start, size, told)

    def generate_latents_from_image(
        self,
        image: Any,
        text: Prompt,
        n_images: int = 1,
        strength: float | None = None,
        num_steps: int | None = None,
        cfg_weight: float | None = None,
        negative_text: Prompt = "",
        seed: int | Sequence[int] | None = None,
        *,
        mask: Any = None,
        depth: Any = None,
        image_cfg_weight: float | None = None,
        sampler: str | Callable[..., States] | None = None,
        schedule: str | None = None,
        spacing: str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
        s_noise: float | None = None,
        clip_skip: int = 0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        deep_cache: int = 1,
        token_merging: float = 0.0,
        micro: MicroConditioning | None = None,
        controls: Sequence[Control] = (),
        denoising_end: float = 1.0,
        latents: mx.array | None = None,
        noise: Noise | None = None,
    ) -> Iterator[mx.array]:
        """Change an image towards a prompt (Meng et al. 2022): noise it part of the way, then denoise it.

        Args:
            image: [H, W, 3] in [-1, 1], or a PIL image, both sides multiples of 8; or latents [n, h, w, 4] to be worked
                on further, one of each image.
            strength: how much of the way, 0 ... 1. Of ``num_steps`` this fraction is done, at least one step; at 0 the
                image's own latents are the only yield. None is 0.8, and 1 for checkpoints that see the image anyway,
                those made for masks and for instructions.
            mask: where to make the image anew: [H, W] in [0, 1] or a PIL image, of the image's size; 0 (black) keeps, 1
                (white) makes new, between them old and new are blended.
            depth: the depth map [H', W'] for checkpoints made for it, in any unit, larger is nearer; None estimates it.
            image_cfg_weight: how closely to follow the image, for checkpoints that take instructions (Brooks et al.
                2023); None is 1.5.

        The other arguments, the yields and the errors are those of :meth:`generate_latents`; ``latents`` is the noise
        added to the image.
        """
        unit = self.pixels_per_latent
        if getattr(image, "ndim", 0) == 4 and image.shape[-1] == self._latent_channels:
            if self.mode == "masks" or mask is not None:
                raise ValueError("a mask needs an image, not latents: decode them first")
            pixels, size = image, tuple(image.shape[1:3])
        else:
            pixels = pixels_of(image, unit)
            size = (pixels.shape[0] // unit, pixels.shape[1] // unit)
        new = None if mask is None else mask_of(mask, (size[0] * unit, size[1] * unit))
        if strength is None:
            strength = 1.0 if self.mode in ("masks", "instructions") else 0.8
        if not 0 <= strength <= 1:
            raise ValueError(f"strength {strength} is outside 0 ... 1")
        total = n_images * _rows(text)
        if pixels.ndim == 4 and pixels.shape[0] not in (1, total):
            raise ValueError(f"{pixels.shape[0]} latents to work on for {total} images; give one, or one for each")
        run = self._plan(
            sampler,
            schedule,
            cfg_weight,
            n_images=total,
            num_steps=num_steps,
            seed=seed,
            strength=strength,
            denoising_end=denoising_end,
            spacing=spacing,
            timesteps=timesteps,
            sigmas=sigmas,
            eta=eta,
            s_noise=s_noise,
            guidance_interval=guidance_interval,
            deep_cache=deep_cache,
            token_merging=token_merging,
            latents=latents,
            noise=noise,
        )
        self._check(latents, total, size, controls)

        def start() -> Start:
            seen = partial(self.estimate_depth, image) if depth is None else lambda: depth
            scale = self._vae_config.scaling_factor
            return from_image(run, self.encode, scale, self.mode, strength, pixels, new, seen)

        image_guidance = 1.5 if image_cfg_weight is None else image_cfg_weight
        told = _Told(text, negative_text, clip_skip, micro or MicroConditioning(), controls, image_guidance)
        return self._sample(run, start, size, told)

    def _plan(
        self,
        sampler: str | Callable[..., States] | None,
        schedule: str | None,
        cfg_weight: float | None,
        **choices: Any,
    ) -> Run:
        if sampler is None:
            sampler = self.sampler
            choices |= {name: value for name, value in self._defaults.items() if choices.get(name) is None}
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

    def _check(
        self, latents: mx.array | None, n_images: int, size: tuple[int, ...], controls: Sequence[Control]
    ) -> None:
        wanted = (n_images, *size, self._latent_channels)
        if latents is not None and latents.shape != wanted:
            raise ValueError(f"latents of shape {latents.shape} do not fit: this run needs {wanted}")
        pixels = (*(self.pixels_per_latent * side for side in size), 3)
        for control in controls:
            if control.hint.shape != pixels:
                raise ValueError(f"a hint of shape {control.hint.shape} does not fit: this run needs {pixels}")

    def _sample(self, run: Run, start: Callable[[], Start], size: tuple[int, ...], told: "_Told") -> Latents:
        def prepare() -> Pairs:
            begin = start()
            self._ready([begin.x, *(v for v in vars(begin).values() if isinstance(v, mx.array))])
            if not run.length:
                x = begin.x / math.sqrt(run.steps.sigmas[0] ** 2 + 1) if len(run.steps) else begin.x
                return iter([(x, x)])
            pixels = tuple(self.pixels_per_latent * side for side in size)
            positive, negative = self._condition(run.guidance, pixels, told)
            return steps(begin, positive, negative)

        def steps(begin: Start, positive: Conditioning, negative: Conditioning | None) -> Pairs:
            self._begin("unet")
            options = told.controls, told.image_guidance, self.rows_at_once
            yield from sample(self.unet, self.schedule, self.dtype, run, begin, positive, negative, *options)

        return Latents(prepare)

    def _condition(
        self, guidance: float, pixels: tuple[int, ...], told: "_Told"
    ) -> tuple[Conditioning, Conditioning | None]:
        """What the UNet is told of the prompts and, where guidance needs it, of the negative ones."""
        dim = self._unet_config.time_cond_proj_dim
        if guidance > 1 and not dim:
            positive, negative = self.encode_prompts(told.text, told.negative_text, clip_skip=told.clip_skip)
        elif isinstance(told.text, Conditioning):
            positive, negative = told.text, None
        else:
            positive, negative = self.encode_prompt(told.text, clip_skip=told.clip_skip), None
        if dim:
            embedding = guidance_embedding(guidance, dim).astype(self.dtype)
            positive = replace(positive, guidance=mx.repeat(embedding, len(positive.rows), axis=0))
        if self._is_xl:
            scores = (told.micro.aesthetic_score, told.micro.negative_aesthetic_score)
            scores = scores if self.scores_aesthetics else (None, None)
            positive = with_sizes(positive, pixels, told.micro, scores[0])
            negative = None if negative is None else with_sizes(negative, pixels, told.micro, scores[1])
        return positive, negative


class StableDiffusionXL(StableDiffusion):
    """The same, with SDXL-Turbo as the model that None stands for."""

    default_model = "stabilityai/sdxl-turbo"


def _rows(text: Prompt) -> int:
    return 1 if isinstance(text, str) else len(text)

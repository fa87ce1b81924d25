"""StableDiffusion: a checkpoint's parts, composed into a generator of latents."""

import logging
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import mlx.core as mx

from .config import ScheduleConfig
from .denoise import Conditioning, consistency, denoiser, given, guidance_embedding
from .image import to_array
from .models.clip import CLIPTextModel
from .samplers import Noise, Sampler, States, find_sampler, options, read_name, sampler_for
from .schedule import Schedule, Steps
from .tokenizer import Tokenizer
from .weights.files import open_checkpoint
from .weights.load import load_component

_log = logging.getLogger("stable_diffusion")

_UNET_GROUP, _TEXT_GROUP = 32, 64  # values that share a quantization scale


@dataclass(frozen=True)
class MicroConditioning:
    """What SDXL is told about the picture beside the prompt (Podell et al. 2023, sec. 2.2). Sizes are (height, width).

    ``original_size`` is the size that the training picture would have had before resizing, ``crop`` (top, left) where
    it would have been cut, ``target_size`` what it was resized to; None stands for the size of the result. The refiner
    takes aesthetic scores in place of the target size.
    """

    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5


@dataclass(frozen=True)
class _Run:
    """One run, checked and with every default filled in."""

    steps: Steps
    sampler: Sampler
    sampler_options: dict[str, Any]
    scale: float
    guidance: float
    n_images: int
    seed: int
    latents: mx.array | None
    noise: Noise | None


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
        self.schedule = Schedule(ScheduleConfig.from_dict(checkpoint.scheduler))
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
        size = self._unet_config.sample_size or 64
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def pixels_per_latent(self) -> int:
        """Pixels of an image for one position of its latent, in each direction: 8 for the published models."""
        return self._scale

    def number_of_steps(self, num_steps: int | None = None, strength: float = 1.0) -> int:
        """How many latents a run yields: ``num_steps`` (None: the model's default), of which an image takes its share.

        That share is rounded down as diffusers does, but it is at least one step while ``strength`` is above 0.
        """
        count = self.default_steps if num_steps is None else num_steps
        # The tolerance is for products such as 50 * 0.58 = 28.999999999999996.
        return min(count, max(math.floor(count * strength + 1e-9), int(strength > 0)))

    def ensure_models_are_loaded(self) -> None:
        """Read all weights now rather than when they are first needed."""
        mx.eval([getattr(self, encoder).parameters() for _, encoder in self._encoders])
        mx.eval(self.unet.parameters(), self.autoencoder.parameters())

    def generate_latents(
        self,
        text: str,
        n_images: int = 1,
        num_steps: int | None = None,
        cfg_weight: float | None = None,
        negative_text: str = "",
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
            text: the prompt.
            n_images: how many images to make at once.
            num_steps: sampler steps; None is the model's default.
            cfg_weight: scale of classifier-free guidance (Ho & Salimans 2022). At 1 or below there is none, and
                ``negative_text`` has no effect. None is the model's default.
            negative_text: what to steer away from.
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
        path = (schedule, spacing, timesteps, sigmas)
        run = self._plan(n_images, num_steps, cfg_weight, seed, sampler, path, eta, s_noise, latents, noise)
        size = self.default_latent_size if latent_size is None else tuple(latent_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"latent_size {latent_size} must be (height, width), each at least 1")
        self._check_latents(latents, n_images, size)

        def start() -> mx.array:
            return run.scale * self._initial_noise(run, size)

        return self._sample(run, start, size, text, negative_text, clip_skip, micro)

    def generate_latents_from_image(
        self,
        image: Any,
        text: str,
        n_images: int = 1,
        strength: float = 0.8,
        num_steps: int | None = None,
        cfg_weight: float | None = None,
        negative_text: str = "",
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
        path = (schedule, spacing, timesteps, sigmas)
        run = self._plan(n_images, num_steps, cfg_weight, seed, sampler, path, eta, s_noise, latents, noise, strength)
        size = (pixels.shape[0] // unit, pixels.shape[1] // unit)
        self._check_latents(latents, n_images, size)

        def start() -> mx.array:
            # The mean of the posterior: its spread is far below one grey level, and a run needs no further randomness.
            mean, _ = self.autoencoder.encode(pixels[None])
            x0 = mx.broadcast_to(mean, (n_images, *mean.shape[1:]))
            return x0 + run.steps.sigmas[0] * self._initial_noise(run, size) if len(run.steps) else x0

        return self._sample(run, start, size, text, negative_text, clip_skip, micro)

    def decode(self, x_t: mx.array) -> mx.array:
        """Latents [n, h, w, 4] -> images [n, 8h, 8w, 3], float32 in [0, 1]."""
        return mx.clip(self.autoencoder.decode(x_t.astype(mx.float32)) / 2 + 0.5, 0, 1)

    def _plan(
        self,
        n_images: int,
        num_steps: int | None,
        cfg_weight: float | None,
        seed: int | None,
        sampler: str | Callable[..., States] | None,
        path: tuple[str | None, str | None, Sequence[float] | None, Sequence[float] | None],
        eta: float | None,
        s_noise: float | None,
        latents: mx.array | None,
        noise: Noise | None,
        strength: float = 1.0,
    ) -> _Run:
        if n_images < 1:
            raise ValueError(f"n_images {n_images} must be at least 1")
        name = self.sampler if sampler is None else sampler
        chosen = find_sampler(name)
        schedule, spacing, timesteps, sigmas = path
        if schedule is None and isinstance(name, str):
            schedule = read_name(name)[1]
        steps = self._steps(num_steps, chosen.grid, schedule, spacing, timesteps, sigmas)
        steps = steps.last(self.number_of_steps(len(steps), strength))
        asked = options(chosen, eta=eta, s_noise=s_noise)
        return _Run(
            steps=steps,
            sampler=chosen,
            sampler_options=given(chosen, self.schedule, steps, asked) | asked,
            scale=self.schedule.initial_scale(steps, chosen.grid, spacing) if len(steps) else 0.0,
            guidance=self.default_guidance if cfg_weight is None else cfg_weight,
            n_images=n_images,
            seed=secrets.randbits(32) if seed is None else seed,
            latents=latents,
            noise=noise,
        )

    def _steps(
        self,
        count: int | None,
        grid: str,
        schedule: str | None,
        spacing: str | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
    ) -> Steps:
        named = {"schedule": schedule, "spacing": spacing, "timesteps": timesteps, "sigmas": sigmas}
        if (timesteps is not None or sigmas is not None) and sum(value is not None for value in named.values()) > 1:
            names = ", ".join(name for name, value in named.items() if value is not None)
            raise ValueError(f"{names} each say where the steps lie; give one of them")
        if schedule == "align_your_steps" and self._is_xl:
            schedule = "align_your_steps_xl"
        if timesteps is not None:
            steps = self.schedule.at_timesteps(timesteps, grid)
        elif sigmas is not None:
            steps = self.schedule.at_sigmas(sigmas)
        else:
            return self.schedule.steps(self.default_steps if count is None else count, grid, spacing, schedule)
        if count not in (None, len(steps)):
            raise ValueError(f"num_steps {count} does not fit the {len(steps)} steps that are given; leave it out")
        return steps

    def _check_latents(self, latents: mx.array | None, n_images: int, size: tuple[int, ...]) -> None:
        wanted = (n_images, *size, self.autoencoder.latent_channels)
        if latents is not None and latents.shape != wanted:
            raise ValueError(f"latents of shape {latents.shape} do not fit: this run needs {wanted}")

    def _sample(
        self,
        run: _Run,
        start: Callable[[], mx.array],
        size: tuple[int, ...],
        text: str,
        negative_text: str,
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
        denoise = denoiser(self.unet, self.schedule, run.steps, self.dtype, conditioning, negative, run.guidance)
        if run.sampler.consistency:
            denoise = consistency(denoise, self.schedule, run.steps)
        noise = run.noise or _step_noise(run.seed)
        sigmas = run.steps.sigmas
        states = run.sampler.run(denoise, x, sigmas, noise, **run.sampler_options)
        for x, sigma in zip(states, sigmas[1:], strict=True):
            yield x / math.sqrt(sigma**2 + 1)

    def _initial_noise(self, run: _Run, size: tuple[int, ...]) -> mx.array:
        if run.latents is not None:
            return run.latents.astype(mx.float32)
        shape = (*size, self.autoencoder.latent_channels)
        keys = (_keys(run.seed + i)[0] for i in range(run.n_images))
        return mx.stack([mx.random.normal(shape, key=key) for key in keys])

    def _condition(
        self, run: _Run, size: tuple[int, ...], text: str, negative_text: str, clip_skip: int, micro: MicroConditioning
    ) -> tuple[Conditioning, Conditioning | None]:
        """What the UNet is told of a prompt and, where guidance needs it, of the negative prompt."""
        positive = self._with_sizes(self.encode_prompt(text, clip_skip=clip_skip), size, micro, micro.aesthetic_score)
        if dim := self._unet_config.time_cond_proj_dim:
            embedding = guidance_embedding(run.guidance, dim).astype(self.dtype)
            positive = Conditioning(positive.context, positive.pooled, positive.time_ids, embedding)
            return positive.expand(run.n_images), None
        if run.guidance <= 1:
            return positive.expand(run.n_images), None
        negative = self.encode_prompt(negative_text, clip_skip=clip_skip)
        if self._zero_empty_prompt and not negative_text:
            negative = negative.map(mx.zeros_like)
        negative = self._with_sizes(negative, size, micro, micro.negative_aesthetic_score)
        return positive.expand(run.n_images), negative.expand(run.n_images)

    def encode_prompt(self, text: str, *, clip_skip: int = 0) -> Conditioning:
        """Encode a prompt with every text encoder: context [1, 77, C], and for XL the pooled prompt [1, P].

        Text beyond the 75 tokens that fit is left out, which the log ("stable_diffusion") says.
        """
        contexts, pooled = [], None
        for tokenizer_name, encoder_name in self._encoders:
            ids, cut = getattr(self, tokenizer_name).window(text)
            if cut:
                _log.warning("the prompt is too long; this part of it is ignored: %r", cut)
            encoder: CLIPTextModel = getattr(self, encoder_name)
            output = encoder(mx.array([ids]))
            if clip_skip < 0 or clip_skip > len(output.hidden_states) - 2:
                raise ValueError(f"clip_skip {clip_skip} is outside 0 ... {len(output.hidden_states) - 2}")
            if self._is_xl:  # XL was trained on the state below the last one, not normalised
                contexts.append(output.hidden_states[-2 - clip_skip])
                pooled = output.pooled_output
            elif clip_skip:
                contexts.append(encoder.normalise(output.hidden_states[-1 - clip_skip]))
            else:
                contexts.append(output.last_hidden_state)
        return Conditioning(mx.concatenate(contexts, axis=-1), pooled)

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
        ids = mx.array([[*(micro.original_size or pixels), *micro.crop, *last]], dtype=mx.float32)
        return Conditioning(conditioning.context, conditioning.pooled, ids)


class StableDiffusionXL(StableDiffusion):
    """The same, with SDXL-Turbo as the model that None stands for."""

    default_model = "stabilityai/sdxl-turbo"


def _keys(seed: int) -> tuple[mx.array, mx.array]:
    """An image's two random streams: one for its initial noise, one for what samplers add."""
    initial, added = mx.random.split(mx.random.key(seed))
    return initial, added


def _step_noise(seed: int) -> Noise:
    """Noise of a step, for each image from its own key, so that neither the batch nor the order of calls matters."""

    def noise(step: int, shape: tuple[int, ...]) -> mx.array:
        counter = mx.array([0, step], dtype=mx.uint32)
        keys = (_keys(seed + i)[1] + counter for i in range(shape[0]))
        return mx.stack([mx.random.normal(shape[1:], key=key) for key in keys])

    return noise

"""StableDiffusion: open a checkpoint, encode prompts, generate latents step by step, decode them to images.

Start reading here. The path of a run: ``generate_latents`` -> ``_run`` -> ``text/encode.py`` for the prompts ->
``diffusion/sample.py`` for the loop -> ``diffusion/samplers.py`` -> ``diffusion/denoiser.py`` -> ``models/unet.py``;
then ``decode`` -> ``models/vae.py``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, Unpack

import mlx.core as mx
from PIL.Image import Image

from .diffusion.choice import guidance_scale, sampler_for
from .diffusion.denoiser import Denoiser, DenoiseStep, for_sampler, inpainting
from .diffusion.guidance import GuidanceBatch, guidance_batches, guidance_rescale
from .diffusion.image_prompts import check_image_prompts
from .diffusion.sample import MODES, InitialLatents, Latents, Pairs, Run, from_image, sample
from .images.image import mask_of, pixels_of, to_images
from .lora.delta import Scale
from .models import check_mlx, cpu
from .models.seamless import seamlessly
from .models.unet import timestep_embedding
from .networks import Networks
from .options import Number, OptionKeywords, Options, Prompt, Prompts
from .planning import RunDefaults, image_seeds, plan_run, schedule_of
from .text.encode import Conditioning, SizeConditioning
from .weights.files import open_checkpoint
from .weights.quantize import in_words

_DTYPES = (mx.float16, mx.bfloat16, mx.float32)


class StableDiffusion(Networks):
    """Open a Stable Diffusion checkpoint (1.x, 2.x or XL) and turn prompts into latents, and latents into images.

    Args:
        model: an alias ("sdxl", "sd15", "tiny", ...), a Hub id, a folder in diffusers layout, or a complete checkpoint
            in one file (.safetensors, .ckpt, .gguf). Default: the default model of the class.
        float16: a short form of ``dtype=mx.float16``.
        revision: branch, tag or commit of a Hub repository.
        unet_bits: quantize the UNet to this number of bits (2, 3, 4, 5, 6 or 8), or to a low-bit float format:
            "mxfp4", "nvfp4" or "mxfp8".
        text_bits: the same for the text encoders.
        parts: replacements for single networks, by name: "unet", "vae", "text_encoder", "text_encoder_2". Each is a
            Hub id, folder or file. A "vae" may be a TAESD.
        tokenizer: a folder with vocab.json and merges.txt. Single files hold no tokenizer.
        prediction: the UNet's prediction type, "epsilon", "v_prediction" or "sample". Default: the checkpoint's.
        loras: LoRAs to fuse into the weights before quantization, each as (file, folder or Hub id, scale). The scale is
            a number or (text encoders, UNet). See also ``load_lora``.
        lora_partial: apply the layers of a LoRA that match and skip the rest, instead of raising.
        low_memory: load each network only for its stage (encoding, denoising, decoding). Compute the conditional and
            unconditional rows one after the other (``rows_at_once``).
        dtype: the type in which text encoders and UNet compute: mx.float16, mx.bfloat16 or mx.float32 (default). For
            the first two, half-precision files are preferred. The autoencoder stays in float32 unless its config marks
            it as safe ("force_upcast": false).

    The networks are attributes, which you may use, quantize or delete: ``unet``, ``autoencoder``, ``text_encoder`` and
    ``tokenizer``. XL has two of the last two, ``..._1`` and ``..._2``. ``sampler`` (a name) and ``schedule`` are
    attributes too. Weights are read when they are first needed. ``is_xl`` is true for SDXL and its refiner,
    ``scores_aesthetics`` for the refiner. ``default_latent_size`` is the training resolution as the (height, width) of
    the latents, of ``pixels_per_latent`` (8) pixels each. ``memory_limit`` is a limit in bytes for encoding and
    decoding, weights included, or None. Where it is too small they work on smaller parts.

    Raises ValueError or OSError, one line, for a model that cannot be found, read or run.
    """

    default_model = "stabilityai/stable-diffusion-2-1-base"
    _open = staticmethod(open_checkpoint)

    def __init__(
        self,
        model: str | PathLike | None = None,
        float16: bool = False,
        *,
        revision: str | None = None,
        unet_bits: int | str | None = None,
        text_bits: int | str | None = None,
        parts: Mapping[str, str | PathLike] | None = None,
        tokenizer: str | PathLike | None = None,
        prediction: str | None = None,
        loras: Sequence[tuple[str | PathLike, Scale]] = (),
        lora_partial: bool = False,
        low_memory: bool = False,
        dtype: mx.Dtype | None = None,
    ):
        check_mlx()
        if float16 and dtype is not None:
            raise ValueError(f"float16=True and dtype={dtype} both choose the type; omit float16")
        dtype = (mx.float16 if float16 else mx.float32) if dtype is None else dtype
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r} is not supported; give mx.float16, mx.bfloat16 or mx.float32")
        self.rows_at_once = 1 if low_memory else None
        self.group: mx.distributed.Group | None = None  # computes the rows of the UNet's batch together
        self.memory_limit: float | None = None
        self.source, self._revision = self.default_model if model is None else model, revision
        replaced = {"tokenizer": tokenizer, "prediction": prediction, "parts": parts}
        checkpoint = self._open(self.source, float16=dtype != mx.float32, revision=revision, **replaced)
        bits = {"unet": unet_bits, "text_encoder": text_bits, "text_encoder_2": text_bits}
        super().__init__(checkpoint, dtype, low_memory, bits, loras, lora_partial)
        self.schedule = schedule_of(checkpoint)
        sampler = sampler_for(self.schedule.config)
        self._defaults = RunDefaults(sampler, checkpoint.steps, checkpoint.guidance, **checkpoint.few_steps)
        self._zero_empty_prompt = bool(checkpoint.index.get("force_zeros_for_empty_prompt", False))
        self.scores_aesthetics = bool(checkpoint.index.get("requires_aesthetics_score", False))
        self._read_configs()
        size = self.unet_config.sample_size or 64
        self.default_latent_size = (size, size) if isinstance(size, int) else tuple(size)

    def _read_configs(self) -> None:
        """Derive the settings of a run from the networks' configs; ValueError for parts that do not fit together."""
        self.unet_config, self.vae_config = self.unet.config, self.autoencoder.config
        self.is_xl = self.unet_config.addition_embed_type == "text_time"
        self._kind = f"Stable Diffusion {'XL' if self.is_xl else '1 or 2'}"
        self.pixels_per_latent, self._latent_channels = self.vae_config.scale, self.autoencoder.latent_channels
        channels = self.unet_config.in_channels - self._latent_channels
        if channels not in MODES:
            raise ValueError(f"a UNet with {channels} input channels besides the latents is not supported")
        self.mode = MODES[channels]
        if self.schedule.is_edm and self.mode == "instructions":
            raise ValueError("CosXL Edit, an EDM model for instructions, is not supported; use CosXL itself")
        read = max(self.unet_config.cross_attention_dim)
        written = sum(getattr(self, name).text_model.final_layer_norm.weight.shape[0] for _, name in self._encoders)
        if read != written:
            text = f"the UNet needs prompts of width {read}, the text encoders give {written}"
            raise ValueError(f"{text}; use parts of one model family")

    def __repr__(self) -> str:
        bits = [f"{name} in {in_words(s.quantization[0])}" for name, s in self.sources.items() if s.quantization]
        details = [self._kind, self.dtype_name, self.sampler or "no sampler", *bits, *["low memory"] * self.low_memory]
        return f"{type(self).__name__}({str(self.source)!r}, {', '.join(details)})"

    @property
    def dtype_name(self) -> str:
        """Return the type in which the UNet computes, such as "float16"."""
        return str(self.dtype).removeprefix("mlx.core.")

    @property
    def defaults(self) -> RunDefaults:
        """Return the defaults of a run: the checkpoint's, or those of an attached few-step LoRA."""
        in_effect = [d for lora, d in self._few_step if lora is None or (lora.is_attached and lora.scale != 0)]
        return in_effect[-1] if in_effect else self._defaults

    @property
    def sampler(self) -> str | None:
        """Return the name of the default sampler. You may set it.

        None means that the checkpoint's scheduler is not supported: runs raise ValueError until a sampler is chosen.
        """
        return self.defaults.sampler

    @sampler.setter
    def sampler(self, name: str) -> None:
        self._defaults = self._defaults.with_sampler(name)
        self._few_step = [(lora, defaults.with_sampler(name)) for lora, defaults in self._few_step]

    @sampler.deleter
    def sampler(self) -> None:
        """Ignore ``del sd.sampler``, as in programs for mlx-examples."""

    # --- generating --------------------------------------------------------------------------------------------------

    def generate(self, text: Prompt, image: Any = None, **keywords: Any) -> list[Image]:
        """Generate images: run all steps, check for overflow and decode.

        Args:
            text: the prompt, or a list of prompts.
            image: an image to start from: a path, a PIL image or an array; None starts from noise.
            keywords: arguments of :meth:`generate_latents`, or with an image of :meth:`generate_latents_from_image`.

        A run that overflows in half precision is computed again in float32, and the log says so. Raises
        FloatingPointError for values that are not finite in float32 either, and ValueError for bad arguments.
        """
        if keywords.get("seed") is None:
            keywords["seed"] = image_seeds(None, 1)[0]  # the same seed if the run is computed again
        method = self.generate_latents if image is None else partial(self.generate_latents_from_image, image)
        x_t = self.retry_in_float32("unet", partial(self._last, method, text, keywords))
        axes = keywords.get("seamless") or getattr(keywords.get("options"), "seamless", None)
        decode = seamlessly(axes, self.decode_checked)
        return [picture for x in x_t for picture in to_images(decode(x[None]))]

    def _last(self, method: Callable[..., Latents], text: Prompt, keywords: Mapping[str, Any]) -> mx.array:
        for x_t in method(text, **keywords):
            self.check(x_t)
        return x_t

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
        options: Options | None = None,
        **keywords: Unpack[OptionKeywords],
    ) -> Latents:
        """Yield the latents after each sampler step, not yet computed.

        Args:
            text: the prompt, in the language of ``text/prompt.py``; a list of prompts; or the result of
                ``encode_prompt``.
            n_images: number of images for each prompt, computed as one batch.
            num_steps: number of denoising steps. Default: the model's.
            cfg_weight: scale of classifier-free guidance (Ho & Salimans 2022). Default: the model's. At 1 or below,
                guidance is off and ``negative_text`` has no effect.
            negative_text: the negative prompt: one for all images, or a list with one for each prompt.
            latent_size: (height, width) of the latents, an eighth of the pixels. Default: the model's.
            seed: seed of the first image; image i has ``seed + i``. A list has one for each. Default: random.
            options: all other settings, see :class:`Options`. ``keywords`` are its fields and override it.

        Yields:
            Latents [n, h, w, 4], float32, not yet computed, in the variance-preserving scale of training. The last ones
            are the final image; ``decode`` shows any of them. EDM too has (x0 + sigma noise) / sqrt(sigma^2 + 1).

        Raises ValueError for a number out of range, an unknown name, or latents of the wrong shape.
        """
        options = Options.of(options, keywords)
        if self.mode != "text":
            raise ValueError(f"this checkpoint works from an image and {self.mode}: use generate_latents_from_image")
        prompts = Prompts(text, negative_text, self._guidance(options, cfg_weight))
        run = self._plan(options, num_steps, seed, prompts.count(n_images))
        size = self.default_latent_size if latent_size is None else latent_size
        if not isinstance(size, Sequence) or len(size) != 2 or not all(Number(int, 1).accepts(side) for side in size):
            raise ValueError(f"latent_size {size!r} must be (height, width), each at least 1")
        self._check_shapes(options, run, tuple(size))
        shape = (*size, self._latent_channels)
        pairs = self._run(run, prompts, options, lambda: InitialLatents(run.initial_scale * run.initial_noise(shape)))
        return Latents(pairs, run.length)

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
        options: Options | None = None,
        **keywords: Unpack[OptionKeywords],
    ) -> Latents:
        """Change an image by a prompt (SDEdit, Meng et al. 2022): add noise up to ``strength``, then denoise.

        Args:
            image: a path, a PIL image or an array [H, W, 3] in [-1, 1], both sides multiples of 8; or latents
                [n, h, w, 4], one for all images or one for each.
            strength: how much to change the image, 0 ... 1: the fraction of ``num_steps`` to run, at least one step. At
                0 the image's latents are yielded. Default: 0.8, or 1 for inpainting and instruction checkpoints.
            mask: a path, a PIL image or an array [H, W] of the image's size: 0 (black) keeps, 1 (white) repaints.
            depth: the depth map [H', W'], larger is nearer, for depth checkpoints. Default: estimated from the image.
            image_cfg_weight: scale of image guidance (Brooks et al. 2023). Default: 1.5.

        The other arguments, the yields and the errors are those of :meth:`generate_latents`. ``latents`` is the noise
        that is added to the image.
        """
        options = Options.of(options, keywords)
        pixels, repaint, size = self._read_image(image, mask)
        if strength is None:
            strength = 1.0 if self.mode in ("masks", "instructions") else 0.8
        cfg_weight = self._guidance(options, cfg_weight)
        prompts = Prompts(text, negative_text, cfg_weight, 1.5 if image_cfg_weight is None else image_cfg_weight)
        run = self._plan(options, num_steps, seed, prompts.count(n_images), strength)
        if pixels.ndim == 4 and len(pixels) not in (1, len(run.seeds)):
            raise ValueError(f"{len(pixels)} initial latents for {len(run.seeds)} images; give one, or one for each")
        self._check_shapes(options, run, size)
        depth_map = partial(self.estimate_depth, image) if depth is None else lambda: depth
        encode, factor = seamlessly(options.seamless, self.encode), self.vae_config.scaling_factor
        initial = partial(from_image, run, encode, factor, self.mode, strength, pixels, repaint, depth_map)
        return Latents(self._run(run, prompts, options, initial), run.length)

    def number_of_steps(
        self, num_steps: int | None = None, strength: float = 1.0, *, options: Options | None = None, **keywords: Any
    ) -> int:
        """Return the number of steps of a run: the fraction ``strength`` of ``num_steps`` (default: the model's).

        The number is rounded down as in diffusers, but is at least 1 for a ``strength`` above 0. ``options`` and
        ``keywords`` are those of the run: sampler, schedule, denoising_start...
        """
        if keywords.get("denoising_start"):
            keywords["latents"] = mx.zeros(0)  # not used here
        return self._plan(Options.of(options, keywords), num_steps, 0, 1, strength).length

    # --- a run -------------------------------------------------------------------------------------------------------

    def _guidance(self, options: Options, cfg_weight: float | None) -> float:
        return guidance_scale(options.sampler or self.sampler, cfg_weight, self.defaults.cfg_weight)

    def _plan(self, options: Options, num_steps: int | None, seed: Any, count: int = 1, strength: float = 1.0) -> Run:
        seeds = image_seeds(seed, count, counts=not options.variation_strength)
        settings = {"num_steps": num_steps, "seeds": seeds, "strength": strength, "is_xl": self.is_xl}
        return plan_run(self.schedule, options, self.defaults, **settings)

    def _check_shapes(self, options: Options, run: Run, size: tuple[int, int]) -> None:
        """Raise ValueError for latents and control images of the wrong shape."""
        shape = (len(run.seeds), *size, self._latent_channels)
        actual = getattr(options.latents, "shape", type(options.latents).__name__)
        if options.latents is not None and actual != shape:
            raise ValueError(f"latents of shape {actual} do not fit: this run needs {shape}")
        height, width = (self.pixels_per_latent * side for side in size)
        for control in options.controls:
            if control.image.shape != (height, width, 3):
                text = f"a control image of shape {control.image.shape} does not fit"
                raise ValueError(f"{text}: this run needs {(height, width, 3)}")
        if options.image_prompts:
            check_image_prompts(options.image_prompts, self.unet, len(run.seeds), (height, width))

    def _read_image(self, image: Any, mask: Any) -> tuple[mx.array, mx.array | None, tuple[int, int]]:
        """Return pixels [H, W, 3] or latents, the mask [H, W] or None, and the size of the latents."""
        unit = self.pixels_per_latent
        if getattr(image, "ndim", 0) == 4 and image.shape[-1] == self._latent_channels:
            if self.mode == "masks" or mask is not None:
                raise ValueError("a mask needs an image, not latents: decode them first")
            return image, None, tuple(image.shape[1:3])
        pixels = pixels_of(image, unit)
        height, width = pixels.shape[:2]
        return pixels, None if mask is None else mask_of(mask, (height, width)), (height // unit, width // unit)

    def _run(self, run: Run, prompts: Prompts, options: Options, initial: Callable[[], InitialLatents]) -> Pairs:
        """Yield the arrays computed before the first step, then the latents and the x0 estimate after each step."""
        first = initial()
        if not run.length:
            x = first.x / math.sqrt(run.steps.sigmas[0] ** 2 + 1) if len(run.steps) else first.x
            yield [x]
            yield x, x
            return
        arrays = [value for value in vars(first).values() if isinstance(value, mx.array)]
        if self.low_memory:  # so that the autoencoder can be freed
            mx.eval(arrays)
        images = [prompt.encoded(self.encode_image_prompt) for prompt in options.image_prompts if prompt.scale != 0]
        positive, negative, uncond_image = tables = self._condition(prompts, options, first, run.sampler.cfg_pp)
        yield [*arrays, *(table.arrays() for table in tables if table is not None)]
        batches = guidance_batches(
            len(run.steps),
            len(run.seeds),
            positive,
            negative,
            prompts.cfg_weight,
            uncond_image=uncond_image,
            image_guidance=prompts.image_cfg_weight,
            interval=options.guidance_interval,
            rescale=guidance_rescale(options.guidance_rescale, self.schedule.config),
            pag_scale=options.pag_scale,
            keeps_uncond=run.sampler.cfg_pp,
            steps_before=run.steps.total - len(run.steps) if options.denoising_start else 0,
        )
        denoise = self._denoiser(run, first, replace(options, image_prompts=images), batches)
        try:
            yield from sample(denoise, run, first)
        finally:
            cpu.all_cores()

    def _denoiser(
        self, run: Run, first: InitialLatents, options: Options, batches: Sequence[GuidanceBatch]
    ) -> DenoiseStep:
        beside = [control.network for control in options.controls] + [one.adapter for one in options.image_prompts]
        (unet,) = self._use("unet", beside=beside)
        settings: dict[str, Any] = {"controls": options.controls, "rows_at_once": self.rows_at_once}
        settings |= {"group": self.group, "deep_cache": options.deep_cache, "image_prompts": options.image_prompts}
        settings |= {"unet_options": {"tome_ratio": options.token_merging, "freeu_scales": options.freeu}}
        settings |= {"pag_layers": options.pag_layers if options.pag_scale else ()}
        make = seamlessly(options.seamless, Denoiser)  # it embeds the control images
        denoise: DenoiseStep = make(unet, run.schedule, run.steps, self.dtype, batches, **settings)
        denoise = seamlessly(options.seamless, denoise)
        denoise = for_sampler(denoise, run.sampler, run.schedule)
        return denoise if first.mask is None else inpainting(denoise, first.mask)

    def _condition(
        self, prompts: Prompts, options: Options, first: InitialLatents, keeps_uncond: bool
    ) -> tuple[Conditioning, Conditioning | None, Conditioning | None]:
        """Encode the prompts and, if guidance needs them, the negative prompts, with and without the image."""
        dim = self.unet_config.time_cond_proj_dim
        texts, seconds = (prompts.text, prompts.negative_text), (options.prompt_2, options.negative_prompt_2)
        if (prompts.cfg_weight > 1 or keeps_uncond) and self._encoders and not dim:
            positive, negative = self._encode_pair(texts, seconds, clip_skip=options.clip_skip)
        else:
            positive, negative = self._encode(texts[0], seconds[0], clip_skip=options.clip_skip), None
        if dim:  # the guidance scale is an input of the UNet (Luo et al. 2023)
            scale = mx.full(len(positive.rows), 1000.0 * (prompts.cfg_weight - 1))
            embedding = timestep_embedding(scale, dim, flip_sin_to_cos=False, freq_shift=1)
            positive = replace(positive, guidance=embedding.astype(self.dtype))
        if self.is_xl:
            pixels = tuple(self.pixels_per_latent * side for side in first.x.shape[1:3])
            sizes = options.size_conditioning or SizeConditioning()
            ids = partial(sizes.time_ids, pixels, has_score=self.scores_aesthetics)
            positive = positive.with_time_ids(ids(is_cond=True))
            negative = None if negative is None else negative.with_time_ids(ids(is_cond=False))
        if first.channels is None:
            return positive, negative, None
        if negative is None:
            return positive.with_channels(first.channels), None, None
        uncond_image = None if first.uncond_channels is None else negative.with_channels(first.uncond_channels)
        return positive.with_channels(first.channels), negative.with_channels(first.channels), uncond_image


class StableDiffusionXL(StableDiffusion):
    """Open a checkpoint as :class:`StableDiffusion` does. The default model is SDXL-Turbo."""

    default_model = "stabilityai/sdxl-turbo"

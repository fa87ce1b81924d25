"""UnconditionalDiffusion: images without prompts, from models that draw one kind of image.

A run works as in ``StableDiffusion``, with an empty conditioning: ``generate_latents`` -> ``diffusion/sample.py`` for
the loop -> ``diffusion/denoiser.py`` -> ``models/unet2d.py``. The latents of most such models are the pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Unpack

import mlx.core as mx

from .diffusion.choice import read_name
from .diffusion.sample import Latents, Run
from .diffusion.samplers import SAMPLERS
from .options import OptionKeywords, Options, Prompt, SettingError
from .pipeline import StableDiffusion
from .planning import image_seeds, plan_run, schedule_of
from .text.encode import Conditioning
from .weights.files import Checkpoint, open_unconditional

_OF_PROMPTS = ("prompt_2", "negative_prompt_2", "clip_skip", "guidance_interval", "guidance_rescale", "pag_scale")
_OF_PROMPTS += ("token_merging", "size_conditioning", "controls", "image_prompts")
_DEFAULT = Options()


class UnconditionalDiffusion(StableDiffusion):
    """Open a checkpoint without prompts, for pixels (DDPM, DDIM, PNDM) or latents (LDM), and generate images.

    Args:
        model: a Hub id, or a folder in diffusers layout, which may hold the UNet in its root. Default:
            google/ddpm-cat-256.
        float16: a short form of ``dtype=mx.float16``.
        revision: branch, tag or commit of a Hub repository.
        low_memory: as for :class:`StableDiffusion`.
        dtype: the type in which the UNet computes: mx.float16, mx.bfloat16 or mx.float32 (default).

    ``unet``, ``autoencoder`` (for latents), ``sampler`` and ``schedule`` are attributes as in
    :class:`StableDiffusion`. The settings of the checkpoint's scheduler also apply to other samplers, such as the
    limit of x0 to [-1, 1]. Raises ValueError or OSError, one line, for a model that cannot be found, read or run.
    """

    default_model = "google/ddpm-cat-256"

    def __init__(
        self,
        model: str | PathLike | None = None,
        float16: bool = False,
        *,
        revision: str | None = None,
        low_memory: bool = False,
        dtype: mx.Dtype | None = None,
    ):
        super().__init__(model, float16, revision=revision, low_memory=low_memory, dtype=dtype)

    def _open(self, source: str | PathLike, *, float16: bool, revision: str | None, **_: Any) -> Checkpoint:
        self._checkpoint = open_unconditional(source, float16=float16, revision=revision)
        return self._checkpoint

    def _read_configs(self) -> None:
        self.unet_config, self.is_xl, self.mode = self.unet.config, False, "text"
        self.vae_config = self.autoencoder.config if "autoencoder" in self.sources else None
        self._kind = "latents" if self.vae_config else "pixels"
        self.pixels_per_latent = self.vae_config.scale if self.vae_config else 1
        config, self._latent_channels = self.unet_config, self.unet_config.in_channels
        fitting = (self.autoencoder.latent_channels,) if self.vae_config else (1, 3)
        if config.out_channels != config.in_channels or config.in_channels not in fitting:
            text = f"a UNet with {config.in_channels} input and {config.out_channels} output channels is not supported"
            raise ValueError(f"{text}: both must be {' or '.join(map(str, fitting))}")

    def generate_latents(
        self,
        n_images: int = 1,
        num_steps: int | None = None,
        seed: int | Sequence[int] | None = None,
        *,
        latent_size: tuple[int, int] | None = None,
        options: Options | None = None,
        **keywords: Unpack[OptionKeywords],
    ) -> Latents:
        """Yield the latents, or pixels in [-1, 1], after each sampler step, not yet computed.

        Args:
            n_images: number of images, computed as one batch.
            num_steps: number of denoising steps. Default: the model's.
            seed, latent_size, options, keywords: as for :meth:`StableDiffusion.generate_latents`. Each side of
                ``latent_size`` must be divisible by 2 once for each downsampling of the UNet.

        Yields [n, h, w, C], float32; ``decode`` shows any of them. Raises ValueError for a number out of range, an
        unknown name, and options that need a prompt.
        """
        settings = {"latent_size": latent_size, "seed": seed, "options": Options.of(options, keywords)}
        return super().generate_latents("", n_images, num_steps, 0.0, **settings)

    def generate(self, n_images: int = 1, **keywords: Any) -> list:
        """Generate a list of PIL images, checked for overflow, with the keywords of :meth:`generate_latents`."""
        return super().generate(n_images, **keywords)

    def generate_latents_from_image(self, *_: Any, **__: Any) -> Latents:
        """Raise ValueError: these models start only from noise."""
        raise ValueError("a model without prompts cannot change images; use StableDiffusion")

    def _plan(self, options: Options, num_steps: int | None, seed: Any, count: int = 1, strength: float = 1.0) -> Run:
        """Plan a run with the checkpoint's schedule, as diffusers reads it for the sampler's class."""
        for name in _OF_PROMPTS:
            if getattr(options, name) != getattr(_DEFAULT, name):
                raise SettingError(f"{name} needs a prompt, which this model does not take; omit it", name)
        schedule, chosen = self.schedule, options.sampler or self.sampler
        if isinstance(chosen, str) and (known := SAMPLERS[read_name(chosen)[0]].scheduler):
            scheduler = self._checkpoint.scheduler | {"_class_name": f"{known.partition(':')[0]}Scheduler"}
            schedule = schedule_of(replace(self._checkpoint, scheduler=scheduler))
        seeds = image_seeds(seed, count, counts=not options.variation_strength)
        return plan_run(schedule, options, self.defaults, num_steps=num_steps, seeds=seeds, strength=strength)

    def _check_shapes(self, options: Options, run: Run, size: tuple[int, int]) -> None:
        unit = 2 ** (len(self.unet_config.block_out_channels) - 1)
        if any(side % unit for side in size):
            raise ValueError(f"latent_size {size} does not fit the UNet; choose multiples of {unit}")
        super()._check_shapes(options, run, size)

    def _encode(self, text: Prompt, texts_2: Any = None, **_: Any) -> Conditioning:
        return Conditioning(mx.zeros((1, 0, 1)))

    def count_chunks(self, text: str, prompt_2: str | None = None, **_: Any) -> int:
        """Return 0: these models have no prompts."""
        return 0

    def _autoencode(self, half: Callable[..., Any], inputs: mx.array) -> Any:
        if self.vae_config is not None:
            return super()._autoencode(half, inputs)
        return mx.repeat(inputs, 3 // self._latent_channels, axis=-1)

"""A checkpoint's parts, read and ready to be asked: networks, tokenizers, noise schedule; and what is added to them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .diffusion.initial import MODES
from .diffusion.samplers import sampler_for
from .diffusion.schedule import Schedule
from .images.depth import estimate_depth
from .images.image import fit, from_array, to_array
from .lora.files import Lora, read_lora
from .lora.layers import Attachment, attach, fuse
from .lora.names import few_step_defaults
from .models import tiling
from .models.clip import CLIPTextModel
from .models.config import ScheduleConfig, readable
from .models.controlnet import ControlNetModel, T2IAdapter
from .models.layers import resample
from .networks import Recipe
from .text.encode import Conditioning, concatenate, encode, same_length
from .text.tokenizer import Tokenizer
from .weights.embeddings import read_embedding
from .weights.files import Checkpoint, open_checkpoint, open_part
from .weights.load import load_component
from .weights.quantize import GROUP_SIZES, quantize, still_to_do

_log = logging.getLogger("stable_diffusion")

# The pipelines in which diffusers reads any steps_offset as 1: old files lack it, and were trained with 1.
_OFFSET_ONE = {f"StableDiffusion{mode}Pipeline" for mode in ("", "Img2Img", "Inpaint")}


Prompt = str | Sequence[str] | Conditioning


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
        parts: Mapping[str, str | PathLike] | None = None,
        tokenizer: str | PathLike | None = None,
        prediction: str | None = None,
        loras: Sequence[tuple[str | PathLike, float]] = (),
        lora_partial: bool = False,
        low_memory: bool = False,
    ):
        self.low_memory, self.rows_at_once = low_memory, 1 if low_memory else None
        self.memory_limit: float | None = None
        self.recipes: dict[str, Recipe] = {}  # of the networks, by their attributes
        self._source, self._revision = self.default_model if model is None else model, revision
        checkpoint = open_checkpoint(
            self._source, float16=float16, revision=revision, tokenizer=tokenizer, prediction=prediction, parts=parts
        )
        self.dtype = mx.float16 if float16 else mx.float32
        with readable("scheduler config"):
            levels = ScheduleConfig.from_dict(checkpoint.scheduler)
            if checkpoint.pipeline in _OFFSET_ONE:
                levels = replace(levels, steps_offset=1)
            self.schedule = Schedule(levels)
        self.sampler = self._default_sampler()
        self.default_steps, self.default_guidance = checkpoint.steps, checkpoint.guidance
        self._defaults: dict[str, Any] = {}  # of other arguments of a run, by their names
        self._zero_empty_prompt = bool(checkpoint.index.get("force_zeros_for_empty_prompt", False))
        self.scores_aesthetics = bool(checkpoint.index.get("requires_aesthetics_score", False))
        self._read_networks(checkpoint, {"unet": unet_bits, "text_encoder": text_bits, "text_encoder_2": text_bits})
        self._fuse(loras, lora_partial)
        if low_memory:  # all of it has been checked; what is used is made when it is
            for name in self.recipes:
                delattr(self, name)
        else:
            self._quantize()

    def __getattr__(self, name: str) -> Any:
        """With ``low_memory``, a network that was let go of is made again when it is next used."""
        recipe = vars(self).get("recipes", {}).get(name)
        if recipe is None or not self.low_memory:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        network = recipe.make()
        setattr(self, name, network)
        return network

    def release(self, *kept: str) -> None:
        """Let go of all networks but those named, and of the memory that MLX keeps for reuse.

        With ``low_memory`` they come back when they are next used; one that was changed by hand (quantized, or given
        other weights) stays, and the log says so. Without, they are gone as with ``del``.
        """
        for name, recipe in self.recipes.items():
            if name in kept or name not in vars(self):
                continue
            if self.low_memory and recipe.is_changed(vars(self)[name]):
                _log.warning("the %s was changed by hand, so it stays in memory; del frees it, and its changes", name)
                continue
            delattr(self, name)
        mx.clear_cache()

    def to_float32(self, name: str) -> None:
        """Let the "unet" or the "autoencoder" compute in float32 from now on, also in runs that have not begun.

        Its weights are cast. Of quantized ones only the scales are: they stay packed in their bits.
        """
        self.recipes[name].dtype = mx.float32
        if name == "autoencoder":
            self._vae_dtype = mx.float32
        else:
            self.dtype = mx.float32
        if self.low_memory and not self.recipes[name].is_changed(vars(self).get(name)):
            delattr(self, name)  # it comes back in its new type
        else:
            getattr(self, name).set_dtype(mx.float32)

    def _begin(self, *networks: str) -> None:
        """Before a stage of a run: in low memory, the networks of the others are let go of."""
        if self.low_memory:
            self.release(*networks)

    def _ready(self, arrays: Any) -> Any:
        """What a stage leaves to the next: computed in low memory, or it would hold on to the stage's networks."""
        if self.low_memory:
            mx.eval(arrays)
        return arrays

    def _read_networks(self, checkpoint: Checkpoint, bits: Mapping[str, int | None]) -> None:
        parts, tokenizers = checkpoint.components, checkpoint.tokenizers
        self._encoders: list[tuple[str, str]] = []
        self._attributes = {"unet": "unet"}  # of the networks that LoRAs change, by the parts' names
        for name in sorted(tokenizers):
            part = name.replace("tokenizer", "text_encoder")
            suffix = "" if len(tokenizers) == 1 else "_2" if name.endswith("_2") else "_1"
            self._encoders.append((f"tokenizer{suffix}", f"text_encoder{suffix}"))
            self._attributes[part] = f"text_encoder{suffix}"
            tokenizer = Tokenizer.from_folder(tokenizers[name], checkpoint.pad_tokens.get(name))
            setattr(self, f"tokenizer{suffix}", tokenizer)
        for part, attribute in self._attributes.items():
            asked = None if bits[part] is None else (bits[part], GROUP_SIZES[part])
            # Weights that are stored in so many bits need not be quantized.
            recipe = Recipe(parts[part], self.dtype, still_to_do(parts[part].config, asked))
            self.recipes[attribute] = recipe
            setattr(self, attribute, recipe.plain())
        # Half precision overflows in the autoencoders of most checkpoints; their configs say which are safe.
        safe = not parts["vae"].config.get("force_upcast", True)
        self._vae_dtype = self.dtype if safe else mx.float32
        self.recipes["autoencoder"] = Recipe(parts["vae"], self._vae_dtype)
        self.autoencoder = self.recipes["autoencoder"].plain()
        self._unet_config, self._vae_config = self.unet.config, self.autoencoder.config
        self._latent_channels = self.autoencoder.latent_channels
        extra = self._unet_config.in_channels - self._latent_channels
        if extra not in MODES:
            raise ValueError(f"a UNet with {extra} channels beside the latents is not supported")
        self.mode = MODES[extra]
        read = max(self._unet_config.cross_attention_dim)
        written = sum(encoder.text_model.final_layer_norm.weight.shape[0] for _, encoder in self._text_encoders())
        if read != written:
            raise ValueError(
                f"the UNet reads prompts {read} wide and the text encoders write them {written} wide; "
                "take parts of one family of models"
            )

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
        return self._vae_config.scale

    def ensure_models_are_loaded(self) -> None:
        """Read all weights now rather than when they are first needed."""
        mx.eval([getattr(self, encoder).parameters() for _, encoder in self._encoders])
        mx.eval(self.unet.parameters(), self.autoencoder.parameters())

    def decode(self, x_t: mx.array) -> mx.array:
        """Latents [n, h, w, 4] -> images [n, 8h, 8w, 3], float32 in [0, 1].

        Values that overflow in half precision are not clipped to white but NaN, which ``from_array`` refuses; see
        ``to_float32``.
        """
        self._ready(x_t)
        self._begin("autoencoder")
        pixels = tiling.decode(self.autoencoder, x_t.astype(self._vae_dtype), self._spare(x_t)).astype(mx.float32)
        return self._ready(mx.where(mx.isinf(pixels), mx.nan, mx.clip(pixels / 2 + 0.5, 0, 1)))

    def encode(self, pixels: mx.array) -> mx.array:
        """Images [n, H, W, 3] in [-1, 1] -> latents [n, H / 8, W / 8, 4], float32 in the UNet's scale.

        They are the means of the posterior: its spread is far below one grey level, and a run needs no further
        randomness.
        """
        self._begin("autoencoder")
        mean, _ = tiling.encode(self.autoencoder, pixels.astype(self._vae_dtype), self._spare(pixels))
        return self._ready(mean.astype(mx.float32))

    def _spare(self, given: mx.array) -> float | None:
        """Bytes that the autoencoder may take to work on what is ``given``; None is as much as it likes."""
        if self.memory_limit is None:
            return None
        mx.eval(given, self.autoencoder.parameters())  # or they would not yet be counted
        return max(self.memory_limit - mx.get_active_memory(), 0.0)

    def upscale(self, x: mx.array, size: tuple[int, int], how: str = "latents") -> mx.array:
        """Latents [n, h, w, 4] of images -> those of larger ones, ``size`` (height, width) in latents.

        ``how`` is "latents", which are interpolated linearly and are to be worked on further; or "pixels", which are
        decoded, resized and encoded again.
        """
        if how == "latents":
            return x if x.shape[1:3] == tuple(size) else resample(x, size)
        if how != "pixels":
            raise ValueError(f"there is no upscaling of {how!r}; choose latents or pixels")
        height, width = (self.pixels_per_latent * side for side in size)
        images = [from_array(image) for batch in x for image in self.decode(batch[None])]
        return mx.concatenate([self.encode(mx.array(to_array(fit(i, width, height)))[None]) for i in images])

    def estimate_depth(self, image: Any) -> mx.array:
        """The depth map [S, S] of a picture, larger is nearer, by the estimator that comes with checkpoints for depth.

        The estimator is read for this and let go of. Raises ValueError or OSError where the checkpoint has none.
        """
        half = self.dtype == mx.float16
        self._begin()
        estimator = open_part(self._source, "depth_estimator", float16=half, revision=self._revision)
        return estimate_depth(load_component(estimator), image)

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
        self._begin(*(encoder for _, encoder in self._encoders))
        encoded = [encode(one, self._text_encoders(), xl=self._is_xl, **options) for one in texts]
        table = concatenate(self._same_length(encoded))
        self._ready([value for value in vars(table).values() if isinstance(value, mx.array)])
        return table

    def encode_prompts(
        self, text: Prompt, negative_text: Prompt = "", **reading: Any
    ) -> tuple[Conditioning, Conditioning]:
        """Encode prompts and negative prompts for a run with guidance, which then needs the text encoders no more.

        ``reading`` are the arguments of :meth:`encode_prompt`. Both results have the same number of chunks. Checkpoints
        that were trained so are told zeros in place of an empty negative prompt. Raises ValueError as that does, and
        for several negative prompts that are not one for each prompt.
        """
        empty = isinstance(negative_text, str) and not negative_text
        of_negative = {"clip_skip": reading.get("clip_skip", 0)} if empty else reading  # it has no signs to be read
        positive, negative = (
            given if isinstance(given, Conditioning) else self.encode_prompt(given, **options)
            for given, options in ((text, reading), (negative_text, of_negative))
        )
        if self._zero_empty_prompt and empty:
            negative = negative.map(mx.zeros_like)
        if len(negative) not in (1, len(positive)):
            raise ValueError(f"{len(negative)} negative prompts for {len(positive)} prompts; give one, or one for each")
        positive, negative = self._same_length([positive, negative])
        return positive, negative

    def load_embedding(self, path: str | PathLike, word: str | None = None) -> str:
        """Add a textual inversion embedding (Gal et al. 2023); returns the word that stands for it in prompts.

        Args:
            path: a .safetensors file, see :func:`stable_diffusion.weights.embeddings.read_embedding`.
            word: the word; None is the file's own.

        Raises ValueError where the file is no embedding or its width is not that of this model's text encoders.
        """
        name, vectors = read_embedding(path)
        word = name if word is None else word
        encoders = self._encoders
        if self._is_xl and len(encoders) == 1:  # the refiner reads with OpenCLIP-G alone
            vectors = vectors[-1:]
        if len(vectors) != len(encoders):
            raise ValueError(f"{path} has vectors for {len(vectors)} text encoders; this model has {len(encoders)}")
        try:
            for (tokenizer, encoder), table in zip(encoders, vectors, strict=True):

                def add(network: CLIPTextModel, table: mx.array = table) -> list[int]:
                    return network.text_model.embeddings.add(table)

                ids = self.recipes[encoder].change(getattr(self, encoder), add)
                getattr(self, tokenizer).add(word, ids)
        except ValueError as error:
            raise ValueError(f"{path} is for another family of models: {error}") from error
        return word

    def load_lora(self, source: str | PathLike, scale: float = 1.0, *, partial: bool = False) -> Attachment:
        """Let a LoRA (Hu et al. 2021) run beside the weights, which stay as they are.

        The result's ``scale`` may be changed between two runs, and ``detach()`` takes it away. LoRAs that are given to
        the class itself are added to its weights instead: they cost no time, and stay.

        Args:
            source: a file, a folder or a Hub id with one, or "id:file".
            scale: how much of it; 0 is none.
            partial: take what fits of it; otherwise ValueError names what does not.
        """
        lora = read_lora(source)
        attachment = attach(self._networks(), lora, scale, partial=partial)
        for attribute in self._attributes.values() if self.low_memory else ():
            self.recipes[attribute].attachments.append(attachment)
        self._take_defaults(lora)
        return attachment

    def load_controlnet(self, source: str | PathLike) -> ControlNetModel | T2IAdapter:
        """A ControlNet or T2I-Adapter, from a file, a folder or a Hub id; for ``Control``.

        Raises ValueError or OSError, one line, for what cannot be found or read, or is for another family of models.
        """
        network = load_component(open_part(source, "controlnet", float16=self.dtype == mx.float16), self.dtype)
        network.config.check_fits(self._unet_config)
        return network

    def _networks(self) -> dict[str, nn.Module]:
        """The networks that LoRAs change. One that was let go of is stood for by a lazy one, which takes no memory."""
        return {
            part: self.recipes[name].plain() if self.low_memory and name not in vars(self) else getattr(self, name)
            for part, name in self._attributes.items()
        }

    def _fuse(self, sources: Sequence[tuple[str | PathLike, float]], partial: bool) -> None:
        loras = [(read_lora(source), scale) for source, scale in sources]
        if loras:
            fusion = fuse(self._networks(), loras, partial=partial, keep=False)
            for attribute in self._attributes.values():
                recipe = self.recipes[attribute]
                recipe.loras, recipe.without = list(sources), frozenset(fusion.unmatched)
        for lora, _ in loras:
            self._take_defaults(lora)

    def _take_defaults(self, lora: Lora) -> None:
        """Run as the authors of a LoRA for few steps run it, wherever a run is not told otherwise."""
        found = few_step_defaults(lora.path.as_posix(), lora.metadata)
        if found is None:
            return
        asked = ", ".join(f"{name} {value}" for name, value in found.items())
        _log.warning("%s was made for few steps: the defaults now are %s", lora.path.name, asked)
        self.sampler, self.default_steps = found.pop("sampler"), found.pop("num_steps")
        self.default_guidance, self._defaults = found.pop("cfg_weight"), found

    def _quantize(self) -> None:
        for part, network in self._networks().items():
            if pending := self.recipes[self._attributes[part]].quantization:
                quantize(network, *pending)

    def _text_encoders(self) -> list[tuple[Tokenizer, CLIPTextModel]]:
        return [(getattr(self, tokenizer), getattr(self, encoder)) for tokenizer, encoder in self._encoders]

    def _same_length(self, conditionings: list[Conditioning]) -> list[Conditioning]:
        """The same with as many chunks as the longest of them has."""
        return same_length(conditionings, lambda: self.encode_prompt("").context)

    @property
    def _is_xl(self) -> bool:
        return self._unet_config.addition_embed_type == "text_time"

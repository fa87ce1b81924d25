"""Networks of a checkpoint: opened lazily, read when they are used, freed and loaded again in low memory."""

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, Unpack
from weakref import WeakKeyDictionary

import mlx.core as mx

from .diffusion.sample import step_of
from .images.depth import estimate_depth
from .images.image import clip_pixels
from .lora.control import load_controlnet
from .lora.delta import Scale
from .lora.files import LoRAWeights, read_lora
from .lora.layers import AttachedLoRA, attach, check_fit
from .lora.network import NetworkSource
from .models import cpu, tiling
from .models.config import CLIPTextConfig
from .models.ip_adapter import IPAdapter
from .models.lllite import ControlNetwork
from .models.seamless import seamlessly
from .options import Prompt, SettingError
from .planning import RunDefaults
from .text.encode import Conditioning, ReadingKeywords, count_chunks, encode, same_length
from .text.tokenizer import Tokenizer
from .weights.catalog import describe_settings, few_step_settings
from .weights.embeddings import read_embedding
from .weights.files import Checkpoint, open_part
from .weights.formats.safetensors import loading_stream
from .weights.ip_adapters import open_ip_adapter
from .weights.layout import SUFFIXES
from .weights.load import LazyNetwork, load_component, read_weights
from .weights.quantize import remaining_quantization

_log = logging.getLogger("stable_diffusion")

LoRASource = str | PathLike


class Networks:
    """Hold the networks of a checkpoint as attributes, with their sources, LoRAs and embeddings.

    All methods may be called from any thread.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: mx.Dtype,
        low_memory: bool,
        bits: Mapping[str, int | str | None],
        loras: Sequence[tuple[LoRASource, Scale]] = (),
        lora_partial: bool = False,
    ):
        self.low_memory, self.dtype = low_memory, dtype
        self.sources: dict[str, NetworkSource] = {}  # by attribute
        self._lock = threading.RLock()
        self._encoders: list[tuple[str, str]] = []  # the attributes of tokenizer and text encoder
        # Networks that ``release`` keeps for another object, such as a trainer, as long as that object exists.
        self.pinned: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
        self.embeddings: dict[str, tuple[str, ...]] = {}  # a file -> its words in prompts
        self._attached: list[AttachedLoRA] = []
        self._few_step: list[tuple[AttachedLoRA | None, RunDefaults]] = []  # of few-step LoRAs; None: fused
        attributes, several = {"unet": "unet"}, len(checkpoint.tokenizers) > 1
        for name, folder in sorted(checkpoint.tokenizers.items()):
            suffix = "" if not several else "_2" if name.endswith("_2") else "_1"
            self._encoders.append((f"tokenizer{suffix}", f"text_encoder{suffix}"))
            attributes[encoder := name.replace("tokenizer", "text_encoder")] = f"text_encoder{suffix}"
            size = CLIPTextConfig.from_dict(checkpoint.components[encoder].config).vocab_size
            setattr(self, f"tokenizer{suffix}", Tokenizer.from_folder(folder, checkpoint.pad_tokens.get(name), size))
        loaded, fused, bundled = {}, [], {}
        attributes |= {"vae": "autoencoder"} if "vae" in checkpoint.components else {}
        for part, attribute in attributes.items():
            component = checkpoint.components[part]
            quantization = remaining_quantization(component, bits.get(part))
            # Half precision overflows in most autoencoders; their configs say which are safe.
            is_safe = part != "vae" or not component.config.get("force_upcast", True)
            source = NetworkSource(component, dtype if is_safe else mx.float32, quantization, self._attached)
            self.sources[attribute], loaded[part] = source, load_component(component, source.dtype)
        for lora, scale in loras:
            weights = read_lora(lora)
            check_fit(loaded, weights, scale, lora_partial)
            self._add_defaults(weights, None)
            fused.append((weights.path, scale))
            bundled |= weights.embeddings
        for attribute, source in self.sources.items():
            source.fused = fused
            setattr(self, attribute, source.build(loaded[source.component.name]))
        for word, vectors in bundled.items():
            self._add_words((word,), vectors, word)

    # --- reading and releasing ---------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Build a network that was freed or deleted. Its weights are read at the first use."""
        source = vars(self).get("sources", {}).get(name)
        if source is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with self._lock:
            if name not in vars(self):
                setattr(self, name, source.build())
            return vars(self)[name]

    def release(self, keep: Collection[str] = ()) -> None:
        """Free all networks except those in ``keep``, such as "unet", and the memory that MLX holds for reuse.

        They are loaded again at their next use. A network that you modified (quantized, or with other weights) stays
        loaded, and the log says so.
        """
        with self._lock:
            kept = set(keep).union(*self.pinned.values())
            for name, source in self.sources.items():
                if name in kept or name not in vars(self):
                    continue
                if source.is_edited(vars(self)[name]):
                    _log.warning("the %s was modified and stays loaded; del frees it and discards the changes", name)
                else:
                    delattr(self, name)
        cpu.clear_cache()

    def _use(self, *names: str, beside: Sequence[Any] = ()) -> list[Any]:
        """Begin a stage of a run: read the weights of its networks and, in low memory, free all others.

        ``beside`` are networks from outside the checkpoint, such as ControlNets.
        """
        cpu.clear_streams_at_thread_end()
        with self._lock:
            if self.low_memory:
                self.release(keep=names)
            networks = [getattr(self, name) for name in names]
        beside_names = [type(network).__name__ for network in beside]
        for name, network in zip((*names, *beside_names), (*networks, *beside), strict=True):
            read_weights(network, partial(self.on_layer, name))
        return networks

    def on_layer(self, name: str, number: int, total: int) -> None:
        """Do nothing. A program may replace this method by a function that shows the progress of loading."""

    def ensure_models_are_loaded(self) -> None:
        """Read all weights now instead of at the first use."""
        self._use(*self.sources)

    def to_float32(self, name: str) -> None:
        """Switch the "unet" or the "autoencoder" to float32. Quantized weights stay; their scales are cast."""
        with self._lock:
            self.sources[name].dtype = mx.float32
            if name == "unet":
                self.dtype = mx.float32
            if self.sources[name].is_edited(getattr(self, name)):
                getattr(self, name).set_dtype(mx.float32)
            else:
                delattr(self, name)  # it is loaded again in its new type

    # --- running -----------------------------------------------------------------------------------------------------

    def encode_prompt(
        self,
        text: str | Sequence[str],
        *,
        prompt_2: str | Sequence[str] | None = None,
        **reading: Unpack[ReadingKeywords],
    ) -> Conditioning:
        """Encode prompts with every text encoder. ``generate_latents`` accepts the result instead of a text.

        ``prompt_2`` is the prompt for XL's second encoder, one for all or one for each; by default it is ``text``.
        ``reading``, the result (a row for each prompt) and the errors are those of ``stable_diffusion.text.encode``.
        You may delete the text encoders afterwards.
        """
        encoded = self._encode(text, texts_2=prompt_2, **reading)
        mx.eval(encoded.arrays())  # so that they can be used in another thread
        return encoded

    def encode_prompts(
        self,
        text: Prompt,
        negative_text: Prompt = "",
        *,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        **reading: Unpack[ReadingKeywords],
    ) -> tuple[Conditioning, Conditioning]:
        """Encode prompts and negative prompts for a run with guidance, to the same number of chunks.

        An empty negative prompt becomes zeros for checkpoints that were trained so. Raises ValueError as
        :meth:`encode_prompt` does, and for a wrong number of negative prompts.
        """
        positive, negative = self._encode_pair((text, negative_text), (prompt_2, negative_prompt_2), **reading)
        mx.eval(positive.arrays(), negative.arrays())
        return positive, negative

    def _encode_pair(
        self, texts: tuple[Prompt, Prompt], texts_2: Sequence[Any], **reading: Any
    ) -> tuple[Conditioning, Conditioning]:
        positive, negative = map(partial(self._encode, **reading), texts, texts_2)
        if self._zero_empty_prompt and texts[1] == "" and not texts_2[1]:
            negative = negative.map(mx.zeros_like)
        if len(negative) not in (1, len(positive)):
            raise ValueError(f"{len(negative)} negative prompts for {len(positive)} prompts; give one, or one for each")
        return tuple(same_length([positive, negative], lambda: self._encode("").context))

    def _encode(self, text: Prompt, texts_2: Any = None, **reading: Any) -> Conditioning:
        if isinstance(text, Conditioning):
            if texts_2 is not None:
                raise ValueError("prompt_2 needs a text prompt: give both to encode_prompt")
            return text
        networks = self._use(*(encoder for _, encoder in self._encoders))
        tokenizers = [getattr(self, tokenizer) for tokenizer, _ in self._encoders]
        encoders = list(zip(tokenizers, networks, strict=True))
        encoded = encode(text, encoders, xl=self.is_xl, texts_2=texts_2, **reading)
        if self.low_memory:  # so that the text encoders can be freed
            mx.eval(encoded.arrays())
        return encoded

    def decode(self, x_t: mx.array, *, seamless: str | None = None) -> mx.array:
        """Decode latents [n, h, w, 4] to images [n, 8h, 8w, 3], float32 in [0, 1].

        Values that overflow in half precision become NaN, which ``check`` and ``to_images`` refuse.
        """
        if self.low_memory:  # so that the UNet can be freed
            mx.eval(x_t)
        pixels = self._autoencode(seamlessly(seamless, tiling.decode), x_t).astype(mx.float32)
        return mx.where(mx.isinf(pixels), mx.nan, mx.clip(pixels / 2 + 0.5, 0, 1))

    def decode_checked(self, x_t: mx.array) -> mx.array:
        """Decode latents as :meth:`decode` does, and again in float32 if pixels are not finite; see ``check``."""
        return self.retry_in_float32("autoencoder", lambda: self.check(self.decode(x_t)))

    def encode(self, pixels: mx.array) -> mx.array:
        """Encode images [n, H, W, 3] in [-1, 1] to latents [n, H / 8, W / 8, 4], float32 in the UNet's scale.

        They are the means of the posterior: its spread is far below one grey level.
        """

        def compute() -> mx.array:
            mean, _ = self._autoencode(tiling.encode, pixels)
            return mean.astype(mx.float32)

        if self.sources["autoencoder"].dtype == mx.float32:
            return compute()
        return self.retry_in_float32("autoencoder", lambda: self.check(compute()))

    def _autoencode(self, half: Callable[..., Any], inputs: mx.array) -> Any:
        """Run the encoder or decoder within ``memory_limit``."""
        (autoencoder,) = self._use("autoencoder")
        cpu.all_cores()
        inputs, budget = inputs.astype(self.sources["autoencoder"].dtype), None
        if self.memory_limit is not None:
            mx.eval(inputs)  # or they would not be counted yet
            budget = max(self.memory_limit - mx.get_active_memory(), 0.0)
        outputs = half(autoencoder, inputs, budget)
        if self.low_memory:  # so that the autoencoder can be freed
            mx.eval(outputs)
        return outputs

    def check(self, x: mx.array) -> mx.array:
        """Evaluate latents or pixels and return them. FloatingPointError, with the step, if they are not finite."""
        if not mx.isfinite(x).all().item():
            step = step_of(x)
            kind = "pixels" if x.shape[-1] == 3 else "latents"
            where = "" if step is None else f" of step {step}"
            raise FloatingPointError(f"the {kind}{where} are not finite")
        return x

    def retry_in_float32(self, network: str, compute: Callable[[], Any]) -> Any:
        """Return the result of ``compute()``; after a FloatingPointError, switch to float32 and compute it again.

        ``network`` is "unet" or "autoencoder". Raises FloatingPointError if it computes in float32 already.
        """
        try:
            return compute()
        except FloatingPointError as error:
            if network not in self.sources or self.sources[network].dtype == mx.float32:
                raise
            dtype, title = str(self.sources[network].dtype).rpartition(".")[2], network.replace("unet", "UNet")
            _log.warning("%s overflow, %s: switching the %s to float32 and recomputing", dtype, error, title)
        self.to_float32(network)
        return compute()

    def estimate_depth(self, image: Any) -> mx.array:
        """Estimate the depth map [S, S] of an image, larger is nearer, with the estimator of a depth checkpoint.

        The estimator is loaded, used and freed. Raises ValueError or OSError for a checkpoint without an estimator.
        """
        half = self.dtype != mx.float32
        estimator = load_component(open_part(self.source, "depth_estimator", float16=half, revision=self._revision))
        self._use(beside=[estimator])
        return estimate_depth(estimator, image)

    def load_safety_checker(self, safety_model: str | PathLike | None = None) -> Callable[[Any], list[bool]]:
        """Return a function that maps a list of images to bools: True for each one that the safety checker flags.

        ``safety_model`` is the folder, file or Hub id of a checker; default: the checkpoint's. It is loaded at the
        first call and, in low memory, freed after each. Images are paths, PIL images or arrays [H, W, 3] in [-1, 1].
        """
        source, revision = (self.source, self._revision) if safety_model is None else (safety_model, None)
        try:
            part = open_part(source, "safety_checker", float16=self.dtype != mx.float32, revision=revision)
        except ValueError as error:
            remedy = "set safety_model, for example to CompVis/stable-diffusion-safety-checker"
            raise SettingError(f"{error}; {remedy}", "safety_model") from error
        lazy = LazyNetwork(part, self.dtype)

        def flags(images: Any) -> list[bool]:
            checker = lazy.build(keep=not self.low_memory)
            self._use(beside=[checker])
            return checker(clip_pixels(images, checker.config.image_size)).tolist()

        return flags

    def count_chunks(self, text: str, prompt_2: str | None = None, **reading: Unpack[ReadingKeywords]) -> int:
        """Count the chunks of 75 tokens of a prompt, without encoding it."""
        return count_chunks(text, getattr(self, self._encoders[0][0]), prompt_2, **reading)

    # --- LoRAs, embeddings, ControlNets ------------------------------------------------------------------------------

    def load_lora(self, source: LoRASource, scale: Scale = 1.0, *, partial: bool = False) -> AttachedLoRA:
        """Attach a LoRA (Hu et al. 2021) without changing the weights: from a file, a folder, a Hub id or "id:file".

        You may change the ``scale`` of the result between two runs: one number or (text encoders, UNet). ``detach()``
        removes the LoRA. LoRAs given to the class are fused into its weights instead: they cost no time, and stay. A
        few-step LoRA also changes the defaults of a run while its scale is not 0. ``partial`` applies the layers that
        match; without it a ValueError names those that do not.
        """
        lora = read_lora(source)
        with self._lock:
            networks = {part.component.name: getattr(self, name) for name, part in self.sources.items()}
            result = attach(networks, lora, scale, partial=partial)
            self._attached[:] = [*(attached for attached in self._attached if attached.is_attached), result]
            self._few_step = [(handle, d) for handle, d in self._few_step if handle is None or handle.is_attached]
            self._add_defaults(lora, result)
        for word, vectors in lora.embeddings.items():
            self._add_words((word,), vectors, word)
        return result

    def _add_defaults(self, lora: LoRAWeights, handle: AttachedLoRA | None) -> None:
        if settings := few_step_settings(lora.path.as_posix(), lora.metadata):
            _log.warning(describe_settings(lora.path.name, settings))
            self._few_step.append((handle, RunDefaults(**settings)))

    def load_controlnet(self, source: str | PathLike) -> ControlNetwork:
        """Load a ControlNet of any kind, or a T2I-Adapter, from a file, a folder or a Hub id, for ``Control``.

        A Control-LoRA is built from the UNet, including the LoRAs that were given to the class.

        Raises ValueError or OSError, one line, for a source that cannot be found or read, or is for another model
        family.
        """
        unet = replace(self.sources["unet"], quantization=None, attached=())
        return load_controlnet(source, self.dtype, self.unet_config, unet.build)

    def load_ip_adapter(self, source: str | PathLike, image_encoder: str | PathLike | None = None) -> IPAdapter:
        """Load an IP-Adapter (Ye et al. 2023) and its image encoder, from a local file or from the Hub as "id:file".

        ``image_encoder`` is the folder, file or Hub id of the encoder it was trained with; by default it is searched
        near the file, then on the Hub. Raises ValueError or OSError, one line, for files that cannot be found, read or
        used.
        """
        part, encoder = open_ip_adapter(source, image_encoder, float16=self.dtype != mx.float32)
        network = load_component(part, self.dtype)
        network.config.check_fits(self.unet_config)
        network.encoder = LazyNetwork(encoder, self.dtype)
        return network

    def encode_image_prompt(self, adapter: IPAdapter, images: Any) -> tuple[mx.array, mx.array]:
        """Encode images with an IP-Adapter: -> (image tokens [n, M, D], negative image tokens [1, M, D]).

        ``images`` are one or several paths, PIL images or arrays [H, W, 3] in [-1, 1]. The adapter's image encoder is
        loaded first and, in low memory, freed afterwards.
        """
        encoder = adapter.encoder.build(keep=not self.low_memory)
        pixels = clip_pixels(images, encoder.config.image_size)
        self._use(beside=[encoder, adapter])
        tokens = adapter.encode(encoder, pixels)
        mx.eval(tokens)  # so that they can be used in another thread
        return tokens

    def load_embedding(self, path: str | PathLike, word: str | None = None) -> str:
        """Add a textual inversion embedding (Gal et al. 2023) and return the word for it in prompts.

        ``path`` is a file, see :func:`stable_diffusion.weights.embeddings.read_embedding`. By default both the word in
        the file and the file's name work in prompts; ``word`` replaces them. ComfyUI's form, embedding:word, works too.
        Raises ValueError for a file that is not an embedding, or an embedding for text encoders of another width.
        """
        words, vectors = read_embedding(path)
        words = words if word is None else (word,)
        self._add_words(words, vectors, str(path))
        self.embeddings[str(path)] = words
        return words[0]

    def _add_words(self, words: Sequence[str], vectors: Sequence[mx.array], where: str) -> None:
        vectors = vectors[-len(self._encoders) :]  # XL's refiner has only OpenCLIP-G
        if len(vectors) != (count := len(self._encoders)):
            raise ValueError(f"{where} has vectors for {len(vectors)} text encoders; this model has {count}")
        try:
            for (tokenizer, encoder), table in zip(self._encoders, vectors, strict=True):
                # On the stream of the loader, so that any thread can evaluate it.
                with self._lock, mx.stream(loading_stream(mx.default_device().type)):
                    ids = getattr(self, encoder).text_model.embeddings.add(table)
                    self.sources[encoder].words.append(table)
                for word in words:
                    for name in (f"embedding:{word}", *(f"embedding:{word}{suffix}" for suffix in SUFFIXES), word):
                        getattr(self, tokenizer).add(name, ids)
        except ValueError as error:
            raise ValueError(f"{where} is for another model family: {error}") from error

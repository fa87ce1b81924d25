"""Networks of a checkpoint: opened lazily, read when they are used, released and loaded again in low memory."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import Any, Unpack

import mlx.core as mx
import mlx.nn as nn

from .diffusion.sample import step_of
from .images.depth import estimate_depth
from .lora.delta import LoRADelta
from .lora.files import LoRAWeights, read_lora
from .lora.layers import AttachedLoRA, attach, attached, fuse
from .lora.names import few_step_defaults
from .models import cpu, tiling
from .models.clip import CLIPTextModel
from .models.controlnet import ControlNetModel, T2IAdapter
from .models.threads import clear_streams_at_thread_end
from .options import Prompt, RunDefaults
from .text.encode import Conditioning, Encoders, ReadingKeywords, count_chunks, encode, same_length
from .text.tokenizer import Tokenizer
from .weights.embeddings import read_embedding
from .weights.files import Checkpoint, Component, open_part
from .weights.load import load_component, read_weights, size_in_bytes
from .weights.quantize import quantize, quantize_lazily, remaining_quantization

_log = logging.getLogger("stable_diffusion")

LoRASource = str | PathLike


@dataclass
class NetworkSource:
    """Rebuild a released network from its files, LoRAs and quantization.

    Args:
        component: config and files.
        dtype: the type in which the network computes.
        quantization: (bits, group size), or None.
        loras: (source, scale) of each LoRA in the weights; they are read again for each build.
        unmatched: the names in these LoRAs that the model does not have.
        attached: LoRAs that run beside the weights.
        edits: functions that change the network after it is built.
    """

    component: Component
    dtype: mx.Dtype
    quantization: tuple[int, int] | None = None
    loras: Sequence[tuple[LoRASource, float]] = ()
    unmatched: frozenset[str] = frozenset()
    attached: list[AttachedLoRA] = field(default_factory=list)
    edits: list[Callable[[nn.Module], Any]] = field(default_factory=list)
    _arrays: tuple | None = None  # identifies the weights that were built

    def build(self) -> nn.Module:
        """Build the network with lazy weights: nothing is read, and it takes no memory."""
        network, name = load_component(self.component, self.dtype), self.component.name
        for source, scale in self.loras:
            lora = read_lora(source)
            deltas = tuple(d for d in lora.deltas if d.network == name and d.name not in self.unmatched)
            if deltas:
                fuse({name: network}, [(replace(lora, deltas=deltas, unknown=()), scale)])
        if self.quantization is not None:
            quantize_lazily(network, *self.quantization)
        for edit in self.edits:
            edit(network)
        for lora in self.attached:
            lora.reattach(name, network)
        self.built(network)
        return network

    def built(self, network: nn.Module) -> None:
        """Take ``network`` for the one that was built."""
        self._arrays = _identify(network)

    def edit(self, network: nn.Module, edit: Callable[[nn.Module], Any]) -> Any:
        """Change the network now and whenever it is built; returns the result of ``edit``."""
        was_edited = self.is_edited(network)
        result = edit(network)
        self.edits.append(edit)
        if not was_edited:
            self.built(network)
        return result

    def is_edited(self, network: Any) -> bool:
        """Return whether ``network`` is not the one that was built: replaced, quantized or with other weights.

        Values written into an array of it are not seen.
        """
        if not isinstance(network, nn.Module) or _identify(network) != self._arrays:
            return True
        return not attached(network) <= set(self.attached)

    @cached_property
    def size(self) -> int:
        """Return the bytes of the weights in memory. Only the headers of the files are read."""
        network = load_component(self.component, self.dtype)
        if self.quantization is not None:
            quantize_lazily(network, *self.quantization)
        return size_in_bytes(network)


def _identify(network: nn.Module) -> tuple:
    """Identify the arrays of a network, without those of attached LoRAs."""
    return tuple(
        (path.removesuffix(".base"), name, id(value))
        for path, module in network.named_modules()
        if not isinstance(module, LoRADelta)
        for name, value in module.items()
        if isinstance(value, mx.array)
    )


class Networks:
    """Hold the networks of a checkpoint as attributes, with their sources, LoRAs and embeddings.

    All methods may be called from any thread.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype, low_memory: bool, bits: Mapping[str, int | None]):
        self.low_memory, self.dtype = low_memory, dtype
        self.sources: dict[str, NetworkSource] = {}  # by attribute
        self._lock = threading.RLock()
        self._encoders: list[tuple[str, str]] = []  # the attributes of tokenizer and text encoder
        self._lora_parts = {"unet": "unet"}  # part of a checkpoint -> attribute, of the networks that LoRAs change
        self._few_step: list[tuple[AttachedLoRA | None, RunDefaults]] = []
        components, several = checkpoint.components, len(checkpoint.tokenizers) > 1
        for name in sorted(checkpoint.tokenizers):
            part = name.replace("tokenizer", "text_encoder")
            suffix = "" if not several else "_2" if name.endswith("_2") else "_1"
            self._encoders.append((f"tokenizer{suffix}", f"text_encoder{suffix}"))
            self._lora_parts[part] = f"text_encoder{suffix}"
            tokenizer = Tokenizer.from_folder(checkpoint.tokenizers[name], checkpoint.pad_tokens.get(name))
            setattr(self, f"tokenizer{suffix}", tokenizer)
        for part, attribute in self._lora_parts.items():
            quantization = None
            if bits.get(part) is not None:  # weights that are stored in these bits need not be quantized
                quantization = remaining_quantization(part, components[part].config, bits[part])
            self.sources[attribute] = NetworkSource(components[part], dtype, quantization)
        # Half precision overflows in most autoencoders; their configs say which are safe.
        is_safe = not components["vae"].config.get("force_upcast", True)
        self.sources["autoencoder"] = NetworkSource(components["vae"], dtype if is_safe else mx.float32)
        for attribute, source in self.sources.items():
            setattr(self, attribute, load_component(source.component, source.dtype))

    # --- reading and releasing ---------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Build a network that was released or deleted; nothing is read before it is used."""
        source = vars(self).get("sources", {}).get(name)
        if source is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with self._lock:
            if name not in vars(self):
                setattr(self, name, source.build())
            return vars(self)[name]

    def release(self, *kept: str) -> None:
        """Free all networks except those named, and the memory that MLX keeps for reuse.

        They are loaded again at their next use. A network that was changed by hand (quantized, or with other weights)
        stays, and the log says so.
        """
        with self._lock:
            for name, source in self.sources.items():
                if name in kept or name not in vars(self):
                    continue
                if source.is_edited(vars(self)[name]):
                    _log.warning("the %s was changed by hand and stays in memory; del frees it and its changes", name)
                else:
                    delattr(self, name)
        mx.clear_cache()

    def _use(self, *names: str) -> list[Any]:
        """Begin a stage of a run: read the weights of its networks, and in low memory free all others."""
        clear_streams_at_thread_end()
        with self._lock:
            if self.low_memory:
                self.release(*names)
            networks = [getattr(self, name) for name in names]
        for network in networks:
            if isinstance(network, nn.Module):
                read_weights(network)
        return networks

    def ensure_models_are_loaded(self) -> None:
        """Read all weights now and not when they are first needed."""
        for name in self.sources:
            read_weights(getattr(self, name))

    def to_float32(self, name: str) -> None:
        """Compute the "unet" or the "autoencoder" in float32 from now on. Of quantized weights the scales are cast."""
        with self._lock:
            self.sources[name].dtype = mx.float32
            if name == "unet":
                self.dtype = mx.float32
            if not self.sources[name].is_edited(vars(self).get(name)):
                delattr(self, name)  # it is loaded in its new type
            else:
                getattr(self, name).set_dtype(mx.float32)

    def _computed(self, arrays: Any) -> Any:
        """Evaluate the results of a stage in low-memory mode, so that its networks can be freed."""
        if self.low_memory:
            mx.eval(arrays)
        return arrays

    # --- running -----------------------------------------------------------------------------------------------------

    def encode_prompt(self, text: str | Sequence[str], **reading: Unpack[ReadingKeywords]) -> Conditioning:
        """Encode prompts with every text encoder; ``generate_latents`` takes the result in place of the text.

        The text encoders may be deleted afterwards. ``reading``, the result (a row for each prompt) and the errors are
        those of :func:`stable_diffusion.text.encode.encode`.
        """
        encoded = self._encode(text, **reading)
        mx.eval(encoded.arrays())  # so that they can be used in another thread
        return encoded

    def encode_prompts(
        self, text: Prompt, negative_text: Prompt = "", **reading: Unpack[ReadingKeywords]
    ) -> tuple[Conditioning, Conditioning]:
        """Encode prompts and negative prompts for a run with guidance, to the same number of chunks.

        Checkpoints that were trained with it get zeros for an empty negative prompt. Raises ValueError as
        :meth:`encode_prompt` does, and for several negative prompts that are not one for each prompt.
        """
        positive, negative = self._encode_pair(text, negative_text, **reading)
        mx.eval(positive.arrays(), negative.arrays())
        return positive, negative

    def _encode_pair(self, text: Prompt, negative_text: Prompt, **reading: Any) -> tuple[Conditioning, Conditioning]:
        positive, negative = (
            prompt if isinstance(prompt, Conditioning) else self._encode(prompt, **reading)
            for prompt in (text, negative_text)
        )
        if self._zero_empty_prompt and isinstance(negative_text, str) and not negative_text:
            negative = negative.map(mx.zeros_like)
        if len(negative) not in (1, len(positive)):
            raise ValueError(f"{len(negative)} negative prompts for {len(positive)} prompts; give one, or one for each")
        positive, negative = same_length([positive, negative], lambda: self._encode("").context)
        return positive, negative

    def _encode(self, text: str | Sequence[str], **reading: Any) -> Conditioning:
        encoded = encode(text, self._text_encoders(), xl=self.is_xl, **reading)
        self._computed(encoded.arrays())
        return encoded

    def decode(self, x_t: mx.array) -> mx.array:
        """Decode latents [n, h, w, 4] to images [n, 8h, 8w, 3], float32 in [0, 1].

        Values that overflow in half precision become NaN and not white, which ``check`` and ``to_images`` refuse.
        """
        self._computed(x_t)
        (autoencoder,) = self._use("autoencoder")
        cpu.all_cores()
        latents = x_t.astype(self.sources["autoencoder"].dtype)
        pixels = tiling.decode(autoencoder, latents, self._budget(x_t)).astype(mx.float32)
        return self._computed(mx.where(mx.isinf(pixels), mx.nan, mx.clip(pixels / 2 + 0.5, 0, 1)))

    def encode(self, pixels: mx.array) -> mx.array:
        """Encode images [n, H, W, 3] in [-1, 1] to latents [n, H / 8, W / 8, 4], float32 in the UNet's scale.

        They are the means of the posterior: its spread is far below one grey level.
        """
        (autoencoder,) = self._use("autoencoder")
        cpu.all_cores()
        pixels = pixels.astype(self.sources["autoencoder"].dtype)
        mean, _ = tiling.encode(autoencoder, pixels, self._budget(pixels))
        return self._computed(mean.astype(mx.float32))

    def _budget(self, inputs: mx.array) -> float | None:
        """Return the bytes that the autoencoder may take to work on the ``inputs``; None is no limit."""
        if self.memory_limit is None:
            return None
        mx.eval(inputs)  # or they would not be counted yet
        return max(self.memory_limit - mx.get_active_memory(), 0.0)

    def check(self, x: mx.array) -> mx.array:
        """Return latents or pixels, evaluated; FloatingPointError where they are not finite, with the step."""
        if not mx.isfinite(x).all().item():
            step = step_of(x)
            what = "pixels" if step is None else f"latents of step {step}"
            raise FloatingPointError(f"the {what} are not finite")
        return x

    def retry_in_float32(self, network: str, compute: Callable[[], Any]) -> Any:
        """Return the result of ``compute()``; where it raises FloatingPointError, once more with float32.

        ``network`` is "unet" or "autoencoder". Raises FloatingPointError where that computes in float32 already.
        """
        try:
            return compute()
        except FloatingPointError as error:
            if self.sources[network].dtype == mx.float32:
                raise
            _log.warning("%s: float16 overflow, the %s computes in float32 from now on", error, network)
        self.to_float32(network)
        return compute()

    def estimate_depth(self, image: Any) -> mx.array:
        """Estimate the depth map [S, S] of a picture, larger is nearer, with the estimator in checkpoints for depth.

        The estimator is read for this and freed. Raises ValueError or OSError where the checkpoint has none.
        """
        self._use()
        is_half = self.dtype == mx.float16
        part = open_part(self.source, "depth_estimator", float16=is_half, revision=self._revision)
        return estimate_depth(load_component(part), image)

    def count_chunks(self, text: str, **reading: Unpack[ReadingKeywords]) -> int:
        """Return the number of chunks of 75 tokens that a prompt is encoded in; nothing is computed."""
        return count_chunks(text, getattr(self, self._encoders[0][0]), **reading)

    # --- LoRAs, embeddings, ControlNets ------------------------------------------------------------------------------

    def load_lora(self, source: LoRASource, scale: float = 1.0, *, partial: bool = False) -> AttachedLoRA:
        """Run a LoRA (Hu et al. 2021) beside the weights, which stay as they are.

        The ``scale`` of the result may be changed between two runs, and ``detach()`` removes it. LoRAs given to the
        class are added to its weights instead: they cost no time, and stay. A LoRA for few steps also changes the
        defaults of a run while its scale is not 0.

        Args:
            source: a file, a folder or a Hub id with one, or "id:file".
            scale: factor on its effect; 0 is none.
            partial: take what fits of it; otherwise ValueError names what does not.
        """
        lora = read_lora(source)
        with self._lock:
            result = attach(self._lora_networks(), lora, scale, partial=partial)
            for attribute in self._lora_parts.values():
                self.sources[attribute].attached.append(result)
            self._add_defaults(lora, result)
        return result

    def _fuse(self, sources: Sequence[tuple[LoRASource, float]], partial: bool) -> None:
        loras = [(read_lora(source), scale) for source, scale in sources]
        if not loras:
            return
        unmatched = frozenset(fuse(self._lora_networks(), loras, partial=partial))
        for attribute in self._lora_parts.values():
            self.sources[attribute].loras, self.sources[attribute].unmatched = list(sources), unmatched
        for lora, _ in loras:
            self._add_defaults(lora, None)

    def _quantize(self) -> None:
        for attribute, source in self.sources.items():
            network = getattr(self, attribute)
            if source.quantization is not None:
                quantize(network, *source.quantization)
            source.built(network)

    def _lora_networks(self) -> dict[str, nn.Module]:
        """Return the networks that LoRAs change, by part. In low memory a released one is built, without reading it."""
        return {part: getattr(self, attribute) for part, attribute in self._lora_parts.items()}

    def _add_defaults(self, lora: LoRAWeights, handle: AttachedLoRA | None) -> None:
        """Adopt the sampler, steps and guidance with which the authors of a LoRA for few steps run it."""
        settings = few_step_defaults(lora.path.as_posix(), lora.metadata)
        if settings is not None:
            text = ", ".join(f"{name} {value}" for name, value in settings.items())
            _log.warning("%s was made for few steps: the defaults now are %s", lora.path.name, text)
            self._few_step.append((handle, RunDefaults(**settings)))

    def load_controlnet(self, source: str | PathLike) -> ControlNetModel | T2IAdapter:
        """Load a ControlNet or T2I-Adapter from a file, a folder or a Hub id; for ``Control``.

        Raises ValueError or OSError, one line, for what cannot be found or read, or is for another family of models.
        """
        component = open_part(source, "controlnet", float16=self.dtype == mx.float16)
        network = load_component(component, self.dtype)
        network.config.check_fits(self.unet_config)
        return network

    def load_embedding(self, path: str | PathLike, word: str | None = None) -> str:
        """Add a textual inversion embedding (Gal et al. 2023); returns the word for it in prompts.

        Args:
            path: a file, see :func:`stable_diffusion.weights.embeddings.read_embedding`.
            word: the word; None is the one in the file.

        Raises ValueError where the file is no embedding, or is for text encoders of another width.
        """
        name, vectors = read_embedding(path)
        word = name if word is None else word
        if self.is_xl and len(self._encoders) == 1:  # the refiner reads with OpenCLIP-G alone
            vectors = vectors[-1:]
        if len(vectors) != len(self._encoders):
            count = len(self._encoders)
            raise ValueError(f"{path} has vectors for {len(vectors)} text encoders; this model has {count}")
        try:
            for (tokenizer, encoder), table in zip(self._encoders, vectors, strict=True):
                ids = self.sources[encoder].edit(getattr(self, encoder), AddWord(table))
                getattr(self, tokenizer).add(word, ids)
        except ValueError as error:
            raise ValueError(f"{path} is for another family of models: {error}") from error
        return word

    def _text_encoders(self) -> Encoders:
        """Begin to encode text; returns (tokenizer, text encoder) pairs whose weights are read."""
        networks = self._use(*(encoder for _, encoder in self._encoders))
        return [(getattr(self, tokenizer), net) for (tokenizer, _), net in zip(self._encoders, networks, strict=True)]


@dataclass(frozen=True)
class AddWord:
    """Add the vectors [n, C] of a word to a text encoder; returns their ids."""

    vectors: mx.array

    def __call__(self, network: CLIPTextModel) -> list[int]:
        return network.text_model.embeddings.add(self.vectors)

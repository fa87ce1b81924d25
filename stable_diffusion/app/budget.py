"""What each stage of a run will take, held against the memory that there is, and the cheaper way where it is short."""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..diffusion.controls import Control, Steering
from ..models.clip import CLIPTextModel
from ..models.controlnet import ControlNetModel, T2IAdapter
from ..models.layers import Context
from ..models.tiling import way
from ..networks import Recipe
from ..pipeline import StableDiffusion
from ..weights.quantize import size_in_bytes
from .memory import CPU, METAL, Backend, peak

_log = logging.getLogger("stable_diffusion")

_MOST_AT_ONCE = 8  # images; more of them save little time
_SHARE = 0.75  # of the machine's memory that a run may take: the system and other programs need some too


Nets = Sequence[ControlNetModel | T2IAdapter]


@dataclass(frozen=True)
class Asked:
    """What is asked of a model for a batch of ``n_images``.

    Args:
        size: (height, width) of the latents.
        chunks: of the prompts, 75 tokens each.
        questions: that the UNet is asked for an image: 2 with guidance, 1 without, 3 of models for instructions.
        nets: ControlNets and T2I-Adapters.
        larger: the size of a second pass.
        encodes: whether pictures are encoded: where a run begins with an image, or its second pass with pixels.
    """

    n_images: int
    size: tuple[int, int]
    chunks: int = 1
    questions: int = 2
    nets: Nets = ()
    larger: tuple[int, int] | None = None
    encodes: bool = False

    @property
    def largest(self) -> tuple[int, int]:
        """The size of what is decoded."""
        return self.larger or self.size


@dataclass(frozen=True)
class Need:
    """Bytes that a stage takes: the weights in memory meanwhile, and what is computed."""

    stage: str
    weights: int
    working: int

    @property
    def total(self) -> int:
        """Both together, the stage's peak."""
        return self.weights + self.working

    def __str__(self) -> str:
        weights, working = self.weights / 1e9, self.working / 1e9
        return f"{self.stage}: {weights:.2f} GB of weights + {working:.2f} GB = {weights + working:.2f} GB"


def machine_memory() -> int:
    """Bytes of memory of the device that computes."""
    if mx.default_device() == mx.gpu:
        found = mx.device_info().get("memory_size")
        if found:
            return int(found)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def set_limits(memory: float | None, low_memory: bool) -> int:
    """Tell MLX how much memory to use; returns the bytes that a run may take.

    Beyond MLX's memory limit it no longer works ahead of the device, which costs little time and, on the CPU, saves
    half of what is computed with: in low memory there the limit is 0. Buffers kept for reuse may take an eighth of
    what there is, and a 64th in low memory.
    """
    allowed = int(machine_memory() * _SHARE if memory is None else memory)
    strict = low_memory and mx.default_device() == mx.cpu
    mx.set_memory_limit(0 if strict else allowed)
    mx.set_cache_limit(allowed // (64 if low_memory else 8))
    return allowed


def choose(sd: StableDiffusion, allowed: int, asked: Asked) -> list[Need]:
    """The needs of a run in the cheapest way that is necessary; a warning where even that is more than ``allowed``.

    The autoencoder of ``sd`` keeps to what is left of ``allowed`` from then on.
    """
    sd.memory_limit = allowed
    found = needs(sd, allowed, asked)
    if max(need.total for need in found[:-1]) > allowed and sd.rows_at_once != 1:
        sd.rows_at_once = 1
        _log.info("memory is short: the UNet is asked one question at a time")
        found = needs(sd, allowed, asked)
    largest = max(found, key=lambda need: need.total)
    if largest.total > allowed:
        _log.warning(
            "%s needs about %.1f GB and may take %.1f GB: try -q, --low_memory, fewer images at once or a smaller size",
            largest.stage,
            largest.total / 1e9,
            allowed / 1e9,
        )
    return found


def needs(sd: StableDiffusion, allowed: int, asked: Asked) -> list[Need]:
    """What the stages of a run take, in their order, the prompts first; from configs and headers alone.

    What the UNet takes is looked for in its graph, unless there is far more and the log is not asked for details: then
    it is the bound of :func:`_at_most`.
    """
    sizes = _sizes(sd)
    texts = sum(size for name, size in sizes.items() if name.startswith("text_encoder"))
    # Weights that are quantized as they are loaded are in memory from then on, and the autoencoder's once it is used.
    early = 0 if sd.low_memory or sd.recipes["unet"].quantization is None else sizes["unet"]
    stays = 0 if sd.low_memory or not asked.encodes else sizes["autoencoder"]
    nets = sum(size_in_bytes(net) for net in asked.nets)
    found = [Need("text encoding", early + texts + nets, _of_text(sd, asked.chunks))]
    if asked.encodes:
        weights = sizes["autoencoder"] + early + nets + (0 if sd.low_memory else texts)
        found.append(Need("encoding", weights, _of_autoencoder(sd, asked.largest, allowed - weights, "encoder")))
    weights = sizes["unet"] + nets + stays
    rows = _rows(sd, asked)
    for stage, size in (("a step of the UNet", asked.size), ("a step of the second pass", asked.larger)):
        if size is not None:
            working = _at_most(sd, asked, rows, size)
            if weights + working > allowed or _log.isEnabledFor(logging.INFO):
                working = _of_unet(sd, asked, rows, size)
            found.append(Need(stage, weights, working))
    weights = sizes["autoencoder"]
    found.append(Need("decoding", weights, _of_autoencoder(sd, asked.largest, allowed - weights, "decoder")))
    return found


def at_once(sd: StableDiffusion, found: Sequence[Need], nets: Nets = ()) -> int:
    """Bytes that a run with the needs ``found`` takes if it keeps the networks of all stages after the prompts."""
    sizes = _sizes(sd)
    weights = sizes["unet"] + sizes["autoencoder"] + sum(size_in_bytes(net) for net in nets)
    return weights + max(need.working for need in found[1:])


def images_at_once(
    sd: StableDiffusion, allowed: int, n_images: int, size: tuple[int, int], chunks: int = 1, **more: Any
) -> int:
    """How many of ``n_images`` to make at once: those that fit into ``allowed`` bytes, in batches of about one size.

    What a step takes grows evenly with the images, so that two looks at graphs tell. Where the UNet is asked one
    question at a time, a batch saves no time, and each image is there sooner by itself; of more than eight images the
    first would come late. ``more`` are other fields of :class:`Asked`.
    """
    most = min(n_images, _MOST_AT_ONCE)
    asked = Asked(most, size, chunks, **more)
    if n_images == 1 or sd.rows_at_once:
        return 1
    sizes, largest = _sizes(sd), asked.largest
    room = allowed - sizes["unet"] - sizes["autoencoder"] - sum(size_in_bytes(net) for net in asked.nets)
    if _at_most(sd, asked, most * asked.questions, largest) > room:
        one, two = (_of_unet(sd, asked, n * asked.questions, largest) for n in (1, 2))
        most = max(min(1 + (room - one) // max(two - one, 1), most), 1)
    return math.ceil(n_images / math.ceil(n_images / most))  # so that the last batch is not a small one


def _sizes(sd: StableDiffusion) -> dict[str, int]:
    return {name: recipe.size() for name, recipe in sd.recipes.items()}


def _backend() -> Backend:
    return CPU if mx.default_device() == mx.cpu else METAL


def _room(recipe: Recipe) -> int:
    return max(mx.get_memory_limit() - recipe.size(), 0)


def _rows(sd: StableDiffusion, asked: Asked) -> int:
    rows = asked.questions * asked.n_images
    return min(rows, sd.rows_at_once or rows)


def _of_text(sd: StableDiffusion, chunks: int) -> int:
    """The most that an encoder takes for a prompt of so many chunks."""

    def one(recipe: Recipe) -> int:
        encoder: CLIPTextModel = recipe.lazy()

        def call(ids: mx.array) -> list[mx.array]:
            output = encoder(ids)
            return [output.last_hidden_state, output.hidden_states[-2], output.pooled_output]

        return peak(encoder, call, ((chunks, 77), mx.int32), backend=_backend(), limit=_room(recipe))

    return max(one(recipe) for name, recipe in sd.recipes.items() if name.startswith("text_encoder"))


def _of_autoencoder(sd: StableDiffusion, size: tuple[int, int], room: int, half: str) -> int:
    recipe = sd.recipes["autoencoder"]
    vae = recipe.lazy()
    unit, channels = (1, vae.latent_channels) if half == "decoder" else (vae.config.scale, 3)
    given = mx.zeros((1, unit * size[0], unit * size[1], channels), dtype=recipe.dtype)
    return int(way(vae[half], given, unit, room).peak)


def _at_most(sd: StableDiffusion, asked: Asked, rows: int, size: tuple[int, int]) -> int:
    """Far more than a step takes: in the multiples of its largest convolution's input and of attention's scores."""
    channels = sd.recipes["unet"].plain().config.block_out_channels
    convolution = rows * math.prod(size) * 9 * 4 * sum(channels[:2])
    return (1 + len(asked.nets)) * (8 * convolution + 2**31)


def _of_unet(sd: StableDiffusion, asked: Asked, rows: int, size: tuple[int, int]) -> int:
    """A question of ``rows`` rows, with what steers it, and the prompts' keys and values, which are kept in a run."""
    recipe = sd.recipes["unet"]
    unet, dtype = recipe.lazy(), recipe.dtype
    config = unet.config
    context = (rows, 77 * asked.chunks, max(config.cross_attention_dim))
    inputs = [((rows, *size, config.in_channels), dtype), ((rows,), mx.float32), (context, dtype)]
    if "add_embedding" in unet:
        ids = 5 if sd.scores_aesthetics else 6
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        inputs += [((rows, pooled), dtype), ((rows, ids), mx.float32)]
    if config.time_cond_proj_dim:
        inputs.append(((rows, config.time_cond_proj_dim), dtype))
    hint = (*(sd.pixels_per_latent * side for side in size), 3)
    inputs += [(hint, mx.float32)] * len(asked.nets)

    def call(x: mx.array, t: mx.array, encoded: mx.array, *more: mx.array) -> list[Any]:
        more, hints = more[: len(more) - len(asked.nets)], more[len(more) - len(asked.nets) :]
        told: dict[str, Any] = {"timestep_cond": more[-1]} if config.time_cond_proj_dim else {}
        told["text_time"] = more[:2] if "add_embedding" in unet else None
        heard = _Heard(encoded)
        steer = Steering([Control(*pair) for pair in zip(asked.nets, hints, strict=True)], 1, dtype)
        told |= steer(0, x[..., : config.out_channels], t, heard, None, told["text_time"])
        return [unet(x, t, heard, **told), *heard.kept]

    networks = nn.Module()
    networks.all = [unet, *asked.nets]
    return peak(networks, call, *inputs, backend=_backend(), limit=_room(recipe))


class _Heard(Context):
    """An encoded prompt, and all keys and values that were made of it."""

    def __init__(self, encoded: mx.array):
        super().__init__(encoded)
        self.kept: list[mx.array] = []

    def of(self, layer: Any) -> tuple[mx.array, mx.array]:
        found = super().of(layer)
        self.kept += found
        return found

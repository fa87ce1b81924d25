"""What each stage of a run will take, held against the memory that there is, and the cheaper way where it is short."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .memory import CPU, METAL, Backend, peak
from .models.clip import CLIPTextModel
from .networks import Recipe
from .pipeline import StableDiffusion
from .tiling import peak_as_a_whole, peak_in_bands

_log = logging.getLogger("stable_diffusion")

_SHARE = 0.75  # of the machine's memory that a run may take: the system and other programs need some too


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


def needs(sd: StableDiffusion, n_images: int, size: Sequence[int], chunks: int = 1) -> list[Need]:
    """What the stages of a run take, from configs and headers alone, for ``size`` (height, width) in latents.

    Guidance asks the UNet two questions for each image, unless ``rows_at_once`` has fewer.
    """
    recipes = sd.recipes
    sizes = {name: recipe.size() for name, recipe in recipes.items()}
    rows = min(2 * n_images, sd.rows_at_once or 2 * n_images)
    texts = [name for name in recipes if name.startswith("text_encoder")]
    encode = max(_of_text(recipes[name], chunks) for name in texts)
    # Weights that are quantized as they are loaded are in memory from then on.
    early = 0 if sd.low_memory or recipes["unet"].quantization is None else sizes["unet"]
    return [
        Need("text encoding", early + sum(sizes[name] for name in texts), encode),
        Need("a step of the UNet", sizes["unet"], _of_unet(sd, rows, size, chunks)),
        Need("decoding", sizes["autoencoder"], _of_decoding(recipes["autoencoder"], size)),
    ]


def _backend() -> Backend:
    return CPU if mx.default_device() == mx.cpu else METAL


def _room(recipe: Recipe) -> int:
    return max(mx.get_memory_limit() - recipe.size(), 0)


def _of_text(recipe: Recipe, chunks: int) -> int:
    encoder: CLIPTextModel = recipe.lazy()

    def call(ids: mx.array) -> list[mx.array]:
        output = encoder(ids)
        return [output.last_hidden_state, output.hidden_states[-2], output.pooled_output]

    return peak(encoder, call, ((chunks, 77), mx.int32), backend=_backend(), limit=_room(recipe))


def _of_decoding(recipe: Recipe, size: Sequence[int]) -> int:
    """The autoencoder decodes as a whole or by bands, whichever takes less; in tiles where there is still less room."""
    vae = recipe.lazy()
    latent = mx.zeros((1, *size, vae.latent_channels), dtype=recipe.dtype)
    return int(min(expected(vae.decoder, latent) for expected in (peak_as_a_whole, peak_in_bands)))


def _of_unet(sd: StableDiffusion, rows: int, size: Sequence[int], chunks: int) -> int:
    recipe = sd.recipes["unet"]
    unet, dtype = recipe.lazy(), recipe.dtype
    config = unet.config
    wide = max(config.cross_attention_dim)
    inputs = [((rows, *size, config.in_channels), dtype), ((rows,), mx.float32), ((rows, 77 * chunks, wide), dtype)]
    if "add_embedding" in unet:
        ids = 5 if sd.scores_aesthetics else 6
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        inputs += [((rows, pooled), dtype), ((rows, ids), mx.float32)]
    if config.time_cond_proj_dim:
        inputs.append(((rows, config.time_cond_proj_dim), dtype))

    def call(x: mx.array, t: mx.array, context: mx.array, *more: mx.array) -> mx.array:
        if config.time_cond_proj_dim:
            return unet(x, t, context, timestep_cond=more[0])
        return unet(x, t, context, text_time=more or None)

    return peak(unet, call, *inputs, backend=_backend(), limit=_room(recipe))


def choose(sd: StableDiffusion, allowed: int, n_images: int, size: Sequence[int], chunks: int = 1) -> list[Need]:
    """The needs of a run in the cheapest way that is necessary; a warning where even that is more than ``allowed``."""
    found = needs(sd, n_images, size, chunks)
    if found[1].total > allowed and sd.rows_at_once != 1:
        sd.rows_at_once = 1
        _log.info("memory is short: the UNet is asked one question at a time")
        found = needs(sd, n_images, size, chunks)
    largest = max(found, key=lambda need: need.total)
    if largest.total > allowed:
        _log.warning(
            "%s needs about %.1f GB and may take %.1f GB: try -q, --low_memory, fewer images at once or a smaller size",
            largest.stage,
            largest.total / 1e9,
            allowed / 1e9,
        )
    return found

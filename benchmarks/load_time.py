"""What converting costs and saves: its time and memory, and the time to the first step with and without it.

    python benchmarks/load_time.py FOLDER [--family sdxl]

Writes a checkpoint of full size with random weights in half precision into FOLDER (SD 1.5: 2.1 GB, SDXL: 6.9 GB, and
as much again or less for what is converted), then quantizes it as `-q` does: when it is loaded, and by converting it.
Each is measured in a process of its own. Memory is the peak of MLX's arrays, and that of the process as the system sees
it. Files are read from the system's cache if it keeps them, as it does after a first start.
"""

import argparse
import json
import math
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stable_diffusion import StableDiffusion  # before MLX: it brings OpenBLAS, where there is one

# isort: split
import mlx.core as mx

from stable_diffusion.arguments import TEXT_BITS, UNET_BITS
from stable_diffusion.convert import convert
from stable_diffusion.weights.files import open_checkpoint
from stable_diffusion.weights.load import build
from stable_diffusion.weights.save import stored_tensors, write_weights

BITS = {"unet_bits": UNET_BITS, "text_bits": TEXT_BITS}
POOL = 2**22  # random values that all weights are cut from
CLIP_L = {"architectures": ["CLIPTextModel"], "hidden_size": 768, "intermediate_size": 3072}
CLIP_L |= {"num_attention_heads": 12, "num_hidden_layers": 12}
OPEN_CLIP_G = {"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280}
OPEN_CLIP_G |= {"intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280}
VAE = {"block_out_channels": [128, 256, 512, 512]}
SD15 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FAMILIES = {
    "sd15": ("StableDiffusionPipeline", {"unet": SD15, "vae": VAE, "text_encoder": CLIP_L}),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {"unet": SDXL, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": OPEN_CLIP_G},
    ),
}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


def write_source(folder: Path, family: str) -> None:
    """A checkpoint of random weights, with the vocabulary of the bundled model."""
    pipeline, parts = FAMILIES[family]
    index = {"_class_name": pipeline, "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    pool = (0.02 * mx.random.normal((POOL,), key=mx.random.key(0))).astype(mx.float16)
    for name, config in parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        tensors = {key: cut(pool, value.shape) for key, value in stored_tensors(build(name, config)).items()}
        is_text = name.startswith("text_encoder")
        write_weights(folder / name, "model" if is_text else "diffusion_pytorch_model", tensors, 10**12)
        index[name] = ["", CLASSES.get(name) or config["architectures"][0]]
        if is_text:
            tokenizer = name.replace("text_encoder", "tokenizer")
            shutil.copytree(open_checkpoint("tiny").folder / "tokenizer", folder / tokenizer)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    levels = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(levels))
    (folder / "model_index.json").write_text(json.dumps(index))


def cut(pool: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Values of the pool, as often as they are needed; lazy."""
    count = math.prod(shape)
    return mx.tile(pool, -(-count // POOL))[:count].reshape(shape)


def conversion(source: Path, dest: Path, latents: int) -> dict[str, float]:
    started = time.perf_counter()
    convert(source, dest, **BITS)
    return {"seconds": time.perf_counter() - started}


def at_load(source: Path, dest: Path, latents: int) -> dict[str, float]:
    return first_step(lambda: StableDiffusion(source, True, **BITS), latents)


def from_converted(source: Path, dest: Path, latents: int) -> dict[str, float]:
    return first_step(lambda: StableDiffusion(dest, True), latents)


def first_step(load: Callable[[], StableDiffusion], latents: int) -> dict[str, float]:
    started = time.perf_counter()
    sd = load()
    sd.ensure_models_are_loaded()
    loaded = time.perf_counter()
    result = {"seconds": loaded - started}
    if latents:
        mx.eval(next(iter(sd.generate_latents("red", 1, 20, cfg_weight=1, latent_size=(latents, latents), seed=0))))
        result["to the first step"] = time.perf_counter() - started
    return result


def measured(work: Callable[..., dict[str, float]], pipe: Any, *arguments: Any) -> None:
    """Send what ``work`` took, from a process that does nothing else."""
    mx.reset_peak_memory()
    result = work(*arguments)
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    pipe.send(result | {"arrays, GB": mx.get_peak_memory() / 1e9, "process, GB": memory / 1e9})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; what this writes there is removed at the end")
    parser.add_argument("--family", choices=FAMILIES, default="sd15")
    parser.add_argument("--latents", type=int, default=8, help="side of the first step's latents; 0 takes no step (8)")
    args = parser.parse_args()
    source, dest = args.folder / f"{args.family}-random", args.folder / f"{args.family}-quantized"
    context = multiprocessing.get_context("spawn")
    try:
        write_source(source, args.family)
        for name, work in {"converting": conversion, "quantized at load": at_load, "converted": from_converted}.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=measured, args=(work, theirs, source, dest, args.latents))
            process.start()
            print(f"{name:20}" + "".join(f"{key} {value:.2f}   " for key, value in ours.recv().items()), flush=True)
            process.join()
    finally:
        for folder in (source, dest):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

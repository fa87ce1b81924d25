"""What a model takes in full size, its weights random and quantized: predicted, and measured where that is possible.

    python -m benchmarks.memory [--model sdxl] [--sizes 512 1024]
    python -m benchmarks.memory --growth [--model sdxl] [--sizes 512 1024 1536] [--batches 1 2 4] [--json FILE]
    python -m benchmarks.memory --measure PIXELS

Nothing is computed without --measure: the figures are those of the memory plan, for the CPU in float32 and for Metal in
half precision. The first form shows the stages of a run with -q --low_memory; --growth how a step of the UNet and
decoding grow with size and batch, with guidance. With --measure one question is put to the UNet at that size, and what
it takes is held against the prediction. The weights are quantized zeros, which no float32 ever stands behind.
"""

# ruff: noqa: I001
import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import stable_diffusion.models.blas  # noqa: F401  (before MLX)
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from benchmarks.shapes import SHAPES
from stable_diffusion.app.memory import CPU, METAL, Backend, peak
from stable_diffusion.models import kernels
from stable_diffusion.models.tiling import _BANDS, peak_in_bands
from stable_diffusion.weights.load import build
from stable_diffusion.weights.quantize import GROUP_SIZES, quantize_lazily, size_in_bytes

BITS = {"unet": 8, "text_encoder": 4, "text_encoder_2": 4}
TYPES = {"CPU": mx.float32, "Metal": mx.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in SHAPES if name != "tiny"], default="sdxl")
    parser.add_argument("--sizes", type=int, nargs="+", help="in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], help="images at once")
    parser.add_argument("--growth", action="store_true", help="a table of sizes and batches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, in bytes")
    parser.add_argument("--measure", type=int, metavar="PIXELS", help="compute one step at this size")
    args = parser.parse_args()
    if args.measure:
        figures = measured(args.model, args.measure)
    elif args.growth:
        figures = growth(args.model, args.sizes or [512, 1024, 1536], args.batches)
    else:
        figures = stages(args.model, args.sizes or [512, 1024])
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def table(*columns: str) -> None:
    print("| " + " | ".join(columns) + " |", flush=True)


def gigabytes(figure: float) -> str:
    return f"{figure / 1e9:.2f} GB"


def stages(model: str, sizes: list[int]) -> list[dict]:
    """The stages of a run with -q --low_memory, one picture at a time: weights and what is computed."""
    figures = []
    table("size", "stage", *TYPES)
    table(*["---"] * 4)
    for pixels in sizes:
        rows: dict[str, dict[str, list[float]]] = {}
        for backend in (CPU, METAL):
            dtype = TYPES[backend.name]
            encoders = [quantized(model, part, dtype) for part in SHAPES[model] if part.startswith("text")]
            texts = [of_text(encoder, backend) for encoder in encoders]
            unet, vae = quantized(model, "unet", dtype), build("vae", SHAPES[model]["vae"])
            found = {
                "text encoding": [sum(map(size_in_bytes, encoders)), max(texts)],
                "a step of the UNet": [size_in_bytes(unet), of_unet(unet, dtype, pixels, 1, backend)],
                "decoding": [size_in_bytes(vae), of_decoding(vae, pixels, backend)],
            }
            for stage, need in found.items():
                rows.setdefault(stage, {})[backend.name] = need
        for stage, needs in rows.items():
            shown = (f"{gigabytes(sum(need))} ({gigabytes(need[0])} weights)" for need in needs.values())
            table(str(pixels), stage, *shown)
            figures.append({"size": pixels, "stage": stage, **needs})
    return figures


def growth(model: str, sizes: list[int], batches: list[int]) -> list[dict]:
    """Beside the weights: a step with guidance for several images at once, and decoding, which is one by one."""
    figures = []
    unets = {name: quantized(model, "unet", dtype) for name, dtype in TYPES.items()}
    vae = build("vae", SHAPES[model]["vae"])
    table(
        "size", *(f"{name}, {n} at once" for name in TYPES for n in batches), *(f"{name}, decoding" for name in TYPES)
    )
    table(*["---"] * (1 + 2 * len(batches) + 2))
    for pixels in sizes:
        steps = {
            backend.name: [of_unet(unets[backend.name], TYPES[backend.name], pixels, 2 * n, backend) for n in batches]
            for backend in (CPU, METAL)
        }
        decoding = {backend.name: of_decoding(vae, pixels, backend) for backend in (CPU, METAL)}
        table(str(pixels), *(gigabytes(need) for needs in (*steps.values(), decoding.values()) for need in needs))
        figures.append({"size": pixels, "batches": batches, "step": steps, "decoding": decoding})
    return figures


def quantized(model: str, part: str, dtype: mx.Dtype) -> nn.Module:
    network = build("text_encoder" if part.startswith("text") else part, SHAPES[model][part])
    network.set_dtype(dtype)
    return quantize_lazily(network, BITS[part], GROUP_SIZES[part])


@contextmanager
def graphs_of(backend: Backend) -> Iterator[None]:
    """What Metal computes otherwise than the CPU is switched for a look at a graph."""
    on_cpu = kernels._on_cpu
    kernels._on_cpu = on_cpu if backend is CPU else lambda x: False
    try:
        yield
    finally:
        kernels._on_cpu = on_cpu


def asked(unet: nn.Module, dtype: mx.Dtype, pixels: int, rows: int) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    """What ``question`` takes, as shapes and types."""
    config, side = unet.config, pixels // 8
    shapes = [((rows, side, side, 4), dtype), ((rows,), mx.float32), ((rows, 77, config.cross_attention_dim[0]), dtype)]
    if "add_embedding" in unet:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes += [((rows, pooled), dtype), ((rows, 6), mx.float32)]
    return shapes


def question(unet: nn.Module):
    return lambda x, t, context, *more: unet(x, t, context, text_time=more or None)


def of_unet(unet: nn.Module, dtype: mx.Dtype, pixels: int, rows: int, backend: Backend) -> int:
    """Bytes beside the weights, where MLX does not work ahead of the device."""
    with graphs_of(backend):
        return peak(unet, question(unet), *asked(unet, dtype, pixels, rows), backend=backend, limit=0)


def of_text(encoder: nn.Module, backend: Backend) -> int:
    with graphs_of(backend):
        return peak(encoder, lambda ids: encoder(ids).last_hidden_state, ((1, 77), mx.int32), backend=backend, limit=0)


def of_decoding(vae: nn.Module, pixels: int, backend: Backend) -> float:
    """By bands, without a limit, in float32."""
    band = _BANDS[mx.cpu if backend is CPU else mx.gpu][0]
    return peak_in_bands(vae.decoder, mx.zeros((1, pixels // 8, pixels // 8, 4)), band)


def measured(model: str, pixels: int) -> dict:
    """One question to the UNet in float32, with MLX's memory limit at 0 as in --low_memory."""
    unet = quantized(model, "unet", mx.float32)
    unet.update(tree_map(lambda a: mx.zeros(a.shape, a.dtype), unet.parameters()))
    mx.eval(unet.parameters())
    mx.set_memory_limit(0)
    inputs = [mx.ones(shape, dtype) for shape, dtype in asked(unet, mx.float32, pixels, 1)]
    mx.eval(inputs)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(question(unet)(*inputs))
    got, wanted = mx.get_peak_memory() - before, of_unet(unet, mx.float32, pixels, 1, CPU)
    print(f"measured at {pixels} x {pixels}: {before / 1e9:.2f} GB of weights, {got / 1e9:.3f} GB beside them;")
    print(f"predicted {wanted / 1e9:.3f} GB, {100 * (wanted / got - 1):+.0f} %")
    return {"size": pixels, "weights": before, "measured": got, "predicted": wanted}


if __name__ == "__main__":
    main()

"""What SDXL takes in full size, its weights random and quantized: predicted, and measured where that is possible.

    python -m benchmarks.memory [--measure PIXELS]

Without --measure nothing is computed: the figures are those of the memory plan, for the CPU and for Metal. With it, one
question is put to the UNet at that size, and what it takes is held against the prediction. The weights are
quantized zeros, which no float32 ever stands behind.
"""

# ruff: noqa: I001
import argparse

import stable_diffusion.blas  # noqa: F401  (before MLX)
import mlx.core as mx
from mlx.utils import tree_map

from stable_diffusion.memory import CPU, METAL, peak
from stable_diffusion.models import kernels
from stable_diffusion.weights.load import build
from stable_diffusion.weights.quantize import quantize_lazily, size_in_bytes

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 128,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=int, metavar="PIXELS", help="compute one step at this size")
    args = parser.parse_args()
    for dtype in (mx.float32, mx.float16):
        unet = quantized_unet(dtype)
        print(f"UNet, 8 bits, {dtype}: {size_in_bytes(unet) / 1e9:.2f} GB of weights")
        for pixels in (256, 512, 1024):
            figures = [predicted(unet, dtype, pixels, backend) / 1e9 for backend in (CPU, METAL)]
            print(
                f"  {pixels} x {pixels}, one question: CPU {figures[0]:.2f} GB, Metal (not measured) {figures[1]:.2f}"
            )
    if args.measure:
        measure(args.measure)


def quantized_unet(dtype: mx.Dtype):
    unet = build("unet", UNET)
    unet.set_dtype(dtype)
    return quantize_lazily(unet, 8, 32)


def shapes_of(dtype: mx.Dtype, pixels: int) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    side = pixels // 8
    context, pooled = ((1, 77, 2048), dtype), ((1, 1280), dtype)
    return [((1, side, side, 4), dtype), ((1,), mx.float32), context, pooled, ((1, 6), mx.float32)]


def call_of(unet):
    return lambda x, t, context, pooled, ids: unet(x, t, context, text_time=(pooled, ids))


def predicted(unet, dtype: mx.Dtype, pixels: int, backend) -> int:
    """Bytes beside the weights. What Metal computes otherwise than the CPU is switched for the look at the graph."""
    on_cpu = kernels._on_cpu
    kernels._on_cpu = on_cpu if backend is CPU else lambda x: False
    try:
        return peak(unet, call_of(unet), *shapes_of(dtype, pixels), backend=backend, limit=0)
    finally:
        kernels._on_cpu = on_cpu


def measure(pixels: int) -> None:
    """One question to the UNet in float32, with MLX's memory limit at 0 as in --low_memory."""
    unet = quantized_unet(mx.float32)
    unet.update(tree_map(lambda a: mx.zeros(a.shape, a.dtype), unet.parameters()))
    mx.eval(unet.parameters())
    mx.set_memory_limit(0)
    inputs = [mx.ones(shape, dtype) for shape, dtype in shapes_of(mx.float32, pixels)]
    mx.eval(inputs)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(call_of(unet)(*inputs))
    got, wanted = mx.get_peak_memory() - before, predicted(unet, mx.float32, pixels, CPU)
    print(f"measured at {pixels} x {pixels}: {before / 1e9:.2f} GB of weights, {got / 1e9:.3f} GB beside them;")
    print(f"predicted {wanted / 1e9:.3f} GB, {100 * (wanted / got - 1):+.0f} %")


if __name__ == "__main__":
    main()

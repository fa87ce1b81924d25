"""GGUF files, written by the package that defines them as stable-diffusion.cpp and ComfyUI-GGUF do."""

from pathlib import Path

import gguf
import numpy as np


def write_gguf(path: Path, tensors: dict[str, np.ndarray], kind: str, reshapes: bool = False) -> dict[str, np.ndarray]:
    """Write a file whose matrices are of a ``kind`` such as "Q8_0"; returns what the values in it are.

    With ``reshapes`` all weights are quantized in rows of 64, and the metadata hold their shapes, as ComfyUI-GGUF does.
    """
    writer, values = gguf.GGUFWriter(path, "sdxl" if reshapes else "sd"), {}
    writer.add_string("general.name", "small")
    for name, value in tensors.items():
        value, chosen = np.asarray(value), "F32"
        is_matrix = value.ndim == 2 and value.shape[1] % 32 == 0 and name.endswith(".weight")
        if reshapes and value.ndim > 1 and value.size % 64 == 0 and value.shape[-1] % 64:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(value.shape))
            value, chosen = value.reshape(-1, 64), kind
        elif is_matrix and not any(word in name for word in ("embed", "label_emb")):
            chosen = kind
        code = gguf.GGMLQuantizationType[chosen]
        value = value.astype(np.int64) if value.dtype == np.int64 else value.astype(np.float32)
        stored = value if value.dtype == np.int64 else gguf.quants.quantize(value, code)
        writer.add_tensor(name, stored, raw_dtype=None if value.dtype == np.int64 else code)
        read = value if value.dtype == np.int64 else gguf.quants.dequantize(stored, code)
        values[name] = read.reshape(np.asarray(tensors[name]).shape)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return values

"""The column of stable-diffusion.cpp by its package for Python, ``pip install stable-diffusion-cpp-python``.

It makes whole images; what is measured lies between two of the messages by which it tells its progress. Its
convolutions read weights and maps in float16, whatever the type of the rest. Rows are computed one after the other.
"""

import ctypes
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stable_diffusion_cpp

from . import process
from .cases import GUIDANCE, PROMPT, Case

_BETWEEN = {"unet": ("step 0", "step 1"), "vae-decode": ("decoding 1 latents", "decode_first_stage completed")}
_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass
class _Progress:
    """Note the clocks and the memory when a message comes that has ``begin`` in it, and again at ``end``."""

    begin: str
    end: str
    sizes: dict[str, float] = field(default_factory=dict)  # bytes of weights by network
    notes: list[tuple[float, float, int]] = field(default_factory=list)

    def told(self, text: str) -> None:
        if found := re.search(r"(\w+) params backend buffer size = *([\d.]+) MB", text):
            self.sizes[found[1]] = float(found[2]) * 2**20
        if self.begin in text:
            memory = process.reset_peak()
            self.notes = [(time.process_time(), time.perf_counter(), memory)]
        elif self.end in text:
            self.notes.append((time.process_time(), time.perf_counter(), process.peak()))


@dataclass
class Work:
    """What is measured: an image of one step, of which a part counts. ``weights`` are the bytes that it reads."""

    model: Any
    progress: _Progress
    options: dict[str, Any]
    weights: float

    def describe(self) -> dict[str, Any]:
        """What it reads."""
        return {"weights": self.weights}

    def measure(self) -> dict[str, float]:
        """Seconds on the clock and of the processor, and the peak of the memory in bytes, weights among them."""
        self.model.generate_image(**self.options)
        (cpu, start, before), (cpu_end, end, peak) = self.progress.notes
        return {"seconds": end - start, "cpu": cpu_end - cpu, "peak": self.weights + max(0, peak - before)}


def prepare(case: Case, folder: Path) -> Work:
    progress = _Progress(*_BETWEEN[case.part])
    listen = stable_diffusion_cpp.sd_log_callback(
        lambda level, text, data: progress.told(text.decode(errors="replace"))
    )
    stable_diffusion_cpp.sd_set_log_callback(listen, ctypes.c_void_p(0))
    is_unet = case.part == "unet"
    model = stable_diffusion_cpp.StableDiffusion(
        model_path=str(folder),
        taesd_path=str(folder.parent / "taesd.safetensors") if is_unet else "",  # nothing waits for its decoding
        n_threads=int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        wtype=_TYPES[case.dtype if is_unet else case.vae_dtype],
        verbose=False,
    )
    model.listen = listen  # which it calls as long as it is there
    options = {"prompt": PROMPT, "width": case.size, "height": case.size, "sample_steps": 1, "sample_method": "euler"}
    options["cfg_scale"] = GUIDANCE if is_unet and case.rows == 2 else 1.0
    options["progress_callback"] = lambda step, steps, seconds: progress.told(f"step {step}")
    return Work(model, progress, options, progress.sizes["unet" if is_unet else "vae"])

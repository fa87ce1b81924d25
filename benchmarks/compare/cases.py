"""List the cases that are measured, their names, and the shapes that every column gives its networks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from ..shapes import SHAPES

POSITIONS = 77  # of an encoded prompt
STEPS = 2  # of a whole image
GUIDANCE = 7.5
PROMPT = " ".join(["red"] * 75)  # so long that every column reads all positions

# What each part is varied over; in the others the first choice stands for all.
PARTS = {
    "unet": ("shape", "size", "dtype", "rows", "weights"),
    "text": ("shape", "dtype", "weights"),
    "vae-encode": ("shape", "size"),
    "vae-decode": ("shape", "size"),
    "load": ("shape", "dtype", "weights"),
    "image": ("shape", "size", "dtype", "weights"),
}
_TITLES = {
    "unet": "one step of the UNet",
    "text": "encoding a prompt and its negative",
    "vae-encode": "VAE encode",
    "vae-decode": "VAE decode",
    "load": "loading all parts",
    "image": f"an image in {STEPS} steps with guidance",
}


@dataclass(frozen=True)
class Case:
    """One measurement. ``size`` is in pixels; ``rows`` is the UNet's batch, of which 2 is a guidance pair.

    ``weights`` are "plain" or "quantized" (UNet 8 bits, text encoders 4). The autoencoder computes in ``vae_dtype``.
    """

    part: str
    shape: str
    size: int
    dtype: str = "float32"
    rows: int = 2
    weights: str = "plain"
    vae_dtype: str = "float32"

    @property
    def needs_files(self) -> bool:
        return self.part in ("load", "image")

    @property
    def config(self) -> Mapping[str, Any]:
        """The configurations of the model's parts."""
        return SHAPES[self.shape]

    @property
    def latent(self) -> int:
        """The side of the latents."""
        return self.size // 2 ** (len(self.config["vae"]["block_out_channels"]) - 1)

    @property
    def encoders(self) -> list[str]:
        return [name for name in self.config if name.startswith("text_encoder")]

    @property
    def is_xl(self) -> bool:
        return "text_encoder_2" in self.config

    def title(self) -> str:
        said = {
            "shape": self.shape,
            "size": f"{self.size} x {self.size}",
            "dtype": self.dtype,
            "rows": "guidance pair" if self.rows == 2 else f"{self.rows} row",
            "weights": "quantized" if self.weights == "quantized" else "",
        }
        return ", ".join([_TITLES[self.part], *filter(None, (said[axis] for axis in PARTS[self.part]))])


def cases(parts: Sequence[str], choices: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Return every combination of ``choices``, by the names of Case's fields, in which the parts differ."""
    made: dict[Case, None] = {}
    for part in parts:
        axes = {"shape": choices["shape"], "size": choices["size"]}
        axes = {axis: values if axis in PARTS[part] else values[:1] for axis, values in axes.items()}
        axes |= {axis: choices[axis] for axis in PARTS[part] if axis not in axes}
        for values in product(*axes.values()):
            case = Case(part, **dict(zip(axes, values, strict=True)))
            if not (case.needs_files and case.dtype == "bfloat16"):  # no script of any column loads as that
                made[case] = None
    return list(_one_of_each(made))


def _one_of_each(made: Mapping[Case, None]) -> list[Case]:
    """Without the cases that differ only in a shape whose networks are the same: the published autoencoders are."""
    seen: dict[tuple, Case] = {}
    for case in made:
        key = {name: value for name, value in asdict(case).items() if name != "shape"}
        widths = case.config["vae"]["block_out_channels"] if case.part.startswith("vae") else case.shape
        seen.setdefault((*key.values(), str(widths)), case)
    return list(seen.values())

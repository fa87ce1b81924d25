"""The settings of a training, with their limits."""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from ..options import Number, check_choice

_WORD = re.compile(r"[^\s:,|()\[\]{}\\]+(:[0-9]+)?")
_VECTORS, _LONGEST_WORD = 4, 75  # vectors of a word; a prompt has 75 tokens


@dataclass(frozen=True)
class TrainingSettings:
    """Describe how a LoRA is trained.

    Attributes:
        steps: updates of the factors.
        batch_size: pictures of each gradient.
        accumulate: gradients of each update, which is their mean.
        learning_rate: the highest one, after ``warmup``, a fraction of the steps in which it grows from 0. None is 1e-4
            for a LoRA, and 2e-3 for a new word, whose few vectors need larger updates: 5e-4 for each of four pictures,
            as in diffusers' example of textual inversion.
        lr_schedule: "constant", or "cosine", which falls to 0 at the end.
        optimizer: "adamw" (Loshchilov & Hutter 2019), "adafactor" (Shazeer & Stern 2018), or "lion" (Chen et al. 2023),
            which needs a third to a tenth of their learning rate.
        weight_decay: of the factors.
        clip_norm: longest norm of the gradients; longer ones are scaled down. 0 is off.
        rank, alpha, targets, conv_rank, dora: of the LoRA, see :func:`stable_diffusion.lora.create.new_lora`.
        text_encoder_rank: rank of the same layers in the text encoders; 0 does not train them.
        embedding: a new word, "ohwx" or "ohwx:8": train this number of vectors for it (default 4) instead of a LoRA:
            textual inversion (Gal et al. 2023).
        initial_word: a word or words whose vectors the new ones start from; None is the mean of the vocabulary.
        loss: "mse", or "huber", the pseudo-Huber loss with a constant of 0.1 (Charbonnier et al. 1997).
        min_snr: bound of the loss weight by signal to noise ratio (Hang et al. 2023); 0 is off.
        noise_offset: weight of a constant in the noise of each channel (Guttenberg 2023).
        caption_dropout: fraction of pictures that get the empty prompt.
        prior_weight: loss weight of the prior pictures, which preserve the model's knowledge (Ruiz et al. 2023).
        ema: decay of a moving average of the factors, which is then saved instead of them; 0 is off. In step n, from
            0, it is at most (1 + n) / (10 + n).
        checkpointing: recompute the transformer blocks to save memory: "on", "off", or "auto", by the memory.
        seed: of the factors, of the order of the pictures and of all noise.

    Raises ValueError for a number out of range or an unknown name.
    """

    steps: int = 1000
    batch_size: int = 1
    accumulate: int = 1
    learning_rate: float | None = None
    warmup: float = 0.05
    lr_schedule: str = "constant"
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    rank: int = 16
    alpha: float | None = None
    targets: str = "attention"
    conv_rank: int = 0
    dora: bool = False
    text_encoder_rank: int = 0
    embedding: str | None = None
    initial_word: str | None = None
    loss: str = "mse"
    min_snr: float = 5.0
    noise_offset: float = 0.0
    caption_dropout: float = 0.05
    prior_weight: float = 1.0
    ema: float = 0.0
    checkpointing: str = "auto"
    seed: int = 0

    NUMBERS: ClassVar[dict[str, Number]] = {
        **dict.fromkeys(("steps", "batch_size", "accumulate", "rank"), Number(int, 1)),
        **dict.fromkeys(("conv_rank", "text_encoder_rank", "seed"), Number(int, 0)),
        **dict.fromkeys(("warmup", "caption_dropout", "ema"), Number(float, 0, 1)),
        **dict.fromkeys(("weight_decay", "clip_norm", "min_snr", "noise_offset", "prior_weight"), Number(float, 0)),
        "learning_rate": Number(float, 0, 1, excludes_lowest=True),
        "alpha": Number(float, 0, 1e6, excludes_lowest=True),
    }
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "loss": ("mse", "huber"),
        "optimizer": ("adamw", "adafactor", "lion"),
        "lr_schedule": ("constant", "cosine"),
        "checkpointing": ("auto", "on", "off"),
    }

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 1e-4 if self.embedding is None else 2e-3)
        for name, number in self.NUMBERS.items():
            number.check(name, getattr(self, name))
        for name, known in self.CHOICES.items():
            check_choice(name, getattr(self, name), known)
        if self.embedding is not None:
            self._check_embedding()
        elif self.initial_word is not None:
            raise ValueError("initial_word has no effect without embedding; give the new word as embedding, or omit it")

    def _check_embedding(self) -> None:
        _, count = self.new_word
        if not _WORD.fullmatch(self.embedding) or not 1 <= count <= _LONGEST_WORD:
            raise ValueError(
                f"embedding {self.embedding!r:.80} is not valid; write WORD or WORD:N, no blanks, no prompt syntax, "
                f"N from 1 to {_LONGEST_WORD}"
            )
        for name in ("rank", "alpha", "targets", "conv_rank", "dora", "text_encoder_rank"):
            if getattr(self, name) != getattr(TrainingSettings, name):
                raise ValueError(f"{name} is for a LoRA and cannot be combined with embedding; omit one of them")

    @property
    def new_word(self) -> tuple[str, int]:
        """Return the word of ``embedding`` and the number of its vectors."""
        word, _, count = (self.embedding or "").partition(":")
        return word, int(count) if count.isdecimal() else _VECTORS

    @property
    def trains_text(self) -> bool:
        """Return whether captions are encoded in each step, because the text encoders are trained."""
        return bool(self.text_encoder_rank or self.embedding)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0."""
        warm = self.warmup * self.steps
        if step < warm:
            return self.learning_rate * (step + 1) / (math.floor(warm) + 1)
        if self.lr_schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * (step - warm) / max(self.steps - warm, 1))) / 2

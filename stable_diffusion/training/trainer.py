"""Train a LoRA: the loop over steps, and the computation of a step."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_map, tree_reduce, tree_unflatten

from ..lora.create import new_lora
from ..lora.layers import AttachedLoRA, attach, wrapped_layers
from ..models.layers import Group
from ..models.unet import Transformer2DModel
from ..models.upsampling import without_sums
from ..pipeline import StableDiffusion
from ..text.encode import encode
from .dataset import Dataset
from .loss import TrainingBatch, add_noise, denoising_loss, seed_of
from .settings import TrainingSettings
from .words import NewWord

_OPTIMIZERS = {
    "adamw": lambda settings: optimizers.AdamW(
        settings.learning_rate, weight_decay=settings.weight_decay, bias_correction=True
    ),
    "adafactor": lambda settings: optimizers.Adafactor(
        settings.learning_rate, weight_decay=settings.weight_decay, relative_step=False, scale_parameter=False
    ),
    "lion": lambda settings: optimizers.Lion(settings.learning_rate, weight_decay=settings.weight_decay),
}
_FLOAT16_SCALE = 1024.0  # of the loss, so that gradients do not vanish below 6e-8; reduced on overflow
MAX_SKIPPED = 5


@dataclass(frozen=True)
class TrainingStep:
    """Describe a step: its number from 1, its loss, learning rate and seconds; ``skipped`` if it was not finite."""

    number: int
    loss: float
    learning_rate: float
    seconds: float
    skipped: bool = False


class LoRATrainer(Iterator[TrainingStep]):
    """Train a LoRA, or the vectors of a new word, for a model; each item of the iteration is a step.

    Each step is computed on iteration.

    Args:
        sd: the model; the LoRA stays attached to it, or the word in it. Other attached LoRAs are frozen.
        data: the pictures.
        settings: of the training, the same as those of ``data``.
        group: the processes that share the work. Each computes the gradients of some of a step's pictures; their noise
            and the sum do not depend on the number of processes.

    Attributes:
        step: number of finished steps.
        model: the module with the trainable parameters, called factors here; nothing else is trained.
        lora: the attached LoRA with the current factors; its ``detach`` restores the model. None if a word is trained.
        average: the moving average of the factors, a tree as that of ``model``; empty without ``ema``.

    Raises ValueError for a model that cannot be trained, and FloatingPointError after five consecutive steps with a
    loss that is not finite.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        data: Dataset,
        settings: TrainingSettings | None = None,
        group: mx.distributed.Group | None = None,
    ):
        self.sd, self.data, self.settings, self.group = sd, data, settings or TrainingSettings(), group
        few_steps = sd.unet_config.time_cond_proj_dim is not None
        if sd.mode != "text" or few_steps or sd.schedule.is_edm or sd.scores_aesthetics:
            kinds = "refiners, EDM models, few-step models and models that start from an image are not supported"
            raise ValueError(f"{sd.source} cannot be trained: {kinds}; use the model that it was made from")
        sd.pinned[self] = {"unet", *(name for _, name in sd._encoders if self.settings.trains_text)}
        self.lora: AttachedLoRA | None = None
        if self.settings.embedding is None:
            self.model = self._with_lora()
        else:
            self.model = NewWord(sd, *self.settings.new_word, self.settings.initial_word)
        self.recompute(self.settings.checkpointing == "on")
        self.optimizer = _OPTIMIZERS[self.settings.optimizer](self.settings)
        self.optimizer.init(self.model.trainable_parameters())
        self.average = self.model.trainable_parameters() if self.settings.ema else {}
        self.step = self._skipped = 0
        self.scale = _FLOAT16_SCALE if sd.dtype == mx.float16 else 1.0

    def _with_lora(self) -> nn.Module:
        """Attach a new LoRA, and return the networks; its factors are their only trainable parameters."""
        networks, names = self.networks(), ("alpha", "targets", "conv_rank", "dora", "seed")
        ranks = dict.fromkeys(networks, self.settings.text_encoder_rank) | {"unet": self.settings.rank}
        fresh = new_lora(networks, ranks, **{name: getattr(self.settings, name) for name in names})
        self.lora = attach(networks, fresh)
        self.sd._attached.append(self.lora)  # so that a network freed after the training is reloaded with it
        model = Group(**networks)
        for _, layer in wrapped_layers(model):
            for delta in layer.loras:
                if delta.lora is not self.lora:
                    delta.freeze()
        return model

    def recompute(self, recomputes: bool) -> None:
        """Choose whether gradients keep only the inputs of the UNet's transformer blocks: takes 1/3 more time."""
        for module in self.sd.unet.modules():
            if isinstance(module, Transformer2DModel):
                module.recomputes = recomputes

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks that are used in a step, by the names of their parts."""
        names = {part.component.name: name for name, part in self.sd.sources.items() if name != "autoencoder"}
        wanted = names if self.settings.trains_text else ["unet"]
        return {part: getattr(self.sd, names[part]) for part in wanted}

    def factors(self) -> dict[str, mx.array]:
        """Return the current factors by their path."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    def __next__(self) -> TrainingStep:
        """Compute a step: clipped gradients of ``accumulate`` batches, and an update; see :class:`TrainingStep`."""
        if self.step >= self.settings.steps:
            raise StopIteration
        start, rate = time.perf_counter(), self.settings.rate(self.step)
        loss, gradients, norm = self._gradients()
        while self.scale > 1 and math.isfinite(loss) and not math.isfinite(norm):  # float16 overflows
            self.scale /= 4
            loss, gradients, norm = self._gradients()
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        if is_finite:
            if 0 < self.settings.clip_norm < norm:
                gradients = tree_map(lambda gradient: gradient * (self.settings.clip_norm / norm), gradients)
            self.optimizer.learning_rate = rate
            self.optimizer.update(self.model, gradients)
            if self.average:
                decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
                now = self.model.trainable_parameters()
                self.average = tree_map(lambda old, new: decay * old + (1 - decay) * new, self.average, now)
            mx.eval(self.factors(), self.optimizer.state, self.average)
        self._skipped = 0 if is_finite else self._skipped + 1
        self.step += 1
        if self._skipped == MAX_SKIPPED:
            raise FloatingPointError(
                f"the loss of steps {self.step - MAX_SKIPPED + 1} to {self.step} is not finite; use a smaller "
                "learning_rate or bfloat16"
            )
        return TrainingStep(self.step, loss, rate, time.perf_counter() - start, not is_finite)

    def _gradients(self) -> tuple[float, dict[str, Any], float]:
        """Return the loss of the step and its gradients, summed over batches and processes, and their norm."""
        count, row = self.settings.accumulate, 0  # row: number of pictures before a batch in the step
        rank, size = (0, 1) if self.group is None else (self.group.rank(), self.group.size())
        total, gradients = mx.array(0.0), tree_map(mx.zeros_like, self.model.trainable_parameters())
        for number in range(self.step * count, (self.step + 1) * count):
            for part, batch in enumerate(self.data.batches(number)):
                rows, chosen = range(len(batch.captions)), slice((rank - row) % size, None, size)
                row += len(rows)
                seeds = [seed_of(self.settings.seed, number, part, i) for i in rows[chosen]]
                if not seeds:
                    continue
                with without_sums():
                    value, changes = nn.value_and_grad(self.model, partial(self.loss, seeds=seeds))(batch.rows(chosen))
                mx.eval(value)
                for _, gradient in reversed(tree_flatten(changes)):  # MLX would delay some, and keep their inputs
                    mx.async_eval(gradient)
                weight = batch.weight * size * len(seeds) / (len(rows) * count * self.scale)
                gradients = tree_map(lambda old, new, weight=weight: old + weight * new, gradients, changes)
                total = total + weight * value
                mx.eval(gradients, total)
        if size > 1:
            total, gradients = nn.average_gradients((total, gradients), self.group)
        norm = mx.sqrt(tree_reduce(lambda result, gradient: result + mx.square(gradient).sum(), gradients, 0.0))
        return total.item(), gradients, norm.item()

    def loss(self, batch: TrainingBatch, seeds: list[int]) -> mx.array:
        """Return the loss of a batch whose noise comes from ``seeds``, one for each picture; times ``scale``."""
        schedule, conditioning = self.sd.schedule, batch.conditioning
        if conditioning is None:
            encoders = [(getattr(self.sd, token), getattr(self.sd, name)) for token, name in self.sd._encoders]
            encoded = encode(batch.captions, encoders, xl=self.sd.is_xl, emphasis="none")
            conditioning = replace(encoded, context=encoded.context[:, :77])
        if batch.time_ids is not None:
            conditioning = replace(conditioning, time_ids=batch.time_ids)
        sample = add_noise(batch, seeds, self.settings, schedule.config.num_train_timesteps)
        loss = denoising_loss(self.sd.unet, schedule, sample, conditioning, self.settings, self.sd.dtype)
        return self.scale * loss

    # --- saving ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, mx.array]:
        """Return the state needed to resume a run, as arrays by name."""
        run = {"step": mx.array(self.step), "skipped": mx.array(self._skipped), "scale": mx.array(self.scale)}
        factors = self.model.trainable_parameters()
        tree = {"run": run, "factors": factors, "average": self.average, "optimizer": self.optimizer.state}
        return dict(tree_flatten(tree))

    def load_state(self, arrays: Mapping[str, mx.array]) -> None:
        """Resume from the ``state`` of another run. Raises ValueError if it does not match."""
        kinds, found = ({name: (a.shape, a.dtype) for name, a in state.items()} for state in (self.state(), arrays))
        if kinds != found:
            raise ValueError("it was written by a run with another model, or another rank, targets, ema or optimizer")
        tree = tree_unflatten(list(arrays.items()))
        self.model.update(tree["factors"])
        self.optimizer.state, self.average = tree["optimizer"], tree.get("average", {})
        self.step, self._skipped, self.scale = (tree["run"][name].item() for name in ("step", "skipped", "scale"))

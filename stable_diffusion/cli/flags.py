"""The flags of the scripts: their usage and help, in groups by task.

A flag has the name of a field of ``Request``, ``Options``, ``Resources``, ``OutputSettings``, ``PreviewSettings`` or
``SharingSettings``, or is read in ``arguments`` alone, such as --prompt_file. Its type, limits and choices are in the
tables at the end of ``values``. "--flag VALUE ..." may be repeated. A flag without a value is a switch, or has
choices there. A default ends the help text, as "(default: 4)"; "the model's" is the value in the checkpoint.
"""

from ..app.engine import TEXT_BITS, UNET_BITS
from ..diffusion.schedule import SCHEDULES
from ..models.controlnet import UNION_TYPES
from ..weights import catalog
from ..weights.parts import NETWORKS

# --help lists these, --help_all all flags.
EVERYDAY = ("model", "negative_prompt", "seed", "steps", "cfg", "width", "height", "n_images", "output", "quantize")

ABOUT = {
    "image": "Set noise, guidance, sampler and input image.",
    "prompt": "Read prompts: (a:1.3), {one|other}, [from:to:0.4], AND, BREAK, ...",
    "sizes": "Condition SDXL on the size of a training picture. Other models ignore these.",
    "a part of the image": "Repaint a part of the image, or paint borders around it.",
    "ControlNet": "Fix the composition by a control image: edges, a depth map, a pose.",
    "image prompts": "Use a picture as a prompt, by an IP-Adapter for SD 1.5 or SDXL.",
    "second pass": "Refine, enlarge or repair the image.",
    "model": "Choose the model and its files.",
    "memory and time": "Save memory and time, choose device and precision.",
    "output": "Set names, formats and metadata of the files, and messages.",
    "preview": "Watch the image during the run.",
    "several Macs": "Distribute the images over the processes that mlx.launch starts.",
}
FLAGS = {
    "image": {
        "--negative_prompt TEXT": "content to avoid; works with guidance only (--cfg above 1)",
        "--width PIXELS": "width, a multiple of 8 (default: the model's, or the input image's)",
        "--height PIXELS": "height, a multiple of 8 (default: the model's, or the input image's)",
        "--n_images N": "images per prompt (default: 4, or 1 per combination of lists)",
        "--seed N": "seed of the first image; the next ones use seed+1, ...; a list gives one image per seed: 1,2,3 or "
        "1-20 (default: -1, random)",
        "--noise_source --rng": "draw the noise of a seed as another program does: torch for diffusers and ComfyUI, "
        "cuda for AUTOMATIC1111 (default: mlx)",
        "--eta_noise_seed_delta --ensd N": "add N to the seed for the noise that samplers add, as A1111's ENSD "
        "(default: 0)",
        "--variation_strength FRACTION": "vary one image: turn its noise by this fraction, 0 to 1, towards that of the "
        "variation seed; all images then have the same --seed; or a list (default: 0)",
        "--variation_seed N": "variation seed of the first image; the next ones use N+1, ...; or a list (default: "
        "random)",
        "--fixed_seed": "start every prompt from the same seed",
        "--steps N": "denoising steps; a grid compares those of a list such as 4,8 (default: the model's)",
        "--cfg SCALE": "classifier-free guidance scale: higher values follow the prompt more closely, 1 and below turn "
        "guidance off; or a list (default: the model's)",
        "--guidance_interval START,END": "limit guidance to these fractions of the steps; the other steps take half "
        "the time (default: 0,1)",
        "--guidance_rescale FRACTION": "restore the contrast of guided images, 0 to 1 (default: 0.7 for models with "
        "zero terminal SNR and v-prediction, 0 for others)",
        "--pag_scale SCALE": "scale of perturbed-attention guidance (PAG), such as 3, with --cfg or alone; takes 50 %% "
        "more time (default: 0)",
        "--pag_layers NAME,...": "perturb these parts of the UNet: mid, down, up_blocks.0 ... (default: mid)",
        "--freeu B1,B2,S1,S2": "scale the UNet's backbone (B) and skip connections (S) by FreeU, such as "
        "1.5,1.6,0.9,0.2 with SD 1 (default: off)",
        "--deep_cache N": "run the full UNet every N steps and reuse its deep features in between (DeepCache): faster, "
        "inexact (default: 1)",
        "--token_merging FRACTION": "merge this fraction of similar tokens, up to 0.75, in the large self-attentions "
        "(ToMe): faster, inexact (default: 0)",
        "--seamless": "make a pattern: opposite edges match along these axes",
        "--sampler NAME": "sampler, see --list_samplers; or a list (default: the model's)",
        "--schedule NAME": f"curve of the noise levels: {', '.join(SCHEDULES)}; a sampler's name may include it "
        "(default: the model's)",
        "--eta FRACTION": "fraction of fresh noise, 0 to 1, for samplers with eta (default: the sampler's)",
        "--s_churn N": "raise the noise level before each step of euler and heun by the fraction N / steps, at most "
        "0.41 (default: 0)",
        "--s_tmin SIGMA": "lowest noise level for --s_churn (default: 0)",
        "--s_tmax SIGMA": "highest noise level for --s_churn (default: no limit)",
        "--s_noise FACTOR": "scale all noise that samplers add (default: 1)",
        "--order N": "order of the method, 1 to 4, for samplers with several (default: the sampler's)",
        "--resize": "resize input images: crop to fill the size, pad to fit into it, or stretch (default: crop)",
        "--strength FRACTION": "how much to change the image, above 0 to 1: 0.3 keeps most of it, 1 ignores it; or a "
        "list (default: 0.9; 1 with --expand and for inpainting and instruction models)",
        "--image_cfg SCALE": "guidance scale towards the image, for instruction models (default: 1.5)",
    },
    "prompt": {
        "--prompt -p TEXT": "give the prompt as a flag",
        "--prompt_2 TEXT": "prompt for XL's second text encoder (default: the prompt)",
        "--negative_prompt_2 TEXT": "negative prompt for XL's second text encoder (default: the negative prompt)",
        "--clip_skip N": "omit the last N layers of the text encoder (default: 0)",
        "--emphasis": "apply weights such as (a:1.3): mean scales the embeddings and restores their mean, values "
        "scales the attention values, none reads brackets as text (default: mean)",
        "--weight_blocks": 'read "a red:2 cat:1" as blocks with weights',
        "--truncate": "cut a prompt after its first 75 tokens",
        "--alternatives": 'expand "a {red|blue} cat" into all prompts, or one chosen by the seed (default: all)',
        "--prompt_file FILE": "read a prompt from each line; flags of a line, such as --steps 30, are for that prompt",
        "--from_image FILE": "repeat the run that this image records; flags and a prompt override the record",
        "--without FLAG ...": "ignore this recorded flag of --from_image, such as lora; repeatable",
        "--trust": "with --from_image: use all recorded models and files, even downloads and files without a matching "
        "hash",
        "--wildcards DIR": "replace __name__ in prompts by the lines of DIR/name.txt",
    },
    "sizes": {
        "--original_size WIDTHxHEIGHT": "size of that picture before resizing (default: the image's)",
        "--crop LEFT,TOP": "upper left corner of its crop (default: 0,0)",
        "--target_size WIDTHxHEIGHT": "its size after resizing (default: the image's)",
        "--negative_original_size WIDTHxHEIGHT": "same for the negative prompt (default: --original_size)",
        "--negative_crop LEFT,TOP": "same for the negative prompt (default: --crop)",
        "--negative_target_size WIDTHxHEIGHT": "same for the negative prompt (default: --target_size)",
        "--aesthetic_score SCORE": "aesthetic score for SDXL's refiner, about 1 to 10 (default: 6)",
        "--negative_aesthetic_score SCORE": "same for the negative prompt (default: 2.5)",
    },
    "a part of the image": {
        "--mask FILE": "repaint the white areas of this image, keep the black ones, blend grey",
        "--invert_mask": "repaint the black areas and keep the white ones",
        "--mask_blur PIXELS": "soften the edges of the mask (default: 0)",
        "--mask_padding PIXELS": "crop the masked region with this padding and repaint it at the model's own size "
        "(default: repaint without a crop)",
        "--no_composite": "write the model's output unchanged, also in the kept areas",
        "--expand L,T,R,B": "paint borders of this many pixels around the image",
        "--depth FILE": "depth map for depth models, lighter is nearer (default: estimated)",
    },
    "ControlNet": {
        "--controlnet NET[:SCALE] ...": "use this ControlNet (Hub id, folder or file) at this strength; repeatable "
        "(default: 1)",
        "--control_image FILE ...": "control image; once per ControlNet, or one for all",
        "--canny": "detect the edges of the control image first (Canny)",
        "--control_start FRACTION ...": "start control after this fraction of the steps (default: 0)",
        "--control_end FRACTION ...": "end control after this fraction of the steps (default: 1)",
        "--control_type TYPE ...": f"kind of control image, for a union ControlNet: {', '.join(UNION_TYPES)}, or its "
        "number; once per ControlNet, or one for all",
        "--guess_mode": "ControlNet guess mode: ignore the prompt",
    },
    "image prompts": {
        "--ip_adapter NET[:SCALE] ...": "use this IP-Adapter (file or ID:FILE) at this strength; repeatable (default: "
        "1)",
        "--ip_image FILE[,FILE] ...": "picture for the IP-Adapter, or several together; once per adapter, or one for "
        "all",
        "--ip_start FRACTION ...": "start the image prompt after this fraction of the steps (default: 0)",
        "--ip_end FRACTION ...": "end the image prompt after this fraction of the steps (default: 1)",
        "--ip_blocks PARTS ...": "limit the adapter to parts of the UNet: style, layout or style+layout for SDXL, or "
        "parts with factors, such as up_blocks.0=1,mid=0.5 (default: all)",
        "--ip_mask FILE ...": "limit the adapter to the white area of this image; once per adapter, or one for all",
    },
    "second pass": {
        "--refiner MODEL": "denoise the last steps with this model, such as sdxl-refiner",
        "--refiner_start FRACTION": "switch to the refiner after this fraction of the denoising (default: 0.8)",
        "--hires FACTOR": "enlarge the image by this factor and denoise it again",
        "--hires_strength FRACTION": "how much the second pass may change (default: 0.5)",
        "--hires_steps N": "steps of the second pass before --hires_strength is applied (default: --steps)",
        "--hires_upscaler METHOD": "enlarge the latents, the pixels (changes less), or the pixels by the network in "
        "this file, as --upscale (default: latents)",
        "--upscale FILE": "enlarge the finished image by this network: an ESRGAN, Real-ESRGAN or SRVGG",
        "--detail PLACE ...": "redraw a box X,Y,W,H of the finished image, the parts of the mask (mask), or the boxes "
        "in a detector's JSON file; without --strength the rest of an input image is kept; repeatable",
        "--detail_prompt TEXT": "prompt for the details (default: the prompt)",
        "--detail_strength FRACTION": "how much to change the details (default: 0.4)",
        "--detail_padding PIXELS": "context around each detail (default: 32)",
    },
    "model": {
        "--model MODEL": f"one of {', '.join(catalog.ALIASES)}; a Hub id, folder or checkpoint file (default: sdxl)",
        "--revision REVISION": "branch, tag or commit of a Hub repository (default: main)",
        "--lora LORA[:SCALE] ...": "add a LoRA (file, folder or Hub id) at this scale, or at TEXT_ENCODERS:UNET; "
        "repeatable (default: 1)",
        "--lora_partial": "apply the matching layers of a LoRA and skip the rest",
        **{f"--{name} PART": f"use another {name}: a Hub id, folder or file" for name in NETWORKS},
        "--tokenizer DIR": "folder with vocab.json and merges.txt, for a checkpoint without a tokenizer",
        "--prediction": "prediction type of the UNet (default: the checkpoint's)",
        "--quantize -q": f"quantize the UNet to {UNET_BITS} bits and the text encoders to {TEXT_BITS}: less memory",
        "--unet_bits": "quantize the UNet to this many bits",
        "--text_bits": "quantize the text encoders to this many bits",
        "--lora_dir DIR ...": "folder of LoRAs, also in subfolders, for <lora:name:0.8> in prompts; repeatable",
        "--embedding FILE[=WORD] ...": "add a textual inversion under this word; repeatable (default: its own word)",
    },
    "memory and time": {
        "--low_memory": "load each network only while it is needed",
        "--memory_limit GB": "memory budget in GB (default: 75 %% of RAM, at most 90 %% of Metal's recommendation)",
        "--batch_size N": "images to denoise at once, also of several prompts (default: up to 8, as memory allows)",
        "--decoding_batch_size N": "images to decode at once (default: 1)",
        "--device": "device (default: SD_DEVICE in the environment, else a GPU if present)",
        "--cpu": "same as --device cpu",
        "--dtype": "number format; bfloat16 does not overflow, but rounds 8 times as much as float16 (default: float16 "
        "on a GPU, float32 on a CPU)",
        "--no_float16": "same as --dtype float32",
        "--exact": "avoid Winograd convolutions in half precision on a Mac: slower, 1/36 of the rounding error",
        "--preload_models": "load all weights before the first step",
    },
    "output": {
        "--output PATH": "a file (several images are numbered, and this is their grid), a folder, or a pattern of {i} "
        "{seed} {prompt} {steps} {cfg} {sampler} {width} {height} {model} {date} {time}, such as "
        "cats/{seed}_{prompt}.png; a number is added to an existing name (default: out.png)",
        "--overwrite": "overwrite existing files",
        "--no_grid": "omit the grid of several images",
        "--n_rows N": "rows of the grid (default: 1)",
        "--json": "print a JSON object for each file, not its path and seed",
        "--quality N": "quality of JPEG and WebP, 1 to 100 (default: 95)",
        "--no_metadata": "omit the settings from the image files",
        "--full_paths": "record the full paths of files in the images, not only their names",
        "--safety_check": "omit images that the checkpoint's safety checker flags, and print their number",
        "--safety_model PART": "use another safety checker: a Hub id, folder or file (default: the checkpoint's)",
        "--verbose -v": "print the settings chosen and the memory used",
    },
    "preview": {
        "--preview PATH": "write the current estimate of the image every few steps: to a file, or to a folder as a new "
        "file each time",
        "--preview_every N": "steps between previews (default: 5)",
        "--preview_vae VAE": "decode previews by this TAESD; without it they are small and coarse",
        "--stepwise FILE": "write an animation of all steps, .gif or .webp",
    },
    "several Macs": {
        "--share": "distribute the images: every n-th to each Mac (even), the next batch to each free Mac (steal), the "
        "rows of each image to all Macs together (guidance), or all images to each (off) (default: even)",
        "--gather": "also write all images and their grid on the first Mac",
    },
}

_WITHOUT_PROMPTS = {"width", "height", "n_images", "seed", "steps", "sampler", "schedule", "order", "eta", "s_noise"}
_WITHOUT_PROMPTS |= {"noise_source", "eta_noise_seed_delta", "variation_strength", "variation_seed", "freeu", "s_churn"}
_WITHOUT_PROMPTS |= {"deep_cache", "s_tmin", "s_tmax", "from_image", "without", "trust", "model", "revision"}
_OF_ALL = ("memory and time", "output", "preview", "several Macs")  # groups
FOREIGN = {  # flags that a script lacks
    "image2image": {"hires", "hires_strength", "hires_steps", "hires_upscaler"},
    "txt2image": {"image", "strength", "image_cfg"} | {flag.split()[0][2:] for flag in FLAGS["a part of the image"]},
    "unconditional": {flag.split()[0][2:] for title, flags in FLAGS.items() if title not in _OF_ALL for flag in flags}
    - _WITHOUT_PROMPTS
    | {"preview_vae"},
}
HELP_OF = {  # the help of flags that one script alone reads in another way
    "unconditional": {
        "--model MODEL": "Hub id, folder or file of a model without prompts (default: google/ddpm-cat-256)",
        "--width PIXELS": "width, a multiple of 8 (default: the model's)",
        "--height PIXELS": "height, a multiple of 8 (default: the model's)",
        "--n_images N": "number of images (default: 4, or 1 per combination of lists)",
        "--from_image FILE": "repeat the run that this image records; flags override the record",
    }
}
SWEPT = {"seed", "variation_seed", "variation_strength", "steps", "cfg", "sampler", "strength"}  # what takes lists

"""The flags of the scripts: their usage and help, in groups by task.

A flag has the name of a field of ``Request``, ``Options``, ``Resources``, ``OutputSettings``, ``PreviewSettings`` or
``SharingSettings``, or is read in ``arguments`` alone, such as --prompt_file. Its type, limits and choices are in the
tables at the end of ``parser``. "--flag VALUE ..." may be given again. A flag without a value is a switch, or has
choices there.
"""

from ..app.engine import TEXT_BITS, UNET_BITS
from ..diffusion.schedule import SCHEDULES
from ..models.controlnet import UNION_TYPES
from ..weights import catalog
from ..weights.parts import NETWORKS

ABOUT = {
    "picture": "What to show and how to make it. What is not given, the model decides.",
    "prompt": "How prompts are read: (a:1.3), {one|other}, [from:to:0.4], AND, BREAK, ...",
    "sizes": "SDXL draws as if cut from a picture of such a size; others read none of it.",
    "a part of the image": "Make only that anew, or more around it.",
    "ControlNet": "Steer by another image: its edges, its depth, a pose.",
    "image prompts": "Show what to draw, beside the prompt, by an IP-Adapter for SD 1.5 or SDXL.",
    "second pass": "Work again on the result.",
    "model": "What makes the picture, and from which files.",
    "memory and time": "How to run it where there is little of either.",
    "output": "Where the images go, and what is said of them.",
    "preview": "What a run has come to, while it goes on and from step to step.",
    "several Macs": "Share the images among the processes that mlx.launch starts.",
}
FLAGS = {
    "picture": {
        "--negative_prompt TEXT": "what to steer away from",
        "--width PIXELS": "a multiple of 8",
        "--height PIXELS": "a multiple of 8",
        "--n_images N": "images of each prompt (4), and of each setting of lists (1)",
        "--seed N": "of the first image, the others count on from it (-1, random); or of each image, as a list: 1,2,3 "
        "or 1-20. --steps, --cfg, --sampler and image2image's strength take lists too: a grid shows every combination",
        "--noise_source --rng": "where a seed's noise is from, for the same picture as another program: torch is "
        "diffusers' and ComfyUI's, cuda AUTOMATIC1111's (mlx)",
        "--eta_noise_seed_delta --ensd N": "added to the seed for the noise that samplers add, as A1111's ENSD (0)",
        "--variation_strength SHARE": "how far to turn the noise of the seed towards that of another one, 0 to 1, to "
        "vary a picture; all images have the same --seed then, and their variation seeds count on (0); or a list",
        "--variation_seed N": "of the first image, the others count on from it (random); or a list",
        "--fixed_seed": "start every prompt from the same seed, not from the next one",
        "--steps N": "sampler steps",
        "--cfg SCALE": "how closely to follow the prompt; 1 and below is no guidance",
        "--guidance_interval START,END": "shares of the steps with guidance; the others take half the time (0,1)",
        "--guidance_rescale FRACTION": "bring the contrast of guided images back, 0 to 1 (0.7 for models with zero "
        "terminal SNR and v-prediction, 0 for others)",
        "--pag_scale SCALE": "of perturbed-attention guidance, such as 3, with --cfg or alone; a half more time (0)",
        "--pag_layers NAME,...": "parts of the UNet that it perturbs: mid, down, up_blocks.0 ... (mid)",
        "--freeu B1,B2,S1,S2": "factors of FreeU for the UNet's backbone and its skips, such as "
        "1.5,1.6,0.9,0.2 with SD 1 (off)",
        "--deep_cache N": "faster, inexact: whole UNet every N steps (1)",
        "--token_merging SHARE": "of positions, up to 0.75, that large self-attentions merge: faster, inexact (0)",
        "--seamless": "axes along which the edges of the picture meet, for patterns",
        "--sampler NAME": "how to denoise, see --list_samplers",
        "--schedule NAME": f"curve of the noise levels: {', '.join(SCHEDULES)}; a sampler's name may name one too",
        "--eta SHARE": "of fresh noise, 0 to 1, for the samplers that have one",
        "--s_churn N": "noise that euler and heun add before each step: N / steps of what there is, up to 0.41 (0)",
        "--s_tmin SIGMA": "the lowest noise level at which they do (0)",
        "--s_tmax SIGMA": "the highest (no limit)",
        "--s_noise FACTOR": "on all noise that samplers add (1)",
        "--order N": "order of the method, 1 to 4, for the samplers that have several (the sampler's own)",
        "--resize": "how a given image comes to the size: cut to fill it, fitted into it, or stretched (crop)",
        "--strength SHARE": "how far to go from the image: above 0, where little changes, to 1, where nothing is left "
        "of it (0.9; 1 with --expand and for models made for masks or instructions)",
        "--image_cfg SCALE": "the same as --cfg for the image, for models for instructions (1.5)",
    },
    "prompt": {
        "--prompt -p TEXT": "the prompt, in place of the one without a flag",
        "--prompt_2 TEXT": "the prompt for XL's second text encoder (the same)",
        "--negative_prompt_2 TEXT": "the negative prompt for XL's second text encoder (the same)",
        "--clip_skip N": "layers to leave out at the encoder's end (0)",
        "--emphasis": "how weights act: on the encoded words, keeping their mean; on what is taken from them; or "
        "brackets are text (mean)",
        "--weight_blocks": 'read "a red:2 cat:1" as blocks with weights',
        "--truncate": "cut a prompt after its first 75 tokens",
        "--alternatives": 'of "a {red|blue} cat": make every one, or one that the seed chooses (all)',
        "--prompt_file FILE": "a prompt on each line, with options of its own if it likes",
        "--from_image FILE": "make this picture again; flags, and a prompt, take the place of what it says",
        "--without FLAG ...": "leave out this flag of --from_image's picture, such as lora; may be given again",
        "--trust": "with --from_image: use all files and models that the picture names, also those that it does not "
        "prove to know by a hash and those that have to be downloaded",
        "--wildcards DIR": "read __name__ in prompts as the lines of DIR/name.txt",
    },
    "sizes": {
        "--original_size WIDTHxHEIGHT": "size of that picture before it was resized (the image's)",
        "--crop LEFT,TOP": "the upper left corner of the cut (0,0)",
        "--target_size WIDTHxHEIGHT": "its size after it was resized (the image's)",
        "--negative_original_size WIDTHxHEIGHT": "for the negative prompt (--original_size)",
        "--negative_crop LEFT,TOP": "for the negative prompt (--crop)",
        "--negative_target_size WIDTHxHEIGHT": "for the negative prompt (--target_size)",
        "--aesthetic_score SCORE": "for SDXL's refiner: how beautiful, about 1 to 10 (6)",
        "--negative_aesthetic_score SCORE": "for the negative prompt (2.5)",
    },
    "a part of the image": {
        "--mask FILE": "make anew what is white in this image, keep what is black, blend grey",
        "--invert_mask": "make anew what is black",
        "--mask_blur PIXELS": "soften the edges of the mask (0)",
        "--mask_padding PIXELS": "work on the mask and so much around it, at the model's own size (on all of it)",
        "--no_composite": "write what the model made, also where the image is kept",
        "--expand L,T,R,B": "paint borders of so many pixels around the image",
        "--depth FILE": "depth map for models made for it, lighter is nearer (estimated)",
    },
    "ControlNet": {
        "--controlnet NET[:SCALE] ...": "id, folder or file of a ControlNet, how strong it is (1); may be given again",
        "--control_image FILE ...": "what it is shown; once for each, or for all",
        "--canny": "show it the edges of that image",
        "--control_start SHARE ...": "of the steps, when it begins (0)",
        "--control_end SHARE ...": "of the steps, when it ends (1)",
        "--control_type TYPE ...": f"what a union ControlNet is shown: {', '.join(UNION_TYPES)}, or its number; once "
        "for each, or for all",
        "--guess_mode": "let it steer without the help of the prompt",
    },
    "image prompts": {
        "--ip_adapter NET[:SCALE] ...": "file or ID:FILE of an IP-Adapter, how strong it is (1); may be given again",
        "--ip_image FILE[,FILE] ...": "the picture that it is shown, or several together; once for each, or for all",
        "--ip_start SHARE ...": "of the steps, when it begins (0)",
        "--ip_end SHARE ...": "of the steps, when it ends (1)",
        "--ip_blocks PARTS ...": "parts of the UNet that it acts on: style, layout or style+layout for SDXL, or parts "
        "with factors, such as up_blocks.0=1,mid=0.5 (all)",
        "--ip_mask FILE ...": "act where this image is white; once for each, or for all",
    },
    "second pass": {
        "--refiner MODEL": "a model that does the last steps, such as sdxl-refiner",
        "--refiner_start SHARE": "of the noise that is gone when it begins (0.8)",
        "--hires FACTOR": "enlarge the image so much and work on it again",
        "--hires_strength SHARE": "how much that changes it (0.5)",
        "--hires_steps N": "sampler steps, of which it takes that share (--steps)",
        "--hires_upscaler METHOD": "what is enlarged: latents, or the decoded pixels, which changes less; or the file "
        "of a network that enlarges these, as for --upscale (latents)",
        "--upscale FILE": "enlarge the finished image by this network: an ESRGAN, Real-ESRGAN or SRVGG",
        "--detail PLACE ...": "work again on a box X,Y,W,H of the finished picture, on the parts of the mask (mask) or "
        "on the boxes in a detector's file of JSON; without --strength all else of a given image stays; may be given "
        "again",
        "--detail_prompt TEXT": "what to show there (the prompt)",
        "--detail_strength SHARE": "how much that changes it (0.4)",
        "--detail_padding PIXELS": "what is seen around it (32)",
    },
    "model": {
        "--model MODEL": f"one of {', '.join(catalog.ALIASES)}; a Hub id, a folder or a file with a checkpoint (sdxl)",
        "--revision REVISION": "branch, tag or commit of a Hub repository (main)",
        "--lora LORA[:SCALE] ...": "file, folder or id of a LoRA, and how much of it to add (1), also as "
        "TEXT_ENCODERS:UNET; may be given again",
        "--lora_partial": "take what fits of a LoRA, where some of it does not",
        **{f"--{name} PART": f"an id, folder or file with another {name}" for name in NETWORKS},
        "--tokenizer DIR": "a folder with vocab.json and merges.txt, for a file that has none",
        "--prediction": "what the UNet predicts (what the checkpoint says)",
        "--quantize -q": f"text encoders to {TEXT_BITS} bits, the UNet to {UNET_BITS}",
        "--unet_bits": "quantize the UNet to so many bits",
        "--text_bits": "quantize the text encoders to so many bits",
        "--lora_dir DIR ...": "a folder with LoRAs, also in its sub-folders, for <lora:name:0.8> in prompts; may be "
        "given again",
        "--embedding FILE[=WORD] ...": "a textual inversion, and its word in prompts (its own); may be given again",
    },
    "memory and time": {
        "--low_memory": "keep only the networks in memory that are being used",
        "--memory_limit GB": "memory to make do with (most of the machine's)",
        "--batch_size N": "images to make at once, of several prompts too (as many as memory allows, up to 8)",
        "--decoding_batch_size N": "images to decode at once (1)",
        "--device": "where to compute (SD_DEVICE in the environment, or a GPU where there is one)",
        "--cpu": "the same as --device cpu",
        "--dtype": "in which type; bfloat16 does not overflow, but rounds 8 times as much as float16 (float16 on a "
        "GPU, float32 on a CPU)",
        "--no_float16": "the same as --dtype float32",
        "--exact": "half precision without Winograd's convolutions on a Mac: slower, a 36th of their rounding error",
        "--preload_models": "read all weights before the first step",
    },
    "output": {
        "--output PATH": "a file: several images are numbered, this is their grid; a folder; or a pattern of {i} "
        "{seed} {prompt} {steps} {cfg} {sampler} {width} {height} {model} {date} {time}, such as "
        "cats/{seed}_{prompt}.png; a number follows where the name is taken (out.png)",
        "--overwrite": "replace files that have the name",
        "--no_grid": "write no grid of several images",
        "--n_rows N": "rows of the grid (1)",
        "--json": "print an object in JSON for each file, not its path and seed",
        "--quality N": "of JPEG and WebP, 1 to 100 (95)",
        "--no_metadata": "write nothing into the images of how they were made",
        "--full_paths": "write the whole paths of files into the images, not their names alone",
        "--safety_check": "write no image that the checkpoint's safety checker flags, and say how many these are",
        "--safety_model PART": "an id, folder or file with another safety checker (the checkpoint's)",
        "--verbose -v": "say what is chosen, and how much memory was used",
    },
    "preview": {
        "--preview PATH": "a file to rewrite after some steps, or a folder for a file each time",
        "--preview_every N": "steps between previews (5)",
        "--preview_vae VAE": "decode previews by this TAESD; they are small and coarse without",
        "--stepwise FILE": "a .gif or .webp to write, that shows the images after each step",
    },
    "several Macs": {
        "--share": "even: each Mac makes every n-th image; steal: whichever is done takes the next batch; guidance: "
        "all work on each image together; off: each makes all of them (even)",
        "--gather": "write all images and their grid on the first Mac too",
    },
}

_WITHOUT_PROMPTS = {"width", "height", "n_images", "seed", "steps", "sampler", "schedule", "order", "eta", "s_noise"}
_WITHOUT_PROMPTS |= {"noise_source", "eta_noise_seed_delta", "variation_strength", "variation_seed", "freeu", "s_churn"}
_WITHOUT_PROMPTS |= {"deep_cache", "s_tmin", "s_tmax", "from_image", "without", "trust", "model", "revision"}
_OF_ALL = ("memory and time", "output", "preview", "several Macs")  # groups
FOREIGN = {  # what a script does not have
    "image2image": {"hires", "hires_strength", "hires_steps", "hires_upscaler"},
    "txt2image": {"image", "strength", "image_cfg"} | {flag.split()[0][2:] for flag in FLAGS["a part of the image"]},
    "unconditional": {flag.split()[0][2:] for title, flags in FLAGS.items() if title not in _OF_ALL for flag in flags}
    - _WITHOUT_PROMPTS
    | {"preview_vae"},
}
SWEPT = {"seed", "variation_seed", "variation_strength", "steps", "cfg", "sampler", "strength"}  # what takes lists

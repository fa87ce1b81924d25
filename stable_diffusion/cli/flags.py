"""The flags of the command lines, in groups by task.

A flag of the same name as a field of ``Request`` or ``Options`` sets it: its type and its limits come from there. A row
here adds the text of the help.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..app.engine import TEXT_BITS, UNET_BITS
from ..app.request import COUNT
from ..diffusion.schedule import SCHEDULES
from ..options import Number
from ..weights import catalog
from ..weights.files import PREDICTIONS
from ..weights.quantize import BITS
from . import types


@dataclass(frozen=True)
class Flag:
    """Describe a flag. ``kind`` reads its value; None is the type of its field. ``sweeps`` takes several values."""

    name: str
    help: str
    metavar: str | None = None
    kind: Callable[[str], Any] | None = None
    choices: Sequence[Any] | None = None
    sweeps: bool = False
    repeats: bool = False
    action: str | None = None
    dest: str | None = None


@dataclass(frozen=True)
class Group:
    """Collect the flags of a task. ``script`` is the only one that has them, None is both."""

    title: str
    about: str
    flags: Sequence[Flag]
    script: str | None = None


SIDE = "a multiple of 8"
PICTURE = Group(
    "picture",
    "What to show and how to make it. What is not given, the model decides.",
    [
        Flag("negative_prompt", "what to steer away from", "TEXT", types.text),
        Flag("width", SIDE, "PIXELS"),
        Flag("height", SIDE, "PIXELS"),
        Flag("n_images", "images of each prompt (4), and of each setting of lists (1)", "N"),
        Flag(
            "seed",
            "of the first image, the others count on from it (random); or of each image, as a list: 1,2,3 or 1-20. "
            "--steps, --cfg, --sampler and image2image's strength take lists too: a grid shows every combination",
            "N",
            sweeps=True,
        ),
        Flag("steps", "sampler steps", "N", sweeps=True),
        Flag("cfg", "how closely to follow the prompt; 1 and below is no guidance", "SCALE", sweeps=True),
        Flag(
            "guidance_interval",
            "shares of the steps between which there is guidance; the others take half the time (0,1)",
            "START,END",
            types.interval,
        ),
        Flag(
            "guidance_rescale",
            "bring the contrast of guided images back, 0 to 1; about 0.7 for models with zero terminal SNR (0)",
            "FRACTION",
        ),
        Flag("deep_cache", "faster, inexact: whole UNet every N steps (1)", "N"),
        Flag(
            "token_merging",
            "of positions, up to 0.75, that the largest self-attentions merge: faster, not exact (0)",
            "SHARE",
        ),
        Flag("sampler", "how to denoise, see --list_samplers", "NAME", types.sampler, sweeps=True),
        Flag(
            "schedule",
            f"curve of the noise levels: {', '.join(SCHEDULES)}; a sampler's name may name one too",
            "NAME",
            choices=SCHEDULES,
        ),
        Flag("eta", "of fresh noise, 0 to 1, for the samplers that have one", "SHARE"),
        Flag("resize", "how a given image comes to the size: cut to fill it, fitted into it, or stretched (crop)"),
    ],
)
FROM_IMAGE = Group(
    "picture",
    "",
    [
        Flag(
            "strength",
            "how far to go from the image: above 0, where little changes, to 1, where nothing is left of it "
            "(0.9; 1 with --expand and for models made for masks or instructions)",
            "SHARE",
            sweeps=True,
        ),
        Flag("image_cfg", "the same as --cfg for the image, for models for instructions (1.5)", "SCALE"),
    ],
    "image2image",
)
PROMPT = Group(
    "prompt",
    "How prompts are read: (a:1.3), {one|other}, [from:to:0.4], AND, BREAK, ...",
    [
        Flag("clip_skip", "layers to leave out at the encoder's end (0)", "N"),
        Flag(
            "emphasis",
            "how weights act: on the encoded words, keeping their mean; on what is taken from them; or brackets are "
            "text (mean)",
        ),
        Flag("weight_blocks", 'read "a red:2 cat:1" as blocks with weights'),
        Flag("truncate", "cut a prompt after its first 75 tokens"),
        Flag("alternatives", 'of "a {red|blue} cat": make every one, or one that the seed chooses (all)'),
    ],
)
SOURCES = Group(
    "prompt",
    "",
    [
        Flag("prompt_file", "a prompt on each line, with options of its own if it likes", "FILE"),
        Flag(
            "from_image",
            "make this picture again, as it says itself; flags, and a prompt, take the place of what it says",
            "FILE",
        ),
        Flag(
            "without",
            "leave out this flag of --from_image's picture, such as lora or quantize; may be given again",
            "FLAG",
            repeats=True,
        ),
        Flag("wildcards", "read __name__ in prompts as the lines of DIR/name.txt", "DIR"),
    ],
)
MASK = Group(
    "a part of the image",
    "Make only that anew, or more around it.",
    [
        Flag("mask", "make anew what is white in this image, keep what is black, blend grey", "FILE"),
        Flag("invert_mask", "make anew what is black"),
        Flag("mask_blur", "soften the edges of the mask (0)", "PIXELS"),
        Flag(
            "mask_padding",
            "work on what is masked and so much around it, at the model's own size, and paste it back (on all of it)",
            "PIXELS",
        ),
        Flag("no_composite", "write what the model made, also where the image is kept"),
        Flag("expand", "paint borders of so many pixels around the image", "L,T,R,B", types.borders),
        Flag("depth", "depth map for models made for it, lighter is nearer (estimated)", "FILE"),
    ],
    "image2image",
)
CONTROL = Group(
    "ControlNet",
    "Steer by another image: its edges, its depth, a pose.",
    [
        Flag(
            "controlnet",
            "an id, folder or file of a ControlNet and how strongly it steers (1); may be given again",
            "NET[:SCALE]",
            types.weighted,
            repeats=True,
        ),
        Flag("control_image", "what it is shown; once for each, or for all", "FILE", repeats=True),
        Flag("canny", "show it the edges of that image"),
        Flag("control_start", "of the steps, when it begins (0)", "SHARE", repeats=True),
        Flag("control_end", "of the steps, when it ends (1)", "SHARE", repeats=True),
        Flag("guess_mode", "let it steer without the help of the prompt"),
    ],
)
HIRES = Group(
    "second pass",
    "Work again on the result: larger, or with another model.",
    [
        Flag("hires", "enlarge the image so much and work on it again", "FACTOR"),
        Flag("hires_strength", "how much that changes it (0.5)", "SHARE"),
        Flag("hires_steps", "sampler steps, of which it takes that share (--steps)", "N"),
        Flag(
            "hires_upscaler",
            "what is enlarged: the latents, or the decoded image, which changes less (latents)",
        ),
    ],
    "txt2image",
)
REFINER = Group(
    "second pass",
    "Work again on the result.",
    [
        Flag("refiner", "a model that does the last steps, such as sdxl-refiner", "MODEL"),
        Flag("refiner_start", "of the noise that is gone when it begins (0.8)", "SHARE"),
    ],
)
MODEL = Group(
    "model",
    "What makes the picture, and from which files.",
    [
        Flag("model", f"one of {', '.join(catalog.names())}; a Hub id, a folder or a file with a checkpoint (sdxl)"),
    ],
)
WEIGHTS = Group(
    "model",
    "",
    [
        Flag("revision", "branch, tag or commit of a Hub repository (main)"),
        Flag(
            "lora",
            "a file, folder or id of a LoRA to add to the weights, and how much of it (1); may be given again",
            "LORA[:SCALE]",
            types.weighted,
            repeats=True,
        ),
        Flag("lora_partial", "take what fits of a LoRA, where some of it does not"),
        *(
            Flag(part, f"an id, folder or file with another {part}", "PART")
            for part in ("vae", "unet", "text_encoder", "text_encoder_2")
        ),
        Flag("tokenizer", "a folder with vocab.json and merges.txt, for a file that has none", "DIR"),
        Flag("prediction", "what the UNet predicts (what the checkpoint says)", choices=PREDICTIONS),
        Flag("quantize", f"text encoders to {TEXT_BITS} bits, the UNet to {UNET_BITS}"),
        Flag("unet_bits", "quantize the UNet to so many bits", kind=int, choices=BITS),
        Flag("text_bits", "quantize the text encoders to so many bits", kind=int, choices=BITS),
    ],
)
ADDED = Group(
    "model",
    "",
    [
        Flag("lora_dir", "where <lora:name:0.8> in a prompt is looked for", "DIR"),
        Flag(
            "embedding",
            "a textual inversion embedding and the word for it in prompts (the file's own); may be given again",
            "FILE[=WORD]",
            repeats=True,
        ),
    ],
)
MEMORY = Group(
    "memory and time",
    "How to run it where there is little of either.",
    [
        Flag("low_memory", "keep only the networks in memory that are being used", action="store_true"),
        Flag("memory_limit", "memory to make do with (three quarters of all)", "GB", types.gigabytes),
        Flag(
            "batch_size",
            "images to make at once, of several prompts too (as many as memory allows, up to 8)",
            "N",
            types.NumberType(COUNT),
        ),
        Flag("decoding_batch_size", "images to decode at once (1)", "N", types.NumberType(COUNT)),
        Flag("no_float16", "compute in float32", action="store_false", dest="float16"),
        Flag("preload_models", "read all weights before the first step", action="store_true"),
    ],
)
OUTPUT = Group(
    "output",
    "Where the images go, and what is said of them.",
    [
        Flag(
            "output",
            "a file: several images are numbered, this is their grid; a folder; or a pattern of {i} {seed} {prompt} "
            "{steps} {cfg} {sampler} {width} {height} {model} {date} {time}, such as cats/{seed}_{prompt}.png; a "
            "number follows where the name is taken (out.png)",
            "PATH",
        ),
        Flag("overwrite", "replace files that have the name", action="store_true"),
        Flag("no_grid", "write no grid of several images", action="store_true"),
        Flag("n_rows", "rows of the grid (1)", "N", types.NumberType(COUNT)),
        Flag("json", "print an object in JSON for each file, not its path and seed", action="store_true"),
        Flag("quality", "of JPEG and WebP, 1 to 100 (95)", "N", types.NumberType(Number(int, 1, 100))),
        Flag("no_metadata", "write nothing into the images of how they were made", action="store_true"),
        Flag("verbose", "say what is chosen, and how much memory was used", action="store_true"),
    ],
)
PREVIEW = Group(
    "preview",
    "What a run has come to, while it goes on and from step to step.",
    [
        Flag("preview", "a file to rewrite after some steps, or a folder for a file each time", "PATH"),
        Flag("preview_every", "steps between previews (5)", "N", types.NumberType(COUNT)),
        Flag("preview_vae", "decode previews by this TAESD; they are small and coarse without", "VAE"),
        Flag("stepwise", "a .gif or .webp to write, that shows the images after each step", "FILE"),
    ],
)

LINE_GROUPS = (PICTURE, FROM_IMAGE, PROMPT)  # what a line of a prompt file may have
GROUPS = (
    *LINE_GROUPS,
    *(SOURCES, MASK, CONTROL, HIRES, REFINER, MODEL, WEIGHTS, ADDED, MEMORY, OUTPUT, PREVIEW),
)
SHORT = {"quantize": "-q", "verbose": "-v"}

"""The flags of the command lines, in groups by task.

Every value is checked as it is read, so that bad input ends before a model is touched.
"""

import argparse
from typing import Any, NoReturn

from ..diffusion.samplers import table
from ..diffusion.schedule import SCHEDULES
from ..text.encode import EMPHASES
from ..weights import catalog
from ..weights.files import PREDICTIONS
from ..weights.quantize import BITS
from . import types as values
from .lists import listed, with_ranges

TEXT_BITS, UNET_BITS = 4, 8  # what -q stands for
PARTS = ("vae", "unet", "text_encoder", "text_encoder_2")  # of a model, that may come from elsewhere
_REPEATED: dict[str, Any] = {"action": "append", "default": []}


class _ListSamplers(argparse.Action):
    """Print the table of samplers and leave, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(table())
        parser.exit()


def add_picture(parser: argparse.ArgumentParser, from_image: bool) -> None:
    """The options of the picture, which may also stand in a line of a file of prompts."""
    about = "What to show and how to make it. What is not given, the model decides."
    add = parser.add_argument_group("picture", about).add_argument
    add("--negative_prompt", type=values.text, default="", metavar="TEXT", help="what to steer away from")
    add("--width", type=values.side, metavar="PIXELS", help="a multiple of 8")
    add("--height", type=values.side, metavar="PIXELS", help="a multiple of 8")
    add(
        "--n_images", type=values.count, metavar="N", help="images of each prompt (4), and of each setting of lists (1)"
    )
    add(
        "--seed",
        metavar="N",
        help="of the first image, the others count on from it (random); or of each image, as a list: 1 2 3, 1-20. "
        "--steps, --cfg, --sampler and image2image's strength take lists too: a grid shows every combination",
        **with_ranges(values.seed, values.MANY),
    )
    add("--steps", metavar="N", help="sampler steps", **listed(values.count))
    add(
        "--cfg",
        metavar="SCALE",
        help="how closely to follow the prompt; 1 and below is no guidance",
        **listed(values.number),
    )
    add(
        "--guidance_interval",
        type=values.interval,
        default=(0.0, 1.0),
        metavar="START,END",
        help="shares of the steps between which there is guidance; the others take half the time (0,1)",
    )
    add("--deep_cache", type=values.count, default=1, metavar="N", help="faster, inexact: whole UNet every N steps (1)")
    add(
        "--token_merging",
        type=values.merging,
        default=0.0,
        metavar="SHARE",
        help="of positions, up to 0.75, that the largest self-attentions merge: faster, not exact (0)",
    )
    add("--sampler", metavar="NAME", help="how to denoise, see --list_samplers", **listed(values.sampler))
    add("--list_samplers", action=_ListSamplers, nargs=0, help="print the samplers and leave")
    add(
        "--schedule",
        choices=SCHEDULES,
        metavar="NAME",
        help=f"curve of the noise levels: {', '.join(SCHEDULES)}; a sampler's name may name one too",
    )
    add("--eta", type=values.share, metavar="SHARE", help="of fresh noise, 0 to 1, for the samplers that have one")
    add(
        "--resize",
        choices=("crop", "pad", "stretch"),
        default="crop",
        help="how a given image comes to the size asked for: cut to fill it, fitted into it, or stretched (crop)",
    )
    if from_image:
        add(
            "--strength",
            metavar="SHARE",
            help="how far to go from the image: above 0, where little changes, to 1, where nothing is left of it "
            "(0.9; 1 with --expand and for models made for masks or instructions)",
            **listed(values.strength),
        )
        add(
            "--image_cfg",
            type=values.number,
            metavar="SCALE",
            help="the same as --cfg for the image, for models for instructions (1.5)",
        )


def add_prompt(parser: argparse.ArgumentParser) -> Any:
    """The options of how prompts are read, which may also stand in a line of a file of prompts."""
    about = "How prompts are read: (a:1.3), {one|other}, [from:to:0.4], AND, BREAK, ..."
    prompt = parser.add_argument_group("prompt", about)
    add = prompt.add_argument
    add("--clip_skip", type=values.whole, default=0, metavar="N", help="layers to leave out at the encoder's end (0)")
    add(
        "--emphasis",
        choices=EMPHASES,
        default="mean",
        help="how weights act: on the encoded words, keeping their mean; on what is taken from them; or brackets are "
        "text (mean)",
    )
    add("--weight_blocks", action="store_true", help='read "a red:2 cat:1" as blocks with weights')
    add("--truncate", action="store_true", help="cut a prompt after its first 75 tokens")
    add(
        "--alternatives",
        choices=("all", "one"),
        default="all",
        help='of "a {red|blue} cat": make every one, or one that the seed chooses (all)',
    )
    return prompt


def add_mask(parser: argparse.ArgumentParser) -> None:
    """The options of what is made anew of a given image, and what is painted around it."""
    add = parser.add_argument_group("a part of the image", "Make only that anew, or more around it.").add_argument
    add("--mask", metavar="FILE", help="make anew what is white in this image, keep what is black, blend grey")
    add("--invert_mask", action="store_true", help="make anew what is black")
    add("--mask_blur", type=values.radius, default=0.0, metavar="PIXELS", help="soften the edges of the mask (0)")
    add(
        "--mask_padding",
        type=values.whole,
        metavar="PIXELS",
        help="work on what is masked and so much around it, at the model's own size, and paste it back (on all of it)",
    )
    add("--no_composite", action="store_true", help="write what the model made, also where the image is kept")
    add("--expand", type=values.borders, metavar="L,T,R,B", help="paint borders of so many pixels around the image")
    add("--depth", metavar="FILE", help="depth map for models made for it, lighter is nearer (estimated)")


def add_control(parser: argparse.ArgumentParser) -> None:
    """The options of what steers a run beside its prompt."""
    add = parser.add_argument_group("ControlNet", "Steer by another image: its edges, its depth, a pose.").add_argument
    add(
        "--controlnet",
        type=values.weighted,
        metavar="NET[:SCALE]",
        help="an id, folder or file of a ControlNet and how strongly it steers (1); may be given again",
        **_REPEATED,
    )
    add("--control_image", metavar="FILE", help="what it is shown; once for each, or for all", **_REPEATED)
    add("--canny", action="store_true", help="show it the edges of that image")
    add("--control_start", type=values.share, metavar="SHARE", help="of the steps, when it begins (0)", **_REPEATED)
    add("--control_end", type=values.share, metavar="SHARE", help="of the steps, when it ends (1)", **_REPEATED)
    add("--guess_mode", action="store_true", help="let it steer without the help of the prompt")


def add_second_pass(parser: argparse.ArgumentParser, from_image: bool) -> None:
    """The options of working again on a result."""
    about = "Work again on the result." if from_image else "Work again on the result: larger, or with another model."
    add = parser.add_argument_group("second pass", about).add_argument
    if not from_image:
        add("--hires", type=values.factor, metavar="FACTOR", help="enlarge the image so much and work on it again")
        add(
            "--hires_strength",
            type=values.strength,
            default=0.5,
            metavar="SHARE",
            help="how much that changes it (0.5)",
        )
        add(
            "--hires_steps",
            type=values.count,
            metavar="N",
            help="sampler steps, of which it takes that share (--steps)",
        )
        add(
            "--hires_upscaler",
            choices=("latents", "pixels"),
            default="latents",
            help="what is enlarged: the latents, or the decoded image, which changes less (latents)",
        )
    add("--refiner", metavar="MODEL", help="a model that does the last steps, such as sdxl-refiner")
    add(
        "--refiner_start",
        type=values.strength,
        default=0.8,
        metavar="SHARE",
        help="of the noise that is gone when it begins (0.8)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options of what makes the picture."""
    group = parser.add_argument_group("model", "What makes the picture, and from which files.")
    add = group.add_argument
    add(
        "--model",
        default="sdxl",
        help=f"one of {', '.join(catalog.names())}; a Hub id, a folder or a file with a checkpoint (sdxl)",
    )
    add_weights(group)
    add("--lora_dir", metavar="DIR", help="where <lora:name:0.8> in a prompt is looked for")
    add(
        "--embedding",
        metavar="FILE[=WORD]",
        help="a textual inversion embedding and the word for it in prompts (the file's own); may be given again",
        **_REPEATED,
    )


def add_weights(group: Any) -> None:
    """The options of the weights of ``--model``, or of what is converted."""
    add = group.add_argument
    add("--revision", help="branch, tag or commit of a Hub repository (main)")
    add(
        "--lora",
        type=values.weighted,
        metavar="LORA[:SCALE]",
        help="a file, folder or id of a LoRA to add to the weights, and how much of it (1); may be given again",
        **_REPEATED,
    )
    add("--lora_partial", action="store_true", help="take what fits of a LoRA, where some of it does not")
    for part in PARTS:
        add(f"--{part}", metavar="PART", help=f"an id, folder or file with another {part}")
    add("--tokenizer", metavar="DIR", help="a folder with vocab.json and merges.txt, for a file that has none")
    add("--prediction", choices=PREDICTIONS, help="what the UNet predicts (what the checkpoint says)")
    add("--quantize", "-q", action="store_true", help=f"text encoders to {TEXT_BITS} bits, the UNet to {UNET_BITS}")
    add("--unet_bits", type=int, choices=BITS, help="quantize the UNet to so many bits")
    add("--text_bits", type=int, choices=BITS, help="quantize the text encoders to so many bits")


def chosen_bits(args: argparse.Namespace) -> dict[str, int]:
    """``unet_bits`` and ``text_bits`` where the flags of ``add_weights`` ask for them."""
    bits = {"unet_bits": UNET_BITS, "text_bits": TEXT_BITS} if args.quantize else {}
    return bits | {name: getattr(args, name) for name in ("unet_bits", "text_bits") if getattr(args, name) is not None}


def chosen_parts(args: argparse.Namespace) -> dict[str, str]:
    """The networks that come from elsewhere, and from where."""
    return {name: getattr(args, name) for name in PARTS if getattr(args, name) is not None}


def add_memory(parser: argparse.ArgumentParser) -> None:
    """The options of how it is run, which are not recorded in the picture, but for the type."""
    add = parser.add_argument_group("memory and time", "How to run it where there is little of either.").add_argument
    add("--low_memory", action="store_true", help="keep only the networks in memory that are being used")
    add("--memory_limit", type=values.gigabytes, metavar="GB", help="memory to make do with (three quarters of all)")
    add(
        "--batch_size",
        type=values.count,
        metavar="N",
        help="images to make at once, of several prompts too (as many as memory allows, up to 8)",
    )
    add("--decoding_batch_size", type=values.count, default=1, metavar="N", help="images to decode at once (1)")
    add("--no_float16", dest="float16", action="store_false", help="compute in float32")
    add("--preload_models", action="store_true", help="read all weights before the first step")


def add_output(parser: argparse.ArgumentParser) -> None:
    """The options of the files that are written, and of what is said."""
    add = parser.add_argument_group("output", "Where the images go, and what is said of them.").add_argument
    add(
        "--output",
        default="out.png",
        metavar="PATH",
        help="a file: several images are numbered, this is their grid; a folder; or a pattern of {i} {seed} {prompt} "
        "{steps} {cfg} {sampler} {width} {height} {model} {date} {time}, such as cats/{seed}_{prompt}.png; a number "
        "follows where the name is taken (out.png)",
    )
    add("--overwrite", action="store_true", help="replace files that have the name")
    add("--no_grid", action="store_true", help="write no grid of several images")
    add("--n_rows", type=values.count, default=1, metavar="N", help="rows of the grid (1)")
    add("--json", action="store_true", help="print an object in JSON for each file, not its path and seed")
    add("--quality", type=values.quality, metavar="N", help="of JPEG and WebP, 1 to 100 (95)")
    add("--no_metadata", action="store_true", help="write nothing into the images of how they were made")
    add("--verbose", "-v", action="store_true", help="say what is chosen, and how much memory was used")


def add_preview(parser: argparse.ArgumentParser) -> None:
    """The options of what is shown while a run goes on."""
    about = "What a run has come to, while it goes on and from step to step."
    add = parser.add_argument_group("preview", about).add_argument
    add("--preview", metavar="PATH", help="a file to rewrite after some steps, or a folder for a file each time")
    add("--preview_every", type=values.count, metavar="N", help="steps between previews (5)")
    add("--preview_vae", metavar="VAE", help="decode previews by this TAESD; they are small and coarse without")
    add("--stepwise", metavar="FILE", help="a .gif or .webp to write, that shows the images after each step")

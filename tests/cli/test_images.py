"""The command lines with masks, borders, depth, ControlNets, second passes, LoRAs, parts and wildcards."""

import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from checkpoints import SCALED, make
from command_line import PROMPT, pixels
from image_prompts import image_encoder, random_adapter, write_adapter
from models.test_controlnet_union import unions
from models.test_upscalers import write as write_upscaler
from oracle import perturb
from stable_diffusion import StableDiffusion
from stable_diffusion.app.engine import open_model
from stable_diffusion.app.metadata import read_record
from stable_diffusion.app.request import Request
from stable_diffusion.cli import main, upscale
from stable_diffusion.cli.flags import FLAGS
from test_parity_images import control_nets

SIZE = (64, 64)


def noise(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def rectangle(box: tuple[int, int, int, int], size: tuple[int, int] = SIZE) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def ramp(dtype: type) -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(0, np.iinfo(dtype).max, 64).astype(dtype), (64, 1)))


@pytest.fixture(scope="module")
def files(tmp_path_factory, sd1_folder, xl_folder) -> Path:
    """A folder with everything that options name: pictures, checkpoints, ControlNets, LoRAs, lists of words."""
    folder = tmp_path_factory.mktemp("files")
    noise().save(folder / "in.png")
    noise(seed=1).save(folder / "hint.png")
    rectangle((32, 0, 64, 32)).save(folder / "mask.png")
    ramp(np.uint8).save(folder / "depth8.png")
    ramp(np.uint16).save(folder / "depth16.png")
    ramp(np.uint8).rotate(90).save(folder / "turned.png")
    (folder / "sd").symlink_to(sd1_folder)
    (folder / "xl").symlink_to(xl_folder)
    euler = diffusers.EulerDiscreteScheduler(**SCALED)
    for family in ("depth", "pix2pix", "inpaint", "refiner"):
        make(folder / family, family, euler)
    shutil.copytree(xl_folder / "vae", folder / "refiner" / "vae", dirs_exist_ok=True)  # as the published ones have it
    _other_parts(folder, sd1_folder, xl_folder)
    for name, net in zip(("net", "net2"), control_nets("sd1", 2)[0], strict=True):
        net.save_pretrained(folder / name)
    unions()[1].save_pretrained(folder / "union")
    for name in ("x4plus.pth", "x2plus.safetensors"):
        write_upscaler(folder, name)
    image_encoder(folder / "image_encoder")
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd1_folder / "unet")
    for kind in ("plain", "plus"):
        write_adapter(folder / f"{kind}.safetensors", random_adapter(unet, kind))
    (folder / "loras").mkdir()
    write_lora(folder / "loras" / "paint.safetensors")
    write_lora(folder / "loras" / "__paint__.safetensors", seed=1)
    write_lora(folder / "more.safetensors", "lora_unet_nowhere_in_this_model")
    save_file({"emb_params": torch.ones((2, 32))}, folder / "word.safetensors")
    (folder / "words").mkdir()
    (folder / "words" / "colour.txt").write_text("red\nblue\n")
    return folder


def _other_parts(folder: Path, sd1_folder: Path, xl_folder: Path) -> None:
    """Parts with other weights, and a tokenizer that splits words otherwise."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    parts = {"vae": diffusers.AutoencoderKL, "unet": diffusers.UNet2DConditionModel}
    parts |= {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for name, cls in parts.items():
        source = (xl_folder if name == "text_encoder_2" else sd1_folder) / name
        perturb(cls.from_pretrained(source), seed=9).save_pretrained(folder / "other" / name)
    shutil.copytree(sd1_folder / "tokenizer", folder / "spelling")
    merges = folder / "spelling" / "merges.txt"
    merges.write_text(merges.read_text().replace("re d</w>\n", ""))


def write_lora(path: Path, *more: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    attention = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn"
    layers = {f"{attention}1_to_q": (64, 64), f"{attention}2_to_k": (64, 32)}
    layers |= {"lora_unet_time_embedding_linear_2": (128, 128)}  # which changes much
    layers |= {"lora_te_text_model_encoder_layers_1_mlp_fc1": (64, 32)} | dict.fromkeys(more, (64, 64))
    tensors = {}
    for layer, (out, into) in layers.items():
        tensors[f"{layer}.lora_down.weight"] = torch.randn((4, into), generator=generator)
        tensors[f"{layer}.lora_up.weight"] = torch.randn((out, 4), generator=generator)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def models() -> dict[tuple, StableDiffusion]:
    """Models that are open, by what decides their networks: several runs may have one, as in a server."""
    return {}


@pytest.fixture
def draw_all(run, files, tmp_path, models, monkeypatch) -> Callable[..., list[np.ndarray]]:
    """Run a script in two steps without guidance, or as the options say; {} is ``files``. Returns its images."""
    names = [usage.split()[0][2:] for usage in FLAGS["model"]]

    def opened(request: Request, *settings: bool) -> StableDiffusion:
        key = (*settings, *map(request.value, names))
        models[key] = models.get(key) or open_model(request, *settings)
        return models[key]

    monkeypatch.setattr(main, "open_model", opened)

    def call(script: str, words: list, *options, model: str = "sd") -> list[np.ndarray]:
        size = ["--strength", 0.5] if script == "image2image" else ["--width", 64, "--height", 64]
        usual = ["--model", files / model, "--steps", 2, "--n_images", 1, "--seed", 3, "--cfg", 1, *size]
        usual += ["--output", tmp_path / "made.png", "--overwrite"]
        given = (str(word).replace("{}", str(files)) for word in [*words, *usual, *options])
        told = [line.partition(" seed ") for line in run(script, *given).succeeded().out]
        return [pixels(Path(path)) for path, _, seed in told if seed]

    return call


@pytest.fixture
def draw(draw_all) -> Callable[..., np.ndarray]:
    """Make one image."""

    def call(script: str, *options, model: str = "sd", prompt: str = PROMPT, image: str = "in.png") -> np.ndarray:
        words = [f"{{}}/{image}", prompt] if script == "image2image" else [prompt]
        (made,) = draw_all(script, words, *options, model=model)
        return made

    return call


# --- every flag changes the picture ----------------------------------------------------------------------------------

MASK = "--mask {}/mask.png"
NET = "--controlnet {}/net --control_image {}/hint.png"
UNION = "--controlnet {}/union --controlnet {}/union:2 --control_image {}/hint.png"
IP = "--ip_adapter {}/plus.safetensors --ip_image {}/hint.png"
REFINER = ["--steps", 5, "--refiner", "{}/refiner"]
ODD_PROMPT = "the (red:1.5) cat:2" + " on the blue" * 40
# The script, the checkpoint and the options beside; the flags, each of which changes that picture.
CHANGES = {
    ("txt2image", "sd", ""): "--width 72; --height 72; --seed 4; --steps 3; --cfg 4; --token_merging 0.75; --eta 1; "
    "--upscale {}/x4plus.pth; --seamless xy; --seamless x; "
    "--sampler euler_a; --clip_skip 1; --emphasis none; --weight_blocks; --truncate; --hires 1.5; --quantize; "
    "--unet_bits 4; --text_bits 4; --embedding {}/word.safetensors=red; --lora {}/loras/paint.safetensors; "
    "--noise_source torch; --vae {}/other; --unet {}/other/unet; --text_encoder {}/other; --tokenizer {}/spelling; "
    f"--prediction v_prediction; {NET}; {IP}",
    ("txt2image", "sd", "--cfg 4"): "--negative_prompt blue; --guidance_interval 0.5,1; --guidance_rescale 1",
    ("txt2image", "sd", "--sampler euler_a"): "--eta_noise_seed_delta 1; --noise_source cuda",
    ("txt2image", "sd", "--variation_seed 5 --variation_strength 0.5"): "--variation_seed 4; --variation_strength 0.8",
    ("txt2image", "sd", "--steps 4"): "--pag_scale 99; --freeu 1.5,1.6,0.9,0.2; --deep_cache 2; --schedule karras",
    ("txt2image", "sd", "--steps 4 --pag_scale 30"): "--pag_layers up",
    ("txt2image", "sd", "--steps 4 --sampler dpmpp_2m"): "--order 1",
    ("txt2image", "sd", "--sampler euler"): "--s_churn 1",
    ("txt2image", "sd", "--sampler euler --s_churn 1"): "--s_tmin 99; --s_tmax 0.1; --s_noise 2",
    ("txt2image", "sd", NET + " --steps 4"): "--canny; --control_start 0.5; --control_end 0.5",
    ("txt2image", "sd", NET + " --cfg 4"): "--guess_mode",
    ("txt2image", "sd", IP + " --steps 4"): "--ip_start 0.5; --ip_end 0.5; --ip_blocks mid=2; --ip_mask {}/mask.png",
    ("txt2image", "sd", "--hires 1.25"): "--hires_strength 1; --hires_steps 4; --hires_upscaler pixels; "
    "--hires_upscaler {}/x4plus.pth",
    ("txt2image", "sd", "--detail 8,8,40,40"): "--detail_prompt blue; --detail_strength 1; --detail_padding 0; "
    "--detail 40,40,20,20",
    ("txt2image", "xl", ""): "--text_encoder_2 {}/other; --prompt_2 blue; --original_size 640x96; --crop 99,0; "
    "--target_size 16x900",
    ("txt2image", "xl", "--cfg 4"): "--negative_prompt_2 blue; --negative_original_size 640x96; --negative_crop 99,0; "
    "--negative_target_size 16x900",
    ("txt2image", "xl", UNION + " --control_type depth"): "--control_type tile",
    ("txt2image", "xl", "--steps 5"): "--refiner {}/refiner",
    ("txt2image", "xl", "--steps 5 --refiner {}/refiner"): "--refiner_start 0.4",
    ("txt2image", "xl", "--steps 5 --cfg 4 --refiner {}/refiner --refiner_start 0.1"): "--aesthetic_score 900; "
    "--negative_aesthetic_score 900",
    ("image2image", "sd", ""): "--strength 1; --mask {}/mask.png; --expand 8,0,16,0",
    ("image2image", "sd", "--width 64 --height 96"): "--resize pad",
    ("image2image", "sd", MASK): "--invert_mask; --mask_blur 3; --mask_padding 4; --no_composite",
    ("image2image", "depth", "--depth {}/turned.png"): "--depth {}/depth8.png",
    ("image2image", "pix2pix", "--cfg 4"): "--image_cfg 3",
}
# Flags that change no picture, or how many there are, or that have tests of their own.
OTHERS = {
    "--prompt",
    "--n_images",
    "--fixed_seed",
    "--alternatives",
    "--prompt_file",
    "--from_image",
    "--without",
    "--trust",
    "--wildcards",
    "--model",
}
OTHERS |= {"--revision", "--lora_partial", "--lora_dir", "--control_image", "--ip_image"}
OTHERS |= {
    usage.split()[0] for group in ("memory and time", "output", "preview", "several Macs") for usage in FLAGS[group]
}


def test_no_flag_is_left_out():
    """A flag that is added must be added to one of the two tables."""
    changes = {flags.split()[0] for row in CHANGES.values() for flags in row.split("; ")}
    assert {usage.split()[0] for group in FLAGS.values() for usage in group} == changes | OTHERS


@pytest.mark.parametrize("beside", CHANGES, ids=" ".join)
def test_every_flag_changes_the_picture(draw, beside):
    script, model, options = beside
    before = draw(script, *options.split(), model=model, prompt=ODD_PROMPT)
    for flags in CHANGES[beside].split("; "):
        made = draw(script, *options.split(), *flags.split(), model=model, prompt=ODD_PROMPT)
        assert before.shape != made.shape or np.abs(before - made).max() > 1, flags


# --- masks -----------------------------------------------------------------------------------------------------------


def test_a_black_mask_returns_the_file_and_says_so(run, files, tmp_path):
    noise((75, 61), seed=4).save(files / "odd.png")
    Image.new("1", (75, 61)).save(tmp_path / "black.png")
    options = ["--model", files / "sd", "--steps", 2, "--n_images", 1, "--output", tmp_path / "out.png"]
    done = run("image2image", files / "odd.png", PROMPT, *options, "--mask", tmp_path / "black.png").succeeded()
    assert np.array_equal(pixels(tmp_path / "out.png"), pixels(files / "odd.png"))
    assert len(done.remarks) == 1 and "black everywhere" in done.remarks[0]


def test_a_model_made_for_masks_keeps_what_is_black(draw, files):
    made, black = draw("image2image", *MASK.split(), model="inpaint"), np.asarray(Image.open(files / "mask.png")) == 0
    same = (made == pixels(files / "in.png")).all(-1)
    assert same[black].all() and same[~black].mean() < 0.1


def test_a_white_mask_is_image_to_image(draw, files):
    Image.new("L", SIZE, 255).save(files / "white.png")
    assert np.array_equal(draw("image2image", "--mask", "{}/white.png"), draw("image2image"))


# --- depth, instructions ---------------------------------------------------------------------------------------------


def test_depth_of_8_and_of_16_bits(draw):
    made = [draw("image2image", "--depth", f"{{}}/depth{bits}.png", model="depth") for bits in (8, 16)]
    assert np.abs(made[0] - made[1]).max() <= 2


@pytest.mark.parametrize(
    "options",
    [
        "--depth {}/small.png --width 64 --height 64",
        "--depth {}/own.png --width 128 --height 128 --resize pad",
        "--depth {}/small.png --mask {}/own_mask.png --mask_padding 8",
    ],
)
def test_the_depth_map_is_cut_as_the_picture_is(draw, files, monkeypatch, options):
    """What the model is told beside each part of the picture is the depth there."""
    seen, generate = [], StableDiffusion.generate_latents_from_image

    def spied(self, image, *args, depth, **kwargs):
        seen.append((np.asarray(image).astype(int)[..., 0], np.asarray(depth).astype(np.float32)))
        return generate(self, image, *args, depth=depth, **kwargs)

    monkeypatch.setattr(StableDiffusion, "generate_latents_from_image", spied)
    x, y = np.meshgrid(np.arange(128), np.arange(64))
    levels = Image.fromarray((x + 2 * y).astype(np.uint8))  # the picture is its own depth map
    levels.save(files / "own.png")
    levels.resize((64, 32), Image.Resampling.BOX).save(files / "small.png")
    rectangle((80, 10, 100, 20), (128, 64)).save(files / "own_mask.png")
    draw("image2image", "--steps", 1, *options.split(), model="depth", image="own.png")
    ((image, depth),) = seen
    depth = np.asarray(Image.fromarray(depth).resize(image.shape[::-1]))
    rows = slice(40, 88) if "pad" in options else slice(4, -4)
    assert np.abs(image - depth)[rows, 4:-4].max() <= 8


def test_estimated_depth(draw, files, monkeypatch):
    """Without a map the estimator is asked about what is worked on, before the first step."""
    asked = []

    def estimate(self, image):
        asked.append(image.size)
        return np.asarray(ramp(np.uint8), dtype=np.float32)

    monkeypatch.setattr(StableDiffusion, "estimate_depth", estimate)
    made = draw("image2image", model="depth")
    assert asked == [SIZE] and np.array_equal(made, draw("image2image", "--depth", "{}/depth8.png", model="depth"))
    assert draw("image2image", "--expand", "0,0,64,0", model="depth").shape == (64, 128, 3) and asked[1:] == [(128, 64)]


# --- ControlNets -----------------------------------------------------------------------------------------------------


def test_controlnets_with_scales(draw):
    plain, image = draw("txt2image"), ["--control_image", "{}/hint.png"]
    assert np.array_equal(draw("txt2image", "--controlnet", "{}/net:0", *image), plain)
    one = draw("txt2image", "--controlnet", "{}/net", *image)
    twice = ["--controlnet", "{}/net:0.5"] * 2
    assert np.abs(draw("txt2image", *twice, *image) - one).max() <= 1
    # each has its own picture, its own beginning and its own end
    two = ["--controlnet", "{}/net", "--controlnet", "{}/net2", *image, "--control_image", "{}/in.png"]
    assert np.abs(draw("txt2image", *two) - one).max() > 1
    assert np.array_equal(draw("txt2image", *two, "--control_end", 1, "--control_end", 0.01), one)
    assert np.array_equal(draw("txt2image", *two, "--control_start", 0, "--control_start", 0.99), one)
    assert np.array_equal(draw("txt2image", *two, "--control_start", 0.99), plain)  # once for all


def test_controlnets_with_masks_and_with_a_second_pass(draw, files):
    net, mask = NET.split(), ["--mask", "{}/mask.png", "--mask_padding", 4]
    for script, options in (("image2image", mask), ("txt2image", ["--hires", 1.5])):
        plain, steered = draw(script, *options), draw(script, *options, *net)
        assert plain.shape == steered.shape and np.abs(plain - steered).max() > 1


# --- image prompts ---------------------------------------------------------------------------------------------------


def test_image_prompts_in_a_script(draw, run, files, tmp_path):
    """Scale 0 is without; each adapter has its pictures; masks and second passes; a record repeats it all."""
    plus, plain = "--ip_adapter {}/plus.safetensors", "--ip_adapter {}/plain.safetensors:0.5"
    image, two = "--ip_image {}/hint.png", "--ip_image {}/hint.png,{}/in.png"
    assert np.array_equal(draw("txt2image", *f"{plus}:0 {image}".split()), draw("txt2image"))
    both = f"{plus} {plain} {two} {image} --ip_mask {{}}/mask.png --ip_end 1 --ip_end 0.5 --cfg 4"
    made = {text: draw("txt2image", *text.split()) for text in (f"{plus} {image}", f"{plus} {two}", both)}
    assert all(np.abs(a - b).max() > 1 for a, b in combinations(made.values(), 2))
    low = draw("txt2image", *both.split(), "--low_memory", "--batch_size", 1)
    assert np.abs(low - made[both]).max() <= 1
    more = ["--hires", 1.25, "--ip_blocks", "up=1,mid=0.5", "--output", files / "first.png"]
    first = draw("txt2image", *both.split(), *more)
    again = run("txt2image", "--from_image", files / "first.png", "--output", tmp_path / "again.png")
    assert np.array_equal(pixels(Path(again.succeeded().out[0].partition(" seed ")[0])), first)
    record = read_record(files / "first.png")
    assert record.arguments["ip_image"] == [["hint.png", "in.png"], ["hint.png"]]
    assert {"plus.safetensors", "plus.safetensors image_encoder/model.safetensors", "in.png", "mask.png"} <= set(
        record.details["files"]
    )


# --- second passes ---------------------------------------------------------------------------------------------------


def test_another_autoencoder_decodes_what_a_refiner_made(draw):
    plain, other = (draw("txt2image", *more, model="xl") for more in (REFINER, [*REFINER, "--vae", "{}/other"]))
    assert np.abs(plain - other).max() > 1


def test_the_same_model_as_refiner_changes_nothing(draw):
    """It reads the prompt again and goes on: the result is that of one run. At the very end it is not asked."""
    given = ["--steps", 4, "--sampler", "euler"]
    plain = draw("txt2image", *given, model="xl")
    refined = draw("txt2image", *given, "--refiner", "{}/xl", "--refiner_start", 0.5, model="xl")
    assert np.abs(refined - plain).max() <= 1
    assert np.array_equal(draw("txt2image", *given, "--refiner", "{}/refiner", "--refiner_start", 1, model="xl"), plain)


# --- LoRAs and parts -------------------------------------------------------------------------------------------------


def test_loras(draw):
    plain, file = draw("txt2image"), "{}/loras/paint.safetensors"
    assert np.array_equal(draw("txt2image", "--lora", f"{file}:0"), plain)
    half, minus = (draw("txt2image", "--lora", f"{file}:{scale}") for scale in ("0.5", "-1"))
    assert np.abs(half - minus).max() > 1
    assert np.abs(draw("txt2image", "--lora", f"{file}:0.25", "--lora", f"{file}:0.25") - half).max() <= 1
    for prompt in (f"({PROMPT}:1.0) <lora:paint:0.5>", "the <lora:paint.safetensors:.5> red cat"):
        assert np.abs(draw("txt2image", "--lora_dir", "{}/loras", prompt=prompt) - half).max() <= 1
    two = draw("txt2image", "--lora", f"{file}:0.5:-1")
    for prompt in (f"{PROMPT} <lora:paint:0.5:-1>", f"{PROMPT} <lyco:PAINT:te=.5:unet=-1>"):
        made = draw("txt2image", "--lora_dir", "{}/loras", "--lora_dir", "{}/loras/..", prompt=prompt)
        assert np.abs(made - two).max() <= 1 < np.abs(two - half).max()
    under = draw("txt2image", "--lora_dir", "{}/loras", prompt=f"{PROMPT} <lora:__paint__>")
    assert np.abs(under - plain).max() > 1 and np.abs(under - half).max() > 1


def test_loras_of_prompts_in_one_file(draw_all, draw, tmp_path):
    """Each prompt has its own, in whatever batches they are made."""
    lines = [PROMPT, f"{PROMPT} <lora:paint:0.5>", f"{PROMPT} <lora:paint>", PROMPT]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    options = ["--prompt_file", tmp_path / "prompts.txt", "--lora_dir", "{}/loras", "--batch_size", 4]
    for i, (line, made) in enumerate(zip(lines, draw_all("txt2image", [], *options), strict=True)):
        single = draw("txt2image", "--lora_dir", "{}/loras", "--seed", 3 + i, prompt=line)
        assert np.abs(made - single).max() <= 1


def test_a_lora_that_fits_in_part(run, draw, files):
    more, whole = files / "more.safetensors", draw("txt2image", "--lora", "{}/loras/paint.safetensors")
    run("txt2image", PROMPT, "--model", files / "sd", "--lora", more).refused("nowhere_in_this_model", "--lora_partial")
    assert np.array_equal(draw("txt2image", "--lora", more, "--lora_partial"), whole)


# --- wildcards and batches -------------------------------------------------------------------------------------------


def test_wildcards_are_the_lines_of_their_files(draw_all, draw):
    made = draw_all("txt2image", ["the __colour__ cat"], "--wildcards", "{}/words")
    for seed, colour, image in zip((3, 4), ("red", "blue"), made, strict=True):
        assert np.abs(image - draw("txt2image", "--seed", seed, prompt=f"the {colour} cat")).max() <= 1


@pytest.mark.parametrize("script", ["txt2image", "image2image"])
def test_results_do_not_depend_on_the_size_of_batches(draw_all, tmp_path, script):
    """Across prompts too, of several lengths, with a change of size between them, or of the negative prompt alone."""
    negatives = [f'blue --negative_prompt "{text}"' for text in ("the cat", "the red")]
    lines = [PROMPT, "the {red|blue} cat", "the cat " * 40, "cat --width 72", *negatives]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    words, more = (["{}/in.png"], [*MASK.split(), "--resize", "stretch"]) if script == "image2image" else ([], [])
    options = [*more, "--prompt_file", tmp_path / "prompts.txt", "--cfg", 3, "--n_images", 2, "--sampler", "euler_a"]
    options += ["--decoding_batch_size", 2, "--batch_size"]
    ones, *others = (draw_all(script, words, *options, size) for size in (1, 3, 20))
    assert len(ones) == 14 and np.abs(ones[0] - ones[1]).max() > 1
    for made in others:
        assert max(int(np.abs(a - b).max()) for a, b in zip(ones, made, strict=True)) <= 1


# --- what is refused -------------------------------------------------------------------------------------------------

TEXT_REFUSED = [
    ("--control_image {}/hint.png", "--control_image needs --controlnet"),
    ("--controlnet {}/net", "--control_image is needed once for each"),
    (
        NET + " --control_end 1 --control_end 1",
        "--control_start, --control_end and --control_type are given once for each",
    ),
    ("--hires 2 --hires_upscaler both", "'both'", "latents", "pixels"),
    ("--hires 2 --refiner {}/refiner", "--hires and --refiner cannot be combined"),
    ("--detail 8,8,40", "--detail must be X,Y,W,H in pixels"),
    ("--detail {}/none.json", "none.json is not X,Y,W,H, the word mask or a readable file"),
    ("--detail mask", "--detail works on the parts of --mask: give --mask too"),
    ("--detail_prompt blue", "--detail_prompt has no effect without --detail"),
    ("--detail 8,8,9,9 --detail_prompt <lora:paint>", "--detail_prompt names a LoRA"),
    ("--detail 8,8,9,9 --refiner {}/refiner", "--detail and --refiner cannot be combined"),
    ("--refiner {}/none", "none", "no such folder"),
    ("--wildcards {}/none", "the folder of wildcards"),
    ("--prediction magic", "'magic'", "v_prediction"),
]
IMAGE_REFUSED = [
    ("--invert_mask", "--invert_mask needs --mask"),
    ("--mask_blur 2", "need --mask or --expand"),
    ("--expand 0,0,0,0", "--expand needs a border of at least 1 pixel"),
    (MASK + " --refiner {}/refiner", "--refiner cannot be combined with --mask or --expand"),
    ("--mask {}/none.png", "no image at", "none.png"),
    ("--mask {}/words/colour.txt", "not an image"),
    ("--mask {}/wide_mask.png", "wide_mask.png of 128x64 does not fit an image of 64x64", "same aspect ratio"),
    ("--detail 0,0,9,9 --width 64", "--width and --height have no effect when only --detail", "give --strength too"),
    ("--mask {}/nothing.png --mask_padding 8", "black everywhere", "omit the padding"),
    ("--depth {}/in.png", "a colour image"),
    ("--depth {}/nothing.png", "everywhere"),
    ("--depth {}/depth8.png --expand 8,8,8,8", "--depth and --expand cannot be combined"),
    ("--hires 2", "--hires"),
]
CASES = [("txt2image", *row) for row in TEXT_REFUSED] + [("image2image", *row) for row in IMAGE_REFUSED]


@pytest.fixture
def refuse(run, files, tmp_path) -> Callable[..., None]:
    """Run a script that refuses its options and says these words."""

    def call(script: str, model: str, options: str, *words: str, prompt: str = PROMPT) -> None:
        image = [files / "in.png"] if script == "image2image" else []
        given = options.replace("{}", str(files)).split()
        done = run(script, *image, prompt, "--model", files / model, "--output", tmp_path / "out.png", *given)
        done.refused(*words)

    return call


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]}")
def test_refused_before_a_model_is_read(refuse, no_model, files, case):
    rectangle((0, 0, 9, 9), (128, 64)).save(files / "wide_mask.png")
    Image.new("L", SIZE).save(files / "nothing.png")
    refuse(case[0], "sd", *case[1:])


MODEL_REFUSED = [
    ("txt2image", "sd", "--controlnet {}/none --control_image {}/in.png", "none"),
    ("txt2image", "sd", "--controlnet {}/sd --control_image {}/in.png", "controlnet"),
    ("txt2image", "xl", NET, "ControlNet"),
    ("txt2image", "sd", "--lora {}/none.safetensors", "none.safetensors"),
    ("txt2image", "xl", "--lora {}/loras/paint.safetensors", "paint.safetensors is a LoRA for"),
    ("txt2image", "sd", "--unet {}/xl", "width 64", "give 32", "one model family"),
    ("image2image", "xl", "--steps 20 --strength 0.1 --refiner {}/refiner", "--strength 0.1", "--refiner_start 0.8"),
    ("image2image", "sd", "--detail 60,8,9,9", "--detail 60,8,9,9 is outside the image of 64x64"),
    ("image2image", "sd", "--detail mask --mask {}/nothing.png", "--detail has 0 places"),
    ("txt2image", "sd", "--tokenizer {}/words", "vocab.json"),
    ("txt2image", "pix2pix", "", "image"),
    ("image2image", "sd", "--depth {}/depth8.png", "--depth has no effect"),
    ("image2image", "sd", "--image_cfg 2", "--image_cfg has no effect"),
    ("image2image", "depth", "", "no depth_estimator", "--depth FILE"),
]


@pytest.mark.parametrize("case", MODEL_REFUSED, ids=lambda case: " ".join(case[:3]))
def test_refused_before_a_step_is_done(refuse, files, case):
    Image.new("L", SIZE).save(files / "nothing.png")
    refuse(*case)


@pytest.mark.parametrize(
    "prompt, options, words",
    [
        ("a <lora:paint:1>", "", ["paint", "--lora_dir DIR"]),
        ("a <lora:pain:1>", "--lora_dir {}/loras", ["no LoRA pain", "write the name of a file"]),
        ("a __color__", "--wildcards {}/words", ["__color__"]),
    ],
)
def test_loras_and_wildcards_that_are_not_there(refuse, prompt, options, words):
    refuse("txt2image", "sd", options, *words, prompt=prompt)


# --- by pixels, with the model that comes with the package -----------------------------------------------------------


def test_a_star_is_painted_into_a_corner(run, tmp_path):
    """What is not masked stays white, and in the mask it is green on white."""
    Image.new("RGB", SIZE, "white").save(tmp_path / "in.png")
    rectangle((40, 0, 64, 24)).save(tmp_path / "corner.png")
    options = ["--model", "tiny", "--n_images", 1, "--seed", 5, "--output", tmp_path / "star.png"]
    options += ["--mask", tmp_path / "corner.png", "--mask_padding", 4]
    run("image2image", tmp_path / "in.png", "a green star on a white background", *options).succeeded()
    image = pixels(tmp_path / "star.png")
    corner = image[:24, 40:].copy()
    red, green, blue = np.moveaxis(corner, -1, 0)
    image[:24, 40:] = 255
    assert (image == 255).all()
    assert 0.1 < (green > np.maximum(red, blue) + 60).mean() < 0.6
    assert (corner.min(-1) > 200).mean() > 0.25  # around it, white


# --- upscalers -------------------------------------------------------------------------------------------------------


def test_upscaling_is_recorded_and_repeated(run, files, tmp_path):
    options = ["--model", files / "sd", "--steps", 2, "--n_images", 1, "--width", 64, "--height", 72, "--seed", 3]
    ways = ["--upscale", files / "x2plus.safetensors", "--hires", 1.25, "--hires_upscaler", files / "x4plus.pth"]
    run("txt2image", PROMPT, *options, *ways, "--output", tmp_path / "a.png").succeeded()
    made = pixels(tmp_path / "a.png")
    assert made.shape == (176, 160, 3)
    for name in ("x4plus.pth", "x2plus.safetensors"):
        shutil.copy(files / name, tmp_path)
    again = ["--from_image", tmp_path / "a.png", "--model", files / "sd", "--output", tmp_path / "b.png"]
    assert run("txt2image", *again).succeeded().remarks == []
    assert np.array_equal(pixels(tmp_path / "b.png"), made)
    write_upscaler(tmp_path, "x4plus.pth")
    (tmp_path / "x2plus.safetensors").write_bytes((files / "word.safetensors").read_bytes())
    run("txt2image", *again).refused("--upscale x2plus.safetensors (another hash)")


def test_the_command_enlarges_files(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clear = noise((20, 12))
    clear.putalpha(rectangle((0, 0, 10, 12), (20, 12)))
    text = PngInfo()
    text.add_text("parameters", "a cat")
    clear.save("clear.png", pnginfo=text)
    noise((10, 10)).save("photo.jpg")
    net = ["--upscaler", str(files / "x2plus.safetensors")]
    assert upscale.main(["clear.png", "photo.jpg", *net]) == 0
    assert capsys.readouterr().out.split() == ["clear_x2.png", "photo_x2.png"]
    with Image.open("clear_x2.png") as made:
        assert (made.size, made.mode, made.text["parameters"]) == ((40, 24), "RGBA", "a cat")
    assert upscale.main(["clear.png", *net, "--output", "big.webp"]) == upscale.main(["photo.jpg", *net]) == 0
    assert capsys.readouterr().out.split() == ["big.webp", "photo_x2-2.png"]
    for words, message in (
        (["clear.png", "photo.jpg", *net, "--output", "big.png"], "one file for 2 images"),
        (["nowhere.png", *net], "no image at nowhere.png"),
        (["clear.png", "--upscaler", "photo.jpg"], "photo.jpg is a JPEG image"),
    ):
        with pytest.raises(SystemExit, match="2"):
            upscale.main(words)
        assert message in capsys.readouterr().err

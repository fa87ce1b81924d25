"""Previews of a run while it goes on, and the animation of its steps."""

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from command_line import PROMPT, names, pixels
from models.test_taesd import PUBLISHED, SMALL
from oracle import nchw, nhwc, normal, perturb, relative_error
from stable_diffusion import SAMPLERS, StableDiffusion, to_images
from stable_diffusion.app import preview
from stable_diffusion.app.engine import Step
from stable_diffusion.app.preview import PreviewSettings, PreviewWriter, preview_decoder
from stable_diffusion.diffusion.denoiser import Denoiser
from stable_diffusion.files.whole import UNFINISHED
from tools.tiny import data


@pytest.fixture(scope="module")
def taesd(tmp_path_factory) -> Path:
    """A random TAESD that decodes 4 channels to 8 pixels, much smaller than the published one."""
    torch.manual_seed(0)
    widths = {f"{side}_block_out_channels": [8] * 4 for side in ("encoder", "decoder")}
    folder = tmp_path_factory.mktemp("taesd")
    perturb(diffusers.AutoencoderTiny.from_config(PUBLISHED | widths)).save_pretrained(folder)
    return folder


BATCH = SimpleNamespace(index="", seeds=(1,))


def see(writer: PreviewWriter, steps: int, latents, is_retry: bool = False) -> None:
    """Show the steps of a pass; ``latents`` gives the estimate of each."""
    writer(Step(BATCH, 0, steps, 0, is_retry=is_retry))
    for number in range(1, steps + 1):
        writer(Step(BATCH, number, steps, 0, latents(number)))


# --- the estimate of the image ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_predicted_is_the_last_estimate_of_the_step(sd, sampler, monkeypatch):
    estimates, call = [], Denoiser.__call__
    monkeypatch.setattr(Denoiser, "__call__", lambda *args: estimates.append(call(*args)) or estimates[-1])
    run = sd.generate_latents(PROMPT, num_steps=3, latent_size=(4, 6), seed=1, cfg_weight=3.0, sampler=sampler)
    assert run.predicted is None
    for x_t in run:
        mx.eval(x_t)
        changed = sampler in ("lcm", "tcd") or SAMPLERS[sampler].cfg_pp  # which make something of it
        assert run.predicted is estimates[-1] or changed
    beside = sampler in ("pndm", "lms", "ddim", "deis", "tcd", "sa_solver")  # these end above no noise, or extrapolate
    assert relative_error(run.predicted, np.array(x_t)) <= (2.0 if beside else 1e-6)


def test_predicted_keeps_what_a_mask_keeps(sd):
    image = mx.clip(mx.array(normal(32, 48, 3, scale=0.3)), -1, 1)
    mask = mx.zeros((32, 48))
    mask[:, 24:] = 1
    run = sd.generate_latents_from_image(image, PROMPT, mask=mask, num_steps=3, strength=1, seed=1, cfg_weight=3.0)
    next(run)
    kept = np.array(sd.encode(image[None]))
    assert np.allclose(run.predicted[:, :, :3], kept[:, :, :3], atol=1e-5)
    assert not np.allclose(run.predicted[:, :, 3:], kept[:, :, 3:], atol=1e-1)
    run = sd.generate_latents_from_image(image, PROMPT, strength=0)
    assert np.array_equal(next(run), run.predicted)  # the image itself


# --- from latents to colours -----------------------------------------------------------------------------------------


def test_latents_become_the_colours_of_their_family(sd, xl_folder):
    latents = mx.array([[[[0.0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0.5, -1, 2, 0], [-9, 0, 0, 0], [9, 0, 0, 0]]]])
    want = [[0.5, 0.5, 0.5], [0.6756, 0.61485, 0.66135], [0.394, 0.3692, 0.14115], [0.1424, 0.484925, 0.735275]]
    shown = preview_decoder(sd)(latents)
    assert shown.shape == (1, 1, 6, 3) and np.allclose(shown[0, 0], [*want, [0] * 3, [1] * 3], atol=1e-6)
    xl = preview_decoder(StableDiffusion(xl_folder))(latents)
    assert np.allclose(xl[0, 0, :2], [[0.5542, 0.49125, 0.49945], [0.73675, 0.70285, 0.7165]], atol=1e-6)


def test_colours_of_the_bundled_model():
    """What `tools/tiny/fit_preview.py` has fitted shows held-out pictures in their colours."""
    tiny = StableDiffusion("tiny")
    pictures = np.stack([picture for _, picture, _ in data.held_out_examples(12)]) / np.float32(255)
    small = pictures.reshape(12, 16, 4, 16, 4, 3).mean(axis=(2, 4))
    shown = np.array(preview_decoder(tiny)(tiny.encode(mx.array(pictures) * 2 - 1)))
    assert shown.shape == small.shape and np.abs(shown - small).mean() <= 0.08
    assert all(np.corrcoef(shown[..., i].ravel(), small[..., i].ravel())[0, 1] >= 0.94 for i in range(3))


@pytest.mark.parametrize("known", [{}, {(8, 0.18215): [[1, 0, 0, 0]] * 3}], ids=["family", "channels"])
def test_unknown_latents_are_grey(sd, monkeypatch, caplog, known):
    monkeypatch.setattr(preview, "FACTORS", known)
    shown = np.array(preview_decoder(sd)(mx.array(normal(1, 3, 5, 4))))
    assert (shown == shown[..., :1]).all() and np.ptp(shown) > 0.2
    assert len(caplog.messages) == 1 and "previews show one channel in grey" in caplog.messages[0]


def test_taesd_decodes_to_pixels(sd, sd1_folder, taesd):
    latents = normal(2, 3, 5, 4)
    oracle = diffusers.AutoencoderTiny.from_pretrained(taesd)
    want = (nhwc(oracle.decode(nchw(latents)).sample) / 2 + 0.5).clip(0, 1)
    shown = preview_decoder(sd, taesd)(mx.array(latents))
    assert shown.shape == (2, 24, 40, 3) and np.abs(np.array(shown) - want).max() <= 1e-4
    model = StableDiffusion(sd1_folder, parts={"vae": taesd})
    assert np.array_equal(preview_decoder(model)(mx.array(latents)), shown)


# --- previews --------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(run, sd1_folder, tmp_path):
    """Run txt2image for two images of 64x72 pixels in three steps; returns what was said."""

    def call(*options):
        small = ["--width", 64, "--height", 72, "--steps", 3, "--n_images", 2, "--seed", 1, "--cfg", 3]
        return run("txt2image", PROMPT, "--model", sd1_folder, "--output", tmp_path / "out.png", *small, *options)

    return call


def test_a_folder_gets_a_file_each_time_and_programs_are_told(made, tmp_path):
    folder = tmp_path / "deep" / "previews"
    done = made("--preview", folder, "--preview_every", 2, "--batch_size", 1, "--json").succeeded()
    assert names(folder) == ["01_002.jpg", "01_003.jpg", "02_002.jpg", "02_003.jpg"]
    assert {pixels(path).shape for path in folder.iterdir()} == {(36, 32, 3)}  # a latent is 4 pixels
    records = [json.loads(line) for line in done.out]
    assert [record["kind"] for record in records] == ["preview", "preview", "image"] * 2 + ["grid"]
    told = [record for record in records if record["kind"] == "preview"]
    assert [Path(record["path"]).name for record in told] == names(folder)
    assert [(record["step"], record["steps"]) for record in told] == [(2, 3), (3, 3)] * 2


def test_a_preview_is_a_grid_of_the_batch(made, tmp_path, sd):
    made("--preview", tmp_path / "preview.png").succeeded()
    run = sd.generate_latents(PROMPT, 2, 3, 3.0, latent_size=(9, 8), seed=1)
    *_, x = run
    assert not np.array_equal(x, run.predicted)  # this model's DDIM ends a little above no noise
    shown = pixels(tmp_path / "preview.png")
    assert shown.shape == (36, 2 * 32 + 8, 3)
    for image, want in zip((shown[:, :32], shown[:, 40:]), to_images(preview_decoder(sd)(run.predicted)), strict=True):
        assert np.abs(image - np.asarray(want.resize((32, 36), Image.Resampling.LANCZOS)).astype(int)).max() <= 1


def test_every_five_steps_where_nothing_else_is_said(tmp_path):
    writer = PreviewWriter(PreviewSettings(preview=str(tmp_path / "previews")))
    writer._decoder = lambda latents: mx.zeros((1, 2, 2, 3))
    see(writer, 12, lambda number: mx.zeros((1, 2, 2, 4)))
    assert names(tmp_path / "previews") == ["01_005.jpg", "01_010.jpg", "01_012.jpg"]


def test_previews_by_taesd_in_low_memory_too(made, taesd, tmp_path):
    for name, more in (("plain", []), ("low", ["--low_memory"])):
        made("--preview", tmp_path / f"{name}.webp", "--preview_vae", taesd, "--n_images", 1, *more).succeeded()
    plain, low = pixels(tmp_path / "plain.webp"), pixels(tmp_path / "low.webp")
    assert plain.shape == (72, 64, 3) and np.abs(plain - low).max() <= 1


def full(*args):
    raise OSError("the disk is full")


def test_a_run_goes_on_where_previews_cannot_be_written(made, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "save", full)
    done = made("--preview", tmp_path / "preview.png", "--preview_every", 1).succeeded()
    assert len(done.remarks) == 1 and "the disk is full; no more previews are written" in done.remarks[0]
    assert len(done.out) == 3


# --- animations ------------------------------------------------------------------------------------------------------


def frames(path: Path) -> tuple[list[np.ndarray], list[int]]:
    """Pixels and milliseconds of the frames of an animation that is played for ever."""
    with Image.open(path) as film:
        assert film.info["loop"] == 0
        found = [(np.asarray(f.convert("RGB")).astype(int), f.info["duration"]) for f in ImageSequence.Iterator(film)]
    return [frame for frame, _ in found], [duration for _, duration in found]


@pytest.fixture
def pictures(monkeypatch) -> list[np.ndarray]:
    """The frames of animations, as they were before they were written."""
    found = []
    monkeypatch.setattr(preview, "write_animation", lambda frames, path: found.extend(map(np.asarray, frames)))
    return found


def test_frames_show_what_was_predicted_and_at_last_the_picture(made, pictures, tmp_path, sd):
    """Also of samplers that end beside what they took for the image."""
    made("--stepwise", tmp_path / "film.gif", "--sampler", "pndm", "--n_images", 1).succeeded()
    run = sd.generate_latents(PROMPT, 1, 3, 3.0, latent_size=(9, 8), seed=1, sampler="pndm")
    want = [np.asarray(to_images(sd.decode(run.predicted))[0]) for _ in run]
    want[-1] = pixels(tmp_path / "out.png")
    assert all(np.array_equal(a, b) for a, b in zip(pictures, want, strict=True))
    assert all(np.abs(a.astype(int) - b).mean() > 1 for a, b in pairwise(pictures))


def test_steps_of_all_passes_are_in_one_animation(made, pictures, tmp_path):
    made("--stepwise", tmp_path / "film.webp", "--hires", 1.5, "--hires_steps", 4).succeeded()
    assert [frame.shape for frame in pictures] == [(112, 2 * 96 + 8, 3)] * (3 + 2)
    assert all((frame[:, 96:104] == 255).all() for frame in pictures)  # the space between two images stays what it is


def test_an_animation_of_each_batch(made, tmp_path):
    film, second, third = (tmp_path / f"film{n}.gif" for n in ("", "-2", "-3"))
    film.write_bytes(b"mine")
    done = made("--stepwise", film, "--batch_size", 1, "--json").succeeded()
    written = [record["path"] for record in map(json.loads, done.out) if record["kind"] == "animation"]
    assert written == [str(second), str(third)] and film.read_bytes() == b"mine"
    shown, durations = frames(second)
    assert {frame.shape for frame in shown} == {(72, 64, 3)} and durations == [500, 500, 2000]
    done = made("--stepwise", film, "--batch_size", 1, "--overwrite").succeeded()
    assert str(film) in done.out and str(second) in done.out
    assert len(frames(film)[0]) == 3 and not np.array_equal(frames(film)[0][-1], frames(second)[0][-1])


def test_taesd_decodes_an_animation(made, taesd, tmp_path, monkeypatch):
    decoded, decode = [], StableDiffusion.decode
    monkeypatch.setattr(StableDiffusion, "decode", lambda sd, x: decoded.append(len(x)) or decode(sd, x))
    made("--stepwise", tmp_path / "film.gif", "--preview_vae", taesd).succeeded()
    assert len(frames(tmp_path / "film.gif")[0]) == 3 and decoded == [1, 1]  # the images themselves
    made("--stepwise", tmp_path / "film.gif", "--preview", tmp_path / "preview.png", "--overwrite").succeeded()
    assert decoded == [1] * (2 + 8)  # and with previews that are coarse, the frames


def animated(path: Path, model=None, shape=(1, 2, 2, 4)) -> Path | None:
    """The animation of a pass of two steps, which is begun again, and of a second one of two."""
    writer = PreviewWriter(PreviewSettings(stepwise=str(path)))
    for first, is_retry in ((1, False), (1, True), (3, False)):
        see(writer, 2, lambda number, first=first: mx.array(normal(*shape, seed=first + number)), is_retry)
    result = SimpleNamespace(batch=BATCH, model=model, latents=mx.array(normal(*shape)))
    written = writer.finish(result)
    assert writer.finish(result) is None  # its frames are dropped
    return written


def test_a_pass_that_is_begun_again_shows_its_steps_once(sd, tmp_path):
    """As where half precision overflows, and it begins again in float32."""
    path = tmp_path / "film.gif"
    assert animated(path, sd) == path and len(frames(path)[0]) == 4


def test_large_frames_are_made_smaller(tmp_path):
    white = SimpleNamespace(pixels_per_latent=8, decode=lambda x: mx.ones((1, 8 * 130, 8 * 260, 3)))
    with Image.open(animated(tmp_path / "film.webp", white, (1, 130, 260, 4))) as found:
        assert found.size == (1024, 512)


def test_frames_that_are_not_finite_are_an_error_of_the_animation(tmp_path):
    broken = SimpleNamespace(pixels_per_latent=8, decode=lambda x: mx.full((1, 16, 16, 3), math.nan))
    with pytest.raises(OSError, match=r"film.gif cannot be written \(768 of 768 values .* not finite"):
        animated(tmp_path / "film.gif", broken)


@pytest.mark.parametrize("suffix, count, each", [("webp", 2, [500]), ("gif", 100, [60] * 99)])
def test_times_of_frames(tmp_path, suffix, count, each):
    film = tmp_path / f"film.{suffix}"
    preview.write_animation([Image.effect_noise((30, 20), 200).convert("RGB") for _ in range(count)], film)
    assert frames(film)[1] == [*each, 2000]


def test_an_animation_of_one_frame(tmp_path):
    preview.write_animation([Image.new("RGB", (30, 20))], tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert (film.size, film.n_frames) == ((30, 20), 1)


def test_an_animation_that_cannot_be_written_leaves_nothing(sd, tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match=r"the animation .*film.gif cannot be written \(the disk is full\)"):
        animated(tmp_path / "film.gif", sd)
    assert names(tmp_path) == [] and not UNFINISHED


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preview_every", 3], ["--preview_every has no effect without --preview"]),
        (["--preview_vae", "taesd"], ["--preview_vae has no effect without --preview or --stepwise"]),
        (["--preview", "p.bmp"], [".bmp", ".png"]),
        (["--preview", "file/previews"], ["file/previews", "cannot be created"]),
        (["--preview", "./out.png"], ["--preview and --output both name ./out.png"]),
        (["--stepwise", "film.mp4"], ["'film.mp4'", ".gif or .webp"]),
        (["--stepwise", "nowhere/film.gif"], ["nowhere", "does not exist"]),
        (["--stepwise", "film.gif"], ["film.gif is a folder"]),
    ],
)
def test_what_is_refused_before_a_model_is_opened(run, no_model, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("film.gif").mkdir()
    Path("file").touch()
    run("txt2image", PROMPT, "--output", "out.png", *flags).refused(*words)


def test_what_is_refused_before_the_first_step(made, tmp_path):
    diffusers.AutoencoderTiny.from_config(SMALL).save_pretrained(tmp_path / "vae")
    words = ["5 channels, 4 pixels", "reads other latents", "than this model's (4 channels, 8 pixels"]
    made("--preview", tmp_path / "p.png", "--preview_vae", tmp_path / "vae").refused(*words)
    made("--stepwise", tmp_path / "f.gif", "--preview_vae", tmp_path / "none").refused("none")

"""Training on the command line: its flags and config, bad input, the files of a run, interruption and resumption."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from checkpoints import SCALED, make
from command_line import Finished, names
from stable_diffusion.app import train as app
from stable_diffusion.cli.foreign_flags import TRAINING_COUNTERPARTS
from stable_diffusion.cli.train import FLAGS, main, make_parser, read_config
from stable_diffusion.files import whole
from stable_diffusion.images.files import read_text
from stable_diffusion.training.trainer import LoRATrainer

SHORT = ["--steps", "2", "--measure_every", "0", "--rank", "2"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64 + 16 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def train(photos, tmp_path, capsys, monkeypatch) -> Callable[..., Finished]:
    """Train for the bundled model, with the folder of pictures and the output unless others are given."""
    monkeypatch.setattr(app.LossTable, "can_draw", staticmethod(lambda: False))
    monkeypatch.setattr(app, "_PREVIEWS", 2)
    generate = app.StableDiffusion.generate
    quick = lambda self, *args, **keywords: generate(self, *args, num_steps=2, **keywords)  # noqa: E731
    monkeypatch.setattr(app.StableDiffusion, "generate", quick)
    (tmp_path / "out").mkdir()

    def call(*words, pictures: object = photos, output: object = tmp_path / "out" / "me.safetensors") -> Finished:
        given = [*([pictures] if pictures else []), *words, *(["--output", output] if output else [])]
        if "--config" not in words:
            given += ["--model", "tiny", "--trigger", "ohwx"]
        try:
            code = main([*map(str, given)], prog="train")
        except SystemExit as leaving:
            code = leaving.code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "for a curve too" not in line]
        return Finished(code, out.splitlines(), "".join(f"{line}\n" for line in lines))

    return call


def out(tmp_path: Path) -> list[str]:
    return names(tmp_path / "out")


# --- flags and config ------------------------------------------------------------------------------------------------


def test_every_flag_is_a_key_and_flags_win(tmp_path):
    parser, config = make_parser(), tmp_path / "run.toml"
    config.write_text('pictures = "p"\nsteps = 7\nlearning-rate = 2e-5\nflip = true\ndora = false\nprior = 5\n')
    read = read_config(parser, str(config))
    assert read == {"pictures": "p", "steps": 7, "learning_rate": 2e-5, "flip": True, "prior": "5"}
    actions = {action.dest for action in parser._actions} - {"help", "help_all", "version", "pictures"}
    assert actions == {usage.split()[0][2:] for flags in FLAGS.values() for usage in flags}


def test_a_run_repeats_from_its_settings_to_the_byte(train, tmp_path):
    first = train(*SHORT, "--accumulate", 2, "--flip", "--caption_dropout", 0.5).succeeded()
    assert first.out == [str(tmp_path / "out" / "me.safetensors")]
    assert out(tmp_path) == ["me-000002.state.safetensors", "me.csv", "me.safetensors", "me.toml"]
    (tmp_path / "again").mkdir()
    again = tmp_path / "again" / "me.safetensors"
    train("--config", tmp_path / "out" / "me.toml", pictures=None, output=again).succeeded()
    written = [(folder / "me.safetensors").read_bytes() for folder in (tmp_path / "out", tmp_path / "again")]
    assert written[0] == written[1]
    factors = mx.load(str(again))
    assert any(factor.abs().max() > 0 for name, factor in factors.items() if "lora_up" in name)
    train(
        "--config", tmp_path / "out" / "me.toml", "--steps", 1, "--overwrite", pictures=None, output=again
    ).succeeded()
    assert again.read_bytes() != written[0]


@pytest.mark.parametrize(
    "text, said",
    [
        ("stepps = 3", "unknown key stepps; did you mean steps?"),
        ("config = 'a.toml'", "unknown key config"),
        ("steps = '3'", 'steps is "3", which is not a number'),
        ("steps = true", "steps is true, which is not a number"),
        ("steps = 0", "'0' is not a whole number of at least 1"),
        ("flip = 1", "flip is 1, which is not true or false"),
        ("trigger = 3", "trigger is 3, which is not a text"),
        ("loss = 'l1'", "'l1' is unknown; choose one of mse, huber"),
        ("[training]\nsteps = 3", "training"),
        ("steps = [3]", "steps is [3], which is not a number"),
        ("steps = 2026-01-01", "steps is "),
        ("steps =", "cannot be read as TOML"),
        (b"\xff", "cannot be read as TOML"),
        (None, "No such file"),
    ],
)
def test_a_config_that_cannot_be_followed_is_one_line(train, tmp_path, text, said):
    config = tmp_path / "run.toml"
    if text is not None:
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
    train("--config", config).refused("run.toml", said)
    assert out(tmp_path) == []


def test_flags_of_other_programs_are_answered_with_ours(train):
    train("--network_dim", 8).refused("--network_dim is --rank here")
    train("--max-train-steps", 8, "--output_dir", "x").refused("is --steps here; --output_dir is --output NAME.safe")
    train("--train_data_dir=x").refused("give the folder of pictures as the first word")
    known = {action.dest for action in make_parser()._actions}
    named = {flag for text in TRAINING_COUNTERPARTS.values() for flag in re.findall(r"--(\w+)", text)}
    assert named <= known and not TRAINING_COUNTERPARTS.keys() & known


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        (["--rank", 0], "'0' is not a whole number of at least 1"),
        (["--rank", 5000], "rank 5000 is above the width"),
        (["--targets", "("], "is not a regular expression"),
        (["--targets", "nothing"], "targets 'nothing'"),
        (["--prior", 2], "--prior needs --prior_prompt"),
        (["--prior", 0, "--prior_prompt", "a"], "'0' is not a whole number from 1"),
        (["--prior", "nowhere", "--prior_prompt", "a"], "nowhere"),
        (["--prior_prompt", "a"], "--prior_prompt has no effect without --prior"),
        (["--preview_every", 2], "--preview_every has no effect without --preview"),
        (["--resume", "latest"], "omit --resume"),
        (["--resume", "nowhere"], "the checkpoint nowhere does not exist"),
        (["--learning_rate", "nan"], "'nan' is not a number above 0"),
        (["--device", "tpu"], "'tpu' is unknown"),
        (["--width", 64], "--width is a flag of image2image, txt2image and unconditional"),
        (["--cache", __file__], "is a file; give a folder"),
    ],
)
def test_bad_flags_are_one_line_before_anything_is_computed(train, tmp_path, no_steps, words, said):
    train(*words).refused(said)
    assert out(tmp_path) == []


@pytest.fixture
def no_steps(monkeypatch):
    monkeypatch.setattr(LoRATrainer, "__next__", lambda self: pytest.fail("a step was computed"))


@pytest.mark.parametrize(
    "name, said",
    [
        ("a.png", "has the wrong suffix"),
        ("no/a.safetensors", "does not exist; create it first"),
        (".", "is a folder; give the path of a file in it"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line(train, tmp_path, no_steps, name, said):
    train(output=tmp_path / name).refused(said)


def test_a_folder_that_is_not_writable(train, tmp_path, no_steps, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    train().refused("is not writable")


def test_no_pictures(train, tmp_path, no_steps):
    train(pictures=None).refused("give a folder of pictures")
    train(pictures=tmp_path / "nowhere").refused("nowhere")
    train(pictures=tmp_path / "out").refused("no picture in")
    (tmp_path / "out" / "a.png").write_bytes(b"no picture")
    train(pictures=tmp_path / "out").refused("a.png")


@pytest.mark.parametrize("family", ["inpaint", "lcm", "refiner", "edm"])
def test_models_that_are_trained_in_another_way(train, tmp_path, no_steps, capsys, family):
    scheduler = diffusers.EDMEulerScheduler() if family == "edm" else diffusers.DDIMScheduler(**SCALED)
    make(tmp_path / "model", "xl" if family == "edm" else family, scheduler)
    capsys.readouterr()
    train("--model", tmp_path / "model", "--config", write_config(tmp_path)).refused("cannot be trained")
    assert out(tmp_path) == []


def write_config(folder: Path) -> Path:
    """A config, with which the tests do not give the bundled model."""
    (folder / "run.toml").write_text("trigger = 'ohwx'\n")
    return folder / "run.toml"


def test_no_space(train, tmp_path, no_steps, monkeypatch):
    usage = type("Usage", (), {"free": 10**5})
    monkeypatch.setattr(whole.shutil, "disk_usage", lambda path: usage)
    train(*SHORT).refused("free disk space, or choose another place")
    assert out(tmp_path) == []


@pytest.mark.parametrize("name", ["me.safetensors", "me.toml", "me.csv", "me.png", "me-000250.state.safetensors"])
def test_no_file_of_another_run_is_lost(train, tmp_path, no_steps, name):
    path = tmp_path / "out" / name
    path.write_text("mine")
    train("--preview", "a").refused(f"{path} exists; choose another --output")
    assert path.read_text() == "mine"


def test_the_config_of_a_run_is_not_replaced_by_its_settings(train, photos, tmp_path):
    config = tmp_path / "out" / "me.toml"
    config.write_text(f"# by hand\npictures = {json.dumps(str(photos))}\nmodel = 'tiny'\ntrigger = 'ohwx'\n")
    (tmp_path / "out" / "me.png").write_text("no preview")
    train("--config", config, *SHORT, pictures=None).succeeded()
    assert config.read_text().startswith("# by hand") and (tmp_path / "out" / "me.png").read_text() == "no preview"


# --- the files of a run ----------------------------------------------------------------------------------------------


def test_overwrite_begins_anew_and_other_outputs_stay(train, tmp_path):
    others = ["me-2-000900.state.safetensors", "you-000900.state.safetensors"]
    for name in [*others, "me-000900.state.safetensors"]:
        (tmp_path / "out" / name).write_text("mine")
    train(*SHORT, "--save_every", 1, "--keep", 1, "--overwrite").succeeded()
    states = [name for name in out(tmp_path) if name.endswith(".state.safetensors")]
    assert states == sorted(["me-000002.state.safetensors", *others])


def test_json_lines_table_and_previews(train, tmp_path):
    previews = ["--preview", "ohwx", "--preview_every", 2]
    done = train("--steps", 3, *previews, "--measure_every", 2, "--save_every", 2, "--json").succeeded()
    events = [json.loads(line) for line in done.out]
    kinds = [(event["kind"], event["step"]) for event in events]
    before = [("preview", 0), ("step", 1), ("step", 2), ("checkpoint", 2), ("preview", 2), ("step", 3)]
    assert kinds == [*before, ("checkpoint", 3), ("preview", 3), ("lora", 3)]
    rows = [line.split(",") for line in (tmp_path / "out" / "me.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["step", "0", "1", "2", "3"]
    assert [bool(row[4]) for row in rows[1:]] == [True, False, True, True]
    measured = [event["measured"] for event in events if event["kind"] == "step"]
    assert measured[0] is None and measured[1] == pytest.approx(float(rows[3][4]), rel=1e-5)
    sheet = tmp_path / "out" / "me.png"
    assert read_text(sheet)["steps"] == "0 2 3"
    with Image.open(sheet) as image:
        rows = np.split(np.asarray(image).astype(int), 3)
    assert np.abs(rows[0][-64:] - rows[2][-64:]).max() > 0  # what was trained is drawn


def test_a_dry_run_writes_nothing_and_leaves_the_factors(train, tmp_path, monkeypatch):
    runs = []
    time_steps = app.TrainingRun.time_steps

    def watched(run: app.TrainingRun) -> dict:
        before = run.trainer.state()
        result = time_steps(run)
        runs.append((before, run.trainer.state(), run.trainer.step))
        return result

    monkeypatch.setattr(app.TrainingRun, "time_steps", watched)
    words = ["--dry_run", "--prior", 2, "--prior_prompt", "a", "--cache", tmp_path / "cache", "--steps", 500]
    done = train(*words).succeeded()
    assert names(tmp_path) == ["out"] and out(tmp_path) == [] and done.err == ""
    assert "3 pictures (" in done.out[0] and "2 prior pictures, 500 steps" in done.out[0]
    assert re.fullmatch(r"\d+\.\d\d s/step, [\d:]+ in all, \d+\.\d\d GB", done.out[-1])
    ((before, after, step),) = runs
    assert step == 0 and before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    (line,) = train(*words, "--json").succeeded().out
    plan = json.loads(line)
    assert plan["kind"] == "plan" and plan["pictures"] == 3 and plan["seconds"] > 0 and plan["steps"] == 500


def test_prior_pictures_are_drawn_by_the_base_model_and_used_again(train, tmp_path, monkeypatch):
    scales, generate = [], app.StableDiffusion.generate

    def watched(self, *args, **keywords):
        scales.append({d.lora.scale for m in self.unet.modules() for d in getattr(m, "loras", ())})
        return generate(self, *args, **keywords)

    monkeypatch.setattr(app.StableDiffusion, "generate", watched)
    prior = ["--prior", 2, "--prior_prompt", "a red circle"]
    train(*SHORT, *prior).succeeded()
    assert scales == [{0.0}] * 2 and names(tmp_path / "out" / "me-prior") == ["0000.png", "0001.png"]
    train(*SHORT, *prior, "--overwrite").succeeded()
    assert len(scales) == 2
    train(*SHORT, *prior[:3], "a star", "--overwrite").succeeded()
    assert len(scales) == 4  # of another prompt they are others
    again = ["--steps", 3, "--measure_every", 0, "--rank", 2, "--resume", "latest"]
    train(*again, *prior[:3], "a star").succeeded()
    train(*again, "--prior", 1, "--prior_prompt", "a star").refused("other pictures, captions, prior pictures")
    (tmp_path / "out" / "me-prior" / "0001.png").unlink()
    train(*again, *prior[:3], "a star").refused("0001.png, a prior picture of the run to resume, is missing")
    assert len(scales) == 4


# --- interruption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bytes(train, tmp_path, monkeypatch, number, code):
    preview = ["--preview", "ohwx", "--preview_every", 2]
    train(*SHORT, *preview).succeeded()
    whole, sheet = (tmp_path / "out" / "me.safetensors").read_bytes(), (tmp_path / "out" / "me.png").read_bytes()
    step = LoRATrainer.__next__

    def interrupted(self):
        os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(LoRATrainer, "__next__", interrupted)
    done = train(*SHORT, *preview, "--overwrite")
    assert done.code == code and done.out == [str(tmp_path / "out" / "me.safetensors")]
    assert "Ctrl-C again quits now" in done.err and "after step 1 of 2" in done.remarks[-1]
    assert "continue with the same command and --resume latest" in done.remarks[-1]
    assert "me-000001.state.safetensors" in out(tmp_path)
    monkeypatch.setattr(LoRATrainer, "__next__", step)
    train(*SHORT, *preview, "--resume", "latest").succeeded()
    assert (tmp_path / "out" / "me.safetensors").read_bytes() == whole
    assert (tmp_path / "out" / "me.png").read_bytes() == sheet
    lines = (tmp_path / "out" / "me.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2"]


def test_a_signal_before_the_first_step_leaves_nothing(train, tmp_path, no_steps, monkeypatch):
    monkeypatch.setattr(app.Dataset, "prepare", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    done = train(*SHORT)
    assert done.code == 130 and done.out == [] and "nothing was trained" in done.remarks[-1]
    assert out(tmp_path) == ["me.toml"]


def test_networks_in_training_are_neither_freed_nor_read_again(train, tmp_path, monkeypatch):
    runs, init = [], app.TrainingRun.__init__
    monkeypatch.setattr(app.TrainingRun, "__init__", lambda self, *a: init(self, *a) or runs.append(self))
    preview = ["--preview", "ohwx", "--preview_every", 1, "--steps", 1, "--measure_every", 0]
    for words in (["--low_memory"], ["--text_encoder_rank", 2, "--overwrite"]):
        done = train(*preview, *words).succeeded()
        assert "by hand" not in done.err
        sd, trainer = runs[-1].sd, runs[-1].trainer
        kept = {name for name in sd.sources if name in vars(sd)}
        assert kept == ({"unet"} if "--low_memory" in words else {"unet", "text_encoder"})
        assert all(getattr(sd, name) in trainer.networks().values() for name in kept)
        assert sd.unet is trainer.model["unet"]


def test_previews_and_measurements_are_of_what_is_saved(train, tmp_path, monkeypatch):
    """With a moving average that is its factors."""
    seen, generate, loss = [], app.StableDiffusion.generate, LoRATrainer.loss
    runs, init = [], app.TrainingRun.__init__
    monkeypatch.setattr(app.TrainingRun, "__init__", lambda self, *a: init(self, *a) or runs.append(self))

    def watch(kind: str) -> None:
        trainer = runs[-1].trainer
        factors = trainer.factors()
        same = all(mx.array_equal(factors[name], value).item() for name, value in tree_flatten(trainer.average))
        seen.append((kind, trainer.step, same))

    monkeypatch.setattr(app.StableDiffusion, "generate", lambda *a, **k: watch("preview") or generate(*a, **k))
    monkeypatch.setattr(LoRATrainer, "loss", lambda *a, **k: watch("loss") or loss(*a, **k))
    train("--steps", 2, "--ema", 0.9, "--preview", "a", "--preview_every", 2, "--measure_every", 2).succeeded()
    assert {same for kind, step, same in seen if step == 2} == {True}
    assert {kind for kind, step, _ in seen if step == 2} == {"loss", "preview"}


def test_five_skipped_steps_end_the_run_with_what_there_is(train, tmp_path, monkeypatch):
    gradients = LoRATrainer._gradients

    def diverging(self):
        loss, *rest = gradients(self)
        return (float("nan") if self.step >= 1 else loss), *rest

    monkeypatch.setattr(LoRATrainer, "_gradients", diverging)
    done = train("--steps", 20, "--measure_every", 0, "--rank", 2)
    assert done.code == 1 and done.out == [str(tmp_path / "out" / "me.safetensors")]
    assert sum("is skipped" in line for line in done.remarks) == 4
    assert "learning_rate" in done.remarks[-1] and "the steps before it are saved in" in done.remarks[-1]
    assert {"me.safetensors", "me-000006.state.safetensors"} <= set(out(tmp_path))


def test_without_a_reader_of_stdout_all_is_written(train, tmp_path, monkeypatch):
    def closed(text: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("stable_diffusion.cli.streams.say", closed)
    done = train(*SHORT, "--json").succeeded()
    assert "stdout cannot be written to" in done.err and "me.safetensors" in out(tmp_path)

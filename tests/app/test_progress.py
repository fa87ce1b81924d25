"""The bar around a run: what it says, and that it says nothing where nobody looks."""

import io
import logging
from contextlib import redirect_stderr
from types import SimpleNamespace

import mlx.core as mx
import pytest
from tqdm import tqdm

from stable_diffusion.app import progress
from stable_diffusion.app.engine import Step


class Eager(tqdm):
    """A bar that is drawn after every step, however short it was."""

    def __init__(self, **options):
        super().__init__(mininterval=0, **options)


@pytest.fixture
def watched(monkeypatch):
    """Show a run whose steps take so many seconds; returns what is written, on a machine with 5.25 GB in use."""
    monkeypatch.setattr(progress, "tqdm", Eager)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 5.25e9)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 6.5e9)

    def call(seconds, later=0, index="", is_terminal=True, on_begin=lambda: None):
        clock, batch, stream = [100.0], SimpleNamespace(index=index), io.StringIO()
        stream.isatty = lambda: is_terminal
        monkeypatch.setattr(progress, "perf_counter", lambda: clock[0])
        with redirect_stderr(stream):
            bar = progress.ProgressBar()
            for number, length in enumerate([0, *seconds]):
                clock[0] += length
                bar(Step(batch, number, len(seconds), later))
                if number == 0:
                    on_begin()
            bar.close()
        return stream.getvalue()

    return call


def lines(shown: str) -> list[str]:
    return [line.strip() for line in shown.split("\r") if line.strip()]


def test_what_a_line_says(watched):
    shown = watched([2.0, 2.5, 1.5])
    first, *others = lines(shown)
    assert first.startswith("0%|") and first.endswith("| 0/3") and shown.endswith("\n")
    said = ["1/3, 2.00 s/step, 00:04 left", "2/3, 2.25 s/step, 00:02 left", "3/3, 2.00 s/step, 00:00 left"]
    assert [line.rpartition("| ")[2] for line in others[:3]] == [f"{line}, 5.25 GB (peak 6.50)" for line in said]


def test_a_step_lasts_as_long_as_the_last_five(watched):
    """The first step reads weights: it is forgotten."""
    shown = lines(watched([600.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0]))
    assert "600.00 s/step, 1:00:00 left" in shown[1] and "300.50 s/step" in shown[2]
    assert "| 6/7, 1.00 s/step, 00:01 left" in shown[6] and "1.40 s/step" in shown[7]


def test_time_that_is_left_counts_the_runs_to_come(watched):
    shown = lines(watched([2.0, 2.0], later=30, index="2/3"))
    assert all(line.startswith("batch 2/3 ") for line in shown)
    assert "01:02 left" in shown[1] and "01:00 left" in shown[2]


def test_reading_a_network_has_a_bar_that_goes_again(monkeypatch):
    monkeypatch.setattr(progress, "tqdm", Eager)
    for delay, is_shown in ((0, True), (60, False)):
        monkeypatch.setattr(progress, "_DELAY", delay)
        stream = io.StringIO()
        stream.isatty = lambda: True
        with redirect_stderr(stream):
            bar = progress.ProgressBar()
            for number in (1, 2):
                bar.load("unet", number, 2)
        shown = stream.getvalue()
        assert ("loading unet  50%|" in shown) == is_shown and shown.rpartition("\r")[2] == ""


def test_nothing_is_written_where_there_is_no_terminal(watched):
    assert watched([1.0, 1.0], is_terminal=False) == ""


def test_remarks_stand_on_lines_of_their_own_and_are_said_once(watched):
    def remark() -> None:
        log = logging.Logger("remarks")
        log.addHandler(progress.TqdmHandler())
        for _ in range(2):
            log.warning("something to know")

    before, _, after = watched([1.0], on_begin=remark).partition("something to know\n")
    assert before.endswith(" \r") and after.startswith("\r") and "something" not in after

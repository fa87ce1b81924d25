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


class Terminal(io.StringIO):
    """A stderr that somebody looks at."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """What was shown, one after the other."""
        return [line.strip() for line in self.getvalue().split("\r") if line.strip()]


class Eager(tqdm):
    """A bar that is drawn after every step, however short it was."""

    def __init__(self, *args, **options):
        super().__init__(*args, mininterval=0, **options)


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    """A terminal, on a machine with 5.25 GB in use."""
    monkeypatch.setattr(progress, "tqdm", Eager)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 5.25e9)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 6.5e9)
    return Terminal()


def watched(terminal: Terminal, monkeypatch, seconds: list[float], later: int = 0, index: str = "") -> list[str]:
    """The lines of a run whose steps take so many seconds by the clock."""
    clock, batch = [100.0], SimpleNamespace(index=index)
    monkeypatch.setattr(progress, "perf_counter", lambda: clock[0])
    with redirect_stderr(terminal):
        bar = progress.ProgressBar()
        bar(Step(batch, 0, len(seconds), later))
        for number, length in enumerate(seconds, start=1):
            clock[0] += length
            bar(Step(batch, number, len(seconds), later))
        bar.close()
    return terminal.lines


def test_what_a_line_says(terminal, monkeypatch):
    lines = watched(terminal, monkeypatch, [2.0, 2.5, 1.5])
    assert lines[0].startswith("0%|") and lines[0].endswith("| 0/3")
    assert lines[1].endswith("| 1/3, 2.00 s/step, 00:04 left, 5.25 GB (peak 6.50)")
    assert lines[2].endswith("| 2/3, 2.25 s/step, 00:02 left, 5.25 GB (peak 6.50)")
    assert lines[3].endswith("| 3/3, 2.00 s/step, 00:00 left, 5.25 GB (peak 6.50)")
    assert lines[2].startswith("67%|") and terminal.getvalue().endswith("\n")


def test_a_step_lasts_as_long_as_the_last_five(terminal, monkeypatch):
    """The first step reads weights: it is forgotten."""
    lines = watched(terminal, monkeypatch, [600.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0])
    assert "600.00 s/step, 1:00:00 left" in lines[1] and "300.50 s/step" in lines[2]
    assert "| 6/7, 1.00 s/step, 00:01 left" in lines[6] and "1.40 s/step" in lines[7]


def test_time_that_is_left_counts_the_runs_to_come(terminal, monkeypatch):
    lines = watched(terminal, monkeypatch, [2.0, 2.0], later=30, index="2/3")
    assert all(line.startswith("2/3 ") for line in lines)
    assert "01:02 left" in lines[1] and "01:00 left" in lines[2]


def test_nothing_is_written_where_there_is_no_terminal():
    log = io.StringIO()
    with redirect_stderr(log):
        bar = progress.ProgressBar()
        for number in range(3):
            bar(Step(SimpleNamespace(index=""), number, 2, 0))
        bar.close()
    assert log.getvalue() == ""


def test_remarks_stand_on_lines_of_their_own_and_are_said_once(terminal):
    log = logging.Logger("remarks")
    with redirect_stderr(terminal):
        log.addHandler(progress.TqdmHandler())
        bar = progress.ProgressBar()
        bar(Step(SimpleNamespace(index=""), 0, 1, 0))
        for _ in range(2):
            log.warning("something to know")
        bar.close()
    before, _, after = terminal.getvalue().partition("something to know\n")
    assert before.endswith(" \r") and after.startswith("\r") and "something" not in after

"""Show a run in a terminal: a bar with time and memory, and remarks on separate lines."""

import logging
from collections import deque
from contextlib import suppress
from time import perf_counter

import mlx.core as mx
from tqdm import tqdm

from .engine import Step

_RECENT = 5  # steps in the mean that is shown; the first step also reads weights
_DELAY = 0.5  # seconds; shorter loading shows no bar
_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


class ProgressBar:
    """Show a bar on stderr for each pass of a batch, where stderr is a terminal; for ``Engine.run(on_step=...)``.

    ``steps`` and ``seconds`` are those of all passes.
    """

    _bar: tqdm | None = None
    _loading: tqdm | None = None
    steps, seconds = 0, 0.0

    def __call__(self, step: Step) -> None:
        """Begin a bar at step 0, else advance it."""
        if step.number == 0:
            self.close()
            name = f"batch {step.batch.index} " if step.batch.index else ""
            self._bar = tqdm(total=step.total, desc=name, bar_format=_FORMAT, disable=None, dynamic_ncols=True)
            self._times = deque([perf_counter()], maxlen=_RECENT + 1)
            return
        self._times.append(perf_counter())
        self.steps, self.seconds = self.steps + 1, self.seconds + self._times[-1] - self._times[-2]
        seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        left = tqdm.format_interval(seconds * (step.total - step.number + step.later))
        active, peak = mx.get_active_memory() / 1e9, mx.get_peak_memory() / 1e9
        figures = f"{seconds:.2f} s/step, {left} left, {active:.2f} GB (peak {peak:.2f})"
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update()

    def load(self, name: str, number: int, total: int) -> None:
        """Show how many layers of a network are read and quantized, if it takes a while."""
        if number == 1:
            options = {"delay": _DELAY, "leave": False, "disable": None, "dynamic_ncols": True}
            self._loading = tqdm(total=total, desc=f"loading {name} ", bar_format=_FORMAT, **options)
        self._loading.update()
        if number == total:
            self._loading.close()

    def close(self) -> None:
        """End the bar that is shown."""
        if self._bar is not None:
            self._bar.close()


class TqdmHandler(logging.StreamHandler):
    """Write log records on lines of their own while a bar is shown; the same line only once."""

    def emit(self, record: logging.LogRecord) -> None:
        line, lines = self.format(record), vars(self).setdefault("lines", set())
        if line not in lines:
            lines.add(line)
            with suppress(OSError):  # an unreadable stderr ends no run
                tqdm.write(line, file=self.stream)

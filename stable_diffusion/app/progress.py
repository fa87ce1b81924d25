"""What a terminal shows of a run while it goes on: how far it is, how long it will take, how much memory it uses."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from statistics import fmean
from time import perf_counter

import mlx.core as mx
from tqdm import tqdm

_RECENT = 5  # steps whose mean is what a step takes: the first one also reads weights
_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


def steps(latents: Iterable[mx.array], total: int, *, name: str = "", later: int = 0) -> Iterator[mx.array]:
    """The same latents, with a bar on stderr while they are computed; nothing where stderr is no terminal.

    A step lasts from one latent being asked for to the next, so it counts what the caller does with it: computing it.
    Nothing is computed here.

    Args:
        total: how many latents there will be.
        name: what stands before the bar.
        later: steps that come after this run, for the time that is left.
    """
    taken: deque[float] = deque(maxlen=_RECENT)
    with tqdm(total=total, desc=name and f"{name} ", bar_format=_FORMAT, disable=None, dynamic_ncols=True) as bar:
        start = perf_counter()
        for done, x_t in enumerate(latents, start=1):
            yield x_t
            start, before = perf_counter(), start
            taken.append(start - before)
            bar.set_postfix_str(_figures(fmean(taken), total - done + later), refresh=False)
            bar.update()


def _figures(step: float, left: int) -> str:
    """Seconds of a step, the time that so many steps will take, and the memory in use and at most."""
    active, peak = mx.get_active_memory() / 1e9, mx.get_peak_memory() / 1e9
    return f"{step:.2f} s/step, {tqdm.format_interval(step * left)} left, {active:.2f} GB (peak {peak:.2f})"


class Remarks(logging.StreamHandler):
    """Writes a log on lines of its own, also while a bar is shown; what holds for many batches is said once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if line not in self._said:
            self._said.add(line)
            with suppress(OSError):  # nothing is given up because nobody reads it any more
                tqdm.write(line, file=self.stream)

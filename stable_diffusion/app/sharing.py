"""Share one job among several processes, which MLX's launcher starts: each makes some of the images.

A process is called a rank, as in MPI. Each works as if it were alone, and a thread beside it exchanges a few numbers
with all others, some twenty times a second: whoever is done can take more work, and all notice at once that one of
them is lost. Nothing is exchanged, and no thread begun, in a process that runs alone.

    mlx.launch -n 2 -- python txt2image.py "a lighthouse" --seed 1-8
"""

import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import astuple, dataclass, replace
from datetime import datetime, timedelta
from io import StringIO
from queue import Empty, SimpleQueue
from random import Random, SystemRandom
from time import monotonic, sleep
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..models import cpu
from .request import Request

T = TypeVar("T")

SHARES = ("even", "steal", "guidance", "off")
_PERIOD = 0.05  # seconds between two exchanges
_PATIENCE = 40  # seconds after which a silent rank is lost
_NOTICE = 3  # seconds that the launcher is ahead, at most, of what MLX says of a lost connection
_EPOCH = datetime(1970, 1, 1)
_NOBODY = 2**31 - 1


@dataclass(frozen=True)
class SharingSettings:
    """Hold how ranks share the images of a run, and whether rank 0 gathers them.

    "even": rank r makes the images r, r + size, ...; "steal": a rank that is done takes the next batch; "guidance":
    each computes a part of the rows of the UNet's batch, for one image after the other; "off": each makes them all.
    """

    share: str = "even"
    gather: bool = False


def share(items: Sequence[T], group: mx.distributed.Group | None = None) -> Sequence[T]:
    """Return the items of this rank: the one with its number, and each ``size``-th after it. Alone, it has all."""
    group = group or mx.distributed.init()
    return items[group.rank() :: group.size()]


def lost(missing: Sequence[Request]) -> str:
    """Describe images that a lost rank leaves undone, and the flags that make them."""
    seeds: dict[str, list[str]] = {}
    for request in missing:
        values = {name: request.value(name) for name in request.variant.swept if name != "seed"}
        flags = "".join(f" --{name} {value}" for name, value in values.items())
        seeds.setdefault(f'"{request.prompt}"{flags}', []).append(str(request.seed))
    ways = [f"{prompt} --seed {','.join(numbers)}" for prompt, numbers in seeds.items()]
    rest = f" and {len(ways) - 3} more" if len(ways) > 3 else ""
    return f"another Mac is lost, and {len(missing)} images may be missing; make them with {'; '.join(ways[:3])}{rest}"


@dataclass(frozen=True)
class _Row:
    """Hold the numbers that a rank sends in each exchange.

    ``calls`` counts the calls of ``agree``, ``value`` is that of the last; ``takes`` counts the batches asked for,
    ``finished`` the images; ``leaves`` is 1 at the end.
    """

    calls: int = 0
    value: int = 0
    takes: int = 0
    finished: int = 0
    leaves: int = 0


class Ranks:
    """Hold the number of this process and of all, and what is known of the others.

    Args:
        group: from :func:`stable_diffusion.app.processes.join`; None is a process that runs alone.
    """

    def __init__(self, group: mx.distributed.Group | None = None):
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        self.is_lost = False  # whether another rank is
        self._row, self._rows = _Row(), [_Row()] * self.size  # of this rank, and of all in the last exchange
        self._action: Callable[[], Any] | None = None
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._batches: Sequence[Sequence[int]] = ()  # to take, each with its images
        self._taken = 0
        self._images: list[list[int]] = [[] for _ in range(self.size)]  # of each rank, in their order
        self._heard, self._quits = monotonic(), False
        self._posted = threading.Event()
        self._thread = threading.Thread(target=self._exchange, daemon=True)
        if group is not None:
            self._thread.start()
        # For seeds that are drawn and for names with the time: the same on all ranks.
        self.random = SystemRandom() if group is None else Random(self.agree(secrets.randbits(32))[0])
        self.began = _EPOCH + timedelta(seconds=self.agree(int((datetime.now() - _EPOCH).total_seconds()))[0])

    # --- before the work ---------------------------------------------------------------------------------------------

    def once(self, prepare: Callable[[], T]) -> T:
        """Return the result of ``prepare``, or raise its exception, of all ranks only in the first that has one.

        The others exit with the same code, and without a word: what ranks above 0 print in ``prepare`` is dropped.
        """
        if self.size == 1:
            return prepare()
        printed, failure, result = StringIO(), None, None
        try:
            if self.rank == 0:
                result = prepare()
            else:
                with redirect_stdout(printed), redirect_stderr(printed):
                    result = prepare()
        except (Exception, SystemExit) as error:
            failure = error
        code = failure.code or 0 if isinstance(failure, SystemExit) else 2
        codes = self.agree(_NOBODY if failure is None else code)
        first = next((rank for rank, code in enumerate(codes) if code != _NOBODY), None)
        if first is None:
            return result
        if failure is not None and (first == self.rank or self.is_lost):
            print(printed.getvalue(), end="", file=sys.stderr)
            raise failure
        self.close()
        raise SystemExit(codes[first])

    def agree(self, value: int = 0, action: Callable[[], Any] | None = None) -> Any:
        """Return the values of all ranks, in their order, or with ``action`` its result: a collective operation.

        All ranks call it in the same order. Where one is lost the list has this rank's value alone, and the result of
        an action is None.
        """
        alone = None if action is not None else [value]
        if self.size == 1 or self.is_lost:
            return alone
        self._action = action
        self._post(calls=self._row.calls + 1, value=value)
        answer = self._answer()
        return alone if answer is None else answer

    def highest(self, values: list[int]) -> list[int]:
        """Return the highest of each of the values on all ranks."""
        result = self.agree(action=lambda: mx.distributed.all_max(mx.array(values), group=self.group).tolist())
        return values if result is None else result

    # --- the work ----------------------------------------------------------------------------------------------------

    def share(self, count: int) -> Sequence[int]:
        """Return the numbers of this rank's images, of ``count``."""
        self._images = [list(range(rank, count, self.size)) for rank in range(self.size)]
        return self._images[self.rank]

    def take(self, batches: Sequence[Sequence[int]]) -> Iterator[int]:
        """Yield the number of a batch that no other rank has taken, as long as there is one.

        ``batches`` are the images of each, the same on all ranks. Where one is lost, those that are left are shared
        evenly.
        """
        self._batches = batches
        self.agree(len(batches))
        while not self.is_lost:
            self._post(takes=self._row.takes + 1)
            number = self._answer()
            if number == _NOBODY:
                return
            if number is not None:
                yield number
        for number in range(self._taken, len(batches))[self.rank :: self.size]:
            self._images[self.rank] += batches[number]
            yield number

    def finish(self, count: int = 1) -> None:
        """Count images of this rank that are finished."""
        self._post(finished=self._row.finished + count)

    def missing(self, count: int) -> list[int]:
        """Return the images that are not known to be finished, of ``count``."""
        finished = [row.finished for row in self._rows]
        finished[self.rank] = self._row.finished
        known = {i for images, done in zip(self._images, finished, strict=True) for i in images[:done]}
        return [i for i in range(count) if i not in known]

    def leave(self) -> None:
        """Wait until all ranks have come here, or one is lost."""
        if self.size > 1 and not (self.is_lost or self._row.leaves):
            self._post(leaves=1)
            self._answer()

    def gather(self, data: bytes | None) -> bytes:
        """Return what one of the ranks has, on all of them; empty where one is lost, or none has it."""
        lengths = self.agree(len(data or b""))
        if sum(lengths) == 0 or self.is_lost:
            return b""
        own = np.frombuffer(data, np.uint8) if data else np.zeros(sum(lengths), np.uint8)
        total = self.agree(action=lambda: np.array(mx.distributed.all_sum(mx.array(own), group=self.group)))
        return b"" if total is None else total.tobytes()

    def notices_loss(self) -> bool:
        """Return whether a rank is lost, when a signal has come: MLX's launcher ends all others, and is quick."""
        end = monotonic() + (_NOTICE if self.size > 1 else 0)
        while not self.is_lost and monotonic() < end:
            sleep(_PERIOD)
        return self.is_lost

    def close(self) -> None:
        """End the exchange, whatever the others do."""
        self._quits = True
        if self._thread.is_alive():
            self._thread.join(timeout=2 * _PERIOD + 1)

    # --- the exchange ------------------------------------------------------------------------------------------------

    def _post(self, **numbers: int) -> None:
        self._row = replace(self._row, **numbers)
        self._posted.set()

    def _answer(self) -> Any:
        """Wait for what the exchange finds out; None where a rank is lost. Signals are handled meanwhile."""
        while True:
            try:
                return self._answers.get(timeout=0.5)
            except Empty:
                if monotonic() - self._heard > _PATIENCE:
                    self.is_lost = True
                    return None

    def _exchange(self) -> None:
        """Send this rank's numbers to all and read theirs, until all leave. In a thread of its own."""
        cpu.clear_streams_at_thread_end()
        answered, granted = 0, [0] * self.size
        with mx.stream(mx.new_stream(mx.cpu)):
            while not self._quits:
                try:
                    numbers = mx.array([astuple(self._row)], dtype=mx.int64)
                    table = mx.distributed.all_gather(numbers, group=self.group).tolist()
                    self._rows, self._heard = [_Row(*row) for row in table], monotonic()
                    self._hand_out(granted)
                    if all(row.calls > answered for row in self._rows):
                        answered += 1
                        values = [row.value for row in self._rows]
                        self._answers.put(values if self._action is None else self._action())
                        continue
                except RuntimeError:  # the connection to a rank is lost
                    self.is_lost = True
                if self.is_lost or all(row.leaves for row in self._rows):
                    self._answers.put(None)
                    return
                self._posted.wait(_PERIOD)
                self._posted.clear()

    def _hand_out(self, granted: list[int]) -> None:
        """Give each rank the batches that it asks for. All ranks do so from the same numbers, with the same result."""
        for rank, row in enumerate(self._rows):
            for _ in range(row.takes - granted[rank]):
                number, granted[rank] = self._taken, granted[rank] + 1
                if number < len(self._batches):
                    self._images[rank] += self._batches[number]
                    self._taken += 1
                if rank == self.rank:
                    self._answers.put(number if number < len(self._batches) else _NOBODY)

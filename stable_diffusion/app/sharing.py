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
from contextlib import redirect_stderr, redirect_stdout, suppress
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
from .processes import disconnect

T = TypeVar("T")

SHARES = ("even", "steal", "guidance", "off")
_PERIOD = 0.05  # seconds between two exchanges
_PATIENCE, _IMPATIENCE = 40, 5  # seconds after which a silent rank is lost, the second after a signal
_NOTICE = 3  # seconds that the launcher is ahead, at most, of what MLX says of a lost connection
_ENDING = 30  # seconds in which the launcher ends the other ranks, by ssh
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
    """Hold what is known of the other ranks. It has the methods of an ``mx.distributed.Group``, except ``split``.

    Args:
        group: from :func:`stable_diffusion.app.processes.join`; None is a process that runs alone.
    """

    def __init__(self, group: mx.distributed.Group | None = None):
        self._group = group
        self._rank, self._size = (0, 1) if group is None else (group.rank(), group.size())
        self.is_interrupted: Callable[[], bool] = lambda: False  # by a signal
        self._lost_at: float | None = None
        self._row, self._rows = _Row(), [_Row()] * self._size  # of this rank, and of all in the last exchange
        self._operation: Callable[[], mx.array] | None = None
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._batches: Sequence[Sequence[int]] = ()  # to take, each with its images
        self._taken = 0
        self._images: list[list[int]] = [[] for _ in range(self._size)]  # of each rank, in their order
        self._heard, self._notice_until, self._quits = monotonic(), 0.0, False
        self._posted = threading.Event()
        self._thread = threading.Thread(target=self._exchange, daemon=True)
        if group is not None:
            self._thread.start()
            threading.Thread(target=self._end_silence, daemon=True).start()
        # For seeds that are drawn and for names with the time: the same on all ranks.
        self.random = SystemRandom() if group is None else Random(self.agree(secrets.randbits(32))[0])
        self.began = _EPOCH + timedelta(seconds=self.agree(int((datetime.now() - _EPOCH).total_seconds()))[0])

    def rank(self) -> int:
        """Return the number of this process, from 0."""
        return self._rank

    def size(self) -> int:
        """Return the number of all processes."""
        return self._size

    @property
    def is_lost(self) -> bool:
        """Return whether another rank is lost, or has been silent for too long."""
        return self._lost_at is not None

    # --- before the work ---------------------------------------------------------------------------------------------

    def once(self, prepare: Callable[[], T]) -> T:
        """Return the result of ``prepare``, or raise its exception, of all ranks only in the first that has one.

        The others exit with the same code, and without a word: what ranks above 0 print in ``prepare`` is dropped.
        """
        if self._size == 1:
            return prepare()
        printed, failure, result = StringIO(), None, None
        try:
            if self._rank == 0:
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
        if failure is not None and (first == self._rank or self.is_lost):
            print(printed.getvalue(), end="", file=sys.stderr)
            raise failure
        self.close()
        raise SystemExit(codes[first])

    def agree(self, value: int = 0) -> list[int]:
        """Return the values of all ranks, in their order; this one's alone where one is lost.

        All ranks make the same calls, in the same order.
        """
        return self._call(value, None) or [value]

    def highest(self, values: list[int]) -> list[int]:
        """Return the highest of each of the values on all ranks."""
        result = self._call(0, lambda: mx.distributed.all_max(mx.array(values), group=self._group))
        return values if result is None else result.tolist()

    # --- the work ----------------------------------------------------------------------------------------------------

    def share(self, count: int, share: str) -> Sequence[int]:
        """Return the numbers of the images, of ``count``, that this rank may make; ``share`` is one of ``SHARES``."""
        if share == "even":
            self._images = [list(range(rank, count, self._size)) for rank in range(self._size)]
            return self._images[self._rank]
        if share == "guidance":  # the first rank writes them
            self._images[0] = list(range(count))
        return range(count)

    def take(self, batches: Sequence[Sequence[int]]) -> Iterator[int]:
        """Yield the number of a batch that no other rank has taken, as long as there is one.

        ``batches`` are the images of each, the same on all ranks. Where one is lost, those that are left are shared
        evenly; the last rank takes them all.
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
        for number in range(self._taken, len(batches)):
            if self._size == 2 or number % self._size == self._rank:
                self._images[self._rank] += batches[number]
                yield number

    def finish(self, count: int = 1) -> None:
        """Count images of this rank that are finished, in their order."""
        self._post(finished=self._row.finished + count)

    def missing(self, count: int) -> list[int]:
        """Return the images that are not known to be finished, of ``count``."""
        finished = [row.finished for row in self._rows]
        finished[self._rank] = self._row.finished
        known = {i for images, done in zip(self._images, finished, strict=True) for i in images[:done]}
        return [i for i in range(count) if i not in known]

    def leave(self) -> None:
        """Wait until all ranks have come here, or one is lost."""
        if self._size > 1 and not (self.is_lost or self._row.leaves):
            self._post(leaves=1)
            self._answer()

    def gather(self, data: bytes | None) -> bytes:
        """Return what one of the ranks has, on all of them; empty where one is lost, or none has it."""
        lengths = self.agree(len(data or b""))
        if sum(lengths) == 0 or self.is_lost:
            return b""
        own = np.frombuffer(data, np.uint8) if data else np.zeros(sum(lengths), np.uint8)
        total = self._call(0, lambda: mx.distributed.all_sum(mx.array(own), group=self._group))
        return b"" if total is None else np.array(total).tobytes()

    def all_gather(self, rows: mx.array) -> mx.array:
        """Return the rows of all ranks, computed. Raises ConnectionError where one is lost, also without a word."""
        mx.eval(rows)
        result = self._call(0, lambda: mx.distributed.all_gather(rows, group=self._group))
        if result is None:
            raise ConnectionError("another Mac is lost")
        return result

    def notices_loss(self) -> bool:
        """Return whether a rank was lost just now, when a signal has come: MLX's launcher ends all others."""
        self._notice_until = self._notice_until or monotonic() + (_NOTICE if self._size > 1 else 0)
        while not self.is_lost and monotonic() < self._notice_until:
            sleep(_PERIOD)
        return self._lost_at is not None and monotonic() - self._lost_at < _ENDING

    def close(self) -> None:
        """End the exchange, whatever the others do."""
        self._quits = True
        if self._thread.is_alive():
            self._thread.join(timeout=2 * _PERIOD + 1)

    # --- the exchange ------------------------------------------------------------------------------------------------

    def _call(self, value: int, operation: Callable[[], mx.array] | None) -> Any:
        """Return the result of an operation of all ranks, or their values; None where one is lost."""
        if self._size == 1 or self.is_lost:
            return None
        self._operation = operation
        self._post(calls=self._row.calls + 1, value=value)
        return self._answer()

    def _post(self, **numbers: int) -> None:
        self._row = replace(self._row, **numbers)
        self._posted.set()

    def _answer(self) -> Any:
        """Wait for what the exchange finds out; None where a rank is lost. Signals are handled meanwhile."""
        while True:
            with suppress(Empty):
                return self._answers.get(timeout=0.5)

    def _end_silence(self) -> None:
        """End the exchange where a rank is silent for too long. In a thread of its own."""
        while self._thread.is_alive():
            sleep(0.5)
            if monotonic() - self._heard > (_IMPATIENCE if self.is_interrupted() else _PATIENCE):
                disconnect()
                self._lost_at = self._lost_at or monotonic()
                self._answers.put(None)
                return

    def _exchange(self) -> None:
        """Send this rank's numbers to all and read theirs, until all leave. In a thread of its own."""
        cpu.clear_streams_at_thread_end()
        answered, granted = 0, [0] * self._size
        with mx.stream(mx.new_stream(mx.cpu)):
            while not self._quits:
                try:
                    numbers = mx.array([astuple(self._row)], dtype=mx.int64)
                    table = mx.distributed.all_gather(numbers, group=self._group).tolist()
                    self._rows, self._heard = [_Row(*row) for row in table], monotonic()
                    self._hand_out(granted)
                    if all(row.calls > answered for row in self._rows):
                        answered += 1
                        result: Any = [row.value for row in self._rows]
                        if self._operation is not None:
                            mx.eval(result := self._operation())
                        self._answers.put(result)
                        continue
                except RuntimeError:  # the connection to a rank is lost
                    self._lost_at = monotonic()
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
                if rank == self._rank:
                    self._answers.put(number if number < len(self._batches) else _NOBODY)

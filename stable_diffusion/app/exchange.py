"""Exchange a few numbers among processes that MLX's launcher starts, four times a second.

A thread does so beside the work. All notice at once that one of them is lost, or silent, and nobody waits for a process
that will not come. Nothing is exchanged, and no thread begun, in a process that runs alone.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any

import mlx.core as mx
import numpy as np

from ..models import cpu
from .processes import disconnect

# Seconds between two exchanges. All sleep as long, and meet: MLX's ring keeps a core busy while it waits for another.
_PERIOD = 0.25
_PATIENCE, _IMPATIENCE = 40, 5  # seconds after which a silent rank is lost, the second after a signal
_NOTICE = 3  # seconds that the launcher is ahead, at most, of what MLX says of a lost connection
_ENDING = 30  # seconds in which the launcher ends the other ranks, by ssh
NOBODY = 2**31 - 1


@dataclass(frozen=True)
class Row:
    """Hold the numbers that a rank sends in each exchange.

    ``calls`` counts the calls of ``agree``, ``value`` is that of the last; ``takes`` counts the batches asked for,
    ``finished`` the images; ``leaves`` is 1 at the end.
    """

    calls: int = 0
    value: int = 0
    takes: int = 0
    finished: int = 0
    leaves: int = 0


class Exchange:
    """Hold what is known of the other ranks. It has the methods of an ``mx.distributed.Group``, except ``split``.

    Args:
        group: from :func:`stable_diffusion.app.processes.join`; None is a process that runs alone.
    """

    def __init__(self, group: mx.distributed.Group | None = None):
        self._group = group
        self._rank, self._size = (0, 1) if group is None else (group.rank(), group.size())
        self.is_interrupted: Callable[[], bool] = lambda: False  # by a signal
        self._lost_at: float | None = None
        self._row, self._rows = Row(), [Row()] * self._size  # of this rank, and of all in the last exchange
        self._operation: Callable[[], mx.array] | None = None
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._heard, self._notice_until, self._quits = monotonic(), 0.0, False
        self._posted = threading.Event()
        self._thread = threading.Thread(target=self._exchange, daemon=True)
        if group is not None:
            self._thread.start()
            threading.Thread(target=self._end_silence, daemon=True).start()

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

    def agree(self, value: int = 0) -> list[int]:
        """Return the values of all ranks, in their order; this one's alone where one is lost.

        All ranks make the same calls, in the same order.
        """
        return self._call(value, None) or [value]

    def highest(self, values: list[int]) -> list[int]:
        """Return the highest of each of the values on all ranks."""
        result = self._call(0, lambda: mx.distributed.all_max(mx.array(values), group=self._group))
        return values if result is None else result.tolist()

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

    def _call(self, value: int, operation: Callable[[], mx.array] | None) -> Any:
        """Return the result of an operation of all ranks, or their values; None where one is lost."""
        if self._size == 1 or self.is_lost:
            return None
        self._operation = operation
        self._post(calls=self._row.calls + 1, value=value)
        return self._answer()

    def _post(self, **numbers: int) -> None:
        """Send these numbers at once."""
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
        answered = 0
        with mx.stream(mx.new_stream(mx.cpu)):
            while not self._quits:
                try:
                    numbers = mx.array([astuple(self._row)], dtype=mx.int64)
                    with cpu.collective:
                        table = mx.distributed.all_gather(numbers, group=self._group).tolist()
                    self._rows, self._heard = [Row(*row) for row in table], monotonic()
                    self._receive()
                    if all(row.calls > answered for row in self._rows):
                        answered += 1
                        result: Any = [row.value for row in self._rows]
                        if self._operation is not None:
                            with cpu.collective:
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

    def _receive(self) -> None:
        """Act on the numbers of all ranks, in the thread of the exchange."""

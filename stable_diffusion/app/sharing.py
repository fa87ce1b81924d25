"""Share one job among several processes, which MLX's launcher starts: each makes some of the images.

A process is called a rank, as in MPI. Each works as if it were alone. A thread beside the work tells the others four
times a second how far it is, so whoever is done can take more work, all notice at once that one of them is lost, or
silent, and nobody waits for one that will not come. A process that runs alone has no such thread.

    mlx.launch -n 2 -- python txt2image.py "a lighthouse" --seed 1-8
"""

import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import datetime
from io import StringIO
from queue import Empty, SimpleQueue
from random import Random, SystemRandom
from time import monotonic, sleep
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from ..models import cpu
from .processes import disconnect

T = TypeVar("T")
SHARES = ("even", "steal", "guidance", "off")
# Seconds between two exchanges. All sleep as long, and meet: MLX's ring keeps a core busy while it waits for another.
_PERIOD = 0.25
_PATIENCE = 40  # seconds after which a silent rank is lost
_NOTICE = 3  # seconds that the launcher is ahead, at most, of what MLX says of a lost connection
_ENDING = 30  # seconds in which the launcher ends the other ranks, by ssh


@dataclass(frozen=True)
class SharingSettings:
    """Hold how ranks share the images of a run, and whether rank 0 gathers them.

    "even": rank r makes the images r, r + size, ...; "steal": a rank that is done takes the next batch; "guidance":
    each computes a part of the rows of the UNet's batch, for one image after the other; "off": each makes them all.
    """

    share: str = "even"
    gather: bool = False


class _Row(NamedTuple):
    """Hold the numbers that a rank sends in each exchange.

    ``calls`` counts the calls of ``gather``, ``length`` is that of the last one's data, -1 where the rank leaves;
    ``takes`` counts the batches asked for, ``finished`` the images.
    """

    calls: int = 0
    length: int = 0
    takes: int = 0
    finished: int = 0


class Ranks:
    """Choose the images of this process, and know those of the others. It can stand for the group in ``sd.group``.

    ``group`` is from :func:`stable_diffusion.app.processes.join`; None is a process that runs alone.
    """

    def __init__(self, group: mx.distributed.Group | None = None):
        self._group = group
        self._rank, self._size = (0, 1) if group is None else (group.rank(), group.size())
        self._row, self._rows = _Row(), [_Row()] * self._size  # of this rank, and of all in the last exchange
        self._data = b""  # that this rank gathers
        self._batches: Sequence[Sequence[int]] = ()  # the images of each
        self._takers: list[int] = []  # of the batches: the rank that makes it
        self._heard, self._lost_at, self._notice_until, self._quits = monotonic(), 0.0, 0.0, False
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._exchange, daemon=True)
        if group is not None:
            self._thread.start()
            threading.Thread(target=self._end_silence, daemon=True).start()
        # For seeds that are drawn and for names with the time: the same on all ranks.
        seed, began = self.gather(f"{secrets.randbits(32)} {datetime.now().isoformat()}".encode())[0].decode().split()
        self.random = SystemRandom() if group is None else Random(int(seed))
        self.began = datetime.fromisoformat(began)

    def rank(self) -> int:
        """Return the number of this process, from 0."""
        return self._rank

    def size(self) -> int:
        """Return the number of all processes."""
        return self._size

    @property
    def is_lost(self) -> bool:
        """Return whether another rank is lost, or has been silent for too long."""
        return self._lost_at > 0

    def gather(self, data: bytes = b"") -> list[bytes]:
        """Return the data of all ranks, in their order; this one's alone where one is lost. All make the same calls."""
        self._data = data
        return self._ask(calls=self._row.calls + 1, length=len(data)) or [data]

    def all_gather(self, rows: mx.array) -> mx.array:
        """Return the rows of all ranks, computed. Raises ConnectionError where one is lost, also without a word."""
        mx.eval(data := mx.contiguous(rows).reshape(-1).view(mx.uint8))
        parts = self.gather(bytes(data))
        if len(parts) < self._size:
            raise ConnectionError("another Mac is lost")
        return mx.array(np.frombuffer(b"".join(parts), np.uint8)).view(rows.dtype).reshape(-1, *rows.shape[1:])

    def once(self, prepare: Callable[[], T]) -> T:
        """Return the result of ``prepare``, or raise its exception, of all ranks only in the first that has one.

        The others exit with the same code, and without a word: what ranks above 0 print in ``prepare`` is dropped.
        """
        if self._size == 1:
            return prepare()
        printed, failure, code = StringIO(), None, b""
        out, err = (printed, printed) if self._rank else (sys.stdout, sys.stderr)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                result = prepare()
        except (Exception, SystemExit) as error:
            failure, code = error, str(error.code or 0 if isinstance(error, SystemExit) else 2).encode()
        codes = self.gather(code)
        if not any(codes):
            return result
        self.leave()  # together: the launcher ends whoever is later than one that has failed
        first = next(rank for rank, code in enumerate(codes) if code)
        if failure is not None and (first == self._rank or len(codes) < self._size):
            print(printed.getvalue(), end="", file=sys.stderr)
            raise failure
        raise SystemExit(int(codes[first]))

    def leave(self) -> None:
        """Wait until all ranks have come here, or one is lost."""
        self._ask(calls=self._row.calls + 1, length=-1)

    def close(self) -> None:
        """End the exchange, whatever the others do."""
        self._quits = True
        if self._thread.is_alive():
            self._thread.join(timeout=2 * _PERIOD + 1)

    def notices_loss(self) -> bool:
        """Return whether a rank was lost just now, when a signal has come: then MLX's launcher ends all others."""
        self._notice_until = self._notice_until or monotonic() + (_NOTICE if self._size > 1 else 0)
        while not self.is_lost and monotonic() < self._notice_until:
            sleep(_PERIOD)
        return self.is_lost and monotonic() - self._lost_at < _ENDING

    # --- the work ----------------------------------------------------------------------------------------------------

    def share(self, count: int, way: str) -> Sequence[int]:
        """Return the numbers of the images, of ``count``, that this rank may make; ``way`` is one of ``SHARES``."""
        self._batches = [[image] for image in range(count)]
        self._takers = [0 if way == "guidance" else image % self._size for image in range(count)]  # 0 writes them
        return range(self._rank, count, self._size) if way == "even" else range(count)

    def take(self, batches: Sequence[Sequence[int]]) -> Iterator[int]:
        """Yield the number of a batch that no other rank has taken, as long as there is one.

        ``batches`` are the images of each. Where a rank is lost, those left are shared; the last rank takes them all.
        """
        self._batches, self._takers = batches, []
        self.gather()
        while (number := self._ask(takes=self._row.takes + 1)) is not None:
            if number >= len(batches):
                return
            yield number
        rest = range(len(self._takers), len(batches))
        self._takers += [self._rank if self._size == 2 else number % self._size for number in rest]
        yield from (number for number in rest if self._takers[number] == self._rank)

    def finish(self) -> None:
        """Count an image of this rank that is finished, in their order."""
        self._row = self._row._replace(finished=self._row.finished + 1)

    def missing(self, count: int) -> list[int]:
        """Return the images that are not known to be finished, of ``count``."""
        missing = set(range(count))
        for rank, row in enumerate(self._rows):
            taken = zip(self._batches, self._takers, strict=False)
            images = [image for batch, taker in taken if taker == rank for image in batch]
            missing -= set(images[: (self._row if rank == self._rank else row).finished])
        return sorted(missing)

    # --- the exchange ------------------------------------------------------------------------------------------------

    def _ask(self, **numbers: int) -> Any:
        """Send these numbers at once, and return what the exchange answers; None where it is over."""
        self._row, answer = self._row._replace(**numbers), None
        self._asked.set()
        while answer is None and not (self._answers.empty() and (self.is_lost or not self._thread.is_alive())):
            with suppress(Empty):  # signals are handled meanwhile
                answer = self._answers.get(timeout=_PERIOD)
        return answer

    def _exchange(self) -> None:
        """Send this rank's numbers to all and read theirs, until all leave. In a thread of its own."""
        cpu.clear_streams_at_thread_end()
        answered = 0
        with mx.stream(mx.new_stream(mx.cpu)):
            while not (self._quits or self.is_lost):
                try:
                    self._rows = [_Row(*row) for row in self._of_all(np.array(self._row)).tolist()]
                    self._give()
                    if all(row.calls > answered for row in self._rows):
                        answered += 1
                        self._answers.put(self._gathered())
                        if self._rows[self._rank].length < 0:
                            return
                        continue
                except RuntimeError:  # the connection to a rank is lost
                    self._lost_at = monotonic()
                self._asked.wait(_PERIOD)
                self._asked.clear()

    def _gathered(self) -> list[bytes]:
        """Return the data of all ranks."""
        longest = max(1, *(row.length for row in self._rows))
        data = self._of_all(np.frombuffer(self._data.ljust(longest, b"\0"), np.uint8))
        return [own[: row.length].tobytes() for own, row in zip(data, self._rows, strict=True)]

    def _of_all(self, own: np.ndarray) -> np.ndarray:
        """Return the arrays of all ranks. Raises RuntimeError where the connection to one is lost."""
        with cpu.collective:
            mx.eval(rows := mx.distributed.all_gather(mx.array(own[None]), group=self._group))
        self._heard = monotonic()
        return np.array(rows)

    def _give(self) -> None:
        """Give each rank the batch that it asks for. All ranks do so from the same numbers, with the same result."""
        for rank, row in enumerate(self._rows):
            if row.takes > self._takers.count(rank):
                self._takers.append(rank)
                if rank == self._rank:
                    self._answers.put(len(self._takers) - 1)

    def _end_silence(self) -> None:
        """End the exchange where a rank is silent for too long. In a thread of its own."""
        while self._thread.is_alive():
            sleep(0.5)
            if monotonic() - self._heard > _PATIENCE:
                disconnect()
                self._lost_at = self._lost_at or monotonic()
                return

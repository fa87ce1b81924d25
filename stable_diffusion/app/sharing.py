"""Share one job among several processes, started by MLX's launcher: each generates some of the images.

A process is called a rank, as in MPI. Each rank works independently. A second thread sends its progress to the others
four times a second. So a rank that has finished can take more work, and all ranks notice at once that one is lost or
silent, and do not wait for it. A process that runs alone has no such thread.

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
# Seconds between two exchanges. All ranks sleep equally long: MLX's ring keeps a core busy while it waits.
_PERIOD = 0.25
_PATIENCE = 40  # seconds after which a silent rank is lost
_NOTICE = 3  # seconds, at most, between the launcher's signal and MLX's error for a lost connection
_ENDING = 30  # seconds in which the launcher ends the other ranks, by ssh


@dataclass(frozen=True)
class SharingSettings:
    """Hold how ranks share the images of a run, and whether rank 0 gathers them.

    "even": rank r makes the images r, r + size, ...; "steal": a rank that has finished takes the next batch;
    "guidance": each rank computes some rows of the UNet's batch, image by image; "off": each rank makes all images.
    """

    share: str = "even"
    gather: bool = False


class _Row(NamedTuple):
    """Hold the numbers that a rank sends in each exchange.

    ``calls`` counts the calls of ``gather``. ``length`` is the length of the last call's data, -1 if the rank leaves.
    ``takes`` counts the requested batches, ``finished`` the finished images.
    """

    calls: int = 0
    length: int = 0
    takes: int = 0
    finished: int = 0


class Ranks:
    """Assign images to this process, and track those of the others. Can replace the group in ``sd.group``.

    ``group`` is from :func:`stable_diffusion.app.processes.join`; None is a process that runs alone.
    """

    def __init__(self, group: mx.distributed.Group | None = None):
        self._group = group
        self._rank, self._size = (0, 1) if group is None else (group.rank(), group.size())
        self._row, self._rows = _Row(), [_Row()] * self._size  # of this rank, and of all in the last exchange
        self._data = b""  # of this rank, for ``gather``
        self._batches: Sequence[Sequence[int]] = ()  # the images of each
        self._takers: list[int] = []  # the rank of each batch
        self._last_exchange, self._lost_at, self._notice_until, self._quits = monotonic(), 0.0, 0.0, False
        self._results: SimpleQueue[Any] = SimpleQueue()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._exchange, daemon=True)
        if group is not None:
            self._thread.start()
            threading.Thread(target=self._end_silence, daemon=True).start()
        # The same random seeds and the same time in file names on all ranks.
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
        """Return whether another rank is lost or was silent for too long."""
        return self._lost_at > 0

    def gather(self, data: bytes = b"") -> list[bytes]:
        """Return the data of all ranks, in their order; only its own if one is lost. All make the same calls."""
        self._data = data
        return self._send(calls=self._row.calls + 1, length=len(data)) or [data]

    def all_gather(self, rows: mx.array) -> mx.array:
        """Return the computed rows of all ranks. Raises ConnectionError if a rank is lost or silent."""
        mx.eval(data := mx.contiguous(rows).reshape(-1).view(mx.uint8))
        parts = self.gather(bytes(data))
        if len(parts) < self._size:
            raise ConnectionError("another Mac is lost")
        return mx.array(np.frombuffer(b"".join(parts), np.uint8)).view(rows.dtype).reshape(-1, *rows.shape[1:])

    def once(self, prepare: Callable[[], T]) -> T:
        """Return the result of ``prepare``; if it fails, raise its exception only in the first rank that has one.

        The others exit silently with the same code. The output of ``prepare`` on ranks above 0 is dropped.
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
        self.leave()  # together: the launcher kills ranks that exit after a failed one
        first = next(rank for rank, code in enumerate(codes) if code)
        if failure is not None and (first == self._rank or len(codes) < self._size):
            print(printed.getvalue(), end="", file=sys.stderr)
            raise failure
        raise SystemExit(int(codes[first]))

    def leave(self) -> None:
        """Wait until all ranks have called this, or one is lost."""
        self._send(calls=self._row.calls + 1, length=-1)

    def close(self) -> None:
        """End the exchange without waiting for the others."""
        self._quits = True
        if self._thread.is_alive():
            self._thread.join(timeout=2 * _PERIOD + 1)

    def notices_loss(self) -> bool:
        """Return whether a rank was lost just before a signal: MLX's launcher then ends all others."""
        self._notice_until = self._notice_until or monotonic() + (_NOTICE if self._size > 1 else 0)
        while not self.is_lost and monotonic() < self._notice_until:
            sleep(_PERIOD)
        return self.is_lost and monotonic() - self._lost_at < _ENDING

    # --- the work ----------------------------------------------------------------------------------------------------

    def share(self, count: int, mode: str) -> Sequence[int]:
        """Return the numbers of the images, out of ``count``, for this rank; ``mode`` is one of ``SHARES``."""
        self._batches = [[image] for image in range(count)]
        self._takers = [0 if mode == "guidance" else image % self._size for image in range(count)]  # 0 writes them
        return range(self._rank, count, self._size) if mode == "even" else range(count)

    def take(self, batches: Sequence[Sequence[int]]) -> Iterator[int]:
        """Yield the numbers of batches that no other rank has taken, until all are taken.

        ``batches`` are the images of each. If a rank is lost, the others share the rest; the last rank takes all of it.
        """
        self._batches, self._takers = batches, []
        self.gather()
        while (number := self._send(takes=self._row.takes + 1)) is not None:
            if number >= len(batches):
                return
            yield number
        rest = range(len(self._takers), len(batches))
        self._takers += [self._rank if self._size == 2 else number % self._size for number in rest]
        yield from (number for number in rest if self._takers[number] == self._rank)

    def finish(self) -> None:
        """Count a finished image of this rank; images are finished in order."""
        self._row = self._row._replace(finished=self._row.finished + 1)

    def missing(self, count: int) -> list[int]:
        """Return the images, out of ``count``, that may be unfinished."""
        missing = set(range(count))
        for rank, row in enumerate(self._rows):
            taken = zip(self._batches, self._takers, strict=False)
            images = [image for batch, taker in taken if taker == rank for image in batch]
            missing -= set(images[: (self._row if rank == self._rank else row).finished])
        return sorted(missing)

    # --- the exchange ------------------------------------------------------------------------------------------------

    def _send(self, **numbers: int) -> Any:
        """Send these numbers at once, and return the result of the exchange; None if it has ended."""
        self._row, result = self._row._replace(**numbers), None
        self._wake.set()
        while result is None and not (self._results.empty() and (self.is_lost or not self._thread.is_alive())):
            with suppress(Empty):  # Python handles signals between two waits
                result = self._results.get(timeout=_PERIOD)
        return result

    def _exchange(self) -> None:
        """Exchange the numbers of all ranks until all leave. Runs in a second thread."""
        cpu.clear_streams_at_thread_end()
        n_results = 0
        with mx.stream(mx.new_stream(mx.cpu)):
            while not (self._quits or self.is_lost):
                try:
                    self._rows = [_Row(*row) for row in self._of_all(np.array(self._row)).tolist()]
                    self._assign()
                    if all(row.calls > n_results for row in self._rows):
                        n_results += 1
                        self._results.put(self._gathered())
                        if self._rows[self._rank].length < 0:
                            return
                        continue
                except RuntimeError:  # the connection to a rank is lost
                    self._lost_at = monotonic()
                self._wake.wait(_PERIOD)
                self._wake.clear()

    def _gathered(self) -> list[bytes]:
        """Return the data of all ranks."""
        longest = max(1, *(row.length for row in self._rows))
        data = self._of_all(np.frombuffer(self._data.ljust(longest, b"\0"), np.uint8))
        return [own[: row.length].tobytes() for own, row in zip(data, self._rows, strict=True)]

    def _of_all(self, own: np.ndarray) -> np.ndarray:
        """Return the arrays of all ranks. Raises RuntimeError if a connection is lost."""
        with cpu.collective:
            mx.eval(rows := mx.distributed.all_gather(mx.array(own[None]), group=self._group))
        self._last_exchange = monotonic()
        return np.array(rows)

    def _assign(self) -> None:
        """Assign the requested batches. All ranks compute this from the same numbers, with the same result."""
        for rank, row in enumerate(self._rows):
            if row.takes > self._takers.count(rank):
                self._takers.append(rank)
                if rank == self._rank:
                    self._results.put(len(self._takers) - 1)

    def _end_silence(self) -> None:
        """End the exchange if a rank is silent for too long. Runs in another thread."""
        while self._thread.is_alive():
            sleep(0.5)
            if monotonic() - self._last_exchange > _PATIENCE:
                disconnect()
                self._lost_at = self._lost_at or monotonic()
                return

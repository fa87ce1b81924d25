"""Share one job among several processes, which MLX's launcher starts: each makes some of the images.

A process is called a rank, as in MPI. Each works as if it were alone, and exchanges a few numbers with all others (see
``exchange.py``): whoever is done can take more work, and all notice at once that one of them is lost.

    mlx.launch -n 2 -- python txt2image.py "a lighthouse" --seed 1-8
"""

import secrets
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from io import StringIO
from random import Random, SystemRandom
from typing import TypeVar

import mlx.core as mx

from .exchange import NOBODY, Exchange

T = TypeVar("T")

SHARES = ("even", "steal", "guidance", "off")
_EPOCH = datetime(1970, 1, 1)


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


class Ranks(Exchange):
    """Choose the images of this process, and know those of the others."""

    def __init__(self, group: mx.distributed.Group | None = None):
        self._batches: Sequence[Sequence[int]] = ()  # to take, each with its images
        self._taken = 0
        self._images: defaultdict[int, list[int]] = defaultdict(list)  # of each rank, in their order
        self._granted: Counter[int] = Counter()  # batches of each rank
        super().__init__(group)
        # For seeds that are drawn and for names with the time: the same on all ranks.
        self.random = SystemRandom() if group is None else Random(self.agree(secrets.randbits(32))[0])
        self.began = _EPOCH + timedelta(seconds=self.agree(int((datetime.now() - _EPOCH).total_seconds()))[0])

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
        codes = self.agree(NOBODY if failure is None else code)
        first = next((rank for rank, code in enumerate(codes) if code != NOBODY), None)
        if first is None:
            return result
        self.leave()  # together: the launcher ends whoever is later than one that has failed
        if failure is not None and (first == self._rank or self.is_lost):
            print(printed.getvalue(), end="", file=sys.stderr)
            raise failure
        raise SystemExit(codes[first])

    # --- the work ----------------------------------------------------------------------------------------------------

    def share(self, count: int, share: str) -> Sequence[int]:
        """Return the numbers of the images, of ``count``, that this rank may make; ``share`` is one of ``SHARES``."""
        if share == "even":
            self._images |= {rank: list(range(rank, count, self._size)) for rank in range(self._size)}
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
            if number == NOBODY:
                return
            if number is not None:
                yield number
        for number in range(self._taken, len(batches)):
            if self._size == 2 or number % self._size == self._rank:
                self._images[self._rank] += batches[number]
                yield number

    def finish(self, count: int = 1) -> None:
        """Count images of this rank that are finished, in their order."""
        self._row = replace(self._row, finished=self._row.finished + count)

    def missing(self, count: int) -> list[int]:
        """Return the images that are not known to be finished, of ``count``."""
        finished = [row.finished for row in self._rows]
        finished[self._rank] = self._row.finished
        known = {i for rank, done in enumerate(finished) for i in self._images[rank][:done]}
        return [i for i in range(count) if i not in known]

    def _receive(self) -> None:
        """Give each rank the batches that it asks for. All ranks do so from the same numbers, with the same result."""
        for rank, row in enumerate(self._rows):
            for _ in range(row.takes - self._granted[rank]):
                number = self._taken
                self._granted[rank] += 1
                if number < len(self._batches):
                    self._images[rank] += self._batches[number]
                    self._taken += 1
                if rank == self._rank:
                    self._answers.put(number if number < len(self._batches) else NOBODY)

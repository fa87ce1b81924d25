"""Ctrl-C and SIGTERM: the first ends a run after its step, the second ends the process at once."""

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from ..images.files import UNFINISHED

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 25  # seconds after SIGTERM, when supervisors lose theirs


@dataclass
class Stop:
    """Hold the exit code of the first signal: 128 and its number, None without one.

    While a run is prepared a signal raises KeyboardInterrupt; from ``expect()`` on it is only noted in ``code``.
    """

    code: int | None = None
    is_expected: bool = False

    def expect(self) -> None:
        """Note signals from now on. KeyboardInterrupt if one has come already."""
        if self.code is not None:
            raise KeyboardInterrupt
        self.is_expected = True

    def note(self, number: int, frame: object) -> None:
        """Handle a signal."""
        is_first, self.code = self.code is None, self.code or 128 + number
        if is_first and not self.is_expected:
            raise KeyboardInterrupt


@contextmanager
def signals(say: Callable[[str], None]) -> Iterator[Stop]:
    """Watch for signals; ``say`` is called with a line on the first one.

    Python runs handlers between two of its instructions, not while MLX computes. So another thread reads signals from
    a pipe, and ends the process at the second one, or 25 seconds after SIGTERM. In other threads than the main
    one nothing is watched for, nor is a signal that the process was started to ignore.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    watched = [number for number in _SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    read, write = os.pipe()
    os.set_blocking(write, False)  # a handler must not wait
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, stop.note) for number in watched}
    watcher = threading.Thread(target=_watch, args=(read, set(watched), stop, say), daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(write)  # the watcher reads the end
        watcher.join()
        os.close(read)


def _watch(pipe: int, watched: set[int], stop: Stop, say: Callable[[str], None]) -> None:
    first, patience = None, None
    while True:
        if not select.select([pipe], [], [], patience)[0]:
            _leave(first)
        number = next(iter(os.read(pipe, 1)), None)
        if number is None:
            return
        if number in watched and first is not None:
            _leave(number)
        elif number in watched:
            first, patience = number, _PATIENCE if number == signal.SIGTERM else None
            if stop.is_expected:
                say("stopping after this step to write what there is; once more leaves at once")


def _leave(number: int) -> NoReturn:
    for path in tuple(UNFINISHED):
        with suppress(OSError):
            path.unlink()
    os._exit(128 + number)

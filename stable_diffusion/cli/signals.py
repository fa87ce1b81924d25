"""Ctrl-C and SIGTERM: the first ends a run after its step, the second ends the process at once."""

import os
import select
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ..images.files import UNFINISHED

_PATIENCE = 25  # seconds after SIGTERM, when supervisors lose theirs


@dataclass
class Stop:
    """Hold the exit code of the first signal: 128 and its number, None without one.

    A signal raises KeyboardInterrupt, but from when it ``is_expected``: then it is only noted.
    """

    code: int | None = None
    is_expected: bool = False


@contextmanager
def signals(say: Callable[[str], None]) -> Iterator[Stop]:
    """Watch for signals, except those that are ignored; ``say`` is called with a line on the first one of a run.

    Python calls handlers between two of its instructions, not while MLX computes. So another thread reads signals from
    a pipe. Only the main thread can watch.
    """
    stop = Stop()

    def note(number: int, frame: object) -> None:
        stop.code = stop.code or 128 + number
        if not stop.is_expected:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    watched = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    read, write = os.pipe()
    os.set_blocking(write, False)  # a handler must not wait
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, note) for number in watched}
    watcher = threading.Thread(target=_watch, args=(read, watched, stop, say), daemon=True)
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


def _watch(pipe: int, watched: Collection[int], stop: Stop, say: Callable[[str], None]) -> None:
    """End the process at the second signal, or when a while has passed since SIGTERM."""
    seen: list[int] = []
    while len(seen) < 2 and select.select([pipe], [], [], _PATIENCE if signal.SIGTERM in seen else None)[0]:
        byte = os.read(pipe, 1)
        if not byte:
            return
        if byte[0] in watched:
            seen.append(byte[0])
            if len(seen) == 1 and stop.is_expected:
                say("stopping after this step to write what there is; once more leaves at once")
    for path in tuple(UNFINISHED):
        with suppress(OSError):
            path.unlink()
    os._exit(128 + seen[-1])

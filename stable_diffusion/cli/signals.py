"""Ctrl-C and SIGTERM: the first ends a run after its step, the second ends the process at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from socket import socket, socketpair

from ..files.whole import UNFINISHED

_PATIENCE = 25  # seconds after SIGTERM, before supervisors kill the process
_EXCUSABLE = bytes([signal.SIGTERM, signal.SIGHUP])


@dataclass
class Stop:
    """Hold the exit code of the first signal: 128 and its number. It raises KeyboardInterrupt, unless expected.

    ``is_excused``: ignore SIGTERM and SIGHUP, because MLX's launcher ends all processes when one is lost.
    ``is_launched``: the launcher has started this process. SIGTERM is then ignored after the end of the command: the
    launcher sends it to processes that end a moment after a failed one.
    """

    code: int | None = None
    is_expected: bool = False
    is_excused: Callable[[], bool] = lambda: False
    is_launched: bool = False

    @property
    def is_due(self) -> bool:
        """Return whether the run has to stop. An excused signal is dropped."""
        if self.code is not None and self.code - 128 in _EXCUSABLE and self.is_excused():
            self.code = None
        return self.code is not None


@contextmanager
def signals(say: Callable[[str], None], saved: str = "partial images") -> Iterator[Stop]:
    """Watch for signals, except those that are ignored; the first one of a run calls ``say`` with a line.

    The line names the files that are ``saved`` before the run ends.

    Python runs handlers only between its instructions, not while MLX computes: a second thread reads signals at once.
    """
    stop = Stop()

    def note(number: int, frame: object) -> None:
        stop.code = stop.code or 128 + number
        if not stop.is_expected and stop.is_due:
            raise KeyboardInterrupt

    receiver, sender = socketpair()
    sender.setblocking(False)  # a handler must not wait
    watched = [
        n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) not in (signal.SIG_IGN, None)
    ]
    wakeup, handlers = signal.set_wakeup_fd(sender.fileno()), {n: signal.signal(n, note) for n in watched}
    watcher = threading.Thread(target=_watch, args=(receiver, stop, say, saved), daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        if stop.is_launched:
            handlers |= {signal.SIGTERM: signal.SIG_IGN}
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sender.close()  # ends the watcher
        watcher.join()


def _watch(receiver: socket, stop: Stop, say: Callable[[str], None], saved: str) -> None:
    """End the process at the second signal, or some time after SIGTERM."""
    with receiver:
        number = receiver.recv(1)
        while number and number in _EXCUSABLE and stop.is_excused():
            number = receiver.recv(1)
        if number and stop.is_expected:
            say(f"stopping after this step and saving {saved}; Ctrl-C again quits now")
        receiver.settimeout(_PATIENCE if number == bytes([signal.SIGTERM]) else None)
        with suppress(TimeoutError):
            number = receiver.recv(1)
    if number:
        for path in tuple(UNFINISHED):
            with suppress(OSError):
                path.unlink()
        os._exit(128 + number[0])

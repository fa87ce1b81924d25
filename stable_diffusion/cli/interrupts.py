"""Ctrl-C and SIGTERM: the first lets a run end in order, the second ends it at once."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

from ..images.image import UNFINISHED

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """A context in which these signals are watched for; afterwards they mean what they did before.

    While a run is made ready the first raises KeyboardInterrupt. From ``expect()`` on it is only noted in ``code``, and
    whoever computes looks there between two steps; ``say`` is called with a line on what happens then, from a thread of
    our own. The second leaves the process at once, also while MLX computes: Python runs handlers of signals between two
    of its instructions only, but the system writes to a pipe, on which that thread waits.

    In other threads than the main one, where Python has no signals, nothing is watched for. Nor is a signal that the
    process was started to ignore (``nohup``).
    """

    def __init__(self, say: Callable[[str], None]):
        self.code: int | None = None  # with which to exit: 128 and the number of the signal, None without one
        self._say = say
        self._expected = False

    def expect(self) -> None:
        """From now on the first signal is noted and raises no more. KeyboardInterrupt if it has come already."""
        if self.code is not None:  # what was raised in a finalizer, say, has gone no further
            raise KeyboardInterrupt
        self._expected = True

    def __enter__(self) -> "Interrupts":
        self._before = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        watched = [s for s in _SIGNALS if signal.getsignal(s) not in (signal.SIG_IGN, None)]
        self._end, write = os.pipe()
        os.set_blocking(write, False)  # a handler must not wait
        self._pipe = write
        self._pipe_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._before = {s: signal.signal(s, self._note) for s in watched}
        self._watcher = threading.Thread(target=self._watch, args=(set(watched),), daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._pipe_before)
        os.close(self._pipe)  # the watcher reads the end
        self._watcher.join()
        os.close(self._end)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = self.code is None
        self.code = self.code or 128 + number
        if first and not self._expected:
            raise KeyboardInterrupt

    def _watch(self, watched: set[int]) -> None:
        seen = False
        while numbers := os.read(self._end, 1):
            number = numbers[0]
            if number not in watched:
                continue
            if seen:
                for path in tuple(UNFINISHED):
                    with suppress(OSError):
                        path.unlink()
                os._exit(128 + number)
            seen = True
            if self._expected:
                self._say("stopping after this step to write what there is; once more leaves at once")

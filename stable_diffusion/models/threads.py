"""MLX's streams at the end of a thread."""

import threading

import mlx.core as mx


class _Streams:
    """Clear the streams of the thread that holds this object, when the thread ends and drops it."""

    def __del__(self) -> None:
        mx.synchronize()
        mx.clear_streams()


_thread = threading.local()


def clear_streams_at_thread_end() -> None:
    """Have MLX's streams of this thread cleared when it ends.

    Otherwise MLX (0.32) aborts the process at exit once a worker thread has computed. The main thread needs nothing.
    """
    if threading.current_thread() is not threading.main_thread() and not hasattr(_thread, "streams"):
        _thread.streams = _Streams()

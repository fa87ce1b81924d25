"""Several processes that share one job, on one machine or several Macs, started by MLX's launcher ``mlx.launch``."""

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import SHUT_RDWR, socket
from typing import TypeVar

import mlx.core as mx

_LAUNCHED = {"MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"}  # in the environment of each process: ring and jaccl, MPI
_LONGEST = 300  # bytes of a text
_PATIENCE = 40  # seconds

Group = mx.distributed.Group
T = TypeVar("T")


def join() -> Group | None:
    """Return the connected processes that a launcher has started; None if this process is alone.

    Raises ConnectionError, one line, if one of them does not connect. MLX waits for it in C++ without a time limit:
    only a signal interrupts the wait.
    """
    if not _LAUNCHED & os.environ.keys():
        return None

    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE, 1)  # every second: a signal between two waits would be lost
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        remedy = "start the same command on each of them, and check the addresses in the hostfile of mlx.launch"
        raise ConnectionError(f"the other processes cannot be reached ({error}); {remedy}") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return group if group.size() > 1 else None


def disconnect() -> None:
    """Close the connections of MLX's ring if another process is silent: MLX would wait for ever."""
    with suppress(KeyError, OSError, ValueError):
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        addresses = {tuple(address.rsplit(":", 1)) for host in hosts for address in host}
        for name in os.listdir("/dev/fd"):
            with suppress(OSError), socket(fileno=os.dup(int(name))) as connection:
                ends = connection.getsockname(), connection.getpeername()
                if any(tuple(map(str, end[:2])) in addresses for end in ends):
                    connection.shutdown(SHUT_RDWR)


def share(items: Sequence[T], group: Group | None = None) -> Sequence[T]:
    """Return the items of this process: the one with its number, and each ``size``-th after it. Alone, return all."""
    group = group or mx.distributed.init()
    return items[group.rank() :: group.size()]


def is_first(group: Group | None) -> bool:
    """Return whether this process writes files and prints."""
    return group is None or group.rank() == 0


def any_of(flag: bool, group: Group | None) -> bool:
    """Return whether ``flag`` is True in any process. Waits for all of them."""
    return flag if group is None else mx.distributed.all_sum(mx.array(int(flag)), group=group).item() > 0


def texts(text: str, group: Group) -> list[str]:
    """Return the text of each process, cut to 300 bytes."""
    row = mx.array(list(text.encode()[:_LONGEST].ljust(_LONGEST, b"\0")), dtype=mx.uint8)
    rows = mx.distributed.all_gather(row[None], group=group).tolist()
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def of_first(arrays: Mapping[str, mx.array], group: Group) -> dict[str, mx.array]:
    """Return the arrays of the first process; those of the others have the same names, shapes and types."""
    weight = int(group.rank() == 0)
    shared = {name: mx.distributed.all_sum(array * weight, group=group) for name, array in sorted(arrays.items())}
    mx.eval(shared)
    return {name: array.astype(arrays[name].dtype) for name, array in shared.items()}


@contextmanager
def together(group: Group | None) -> Iterator[None]:
    """Run a block in all processes. An error in one of them raises ValueError in all."""
    error = None
    try:
        yield
    except (ArithmeticError, ValueError, OSError) as raised:
        if group is None:
            raise
        error = raised
    if group is None:
        return
    for rank, text in enumerate(texts("" if error is None else str(error) or type(error).__name__, group)):
        if text:
            raise error if rank == group.rank() else ValueError(f"process {rank}: {text}")

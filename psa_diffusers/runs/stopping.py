"""Requests to stop, by Ctrl-C or by a job scheduler's SIGTERM, must not get lost.

The exception that a signal handler raises can get lost. Python swallows it in a callback, for example while it starts a
process. A compiled library that calls Python turns it into another error, for example while weights are read. So the
request is noted as well, and the working code checks for it between steps and after errors.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_requested = threading.Event()


@contextlib.contextmanager
def listening(once: bool = False) -> Iterator[None]:
    """Take SIGINT and SIGTERM as requests to stop inside this context; forget requests from before and after.

    Args:
        once: let no further request disturb the stop, for a process that Ctrl-C and its parent ask at the same time.
    """
    _requested.clear()
    before = {}
    if threading.current_thread() is threading.main_thread():
        handler = _request_once if once else _request
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)  # None: it was not set by Python
        _requested.clear()


def check() -> None:
    """Raise KeyboardInterrupt if a stop was requested."""
    if _requested.is_set():
        _requested.clear()
        raise KeyboardInterrupt


@contextlib.contextmanager
def carried_out() -> Iterator[None]:
    """Raise KeyboardInterrupt instead of an error if a stop was requested, because then the stop caused the error."""
    try:
        yield
    except Exception:
        check()
        raise


def _request(number: int, frame: FrameType | None) -> None:
    _requested.set()
    raise KeyboardInterrupt


def _request_once(number: int, frame: FrameType | None) -> None:
    if not _requested.is_set():
        _request(number, frame)

"""A request to stop by Ctrl-C or by a job scheduler's SIGTERM, which must not get lost.

The exception of a signal handler can get lost: Python swallows it in a callback, as when it starts a process, and a
compiled library that calls Python turns it into another error, as when weights are read. So the request is noted as
well, and the code that works asks for it between steps and after errors.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_requested = threading.Event()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Take SIGINT and SIGTERM as requests to stop, until it is left; other requests are forgotten."""
    _requested.clear()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, _request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set by Python
        _requested.clear()


def check() -> None:
    """Raise KeyboardInterrupt if a stop was requested."""
    if _requested.is_set():
        _requested.clear()
        raise KeyboardInterrupt


@contextlib.contextmanager
def carried_out() -> Iterator[None]:
    """Raise KeyboardInterrupt in place of an error if a stop was requested, for then the stop caused the error."""
    try:
        yield
    except Exception:
        check()
        raise


def _request(number: int, frame: FrameType | None) -> None:
    _requested.set()
    raise KeyboardInterrupt

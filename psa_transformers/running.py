"""Which threads run a forward of a patched decoder: several may, and one of them may end the patch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 0.1  # seconds after which to look for threads that have died


class Running:
    """Knows who is inside of the decoder, by the hooks around it."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._inside: set[threading.Thread] = set()

    @property
    def here(self) -> bool:
        """Whether this thread is."""
        return threading.current_thread() in self._inside

    def enter(self) -> None:
        """A forward begins."""
        with self._changed:
            self._inside.add(threading.current_thread())

    def leave(self) -> None:
        """A forward has ended, or failed."""
        with self._changed:
            self._inside.discard(threading.current_thread())
            self._changed.notify_all()

    @contextmanager
    def between_forwards(self) -> Iterator[None]:
        """Waits until no other thread is inside, and lets none begin: its mask and its attention must fit together."""
        with self._changed:
            me = threading.current_thread()
            while any(thread.is_alive() for thread in self._inside - {me}):
                self._changed.wait(PATIENCE)
            yield

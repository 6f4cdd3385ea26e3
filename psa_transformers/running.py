"""Which threads run a forward of a patched model: several may, and one of them may end the patch."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PATIENCE = 0.1  # seconds after which to look for threads that have died


class StaysHere:
    """What hooks of a model belong to. Copies and pickles meet it: they would belong to this model, not to the copy."""

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise TypeError("a model with PSA cannot be copied or pickled: call restore() first")


class Running(StaysHere):
    """Knows who is inside of the decoder or of a model around it, by hooks on each of them."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._inside: Counter[threading.Thread] = Counter()  # how deep

    @property
    def here(self) -> bool:
        """Whether this thread is."""
        return threading.current_thread() in self._inside

    def begin(self, *_: Any) -> None:
        """Before a forward of the outermost model."""
        if not torch.compiler.is_compiling():
            with self._changed:  # an interrupt may have left the last one without a word
                self._inside[threading.current_thread()] = 1

    def enter(self, *_: Any) -> None:
        """Before a forward of a model inside of it."""
        if not torch.compiler.is_compiling():
            with self._changed:
                self._inside[threading.current_thread()] += 1

    def leave(self, *_: Any) -> None:
        """After a forward of either, or its error."""
        if not torch.compiler.is_compiling():
            me = threading.current_thread()
            with self._changed:
                self._inside[me] -= 1
                if self._inside[me] <= 0:
                    del self._inside[me]
                self._changed.notify_all()

    @contextmanager
    def between_forwards(self) -> Iterator[None]:
        """Waits until no other thread is inside, and lets none begin: its mask and its attention must fit together."""
        with self._changed:
            me = threading.current_thread()
            while any(thread.is_alive() for thread in self._inside if thread is not me):
                self._changed.wait(PATIENCE)
            yield

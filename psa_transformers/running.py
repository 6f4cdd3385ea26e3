"""Which threads run a forward of a patched model: several may, and one of them may end the patch."""

from __future__ import annotations

import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

PATIENCE = 0.1  # seconds after which to look again
LONG = 60.0  # seconds after which to say what is waited for


class StaysHere:
    """What hooks of a model belong to. Copies and pickles meet it: they would belong to this model, not to the copy."""

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise TypeError("a model with PSA cannot be copied or pickled: call restore() first")


class Running(StaysHere):
    """Knows who is inside of the decoder or of a model around it, by hooks on each of them.

    A forward that ends with an error does not say so, and dynamo may compile either hook of a model to nothing. So what
    a thread's stack holds is what counts; what the hooks say only spares a look at it.
    """

    def __init__(self, around: Sequence[torch.nn.Module]) -> None:
        """
        Args:
            around: the models, from the outermost to the decoder. A depth is a place in it.
        """
        self._around = weakref.WeakSet(around)
        self._changed = threading.Condition(threading.RLock())
        self._inside: dict[threading.Thread, tuple[int, int]] = {}  # the first and the last depth of a forward

    def enter(self, depth: int) -> bool:
        """Before a forward of a model; whether this is the outermost that the thread is inside of."""
        me = threading.current_thread()
        with self._changed:
            first, last = self._inside.get(me, (depth, depth))
            begins = depth <= last  # a forward goes ever deeper: the last one has ended without a word
            self._inside[me] = (depth if begins else first, depth)
        return begins

    def leave(self, depth: int) -> None:
        """After a forward of a model."""
        me = threading.current_thread()
        with self._changed:
            if me in self._inside and depth <= self._inside[me][0]:
                del self._inside[me]
                self._changed.notify_all()

    @contextmanager
    def between_forwards(self) -> Iterator[None]:
        """Waits until no other thread is inside, and lets none begin: its mask and its attention must fit together."""
        me, told = threading.current_thread(), time.monotonic() + LONG
        with self._changed:
            while inside := [thread.name for thread in self._inside if thread is not me and self._holds(thread)]:
                if time.monotonic() > told:
                    told = float("inf")
                    warnings.warn(
                        f"restore() waits for a forward of the model to end, in {', '.join(inside)}", stacklevel=4
                    )
                self._changed.wait(PATIENCE)
            yield

    def _holds(self, thread: threading.Thread) -> bool:
        """Whether a thread is inside: PyTorch calls hooks from a frame that is there for as long as the forward."""
        frame = sys._current_frames().get(thread.ident or 0)
        while frame is not None:
            if frame.f_code.co_name == "_call_impl" and any(
                frame.f_locals.get("self") is each for each in self._around
            ):
                return True
            frame = frame.f_back
        return False

"""Runs over timesteps that the user tells, which several loops may do at the same time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch


@dataclass(eq=False)
class _Entry:
    """Timesteps, and who told them: the thread, and the frame that has the `with` statement."""

    timesteps: torch.Tensor
    thread: int
    frame: FrameType


class ToldRuns:
    """The timesteps that are told now.

    Of several, those of the calling function hold, or of the nearest caller: generators and coroutines take turns.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    @contextmanager
    def tell(self, timesteps: torch.Tensor | Sequence[float]) -> Iterator[None]:
        """Tell timesteps for the time of a `with` block.

        Raises:
            ValueError: they are not a sequence of finite numbers.
        """
        # The caller of this one is contextlib's.
        entry = _Entry(as_timesteps(timesteps), threading.get_ident(), sys._getframe(2))
        self._entries.append(entry)
        try:
            yield
        finally:
            self._entries.remove(entry)

    def current(self) -> torch.Tensor | None:
        """Those that a caller tells, or else the latest; None if none are told."""
        told = self.of_a_caller()
        return self.latest() if told is None else told

    def of_a_caller(self) -> torch.Tensor | None:
        """Those of the nearest caller whose `with` block goes on; None if no caller has one."""
        frame: FrameType | None = sys._getframe(1) if self._entries else None
        while frame is not None:
            for entry in reversed(self._entries):
                if entry.frame is frame:
                    return entry.timesteps
            frame = frame.f_back
        return None

    def latest(self) -> torch.Tensor | None:
        """The latest of this thread, or else of any."""
        here = threading.get_ident()
        told = sorted(self._entries, key=lambda entry: entry.thread == here)
        return told[-1].timesteps if told else None


def as_timesteps(values: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """The timesteps that a user tells, as a new float tensor `[steps]` on the CPU.

    Raises:
        ValueError: they are not a sequence of finite numbers.
    """
    try:
        timesteps = torch.as_tensor(values, dtype=torch.float32, device="cpu").clone()
    except (TypeError, ValueError, RuntimeError):
        timesteps = torch.empty(0)
    if timesteps.dim() != 1 or not len(timesteps) or not bool(timesteps.isfinite().all()):
        raise ValueError(f"timesteps={values!r}: expected the timesteps of all denoising steps, a sequence of numbers")
    return timesteps

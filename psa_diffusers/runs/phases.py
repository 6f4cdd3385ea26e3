"""Where the seconds of a run went, from the first import to the report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from psa_diffusers.environment import compiled_kernels_folder

# The phases in order, with their names for the user. If anything compiles kernels, it is the first calls.
PHASES = {
    "imports": "imports",
    "loading": "loading the model",
    "preparation": "text encoding",
    "first_calls": "first calls",
    "dense_steps": "dense steps",
    "sparse_steps": "sparse steps",
    "decoding": "decoding",
    "files": "videos and figures",
    "report": "report",
    "other": "other",
}
NOTICEABLE = 0.05  # seconds, which one digit shows as more than nothing


class Phases:
    """Seconds by phase, summed over all prompts.

    Args:
        imports: seconds that imports took before this was made.
    """

    def __init__(self, imports: float = 0.0) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._seconds["imports"] = imports
        self._started = time.perf_counter() - imports

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Wraps the code of a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def add_video(self, seconds: Mapping[str, Any], dense_at: Sequence[int] | None) -> None:
        """Count one call of the pipeline.

        Args:
            seconds: those of `Generated`.
            dense_at: which steps were dense, counted from 0; None for a dense run.
        """
        kinds = by_kind(seconds["per_step"], dense_at)
        for name, kind in zip(("dense_steps", "sparse_steps"), kinds, strict=True):
            extra = first_call(kind)
            self._seconds[name] += sum(kind) - extra
            self._seconds["first_calls"] += extra
        self._seconds["preparation"] += seconds["prepare"]
        self._seconds["decoding"] += seconds["decode"]

    def seconds(self) -> dict[str, float]:
        """Seconds of all phases, of what belongs to no phase ("other"), and the total until now."""
        total = time.perf_counter() - self._started
        other = max(0.0, total - sum(self._seconds.values()))
        return {name: round(took, 3) for name, took in {**self._seconds, "other": other, "total": total}.items()}


def by_kind(per_step: Sequence[float], dense_at: Sequence[int] | None) -> tuple[list[float], list[float]]:
    """The seconds of dense and of sparse steps; `dense_at` as in `Phases.add_video`."""
    dense = [took for at, took in enumerate(per_step) if dense_at is None or at in dense_at]
    sparse = [took for at, took in enumerate(per_step) if dense_at is not None and at not in dense_at]
    return dense, sparse


def first_calls(per_step: Sequence[float], dense_at: Sequence[int] | None) -> float:
    """How much longer the first step of each kind took than the others of its kind: what it took to compile, if any."""
    return sum(map(first_call, by_kind(per_step, dense_at)))


def first_call(steps: Sequence[float]) -> float:
    """How much longer the first of some steps took than the median of the others; 0 where it did not."""
    return max(0.0, steps[0] - median(steps[1:])) if len(steps) > 1 else 0.0


def settled(steps: Sequence[float]) -> float:
    """The seconds of steps of one kind, their first call left out; not their median, as some make lists for others."""
    return sum(steps) - first_call(steps)


def as_rows(seconds: Mapping[str, float]) -> list[tuple[str, str]]:
    """A row for each phase that took a noticeable time, and one for the total."""
    shown = [(words, seconds[name]) for name, words in PHASES.items() if seconds.get(name, 0.0) >= NOTICEABLE]
    return [(words, f"{took:.1f} s") for words, took in [*shown, ("in all", seconds["total"])]]


def as_line(seconds: Mapping[str, float], device: str) -> str:
    """All phases in one line."""
    line = "seconds: " + ", ".join(f"{words} {took.removesuffix(' s')}" for words, took in as_rows(seconds))
    if not device.startswith("cuda"):
        return line
    return f"{line}; first calls may compile kernels, which are kept for later runs in {compiled_kernels_folder()}"

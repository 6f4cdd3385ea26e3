"""Progress of a run, in lines for a log. A terminal shows progress bars instead."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import mean

FILES = "writing videos and figures"
SECONDS_APART = 20.0


def tell(line: str) -> None:
    """Write a line to stderr, unless it is a terminal."""
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


class Progress:
    """Writes a line for each stage of each prompt, with the time left, estimated from earlier stages.

    Args:
        prompts: how many prompts are to be made.
        videos: the names of each prompt's videos, in the order in which they are made.
        processes: how many processes share the prompts.
    """

    def __init__(self, prompts: int, videos: Sequence[str], processes: int = 1) -> None:
        self._prompts, self._stages, self._processes = prompts, [*videos, FILES], processes
        self._seconds: dict[str, list[float]] = {}

    @contextmanager
    def stage(self, prompt: int, name: str) -> Iterator[None]:
        """Wraps one stage.

        Args:
            prompt: which of the prompts, from 0.
            name: the name of the video, or `FILES`.
        """
        left = self._left(prompt, name)
        known = "" if left is None else f"; about {duration(left)} left"
        tell(f"prompt {prompt + 1} of {self._prompts}: {name}{known}")
        started = time.perf_counter()
        yield
        self._seconds.setdefault(name, []).append(time.perf_counter() - started)

    def _left(self, prompt: int, name: str) -> float | None:
        """Seconds that this stage and all later ones take; None before any video was made."""
        videos = [mean(seconds) for stage, seconds in self._seconds.items() if stage != FILES]
        if not videos:
            return None
        guess = {FILES: 0.0}  # for a stage that was not reached yet
        each = {
            stage: mean(self._seconds[stage]) if stage in self._seconds else guess.get(stage, mean(videos))
            for stage in self._stages
        }
        rest = sum(each[stage] for stage in self._stages[self._stages.index(name) :])
        return rest + (self._prompts - prompt - 1) / self._processes * sum(each.values())


class StepLog:
    """Writes a line now and then while the steps of one video go on.

    Args:
        name: the video's name.
        now: the clock, in seconds.
    """

    def __init__(self, name: str, now: Callable[[], float] = time.perf_counter) -> None:
        self._name, self._now = name, now
        self._last, self._told = -1, now()
        self._first = (0, self._told)

    def done(self, step: int, steps: int) -> None:
        """Write a line about a finished step, counted from 0, if the last line is old and the step is not the last."""
        at = self._now()
        if step <= self._last or self._last < 0:  # the first step, which may compile, or the first of another loop
            self._first = (step, at)
        self._last = step
        if at - self._told < SECONDS_APART or step + 1 >= steps:
            return
        self._told = at
        first, began = self._first
        left = f", about {duration((at - began) / (step - first) * (steps - step - 1))} left" if step > first else ""
        tell(f"{self._name}: step {step + 1} of {steps}{left}")


def duration(seconds: float) -> str:
    """Seconds in words: `45 s`, `3 min 20 s`, `1 h 5 min`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"

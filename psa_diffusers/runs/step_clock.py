"""Times a pipeline run step by step, without changing what it computes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from types import MethodType
from typing import Any


def step_count(pipe: Any) -> int:
    """How many denoising steps the current run has; modular pipelines do not say it themselves."""
    return getattr(pipe, "num_timesteps", len(pipe.scheduler.timesteps))


@dataclass
class StepClock:
    """The times of a pipeline run: start, first transformer call, end of every step, end. Each waits for the GPU."""

    device: str
    finite: bool = True
    _marks: list[float] = field(default_factory=list)
    _start: float = 0.0
    _first_call: float | None = None
    _end: float = 0.0

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:
        """Start the clock, and stop it on leaving."""
        import torch

        from psa_diffusers.patch.modules import find_transformers

        hooks = [part.register_forward_pre_hook(self._called) for part in find_transformers(pipe).values()]
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        self._start = self._now()
        try:
            yield
        finally:
            self._end = self._now()
            for hook in hooks:
                hook.remove()

    def step(self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """A callback for `callback_on_step_end`, which changes nothing."""
        self._marks.append(self._now())
        if index + 1 == step_count(pipe):
            self.finite = self.finite and bool(values["latents"].isfinite().all())
        return {}

    @contextmanager
    def following_scheduler(self, pipe: Any, done: Callable[..., Any]) -> Iterator[None]:
        """Call `done` after each step as `callback_on_step_end`, for pipelines that take no such callback."""
        scheduler = pipe.scheduler

        def step(this: Any, *arguments: Any, **settings: Any) -> Any:
            result = type(this).step(this, *arguments, **settings)
            if this is scheduler:  # a pipeline may have a copy for its sound
                done(pipe, len(self._marks), None, {"latents": result[0]})
            return result

        scheduler.step = MethodType(step, scheduler)
        try:
            yield
        finally:
            del scheduler.step

    def seconds(self) -> dict[str, Any]:
        """Seconds in total, before the first step, in every step, and after the last."""
        begin = self._start if self._first_call is None else self._first_call
        marks = [begin, *self._marks]
        steps = [after - before for before, after in pairwise(marks)]
        return {
            "total": self._end - self._start,
            "prepare": begin - self._start,
            "denoise": sum(steps),
            "decode": self._end - marks[-1],
            "per_step": steps,
            "median_step": median(steps) if steps else None,
        }

    def peak_memory_gib(self) -> float | None:
        """Most memory that torch held on a CUDA device since the start; None elsewhere."""
        import torch

        if not self.device.startswith("cuda"):
            return None
        return round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)

    def _called(self, module: Any, arguments: Any) -> None:
        if self._first_call is None:
            self._first_call = self._now()

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()

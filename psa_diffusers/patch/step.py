"""Where a pipeline stands in its denoising run, read from the pipeline itself: no call is counted as a step."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from psa_diffusers.diffusers_internals import step_count

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class DenoisingStep:
    """What one forward of a transformer belongs to.

    Attributes:
        run: number of the run, counted from 1; each call of the pipeline is one.
        step, steps: the step, counted from 0, and how many the run has, over all transformers.
        branch: 0 for the first forward of this transformer in this step, 1 for the second (guidance), ...
        grid: video tokens along frames, height and width; None where the model was not told.
    """

    run: int
    step: int
    steps: int
    branch: int
    grid: Grid | None


class DenoisingTracker:
    """Knows the current `DenoisingStep` of a pipeline.

    A forward pre-hook on each transformer asks the pipeline's scheduler, before anything else touches the inputs.
    Counting calls instead would go wrong with guidance switched off, caches that skip calls, two experts and runs that
    were aborted.
    """

    def __init__(self, pipe: Any, token_grid: Callable[[torch.nn.Module, Mapping[str, Any]], Grid | None]) -> None:
        self._pipe = weakref.ref(pipe)
        self._token_grid = token_grid
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._timesteps: torch.Tensor | None = None
        self._forwards: dict[int, int] = {}
        self._run = 0
        self.current: DenoisingStep | None = None

    def attach(self, transformer: torch.nn.Module) -> None:
        """Watch the forwards of one of the pipeline's transformers."""
        self._handles.append(transformer.register_forward_pre_hook(self._observe, with_kwargs=True, prepend=True))

    def detach(self) -> None:
        """Stop watching."""
        while self._handles:
            self._handles.pop().remove()
        self.current = None

    # Compiled into a graph of the whole transformer, it would be run from what it saw the first time.
    @torch.compiler.disable
    def _observe(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        previous, self.current = self.current, None
        pipe = self._pipe()
        inputs = {**dict(zip(_argument_names(type(transformer)), args, strict=False)), **kwargs}
        position = None if pipe is None else denoising_position(pipe, inputs.get("timestep"))
        if position is None:
            return
        step, steps = position
        # Every run sets its timesteps anew, so another tensor is another run, also where both runs have one step only.
        if self._timesteps is not pipe.scheduler.timesteps or (previous and step < previous.step):
            self._timesteps = pipe.scheduler.timesteps
            self._run += 1
            previous = None
        if previous is None or previous.step != step:
            self._forwards = {}
        branch = self._forwards.get(id(transformer), 0)
        self._forwards[id(transformer)] = branch + 1
        self.current = DenoisingStep(self._run, step, steps, branch, self._token_grid(transformer, inputs))


@functools.cache
def _argument_names(transformer: type[torch.nn.Module]) -> tuple[str, ...]:
    """Names of what the forward of a class of transformers takes, in order."""
    return tuple(inspect.signature(transformer.forward).parameters)[1:]


def denoising_position(pipe: Any, timestep: torch.Tensor | None) -> tuple[int, int] | None:
    """The current step, counted from 0, and the number of steps of the pipeline's run; None where neither is known.

    Args:
        pipe: a diffusers pipeline with a scheduler.
        timestep: what the transformer was given, of any shape: used with schedulers that have no step index.
    """
    scheduler = getattr(pipe, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not len(timesteps):
        return None
    steps = step_count(pipe, timesteps)
    if hasattr(scheduler, "step_index"):
        index = scheduler.step_index
        if index is not None:
            step = index - (len(timesteps) - steps)
        elif timestep is not None and timestep.dim() > 1:
            # Diffusion forcing steps copies of the scheduler, one a frame, and this one never.
            step = _nearest(timesteps[-steps:], timestep)
        else:
            step = 0  # the run's first step is still to come
    elif timestep is not None:
        step = _nearest(timesteps[-steps:], timestep)
    else:
        return None
    return (step, steps) if 0 <= step < steps else None


def _nearest(timesteps: torch.Tensor, timestep: torch.Tensor) -> int:
    """Which of the timesteps is meant: that of the largest entry, because image conditions have timestep 0, and the
    nearest, because it may have been cast."""
    return int((timesteps.float() - timestep.float().max().to(timesteps.device)).abs().argmin())

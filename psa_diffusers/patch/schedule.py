"""Finds out which denoising step a forward belongs to, from the scheduler and the timestep that the model is given.

Counting calls would go wrong if guidance is switched off, caches skip calls, there are two experts, or a run is
aborted. Asking only the patched pipeline would go wrong if several pipelines share the transformer.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple, Self

import torch
from torch.utils.weak import WeakIdKeyDictionary

from psa_diffusers.diffusers_internals import step_count
from psa_diffusers.patch.frames import local_variables
from psa_diffusers.patch.modules import TRANSFORMERS, unwrapped
from psa_diffusers.patch.told_runs import ToldRuns

UNKNOWN = "the denoising step is unknown, because "
TOLD = "; tell it the run's timesteps: `with psa.run(timesteps):` around the loop"


class UnknownStepError(Exception):
    """The denoising step cannot be known; the message says why."""


@dataclass(frozen=True)
class Position:
    """A step of a run.

    Attributes:
        timesteps: those of the run's scheduler; another tensor means another run.
        index: place of the step among them.
        first: place of the run's first step; None if it can only be taken from the run's first forward.
    """

    timesteps: torch.Tensor
    index: int
    first: int | None


class LastForward(NamedTuple):
    """What is known of a run's forward before, which decides between steps whose timesteps look equal.

    Attributes:
        place: that of its step among the timesteps.
        was_last: whether its step seems to have had all its forwards.
    """

    place: int
    was_last: bool = False


# From the timesteps of a run its last forward, or None if the first one is still to come.
Before = Callable[[torch.Tensor], LastForward | None]


class Schedule:
    """Finds the position of a forward.

    The timesteps are those that `told` has. Without these, they are those of the running pipeline, which is looked for
    among the callers. If none runs, they are those of the patched pipeline, if somebody has set them.

    Args:
        pipe: the pipeline that was patched. Only its scheduler is kept alive, because a pipeline that is made of its
            parts goes on using that.
        expected: from a scheduler, the timesteps that a transformer is given at each step, `[steps]`.
    """

    def __init__(
        self, pipe: Any, expected: Callable[[Any], torch.Tensor] = lambda scheduler: scheduler.timesteps
    ) -> None:
        self._pipe, self._expected = weakref.ref(pipe), expected
        self._scheduler = getattr(pipe, "scheduler", None)
        self.told = ToldRuns()
        # By the timesteps of each run that may go on: whoever replaces them begins another.
        self._copied: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()
        # The first timestep that was not found where it was looked for: a loop has another at each step, and all of
        # them are to give one warning.
        self._strange: dict[str, str] = {}

    def patched_timesteps(self) -> torch.Tensor | None:
        """The timesteps of the patched pipeline's scheduler now."""
        return _timesteps(self._patched_scheduler())

    def missed_since(self, timesteps: torch.Tensor | None, patched: Mapping[str, Any]) -> int | None:
        """How many steps the patched pipeline's last run had, if it ran without the patched transformers; else None.

        Args:
            timesteps: what its scheduler had when the last run began that went through the patch.
            patched: the transformers by name.
        """
        pipe, now = self._pipe(), self.patched_timesteps()
        if pipe is None or now is None or now is timesteps:
            return None
        return len(now) if self.replaced(patched) else None

    def replaced(self, patched: Mapping[str, Any]) -> list[str]:
        """The names of the patched transformers in whose place the pipeline has another one now.

        Args:
            patched: the transformers by name.
        """
        now = {name: unwrapped(getattr(self._pipe(), name, None)) for name in patched}
        return [name for name, module in patched.items() if now[name] is not None and now[name] is not module]

    def position(
        self, transformer: torch.nn.Module, timestep: Any, before: Before = lambda timesteps: None
    ) -> Position:
        """The position of a forward.

        Args:
            timestep: the timestep that the transformer was given, a number or a tensor of any shape.
            before: tells the forward before it in its run.

        Raises:
            UnknownStepError: it cannot be found.
        """
        timestep = None if timestep is None else torch.as_tensor(timestep)
        told = self.told.of_a_caller()
        pipe = running_pipeline(transformer) if told is None else None
        given = None if timestep is None or _is_capturing(timestep) else self._value(timestep, pipe)
        if told is not None:
            return self._position_in_told(told, timestep, given, before)
        if pipe is not None and (timesteps := _timesteps(pipe.scheduler)) is not None:
            first = len(timesteps) - step_count(pipe, timesteps) if hasattr(pipe, "_num_timesteps") else None
            return self._position(pipe.scheduler, timesteps, first, timestep, given, before)
        if (told := self.told.latest()) is not None:
            return self._position_in_told(told, timestep, given, before)
        scheduler = self._patched_scheduler()
        if (timesteps := _timesteps(scheduler)) is None or not _is_set(scheduler, timesteps):
            raise UnknownStepError(
                f"{UNKNOWN}no pipeline is running, and the patched pipeline's scheduler has no timesteps set{TOLD}"
            )
        return self._position(scheduler, timesteps, None, timestep, given, before)

    def _position_in_told(
        self, told: torch.Tensor, timestep: torch.Tensor | None, given: float | None, before: Before
    ) -> Position:
        last = before(told) or LastForward(0)
        index = self._find(_Expected.of(told), timestep, given, "those that psa.run was told", last)
        return Position(told, index, 0)

    def _position(
        self,
        scheduler: Any,
        timesteps: torch.Tensor,
        first: int | None,
        timestep: torch.Tensor | None,
        given: float | None,
        before: Before,
    ) -> Position:
        expected = self._expected_of(scheduler, timesteps)
        values = expected.values
        begin = getattr(scheduler, "begin_index", None)
        first = begin if first is None else first
        index = getattr(scheduler, "step_index", None)
        name = f"the {len(values)} timesteps of {type(scheduler).__name__}"
        # Diffusion forcing steps copies of the scheduler, one for each frame, and never this one.
        if index is None and hasattr(scheduler, "step_index") and (timestep is None or timestep.dim() < 2):
            index = first or 0  # the run's first step is still to come
            if given is not None and not (index < len(values) and expected.is_meant(index, given)):
                index = None  # or the run is stepped without its scheduler
        if index is None:
            last = before(timesteps) or LastForward(first or 0)
            return Position(timesteps, self._find(expected, timestep, given, name, last), first)
        if not (first or 0) <= index < len(values):
            raise UnknownStepError(f"{UNKNOWN}the run over {name} has ended{TOLD}")
        if given is not None and not expected.is_near(index, given):
            strange = self._strange.setdefault(f"where {name} are", f"{given:g} where {name} are at {values[index]:g}")
            raise UnknownStepError(f"{UNKNOWN}the model is given other timesteps, such as {strange}{TOLD}")
        return Position(timesteps, index, first)

    def _find(
        self, expected: _Expected, timestep: torch.Tensor | None, given: float | None, name: str, last: LastForward
    ) -> int:
        """Place of the timestep nearest to the given one.

        If there are several, as second-order schedulers have and as rounding makes them: the first one from the last
        forward's on, or past that if its step has had all its forwards.
        """
        if timestep is None or given is None:
            raise UnknownStepError(f"{UNKNOWN}the model was given no timestep that could be looked up{TOLD}")
        distances = [abs(value - given) for value in expected.rounded(timestep.dtype)]
        least = min(distances)
        places = [place for place, distance in enumerate(distances) if distance == least]
        later = [place for place in places if place >= last.place]
        index = later[last.was_last and len(later) > 1 and later[0] == last.place] if later else places[0]
        if not expected.is_near(index, given):
            strange = self._strange.setdefault(name, f"{given:g}")
            raise UnknownStepError(f"{UNKNOWN}timesteps such as {strange} are none of {name}{TOLD}")
        return index

    def _expected_of(self, scheduler: Any, timesteps: torch.Tensor) -> _Expected:
        """What a transformer is given in a run; copied once, because each copy waits for the device."""
        if (copied := self._copied.get(timesteps)) is None:
            copied = self._copied[timesteps] = _Expected.of(self._expected(scheduler).detach().float())
        return copied

    def _value(self, timestep: torch.Tensor, pipe: Any | None) -> float | None:
        """The timestep of a forward as a number, without waiting for the device where it is a view of a scheduler's."""
        timesteps = None if pipe is None else _timesteps(pipe.scheduler)
        if timesteps is None or (place := _place_in(timestep, timesteps)) is None:
            return _largest(timestep)
        if (values := self._values.get(timesteps)) is None:
            values = self._values[timesteps] = timesteps.detach().tolist()
        value = float(values[place])
        return value if math.isfinite(value) else None

    def _patched_scheduler(self) -> Any:
        return getattr(self._pipe(), "scheduler", self._scheduler)


def running_pipeline(transformer: torch.nn.Module) -> Any | None:
    """The running pipeline: the innermost caller that has a scheduler with timesteps and this transformer.

    A modular pipeline hands itself to its blocks by the name `components`.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        names = [name for name in ("self", "components") if name in code.co_varnames[: code.co_argcount]]
        for owner in local_variables(frame, names).values() if names else ():
            if owner is not transformer and _runs(owner, transformer):
                return owner
        frame = frame.f_back
    return None


def _runs(owner: Any, transformer: torch.nn.Module) -> bool:
    if isinstance(owner, torch.nn.Module) or _timesteps(getattr(owner, "scheduler", None)) is None:
        return False
    return any(unwrapped(getattr(owner, name, None)) is transformer for name in TRANSFORMERS)


class _Expected(NamedTuple):
    """What a transformer is given at each step, as plain numbers, and how far off one of them may be."""

    values: list[float]
    cut: float

    @classmethod
    def of(cls, timesteps: torch.Tensor) -> Self:
        values = timesteps.tolist()
        return cls(values, 1.0 if max(values) > 2 else 2**-8)

    def is_near(self, index: int, given: float) -> bool:
        """Whether a timestep equals the given one, which may have been cast to bfloat16 or cut to an integer."""
        return abs(self.values[index] - given) <= abs(self.values[index]) * 2**-8 + self.cut

    def rounded(self, dtype: torch.dtype) -> list[float]:
        """The values as they are in the dtype of a given timestep."""
        return torch.tensor(self.values).to(dtype).tolist() if dtype.is_floating_point else self.values

    def is_meant(self, index: int, given: float) -> bool:
        """Whether the given timestep is that of a step, perhaps rounded, and no other step has it exactly.

        Early steps may be nearer to each other than rounding is to them.
        """
        value = self.values[index]
        return given == value or (given not in self.values and given in _roundings(value))


def _roundings(value: float) -> set[float]:
    """What pipelines may make of a timestep: an integer, or a number of few bits, or both."""
    found = torch.tensor([value, math.trunc(value), round(value)])
    return {x for dtype in (torch.float32, torch.float16, torch.bfloat16) for x in found.to(dtype).tolist()}


def _place_in(timestep: torch.Tensor, timesteps: torch.Tensor) -> int | None:
    """Which entry of a run's timesteps a timestep is a view of, perhaps expanded; None if it has memory of its own."""
    if timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return None
    if timesteps.dim() != 1 or not _is_one_number(timestep):
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    apart = int(timestep.storage_offset()) - int(timesteps.storage_offset())
    place, between = divmod(apart, max(timesteps.stride(0), 1))
    return place if not between and 0 <= place < len(timesteps) else None


def _is_one_number(timestep: torch.Tensor) -> bool:
    """Whether a timestep is a single number in memory, for all samples."""
    return timestep.numel() == 1 or (timestep.numel() > 0 and not any(timestep.stride()))


def _largest(timestep: torch.Tensor) -> float | None:
    """The timestep of a forward: the largest entry, because image conditions have timestep 0."""
    largest = timestep.as_strided((), ()) if _is_one_number(timestep) else timestep.float().max()
    value = float(largest.item())
    return value if math.isfinite(value) else None


def _is_capturing(timestep: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which no value can be read."""
    return timestep.is_cuda and torch.cuda.is_current_stream_capturing()


def _timesteps(scheduler: Any) -> torch.Tensor | None:
    timesteps = getattr(scheduler, "timesteps", None)
    return timesteps if torch.is_tensor(timesteps) and len(timesteps) else None


def _is_set(scheduler: Any, timesteps: torch.Tensor) -> bool:
    """Whether somebody set the timesteps: a new scheduler has all timesteps of its training."""
    trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    return trained is None or len(timesteps) < trained

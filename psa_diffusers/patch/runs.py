"""The denoising runs of one processor: those that may go on, and what the last one attended."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from psa_diffusers.patch.dense_reasons import PSAFallbackWarning
from psa_diffusers.patch.list_cache import keeps_lists
from psa_diffusers.patch.run import DenseSteps, Forward, Note, Route, Run
from psa_diffusers.patch.schedule import LastForward, Schedule
from psa_diffusers.patch.stated_step import UNSEEN, StatedStep, is_capturing
from psa_diffusers.patch.stats import RunStats, summed_up
from psa_presets import Preset

MISSED = (
    "the pipeline has begun a run of {steps} steps since with another transformer, which is not patched; patch the "
    "pipeline again"
)
MISSED_STEPS = (
    "pipe.{name} is not the transformer that was patched, so that the steps without figures were its own, dense; patch "
    "the pipeline again"
)
ALL_DENSE = "attention is dense: a run of length {steps} has no sparse step with the preset {why}"


class Runs:
    """Keeps track of runs. Several may go on by turns: of pipelines that share a transformer, or in several threads.

    A run is known by the tensor of its scheduler's timesteps, which every run sets anew. When that is gone, so is what
    the run keeps.

    Args:
        pipe: the pipeline that was patched; is not kept alive.
        presets: by the name of the transformer.
        layers: names of the layers of each transformer.
        expected: from a scheduler, the timesteps that a transformer is given at each step, `[steps]`.

    Attributes:
        stated: what the user states of the forwards that follow, inside `told`.
    """

    def __init__(
        self,
        pipe: Any,
        presets: Mapping[str, Preset],
        layers: Mapping[str, Collection[str]],
        expected: Callable[[Any], torch.Tensor],
    ) -> None:
        self._schedule = Schedule(pipe, expected)
        self._presets, self._layers = presets, layers
        self._keeps = {name: keeps_lists(preset) or preset.correction for name, preset in presets.items()}
        self._by_timesteps: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._count = 0
        # The last one that had a forward.
        self._run = Run(pipe_timesteps=self._patched_timesteps())
        # All calls outside of a run share one list, which is counted and emptied now and then.
        self._strays, self._stray_notes, self._stray_reasons = Run(), list[Note](), Counter[str]()
        self._told: set[int] = set()
        self.stated: StatedStep | None = None
        self._unseen_told = False

    def enter(self, transformer: torch.nn.Module, name: str, timestep: Any, latents: torch.Tensor | None) -> Forward:
        """Begin a forward of a transformer. The routes of its layers are still to be decided.

        Args:
            timestep: the timestep that the transformer was given, a number or a tensor of any shape.
            latents: of its input, those that its guidance branches have in common.

        Raises:
            UnknownStepError: the denoising step cannot be known.
        """
        if self.stated is not None:
            return self._enter_stated(self.stated)
        kept = latents if self._keeps[name] else None

        def before(timesteps: torch.Tensor) -> LastForward | None:
            found = self._by_timesteps.get(timesteps)
            return None if found is None else LastForward(found.first + found.step, found.step_is_full(name, kept))

        at = self._schedule.position(transformer, timestep, before)
        run: Run | None = self._by_timesteps.get(at.timesteps)
        if run is None:
            run = self._begin(at.timesteps, at.index if at.first is None else at.first)
        elif at.index < run.first + run.step or run.is_another(name, latents):
            run = self._begin(at.timesteps, min(at.index, run.first) if at.first is None else at.first)
        self._run, run.lists.last_step = run, run.steps - 1
        step = at.index - run.first
        if step != run.step:
            for expert in run.experts_left():
                run.forget(self._layers[expert])
        window, branch = run.enter(step, name, latents if run.steps == 1 else kept)
        forward = Forward(run, step, {}, branch, window)
        run.notes.append(forward.notes)
        return forward

    def leave(self, forward: Forward) -> None:
        """After a forward: drop what is kept for later ones if it was the last of its run."""
        if not forward.stated and forward.run.is_over():
            forward.run.forget(self._names())
            forward.run.full_lists.clear()

    def forget(self, transformer: str) -> None:
        """Drop what all runs keep of a transformer's layers for later forwards."""
        for run in (self._run, *self._by_timesteps.values()):
            run.forget(self._layers[transformer])

    def _enter_stated(self, stated: StatedStep) -> Forward:
        """Begin a forward whose step the user stated, so that nothing has to be read from the device."""
        told = self._schedule.told.current()
        assert told is not None, "a step is stated inside a run that was told"
        self._run = run = self._by_timesteps.get(told) or self._begin(told, 0)
        captured = is_capturing()
        forward = Forward(run, stated.index, {}, stated.branch, stated=True, captured=captured)
        if not captured:
            run.notes.append(forward.notes)
        elif not self._unseen_told:
            self._unseen_told = True
            warnings.warn(UNSEEN, UserWarning, stacklevel=3)
        return forward

    def told_steps(self) -> int | None:
        """How many steps the run has that the user told of; None if there is none."""
        told = self._schedule.told.current()
        return None if told is None else len(told)

    def outside(self, routes: Mapping[str, Route]) -> Forward:
        """A forward, or single calls, outside of any known run."""
        self._count_strays()
        return Forward(self._strays, 0, routes, notes=self._stray_notes)

    def told(self, timesteps: torch.Tensor | Sequence[float]) -> AbstractContextManager[None]:
        """A run over these timesteps, whatever any scheduler has."""
        return self._schedule.told.tell(timesteps)

    def stats(self, patched: Mapping[str, Any]) -> RunStats:
        """Sum up the last run; waits for the device.

        Args:
            patched: the transformers that still have the patch, by name.
        """
        self._count_strays()
        missed = self._schedule.missed_since(self._run.pipe_timesteps(), patched)
        if missed is None:
            return summed_up(self._run, self._names(), self._stray_reasons, self._why_steps_are_missing(patched))
        return summed_up(Run(self._run.number, missed), self._names(), Counter(), MISSED.format(steps=missed))

    def _names(self) -> list[str]:
        """The names of all layers, in order."""
        return [layer for layers in self._layers.values() for layer in layers]

    def _why_steps_are_missing(self, patched: Mapping[str, Any]) -> str | None:
        """Why there are steps that no patched transformer computed, if that can be known."""
        if len({note.step for notes in self._run.notes for note in notes}) >= self._run.steps:
            return None
        return next((MISSED_STEPS.format(name=name) for name in self._schedule.replaced(patched)), None)

    def _begin(self, timesteps: torch.Tensor, first: int) -> Run:
        steps = len(timesteps) - first
        dense = {name: DenseSteps.of(preset, steps) for name, preset in self._presets.items()}
        self._count += 1
        run = self._by_timesteps[timesteps] = Run(self._count, steps, dense, first, self._patched_timesteps())
        self._tell_if_all_dense(run)
        self._stray_notes.clear()
        self._stray_reasons.clear()
        return run

    def _patched_timesteps(self) -> Callable[[], torch.Tensor | None]:
        """What `Run.pipe_timesteps` is for a run that begins now."""
        timesteps = self._schedule.patched_timesteps()
        return (lambda: None) if timesteps is None else weakref.ref(timesteps)

    def _tell_if_all_dense(self, run: Run) -> None:
        """Warn, once for each number of steps, if the preset keeps every step of such a short run dense."""
        steps = run.steps
        if steps in self._told or any(len(dense.steps) < steps for dense in run.dense.values()):
            return
        short = {preset.name: preset for preset in self._presets.values() if not preset.is_all_dense}
        if short:
            self._told.add(steps)
            why = " and ".join(
                f"{name} (dense_steps {each.dense_steps:g}, dense_last {each.dense_last:g}"
                + (", and rules for steps)" if each.steps else ")")
                for name, each in short.items()
            )
            warnings.warn(ALL_DENSE.format(steps=steps, why=why), PSAFallbackWarning, stacklevel=2)

    def _count_strays(self) -> None:
        self._stray_reasons.update(note.reason for note in self._stray_notes if note.reason is not None)
        self._stray_notes.clear()

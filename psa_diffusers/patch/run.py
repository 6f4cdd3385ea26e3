"""One denoising run, and one forward of a transformer in it: what a layer's attention has to know about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch

from psa_diffusers.patch.corrections import Corrections
from psa_diffusers.patch.list_cache import ListCache, Moment
from psa_diffusers.patch.parallel.share import Ulysses
from psa_diffusers.patch.sites import Layer
from psa_diffusers.patch.token_order import Grid
from psa_kernels import AttentionStats, BlockLists
from psa_presets import Preset

NO_GRID: Grid = (0, 0, 0)


class Route(NamedTuple):
    """How a layer is computed. `reason` says why it is dense although the preset wants it sparse.

    With `full` the preset wants it dense, and computed by the operator's kernel if that can. With `corrects` the preset
    wants it dense too, and what sparse attention would leave out is kept.
    """

    sparse: bool
    reason: str | None = None
    full: bool = False
    corrects: bool = False

    @property
    def ours(self) -> bool:
        """Whether the layer goes to the operator rather than to its module's own processor."""
        return self.sparse or self.full or self.corrects


class Note(NamedTuple):
    """One attention call: its statistics if it was sparse, and the reason if it was dense against the preset.

    `full_by` is the operator's implementation, if it was dense and the operator computed it.
    """

    step: int
    layer: str
    stats: AttentionStats | None
    reason: str | None = None
    full_by: str | None = None


class DenseSteps(NamedTuple):
    """Which steps of a run a preset keeps dense.

    Attributes:
        first, last: how many of the first and of the last steps.
        steps: all dense steps, counted from 0, including those that rules for steps keep dense.
    """

    first: int = 0
    last: int = 0
    steps: frozenset[int] = frozenset()

    @classmethod
    def of(cls, preset: Preset, num_steps: int) -> Self:
        """The dense steps of a run of `num_steps` steps."""
        dense = frozenset(range(num_steps)).difference(preset.sparse_steps(num_steps))
        return cls(preset.dense_step_count(num_steps), preset.dense_last_count(num_steps), dense)


@dataclass(eq=False)
class Run:
    """A denoising run and what is kept during it. Nothing of this outlives the run.

    Attributes:
        number: counted from 1 since the patch; 0 for calls that belong to no known run.
        steps: how many steps it has, over all transformers.
        dense: which steps the preset keeps dense, by the name of the transformer.
        first: place of the run's first step among the timesteps of its scheduler.
        pipe_timesteps: gives the timesteps that the patched pipeline's scheduler had at the run's beginning, or None if
            they are gone; the run may be another pipeline's.
        step: the current one, counted from 0.
        lists: importance lists for later steps and other guidance branches.
        corrections: what sparse attention left out at the last dense step, where the preset wants it added later.
        full_lists: by shape, the lists of dense calls that the operator computes.
        notes: for each forward its attention calls.
        watch: whether the output of each sparse attention is checked for values that are not finite.
        model_not_finite: what was not finite with dense attention either. From then on nothing is computed again.
        not_finite: layers whose sparse output was not finite, and at which steps.
    """

    number: int = 0
    steps: int = 0
    dense: Mapping[str, DenseSteps] = field(default_factory=dict)
    first: int = 0
    pipe_timesteps: Callable[[], torch.Tensor | None] = lambda: None
    step: int = 0
    lists: ListCache = field(default_factory=ListCache)
    corrections: Corrections = field(default_factory=Corrections)
    full_lists: dict[Any, BlockLists] = field(default_factory=dict)
    notes: list[list[Note]] = field(default_factory=list)
    watch: bool = False
    model_not_finite: str | None = None
    not_finite: dict[str, list[int]] = field(default_factory=dict)
    _asked: set[str] = field(default_factory=set)
    _inputs: dict[str, list[tuple[torch.Tensor | None, int]]] = field(default_factory=dict)
    _called_before: set[str] = field(default_factory=set)  # transformers, by the step before
    _forwards: int = 0  # in this step
    _forwards_before: tuple[int, ...] = ()  # in each of the last two steps before
    _most_forwards: int = 0  # in any step before

    def asks_first(self, transformer: str) -> bool:
        """True the first time a transformer's name is given: for what is looked up once a run."""
        first = transformer not in self._asked
        self._asked.add(transformer)
        return first

    def enter(self, step: int, transformer: str, latents: torch.Tensor | None) -> tuple[int, int]:
        """Begin a forward at a step; return its window and its guidance branch, each counted from 0.

        Forwards of one step with the same input are guidance branches of each other. Forwards with another input are
        other windows of a long video. Only the first sample is compared, because some branches are in one batch and
        others alone.

        Args:
            latents: the input by which windows are told apart; None if nothing is kept that windows could mix up.
        """
        if step != self.step:
            self._called_before = set(self._inputs)
            self.step, self._inputs = step, {}
            self._most_forwards = max(self._forwards, self._most_forwards)
            self._forwards_before, self._forwards = (*self._forwards_before[-1:], self._forwards), 0
        self._forwards += 1
        seen = self._inputs.setdefault(transformer, [])
        first = None if latents is None else latents[:1]
        for window, (kept, branches) in enumerate(seen):
            if first is None or _equal(kept, first):
                seen[window] = (kept, branches + 1)
                return window, branches
        seen.append((None if first is None else first.detach().clone(), 1))
        if len(seen) > 1:
            self.lists.one_step_only = True
        return len(seen) - 1, 0

    def step_is_full(self, transformer: str, latents: torch.Tensor | None) -> bool:
        """Whether the current step seems to have had all its forwards, so that this one could begin the next.

        It has as many as any step before; of the first step other latents tell, where they are known.
        """
        if self._most_forwards:
            return self._forwards >= self._most_forwards
        return self._is_new(transformer, latents)

    def is_another(self, transformer: str, latents: torch.Tensor | None) -> bool:
        """Whether a forward begins another run over the same timesteps: where there is one step, other latents tell."""
        return self.steps == 1 and self._is_new(transformer, latents)

    def _is_new(self, transformer: str, latents: torch.Tensor | None) -> bool:
        """Whether the transformer's forwards in this step had other latents."""
        seen = [kept for kept, _ in self._inputs.get(transformer, ())]
        return bool(seen) and latents is not None and not any(_equal(kept, latents[:1]) for kept in seen)

    def experts_left(self) -> set[str]:
        """At the end of a step, the transformers that the one before called and this one did not: they are done."""
        return self._called_before.difference(self._inputs)

    def is_over(self) -> bool:
        """Whether the last step has called the transformers as often as either of the two before it.

        Guidance may have ended before, so that earlier steps do not count; where it comes and goes, two steps show it.
        """
        return self.step + 1 == self.steps and 0 < max(self._forwards_before, default=0) <= self._forwards

    def forget(self, layers: Container[str]) -> None:
        """Drop what is kept of some layers for later forwards."""
        self.lists.forget(layers)
        self.corrections.forget(layers)


def _equal(kept: torch.Tensor | None, latents: torch.Tensor) -> bool:
    return kept is not None and kept.shape == latents.shape and torch.equal(kept, latents)


@dataclass(frozen=True)
class Forward:
    """One forward of a transformer.

    Attributes:
        run: the run that it belongs to.
        step: its step in the run, counted from 0.
        branch: 0 for the first forward of this transformer in this step and window, 1 for the second (guidance), ...
        window: its window; 0 unless a step's forwards have different inputs, as windows of a long video have.
        grid: video tokens along frames, height and width; `NO_GRID` if the pipeline does not tell the transformer.
        videos: how many videos of that grid a layer attends, one after another.
        routes: the route of each layer, by name.
        layers: by name, the layers as they are at this step; those that are missing are as at any other.
        share: how ranks share it; None on one device.
        watch: whether the output of each sparse attention is checked for values that are not finite.
        stated: whether the user stated its step; then it may be captured, or run again.
        transformer: its transformer, if it is captured.
        captured: whether it is being captured into a CUDA graph; then nothing on the device can be read.
        replayed: whether a graph was replayed in its place.
        notes: its attention calls so far, also in `run.notes` unless it is captured.
    """

    run: Run
    step: int
    routes: Mapping[str, Route]
    branch: int = 0
    window: int = 0
    grid: Grid = NO_GRID
    videos: int = 1
    layers: Mapping[str, Layer] = field(default_factory=dict)
    share: Ulysses | None = None
    watch: bool = False
    stated: bool = False
    captured: bool = False
    replayed: bool = False
    transformer: torch.nn.Module | None = None
    notes: list[Note] = field(default_factory=list)

    @cached_property
    def attended_grid(self) -> Grid:
        """The grid of all videos that a layer attends, the frames of one after those of the other."""
        frames, height, width = self.grid
        return self.videos * frames, height, width

    @cached_property
    def video_tokens(self) -> int:
        """How many tokens `attended_grid` has."""
        return math.prod(self.attended_grid)

    @cached_property
    def moment(self) -> Moment:
        """Its place in the run."""
        return Moment(self.step, self.window, self.branch)

    def at_step(self, layer: Layer) -> Layer:
        """A layer as it is at this step."""
        return self.layers.get(layer.name, layer)

    def note(
        self, layer: Layer, stats: AttentionStats | None, reason: str | None = None, full_by: str | None = None
    ) -> None:
        """Note one attention call of a layer; `stats` is None if it was dense."""
        self.notes.append(Note(self.step, layer.name, stats, reason, full_by))

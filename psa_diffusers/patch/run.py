"""One denoising run, and one forward of a transformer in it: all that a layer's attention has to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch

from psa_diffusers.patch.context_parallel import Ulysses
from psa_diffusers.patch.corrections import Corrections
from psa_diffusers.patch.list_cache import ListCache
from psa_diffusers.patch.sites import Layer
from psa_diffusers.patch.token_order import Grid
from psa_kernels import AttentionStats, BlockLists
from psa_presets import Preset

NO_GRID: Grid = (0, 0, 0)


class Route(NamedTuple):
    """Whether a layer is sparse, and if it is not although the preset wants it so, why.

    With `full` it is dense as the preset has it, and the operator's kernel is to compute it, if it can. With `corrects`
    it is dense likewise, and what sparse attention leaves out there is kept.
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
    """One attention call: its statistics if it was sparse, and why it was dense if that is against the preset.

    `full_by` is what computed it, if it was dense and went to the operator.
    """

    step: int
    layer: str
    stats: AttentionStats | None
    reason: str | None = None
    full_by: str | None = None


class DenseSteps(NamedTuple):
    """Which steps of a run a preset keeps dense.

    Attributes:
        first, last: how many of the first and of the last ones.
        steps: all of them, counted from 0, with those that rules for steps keep dense.
    """

    first: int = 0
    last: int = 0
    steps: frozenset[int] = frozenset()

    @classmethod
    def of(cls, preset: Preset, num_steps: int) -> Self:
        """Those of a run of so many steps."""
        dense = frozenset(range(num_steps)).difference(preset.sparse_steps(num_steps))
        return cls(preset.dense_step_count(num_steps), preset.dense_last_count(num_steps), dense)


@dataclass(eq=False)
class Run:
    """A denoising run and what is kept during it; nothing outlives it.

    Attributes:
        number: counted from 1 since the patch; 0 for calls that belong to no known run.
        steps: how many it has, over all transformers.
        dense: which of them the preset keeps dense, by the name of the transformer.
        first: place of the run's first step among `timesteps`.
        timesteps: what the run's scheduler had at its beginning: another tensor is another run.
        pipe_timesteps: the same of the pipeline that was patched, whose run it may not be.
        step: the current one, counted from 0.
        lists: importance lists for later steps and other guidance branches.
        corrections: what sparse attention left out at the last dense step, where the preset wants it added later.
        full_lists: by shape, the lists of dense calls that the operator computes.
        notes: of each forward, its attention calls.
        watch: whether each sparse attention is looked at for values that are not finite.
        model_not_finite: what was not finite with dense attention either; from then on nothing is computed again.
        not_finite: layers whose sparse output was not finite, and at which steps.
    """

    number: int = 0
    steps: int = 0
    dense: Mapping[str, DenseSteps] = field(default_factory=dict)
    first: int = 0
    timesteps: torch.Tensor | None = None
    pipe_timesteps: torch.Tensor | None = None
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

    def asks_first(self, transformer: str) -> bool:
        """True once a transformer: for what is looked up once a run."""
        first = transformer not in self._asked
        self._asked.add(transformer)
        return first

    def enter(self, step: int, transformer: str, latents: torch.Tensor | None) -> tuple[int, int]:
        """Begin a forward at a step; returns its window and its guidance branch, each counted from 0.

        Forwards of one step with the same input are guidance branches of each other, those with another input are other
        windows of a long video. The first sample tells: some branches are in one batch, and others alone.

        Args:
            latents: the input to tell windows by; None where nothing is kept that another window could be given.
        """
        if step != self.step:
            self.step, self._inputs = step, {}
        seen = self._inputs.setdefault(transformer, [])
        first = None if latents is None else latents[:1]
        for window, (kept, branches) in enumerate(seen):
            if first is None or (kept is not None and kept.shape == first.shape and torch.equal(kept, first)):
                seen[window] = (kept, branches + 1)
                return window, branches
        seen.append((None if first is None else first.detach().clone(), 1))
        if len(seen) > 1:
            self.lists.one_step_only = True
        return len(seen) - 1, 0


@dataclass(frozen=True)
class Forward:
    """One forward of a transformer.

    Attributes:
        run: which it belongs to.
        step: of the run, counted from 0.
        branch: 0 for the first forward of this transformer in this step and window, 1 for the second (guidance), ...
        window: 0 but where a step's forwards have different inputs, as windows of a long video have.
        grid: video tokens along frames, height and width; `NO_GRID` where the model was not told.
        videos: how many videos of that grid a layer attends, one after another.
        routes: of each layer, by name.
        share: how ranks share it; None on one device.
        watch: whether each sparse attention is looked at for values that are not finite.
        stated: whether its step was stated, so that it may have been captured or be run again.
        transformer: whose it is, if it is captured.
        captured: whether it is being captured into a CUDA graph, so that nothing on the device can be read.
        notes: its attention calls so far, also in `run.notes` unless it is captured.
    """

    run: Run
    step: int
    routes: Mapping[str, Route]
    branch: int = 0
    window: int = 0
    grid: Grid = NO_GRID
    videos: int = 1
    share: Ulysses | None = None
    watch: bool = False
    stated: bool = False
    captured: bool = False
    transformer: torch.nn.Module | None = None
    notes: list[Note] = field(default_factory=list)

    @property
    def attended_grid(self) -> Grid:
        """The grid of all videos that a layer attends, the frames of one after those of the other."""
        frames, height, width = self.grid
        return self.videos * frames, height, width

    def note(
        self, layer: Layer, stats: AttentionStats | None, reason: str | None = None, full_by: str | None = None
    ) -> None:
        """Note one attention call of a layer; `stats` is None if it was dense."""
        self.notes.append(Note(self.step, layer.name, stats, reason, full_by))

"""Which key blocks a query block read and how finely, kept from a run to be looked at afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from psa_diffusers.patch.run import Forward
from psa_diffusers.patch.sites import Layer
from psa_diffusers.patch.token_order import Grid, token_permutation
from psa_kernels import AttentionSpec, BlockLists
from psa_presets import Preset, TokenOrder


@dataclass(frozen=True)
class BlockMask:
    """What some heads of one attention call read.

    Attributes:
        layer: its name.
        step, steps: the denoising step, counted from 0, and how many the run has.
        grid: video tokens along frames, height and width.
        videos: how many videos of that grid the layer attends, one after another. Pictures show the first.
        preset, spec: what the layer computed.
        order: which tokens form a block.
        first_head, first_row: the head and the query block of the first entries of `levels`.
        levels: int64 [heads, query blocks, key blocks]: index into `spec.levels`; `len(spec.levels)` where skipped.
    """

    layer: str
    step: int
    steps: int
    grid: Grid
    preset: Preset
    spec: AttentionSpec
    order: TokenOrder
    first_head: int
    first_row: int
    levels: np.ndarray
    videos: int = 1

    def detail(self) -> np.ndarray:
        """How finely each pair of blocks was read: 1 / pooling factor, 0 where skipped; float64, shaped as `levels`."""
        rest = 1 / self.spec.block_key if self.spec.rest == "mean" else 0.0
        return np.array([*(1 / level for level in self.spec.levels), rest])[self.levels]

    def shares(self) -> list[float]:
        """Share of the pairs of blocks at each level, then of those past the last."""
        kinds = len(self.spec.levels) + 1
        return (np.bincount(self.levels.ravel(), minlength=kinds) / self.levels.size).tolist()

    def over_frames(self, values: np.ndarray) -> np.ndarray:
        """Spread one value a key block over the tokens of the grid: [frames, height, width]."""
        return self._spread(values, self.spec.block_key)

    def query_tokens(self, row: int) -> np.ndarray:
        """Which tokens of the grid a query block holds: bool [frames, height, width]."""
        blocks = -(-self.videos * int(np.prod(self.grid)) // self.spec.block_query)
        return self._spread(np.arange(blocks) == row, self.spec.block_query)

    def _spread(self, values: np.ndarray, block: int) -> np.ndarray:
        frames, height, width = self.grid
        grid = (self.videos * frames, height, width)
        tokens = token_permutation(self.order.order, grid, self.order.tile).numpy()
        spread = np.empty(len(tokens), values.dtype)
        spread[tokens] = np.repeat(values, block)[: len(tokens)]
        return spread.reshape(grid)[:frames]


class ListRecorder(Protocol):
    """What is given the block lists of calls.

    Attributes:
        layers: names of the layers whose lists it may want.
    """

    layers: tuple[str, ...]

    def record(self, layer: Layer, forward: Forward, lists: BlockLists) -> None:
        """Get the lists of a call, which may be written to afterwards."""


class MaskRecorder:
    """Keeps the block lists of chosen calls of the last run, on their device until `masks` is called.

    Of each call one batch item is kept: the last one, because it is the prompt's in models that compute both guidance
    branches in one batch. In models that compute them one after the other the first forward, the prompt's, is kept.

    Args:
        layers: names of the layers, as `RunStats.layers` has them.
        step: denoising step, counted from 0; None for the middle one of the sparse steps.
        head: None for all.
        point: None for all query blocks, or the place in the video (time, height, width, each from 0 to 1) whose query
            block alone is kept.
    """

    def __init__(
        self,
        layers: Iterable[str],
        *,
        step: int | None = None,
        head: int | None = None,
        point: tuple[float, float, float] | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self._step, self._head, self._point = step, head, point
        self._run = 0
        self._kept: dict[str, tuple[BlockMask, BlockLists]] = {}

    def record(self, layer: Layer, forward: Forward, lists: BlockLists) -> None:
        """Keep the lists of a call if they are wanted; never waits for the device."""
        run = forward.run
        if run.number != self._run:
            self._run = run.number
            self._kept.clear()
        first = forward.branch == forward.window == 0
        if not first or layer.name not in self.layers or forward.step != self._wanted_step(layer, run.steps):
            return
        assert layer.spec is not None, "a sparse layer has one"
        heads = slice(None) if self._head is None else slice(self._head, self._head + 1)
        row = 0
        if self._point is not None:
            row = query_block_at(self._point, layer.order, layer.spec, forward.grid, forward.videos)
        rows = slice(None) if self._point is None else slice(row, row + 1)
        part = BlockLists(lists.ids[-1:, heads, rows].clone(), lists.counts[-1:, heads, rows].clone(), lists.key_blocks)
        mask = BlockMask(
            layer.name, forward.step, run.steps, forward.grid, layer.preset, layer.spec, layer.order, self._head or 0,
            row, levels=np.empty(0), videos=forward.videos,
        )  # fmt: skip
        self._kept[layer.name] = mask, part

    def masks(self) -> list[BlockMask]:
        """What was kept, in the order of `layers`; waits for the device."""
        kept = [self._kept[name] for name in self.layers if name in self._kept]
        return [replace(mask, levels=lists.levels()[0].cpu().numpy()) for mask, lists in kept]

    def _wanted_step(self, layer: Layer, steps: int) -> int:
        return middle_sparse_step(layer.preset, steps) if self._step is None else self._step


def middle_sparse_step(preset: Preset, steps: int) -> int:
    """The denoising step, counted from 0, in the middle of a preset's sparse ones; the run's end if there are none."""
    sparse = preset.sparse_steps(steps)
    return sparse[len(sparse) // 2] if sparse else steps


def query_block_at(
    point: tuple[float, float, float], order: TokenOrder, spec: AttentionSpec, grid: Grid, videos: int = 1
) -> int:
    """The query block that holds the token at a place in the video (time, height, width, each from 0 to 1).

    Args:
        videos: how many videos of that grid the layer attends, one after another; the first one is meant.
    """
    place = tuple(min(size - 1, int(share * size)) for share, size in zip(point, grid, strict=True))
    grid = (videos * grid[0], *grid[1:])
    tokens = token_permutation(order.order, grid, order.tile).numpy()
    return int(np.flatnonzero(tokens == np.ravel_multi_index(place, grid))[0]) // spec.block_query

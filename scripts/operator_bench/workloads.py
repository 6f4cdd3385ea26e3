"""What is measured: self-attention calls of video models, and the densities at which they are sparse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from psa_presets import load_preset


@dataclass(frozen=True)
class Workload:
    """One self-attention call: `heads` heads of `head_dim`, video tokens and then text tokens.

    The grid has the video tokens along frames, height and width.
    """

    name: str
    heads: int
    head_dim: int
    grid: tuple[int, int, int]
    text: int = 0

    @property
    def video(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.video + self.text

    @property
    def dense_flops(self) -> float:
        return 4 * self.tokens**2 * self.head_dim * self.heads


WORKLOADS = (
    Workload("wan2.1-1.3b-480p", 12, 128, (21, 30, 52)),
    Workload("wan2.1-14b-720p", 40, 128, (21, 45, 80)),
    Workload("hunyuanvideo-720p", 24, 128, (33, 45, 80), 256),
    Workload("cogvideox-5b", 48, 64, (13, 30, 45), 226),
)
LEVELS = load_preset("psa-3").levels
# Cumulative shares of key blocks, one a level.
THRESHOLDS = {density: load_preset("psa-3").at_density(density).thresholds for density in (0.10, 0.15, 0.25)}


@dataclass(frozen=True)
class Case:
    """A call to time.

    Attributes:
        methods: whose stage it is; a stage that methods share is timed once.
        density: share of the dense FLOPs that its lists ask for; None where that is not known because it fails.
        stage: `total`, `pyramid`, `importance`, `prices` (of the rule `budget`), `allocation`, `quantise` (of the
            precision `int8_qk`) or `attention`.
    """

    methods: tuple[str, ...]
    density: float | None
    stage: str
    call: Callable[[], object]


@cache
def skip(method: str, reason: str) -> None:
    """Say once that a method is left out."""
    print(f"{method} skipped: {reason}", flush=True)

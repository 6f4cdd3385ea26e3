"""Statistics of what prefills attended."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from psa_kernels import AttentionStats

FOLD = 256  # calls whose counts are kept one by one


@dataclass
class PrefillStats:
    """Statistics since the patch.

    Attributes:
        prefills: forwards with a sparse layer; each chunk of a chunked prefill is one.
        calls: calls of the decoder's attention by such forwards, and by forwards that a reason kept dense. Not counted
            are forwards of one token, below `min_tokens`, or with text queries only.
        sparse_calls: how many of them were sparse.
        density: mean over the sparse layers and their calls: share of the FLOPs of dense causal attention in the span
            of the video, its diagonal included; text before and after is attended exactly, on top of it. None without
            sparse calls.
        coverage: share of the blocks in the span that were attended at all, likewise.
        layers: the density of each sparse layer, by its number.
        implementation: what computed the sparse calls; None if there were none.
        fallbacks: why calls that were long enough ran as without PSA, and how many did; 1 for compiled forwards.
        vision_calls, vision_density: of vision towers, with `vision=True`: sparse calls and their mean density.
    """

    prefills: int = 0
    calls: int = 0
    sparse_calls: int = 0
    density: float | None = None
    coverage: float | None = None
    layers: dict[int, float] = field(default_factory=dict)
    implementation: str | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)
    vision_calls: int = 0
    vision_density: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain numbers, ready for JSON."""
        return asdict(self)


class Counter:
    """Sums up what sparse calls attended, on the device: nothing is waited for until it is looked at."""

    def __init__(self) -> None:
        self.calls = 0
        self.implementation: str | None = None
        self._lock = threading.Lock()
        self._kept: list[tuple[int, AttentionStats]] = []
        self._sums: dict[int, torch.Tensor] = {}  # layer -> (batch items, their densities, their coverages)

    def note(self, layer: int, parts: list[AttentionStats]) -> None:
        """One call, which is computed for some batch items after others."""
        with self._lock:
            self.calls += 1
            self._kept += [(layer, part) for part in parts]
            self.implementation = parts[-1].implementation
            if len(self._kept) >= FOLD:
                self._fold()

    def means(self) -> dict[int, tuple[float, float]]:
        """Density and coverage of each layer."""
        with self._lock:
            self._fold()
            sums = {layer: each.tolist() for layer, each in sorted(self._sums.items())}
        return {layer: (density / items, coverage / items) for layer, (items, density, coverage) in sums.items()}

    def _fold(self) -> None:
        for layer, stats in self._kept:
            density, coverage = stats.density.mean(1), stats.coverage.mean(1)
            found = torch.stack((torch.ones_like(density), density, coverage)).sum(1)
            self._sums[layer] = self._sums[layer].to(found.device) + found if layer in self._sums else found
        self._kept.clear()


def summed_up(
    prefills: int, calls: int, text: Counter, towers: Sequence[Counter], fallbacks: Mapping[str, int]
) -> PrefillStats:
    """All figures, brought from the device."""
    layers, vision = text.means(), [mean for tower in towers for mean in tower.means().values()]
    return PrefillStats(
        prefills=prefills,
        calls=calls,
        sparse_calls=text.calls,
        density=_mean([density for density, _ in layers.values()]),
        coverage=_mean([coverage for _, coverage in layers.values()]),
        layers={layer: density for layer, (density, _) in layers.items()},
        implementation=text.implementation,
        fallbacks=dict(fallbacks),
        vision_calls=sum(tower.calls for tower in towers),
        vision_density=_mean([density for density, _ in vision]),
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None

"""What a run attended: density and coverage of every layer at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from psa_kernels import AttentionStats

Table = list[list[float | None]]


@dataclass
class RunStats:
    """Statistics of the last run of a patched pipeline.

    Attributes:
        steps: denoising steps of the run; 0 before the first run.
        dense_steps: how many of them, the first ones, are dense by the preset.
        layers: names of the self-attention layers, of all transformers.
        density: `[step][layer]`: share of the FLOPs of dense attention between video tokens, mean over heads, batch and
            guidance branches (text tokens of joint attention are attended exactly, on top of it);
            1.0 where the layer was dense, None where it did not run.
        coverage: `[step][layer]`: share of the key blocks that were attended at all, likewise.
        density_run: mean of `density` over all steps and layers that ran.
        density_sparse, coverage_sparse: means over the layers and steps that were sparse; None if there were none.
        implementation: what computed the sparse calls; None if there were none.
        fallbacks: why calls ran dense although the preset asked for sparse ones, and how many did.
        not_finite: layers whose sparse output held NaN or infinite values, and at which steps, counted from 0; it was
            computed again there, dense.
        model_not_finite: what was not finite with dense attention either, in one line; None if nothing was seen to be.
    """

    steps: int = 0
    dense_steps: int = 0
    layers: list[str] = field(default_factory=list)
    density: Table = field(default_factory=list)
    coverage: Table = field(default_factory=list)
    density_run: float = 1.0
    density_sparse: float | None = None
    coverage_sparse: float | None = None
    implementation: str | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)
    not_finite: dict[str, list[int]] = field(default_factory=dict)
    model_not_finite: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain lists and numbers, ready for JSON."""
        return asdict(self)


class RunRecorder:
    """Collects the figures of the current run; they stay on their device until `stats` is called."""

    def __init__(self, layers: Iterable[str]) -> None:
        self._layers = list(layers)
        self.start(run=0, steps=0, dense_steps=0)

    def start(self, run: int, steps: int, dense_steps: int) -> None:
        """Forget the last run and begin another."""
        self.run = run
        self._steps, self._dense_steps = steps, dense_steps
        self._calls: dict[tuple[int, str], list[tuple[torch.Tensor, torch.Tensor] | None]] = {}
        self._fallbacks: Counter[str] = Counter()
        self._implementation: str | None = None
        self._not_finite: dict[str, list[int]] = {}
        self.model_not_finite: str | None = None
        self.begin_forward()

    def begin_forward(self) -> None:
        """Begin a forward, which `undo_forward` can forget."""
        self._forward: list[tuple[tuple[int, str], str | None]] = []
        self.was_sparse = False

    def undo_forward(self) -> None:
        """Forget what was noted since `begin_forward`."""
        for key, fallback in self._forward:
            self._calls[key].pop()
            if fallback:
                self._fallbacks[fallback] -= 1
        self._fallbacks = +self._fallbacks
        self.begin_forward()

    def add_not_finite(self, step: int, layer: str) -> None:
        """Note that the sparse output of a layer was not finite, so that it is dense at this step."""
        steps = self._not_finite.setdefault(layer, [])
        if step not in steps:
            steps.append(step)

    def add_dense(self, step: int, layer: str, fallback: str | None = None) -> None:
        """Note a dense call, and why it was dense against the preset."""
        self._calls.setdefault((step, layer), []).append(None)
        self._forward.append(((step, layer), fallback))
        if fallback:
            self._fallbacks[fallback] += 1

    def add_sparse(self, step: int, layer: str, stats: AttentionStats) -> None:
        """Note a sparse call."""
        self._calls.setdefault((step, layer), []).append((stats.density.mean(), stats.coverage.mean()))
        self._forward.append(((step, layer), None))
        self.was_sparse = True
        self._implementation = stats.implementation

    def stats(self) -> RunStats:
        """Sum up the current run."""
        figures = self._fetch()
        density, coverage = (
            [[_mean(figures.get((step, layer), ()), i) for layer in self._layers] for step in range(self._steps)]
            for i in (0, 1)
        )
        ran = [value for row in density for value in row if value is not None]
        sparse = [
            call for key, calls in self._calls.items() for call, kept in zip(figures[key], calls, strict=False) if kept
        ]
        return RunStats(
            steps=self._steps,
            dense_steps=self._dense_steps,
            layers=list(self._layers),
            density=density,
            coverage=coverage,
            density_run=sum(ran) / len(ran) if ran else 1.0,
            density_sparse=_mean(sparse, 0),
            coverage_sparse=_mean(sparse, 1),
            implementation=self._implementation,
            fallbacks=dict(self._fallbacks),
            not_finite={layer: list(steps) for layer, steps in self._not_finite.items()},
            model_not_finite=self.model_not_finite,
        )

    def _fetch(self) -> dict[tuple[int, str], list[tuple[float, float]]]:
        """All figures as numbers, brought from the device in one transfer."""
        kept = [call for calls in self._calls.values() for call in calls if call]
        values = iter(torch.stack([torch.stack(call).cpu() for call in kept]).tolist()) if kept else iter(())
        return {
            key: [tuple(next(values)) if call else (1.0, 1.0) for call in calls] for key, calls in self._calls.items()
        }


def _mean(calls: Iterable[tuple[float, float]], index: int) -> float | None:
    values = [call[index] for call in calls]
    return sum(values) / len(values) if values else None

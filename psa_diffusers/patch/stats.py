"""What a run attended: density and coverage of every layer at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from psa_diffusers.patch.run import Run

Table = list[list[float | None]]


@dataclass
class RunStats:
    """Statistics of the last run of a patched pipeline.

    Attributes:
        run: which run since the patch, counted from 1; 0 before the first. Not compared by `==`.
        steps: denoising steps of the run; 0 before the first run.
        dense_steps: how many of the first steps are dense by the preset.
        dense_last: how many of the last steps are dense by the preset.
        dense_at: the steps, counted from 0, at which all attention was dense, whether the preset wants that or not.
        layers: names of the self-attention layers, of all transformers.
        density: `[step][layer]`: share of the FLOPs of dense attention between video tokens, mean over heads, batch and
            guidance branches. 1.0 where the layer was dense, None where it did not run. Text tokens of joint attention
            are attended exactly, on top of it.
        coverage: `[step][layer]`: share of the key blocks that were attended at all; a mean in the same way.
        density_run: mean of `density` over all steps and layers that ran.
        density_sparse: mean of `density` over the layers and steps that were sparse; None if there were none.
        coverage_sparse: mean of `coverage` over the same layers and steps.
        implementation: what computed the sparse calls; None if there were none.
        dense_implementation: the operator's implementation that computed dense calls, where the preset has
            `dense_attention: psa`; None if the modules' own processors computed them all.
        fallbacks: each reason why calls ran dense although the preset wanted them sparse, with the number of calls.
            Calls after the run that belong to no known run are counted too.
        not_finite: for each layer whose sparse output held NaN or infinite values, the steps where it did, counted from
            0. There it was computed again, dense.
        model_not_finite: one line on what was not finite with dense attention either; None if nothing was.
        missed: why there are no figures, if the pipeline's last run, or some of its steps, did not go through the
            patch; None if they did.
    """

    run: int = field(default=0, compare=False)
    steps: int = 0
    dense_steps: int = 0
    dense_last: int = 0
    dense_at: list[int] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    density: Table = field(default_factory=list)
    coverage: Table = field(default_factory=list)
    density_run: float = 1.0
    density_sparse: float | None = None
    coverage_sparse: float | None = None
    implementation: str | None = None
    dense_implementation: str | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)
    not_finite: dict[str, list[int]] = field(default_factory=dict)
    model_not_finite: str | None = None
    missed: str | None = None

    @property
    def sparse_at(self) -> list[int]:
        """The steps that ran and are not in `dense_at`: sparse in part at least, also where every key was kept."""
        ran = [step for step, row in enumerate(self.density) if any(value is not None for value in row)]
        return [step for step in ran if step not in self.dense_at]

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain lists and numbers, ready for JSON."""
        return asdict(self)


def summed_up(run: Run, layers: Sequence[str], strays: Mapping[str, int], missed: str | None = None) -> RunStats:
    """The statistics of a run. All figures come from the device in one transfer.

    Args:
        layers: names of all layers.
        strays: why calls outside of any run were dense, and how many calls for each reason.
        missed: why there are no figures of the pipeline's last run.
    """
    notes = [note for forward in run.notes for note in forward]
    kept = [torch.stack((note.stats.density.mean(), note.stats.coverage.mean())) for note in notes if note.stats]
    values = iter(torch.stack([figures.cpu() for figures in kept]).tolist() if kept else ())
    calls: dict[tuple[int, str], list[tuple[float, float]]] = {}
    sparse = []
    for note in notes:
        figures = tuple(next(values)) if note.stats else (1.0, 1.0)
        calls.setdefault((note.step, note.layer), []).append(figures)
        sparse += [figures] if note.stats else []
    density, coverage = (
        [[_mean(calls.get((step, layer), ()), i) for layer in layers] for step in range(run.steps)] for i in (0, 1)
    )
    ran = [value for row in density for value in row if value is not None]
    reasons = Counter(note.reason for note in notes if note.reason is not None)
    return RunStats(
        run=run.number,
        steps=run.steps,
        dense_steps=min((dense.first for dense in run.dense.values()), default=0),
        dense_last=min((dense.last for dense in run.dense.values()), default=0),
        dense_at=sorted({note.step for note in notes} - {note.step for note in notes if note.stats}),
        layers=list(layers),
        density=density,
        coverage=coverage,
        density_run=sum(ran) / len(ran) if ran else 1.0,
        density_sparse=_mean(sparse, 0),
        coverage_sparse=_mean(sparse, 1),
        implementation=next((note.stats.implementation for note in reversed(notes) if note.stats), None),
        dense_implementation=next((note.full_by for note in reversed(notes) if note.full_by), None),
        fallbacks=dict(reasons + Counter(strays)),
        not_finite={layer: list(steps) for layer, steps in run.not_finite.items()},
        model_not_finite=run.model_not_finite,
        missed=missed,
    )


def _mean(calls: Iterable[tuple[float, ...]], index: int) -> float | None:
    values = [call[index] for call in calls]
    return sum(values) / len(values) if values else None

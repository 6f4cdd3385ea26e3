"""End-to-end trials: which shapes of attention come nearest to dense videos, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from psa_diffusers.calibrate.choose import Layers, Shapes, everywhere, layer_by_layer, ranked
from psa_diffusers.calibrate.intervals import half_interval
from psa_diffusers.calibrate.shapes import BASE

SINGLES = 3  # how many shapes are tried in all layers, beside the base preset's

Result = dict[str, Any]
Assignment = dict[str, Shapes]  # the shape of each layer, by transformer


class Candidate(NamedTuple):
    """Shapes to try, and their name."""

    name: str
    shapes: Assignment


class Trial(NamedTuple):
    """The result of a candidate: PSNR in dB of each video (None if it equals the dense one), and the density."""

    candidate: Candidate
    psnrs: list[float | None]
    density: float


def candidates(curves: dict[str, Layers], density: float) -> list[Candidate]:
    """The candidates, the simplest first: the base preset's shape, the best single shapes, the best of each layer."""
    best = {which: [shape for shape in ranked(each, density) if shape != BASE] for which, each in curves.items()}
    found = [Candidate(BASE, {which: everywhere(each, BASE) for which, each in curves.items()})]
    for place in range(min(SINGLES, *(len(each) for each in best.values()))):
        shapes = {which: everywhere(each, best[which][place]) for which, each in curves.items()}
        found.append(Candidate(" / ".join(dict.fromkeys(best[which][place] for which in curves)), shapes))
    found.append(Candidate("layer by layer", {which: layer_by_layer(each, density) for which, each in curves.items()}))
    # If all layers choose the same shape, the last candidate is a duplicate.
    return [each for index, each in enumerate(found) if each.shapes not in [other.shapes for other in found[:index]]]


def try_out(found: Sequence[Candidate], run: Callable[[Candidate], list[Result]]) -> list[Trial]:
    """Make the videos of each candidate."""
    trials = []
    for candidate in found:
        results = run(candidate)
        density = float(np.mean([result["density"] for result in results]))
        trials.append(Trial(candidate, [result["psnr"] for result in results], density))
    return trials


def keep(trials: Sequence[Trial]) -> tuple[Trial, list[dict[str, Any]]]:
    """Choose a trial that is better than the base preset's and every simpler one by more than chance.

    All single shapes count as equally simple, so among them the one with the best mean is taken. Also returns a row for
    each trial, with its mean gain over the base preset's shape in dB and half the 95 % interval of that.
    """
    base, *others = trials
    rows = [
        {
            "shape": trial.candidate.name,
            "psnr": mean if math.isfinite(mean := mean_psnr(trial.psnrs)) else None,
            "density": trial.density,
            "gain_db": float(np.mean(gained)) if (gained := gains(trial, base)) else None,
            "gain_interval_db": half_interval(gained),
        }
        for trial in trials
    ]
    kept = base
    singles = [trial for trial in others if is_single(trial.candidate)]
    layered = [trial for trial in others if not is_single(trial.candidate)]
    for group in (singles, layered):
        best = max(group, key=lambda trial: mean_psnr(trial.psnrs), default=None)
        if best is not None and _better(best, kept):
            kept = best
    return kept, rows


def is_single(candidate: Candidate) -> bool:
    """Whether all layers of a transformer have the same shape."""
    return all(len(set(shapes.values())) == 1 for shapes in candidate.shapes.values())


def gains(trial: Trial, other: Trial) -> list[float]:
    """The PSNR of a trial's videos minus that of another trial's, in dB, where both have one."""
    pairs = zip(trial.psnrs, other.psnrs, strict=True)
    return [psnr - against for psnr, against in pairs if psnr is not None and against is not None]


def mean_psnr(values: Sequence[float | None]) -> float:
    """In dB, over the videos that differ from the dense ones; infinite if none does."""
    differing = [value for value in values if value is not None]
    return float(np.mean(differing)) if differing else math.inf


def _better(trial: Trial, other: Trial) -> bool:
    gained = gains(trial, other)
    interval = half_interval(gained)
    return interval is not None and float(np.mean(gained)) > interval

"""How much each layer should attend: the least error for a mean density.

The errors of layers are taken to add up as squares. Then at the optimum one more unit of work saves as much error in
every layer, so for a price of work (a Lagrange multiplier) each layer chooses alone; bisection finds the price.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from psa_diffusers.calibrate.scaling import DENSE

BETWEEN = 12  # choices between two measured scales
BETWEEN_UNIFORM = 120  # likewise, where all layers take the same


@dataclass(frozen=True)
class Curve:
    """What a layer's scales cost and spoil, as measured.

    Attributes:
        scales: increasing.
        densities: measured density at each scale.
        errors: squared error that the layer alone causes in the transformer's output, relative to that output.
        density_at: the density of any scale, where that is known; None where only measuring tells.
    """

    scales: Sequence[float]
    densities: Sequence[float]
    errors: Sequence[float]
    density_at: Callable[[float], float | None] = lambda scale: None


@dataclass(frozen=True)
class Solution:
    """A scale for each layer (by number; DENSE to keep it dense), their mean density and summed squared error."""

    scales: dict[int, float | None]
    density: float
    error: float


@dataclass(frozen=True)
class _Choices:
    scales: list[float | None]
    densities: np.ndarray
    errors: np.ndarray


def spread(curves: Mapping[int, Curve], density: float) -> Solution:
    """The scales of least summed error whose mean density is at most `density`, or the least that can be had."""
    choices = {layer: _choices(curve) for layer, curve in curves.items()}

    def at(price: float) -> dict[int, int]:
        return {layer: int((each.errors + price * each.densities).argmin()) for layer, each in choices.items()}

    low, high = -60.0, 60.0  # logarithms of the price
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if _density(choices, at(np.exp(middle))) <= density else (middle, high)
    picked = at(np.exp(high))
    _spend_the_rest(choices, picked, density)
    return _solution(choices, picked)


def drawn_together(curves: Mapping[int, Curve], strength: float) -> dict[int, Curve]:
    """Curves whose errors are nearer to their geometric mean: a strength of 1 leaves them, 0 makes all alike."""
    logs = {layer: np.log(np.maximum(curve.errors, 1e-20)) for layer, curve in curves.items()}
    middle = np.mean(list(logs.values()), axis=0)
    return {
        layer: replace(curve, errors=np.exp(middle + strength * (logs[layer] - middle)).tolist())
        for layer, curve in curves.items()
    }


def judged(curves: Mapping[int, Curve], solution: Solution) -> Solution:
    """A solution of `drawn_together` curves with the error that the curves themselves promise."""
    choices = {layer: _choices(curve) for layer, curve in curves.items()}
    return _solution(choices, {layer: choices[layer].scales.index(scale) for layer, scale in solution.scales.items()})


def uniform(curves: Mapping[int, Curve], density: float) -> Solution:
    """One scale for all layers, with that mean density (or the nearest that was measured)."""
    choices = {layer: _choices(curve, BETWEEN_UNIFORM) for layer, curve in curves.items()}
    count = min(len(each.scales) for each in choices.values()) - 1  # without dense
    densities = [np.mean([each.densities[index] for each in choices.values()]) for index in range(count)]
    picked = int(np.abs(np.array(densities) - density).argmin())
    return _solution(choices, dict.fromkeys(choices, picked))


def reachable(curves: Mapping[int, Curve]) -> float:
    """The lowest mean density that was measured."""
    return float(np.mean([min(curve.densities) for curve in curves.values()]))


def _choices(curve: Curve, between: int = BETWEEN) -> _Choices:
    """The measured scales, more between them, and dense.

    Between them the logarithm of the error is on straight lines over the density, not over the scale: where a few more
    hundredths of a threshold take in no further block, they save nothing.
    """
    places = np.arange(len(curve.scales))
    fine = np.linspace(0, places[-1], places[-1] * between + 1)
    scales = np.exp(np.interp(fine, places, np.log(curve.scales))).tolist()
    known = [curve.density_at(scale) for scale in scales]
    densities = np.interp(fine, places, curve.densities) if None in known else np.array(known)
    logs = np.log(np.maximum(curve.errors, 1e-20))
    errors = np.exp(np.interp(densities, curve.densities, logs))
    return _Choices([*scales, DENSE], np.append(densities, 1.0), np.append(errors, 0.0))


def _spend_the_rest(choices: Mapping[int, _Choices], picked: dict[int, int], density: float) -> None:
    """One step finer wherever that still fits and saves error, the best first: the price is the same for many."""
    while True:
        room = (density - _density(choices, picked)) * len(choices) + 1e-12
        best, gain = None, 0.0
        for layer, index in picked.items():
            each = choices[layer]
            if index + 1 < len(each.scales):
                cost = each.densities[index + 1] - each.densities[index]
                saved = each.errors[index] - each.errors[index + 1]
                if cost <= room and saved / max(cost, 1e-9) > gain:
                    best, gain = layer, saved / max(cost, 1e-9)
        if best is None:
            return
        picked[best] += 1


def _density(choices: Mapping[int, _Choices], picked: Mapping[int, int]) -> float:
    return float(np.mean([choices[layer].densities[index] for layer, index in picked.items()]))


def _solution(choices: Mapping[int, _Choices], picked: Mapping[int, int]) -> Solution:
    scales = {layer: choices[layer].scales[index] for layer, index in picked.items()}
    error = float(sum(choices[layer].errors[index] for layer, index in picked.items()))
    return Solution(scales, _density(choices, picked), error)

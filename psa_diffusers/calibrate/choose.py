"""Chooses for a density the shape of attention that errs least in each layer, and the scale that gives the density."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from psa_diffusers.calibrate.scaling import SCALES

KNOWN = (0.05, 10.0)  # range of scales to choose from if the density of every scale is known
BETWEEN = 400


@dataclass(frozen=True)
class Curve:
    """Measured density and error of one shape in one layer, at each of `SCALES`.

    Attributes:
        densities: measured densities.
        errors: measured squared error of the attention's output, relative to dense; geometric mean over the calls.
        density_at: gives the density of any scale if it can be computed, and None if it has to be measured.
    """

    densities: Sequence[float]
    errors: Sequence[float]
    density_at: Callable[[float], float | None] = lambda scale: None

    def error_at(self, density: float) -> float:
        """The error at a density, interpolated linearly between the logarithms of the measured values."""
        return float(np.exp(np.interp(np.log(density), np.log(self.densities), np.log(self.errors))))


Layers = Mapping[int, Mapping[str, Curve]]  # of one transformer: by number of the layer and name of the shape
Shapes = dict[int, str]  # the shape of each layer


@dataclass(frozen=True)
class Solution:
    """The shape and the scale of each layer, and their expected mean density."""

    shapes: Shapes
    scales: dict[int, float]
    density: float


def everywhere(layers: Layers, shape: str) -> Shapes:
    """One shape in all layers."""
    return dict.fromkeys(layers, shape)


def ranked(layers: Layers, density: float) -> list[str]:
    """The shapes, sorted by the geometric mean of their errors over the layers, the smallest first."""
    shapes = next(iter(layers.values()))
    return sorted(shapes, key=lambda shape: error(layers, everywhere(layers, shape), density))


def layer_by_layer(layers: Layers, density: float) -> Shapes:
    """In each layer the shape with the smallest error."""
    return {layer: min(curves, key=lambda shape: curves[shape].error_at(density)) for layer, curves in layers.items()}


def error(layers: Layers, shapes: Shapes, density: float) -> float:
    """Relative error of the attention's output (not squared), geometric mean over the layers."""
    logs = [np.log(layers[layer][shape].error_at(density)) for layer, shape in shapes.items()]
    return float(np.exp(np.mean(logs) / 2))


def solve(layers: Layers, shapes: Shapes, density: float) -> Solution:
    """Find one scale for all layers of a shape, so that each shape has the density, or comes as near as it can."""
    scales: dict[int, float] = {}
    densities: dict[int, float] = {}
    for shape in dict.fromkeys(shapes.values()):
        members = [layer for layer, its in shapes.items() if its == shape]
        grid, offered = _dial([layers[layer][shape] for layer in members])
        best = int(np.abs(offered - density).argmin())
        scales |= dict.fromkeys(members, float(grid[best]))
        densities |= dict.fromkeys(members, float(offered[best]))
    return Solution(dict(shapes), scales, float(np.mean(list(densities.values()))))


def reach(layers: Layers, shapes: Shapes) -> tuple[float, float]:
    """The lowest and the highest density that all shapes of these layers can have."""
    offered = [
        _dial([layers[layer][shape] for layer, its in shapes.items() if its == shape])[1]
        for shape in dict.fromkeys(shapes.values())
    ]
    return max(float(each.min()) for each in offered), min(float(each.max()) for each in offered)


def _dial(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Scales and the mean densities that layers of one shape have at them."""
    if all(curve.density_at(1.0) is not None for curve in curves):
        grid = np.geomspace(*KNOWN, BETWEEN)
        # Computed for each layer, although layers of one shape mostly have the same density.
        known = np.array([[curve.density_at(scale) for scale in grid] for curve in curves], dtype=np.float64)
        return grid, known.mean(axis=0)
    grid = np.geomspace(SCALES[0], SCALES[-1], BETWEEN)
    between = [np.exp(np.interp(np.log(grid), np.log(SCALES), np.log(curve.densities))) for curve in curves]
    return grid, np.mean(between, axis=0)

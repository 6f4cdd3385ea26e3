"""Figures of single samples, kept line by line while they are measured, and the rows that they become."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from psa_diffusers.calibrate.intervals import half_interval
from psa_diffusers.errors import InputError

Row = dict[str, Any]
FIGURES = ("density", "error")


class Lines:
    """A file of one JSON object a line: what is measured so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Row] = {}
        if path.exists():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(
                        f"{path}, line {number}: is no JSON; remove it, and it is measured anew"
                    ) from error
                self._known[_key(row)] = row

    def __contains__(self, row: Row) -> bool:
        return _key(row) in self._known

    def add(self, row: Row) -> None:
        self._known[_key(row)] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[Row]:
        return list(self._known.values())

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _key(row: Row) -> str:
    return json.dumps({name: value for name, value in row.items() if name not in FIGURES}, sort_keys=True)


def joined(lines: Iterable[Row]) -> list[Row]:
    """One row for all samples of a way and a density aimed at.

    Args:
        lines: with `judge`, `sample`, `target`, `density`, `error`, and what else tells ways apart.

    Returns:
        Rows with the mean `density`, the mean `error` and half its 95 % interval over the samples, `errors` of each,
        and `at_target`, the error at exactly the density aimed at.
    """
    curves: dict[str, dict[float, list[Row]]] = {}
    for line in lines:
        way = {name: value for name, value in line.items() if name not in (*FIGURES, "sample", "target")}
        curves.setdefault(json.dumps(way), {}).setdefault(line["target"], []).append(line)
    rows = []
    for way, points in curves.items():
        densities = [mean(line["density"] for line in found) for found in points.values()]
        errors = [mean(line["error"] for line in found) for found in points.values()]
        for (target, found), density, error in zip(points.items(), densities, errors, strict=True):
            each = [round(line["error"], 5) for line in found]
            rows.append(
                {
                    **json.loads(way),
                    "target": target,
                    "density": round(density, 5),
                    "error": round(error, 5),
                    "error_ci": half_interval(each),
                    "at_target": round(error_at(target, densities, errors), 5),
                    "errors": each,
                }
            )
    return rows


def error_at(target: float, densities: Sequence[float], errors: Sequence[float]) -> float:
    """The error at a density: its logarithm is taken as straight between the measured densities, and beyond them."""
    points = sorted(zip(densities, errors, strict=True))
    if len({density for density, _ in points}) < 2:
        return points[0][1]
    after = next((i for i, (density, _) in enumerate(points) if i and density >= target), len(points) - 1)
    (low, below), (high, above) = points[after - 1], points[after]
    if high == low or not min(below, above):
        return above
    return math.exp(math.log(below) + (target - low) / (high - low) * math.log(above / below))

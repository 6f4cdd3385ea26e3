"""Rows as Markdown tables: a way a line, the judges and densities side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attention_judges.settings import ESTIMATORS, LEVEL_SETS, PYRAMID, RULES

Row = dict[str, Any]
Way = dict[str, Any]
NAMES = {"count": "psa-3", "mass": "mass", "budget": "budget"}
BINARY = {"rule": "count", "levels": [1]}
PLAIN = {"estimator": "sampled", "statistic": "max", "rest": "skip"}
METHODS = {"binary": BINARY, **{NAMES[rule]: {"rule": rule, "levels": list(PYRAMID)} for rule in RULES}}


def tables(rows: Sequence[Row], judges: Sequence[str]) -> Iterator[str]:
    """All tables, with what each compares; judges are named as in the rows."""
    for title, ways, densities in _comparisons(rows):
        found = [(label, [_value(rows, judge, way, d) for judge in judges for d in densities]) for label, way in ways]
        found = [(label, values) for label, values in found if any(value is not None for value in values)]
        if not found:
            continue
        heads = [f"{judge} {density:.2f}" for judge in judges for density in densities]
        yield f"{title}\n"
        yield f"| | {' | '.join(heads)} |"
        yield "|---" * (len(heads) + 1) + "|"
        best = [min((value for value in column if value is not None), default=None) for column in _columns(found)]
        for label, values in found:
            cells = [_cell(value, least) for value, least in zip(values, best, strict=True)]
            yield f"| {label} | {' | '.join(cells)} |"
        yield ""


def value_of(rows: Sequence[Row], way: Way) -> float | None:
    """The error at the density aimed at of the one row with these entries; None if there is none."""
    found = [row for row in rows if all(row.get(name) == value for name, value in way.items())]
    return found[0]["at_target"] if found else None


def _comparisons(rows: Sequence[Row]) -> Iterator[tuple[str, list[tuple[str, Way]], tuple[float, ...]]]:
    main = {"idea": None, **PLAIN, "own_order": True, "own_keys": True}
    yield "Rules", [(name, main | way) for name, way in METHODS.items()], (0.15, 0.25, 0.35)
    some = (0.15, 0.25)
    levels = [
        (f"{NAMES[rule] if rule != 'count' else 'count'}, {', '.join(map(str, levels))}",
         main | {"rule": rule, "levels": list(levels)})
        for rule in RULES
        for levels in LEVEL_SETS
    ]  # fmt: skip
    yield "Level sets", levels, some
    orders = [
        (f"{name}, {order}", {"idea": None, **PLAIN, "own_keys": True, **way, "order": order})
        for name, way in METHODS.items()
        for order in ("hilbert", "raster", "tiles")
    ]
    yield "Orders", orders, some
    estimators = [
        (f"{name}, {estimator} {statistic}", main | way | {"estimator": estimator, "statistic": statistic})
        for name, way in METHODS.items()
        for estimator, statistic in ESTIMATORS
    ]
    yield "Estimators", estimators, some
    rests = [
        (f"{name}, rest {rest}", main | way | {"rest": rest})
        for name, way in METHODS.items()
        for rest in ("skip", "mean")
    ]
    yield "Rest", rests, some
    keys = [
        (f"{name}, {order}, {keys} keys", {"idea": None, **PLAIN, **way, "order": order, "block_key": keys})
        for name, way in METHODS.items()
        for order in ("hilbert", "raster")
        for keys in (64, 32)
    ]
    yield "Keys a block", keys, some
    for idea in dict.fromkeys(row["idea"] for row in rows if row["idea"]):
        ways = dict.fromkeys(row["way"] for row in rows if row["idea"] == idea)
        yield f"Idea: {idea}", [(way, {"idea": idea, "way": way}) for way in ways], some


def _value(rows: Sequence[Row], judge: str, way: Way, density: float) -> float | None:
    return value_of(rows, {**way, "judge": judge, "target": density})


def _columns(found: list[tuple[str, list[float | None]]]) -> list[tuple[float | None, ...]]:
    return list(zip(*(values for _, values in found), strict=True))


def _cell(value: float | None, least: float | None) -> str:
    if value is None:
        return ""
    return f"**{value:.3f}**" if value == least else f"{value:.3f}"

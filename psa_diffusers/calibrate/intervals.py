"""How sure a mean over a few videos is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import stdev

from scipy.special import stdtrit

FEWEST = 4  # values that an interval takes


def half_interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean (Student's t), in four digits; None for fewer than four."""
    if len(values) < FEWEST:
        return None
    quantile = float(stdtrit(len(values) - 1, 0.975))
    return round(quantile * stdev(values) / len(values) ** 0.5, 4)

"""How sure a mean over a few videos is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist, stdev

FEWEST = 4  # values that an interval takes


def half_interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean (Student's t); None for fewer than four values."""
    if len(values) < FEWEST:
        return None
    return round(_student(len(values) - 1) * stdev(values) / len(values) ** 0.5, 4)


def _student(freedom: int) -> float:
    """The 97.5 % quantile, by the expansion of Abramowitz and Stegun, 26.7.5: within 1 % from 3 degrees of freedom."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))

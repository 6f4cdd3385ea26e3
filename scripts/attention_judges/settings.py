"""What is compared: rules, level sets, orders, estimators, the rest and sizes of key blocks, one thing at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from attention_judges.judges import Judge

from psa_kernels import AttentionSpec, Importance
from psa_presets.density import scaled_thresholds

DENSITIES = (0.15, 0.25, 0.35)
# What says less is measured at two.
FEWER_DENSITIES = (0.15, 0.25)
RULES = ("count", "mass", "budget")
PYRAMID = (1, 2, 4)
LEVEL_SETS = (PYRAMID, (1, 2, 4, 8), (1,), (1, 4))
ESTIMATORS = tuple(product(("sampled", "pooled"), ("max", "mean")))
# Cumulative shares of each level set, scaled to a density: psa-3's and their like, and the paper's of the mass rule.
SHARES = {
    "count": {PYRAMID: (0.15, 0.25, 0.45), (1, 2, 4, 8): (0.14, 0.22, 0.38, 0.55), (1,): (0.25,), (1, 4): (0.15, 0.55)},
    "mass": {PYRAMID: (0.7, 0.8, 0.9), (1, 2, 4, 8): (0.7, 0.8, 0.9, 0.95), (1,): (0.85,), (1, 4): (0.7, 0.9)},
}
STRIDE = 8


@dataclass(frozen=True)
class Setting:
    """One way of attending, at a density.

    The count rule with levels (1, 2, 4) is psa-3, with level 1 alone it is binary, psa-1.
    """

    rule: str
    levels: tuple[int, ...]
    order: str
    block_query: int
    block_key: int
    estimator: str = "sampled"
    statistic: str = "max"
    rest: str = "skip"
    density: float = 0.25

    def spec(self, scale: float = 1.0) -> AttentionSpec:
        """What to compute; the thresholds of the rules count and mass are scaled."""
        importance = Importance(self.estimator, self.statistic, STRIDE, STRIDE)
        about = {"levels": self.levels, "rule": self.rule, "rest": self.rest, "importance": importance}
        if self.rule == "budget":
            about |= {"density": self.density, "thresholds": ()}
        else:
            about["thresholds"] = scaled_thresholds(SHARES[self.rule][self.levels], scale, digits=9)
        return AttentionSpec(block_query=self.block_query, block_key=self.block_key, **about)

    @property
    def highest_scale(self) -> float:
        """Every block is at the first level from here on."""
        return 1.0 if self.rule == "budget" else 1 / SHARES[self.rule][self.levels][0]


def settings_for(judge: Judge) -> Iterator[Setting]:
    """All settings of a judge, each once, those that differ in density alone side by side."""
    shapes: dict[Setting, tuple[float, ...]] = {}
    for shape, densities in _shapes(judge):
        shapes.setdefault(shape, densities)
    for shape, densities in shapes.items():
        for density in densities:
            yield replace(shape, density=density)


def _shapes(judge: Judge) -> Iterator[tuple[Setting, tuple[float, ...]]]:
    base = Setting("budget", PYRAMID, judge.orders[0], judge.block_query, judge.block_key)
    ways = [replace(base, rule="count", levels=(1,)), *(replace(base, rule=rule) for rule in RULES)]
    for rule, levels in product(RULES, LEVEL_SETS):
        yield replace(base, rule=rule, levels=levels), DENSITIES
    for way, order in product(ways, judge.orders):
        yield replace(way, order=order), DENSITIES
    for way, (estimator, statistic) in product(ways, ESTIMATORS):
        yield replace(way, estimator=estimator, statistic=statistic), FEWER_DENSITIES
    for way in ways:
        yield replace(way, rest="mean"), FEWER_DENSITIES
    other = 64 if judge.block_key == 32 else 32
    for way, order in product(ways, judge.orders[:2]):
        yield replace(way, order=order, block_key=other), FEWER_DENSITIES

"""The density that a spec will have, known before there are tensors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from psa_kernels import AttentionSpec, AttentionStats
from psa_kernels.allocation.budget import allocate_budget
from psa_kernels.allocation.prices import HIGHEST_PRICE
from psa_kernels.allocation.reference import allocate
from psa_kernels.costs import expected_density, unit_costs

COUNTS = {
    "psa-3": {},
    "binary": {"levels": (1,), "thresholds": (0.3,)},
    "to the end": {"thresholds": (0.1, 0.4, 1.0)},
    "floor past the first threshold": {"thresholds": (0.0, 0.1, 0.3), "floor": 0.2},
    "floor past all": {"thresholds": (0.0, 0.1, 0.3), "floor": 0.6},
    "rest mean": {"rest": "mean"},
    "coarse": {"levels": (2, 8), "thresholds": (0.2, 0.7)},
}


@pytest.mark.parametrize("key_blocks", [1, 7, 20, 33])
@pytest.mark.parametrize("name", COUNTS)
def test_the_rule_count_has_one_density(name, key_blocks):
    spec = AttentionSpec(**COUNTS[name])
    lists = allocate(torch.rand(1, 2, 3, key_blocks), None, spec)
    found = AttentionStats.from_lists(lists, spec, "").density
    assert found.tolist() == [[pytest.approx(expected_density(spec, key_blocks), rel=1e-6)] * 2]


@pytest.mark.parametrize("rest", ["skip", "mean"])
@pytest.mark.parametrize("density", [0.02, 0.15, 0.6, 1.0])
@pytest.mark.parametrize("levels", [(1, 2, 4), (2, 8)], ids=str)
def test_rows_spend_the_budget_but_for_less_than_a_step(levels, density, rest):
    spec = AttentionSpec(rule="budget", density=density, levels=levels, rest=rest)
    prices = torch.randint(0, HIGHEST_PRICE, (len(levels), 1, 2, 3, 33)).sort(0).values.short()
    lists = allocate_budget(prices, torch.rand(1, 2, 3, 33), spec)
    found = AttentionStats.from_lists(lists, spec, "").density
    units = unit_costs(spec)
    step = max(a - b for a, b in pairwise(units)) / (units[0] * levels[0]) / 33
    expected = expected_density(spec, 33)
    assert (found < expected + 1e-6).all() and (found > expected - step - 1e-6).all()


def test_what_depends_on_the_tensors_is_not_known():
    assert expected_density(AttentionSpec(rule="mass", thresholds=(0.4, 0.6, 0.9)), 20) is None
    assert expected_density(AttentionSpec(similarity=(0.5, 0.5)), 20) is None

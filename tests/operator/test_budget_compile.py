"""The Triton kernels of the rule `budget` compiled for every supported architecture, as in `test_triton_compile.py`."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from test_triton_compile import TARGETS, compile_and_check

from psa_kernels import AttentionSpec
from psa_kernels.allocation import prices, triton_budget, triton_prices, triton_statistics
from psa_kernels.costs import unit_costs

BUDGETS = {
    "psa-3": AttentionSpec(rule="budget", density=0.25),
    "five levels, mean": AttentionSpec(rule="budget", density=0.25, levels=(1, 2, 4, 8, 16), rest="mean"),
}


@pytest.mark.parametrize(
    ("name", "values", "permuted"),
    [("psa-3", False, False), ("psa-3", True, True), ("five levels, mean", True, False)],
    ids=str,
)
@pytest.mark.parametrize("target", TARGETS)
def test_spread(target, name, values, permuted):
    compile_spread(target, name, values, permuted, ())


@pytest.mark.parametrize(
    ("held", "values", "permuted"), [((2, 4), False, False), ((1, 2, 4), False, True), ((1, 2, 4), True, True)], ids=str
)
@pytest.mark.parametrize("target", TARGETS)
def test_spread_that_pools(target, held, values, permuted):
    compile_spread(target, "psa-3", values, permuted, held)


def compile_spread(target, name, values, permuted, held):
    outputs = ("fractions_ptr",) if values else ("centres_ptr", "centre_tops_ptr", "centre_squares_ptr")
    constants = {
        "HELD": held,
        "SUMS": triton_statistics.pools_alike(BUDGETS[name]),
        **({} if held else {"means_ptr": None, "means_rows": 0}),
        "HEAD_DIM": 128,
        "PADDED_DIM": 128,
        "ROWS": triton_statistics.blocks_at_once(128),
        "PERMUTED": permuted,
        "WIDE": permuted,
        "VALUES": values,
        **dict(triton_statistics.tree(BUDGETS[name])),
        **dict.fromkeys(outputs),
        **({} if permuted else {"permutation": None, "heads": 1, "blocks": 1, "text_before": 1}),
    }
    kernel = triton_statistics.spread_kernel
    # Of values `spread_ptr` is float32, of keys too: the largest entries.
    compile_and_check(kernel, target, constants, {"num_warps": 4}, tensor_cores=False, types={"spread_ptr": "*fp32"})


@pytest.mark.parametrize("target", TARGETS)
def test_energy(target):
    constants = {
        "HEAD_DIM": 96,
        "PADDED_DIM": 128,
        "ROWS": triton_statistics.blocks_at_once(128),
        "PERMUTED": True,
        "WIDE": False,
        "BLOCK": 128,
        "STRIDE": 8,
    }
    compile_and_check(triton_statistics.energy_kernel, target, constants, {"num_warps": 4}, tensor_cores=False)


@pytest.mark.parametrize(("padded", "group"), [(128, 1), (256, 1), (128, 7)], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_outputs(target, padded, group):
    tile = dict(triton_prices.TILE)
    options = {"num_warps": tile.pop("num_warps")}
    compile_and_check(triton_prices.output_kernel, target, {"PADDED_DIM": padded, "GROUP": group, **tile}, options)


@pytest.mark.parametrize(
    ("name", "padded", "group"),
    [("psa-3", 64, 1), ("psa-3", 128, 1), ("five levels, mean", 256, 1), ("psa-3", 128, 7)],
    ids=str,
)
@pytest.mark.parametrize("target", TARGETS)
def test_prices(target, name, padded, group):
    spec = BUDGETS[name]
    tile = dict(triton_prices.TILE)
    options = {"num_warps": tile.pop("num_warps")}
    constants = {
        "PADDED_DIM": padded,
        "LEVELS": spec.levels,
        "POOLED": triton_statistics.pooled_factors(spec),
        "BLOCK_KEY": spec.block_key,
        "SKIP": spec.rest == "skip",
        "COVARIANCE": prices.COVARIANCE,
        "EXPONENT": prices.EXPONENT,
        "CONVEXITY": 0.25,
        "STEPS": prices.STEPS_PER_OCTAVE,
        "HIGHEST": prices.HIGHEST_PRICE,
        "DEPTH": min(64, padded),
        "GROUP": group,
        **tile,
    }
    compile_and_check(triton_prices.price_kernel, target, constants, options)


@pytest.mark.parametrize(("name", "key_blocks"), [("psa-3", 1182), ("five levels, mean", 4725)], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_budget(target, name, key_blocks):
    spec = BUDGETS[name]
    row = triton_budget.row_shape(key_blocks)
    options = {"num_warps": row.pop("num_warps")}
    constants = {
        "UNITS": tuple(unit_costs(spec)),
        "SKIP": spec.rest == "skip",
        "HIGHEST": prices.HIGHEST_PRICE,
        "GUESSES": triton_budget.guesses(key_blocks),
        **row,
    }
    compile_and_check(triton_budget.budget_kernel, target, constants, options, tensor_cores=False)

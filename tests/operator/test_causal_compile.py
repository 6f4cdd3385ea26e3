"""The Triton kernels of causal calls compiled for every supported architecture, as in `test_triton_compile.py`."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from test_triton_compile import TARGETS, compile_and_check

from psa_kernels import AttentionSpec
from psa_kernels.allocation import prices, triton_statistics
from psa_kernels.allocation import triton_budget as budget_rows
from psa_kernels.allocation.triton import row_shape
from psa_kernels.allocation.triton_prices import TILE
from psa_kernels.causal import (
    triton_allocation,
    triton_attention,
    triton_budget,
    triton_dense,
    triton_importance,
    triton_prices,
    triton_queries,
)
from psa_kernels.costs import unit_costs
from psa_kernels.importance import representatives
from psa_kernels.importance import triton as importance
from psa_kernels.sparse import triton as sparse
from psa_kernels.triton_rows import must_be_told

BUDGET = AttentionSpec(rule="budget", density=0.25)


def of_attention(target, head_dim, group):
    """Constants that both attention kernels have, and warps."""
    tile = sparse.tile_shape(divmod(target, 10), head_dim, 2, 128)
    warps = tile.pop("num_warps")
    padded = 64 if head_dim == 64 else 128 if head_dim <= 128 else 256
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded,
        "NEGATIVE_SCALE": False,
        "WIDE": False,
        "LATE_SUM": target // 10 in sparse.LATE_SUM,
        "GROUP": group,
        **tile,
    }, warps


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("target", TARGETS)
def test_attention(target, head_dim):
    constants, warps = of_attention(target, head_dim, 7)
    constants |= {"BLOCK_QUERY": 128, "BLOCK_KEY": 64, "FACTORS": (1, 2, 4), "LISTED": 3, "FLAGS": 64}
    constants |= {"ONLY": False, "only_ptr": None, "ALIGNED": must_be_told(2, head_dim)}
    compile_and_check(triton_attention.attention_kernel, target, constants, {"num_warps": warps})


@pytest.mark.parametrize("factors", [(1,), (2, 64)], ids=str)
def test_branches_that_the_interpreter_does_not_compile(factors):
    """Types must agree in every branch."""
    constants = of_attention(90, 40, 1)[0] | {"PADDED_DIM": 64, "NEGATIVE_SCALE": True, "WIDE": True}
    dense = dict(constants)
    constants |= {"BLOCK_QUERY": 128, "BLOCK_KEY": 64, "FACTORS": factors, "LISTED": 1, "ONLY": True, "FLAGS": 64}
    constants["ALIGNED"] = True
    compile_and_check(triton_attention.attention_kernel, 90, constants, {"num_warps": 8})
    compile_and_check(triton_dense.dense_kernel, 90, dense, {"num_warps": 8})


@pytest.mark.parametrize(("head_dim", "group"), [(128, 7), (256, 4)], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_dense(target, head_dim, group):
    constants, warps = of_attention(target, head_dim, group)
    compile_and_check(triton_dense.dense_kernel, target, constants, {"num_warps": warps})


@pytest.mark.parametrize(("columns", "statistic"), [(4, "max"), (8, "max"), (8, "mean"), (32, "mean")])
@pytest.mark.parametrize("target", TARGETS)
def test_importance(target, columns, statistic):
    tile = triton_importance.causal_tile_shape(divmod(target, 10), 128, 2, columns)
    options = {name: tile.pop(name) for name in ("num_warps", "maxnreg")}
    programs = tile.pop("programs")
    constants = {
        "PADDED_DIM": 128,
        "SAMPLES": 16,
        "COLUMNS": columns,
        "RATIO": 2,
        "LARGEST": statistic == "max",
        "NEGATIVE_SCALE": False,
        "WARPS": options["num_warps"],
        "READ": importance.READ,
        "GROUP": 7,
        **tile,
    }
    compile_and_check(triton_importance.importance_kernel, target, constants, options, programs=programs)


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("target", TARGETS)
def test_query_tiles(target, count):
    constants = {
        "HEAD_DIM": 128,
        "PADDED_DIM": 128,
        "COUNT": count,
        "TILE": 64,
        "SIZES": (2, 1, 4, 1, 2, 4),
        "STRIDES": (1, 2, 16, 2, 8, 4),
        "WIDE": False,
        "CHUNK": representatives.CHUNK,
    }
    compile_and_check(triton_queries.tile_kernel, target, constants, {"num_warps": 4}, tensor_cores=False)


@pytest.mark.parametrize("target", TARGETS)
def test_energy(target):
    rows = triton_statistics.blocks_at_once(128)
    constants = {"HEAD_DIM": 96, "PADDED_DIM": 128, "ROWS": rows, "WIDE": False, "BLOCK": 128, "STRIDE": 8}
    compile_and_check(triton_queries.energy_kernel, target, constants, {"num_warps": 4}, tensor_cores=False)


@pytest.mark.parametrize("rule", ["count", "mass"])
@pytest.mark.parametrize("target", TARGETS)
def test_allocation(target, rule):
    row = row_shape(2048, rule == "mass")
    options = {"num_warps": row.pop("num_warps")}
    constants = {
        "RATIO": 2,
        "THRESHOLDS": (0.09, 0.15, 0.27),
        "FLOOR": 0.0,
        "MASS": rule == "mass",
        "CAP": True,
        **row,
    }
    compile_and_check(triton_allocation.allocation_kernel, target, constants, options, tensor_cores=False)


@pytest.mark.parametrize("target", TARGETS)
def test_prices(target):
    tile = dict(TILE)
    options = {"num_warps": tile.pop("num_warps")}
    common = {"RATIO": 2, "PADDED_DIM": 128, "GROUP": 7, **tile}
    compile_and_check(triton_prices.output_kernel, target, common, options)
    constants = {
        "LEVELS": BUDGET.levels,
        "POOLED": triton_statistics.pooled_factors(BUDGET),
        "BLOCK_KEY": BUDGET.block_key,
        "SKIP": True,
        "COVARIANCE": prices.COVARIANCE,
        "EXPONENT": prices.EXPONENT,
        "CONVEXITY": 0.25,
        "STEPS": prices.STEPS_PER_OCTAVE,
        "HIGHEST": prices.HIGHEST_PRICE,
        "DEPTH": 64,
        **common,
    }
    compile_and_check(triton_prices.price_kernel, target, constants, options)


@pytest.mark.parametrize("target", TARGETS)
def test_budget(target):
    row = budget_rows.row_shape(4096)
    options = {"num_warps": row.pop("num_warps")}
    units = tuple(unit_costs(BUDGET))
    constants = {
        "RATIO": 2,
        "UNITS": units,
        "SPENT": 0.25 * units[0],
        "SKIP": True,
        "HIGHEST": prices.HIGHEST_PRICE,
        **row,
    }
    compile_and_check(triton_budget.budget_kernel, target, constants, options, tensor_cores=False)

"""The level of every candidate so that each row of a causal call costs what it may, in Triton: one program a row.

As `allocation.triton_budget`, whose pieces it uses, but each row has candidates and a budget of its own, and of its
candidates some are kept: they get the finest level whatever that costs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from psa_kernels.allocation.prices import HIGHEST_PRICE
from psa_kernels.allocation.triton_affordable import level_of_rest, lowest_price, most_important_block, rows_of_levels
from psa_kernels.allocation.triton_boundaries import is_kept
from psa_kernels.allocation.triton_budget import row_shape, spend
from psa_kernels.allocation.triton_lists import write_list
from psa_kernels.causal.layout import CausalLayout
from psa_kernels.causal.widths import causal_list_width
from psa_kernels.costs import unit_costs
from psa_kernels.lists import BlockLists
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch


def allocate_budget(
    prices: torch.Tensor, importance: torch.Tensor, causal: CausalLayout, spec: AttentionSpec
) -> BlockLists:
    """Spend on each row the share `spec.density` of what all its candidates cost, where it pays most.

    Args:
        prices: of `triton_prices.upgrade_prices`: int16 `[levels, B, H, rows, key blocks]`.
        importance: of `triton_importance.block_importance`: float32 `[B, H, rows, key blocks]`.

    Returns:
        The levels of the reference; blocks that are no candidates are last in each row, as far as there is room.
    """
    _, batch, heads, _, key_blocks = prices.shape
    launch, width = _plan(
        batch, heads, key_blocks, importance.stride(2), prices.stride(0), prices.stride(3), prices.device, causal, spec
    )
    return spend(launch, prices, importance, width, spec)


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    batch: int, heads: int, key_blocks: int, importance_stride: int, level_stride: int, price_stride: int,
    device: torch.device, causal: CausalLayout, spec: AttentionSpec,
) -> tuple[Launch, int]:  # fmt: skip
    """What fills the lists, and how many blocks a row has room for."""
    units, width, rows = unit_costs(spec), causal_list_width(spec, key_blocks), len(causal.rows)
    if spec.density is None:
        raise ValueError(f"rule={spec.rule!r}: only the rule 'budget' has a budget")
    most = max(1, causal.candidates(causal.rows[-1]))
    launch = Launch(
        budget_kernel, (batch * heads * rows,),
        (importance_stride, level_stride, price_stride, rows, causal.first_row, key_blocks, width, spec.keep_first,
         spec.keep_last),
        RATIO=spec.block_query // spec.block_key, UNITS=tuple(units), SPENT=spec.density * units[0] * spec.levels[0],
        SKIP=spec.rest == "skip", HIGHEST=HIGHEST_PRICE, **row_shape(most),
    )  # fmt: skip
    return launch, width


@triton.jit(do_not_specialize=["rows", "first_row", "key_blocks", "list_width", "keep_first", "keep_last"])
def budget_kernel(
    importance_ptr, prices_ptr, words_ptr, ids_ptr, counts_ptr, importance_stride, level_stride, price_stride, rows,
    first_row, key_blocks, list_width, keep_first, keep_last, RATIO: tl.constexpr, UNITS: tl.constexpr,
    SPENT: tl.constexpr, SKIP: tl.constexpr, HIGHEST: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The lowest price that one row can afford, what the rest buys, then its list.

    The price of kept blocks is stored as `HIGHEST`, which no price below `HIGHEST` + 1 spares.

    Args:
        words_ptr: the prices again, two in each int32.
        SPENT: what a row may cost for each candidate.
    """
    row = tl.program_id(0).to(tl.int64)
    candidates = (first_row + tl.program_id(0) % rows) * RATIO
    kept = tl.minimum(keep_first + keep_last, candidates)
    free = (candidates, keep_first, candidates - keep_last, candidates - kept)
    LEVELS: tl.constexpr = len(UNITS) - 1
    # The product may fall short of the whole number that it is in exact arithmetic.
    budget = tl.floor(tl.full([], SPENT, tl.float64) * candidates.to(tl.float64) + 1e-6).to(tl.int32)
    dearest = candidates * UNITS[0]
    prices, words = rows_of_levels(prices_ptr, words_ptr, row, level_stride, price_stride, LEVELS)

    # The row's most important block costs at least the coarsest level, whatever the price.
    best = tl.full([], -1, tl.int32)
    best_price = tl.full([], HIGHEST + 1, tl.int32)
    cheapest = candidates * UNITS[LEVELS] + kept * (UNITS[0] - UNITS[LEVELS])
    if SKIP:
        best = most_important_block(importance_ptr + row * importance_stride, candidates, CHUNK)
        best_price = tl.load(prices[LEVELS - 1] + best).to(tl.int32)
        cheapest += tl.where(is_kept(best, free), 0, UNITS[LEVELS - 1])

    high, paid = lowest_price(
        words, tl.cdiv(candidates, 2), dearest, cheapest, budget, best_price, UNITS, HIGHEST, WORDS, 0
    )
    left = tl.maximum(budget - paid, 0)

    # Blocks before one get what the next lower price would pay, and that one the best that then is left.
    first = 0
    spent = 0
    begin = 0
    extra = 0
    while (begin < candidates) & (extra <= left):
        block = begin + tl.arange(0, CHUNK)
        each = tl.zeros([CHUNK], tl.int32)
        for level in tl.static_range(LEVELS):
            price = tl.load(prices[level] + block, mask=block < candidates, other=HIGHEST).to(tl.int32)
            raised = (price == high - 1) & (block < candidates) & (is_kept(block, free) == 0)
            if level == LEVELS - 1:
                raised = raised & (block != best)
            each += raised.to(tl.int32) * (UNITS[level] - UNITS[level + 1])
        sums = extra + tl.cumsum(each, 0)
        within = (sums <= left) & (block < candidates)
        first += tl.sum(within.to(tl.int32), 0)
        spent = tl.maximum(spent, tl.max(tl.where(within, sums, 0), 0))
        extra += tl.sum(each, 0)
        begin += CHUNK
    left -= spent
    price = high - (first == candidates).to(tl.int32)
    first = tl.maximum(tl.minimum(first, candidates - 1), 0)
    first_level = level_of_rest(prices, first, price, best, free, left, UNITS)
    write_list(
        ids_ptr, counts_ptr, row, key_blocks, list_width, level_of,
        (prices, free, high, best, first, first_level), LEVELS, CHUNK,
    )  # fmt: skip


@triton.jit
def level_of(block, key_blocks, chosen):
    """Index of the level of some blocks, or that past the last."""
    prices, free, price, best, first, first_level = chosen
    price = price - (block < first).to(tl.int32)
    found = tl.zeros(block.shape, tl.int32)
    for level in tl.static_range(len(prices)):
        upgrade = tl.load(prices[level] + block, mask=block < free[0], other=-0x8000).to(tl.int32)
        cheaper = upgrade < price
        if level == len(prices) - 1:
            cheaper = cheaper & (block != best)
        found += cheaper.to(tl.int32)
    found = tl.where(block == first, first_level, found)
    found = tl.where(is_kept(block, free), 0, found)
    return tl.where(block < free[0], found, len(prices))

"""The level of every pair of blocks so that each row costs what it may and errs least, in Triton: one program a row."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from psa_kernels.allocation.prices import HIGHEST_PRICE
from psa_kernels.allocation.triton_affordable import level_of_rest, lowest_price, most_important_block, rows_of_levels
from psa_kernels.allocation.triton_words import below, half_of, load_words, twice, write_word_list
from psa_kernels.costs import row_budget, unit_costs
from psa_kernels.lists import BlockLists, id_dtype, list_width
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch


def allocate_budget(prices: torch.Tensor, importance: torch.Tensor, spec: AttentionSpec) -> BlockLists:
    """Spend on each row of pairs the share `spec.density` of what dense attention costs, where it pays most.

    Args:
        prices: of `triton_prices.empty_prices`, filled: int16 `[levels, B, H, query blocks, key blocks]`.
        importance: non-negative float32 `[B, H, query blocks, key blocks]` whose rows lie at equal distances.

    Returns:
        The same lists as the reference.
    """
    launch, width = _plan(
        *importance.shape, importance.stride(2), prices.stride(0), prices.stride(3), prices.device, spec
    )
    return spend(launch, prices, importance, width, spec)


def spend(
    launch: Launch, prices: torch.Tensor, importance: torch.Tensor, width: int, spec: AttentionSpec
) -> BlockLists:
    """The lists, of so many blocks a row, that a launch fills."""
    levels, *rows, key_blocks = prices.shape
    ids = torch.empty(*rows, width, dtype=id_dtype(key_blocks), device=prices.device)
    counts = torch.empty(*rows, levels, dtype=torch.int32, device=prices.device)
    # Two prices an integer, also of what pads a row.
    words = prices.as_strided((levels, *rows, prices.stride(3)), prices.stride()).view(torch.int32)
    launch(importance, prices, words, ids, counts)
    return BlockLists(ids, counts, key_blocks, spec.levels)


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    batch: int, heads: int, query_blocks: int, key_blocks: int, importance_stride: int, level_stride: int,
    price_stride: int, device: torch.device, spec: AttentionSpec,
) -> tuple[Launch, int]:  # fmt: skip
    """What fills the lists, and how many blocks a row has room for."""
    units, width = unit_costs(spec), list_width(spec, key_blocks)
    launch = Launch(
        budget_kernel, (batch * heads * query_blocks,),
        (importance_stride, level_stride, price_stride, key_blocks, width, row_budget(spec, key_blocks),
         key_blocks * units[0]),
        UNITS=tuple(units), SKIP=spec.rest == "skip", HIGHEST=HIGHEST_PRICE, **row_shape(key_blocks),
        GUESSES=guesses(key_blocks),
    )  # fmt: skip
    return launch, width


def row_shape(key_blocks: int) -> dict[str, int]:
    """Pairs of prices that are compared at a time, entries that are listed at a time, and warps."""
    warps = 1 if key_blocks <= 2048 else 4
    return {"WORDS": 128 * warps, "CHUNK": 256 if warps == 1 else 512, "num_warps": warps}


def guesses(key_blocks: int) -> int:
    """How often one of the two prices may stay before the interval is halved instead; 0 for always.

    With guesses, on attention of trained models, a row of 1,200 blocks takes 7 to 9 rounds; bisection alone takes 15.
    Several warps only bisect: for guesses the compiler would spill there.
    """
    return 4 if row_shape(key_blocks)["num_warps"] == 1 else 0


# A number of blocks that is known to be 1 folds a row into what the compiler does not survive.
@triton.jit(do_not_specialize=["key_blocks", "list_width", "budget", "dearest"])
def budget_kernel(
    importance_ptr, prices_ptr, words_ptr, ids_ptr, counts_ptr, importance_stride, level_stride, price_stride,
    key_blocks, list_width, budget, dearest, UNITS: tl.constexpr, SKIP: tl.constexpr, HIGHEST: tl.constexpr,
    WORDS: tl.constexpr, CHUNK: tl.constexpr, GUESSES: tl.constexpr,
):  # fmt: skip
    """The lowest price that one row can afford, what the rest buys, then its list.

    Args:
        words_ptr: the prices again, two in each int32.
        dearest: cost of a row with all blocks at the finest level.
        GUESSES: how often one of the two prices may stay before the interval is halved instead; 0 for always.
    """
    row = tl.program_id(0).to(tl.int64)
    row_words = price_stride // 2
    LEVELS: tl.constexpr = len(UNITS) - 1
    prices, words = rows_of_levels(prices_ptr, words_ptr, row, level_stride, price_stride, LEVELS)

    # The row's most important block costs at least the coarsest level, whatever the price.
    best = tl.full([], -1, tl.int32)
    best_price = tl.full([], HIGHEST + 1, tl.int32)
    cheapest = dearest // UNITS[0] * UNITS[LEVELS]
    if SKIP:
        best = most_important_block(importance_ptr + row * importance_stride, key_blocks, CHUNK)
        best_price = tl.load(prices[LEVELS - 1] + best).to(tl.int32)
        cheapest += UNITS[LEVELS - 1]

    high, paid = lowest_price(words, row_words, dearest, cheapest, budget, best_price, UNITS, HIGHEST, WORDS, GUESSES)
    left = tl.maximum(budget - paid, 0)

    # Blocks before one get what the next lower price would pay, and that one the best that then is left.
    first = 0
    spent = 0
    begin = 0
    extra = 0
    at_price, at_lower = twice(high), twice(tl.maximum(high - 1, 0))
    while (begin < row_words) & (extra <= left):
        word = begin + tl.arange(0, CHUNK // 2)
        each = tl.zeros([CHUNK // 2], tl.int32)
        for level in tl.static_range(LEVELS):
            pair = load_words(words[level], word, row_words)
            raised = below(pair, at_price) - below(pair, at_lower)
            if level == LEVELS - 1:
                raised &= tl.where(word == best >> 1, ~half_of(best), -1)
            each += raised * (UNITS[level] - UNITS[level + 1])
        # Up to the second block of each word, and up to the first.
        second = each >> 16
        sums = extra + tl.cumsum((each & 0xFFFF) + second, 0)
        within = (sums <= left) & (2 * word + 1 < key_blocks)
        within_first = (sums - second <= left) & (2 * word < key_blocks)
        first += tl.sum(within.to(tl.int32) + within_first.to(tl.int32), 0)
        spent = tl.maximum(spent, tl.max(tl.where(within, sums, tl.where(within_first, sums - second, 0)), 0))
        extra = tl.max(sums, 0)
        begin += CHUNK // 2
    left -= spent
    price = high - (first == key_blocks).to(tl.int32)
    first = tl.minimum(first, key_blocks - 1)
    first_level = level_of_rest(prices, first, price, best, None, left, UNITS)
    write_word_list(
        ids_ptr, counts_ptr, row, key_blocks, list_width, words, row_words, (high, best, first, first_level), HIGHEST,
        CHUNK,
    )  # fmt: skip

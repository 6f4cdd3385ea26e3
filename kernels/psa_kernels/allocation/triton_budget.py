"""The level of every pair of blocks so that each row costs what it may and errs least, in Triton: one program a row."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from psa_kernels.allocation.prices import HIGHEST_PRICE
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
    levels, batch, heads, query_blocks, key_blocks = prices.shape
    rows, device = (batch, heads, query_blocks), prices.device
    launch, width = _plan(*importance.shape, importance.stride(2), prices.stride(0), prices.stride(3), device, spec)
    ids = torch.empty(*rows, width, dtype=id_dtype(key_blocks), device=device)
    counts = torch.empty(*rows, levels, dtype=torch.int32, device=device)
    # Two prices an integer, also of what pads a row.
    words = prices.as_strided((levels, *rows, prices.stride(3)), prices.stride()).view(torch.int32)
    launch(importance, prices, words, ids, counts)
    return BlockLists(ids, counts, key_blocks)


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

    What a row costs falls as the price rises, so the price is guessed where a straight line between the costs of one
    that is too low and one that is affordable meets the budget (false position, in the variant of Illinois).

    Args:
        words_ptr: the prices again, two in each int32.
        dearest: cost of a row with all blocks at the finest level.
        GUESSES: how often one of the two prices may stay before the interval is halved instead; 0 for always.
    """
    row = tl.program_id(0).to(tl.int64)
    row_words = price_stride // 2
    LEVELS: tl.constexpr = len(UNITS) - 1
    # A row of each level.
    prices = ()
    words = ()
    for level in tl.static_range(LEVELS):
        start = level * level_stride.to(tl.int64) + row * price_stride
        prices += (prices_ptr + start,)
        words += (words_ptr + start // 2,)

    # The row's most important block costs at least the coarsest level, whatever the price.
    kept = tl.full([], -1, tl.int32)
    kept_price = tl.full([], HIGHEST + 1, tl.int32)
    cheapest = dearest // UNITS[0] * UNITS[LEVELS]
    if SKIP:
        kept = most_important(importance_ptr + row * importance_stride, key_blocks, CHUNK)
        kept_price = tl.load(prices[LEVELS - 1] + kept).to(tl.int32)
        cheapest += UNITS[LEVELS - 1]

    # A price above all is affordable; -1 stands for one that is known not to be.
    low, high, paid = -1, HIGHEST + 1, cheapest
    # A budget that is spent buys nothing more, except where the coarsest level costs what a skipped block does.
    FREE: tl.constexpr = UNITS[LEVELS - 1] == UNITS[LEVELS]
    # What the price that is too low costs too much; how often in a row the other one fell, or negative, this one rose.
    over = dearest - budget
    run = 0
    while (high - low > 1) & ((paid != budget) | FREE):
        middle = (low + high) // 2
        if GUESSES > 0:
            guessed = (run != 0) & (tl.abs(run) < GUESSES) & (paid != budget)
            if guessed:
                # The end that stays counts half each further time, so that the next guess lies nearer to it.
                weight = tl.math.exp2((run - tl.where(run > 0, 1, -1)).to(tl.float32))
                under = (budget - paid).to(tl.float32) * weight
                share = under / tl.maximum(under + over.to(tl.float32), 1)
                guess = high - ((high - low).to(tl.float32) * share).to(tl.int32)
                middle = tl.minimum(tl.maximum(guess, low + 1), high - 1)
        spared = spared_cost(words, middle, row_words, UNITS, WORDS)
        found = dearest - spared + (kept_price < middle).to(tl.int32) * (UNITS[LEVELS - 1] - UNITS[LEVELS])
        affordable = found <= budget
        if GUESSES > 0:
            run = tl.where(affordable, tl.maximum(run, 0) + 1, tl.minimum(run, 0) - 1)
            over = tl.where(affordable, over, found - budget)
        low, high = tl.where(affordable, low, middle), tl.where(affordable, middle, high)
        paid = tl.where(affordable, found, paid)
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
                raised &= tl.where(word == kept >> 1, ~half_of(kept), -1)
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
    allowed = left + UNITS[LEVELS]
    for level in tl.static_range(LEVELS):
        dearer = tl.load(prices[level] + first).to(tl.int32) >= price
        if level == LEVELS - 1:
            dearer = dearer | (first == kept)
        allowed += dearer.to(tl.int32) * (UNITS[level] - UNITS[level + 1])
    first_level = tl.full([], 0, tl.int32)
    for level in tl.static_range(LEVELS):
        first_level += (UNITS[level] > allowed).to(tl.int32)

    write_word_list(
        ids_ptr, counts_ptr, row, key_blocks, list_width, words, row_words, (high, kept, first, first_level), HIGHEST,
        CHUNK,
    )  # fmt: skip


@triton.jit
def spared_cost(words, price, row_words, UNITS: tl.constexpr, WORDS: tl.constexpr):
    """What a row costs less than all its blocks at the finest level, if upgrades are bought that cost a price or more.

    The prices below that one are added up in two counters of 16 bits.
    """
    counts = tl.zeros([WORDS], tl.int32)
    # Parts that are whole need no masks, which cost as much as a fifth of what is done with them.
    whole = row_words // WORDS * WORDS
    for begin in range(0, whole, WORDS):
        counts += spared_of(words, begin + tl.arange(0, WORDS), None, price, UNITS)
    if whole < row_words:
        counts += spared_of(words, whole + tl.arange(0, WORDS), row_words, price, UNITS)
    return tl.sum((counts & 0xFFFF) + ((counts >> 16) & 0xFFFF), 0)


@triton.jit
def spared_of(words, word, row_words, price, UNITS: tl.constexpr):
    """What some words spare, in both halves."""
    threshold = twice(price)
    spared = tl.zeros(word.shape, tl.int32)
    for level in tl.static_range(len(words)):
        spared += below(load_words(words[level], word, row_words), threshold) * (UNITS[level] - UNITS[level + 1])
    return spared


@triton.jit
def most_important(importance, key_blocks, CHUNK: tl.constexpr):
    """The first of a row's most important blocks."""
    largest = tl.full([CHUNK], -1, tl.int32)
    found = tl.full([CHUNK], 0, tl.int32)
    for begin in range(0, key_blocks, CHUNK):
        block = begin + tl.arange(0, CHUNK)
        # As integers floats that are not negative compare alike, and any that is not a number is the largest.
        key = tl.load(importance + block, mask=block < key_blocks, other=0.0).to(tl.int32, bitcast=True)
        key = tl.where(block < key_blocks, key, -1)
        found = tl.where(key > largest, block, found)
        largest = tl.maximum(largest, key)
    return tl.min(tl.where(largest == tl.max(largest, 0), found, 0x7FFFFFFF), 0)

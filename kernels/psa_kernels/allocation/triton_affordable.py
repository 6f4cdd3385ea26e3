"""The lowest price that a row can afford, and the level that one of its blocks gets for what is left, in Triton.

Rows are given as their prices, of each level, and as words of two prices each. What a row spares is what it costs less
than all its blocks at the finest level.
"""

from __future__ import annotations

import triton
import triton.language as tl

from psa_kernels.allocation.triton_boundaries import is_kept
from psa_kernels.allocation.triton_words import below, load_words, twice


@triton.jit
def rows_of_levels(prices_ptr, words_ptr, row, level_stride, price_stride, LEVELS: tl.constexpr):
    """Where the prices of a row begin, and its words: one pointer a level."""
    prices = ()
    words = ()
    for level in tl.static_range(LEVELS):
        start = level * level_stride.to(tl.int64) + row * price_stride
        prices += (prices_ptr + start,)
        words += (words_ptr + start // 2,)
    return prices, words


@triton.jit
def lowest_price(
    words, row_words, dearest, cheapest, budget, best_price, UNITS: tl.constexpr, HIGHEST: tl.constexpr,
    WORDS: tl.constexpr, GUESSES: tl.constexpr,
):  # fmt: skip
    """The lowest price that a row can afford, and what it costs at that price.

    What a row costs falls as the price rises, so the price is guessed where a straight line between the costs of one
    that is too low and one that is affordable meets the budget (false position, in the variant of Illinois).

    Args:
        dearest, cheapest: cost of the row with all blocks at the finest level, and at a price above all.
        best_price: up to which price the row's most important block pays for the coarsest level.
        GUESSES: how often one of the two prices may stay before the interval is halved instead; 0 for always.
    """
    LEVELS: tl.constexpr = len(words)
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
        found = dearest - spared + (best_price < middle).to(tl.int32) * (UNITS[LEVELS - 1] - UNITS[LEVELS])
        affordable = found <= budget
        if GUESSES > 0:
            run = tl.where(affordable, tl.maximum(run, 0) + 1, tl.minimum(run, 0) - 1)
            over = tl.where(affordable, over, found - budget)
        low, high = tl.where(affordable, low, middle), tl.where(affordable, middle, high)
        paid = tl.where(affordable, found, paid)
    return high, paid


@triton.jit
def level_of_rest(prices, block, price, best, free, left, UNITS: tl.constexpr):
    """The best level that a block gets at a price with what is left of the budget beside.

    Args:
        best: the block that has at least the coarsest level at any price, or -1.
        free: None, or as in `triton_boundaries`.
    """
    LEVELS: tl.constexpr = len(prices)
    allowed = left + UNITS[LEVELS]
    for level in tl.static_range(LEVELS):
        dearer = tl.load(prices[level] + block).to(tl.int32) >= price
        if free is not None:
            dearer = dearer | is_kept(block, free)
        if level == LEVELS - 1:
            dearer = dearer | (block == best)
        allowed += dearer.to(tl.int32) * (UNITS[level] - UNITS[level + 1])
    found = tl.full([], 0, tl.int32)
    for level in tl.static_range(LEVELS):
        found += (UNITS[level] > allowed).to(tl.int32)
    return found


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
def most_important_block(importance, key_blocks, CHUNK: tl.constexpr):
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

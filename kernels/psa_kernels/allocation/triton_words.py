"""Rows of prices two to a word of 32 bits, in Triton: comparisons of both at once, and the list that they lead to.

A price has 15 bits. The bit above each of the two is set or not by one subtraction, if that price is below another one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from psa_kernels.allocation.triton_lists import advance, smaller


@triton.jit
def load_words(words, word, row_words):
    """Words of a row, and past its end, unless that is None, what pads it: the highest price."""
    if row_words is None:
        return tl.load(words + word)
    else:
        return tl.load(words + word, mask=word < row_words, other=0x7FFF7FFF)


@triton.jit
def twice(price):
    """What `below` compares with: a price from 0 to 32,768 in both halves of a word."""
    threshold = tl.full([], 0x7FFF, tl.int32) + price
    return threshold | (threshold << 16)


@triton.jit
def below(pair, threshold):
    """1 in each half of a word whose price is below that of the threshold.

    A price from 0 to 32,767 is not below 0, and all but 32,767, of which padding consists, are below that.
    """
    return ((threshold - pair) >> 15) & 0x10001


@triton.jit
def half_of(block):
    """1 in the half of its word in which a block's price is."""
    return 1 << ((block & 1) * 16)


@triton.jit
def kinds_of(words, word, row_words, chosen):
    """Indices of the levels of the two blocks of each word, the number of levels past the last one.

    Args:
        words: a row of each level.
        chosen: the price of the row; the block that has at least the coarsest level, or -1; the first block for which
            that price holds, as those before it get what the next lower price pays; and that first block's own level.
    """
    price, kept, first, first_level = chosen
    # Both blocks of a word are before the first one or both are not, but for that one itself. No price is below 0.
    threshold = tl.where(word < (first + 1) >> 1, twice(tl.maximum(price - 1, 0)), twice(price))
    kinds = tl.zeros(word.shape, tl.int32)
    for level in tl.static_range(len(words)):
        cheaper = below(load_words(words[level], word, row_words), threshold)
        if level == len(words) - 1:
            cheaper &= tl.where(word == kept >> 1, ~half_of(kept), -1)
        kinds += cheaper
    return tl.where(word == first >> 1, (kinds & ~(half_of(first) * 0xFFFF)) | (half_of(first) * first_level), kinds)


@triton.jit
def write_word_list(
    ids_ptr, counts_ptr, row, key_blocks, list_width, words, row_words, chosen, HIGHEST: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the counts and the ids of one row, as `triton_lists.write_list` does.

    Args:
        words, chosen: as in `kinds_of`.
        HIGHEST: the price of which padding consists.
        CHUNK: blocks at a time, at most 1,023, which a counter of ten bits can hold.
    """
    LEVELS: tl.constexpr = len(words)
    KINDS: tl.constexpr = LEVELS + 1
    # Where four kinds are all, the place of the fourth is that which the other three leave.
    STEP: tl.constexpr = 4 if KINDS <= 4 else 3
    HALF: tl.constexpr = CHUNK // 2
    start = 0
    for kind in tl.static_range(0, KINDS, STEP):
        ones = tl.zeros([HALF], tl.int32)
        for begin in range(0, row_words, HALF):
            low, high = halves_of(kinds_of(words, begin + tl.arange(0, HALF), row_words, chosen), kind)
            ones += ones_of(low, STEP) + ones_of(high, STEP)
        counts = (tl.sum(ones & 0x3FF, 0), tl.sum((ones >> 10) & 0x3FF, 0), tl.sum(ones >> 20, 0))
        if kind == 0:
            # Padding counts as blocks of the finest level, unless nothing has a price that high.
            padding = tl.cdiv(row_words, HALF) * CHUNK - key_blocks
            counts = (counts[0] - tl.where(chosen[0] > HIGHEST, 0, padding), counts[1], counts[2])
        for index in tl.static_range(smaller(3, LEVELS - kind)):
            tl.store(counts_ptr + row * LEVELS + kind + index, counts[index])
        places = (start, start + counts[0], start + counts[0] + counts[1])
        start += counts[0] + counts[1] + counts[2]
        attended = start
        for begin in range(0, row_words, HALF):
            word = begin + tl.arange(0, HALF)
            low, high = halves_of(kinds_of(words, word, row_words, chosen), kind)
            low_ones, both_ones = ones_of(low, STEP), ones_of(low, STEP) + ones_of(high, STEP)
            counted = tl.cumsum(both_ones, 0) - both_ones
            position = 2 * tl.arange(0, HALF)
            put(
                ids_ptr + row * list_width,
                low,
                counted,
                places,
                attended,
                position,
                begin,
                key_blocks,
                list_width,
                STEP,
            )
            put(
                ids_ptr + row * list_width, high, counted + low_ones, places, attended, position + 1, begin, key_blocks,
                list_width, STEP,
            )  # fmt: skip
            found = tl.sum(both_ones, 0)
            places = advance(places, found)
            attended += CHUNK - ((found & 0x3FF) + ((found >> 10) & 0x3FF) + (found >> 20))


@triton.jit
def halves_of(kinds, FIRST: tl.constexpr):
    """The kinds in the two halves of words, counted from the kind `FIRST`."""
    return (kinds & 0xFFFF) - FIRST, (kinds >> 16) - FIRST


@triton.jit
def ones_of(kind, STEP: tl.constexpr):
    """A one in the counter of each kind 0, 1 or 2: three of ten bits share an integer."""
    if STEP == 4:
        return (1 << (10 * kind)) & 0x3FFFFFFF
    else:
        return tl.where((kind >= 0) & (kind < 3), 1 << (10 * (kind & 3)), 0)


@triton.jit
def put(
    ids, kind, counted, places, attended, position, begin, key_blocks, list_width, STEP: tl.constexpr
):  # fmt: skip
    """Write the blocks at some positions of a chunk of words to their places in the list.

    Args:
        counted: how many blocks of each kind the chunk has before them.
        places, attended: of the next block of each of three kinds, and of the fourth where there is one.
        begin: the word with which the chunk begins.
    """
    a, b, c = counted & 0x3FF, (counted >> 10) & 0x3FF, counted >> 20
    place = tl.where(kind == 0, places[0] + a, tl.where(kind == 1, places[1] + b, places[2] + c))
    block = 2 * begin + position
    listed = block < key_blocks
    if STEP == 4:
        place = tl.where(kind == 3, attended + position - (a + b + c), place)
    else:
        listed = listed & (kind >= 0) & (kind < 3)
    tl.store(ids + place, block.to(ids.dtype.element_ty), mask=listed & (place < list_width))

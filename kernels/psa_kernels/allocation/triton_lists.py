"""How a program writes the list of one row of blocks, in Triton: without sorting, whatever chose the levels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_list(
    ids_ptr, counts_ptr, row, key_blocks, list_width, kind_of: tl.constexpr, chosen, LEVELS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the counts and the ids of one row, `CHUNK` blocks at a time.

    Args:
        kind_of: function of some blocks, `key_blocks` and `chosen` that gives the index of their levels, `LEVELS` for
            those past the last level and for what lies past the last block of the row.
        chosen: tuple of what that function needs.
        CHUNK: at most 1,023, which a counter of ten bits can hold.
    """
    # Kinds of blocks: the levels, and those past the last. Where four are all, the place of the fourth is that which
    # the other three leave.
    KINDS: tl.constexpr = LEVELS + 1
    STEP: tl.constexpr = 4 if KINDS <= 4 else 3
    start = 0
    for first in tl.static_range(0, KINDS, STEP):
        counts = (0, 0, 0)
        for begin in range(0, key_blocks, CHUNK):
            block = begin + tl.arange(0, CHUNK)
            counts = advance(counts, tl.sum(ones_of(kind_of(block, key_blocks, chosen) - first), 0))
        for index in tl.static_range(smaller(3, LEVELS - first)):
            tl.store(counts_ptr + row * LEVELS + first + index, counts[index])
        places = (start, start + counts[0], start + counts[0] + counts[1])
        start += counts[0] + counts[1] + counts[2]
        attended = start
        for begin in range(0, key_blocks, CHUNK):
            block = begin + tl.arange(0, CHUNK)
            kind = kind_of(block, key_blocks, chosen) - first
            ones = ones_of(kind)
            counted = tl.cumsum(ones, 0) - ones
            a, b, c = counted & 0x3FF, (counted >> 10) & 0x3FF, counted >> 20
            place = tl.where(kind == 0, places[0] + a, tl.where(kind == 1, places[1] + b, places[2] + c))
            listed = (kind >= 0) & (kind < 3) & (block < key_blocks)
            if STEP == 4:
                place = tl.where(kind == 3, attended + (block - begin) - (a + b + c), place)
                listed = block < key_blocks
            listed = listed & (place < list_width)
            tl.store(ids_ptr + row * list_width + place, block.to(ids_ptr.dtype.element_ty), mask=listed)
            found = tl.sum(ones, 0)
            places = advance(places, found)
            attended += CHUNK - ((found & 0x3FF) + ((found >> 10) & 0x3FF) + (found >> 20))


# Inside a kernel, `min` stands for an operation on tensors.
@triton.constexpr_function
def smaller(a, b):
    return min(a, b)


@triton.jit
def ones_of(kind):
    """A one in the counter of each block's kind, if that is 0, 1 or 2: three counters of ten bits share an integer."""
    counter = tl.where(kind == 0, 1, tl.where(kind == 1, 1 << 10, 1 << 20))
    return tl.where((kind >= 0) & (kind < 3), counter, 0)


@triton.jit
def advance(counts, ones):
    """Add the three counters of a sum of ones to three numbers."""
    return counts[0] + (ones & 0x3FF), counts[1] + ((ones >> 10) & 0x3FF), counts[2] + (ones >> 20)

"""The order of the work of the attention kernels of causal calls."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def item_at(item, items, query_tiles, GROUP: tl.constexpr):
    """Head of all batch items, and tile of queries, of an item.

    One head of the keys comes after the other, and the heads that share it beside each other. Tiles with the longest
    lists come first in the last of them, last in the one before, and so on in turn: items that run at the same time are
    about as long, also where one head follows the other, and those at the end are short.
    """
    left = items - 1 - item
    run, place = left // GROUP // query_tiles, left // GROUP % query_tiles
    return run * GROUP + left % GROUP, tl.where(run % 2 == 0, place, query_tiles - 1 - place)

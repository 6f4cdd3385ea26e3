"""Pieces of the attention kernels of causal calls: lists of whole blocks alone, and the order of the work."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cut_list(
    counts, candidates, video_keys, FACTORS: tl.constexpr, LISTED: tl.constexpr, BLOCK_KEY: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Cut one list into tiles, as `sparse.tiles.cut_list`, whose last block is never ragged here.

    Args:
        counts: pointer to the counts of one row of `BlockLists`.
        candidates: how many blocks the row has, listed or not.

    Returns:
        Tuples of scalars, one entry a level: first entry of the list; number of full tiles up to and with this level;
        number of leftover rows up to and with it; first row in the pyramid, which holds no level of factor 1.
    """
    starts = ()
    tile_ends = ()
    leftover_ends = ()
    level_rows = ()
    start = 0
    tiles = 0
    leftover = 0
    level_row = 0
    for level in tl.static_range(len(FACTORS)):
        if level < LISTED:
            count = tl.load(counts + level)
        else:
            count = candidates - start
        rows = count * (BLOCK_KEY // FACTORS[level])
        starts = starts + (start,)
        level_rows = level_rows + (level_row,)
        tiles += rows // TILE
        leftover += rows % TILE
        tile_ends = tile_ends + (tiles,)
        leftover_ends = leftover_ends + (leftover,)
        start += count
        if FACTORS[level] > 1:
            level_row += tl.cdiv(video_keys, FACTORS[level])
    return starts, tile_ends, leftover_ends, level_rows


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

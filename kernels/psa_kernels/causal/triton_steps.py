"""Pieces of the attention kernels of causal calls: a step of the online softmax, and lists of whole blocks alone."""

from __future__ import annotations

import triton
import triton.language as tl

from psa_kernels.triton_rows import load_rows


@triton.jit
def attend(
    q, k_rows, v_rows, dims, scale, bias, visible, top, total, accumulator, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, LATE_SUM: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2.

    Args:
        q: `[m, PADDED_DIM]`.
        k_rows, v_rows: pointers to `n` rows each.
        scale: positive factor on the dot products, log2(e) included.
        bias: added to every logit, a scalar; or None.
        visible: if there is no bias: `[m, n]` or `[1, n]`, which rows each query may read. What it may not read adds
            exactly nothing.
        top, total, accumulator: largest logit so far, sum of the weights and weighted sum of values relative to it:
            float32 `[m]`, `[m]` or `[m, 4]`, `[m, PADDED_DIM]`.
        LATE_SUM: leave each row's sum in four parts, as in `sparse.triton`.

    Returns:
        The new top, total and accumulator.
    """
    keys = load_rows(k_rows, dims, HEAD_DIM, PADDED_DIM)
    scores = tl.dot(q, keys.T, input_precision="ieee")
    if visible is None:
        # It joins the maximum that is subtracted anyway, so that scale and bias cost one operation an entry.
        new_top = tl.maximum(top, tl.max(scores, 1) * scale + bias)
        weights = tl.math.exp2(scores * scale - (new_top - bias)[:, None])
    else:
        scores = tl.where(visible, scores * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_top[:, None])
    return weigh(weights, new_top, v_rows, dims, top, total, accumulator, HEAD_DIM, PADDED_DIM, LATE_SUM)


@triton.jit
def attend_with_biases(
    q, k_rows, v_rows, dims, scale, biases, top, total, accumulator, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    LATE_SUM: tl.constexpr,
):  # fmt: skip
    """The same where each row has a bias of its own: `[1, n]`, -inf where there is none."""
    keys = load_rows(k_rows, dims, HEAD_DIM, PADDED_DIM)
    scores = tl.dot(q, keys.T, input_precision="ieee") * scale + biases
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.math.exp2(scores - new_top[:, None])
    return weigh(weights, new_top, v_rows, dims, top, total, accumulator, HEAD_DIM, PADDED_DIM, LATE_SUM)


@triton.jit
def weigh(
    weights, new_top, v_rows, dims, top, total, accumulator, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    LATE_SUM: tl.constexpr,
):  # fmt: skip
    """The second half of a step: add up weights and weighted values."""
    shrink = tl.math.exp2(top - new_top)
    if LATE_SUM:
        parts = tl.reshape(weights, [weights.shape[0], weights.shape[1] // 8, 4, 2])
        total = total * shrink[:, None] + tl.sum(tl.sum(parts, 3), 1)
    else:
        total = total * shrink + tl.sum(weights, 1)
    values = load_rows(v_rows, dims, HEAD_DIM, PADDED_DIM)
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator * shrink[:, None], input_precision="ieee")
    return new_top, total, accumulator


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

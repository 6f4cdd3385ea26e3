"""The warps of the kernel for Hopper that fill shared memory: one with queries, one with keys, one with values."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from psa_kernels.sparse.hopper.names import copy_boxes, copy_rows, reinterpret
from psa_kernels.sparse.hopper.plan import plan_tiles, run_ends
from psa_kernels.sparse.hopper.step import MAX_LOOKS, report_nearly_done, wait_for_others
from psa_kernels.sparse.hopper.tiles import (
    TILE_M,
    TILE_N,
    announce_item,
    announced_item,
    divide,
    in_ring,
    item_at,
    list_row,
    log2_of,
    panel_columns,
    tile_layout,
)


@gluon.jit
def fetch_queries(
    schedule, q_ptr, factors_ptr, q_tiles, factors, plans, biases, q_full, q_empty, lists, permutation, stride_qb,
    stride_qn, stride_qh, query_tokens, HEAD_DIM: gl.constexpr, BLOCK_QUERY: gl.constexpr, BLOCK_KEY: gl.constexpr,
    FACTORS: gl.constexpr, TEXT: gl.constexpr, PERMUTED: gl.constexpr, IN_STEP: gl.constexpr,
    QUERY_SLOTS: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One warp: announce items, gather their queries, perhaps permuted, and plan the tiles of their lists."""
    ids_ptr, counts_ptr, heads, items, video_queries, video_keys, list_width, text_before, text_after, past = lists
    lead, shift = past
    # Numbers that are copied together, 16 bytes.
    UNIT: gl.constexpr = divide(128, q_tiles.dtype.primitive_bitwidth)
    CHUNKS: gl.constexpr = HEAD_DIM // UNIT
    ROWS: gl.constexpr = 16
    layout: gl.constexpr = gl.BlockedLayout([1, UNIT], [32 // CHUNKS, CHUNKS], [1, 1], [1, 0])
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    place = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    patience = gl.to_tensor(MAX_LOOKS)
    done = gl.to_tensor(0)
    item = announce_item(schedule, done)
    while item < items:
        head_index, batch, head, query_tile = item_at(item, items, heads, video_queries, GROUP, CAUSAL)
        base = q_ptr + batch.to(gl.int64) * stride_qb * UNIT + head.to(gl.int64) * stride_qh * UNIT
        row = list_row(head_index, query_tile, video_queries, BLOCK_QUERY)
        slot, phase = in_ring(done, QUERY_SLOTS)
        mbarrier.wait(q_empty.index(slot), phase ^ 1)
        for part in gl.static_range(TILE_M // ROWS):
            # Rows past the end repeat the last one; their output is not stored.
            position = gl.minimum(query_tile * TILE_M + part * ROWS + place, video_queries - 1)
            if CAUSAL:
                token = gl.maximum(position, lead) + shift
            else:
                token = position + text_before
            if PERMUTED:
                token = gl.load(permutation + position) + text_before
            half = q_tiles.index(slot * 2 + divide(part * ROWS, 64))
            copy_rows(
                half.slice(part * ROWS % 64, ROWS, dim=0),
                base + token.to(gl.int64)[:, None] * stride_qn * UNIT + dims[None, :],
                eviction_policy="evict_first",
            )
        async_copy.commit_group()
        if factors_ptr is not None:
            load_factors(
                factors_ptr + head_index.to(gl.int64) * query_tokens, factors, slot, query_tile, video_queries,
                text_before, permutation, PERMUTED,
            )  # fmt: skip
        ends = run_ends(
            ids_ptr + row * list_width, counts_ptr + row * len(FACTORS), video_keys, text_before, text_after,
            BLOCK_KEY, FACTORS, TEXT,
        )  # fmt: skip
        # A diagonal is one tile.
        plan_tiles(plans, biases, slot, ends, text_before, text_after, BLOCK_KEY, FACTORS, TEXT, 1 if CAUSAL else 0)
        async_copy.wait_group(0)
        fence_async_shared()
        if IN_STEP:
            patience = wait_for_others(schedule[3] + 1, done, items, patience)
        mbarrier.arrive(q_full.index(slot), count=1)
        done += 1
        item = announce_item(schedule, done)


@gluon.jit
def load_factors(pointer, factors, slot, query_tile, video_queries, text_before, permutation, PERMUTED: gl.constexpr):
    """Bring the factors of a tile's queries, which belong to their tokens, into shared memory."""
    HALF: gl.constexpr = TILE_M // 2
    place = gl.arange(0, HALF, gl.BlockedLayout([HALF // 32], [32], [1], [0]))
    for half in gl.static_range(2):
        position = gl.minimum(query_tile * TILE_M + half * HALF + place, video_queries - 1)
        token = position + text_before
        if PERMUTED:
            token = gl.load(permutation + position) + text_before
        factors.index(slot * 2 + half).store(gl.load(pointer + token))


@gluon.jit
def fetch_rows(
    schedule, rows, tiles, full, empty, lists, HEAD_DIM: gl.constexpr, BLOCK_QUERY: gl.constexpr,
    BLOCK_KEY: gl.constexpr, FACTORS: gl.constexpr, TEXT: gl.constexpr, REPORTS: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One warp: copy the boxes of each item's list, of keys or of values, into tile after tile.

    REPORTS: tell the other programs when the last level is begun.
    GROUP: how many neighbouring heads of the queries read the same head of the keys and values.
    CAUSAL: begin with the diagonal, rows of what else would be the text after the video.
    """
    ids_ptr, counts_ptr, heads, items, video_queries, video_keys, list_width, text_before, text_after, _ = lists
    tile = gl.to_tensor(0)
    done = gl.to_tensor(0)
    item = announced_item(schedule, done, 1)
    while item < items:
        head_index, batch, head, query_tile = item_at(item, items, heads, video_queries, GROUP, CAUSAL)
        row = list_row(head_index, query_tile, video_queries, BLOCK_QUERY)
        if GROUP > 1:
            head = head // GROUP
        ids = ids_ptr + row * list_width
        place = gl.to_tensor(0)
        if CAUSAL:
            open_tile(tiles, full, empty, tile, HEAD_DIM, STAGES)
            for box in gl.static_range(TILE_N // BLOCK_KEY):
                copy_box(
                    rows[1], batch, head, query_tile * TILE_N + box * BLOCK_KEY, tiles, full, tile,
                    box * BLOCK_KEY, BLOCK_KEY, HEAD_DIM, STAGES,
                )  # fmt: skip
            tile += 1
        if TEXT:
            for side in gl.static_range(2):
                if rows[side] is not None:
                    length = text_before if side == 0 else text_after
                    for first in range(0, length, BLOCK_KEY):
                        if place == 0:
                            open_tile(tiles, full, empty, tile, HEAD_DIM, STAGES)
                        copy_box(rows[side], batch, head, first, tiles, full, tile, place, BLOCK_KEY, HEAD_DIM, STAGES)
                        place += BLOCK_KEY
                        tile, place = tile + (place >> log2_of(TILE_N)), place & (TILE_N - 1)
        for level in gl.static_range(len(FACTORS)):
            if REPORTS and level == len(FACTORS) - 1:
                report_nearly_done(schedule[3] + 1)
            count = gl.load(counts_ptr + row * len(FACTORS) + level)
            tile, place = copy_run(
                rows[2 + level], batch, head, ids, count, tiles, full, empty, tile, place,
                divide(BLOCK_KEY, FACTORS[level]), HEAD_DIM, STAGES,
            )  # fmt: skip
            ids += count
        # What lies past the end arrives as zeros. A weight of 0 times what was there before might not be 0.
        if place > 0:
            LAST: gl.constexpr = len(FACTORS) - 1
            for at in range(place, TILE_N, divide(BLOCK_KEY, FACTORS[LAST])):
                copy_box(
                    rows[2 + LAST], batch, head, video_keys, tiles, full, tile, at, divide(BLOCK_KEY, FACTORS[LAST]),
                    HEAD_DIM, STAGES,
                )  # fmt: skip
            tile += 1
        done += 1
        item = announced_item(schedule, done, 1)


@gluon.jit
def copy_run(
    source, batch, head, ids, count, tiles, full, empty, tile, place, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the `count` blocks of a level, `ROWS` rows each, from a place in a tile on; return where the next go.

    Whole tiles are a case of their own, in which one warp keeps up with the warpgroups also where blocks are small.
    """
    BOXES: gl.constexpr = TILE_N // ROWS
    before = gl.minimum(count, ((TILE_N - place) & (TILE_N - 1)) // ROWS)
    for index in range(before):
        block = gl.load(ids + index).to(gl.int32)
        copy_box(source, batch, head, block * ROWS, tiles, full, tile, place + index * ROWS, ROWS, HEAD_DIM, STAGES)
    place += before * ROWS
    tile, place = tile + (place >> log2_of(TILE_N)), place & (TILE_N - 1)
    ids += before
    for _ in range((count - before) // BOXES):
        blocks = ()
        for box in gl.static_range(BOXES):
            blocks = blocks + (gl.load(ids + box),)
        open_tile(tiles, full, empty, tile, HEAD_DIM, STAGES)
        for box in gl.static_range(BOXES):
            copy_box(
                source, batch, head, blocks[box].to(gl.int32) * ROWS, tiles, full, tile, box * ROWS, ROWS, HEAD_DIM,
                STAGES,
            )  # fmt: skip
        ids += BOXES
        tile += 1
    after = (count - before) % BOXES
    if after > 0:
        open_tile(tiles, full, empty, tile, HEAD_DIM, STAGES)
    for index in range(after):
        block = gl.load(ids + index).to(gl.int32)
        copy_box(source, batch, head, block * ROWS, tiles, full, tile, index * ROWS, ROWS, HEAD_DIM, STAGES)
    return tile, place + after * ROWS


@gluon.jit
def open_tile(tiles, full, empty, tile, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """Wait until a tile's slot is free, and announce how many bytes will come."""
    stage, phase = in_ring(tile, STAGES)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), TILE_N * HEAD_DIM * tiles.dtype.primitive_bitwidth // 8)


@gluon.jit
def copy_box(
    source, batch, head, first, tiles, full, tile, place, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copy `ROWS` rows to a place in a tile."""
    BITS: gl.constexpr = tiles.dtype.primitive_bitwidth
    PANEL: gl.constexpr = panel_columns(HEAD_DIM, BITS)
    PANELS: gl.constexpr = HEAD_DIM // PANEL
    BOXES: gl.constexpr = TILE_N // ROWS
    stage, _ = in_ring(tile, STAGES)
    boxes = reinterpret(
        tiles, tiles.dtype, [STAGES * PANELS * BOXES, 1, 1, ROWS, PANEL], tile_layout(HEAD_DIM, BITS, 4)
    )
    for panel in gl.static_range(PANELS):
        box = boxes.index((stage * PANELS + panel) * BOXES + place // ROWS)
        copy_boxes(source, [batch, head, first, panel * PANEL], full.index(stage), box)

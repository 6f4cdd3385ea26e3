"""The attention kernel for Hopper in Gluon: who of a program's warps does what.

A program attends for `TILE_M` queries of one head after the other. Two warpgroups compute, 64 queries each. Three more
warps feed them through shared memory: one fetches queries, one keys, one values. The rows of a list, one level after the
other, are cut into tiles of `TILE_N` wherever that falls:

    text before | text after | level 0 | level 1 | ... | zeros up to a whole tile

A box is what one copy brings: the rows of a block at its level, or as many rows of text. Factors ascend, hence boxes get
smaller along the list, and none straddles two tiles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

TILE_M = gl.constexpr(128)
TILE_N = gl.constexpr(128)
# Columns of a row that lie together in shared memory, 128 bytes in 16-bit numbers.
PANEL = gl.constexpr(64)
# Tiles of one list whose rows may stand for different numbers of tokens: where one of up to 5 levels or 2 texts ends.
MOST_MIXED = gl.constexpr(8)
# How many tiles a list has; then, for each mixed tile and past the last: its index, and the bias of the tiles before.
PLAN = gl.constexpr(1 + 2 * (8 + 1))
NEVER = gl.constexpr(2147483647)
# Sums of weights up to here leave room for the product with values of up to 2^27; larger ones are computed anew.
LARGEST_SUM = gl.constexpr(float(2**100))


@gluon.constexpr_function
def log2_of(value):
    """Exact logarithm of a power of two."""
    return value.bit_length() - 1


@gluon.constexpr_function
def box_layout(rows):
    """Layout in shared memory of a box `[1, 1, rows, PANEL]`; it does not depend on the number of rows."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


@gluon.constexpr_function
def number_layout(warps):
    """Layout of a single number that all threads of some warps hold."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.constexpr_function
def divide(a, b):
    return a // b


@gluon.jit(
    do_not_specialize=[
        "heads", "items", "video_queries", "video_keys", "key_blocks", "text_before", "text_after", "query_tokens",
    ]
)  # fmt: skip
def attention_kernel(
    q_ptr, k_text_before, k_text_after, k_0, k_1, k_2, k_3, k_4, v_text_before, v_text_after, v_0, v_1, v_2, v_3, v_4,
    out_ptr, lse_ptr, ids_ptr, counts_ptr, permutation, redo_ptr, stride_qb, stride_qn, stride_qh,
    stride_ob, stride_on, stride_oh, heads, items, video_queries, video_keys, key_blocks, text_before, text_after,
    query_tokens, scale, HEAD_DIM: gl.constexpr, BLOCK_QUERY: gl.constexpr, BLOCK_KEY: gl.constexpr,
    FACTORS: gl.constexpr, TEXT: gl.constexpr, PERMUTED: gl.constexpr, STORE_LSE: gl.constexpr, ONLINE: gl.constexpr,
    AHEAD: gl.constexpr, STAGES: gl.constexpr, QUERY_SLOTS: gl.constexpr,
):  # fmt: skip
    """Attention of all video queries over their lists.

    Args:
        k_*, v_*: descriptors `[B, H, rows, D]` of the text and of each level, with boxes `[1, 1, rows a box, PANEL]`.
        redo_ptr: int32, one an item, set to 1 where the frozen maximum let sums run over.
        stride_q*: in units of 8 elements, which tells the compiler how far it may widen its reads.
        ONLINE: keep a running row maximum instead of that of the first tile.
        AHEAD: issue the products with the keys of the tile after next before the softmax; takes 64 registers more.
    """
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_tiles = gl.allocate_shared_memory(dtype, [QUERY_SLOTS * 2, TILE_M // 2, HEAD_DIM], tile_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE_N, HEAD_DIM], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE_N, HEAD_DIM], tile_layout)
    number_shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plans = gl.allocate_shared_memory(gl.int32, [QUERY_SLOTS * PLAN, 1], number_shared)
    biases = gl.allocate_shared_memory(gl.float32, [QUERY_SLOTS * MOST_MIXED, TILE_N], number_shared)
    q_full = gl.allocate_shared_memory(gl.int64, [QUERY_SLOTS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERY_SLOTS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(QUERY_SLOTS):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()

    # Those that do not exist are None.
    k_rows = (k_text_before, k_text_after, k_0, k_1, k_2, k_3, k_4)
    v_rows = (v_text_before, v_text_after, v_0, v_1, v_2, v_3, v_4)
    lists = (ids_ptr, counts_ptr, heads, items, video_queries, video_keys, key_blocks, text_before, text_after)
    consumed = (q_tiles, plans, biases, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    results = (out_ptr, lse_ptr, permutation, redo_ptr, stride_ob, stride_on, stride_oh, query_tokens, scale)
    gl.warp_specialize(
        [
            (
                consume,
                (consumed, lists, results, 0, HEAD_DIM, BLOCK_KEY, FACTORS, TEXT, PERMUTED, STORE_LSE, ONLINE, AHEAD,
                 STAGES, QUERY_SLOTS),
            ),
            (
                consume,
                (consumed, lists, results, 1, HEAD_DIM, BLOCK_KEY, FACTORS, TEXT, PERMUTED, STORE_LSE, ONLINE, AHEAD,
                 STAGES, QUERY_SLOTS),
            ),
            (
                fetch_queries,
                (q_ptr, q_tiles, plans, biases, q_full, q_empty, lists, permutation, stride_qb, stride_qn, stride_qh, scale,
                 HEAD_DIM, BLOCK_QUERY, BLOCK_KEY, FACTORS, TEXT, PERMUTED, QUERY_SLOTS),
            ),
            (fetch_rows, (k_rows, k_tiles, k_full, k_empty, lists, HEAD_DIM, BLOCK_QUERY, BLOCK_KEY, FACTORS, TEXT, STAGES)),
            (fetch_rows, (v_rows, v_tiles, v_full, v_empty, lists, HEAD_DIM, BLOCK_QUERY, BLOCK_KEY, FACTORS, TEXT, STAGES)),
        ],
        [4, 1, 1, 1],
        [232, 40, 40, 40],
    )  # fmt: skip


@gluon.jit
def item_at(item, heads, video_queries):
    """One of the program's items: head of all batch items, batch item, head, tile of queries."""
    query_tiles = gl.cdiv(video_queries, TILE_M)
    head_index = item // query_tiles
    return head_index, head_index // heads, head_index % heads, item % query_tiles


@gluon.jit
def in_ring(count, SLOTS: gl.constexpr):
    """Which slot of a ring comes after `count` uses, and the phase of its barriers."""
    count = count.to(gl.uint32)
    return (count % SLOTS).to(gl.int32), ((count // SLOTS) & 1).to(gl.int32)


@gluon.jit
def list_row(head_index, query_tile, video_queries, BLOCK_QUERY: gl.constexpr):
    """Which list serves a tile of queries."""
    row = head_index.to(gl.int64) * gl.cdiv(video_queries, BLOCK_QUERY)
    return row + query_tile // divide(BLOCK_QUERY, TILE_M)


@gluon.jit
def fetch_queries(
    q_ptr, q_tiles, plans, biases, q_full, q_empty, lists, permutation, stride_qb, stride_qn, stride_qh, scale,
    HEAD_DIM: gl.constexpr, BLOCK_QUERY: gl.constexpr, BLOCK_KEY: gl.constexpr, FACTORS: gl.constexpr,
    TEXT: gl.constexpr, PERMUTED: gl.constexpr, QUERY_SLOTS: gl.constexpr,
):  # fmt: skip
    """One warp: gather each item's queries, perhaps permuted, and plan the tiles of its list."""
    ids_ptr, counts_ptr, heads, items, video_queries, video_keys, key_blocks, text_before, text_after = lists
    CHUNKS: gl.constexpr = HEAD_DIM // 8
    ROWS: gl.constexpr = 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // CHUNKS, CHUNKS], [1, 1], [1, 0])
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    place = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    done = gl.to_tensor(0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head_index, batch, head, query_tile = item_at(item, heads, video_queries)
        base = q_ptr + batch.to(gl.int64) * stride_qb * 8 + head.to(gl.int64) * stride_qh * 8
        row = list_row(head_index, query_tile, video_queries, BLOCK_QUERY)
        slot, phase = in_ring(done, QUERY_SLOTS)
        mbarrier.wait(q_empty.index(slot), phase ^ 1)
        for part in gl.static_range(TILE_M // ROWS):
            # Rows past the end repeat the last one; their output is not stored.
            position = gl.minimum(query_tile * TILE_M + part * ROWS + place, video_queries - 1)
            token = position + text_before
            if PERMUTED:
                token = gl.load(permutation + position) + text_before
            half = q_tiles.index(slot * 2 + divide(part * ROWS, 64))
            async_copy.async_copy_global_to_shared(
                half.slice(part * ROWS % 64, ROWS, dim=0),
                base + token.to(gl.int64)[:, None] * stride_qn * 8 + dims[None, :],
            )
        async_copy.commit_group()
        ends = run_ends(
            ids_ptr + row * key_blocks, counts_ptr + row * len(FACTORS), key_blocks, video_keys, text_before,
            text_after, BLOCK_KEY, FACTORS, TEXT,
        )  # fmt: skip
        plan_tiles(plans, biases, slot, ends, text_before, text_after, scale, BLOCK_KEY, FACTORS, TEXT)
        async_copy.wait_group(0)
        fence_async_shared()
        mbarrier.arrive(q_full.index(slot), count=1)
        done += 1


@gluon.jit
def fetch_rows(
    rows, tiles, full, empty, lists, HEAD_DIM: gl.constexpr, BLOCK_QUERY: gl.constexpr, BLOCK_KEY: gl.constexpr,
    FACTORS: gl.constexpr, TEXT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: copy the boxes of each item's list, of keys or of values, into tile after tile."""
    ids_ptr, counts_ptr, heads, items, video_queries, video_keys, key_blocks, text_before, text_after = lists
    tile = gl.to_tensor(0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head_index, batch, head, query_tile = item_at(item, heads, video_queries)
        row = list_row(head_index, query_tile, video_queries, BLOCK_QUERY)
        ids = ids_ptr + row * key_blocks
        place = gl.to_tensor(0)
        if TEXT:
            for side in gl.static_range(2):
                if rows[side] is not None:
                    length = text_before if side == 0 else text_after
                    for first in range(0, length, BLOCK_KEY):
                        if place == 0:
                            open_tile(full, empty, tile, HEAD_DIM, STAGES)
                        copy_box(rows[side], batch, head, first, tiles, full, tile, place, BLOCK_KEY, HEAD_DIM, STAGES)
                        place += BLOCK_KEY
                        tile, place = tile + (place >> log2_of(TILE_N)), place & (TILE_N - 1)
        for level in gl.static_range(len(FACTORS)):
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
                    rows[2 + LAST], batch, head, key_blocks * divide(BLOCK_KEY, FACTORS[LAST]), tiles, full, tile, at,
                    divide(BLOCK_KEY, FACTORS[LAST]), HEAD_DIM, STAGES,
                )  # fmt: skip
            tile += 1


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
        open_tile(full, empty, tile, HEAD_DIM, STAGES)
        for box in gl.static_range(BOXES):
            copy_box(
                source, batch, head, blocks[box].to(gl.int32) * ROWS, tiles, full, tile, box * ROWS, ROWS, HEAD_DIM,
                STAGES,
            )  # fmt: skip
        ids += BOXES
        tile += 1
    after = (count - before) % BOXES
    if after > 0:
        open_tile(full, empty, tile, HEAD_DIM, STAGES)
    for index in range(after):
        block = gl.load(ids + index).to(gl.int32)
        copy_box(source, batch, head, block * ROWS, tiles, full, tile, index * ROWS, ROWS, HEAD_DIM, STAGES)
    return tile, place + after * ROWS


@gluon.jit
def open_tile(full, empty, tile, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """Wait until a tile's slot is free, and announce how many bytes will come."""
    stage, phase = in_ring(tile, STAGES)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), TILE_N * HEAD_DIM * 2)


@gluon.jit
def copy_box(
    source, batch, head, first, tiles, full, tile, place, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copy `ROWS` rows to a place in a tile."""
    PANELS: gl.constexpr = HEAD_DIM // PANEL
    BOXES: gl.constexpr = TILE_N // ROWS
    stage, _ = in_ring(tile, STAGES)
    boxes = tiles._reinterpret(tiles.dtype, [STAGES * PANELS * BOXES, 1, 1, ROWS, PANEL], box_layout(ROWS))
    for panel in gl.static_range(PANELS):
        box = boxes.index((stage * PANELS + panel) * BOXES + place // ROWS)
        tma.async_copy_global_to_shared(source, [batch, head, first, panel * PANEL], full.index(stage), box)


@gluon.jit
def consume(
    consumed, lists, results, HALF: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_KEY: gl.constexpr,
    FACTORS: gl.constexpr, TEXT: gl.constexpr, PERMUTED: gl.constexpr, STORE_LSE: gl.constexpr, ONLINE: gl.constexpr,
    AHEAD: gl.constexpr, STAGES: gl.constexpr, QUERY_SLOTS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: attention of half of each item's queries.

    The products with the next keys are issued before the softmax of these, so that both run at the same time. The row
    maximum is that of the first tile and stays; float32 holds what exceeds it by far, and what exceeds even that is
    noted to be computed again.
    """
    q_tiles, plans, biases, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty = consumed
    ids_ptr, counts_ptr, heads, items, video_queries, video_keys, key_blocks, text_before, text_after = lists
    out_ptr, lse_ptr, permutation, redo_ptr, stride_ob, stride_on, stride_oh, query_tokens, scale = results
    ROWS: gl.constexpr = TILE_M // 2
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    dtype: gl.constexpr = q_tiles.dtype
    zeros = gl.zeros([ROWS, TILE_N], gl.float32, score_layout)
    tile = gl.to_tensor(0)
    done = gl.to_tensor(0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head_index, batch, head, query_tile = item_at(item, heads, video_queries)
        slot, phase = in_ring(done, QUERY_SLOTS)
        mbarrier.wait(q_full.index(slot), phase)
        plan = slot * PLAN
        column_biases = slot * MOST_MIXED
        tiles = read_number(plans, plan)
        mixed = read_number(plans, plan + 1)
        bias = read_number(plans, plan + 2).to(gl.float32, bitcast=True)
        q = q_tiles.index(slot * 2 + HALF)
        stage, phase = in_ring(tile, STAGES)
        mbarrier.wait(k_full.index(stage), phase)
        pending = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(pending,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        tile += 1
        next_stage, next_phase = in_ring(tile, STAGES)
        mbarrier.wait(k_full.index(next_stage), next_phase, pred=tiles > 1)
        if AHEAD:
            pending = warpgroup_mma(q, k_tiles.index(next_stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        if mixed == 0:
            scores = scores + biases.index(column_biases).load(gl.SliceLayout(0, score_layout))[None, :]
            plan, column_biases = plan + 2, column_biases + 1
            mixed = read_number(plans, plan + 1)
            bias = read_number(plans, plan + 2).to(gl.float32, bitcast=True)
        top = gl.max(scores, 1) * scale + bias
        weights = gl.exp2(scores * scale - (top - bias)[:, None])
        total = gl.sum(weights, 1)
        operand = gl.convert_layout(weights.to(dtype), weight_layout)
        accumulator = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)
        if AHEAD:
            ahead_stage, ahead_phase = in_ring(tile + 1, STAGES)
            mbarrier.wait(k_full.index(ahead_stage), ahead_phase, pred=tiles > 2)
            scores = warpgroup_mma_wait(0, deps=(pending,))
            mbarrier.arrive(k_empty.index(next_stage), count=1, pred=tiles > 1)
        for index in range(1, tiles):
            if AHEAD:
                # Past the last tile this reads whatever is there, and nothing uses the result.
                pending = warpgroup_mma(
                    q, k_tiles.index(ahead_stage).permute((1, 0)), zeros, use_acc=False, is_async=True
                )
            else:
                pending = warpgroup_mma(
                    q, k_tiles.index(next_stage).permute((1, 0)), zeros, use_acc=False, is_async=True
                )
            mbarrier.wait(v_full.index(stage), phase)
            summed = warpgroup_mma(operand, v_tiles.index(stage), accumulator, is_async=True)
            if not AHEAD:
                scores = warpgroup_mma_wait(1, deps=(pending,))
                mbarrier.arrive(k_empty.index(next_stage), count=1)
            if index == mixed:
                scores = scores + biases.index(column_biases).load(gl.SliceLayout(0, score_layout))[None, :]
                plan, column_biases = plan + 2, column_biases + 1
                mixed = read_number(plans, plan + 1)
                bias = read_number(plans, plan + 2).to(gl.float32, bitcast=True)
            if ONLINE:
                new_top = gl.maximum(top, gl.max(scores, 1) * scale + bias)
                shrink = gl.exp2(top - new_top)
                total = total * shrink
                top = new_top
            weights = gl.exp2(scores * scale - (top - bias)[:, None])
            total = total + gl.sum(weights, 1)
            operand = gl.convert_layout(weights.to(dtype), weight_layout)
            last, stage, phase = stage, next_stage, next_phase
            tile += 1
            next_stage, next_phase = in_ring(tile, STAGES)
            # This wait ends a basic block: without it the compiler would wait for the products before the exponentials.
            if AHEAD:
                used_stage = ahead_stage
                ahead_stage, ahead_phase = in_ring(tile + 1, STAGES)
                mbarrier.wait(k_full.index(ahead_stage), ahead_phase, pred=index + 2 < tiles)
                scores, accumulator = warpgroup_mma_wait(0, deps=(pending, summed))
                mbarrier.arrive(k_empty.index(used_stage), count=1, pred=index + 1 < tiles)
            else:
                mbarrier.wait(k_full.index(next_stage), next_phase, pred=index + 1 < tiles)
                accumulator = warpgroup_mma_wait(0, deps=(summed,))
            mbarrier.arrive(v_empty.index(last), count=1)
            if ONLINE:
                accumulator = accumulator * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
        mbarrier.arrive(q_empty.index(slot), count=1)
        mbarrier.wait(v_full.index(stage), phase)
        summed = warpgroup_mma(operand, v_tiles.index(stage), accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(0, deps=(summed,))
        mbarrier.arrive(v_empty.index(stage), count=1)
        done += 1

        out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
        sums = gl.convert_layout(total, out_rows)
        if not ONLINE:
            # Anything times 0 is 0, but infinity and NaN.
            sound = (gl.sum(accumulator * 0.0, 1) == 0.0) & (sums < LARGEST_SUM)
            gl.store(redo_ptr + item + gl.zeros_like(sound.to(gl.int32)), 1, mask=~sound)
        position = query_tile * TILE_M + HALF * ROWS + gl.arange(0, ROWS, out_rows)
        real = position < video_queries
        token = position + text_before
        if PERMUTED:
            token = gl.load(permutation + position, mask=real, other=0) + text_before
        out_head = out_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
        dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, out_layout))
        gl.store(
            out_head + token.to(gl.int64)[:, None] * stride_on + dims[None, :],
            (accumulator * (1.0 / sums)[:, None]).to(dtype),
            mask=real[:, None],
        )
        if STORE_LSE:
            LN_2: gl.constexpr = 0.6931471805599453
            tops = gl.convert_layout(top, out_rows)
            gl.store(lse_ptr + head_index.to(gl.int64) * query_tokens + token, (tops + gl.log2(sums)) * LN_2, mask=real)


@gluon.jit
def run_ends(
    ids, counts, key_blocks, video_keys, text_before, text_after, BLOCK_KEY: gl.constexpr, FACTORS: gl.constexpr,
    TEXT: gl.constexpr,
):  # fmt: skip
    """Where the runs of a list end.

    Returns:
        A tuple of int32 scalars: rows of the text; where the run of each level ends; and of the sequence's last block, if
        it is ragged and in the list: where its groups of full size end, where it ends, and how many tokens are in the
        group after those of full size. Otherwise these rows lie past all others.
    """
    end = 0
    if TEXT:
        end = gl.cdiv(text_before, BLOCK_KEY) * BLOCK_KEY + gl.cdiv(text_after, BLOCK_KEY) * BLOCK_KEY
    ends = (end,)
    start = 0
    solid = NEVER
    ragged_end = NEVER
    rest = video_keys % BLOCK_KEY
    for level in gl.static_range(len(FACTORS)):
        count = gl.load(counts + level)
        start += count
        # Ids ascend inside a level, so the last block of the sequence can only be the last of its run.
        last = gl.load(ids + start - 1, mask=count > 0, other=-1).to(gl.int32)
        end += count * divide(BLOCK_KEY, FACTORS[level])
        is_ragged = (last == key_blocks - 1) & (video_keys % BLOCK_KEY != 0)
        missing = gl.cdiv(BLOCK_KEY - video_keys % BLOCK_KEY, FACTORS[level])
        solid = gl.where(is_ragged, end - missing, solid)
        ragged_end = gl.where(is_ragged, end, ragged_end)
        rest = gl.where(is_ragged, video_keys % FACTORS[level], rest)
        ends = ends + (end,)
    return ends + (solid, ragged_end, rest)


@gluon.jit
def plan_tiles(
    plans, biases, slot, ends, text_before, text_after, scale, BLOCK_KEY: gl.constexpr, FACTORS: gl.constexpr,
    TEXT: gl.constexpr,
):  # fmt: skip
    """Tell the warpgroups which tiles are mixed, and for the others log2 of how many tokens their rows stand for.

    For a mixed tile `biases` has that number for each row, relative to that of the tiles up to the next mixed one, and
    in units in which scores are before they are scaled.
    """
    tiles = gl.cdiv(ends[len(FACTORS)], TILE_N)
    entry = slot * PLAN
    write_number(plans, entry, tiles)
    mixed, bias = next_mixed_tile(0, ends, text_before, text_after, BLOCK_KEY, FACTORS, TEXT)
    write_number(plans, entry + 1, mixed)
    write_number(plans, entry + 2, bias.to(gl.int32, bitcast=True))
    at = slot * MOST_MIXED
    while mixed < tiles:
        first = mixed * TILE_N
        mixed, bias = next_mixed_tile(mixed + 1, ends, text_before, text_after, BLOCK_KEY, FACTORS, TEXT)
        columns = column_bias(first, ends, text_before, text_after, BLOCK_KEY, FACTORS, TEXT)
        biases.index(at).store((columns - bias) / scale)
        at += 1
        entry += 2
        write_number(plans, entry + 1, mixed)
        write_number(plans, entry + 2, bias.to(gl.int32, bitcast=True))


@gluon.jit
def write_number(numbers, index, value):
    numbers.index(index).store(gl.full([1], value, gl.int32, number_layout(1)))


@gluon.jit
def read_number(numbers, index):
    return gl.max(numbers.index(index).load(number_layout(4)), 0)


@gluon.jit
def next_mixed_tile(
    index, ends, text_before, text_after, BLOCK_KEY: gl.constexpr, FACTORS: gl.constexpr, TEXT: gl.constexpr
):  # fmt: skip
    """The first mixed tile from `index` on, and log2 of the number of tokens that rows of the tiles before stand for."""
    mixed = index
    bias = 0.0 * index
    if TEXT:
        after = gl.cdiv(text_before, BLOCK_KEY) * BLOCK_KEY
        mixed = gl.where(index < text_before // TILE_N, text_before // TILE_N, mixed)
        whole = (after + text_after) // TILE_N
        mixed = gl.where((index >= gl.cdiv(after, TILE_N)) & (index < whole), whole, mixed)
    solid = ends[1 + len(FACTORS)]
    for level in gl.static_range(len(FACTORS)):
        start, end = ends[level], ends[level + 1]
        whole = gl.where((solid >= start) & (solid < end), solid, end) // TILE_N
        inside = (index >= gl.cdiv(start, TILE_N)) & (index < whole)
        mixed = gl.where(inside, whole, mixed)
        bias = gl.where(inside, 1.0 * log2_of(FACTORS[level]), bias)
    return mixed, bias


@gluon.jit
def column_bias(
    first, ends, text_before, text_after, BLOCK_KEY: gl.constexpr, FACTORS: gl.constexpr, TEXT: gl.constexpr
):  # fmt: skip
    """log2 of the number of tokens that each row from `first` on stands for: float32 `[TILE_N]`, -inf if there is no row."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    place = first + gl.arange(0, TILE_N, layout)
    columns = gl.full([TILE_N], 1.0 * log2_of(FACTORS[0]), gl.float32, layout)
    for level in gl.static_range(1, len(FACTORS)):
        columns = gl.where(place >= ends[level], 1.0 * log2_of(FACTORS[level]), columns)
    solid, ragged_end, rest = ends[1 + len(FACTORS)], ends[2 + len(FACTORS)], ends[3 + len(FACTORS)]
    in_rest = gl.where(rest > 0, gl.log2(gl.maximum(rest, 1).to(gl.float32)), -float("inf"))
    columns = gl.where(place == solid, in_rest, columns)
    absent = ((place > solid) & (place < ragged_end)) | (place >= ends[len(FACTORS)])
    if TEXT:
        after = gl.cdiv(text_before, BLOCK_KEY) * BLOCK_KEY
        columns = gl.where(place < ends[0], 0.0, columns)
        absent = absent | ((place >= text_before) & (place < after))
        absent = absent | ((place >= after + text_after) & (place < ends[0]))
    return gl.where(absent, -float("inf"), columns)

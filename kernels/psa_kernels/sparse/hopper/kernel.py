"""The attention kernel for Hopper in Gluon: who of a program's warps does what, and what the computing ones do.

A program attends for `TILE_M` queries of one head after the other. Two warpgroups compute, 64 queries each. Three more
warps feed them through shared memory: one fetches queries, one keys, one values. The rows of a list, one level after
the other, are cut into tiles of `TILE_N` wherever that falls:

    text before | text after | level 0 | level 1 | ... | zeros up to a whole tile

A box is what one copy brings: the rows of a block at its level, or as many rows of text. Factors ascend, hence boxes
get smaller along the list, and none straddles two tiles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from psa_kernels.sparse.hopper.fetch import fetch_queries, fetch_rows
from psa_kernels.sparse.hopper.plan import MAX_MIXED, PLAN
from psa_kernels.sparse.hopper.softmax import per_row, row_sums, up_to_diagonal, with_biases
from psa_kernels.sparse.hopper.tiles import (
    TICKETS,
    TILE_M,
    TILE_N,
    announced_item,
    in_ring,
    item_at,
    read_number,
    tile_layout,
)

# Sums of weights up to here leave room for the product with values of up to 2^27; larger ones are computed anew.
LARGEST_SUM = gl.constexpr(float(2**100))


@gluon.jit(
    do_not_specialize=[
        "heads", "items", "video_queries", "video_keys", "list_width", "text_before", "text_after", "query_tokens",
        "lead", "shift",
    ]
)  # fmt: skip
def attention_kernel(
    q_ptr, factors_ptr, k_text_before, k_text_after, k_0, k_1, k_2, k_3, k_4, v_text_before, v_text_after, v_0, v_1,
    v_2, v_3, v_4, out_ptr, lse_ptr, ids_ptr, counts_ptr, permutation, counter_ptr, redo_ptr, stride_qb, stride_qn,
    stride_qh, stride_ob, stride_on, stride_oh, heads, items, video_queries, video_keys, list_width, text_before,
    text_after, query_tokens, scale, lead, shift, HEAD_DIM: gl.constexpr, BLOCK_QUERY: gl.constexpr,
    BLOCK_KEY: gl.constexpr, FACTORS: gl.constexpr, TEXT: gl.constexpr, PERMUTED: gl.constexpr,
    STORE_LSE: gl.constexpr, ONLINE: gl.constexpr, IN_STEP: gl.constexpr, STAGES: gl.constexpr,
    QUERY_SLOTS: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Attention of all video queries over their lists.

    Args:
        q_ptr: queries, in the type of the values or in 8-bit integers.
        factors_ptr: None, or float32 `[B, Hq, Nq]`: by what the products of each query of integers are multiplied.
        k_*, v_*: descriptors `[B, Hkv, rows, D]` of the text and of each level, with boxes `[1, 1, rows a box, columns
            of a panel]`; keys have the type of the queries.
        counter_ptr: int32 `[2]`, 0: the number of items that were taken, and of those that are nearly done.
        redo_ptr: int32, one an item, set to 1 where the frozen maximum let sums run over.
        stride_q*: in units of 16 bytes, which tells the compiler how far it may widen its reads.
        scale: by what all products are multiplied where there is no `factors_ptr`.
        lead, shift: None but in causal calls, as in `causal.triton_attention`. `video_queries` is then the position up
            to which there are queries, and the text after the video the video's keys themselves, token by token from
            the begin of the first row on, of which each item reads its diagonal first; `text_after` is 0.
        ONLINE: keep a running row maximum instead of that of the first tile.
        IN_STEP: let programs wait for each other. Their items should take equally long.
        GROUP: how many neighbouring heads of the queries read the same head of the keys and values.
        TURNS: let the two warpgroups issue products in turns, and release keys and values at once.
    """
    key_type: gl.constexpr = q_ptr.dtype.element_ty
    value_type: gl.constexpr = out_ptr.dtype.element_ty
    key_layout: gl.constexpr = tile_layout(HEAD_DIM, key_type.primitive_bitwidth)
    value_layout: gl.constexpr = tile_layout(HEAD_DIM, value_type.primitive_bitwidth)
    q_tiles = gl.allocate_shared_memory(key_type, [QUERY_SLOTS * 2, TILE_M // 2, HEAD_DIM], key_layout)
    k_tiles = gl.allocate_shared_memory(key_type, [STAGES, TILE_N, HEAD_DIM], key_layout)
    v_tiles = gl.allocate_shared_memory(value_type, [STAGES, TILE_N, HEAD_DIM], value_layout)
    number_shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plans = gl.allocate_shared_memory(gl.int32, [QUERY_SLOTS * PLAN, 1], number_shared)
    biases = gl.allocate_shared_memory(gl.float32, [QUERY_SLOTS * MAX_MIXED, TILE_N], number_shared)
    factors = biases  # anything, as nobody reads it
    if factors_ptr is not None:
        factors = gl.allocate_shared_memory(gl.float32, [QUERY_SLOTS * 2, TILE_M // 2], number_shared)
    q_full = gl.allocate_shared_memory(gl.int64, [QUERY_SLOTS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERY_SLOTS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(turns.index(half), count=1)
    tickets = gl.allocate_shared_memory(gl.int32, [TICKETS, 1], number_shared)
    ticket_full = gl.allocate_shared_memory(gl.int64, [TICKETS, 1], mbarrier.MBarrierLayout())
    ticket_empty = gl.allocate_shared_memory(gl.int64, [TICKETS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(TICKETS):
        mbarrier.init(ticket_full.index(slot), count=1)
        mbarrier.init(ticket_empty.index(slot), count=4)
    for slot in gl.static_range(QUERY_SLOTS):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()

    schedule = (tickets, ticket_full, ticket_empty, counter_ptr)
    # Those that do not exist are None.
    k_rows = (k_text_before, k_text_after, k_0, k_1, k_2, k_3, k_4)
    v_rows = (v_text_before, v_text_after, v_0, v_1, v_2, v_3, v_4)
    past = (lead, shift)
    lists = (ids_ptr, counts_ptr, heads, items, video_queries, video_keys, list_width, text_before, text_after, past)
    queries = (heads, items, video_queries, text_before, lead, shift)
    consumed = (
        q_tiles, factors, plans, biases, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
    )  # fmt: skip
    results = (out_ptr, lse_ptr, permutation, redo_ptr, stride_ob, stride_on, stride_oh, query_tokens, scale)
    gl.warp_specialize(
        [
            (
                consume,
                (schedule, consumed, queries, results, 0, HEAD_DIM, PERMUTED, STORE_LSE, ONLINE, STAGES, QUERY_SLOTS,
                 TURNS, GROUP, CAUSAL),
            ),
            (
                consume,
                (schedule, consumed, queries, results, 1, HEAD_DIM, PERMUTED, STORE_LSE, ONLINE, STAGES, QUERY_SLOTS,
                 TURNS, GROUP, CAUSAL),
            ),
            (
                fetch_queries,
                (schedule, q_ptr, factors_ptr, q_tiles, factors, plans, biases, q_full, q_empty, lists, permutation,
                 stride_qb, stride_qn, stride_qh, query_tokens, HEAD_DIM, BLOCK_QUERY, BLOCK_KEY, FACTORS,
                 TEXT, PERMUTED, IN_STEP, QUERY_SLOTS, GROUP, CAUSAL),
            ),
            (
                fetch_rows,
                (schedule, k_rows, k_tiles, k_full, k_empty, lists, HEAD_DIM, BLOCK_QUERY, BLOCK_KEY, FACTORS, TEXT,
                 IN_STEP, STAGES, GROUP, CAUSAL),
            ),
            (
                fetch_rows,
                (schedule, v_rows, v_tiles, v_full, v_empty, lists, HEAD_DIM, BLOCK_QUERY, BLOCK_KEY, FACTORS, TEXT,
                 False, STAGES, GROUP, CAUSAL),
            ),
        ],
        [4, 1, 1, 1],
        [232, 40, 40, 40],
    )  # fmt: skip


@gluon.jit
def consume(
    schedule, consumed, queries, results, HALF: gl.constexpr, HEAD_DIM: gl.constexpr, PERMUTED: gl.constexpr,
    STORE_LSE: gl.constexpr, ONLINE: gl.constexpr, STAGES: gl.constexpr, QUERY_SLOTS: gl.constexpr,
    TURNS: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One warpgroup: attention of half of each item's queries.

    The products with the next keys are issued before the softmax of these, so that both run at the same time. The row
    maximum is that of the first tile and stays; float32 holds what exceeds it by far, and what exceeds even that is
    noted to be computed again.

    Where products take no longer than exponentials, warpgroups that wait for both at the same time leave the units of
    both idle in turn. Turns keep one of them half a tile ahead.
    """
    (
        q_tiles, factors, plans, biases, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
    ) = consumed  # fmt: skip
    heads, items, video_queries, text_before, lead, shift = queries
    out_ptr, lse_ptr, permutation, redo_ptr, stride_ob, stride_on, stride_oh, query_tokens, scale = results
    ROWS: gl.constexpr = TILE_M // 2
    INT8: gl.constexpr = q_tiles.dtype == gl.int8
    score_type: gl.constexpr = gl.int32 if INT8 else gl.float32
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 32 if INT8 else 16])
    score_rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    dtype: gl.constexpr = v_tiles.dtype
    zeros = gl.zeros([ROWS, TILE_N], score_type, score_layout)
    tile = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    done = gl.to_tensor(0)
    item = announced_item(schedule, done, 4)
    while item < items:
        head_index, batch, head, query_tile = item_at(item, items, heads, video_queries, GROUP, CAUSAL)
        slot, phase = in_ring(done, QUERY_SLOTS)
        mbarrier.wait(q_full.index(slot), phase)
        plan = slot * PLAN
        column_biases = slot * MAX_MIXED
        tiles = read_number(plans, plan, 4)
        mixed = read_number(plans, plan + 1, 4)
        bias = read_number(plans, plan + 2, 4).to(gl.float32, bitcast=True)
        q = q_tiles.index(slot * 2 + HALF)
        row_factors = gl.full([ROWS], scale, gl.float32, score_rows)
        if INT8:
            row_factors = factors.index(slot * 2 + HALF).load(score_rows)
        stage, phase = in_ring(tile, STAGES)
        mbarrier.wait(k_full.index(stage), phase)
        pending = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(pending,)).to(gl.float32)
        mbarrier.arrive(k_empty.index(stage), count=1)
        tile += 1
        next_stage, next_phase = in_ring(tile, STAGES)
        mbarrier.wait(k_full.index(next_stage), next_phase, pred=tiles > 1)
        if CAUSAL:
            # Every query reads itself, so that the frozen maximum is a number.
            scores = up_to_diagonal(scores, HALF)
            top = gl.max(scores, 1) * row_factors
            weights = gl.exp2(scores * row_factors[:, None] - top[:, None])
        else:
            if mixed == 0:
                columns = biases.index(column_biases).load(gl.SliceLayout(0, score_layout))
                scores = with_biases(scores, columns, row_factors)
                plan, column_biases = plan + 2, column_biases + 1
                mixed = read_number(plans, plan + 1, 4)
                bias = read_number(plans, plan + 2, 4).to(gl.float32, bitcast=True)
            top = gl.max(scores, 1) * row_factors + bias
            weights = gl.exp2(scores * row_factors[:, None] - (top - bias)[:, None])
        total = row_sums(weights)
        operand = gl.convert_layout(weights.to(dtype), weight_layout)
        accumulator = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)
        for index in range(1, tiles):
            if TURNS:
                mbarrier.wait(v_full.index(stage), phase)
                mbarrier.wait(turns.index(HALF), (turn & 1) ^ (1 - HALF))
                turn += 1
            pending = warpgroup_mma(q, k_tiles.index(next_stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            if not TURNS:
                mbarrier.wait(v_full.index(stage), phase)
            summed = warpgroup_mma(operand, v_tiles.index(stage), accumulator, is_async=True)
            if TURNS:
                mbarrier.arrive(turns.index(1 - HALF), count=1)
            scores = warpgroup_mma_wait(1, deps=(pending,)).to(gl.float32)
            if not TURNS:
                mbarrier.arrive(k_empty.index(next_stage), count=1)
            if index == mixed:
                columns = biases.index(column_biases).load(gl.SliceLayout(0, score_layout))
                scores = with_biases(scores, columns, row_factors)
                plan, column_biases = plan + 2, column_biases + 1
                mixed = read_number(plans, plan + 1, 4)
                bias = read_number(plans, plan + 2, 4).to(gl.float32, bitcast=True)
            if ONLINE:
                new_top = gl.maximum(top, gl.max(scores, 1) * row_factors + bias)
                shrink = gl.exp2(top - new_top)
                total = total * per_row(shrink, total)
                top = new_top
            weights = gl.exp2(scores * row_factors[:, None] - (top - bias)[:, None])
            total = total + row_sums(weights)
            operand = gl.convert_layout(weights.to(dtype), weight_layout)
            last, stage, phase = stage, next_stage, next_phase
            tile += 1
            next_stage, next_phase = in_ring(tile, STAGES)
            # This wait ends a basic block: without it the compiler would wait for the products before the exponentials.
            mbarrier.wait(k_full.index(next_stage), next_phase, pred=index + 1 < tiles)
            accumulator = warpgroup_mma_wait(0, deps=(summed,))
            mbarrier.arrive(v_empty.index(last), count=1)
            if TURNS:
                mbarrier.arrive(k_empty.index(stage), count=1)
            if ONLINE:
                accumulator = accumulator * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
        mbarrier.arrive(q_empty.index(slot), count=1)
        mbarrier.wait(v_full.index(stage), phase)
        summed = warpgroup_mma(operand, v_tiles.index(stage), accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(0, deps=(summed,))
        mbarrier.arrive(v_empty.index(stage), count=1)

        out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
        sums = gl.convert_layout(gl.sum(total, 1), out_rows)
        if not ONLINE:
            # Anything times 0 is 0, but infinity and NaN.
            sound = (gl.sum(accumulator * 0.0, 1) == 0.0) & (sums < LARGEST_SUM)
            gl.store(redo_ptr + item + gl.zeros_like(sound.to(gl.int32)), 1, mask=~sound)
            if CAUSAL:
                # Only these queries are computed anew: what is later than the others must not change how they round.
                sums = gl.where(sound, sums, float("nan"))
        position = query_tile * TILE_M + HALF * ROWS + gl.arange(0, ROWS, out_rows)
        real = position < video_queries
        if CAUSAL:
            real = real & (position >= lead)
            token = position + shift
        else:
            token = position + text_before
        if PERMUTED:
            token = gl.load(permutation + position, mask=real, other=0) + text_before
        out_head = out_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
        dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, out_layout))
        gl.store(
            out_head + token.to(gl.int64)[:, None] * stride_on + dims[None, :],
            (accumulator * (1.0 / sums)[:, None]).to(dtype),
            mask=real[:, None],
            eviction_policy="evict_first",
        )
        if STORE_LSE:
            LN_2: gl.constexpr = 0.6931471805599453
            tops = gl.convert_layout(top, out_rows)
            gl.store(lse_ptr + head_index.to(gl.int64) * query_tokens + token, (tops + gl.log2(sums)) * LN_2, mask=real)
        done += 1
        item = announced_item(schedule, done, 4)

"""The loops over a list that the attention kernels of causal and of other calls share: its tail and its full tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from psa_kernels.sparse.steps import attend
from psa_kernels.sparse.tiles import full_tile_bias, full_tile_rows, tail_rows
from psa_kernels.triton_rows import row_offsets


@triton.constexpr_function
def tail_width(tile):
    """Rows that a step of a tail reads."""
    return min(tile, 64)


@triton.constexpr_function
def tail_stages(tile, late_sum):
    """The kernel for tiles of 64 keys has not the registers for two."""
    return 2 if late_sum and tile > 64 else 1


@triton.jit
def flagged_items(only_ptr, items, FLAGS: tl.constexpr):
    """Of the `FLAGS` items of a program the first and the one after the last, or no item where no flag is set."""
    first = tl.program_id(0) * FLAGS
    item = first + tl.arange(0, FLAGS)
    flags = tl.load(only_ptr + item, mask=item < items, other=0)
    # Almost always there is none, which is found in one look.
    return first, tl.where(tl.max(flags, 0) > 0, tl.minimum(first + FLAGS, items), first)


@triton.jit
def attend_tail(
    q, k_head, v_head, pooled_k, pooled_v, stride_kn, stride_vn, ids, permutation, text_before, text_keys, video_keys,
    starts, tile_ends, leftover_ends, level_rows, ragged_place, ragged_bias, dims, scale, top, total, accumulator,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, FACTORS: tl.constexpr,
    TILE_N: tl.constexpr, TAIL_N: tl.constexpr, TAIL_STAGES: tl.constexpr, PERMUTED: tl.constexpr, WIDE: tl.constexpr,
    LATE_SUM: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """What fills no tile, and text; `tiles.tail_rows` and `steps.attend` describe what is given."""
    for first in tl.range(0, leftover_ends[len(FACTORS) - 1] + text_keys, TAIL_N, num_stages=TAIL_STAGES):
        tail, is_token, tail_bias = tail_rows(
            first + tl.arange(0, TAIL_N), ids, permutation, text_before, text_keys, video_keys, starts, tile_ends,
            leftover_ends, level_rows, ragged_place, ragged_bias, FACTORS, BLOCK_KEY, TILE_N,
            PERMUTED,
        )  # fmt: skip
        pooled_offsets = row_offsets(tail, HEAD_DIM, WIDE)
        k_rows = tl.where(is_token, k_head + row_offsets(tail, stride_kn, WIDE), pooled_k + pooled_offsets)
        v_rows = tl.where(is_token, v_head + row_offsets(tail, stride_vn, WIDE), pooled_v + pooled_offsets)
        if ALIGNED:
            # Here, not in a function: the hint belongs to the operation that chose.
            k_rows, v_rows = tl.multiple_of(k_rows, 16), tl.multiple_of(v_rows, 16)
        top, total, accumulator = attend(
            q, k_rows, v_rows, dims, scale, tail_bias[None, :], False, top, total, accumulator, HEAD_DIM, PADDED_DIM,
            LATE_SUM,
        )  # fmt: skip
    return top, total, accumulator


@triton.jit
def attend_full_tiles(
    q, k_head, v_head, pooled_k, pooled_v, stride_kn, stride_vn, ids, permutation, text_before, starts, tile_ends,
    level_rows, dims, scale, top, total, accumulator, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr, FACTORS: tl.constexpr, TILE_N: tl.constexpr, STAGES: tl.constexpr,
    PERMUTED: tl.constexpr, WIDE: tl.constexpr, LATE_SUM: tl.constexpr,
):  # fmt: skip
    """The tiles of one level after the other; `tiles.full_tile_rows` and `steps.attend` describe what is given."""
    columns = tl.arange(0, TILE_N)
    for tile in tl.range(0, tile_ends[len(FACTORS) - 1], num_stages=STAGES):
        rows = full_tile_rows(
            tile, columns, ids, permutation, text_before, starts, tile_ends, level_rows, FACTORS, BLOCK_KEY, TILE_N,
            PERMUTED,
        )  # fmt: skip
        exact = tile < (tile_ends[0] if FACTORS[0] == 1 else 0)
        k_rows = tl.where(exact, k_head, pooled_k) + row_offsets(rows, tl.where(exact, stride_kn, HEAD_DIM), WIDE)
        v_rows = tl.where(exact, v_head, pooled_v) + row_offsets(rows, tl.where(exact, stride_vn, HEAD_DIM), WIDE)
        bias = full_tile_bias(tile, tile_ends, FACTORS)
        top, total, accumulator = attend(
            q, k_rows, v_rows, dims, scale, bias, True, top, total, accumulator, HEAD_DIM, PADDED_DIM, LATE_SUM
        )
    return top, total, accumulator

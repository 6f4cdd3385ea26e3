"""Attention of a causal call over the rows that were chosen, on any GPU that Triton supports."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from psa_kernels.blocks import block_count
from psa_kernels.causal.layout import CausalLayout
from psa_kernels.causal.triton_steps import item_at
from psa_kernels.devices import capability
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.pooled import TritonPyramid
from psa_kernels.sparse.loops import attend_full_tiles, attend_tail, flagged_items, tail_stages, tail_width
from psa_kernels.sparse.steps import attend_visible, store_means
from psa_kernels.sparse.tiles import cut_list
from psa_kernels.sparse.triton import FLAGS, LATE_SUM, tile_shape
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape
from psa_kernels.triton_rows import are_wide, key_head, load_real_rows, must_be_told, padded_dim, row_offsets


def sparse_attention(
    q: torch.Tensor,
    pyramid: TritonPyramid,
    lists: BlockLists,
    causal: CausalLayout,
    spec: AttentionSpec,
    scale: float,
    out: torch.Tensor,
    only: torch.Tensor | None = None,
) -> None:
    """Let the video queries attend the listed blocks at their levels, the text before them, and their diagonals.

    Args:
        q: `[B, Nq, Hq, D]`, all queries, in the order of the model.
        pyramid: of Hkv heads, of which Hq is a multiple.
        out: `[B, Nq, Hq, D]` in the dtype of q, its last stride 1; its rows of video queries are written.
        only: None, or int32, one an item (`item_at`) of 128 queries: compute just those where it is not 0, and of them
            the queries whose output begins with what is not a number.
    """
    k, (v, value_means) = pyramid.source_keys, pyramid.needed_values()
    plan = _plan(
        q.shape, q.dtype, q.device, (q.stride(), k.stride(), v.stride(), out.stride()), k.shape, causal,
        lists.ids.shape[3], pyramid.keys.shape[2], spec, scale, only is None,
    )  # fmt: skip
    plan(q, k, v, pyramid.keys, value_means, out, lists.ids, lists.counts, only)


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    shape: Shape, dtype: torch.dtype, device: torch.device, strides: tuple[Shape, Shape, Shape, Shape],
    of_keys: Shape, causal: CausalLayout, list_width: int, pyramid_rows: int, spec: AttentionSpec, scale: float,
    all_tiles: bool,
) -> Launch:  # fmt: skip
    """The kernel for calls of one shape."""
    batch, _, heads, head_dim = shape
    gpu = capability(device)
    tile = tile_shape(gpu, head_dim, dtype.itemsize, spec.block_query)
    end = causal.lead + causal.video_queries
    items = block_count(end, tile["TILE_M"]) * batch * heads
    wide = are_wide(*zip((shape, of_keys, of_keys, shape), strides, strict=True))
    return Launch(
        attention_kernel, (items if all_tiles else block_count(items, FLAGS),),
        (items, *(step for each in strides for step in each[:3]), heads, causal.lead, end, causal.query_shift,
         causal.first_row, causal.video_keys, list_width, pyramid_rows, causal.text_before,
         abs(scale) * math.log2(math.e)),
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim(head_dim), BLOCK_QUERY=spec.block_query, BLOCK_KEY=spec.block_key,
        FACTORS=spec.factors, LISTED=len(spec.levels),
        NEGATIVE_SCALE=scale < 0, WIDE=wide, ONLY=not all_tiles, FLAGS=FLAGS, LATE_SUM=gpu[0] in LATE_SUM,
        GROUP=heads // of_keys[2], ALIGNED=must_be_told(dtype.itemsize, head_dim, *strides[1][:3], *strides[2][:3]),
        **tile,
    )  # fmt: skip


# Calls of different lengths run the same code, but where a number is a multiple of 16.
@triton.jit(do_not_specialize=["items", "heads", "lead", "end", "shift", "first_row", "video_keys", "text_before"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, pooled_k_ptr, pooled_v_ptr, out_ptr, ids_ptr, counts_ptr, only_ptr,
    items, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, heads, lead, end, shift, first_row, video_keys, list_width, pyramid_rows,
    text_before, scale, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr, FACTORS: tl.constexpr, LISTED: tl.constexpr, NEGATIVE_SCALE: tl.constexpr,
    WIDE: tl.constexpr, ONLY: tl.constexpr, FLAGS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    STAGES: tl.constexpr, LATE_SUM: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of `TILE_M` queries against its list; or those of `FLAGS` tiles whose flag in `only_ptr` is set.

    Args:
        lead, end: positions, from the begin of the first row on, from which on and up to which there are queries.
        shift: what has to be added to a position to name a query.
        first_row: number of the first row among all query blocks.
    """
    first, last = tl.program_id(0), tl.program_id(0) + 1
    if ONLY:
        first, last = flagged_items(only_ptr, items, FLAGS)
    for item in range(first, last):
        wanted = True
        if ONLY:
            wanted = tl.load(only_ptr + item) > 0
        if wanted:
            attend_item(
                item, items, q_ptr, k_ptr, v_ptr, pooled_k_ptr, pooled_v_ptr, out_ptr, ids_ptr, counts_ptr, stride_qb,
                stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_ob,
                stride_on, stride_oh, heads, lead, end, shift, first_row, video_keys, list_width, pyramid_rows,
                text_before, scale, HEAD_DIM, PADDED_DIM, BLOCK_QUERY, BLOCK_KEY, FACTORS, LISTED, NEGATIVE_SCALE,
                WIDE, ONLY, TILE_M, TILE_N, STAGES, LATE_SUM, GROUP, ALIGNED,
            )  # fmt: skip


@triton.jit
def attend_item(
    item, items, q_ptr, k_ptr, v_ptr, pooled_k_ptr, pooled_v_ptr, out_ptr, ids_ptr, counts_ptr, stride_qb, stride_qn,
    stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_ob, stride_on, stride_oh, heads,
    lead, end, shift, first_row, video_keys, list_width, pyramid_rows, text_before, scale, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr, FACTORS: tl.constexpr,
    LISTED: tl.constexpr, NEGATIVE_SCALE: tl.constexpr, WIDE: tl.constexpr, ONLY: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, STAGES: tl.constexpr, LATE_SUM: tl.constexpr, GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """`TILE_M` queries of one head: first their diagonal, then what does not fill tiles, last the full tiles."""
    query_tiles = tl.cdiv(end, TILE_M)
    head_index, query_tile = item_at(item, items, query_tiles, GROUP)
    head_index = head_index.to(tl.int64)
    batch, head = head_index // heads, head_index % heads
    TILES: tl.constexpr = BLOCK_QUERY // TILE_M
    row = query_tile // TILES
    list_row = head_index * tl.cdiv(end, BLOCK_QUERY) + row
    ids = ids_ptr + list_row * list_width
    k_head = k_ptr + batch * stride_kb + key_head(head, GROUP) * stride_kh
    v_head = v_ptr + batch * stride_vb + key_head(head, GROUP) * stride_vh
    pooled_k = pooled_k_ptr + key_head(head_index, GROUP) * pyramid_rows * HEAD_DIM
    pooled_v = pooled_v_ptr + key_head(head_index, GROUP) * pyramid_rows * HEAD_DIM

    dims = tl.arange(0, PADDED_DIM)
    position = query_tile * TILE_M + tl.arange(0, TILE_M)
    real = (position >= lead) & (position < end)
    q_head = q_ptr + batch * stride_qb + head * stride_qh
    q = load_real_rows(q_head + row_offsets(position + shift, stride_qn, WIDE), dims, real, HEAD_DIM)
    if NEGATIVE_SCALE:
        q = -q
    top = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M, 4] if LATE_SUM else [TILE_M], tl.float32)
    accumulator = tl.zeros([TILE_M, PADDED_DIM], tl.float32)

    # What is masked or gathered comes first: what only it needs then takes up no registers in the loop over full tiles.
    # On the diagonal every query, also one that is absent, may read the first key.
    TAIL_N: tl.constexpr = tail_width(TILE_N)
    TAIL_STAGES: tl.constexpr = tail_stages(TILE_N, LATE_SUM)
    diagonal = (first_row + row) * BLOCK_QUERY
    for first in tl.range(0, (query_tile % TILES + 1) * TILE_M, TAIL_N, num_stages=TAIL_STAGES):
        at = diagonal + first + tl.arange(0, TAIL_N)
        token = text_before + tl.minimum(at, video_keys - 1)
        visible = at[None, :] <= (first_row * BLOCK_QUERY + position)[:, None]
        top, total, accumulator = attend_visible(
            q, k_head + row_offsets(token, stride_kn, WIDE), v_head + row_offsets(token, stride_vn, WIDE), dims, scale,
            visible, top, total, accumulator, HEAD_DIM, PADDED_DIM, LATE_SUM,
        )  # fmt: skip

    starts, tile_ends, leftover_ends, level_rows, ragged_place, ragged_bias = cut_list(
        ids, counts_ptr + list_row * LISTED, video_keys, FACTORS, LISTED, BLOCK_KEY, TILE_N, diagonal // BLOCK_KEY
    )
    top, total, accumulator = attend_tail(
        q, k_head, v_head, pooled_k, pooled_v, stride_kn, stride_vn, ids, None, text_before, text_before, video_keys,
        starts, tile_ends, leftover_ends, level_rows, ragged_place, ragged_bias, dims, scale, top, total, accumulator,
        HEAD_DIM, PADDED_DIM, BLOCK_KEY, FACTORS, TILE_N, TAIL_N, TAIL_STAGES, False, WIDE, LATE_SUM, ALIGNED,
    )  # fmt: skip
    top, total, accumulator = attend_full_tiles(
        q, k_head, v_head, pooled_k, pooled_v, stride_kn, stride_vn, ids, None, text_before, starts, tile_ends,
        level_rows, dims, scale, top, total, accumulator, HEAD_DIM, PADDED_DIM, BLOCK_KEY, FACTORS, TILE_N, STAGES,
        False, WIDE, LATE_SUM,
    )  # fmt: skip
    if LATE_SUM:
        total = tl.sum(total, 1)
    # Found anew, in a way that the compiler takes for different numbers, rather than kept in registers all the while.
    position = (query_tile + query_tiles) % query_tiles * TILE_M + tl.arange(0, TILE_M)
    real = (position >= lead) & (position < end)
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + row_offsets(position + shift, stride_on, WIDE)
    if ONLY:
        # Of a tile with a query that was not sound, which is not a number, the others stay as they are.
        before = tl.load(out_rows, mask=real, other=0.0)
        real = real & (before != before)
    store_means(out_rows, dims, real, total, accumulator, HEAD_DIM)

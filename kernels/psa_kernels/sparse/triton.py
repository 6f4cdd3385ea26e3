"""Attention over the chosen rows of keys and values, on any GPU that Triton supports."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from psa_kernels.blocks import block_count
from psa_kernels.devices import capability
from psa_kernels.known_calls import recall
from psa_kernels.layout import TokenLayout
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.pooled import TritonPyramid
from psa_kernels.sparse.loops import attend_full_tiles, attend_tail, flagged_items, tail_stages, tail_width
from psa_kernels.sparse.steps import store_means
from psa_kernels.sparse.tiles import cut_list
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape, address_of
from psa_kernels.triton_rows import (
    are_wide,
    key_head,
    load_real_rows,
    must_be_told,
    padded_dim,
    row_offsets,
    video_tokens,
)

# Tiles whose flags one program looks at, when only some tiles are to be computed.
FLAGS = 64
# Major compute capabilities on which the sum of a row stays in four parts until the last tile. 8 has not the registers,
# on others it was not measured.
LATE_SUM = (9,)


def sparse_attention(
    q: torch.Tensor,
    pyramid: TritonPyramid,
    lists: BlockLists,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    lse: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    known: dict[Any, Any] | None = None,
) -> torch.Tensor:
    """Let the video queries attend the listed blocks at their levels, and all text.

    Args:
        q: `[B, Nq, Hq, D]`, all queries, in the order of the model.
        pyramid: of Hkv heads, of which Hq is a multiple.
        lse: None, or a contiguous float32 `[B, Hq, Nq]`, of which the video queries are filled with ln of the sum of
            exp over their logits.
        out: where the result goes: `[B, Nq, Hq, D]` in the dtype of q, its last stride 1; a new tensor if None.
        known: None, or the answers of calls with the same shapes, strides and settings, as in `Call`.

    Returns:
        `out`; the rows of text queries are not written.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    launch(q, pyramid, lists, layout, spec, scale, out, lse, known=known)
    return out


def launch(
    q: torch.Tensor,
    pyramid: TritonPyramid,
    lists: BlockLists,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    only: torch.Tensor | None = None,
    known: dict[Any, Any] | None = None,
) -> None:
    """Fill the rows of video queries of `out`, and of `lse` if there is one, as `sparse_attention` describes.

    Args:
        only: None, or int32 `[B * Hq * tiles of 128 queries]`: compute just the tiles where it is not 0.
        known: as in `sparse_attention`.
    """
    k, (v, value_means) = pyramid.source_keys, pyramid.needed_values()
    keys, values, ids = pyramid.keys, value_means, lists.ids
    permutation = layout.short_permutation
    plan = prepare(
        q, k, v, pyramid.keys.shape[2], ids, layout, spec, scale, out, lse is None, only is None, known
    )  # fmt: skip
    # Tokens are read from the originals also where the pyramid has them.
    tokens = layout.video_keys if 1 in pyramid.factors else 0
    skipped = tokens * keys.shape[3] * keys.element_size()
    if not plan.at(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), keys.data_ptr() + skipped, values.data_ptr() + skipped,
        out.data_ptr(), address_of(lse), ids.data_ptr(), lists.counts.data_ptr(), address_of(permutation),
        address_of(only),
    ):  # fmt: skip
        keys, values = (means.narrow(2, tokens, means.shape[2] - tokens) for means in (keys, values))
        plan(q, k, v, keys, values, out, lse, ids, lists.counts, permutation, only)


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pyramid_rows: int,
    ids: torch.Tensor,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    out: torch.Tensor,
    no_lse: bool = True,
    all_tiles: bool = True,
    known: dict[Any, Any] | None = None,
) -> Launch:
    """What `launch` launches for tensors like these, whose entries are not read.

    Args:
        pyramid_rows: rows of means of each head, of all levels of the pyramid.
        ids: of the lists.
        no_lse, all_tiles: whether `lse` and `only` are None.
        known: as in `sparse_attention`.
    """
    # What the other settings leave open.
    key = "portable attention", pyramid_rows, ids.shape[3], ids.dtype, out.stride(), no_lse, all_tiles
    return recall(known, key, lambda: _plan(
        q.shape, q.dtype, q.device, (q.stride(), k.stride(), v.stride(), out.stride()), k.shape,
        layout.text_before, layout.text_after, layout.video_queries, layout.video_keys, layout.permutation is not None,
        ids.shape[3], ids.dtype, pyramid_rows, spec, scale, no_lse, all_tiles,
    ))  # fmt: skip


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    shape: Shape, dtype: torch.dtype, device: torch.device, strides: tuple[Shape, Shape, Shape, Shape],
    of_keys: Shape, text_before: int, text_after: int, video_queries: int, video_keys: int, permuted: bool,
    list_width: int, ids: torch.dtype, pyramid_rows: int, spec: AttentionSpec, scale: float, no_lse: bool,
    all_tiles: bool,
) -> Launch:  # fmt: skip
    """The kernel for calls of one shape."""
    batch, query_tokens, heads, head_dim = shape
    gpu = capability(device)
    tile = tile_shape(gpu, head_dim, dtype.itemsize, spec.block_query)
    tiles = block_count(video_queries, tile["TILE_M"]) * batch * heads
    wide = are_wide(*zip((shape, of_keys, of_keys, shape), strides, strict=True))
    return Launch(
        attention_kernel, (tiles if all_tiles else block_count(tiles, FLAGS),),
        (tiles, *(step for each in strides for step in each[:3]), heads, video_queries, video_keys, list_width,
         pyramid_rows, text_before, text_before + text_after, query_tokens, abs(scale) * math.log2(math.e)),
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim(head_dim), BLOCK_QUERY=spec.block_query, BLOCK_KEY=spec.block_key,
        FACTORS=spec.factors, LISTED=len(spec.levels),
        NEGATIVE_SCALE=scale < 0, PERMUTED=permuted, STORE_LSE=not no_lse, WIDE=wide, ONLY=not all_tiles, FLAGS=FLAGS,
        LATE_SUM=gpu[0] in LATE_SUM, GROUP=heads // of_keys[2],
        ALIGNED=must_be_told(dtype.itemsize, head_dim, *strides[1][:3], *strides[2][:3]), **tile,
    )  # fmt: skip


def tile_shape(capability: tuple[int, int], head_dim: int, element_size: int, block_query: int) -> dict[str, int]:
    """Tile sizes, pipeline stages and warps with which the kernel fits shared memory, and in 16 bits spills nothing."""
    dim = padded_dim(head_dim)
    width = dim * element_size
    queries = 128 if block_query % 128 == 0 else 64
    if element_size == 4 and dim > 32:
        # No tensor core multiplies float32: a thread holds what it multiplies. At head_dim 128 this tile spills, and
        # is still 1.4 times as fast as the widest one that does not (docs/kernels.md).
        queries, keys, stages, warps = 64, *((32, 2) if dim <= 128 else (16, 1)), 8
    elif width > 256:
        queries, keys, stages, warps = 64, 32, 2, 8
    elif capability[0] == 9 and width == 128:
        keys, stages, warps = 64, 3, 4
    elif capability[0] in (9, 10):
        keys, stages, warps = 128, 3, queries // 16
    else:
        keys, stages, warps = (64 if width <= 128 or capability[0] == 8 else 32), 3, queries // 16
    return {"TILE_M": queries, "TILE_N": keys, "STAGES": stages, "num_warps": warps}


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, pooled_k_ptr, pooled_v_ptr, out_ptr, lse_ptr, ids_ptr, counts_ptr, permutation, only_ptr,
    tiles, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh,
    heads, video_queries, video_keys, list_width, pyramid_rows, text_before, text_keys, query_tokens, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr,
    FACTORS: tl.constexpr, LISTED: tl.constexpr, NEGATIVE_SCALE: tl.constexpr, PERMUTED: tl.constexpr,
    STORE_LSE: tl.constexpr, WIDE: tl.constexpr, ONLY: tl.constexpr, FLAGS: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, STAGES: tl.constexpr, LATE_SUM: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of `TILE_M` queries against its list; or those of `FLAGS` tiles whose flag in `only_ptr` is set."""
    first, last = tl.program_id(0), tl.program_id(0) + 1
    if ONLY:
        first, last = flagged_items(only_ptr, tiles, FLAGS)
    for item in range(first, last):
        wanted = True
        if ONLY:
            wanted = tl.load(only_ptr + item) > 0
        if wanted:
            attend_tile(
                item, q_ptr, k_ptr, v_ptr, pooled_k_ptr, pooled_v_ptr, out_ptr, lse_ptr, ids_ptr, counts_ptr,
                permutation, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn,
                stride_vh, stride_ob, stride_on, stride_oh, heads, video_queries, video_keys, list_width, pyramid_rows,
                text_before, text_keys, query_tokens, scale, HEAD_DIM, PADDED_DIM, BLOCK_QUERY, BLOCK_KEY, FACTORS,
                LISTED, NEGATIVE_SCALE, PERMUTED, STORE_LSE, WIDE, TILE_M, TILE_N, STAGES, LATE_SUM, GROUP,
                ALIGNED,
            )  # fmt: skip


@triton.jit
def attend_tile(
    item, q_ptr, k_ptr, v_ptr, pooled_k_ptr, pooled_v_ptr, out_ptr, lse_ptr, ids_ptr, counts_ptr, permutation,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, heads, video_queries, video_keys, list_width, pyramid_rows, text_before,
    text_keys, query_tokens, scale, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr, FACTORS: tl.constexpr, LISTED: tl.constexpr, NEGATIVE_SCALE: tl.constexpr,
    PERMUTED: tl.constexpr, STORE_LSE: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    STAGES: tl.constexpr, LATE_SUM: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """`TILE_M` queries of one head against their list; neighbouring items share a head and its keys in the cache."""
    query_tiles = tl.cdiv(video_queries, TILE_M)
    query_tile = item % query_tiles
    head_index = (item // query_tiles).to(tl.int64)
    batch, head = head_index // heads, head_index % heads
    list_row = head_index * tl.cdiv(video_queries, BLOCK_QUERY) + query_tile // (BLOCK_QUERY // TILE_M)
    ids = ids_ptr + list_row * list_width
    k_head = k_ptr + batch * stride_kb + key_head(head, GROUP) * stride_kh
    v_head = v_ptr + batch * stride_vb + key_head(head, GROUP) * stride_vh
    pooled_k = pooled_k_ptr + key_head(head_index, GROUP) * pyramid_rows * HEAD_DIM
    pooled_v = pooled_v_ptr + key_head(head_index, GROUP) * pyramid_rows * HEAD_DIM

    dims = tl.arange(0, PADDED_DIM)
    position = query_tile * TILE_M + tl.arange(0, TILE_M)
    real = position < video_queries
    token = video_tokens(position, permutation, text_before, real, PERMUTED)
    q_head = q_ptr + batch * stride_qb + head * stride_qh
    q = load_real_rows(q_head + row_offsets(token, stride_qn, WIDE), dims, real, HEAD_DIM)
    if NEGATIVE_SCALE:
        q = -q

    starts, tile_ends, leftover_ends, level_rows, ragged_place, ragged_bias = cut_list(
        ids, counts_ptr + list_row * LISTED, video_keys, FACTORS, LISTED, BLOCK_KEY, TILE_N
    )
    top = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M, 4] if LATE_SUM else [TILE_M], tl.float32)
    accumulator = tl.zeros([TILE_M, PADDED_DIM], tl.float32)

    # The tail comes first: what only it needs then takes up no registers in the loop over full tiles.
    top, total, accumulator = attend_tail(
        q, k_head, v_head, pooled_k, pooled_v, stride_kn, stride_vn, ids, permutation, text_before, text_keys,
        video_keys, starts, tile_ends, leftover_ends, level_rows, ragged_place, ragged_bias, dims, scale, top, total,
        accumulator, HEAD_DIM, PADDED_DIM, BLOCK_KEY, FACTORS, TILE_N, tail_width(TILE_N),
        tail_stages(TILE_N, LATE_SUM), PERMUTED, WIDE, LATE_SUM, ALIGNED,
    )  # fmt: skip
    top, total, accumulator = attend_full_tiles(
        q, k_head, v_head, pooled_k, pooled_v, stride_kn, stride_vn, ids, permutation, text_before, starts, tile_ends,
        level_rows, dims, scale, top, total, accumulator, HEAD_DIM, PADDED_DIM, BLOCK_KEY, FACTORS, TILE_N, STAGES,
        PERMUTED, WIDE, LATE_SUM,
    )  # fmt: skip
    if LATE_SUM:
        total = tl.sum(total, 1)
    # Found anew, in a way that the compiler takes for different numbers, rather than kept in registers all the while.
    position = (item + query_tiles) % query_tiles * TILE_M + tl.arange(0, TILE_M)
    real = position < video_queries
    token = video_tokens(position, permutation, text_before, real, PERMUTED)
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + row_offsets(token, stride_on, WIDE)
    store_means(out_rows, dims, real, total, accumulator, HEAD_DIM)
    if STORE_LSE:
        LN_2: tl.constexpr = 0.6931471805599453
        tl.store(lse_ptr + head_index * query_tokens + token, (top + tl.math.log2(total)) * LN_2, mask=real)

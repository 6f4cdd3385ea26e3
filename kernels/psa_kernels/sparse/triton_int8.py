"""Attention over the chosen rows with queries and keys in 8-bit integers, on any GPU that Triton supports.

The walk over a list is that of `sparse.triton`; only the products of queries and keys differ.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from psa_kernels.blocks import block_count
from psa_kernels.devices import capability
from psa_kernels.layout import TokenLayout
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.pooled import TritonPyramid
from psa_kernels.quantise.integers import Integers
from psa_kernels.sparse import triton as native
from psa_kernels.sparse.loops import attend_full_tiles, attend_tail
from psa_kernels.sparse.steps import store_means
from psa_kernels.sparse.tiles import cut_list
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape
from psa_kernels.triton_rows import are_wide, key_head, must_be_told, row_offsets, video_tokens


def sparse_attention(
    q: torch.Tensor,
    pyramid: TritonPyramid,
    lists: BlockLists,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    lse: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    integers: Integers,
) -> torch.Tensor:
    """The same as `sparse.triton.sparse_attention`, with products of integers.

    Tiles of queries of which one, or a key of their head, is not finite are computed natively.

    Args:
        pyramid: not `gathered`.
        integers: what `quantise_as_read` returned for the same tensors and scale.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    v, value_means = pyramid.needed_values()
    tokens, means = integers.keys
    if tokens is None:
        raise ValueError("integers.keys[0]=None: expected the integers of all tokens")
    permutation = layout.short_permutation
    plan, tiles = _plan(
        q.shape, q.dtype, q.device, (v.stride(), out.stride()), v.shape, layout.text_before, layout.text_after,
        layout.video_queries, layout.video_keys, permutation is not None, lists.ids.shape[3], lists.ids.dtype,
        value_means.shape[2], spec, lse is None,
    )  # fmt: skip
    redo = torch.empty(tiles, dtype=torch.int32, device=q.device)
    plan(
        integers.queries, integers.factors, tokens, v, tokens if means is None else means, value_means, out, lse, redo,
        lists.ids, lists.counts, permutation,
    )  # fmt: skip
    if lse is not None:
        integers.add_key_means(lse, q, layout, scale)
    native.launch(q, pyramid, lists, layout, spec, scale, out, lse, only=redo)
    return out


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    shape: Shape, dtype: torch.dtype, device: torch.device, strides: tuple[Shape, Shape], of_keys: Shape,
    text_before: int, text_after: int, video_queries: int, video_keys: int, permuted: bool, list_width: int,
    ids: torch.dtype, pyramid_rows: int, spec: AttentionSpec, no_lse: bool,
) -> tuple[Launch, int]:  # fmt: skip
    """The kernel for calls of one shape, and the number of its tiles of queries."""
    batch, query_tokens, heads, head_dim = shape
    gpu = capability(device)
    tile = tile_shape(gpu, head_dim, spec.block_query)
    tiles = block_count(video_queries, tile["TILE_M"]) * batch * heads
    wide = are_wide((of_keys, strides[0]), (shape, strides[1]))
    return Launch(
        attention_kernel, (tiles,),
        (*(step for each in strides for step in each[:3]), heads, video_queries, video_keys, list_width, pyramid_rows,
         text_before, text_before + text_after, query_tokens, of_keys[1]),
        HEAD_DIM=head_dim, BLOCK_QUERY=spec.block_query, BLOCK_KEY=spec.block_key,
        FACTORS=spec.factors, LISTED=len(spec.levels),
        PERMUTED=permuted, STORE_LSE=not no_lse, WIDE=wide, GROUP=heads // of_keys[2],
        # Rows of integers, of 64 or 128 bytes, lie side by side.
        ALIGNED=must_be_told(dtype.itemsize, head_dim, *strides[0][:3]), **tile,
    ), tiles  # fmt: skip


def tile_shape(capability: tuple[int, int], head_dim: int, block_query: int) -> dict[str, int]:
    """Tile sizes, pipeline stages and warps with which the kernel spills no registers and fits shared memory.

    As many queries as in the native kernel, which computes again what is not finite, tile by tile.
    """
    tile = native.tile_shape(capability, head_dim, 2, block_query)
    return {**tile, "TILE_N": min(tile["TILE_N"], 64)}


@triton.jit
def attention_kernel(
    q_ptr, factors_ptr, k_ptr, v_ptr, pooled_k_ptr, pooled_v_ptr, out_ptr, lse_ptr, redo_ptr, ids_ptr, counts_ptr,
    permutation, stride_vb, stride_vn, stride_vh, stride_ob, stride_on, stride_oh, heads, video_queries, video_keys,
    list_width, pyramid_rows, text_before, text_keys, query_tokens, key_tokens, HEAD_DIM: tl.constexpr,
    BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr, FACTORS: tl.constexpr, LISTED: tl.constexpr,
    PERMUTED: tl.constexpr, STORE_LSE: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """`TILE_M` queries of one head against their list; neighbouring programs share a head and its keys in the cache.

    Args:
        q_ptr, k_ptr, pooled_k_ptr: int8, contiguous `[B, heads, rows, HEAD_DIM]`, heads of the queries or the keys.
        factors_ptr: float32 `[B, Hq, Nq]`, positive or not finite: from products to logits in base 2.
        redo_ptr: int32, one a tile, set to 1 where a factor is not finite, else to 0.
    """
    query_tiles = tl.cdiv(video_queries, TILE_M)
    query_tile = tl.program_id(0) % query_tiles
    head_index = (tl.program_id(0) // query_tiles).to(tl.int64)
    batch, head = head_index // heads, head_index % heads
    list_row = head_index * tl.cdiv(video_queries, BLOCK_QUERY) + query_tile // (BLOCK_QUERY // TILE_M)
    ids = ids_ptr + list_row * list_width
    k_head = k_ptr + key_head(head_index, GROUP) * key_tokens * HEAD_DIM
    v_head = v_ptr + batch * stride_vb + key_head(head, GROUP) * stride_vh
    pooled_k = pooled_k_ptr + key_head(head_index, GROUP) * pyramid_rows * HEAD_DIM
    pooled_v = pooled_v_ptr + key_head(head_index, GROUP) * pyramid_rows * HEAD_DIM

    dims = tl.arange(0, HEAD_DIM)
    position = query_tile * TILE_M + tl.arange(0, TILE_M)
    real = position < video_queries
    token = video_tokens(position, permutation, text_before, real, PERMUTED)
    q_head = q_ptr + head_index * query_tokens * HEAD_DIM
    q = tl.load(q_head + row_offsets(token, HEAD_DIM, WIDE)[:, None] + dims[None, :], mask=real[:, None], other=0)
    factors = tl.load(factors_ptr + head_index * query_tokens + token, mask=real, other=1.0)
    # Anything times 0 is 0, but infinity and NaN.
    tl.store(redo_ptr + tl.program_id(0), (tl.sum(factors * 0.0, 0) != 0.0).to(tl.int32))

    starts, tile_ends, leftover_ends, level_rows, ragged_place, ragged_bias = cut_list(
        ids, counts_ptr + list_row * LISTED, video_keys, FACTORS, LISTED, BLOCK_KEY, TILE_N
    )
    top = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    accumulator = tl.zeros([TILE_M, HEAD_DIM], tl.float32)

    # The tail comes first: what only it needs then takes up no registers in the loop over full tiles.
    top, total, accumulator = attend_tail(
        q, k_head, v_head, pooled_k, pooled_v, HEAD_DIM, stride_vn, ids, permutation, text_before, text_keys,
        video_keys, starts, tile_ends, leftover_ends, level_rows, ragged_place, ragged_bias, dims, factors, top, total,
        accumulator, HEAD_DIM, HEAD_DIM, BLOCK_KEY, FACTORS, TILE_N, TILE_N, 1, PERMUTED, WIDE, False, ALIGNED,
    )  # fmt: skip
    top, total, accumulator = attend_full_tiles(
        q, k_head, v_head, pooled_k, pooled_v, HEAD_DIM, stride_vn, ids, permutation, text_before, starts, tile_ends,
        level_rows, dims, factors, top, total, accumulator, HEAD_DIM, HEAD_DIM, BLOCK_KEY, FACTORS, TILE_N, STAGES,
        PERMUTED, WIDE, False,
    )  # fmt: skip

    # Found anew, in a way that the compiler takes for different numbers, rather than kept in registers all the while.
    position = (tl.program_id(0) + query_tiles) % query_tiles * TILE_M + tl.arange(0, TILE_M)
    real = position < video_queries
    token = video_tokens(position, permutation, text_before, real, PERMUTED)
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + row_offsets(token, stride_on, WIDE)
    store_means(out_rows, dims, real, total, accumulator, HEAD_DIM)
    if STORE_LSE:
        LN_2: tl.constexpr = 0.6931471805599453
        tl.store(lse_ptr + head_index * query_tokens + token, (top + tl.math.log2(total)) * LN_2, mask=real)

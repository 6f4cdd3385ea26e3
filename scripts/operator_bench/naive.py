"""A peer of the attention kernel that multiplies one listed block at a time, however few rows it has at its level.

It takes the lists and the pyramid of `psa_kernels.sparse.triton.sparse_attention`, and shares with it the step of the
online softmax. It differs in what a step multiplies: there a tile of fixed size that many small blocks share, here one
block, of 64, 32, 16, ... rows. What it needs no more than the benchmark does it has not: text, permutations, a
log-sum-exp, head dims that are no power of two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from psa_kernels.devices import capability
from psa_kernels.layout import TokenLayout
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.triton import TritonPyramid
from psa_kernels.sparse.steps import attend
from psa_kernels.sparse.tiles import log2_of
from psa_kernels.sparse.triton import LATE_SUM
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_rows import are_wide, load_real_rows, padded_dim, row_offsets


class Tuning(NamedTuple):
    """Queries a program has, its warps, and how many blocks are in flight."""

    queries: int
    warps: int
    stages: int


# The best differs with the rows of a block, so a benchmark is to try them all.
TUNINGS = (Tuning(128, 8, 3), Tuning(128, 8, 2), Tuning(64, 4, 2), Tuning(64, 4, 3), Tuning(64, 4, 5))


def sparse_attention(
    q: torch.Tensor,
    pyramid: TritonPyramid,
    lists: BlockLists,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    tuning: Tuning = TUNINGS[0],
    compile_only: bool = False,
) -> torch.Tensor:
    """The same as `psa_kernels.sparse.triton.sparse_attention`.

    Args:
        compile_only: launch nothing, and leave the result as it is allocated.

    Raises:
        ValueError: the call has text, a permutation, `rest: mean`, a scale that is not positive or a head dim that is
            no power of two.
    """
    if layout.text_before or layout.text_after or layout.permutation is not None or spec.rest != "skip":
        raise ValueError("the naive kernel takes neither text nor a permutation nor `rest: mean`")
    batch, queries, heads, head_dim = q.shape
    if not scale > 0 or head_dim != padded_dim(head_dim):
        raise ValueError(f"scale={scale}, head_dim={head_dim}: expected a positive scale and a power of two above 8")
    k, v = pyramid.source_keys, pyramid.source_values
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tile = min(tuning.queries, spec.block_query)
    grid = (triton.cdiv(queries, tile) * batch * heads,)
    arguments = (
        q, k, v, pyramid.keys, pyramid.values, out, lists.ids, lists.counts, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *out.stride()[:3], heads, queries, k.shape[1], lists.ids.shape[3], pyramid.keys.shape[2],
        scale * math.log2(math.e),
    )  # fmt: skip
    options = {
        "HEAD_DIM": head_dim,
        "BLOCK_QUERY": spec.block_query,
        "BLOCK_KEY": spec.block_key,
        "FACTORS": spec.levels,
        "WIDE": are_wide(*((x.shape, x.stride()) for x in (q, k, v, out))),
        "LATE_SUM": capability(q.device)[0] in LATE_SUM,
        "TILE_M": tile,
        "STAGES": tuning.stages,
        "num_warps": tuning.warps,
    }
    if compile_only:
        naive_kernel.warmup(*arguments, grid=grid, **options)
    else:
        naive_kernel[grid](*arguments, **options)
    return out


@triton.jit(do_not_specialize=["queries", "keys", "list_width", "pyramid_rows"])
def naive_kernel(
    q_ptr, k_ptr, v_ptr, pooled_k_ptr, pooled_v_ptr, out_ptr, ids_ptr, counts_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, heads, queries, keys, list_width, pyramid_rows, scale,
    HEAD_DIM: tl.constexpr, BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr, FACTORS: tl.constexpr,
    WIDE: tl.constexpr, LATE_SUM: tl.constexpr, TILE_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`TILE_M` queries of one head; neighbouring programs share a head and its keys in the cache."""
    query_tiles = tl.cdiv(queries, TILE_M)
    query_tile = tl.program_id(0) % query_tiles
    head_index = (tl.program_id(0) // query_tiles).to(tl.int64)
    batch, head = head_index // heads, head_index % heads
    list_row = head_index * tl.cdiv(queries, BLOCK_QUERY) + query_tile // (BLOCK_QUERY // TILE_M)
    ids = ids_ptr + list_row * list_width
    k_rows = k_ptr + batch * stride_kb + head * stride_kh
    v_rows = v_ptr + batch * stride_vb + head * stride_vh
    pooled_k = pooled_k_ptr + head_index * pyramid_rows * HEAD_DIM
    pooled_v = pooled_v_ptr + head_index * pyramid_rows * HEAD_DIM

    dims = tl.arange(0, HEAD_DIM)
    query = query_tile * TILE_M + tl.arange(0, TILE_M)
    q_rows = q_ptr + batch * stride_qb + head * stride_qh + row_offsets(query, stride_qn, WIDE)
    q = load_real_rows(q_rows, dims, query < queries, HEAD_DIM)
    top = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M, 4] if LATE_SUM else [TILE_M], tl.float32)
    accumulator = tl.zeros([TILE_M, HEAD_DIM], tl.float32)

    for level in tl.static_range(len(FACTORS)):
        count = tl.load(counts_ptr + list_row * len(FACTORS) + level)
        if FACTORS[level] == 1:
            top, total, accumulator = attend_level(
                q, k_rows, v_rows, stride_kn, stride_vn, ids, count, keys, dims, scale, top, total, accumulator,
                HEAD_DIM, FACTORS[level], BLOCK_KEY // FACTORS[level], WIDE, LATE_SUM, STAGES,
            )  # fmt: skip
        else:
            top, total, accumulator = attend_level(
                q, pooled_k, pooled_v, HEAD_DIM, HEAD_DIM, ids, count, keys, dims, scale, top, total, accumulator,
                HEAD_DIM, FACTORS[level], BLOCK_KEY // FACTORS[level], WIDE, LATE_SUM, STAGES,
            )  # fmt: skip
            pooled_k += tl.cdiv(keys, FACTORS[level]).to(tl.int64) * HEAD_DIM
            pooled_v += tl.cdiv(keys, FACTORS[level]).to(tl.int64) * HEAD_DIM
        ids += count

    if LATE_SUM:
        total = tl.sum(total, 1)
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + row_offsets(query, stride_on, WIDE)
    tl.store(
        out_rows[:, None] + dims[None, :],
        (accumulator * (1.0 / total)[:, None]).to(out_ptr.dtype.element_ty),
        mask=(query < queries)[:, None],
    )


@triton.jit
def attend_level(
    q, k_rows, v_rows, stride_k, stride_v, ids, count, keys, dims, scale, top, total, accumulator,
    HEAD_DIM: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, LATE_SUM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The `count` blocks of one level, of `ROWS` rows each, whose ids start at a pointer."""
    # A matrix product takes 16 rows or more: a smaller block is read several times over, each time at its part of the
    # weight, which needs no mask.
    COPIES: tl.constexpr = 16 // ROWS if ROWS < 16 else 1
    columns = tl.arange(0, ROWS * COPIES) % ROWS
    bias = tl.full([], log2_of(FACTOR) - log2_of(COPIES), tl.float32)
    # Ids ascend inside a level, so only its last block can be the ragged last one of the sequence.
    last = tl.load(ids + count - 1, mask=count > 0, other=-1).to(tl.int32)
    ragged = ((last + 1) * ROWS * FACTOR > keys).to(tl.int32)
    for place in tl.range(0, count - ragged, num_stages=STAGES):
        rows = tl.load(ids + place).to(tl.int32) * ROWS + columns
        top, total, accumulator = attend(
            q, k_rows + row_offsets(rows, stride_k, WIDE), v_rows + row_offsets(rows, stride_v, WIDE), dims, scale,
            bias, True, top, total, accumulator, HEAD_DIM, HEAD_DIM, LATE_SUM,
        )  # fmt: skip
    for _ in range(ragged):
        rows = last * ROWS + columns
        tokens = tl.minimum(keys - rows * FACTOR, FACTOR)
        weights = tl.maximum(tokens, 1).to(tl.float32) / COPIES
        biases = tl.where(tokens > 0, tl.math.log2(weights), -float("inf"))
        rows = tl.where(tokens > 0, rows, 0)
        top, total, accumulator = attend(
            q, k_rows + row_offsets(rows, stride_k, WIDE), v_rows + row_offsets(rows, stride_v, WIDE), dims, scale,
            biases[None, :], False, top, total, accumulator, HEAD_DIM, HEAD_DIM, LATE_SUM,
        )  # fmt: skip
    return top, total, accumulator

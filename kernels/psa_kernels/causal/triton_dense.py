"""Dense causal attention of some queries, those of text, on any GPU that Triton supports."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from psa_kernels.blocks import block_count
from psa_kernels.causal.triton_steps import item_at
from psa_kernels.devices import capability
from psa_kernels.sparse.steps import attend, attend_visible, store_means
from psa_kernels.sparse.triton import LATE_SUM, tile_shape
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape
from psa_kernels.triton_rows import are_wide, key_head, load_real_rows, padded_dim, row_offsets


def dense_causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, part: slice, out: torch.Tensor
) -> None:
    """Let some of the queries, which are the last of the keys, attend all keys that are not later.

    Args:
        q, k, v: `[B, Nq, Hq, D]` and twice `[B, Nk, Hkv, D]`, Nk no less than Nq.
        part: which queries; both ends are given.
        out: `[B, Nq, Hq, D]` in the dtype of q, its last stride 1; the rows of these queries are written.
    """
    _plan(
        q.shape, q.dtype, q.device, (q.stride(), k.stride(), v.stride(), out.stride()), k.shape, scale, part.start,
        part.stop,
    )(q, k, v, out)  # fmt: skip


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    shape: Shape, dtype: torch.dtype, device: torch.device, strides: tuple[Shape, Shape, Shape, Shape],
    of_keys: Shape, scale: float, start: int, stop: int,
) -> Launch:  # fmt: skip
    batch, queries, heads, head_dim = shape
    gpu = capability(device)
    tile = tile_shape(gpu, head_dim, dtype.itemsize, 128 if stop - start > 64 else 64)
    return Launch(
        dense_kernel, (block_count(stop - start, tile["TILE_M"]) * batch * heads,),
        (*(step for each in strides for step in each[:3]), heads, start, stop, of_keys[1] - queries,
         abs(scale) * math.log2(math.e)),
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim(head_dim), NEGATIVE_SCALE=scale < 0,
        WIDE=are_wide(*zip((shape, of_keys, of_keys, shape), strides, strict=True)), LATE_SUM=gpu[0] in LATE_SUM,
        GROUP=heads // of_keys[2], **tile,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "start", "stop", "first_query"])
def dense_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb,
    stride_vn, stride_vh, stride_ob, stride_on, stride_oh, heads, start, stop, first_query, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, NEGATIVE_SCALE: tl.constexpr, WIDE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, STAGES: tl.constexpr, LATE_SUM: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of `TILE_M` of the queries from `start` up to `stop`.

    Args:
        first_query: position of the first query of the call among the keys.
    """
    head_index, query_tile = item_at(tl.program_id(0), tl.num_programs(0), tl.cdiv(stop - start, TILE_M), GROUP)
    head_index = head_index.to(tl.int64)
    batch, head = head_index // heads, head_index % heads
    k_head = k_ptr + batch * stride_kb + key_head(head, GROUP) * stride_kh
    v_head = v_ptr + batch * stride_vb + key_head(head, GROUP) * stride_vh
    dims = tl.arange(0, PADDED_DIM)
    begin = start + query_tile * TILE_M
    token = begin + tl.arange(0, TILE_M)
    real = token < stop
    q_head = q_ptr + batch * stride_qb + head * stride_qh
    q = load_real_rows(q_head + row_offsets(token, stride_qn, WIDE), dims, real, HEAD_DIM)
    if NEGATIVE_SCALE:
        q = -q
    top = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M, 4] if LATE_SUM else [TILE_M], tl.float32)
    accumulator = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    # Tiles that every query may read come last. Of the first of the others every query may read the first key.
    whole = (first_query + begin) // TILE_N * TILE_N
    last = first_query + tl.minimum(begin + TILE_M, stop) - 1
    for first in tl.range(whole, last + 1, TILE_N, num_stages=1):
        key = first + tl.arange(0, TILE_N)
        visible = key[None, :] <= (first_query + token)[:, None]
        at = tl.minimum(key, last)
        top, total, accumulator = attend_visible(
            q, k_head + row_offsets(at, stride_kn, WIDE), v_head + row_offsets(at, stride_vn, WIDE), dims, scale,
            visible, top, total, accumulator, HEAD_DIM, PADDED_DIM, LATE_SUM,
        )  # fmt: skip
    for first in tl.range(0, whole, TILE_N, num_stages=STAGES):
        key = first + tl.arange(0, TILE_N)
        top, total, accumulator = attend(
            q, k_head + row_offsets(key, stride_kn, WIDE), v_head + row_offsets(key, stride_vn, WIDE), dims, scale, 0.0,
            True, top, total, accumulator, HEAD_DIM, PADDED_DIM, LATE_SUM,
        )  # fmt: skip
    if LATE_SUM:
        total = tl.sum(total, 1)
    # Found anew, in a way that the compiler takes for different numbers, rather than kept in registers all the while.
    query_tiles = tl.cdiv(stop - start, TILE_M)
    token = start + (query_tile + query_tiles) % query_tiles * TILE_M + tl.arange(0, TILE_M)
    real = token < stop
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + row_offsets(token, stride_on, WIDE)
    store_means(out_rows, dims, real, total, accumulator, HEAD_DIM)

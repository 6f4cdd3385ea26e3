"""The channels in which queries and keys are quantised, in Triton: the matrix of each head that leads there."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import triton
import triton.language as tl

from psa_kernels.quantise import reference
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape

SAMPLES = tl.constexpr(reference.SAMPLES)
LARGEST_EXPONENT = tl.constexpr(reference.LARGEST_EXPONENT)
INFINITY = tl.constexpr(float("inf"))
# Sampled tokens that are read at a time.
ROWS = 64


def channel_matrices(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantise.reference` multiplies the queries and the keys of each head by, in the dtype of q and k.

    The one of keys is D times as large here: then all entries are powers of two.

    Args:
        q, k: `[B, Nq, Hq, D]` and `[B, Nk, Hkv, D]`, their last stride 1 and D a power of two from 16 to 256.

    Returns:
        `[B, Hkv, D, D]`, of queries and of keys; heads of queries that share keys have the same.
    """
    batch, _, heads, head_dim = k.shape
    empty = partial(torch.empty, batch, heads, head_dim, head_dim, dtype=q.dtype, device=q.device)
    of_queries, of_keys = empty(), empty()
    launch = _plan(q.shape, q.stride(), k.shape, k.stride(), q.dtype, q.device)
    launch(q, k, of_queries, of_keys)
    return of_queries, of_keys


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    shape: Shape, strides: Shape, of_keys: Shape, key_strides: Shape, dtype: torch.dtype, device: torch.device
) -> Launch:
    batch, key_tokens, heads, head_dim = of_keys
    return Launch(
        matrices_kernel, (batch * heads,), (*strides[:3], *key_strides[:3], heads, shape[1], key_tokens),
        HEAD_DIM=head_dim, ROWS=ROWS, GROUP=shape[2] // heads, num_warps=8,
    )  # fmt: skip


@triton.jit
def matrices_kernel(
    q_ptr, k_ptr, of_queries_ptr, of_keys_ptr, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, heads,
    query_tokens, key_tokens, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Both matrices of one head of the keys."""
    head = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    q_head = q_ptr + head // heads * stride_qb + head % heads * GROUP * stride_qh
    k_head = k_ptr + head // heads * stride_kb + head % heads * stride_kh
    of_queries = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    smallest = tl.full([ROWS, HEAD_DIM], INFINITY, tl.float32)
    largest = tl.full([ROWS, HEAD_DIM], -INFINITY, tl.float32)
    for first in tl.static_range(0, SAMPLES, ROWS):
        of_queries = tl.maximum(of_queries, tl.abs(sampled(q_head, first, query_tokens, stride_qn, dims, ROWS)))
        if GROUP > 1:
            for member in range(1, GROUP):
                queries = sampled(q_head + member * stride_qh, first, query_tokens, stride_qn, dims, ROWS)
                of_queries = tl.maximum(of_queries, tl.abs(queries))
        keys = sampled(k_head, first, key_tokens, stride_kn, dims, ROWS)
        smallest = tl.minimum(smallest, keys)
        largest = tl.maximum(largest, keys)
    half_range = tl.max(largest, 0) * 0.5 - tl.min(smallest, 0) * 0.5
    exponents = scale_exponents(half_range, tl.max(of_queries, 0))
    place = head * HEAD_DIM * HEAD_DIM + dims[:, None] * HEAD_DIM + dims[None, :]
    signs = signs_of(HEAD_DIM)
    tl.store(of_queries_ptr + place, (signs * power_of_two(exponents)[:, None]).to(of_queries_ptr.dtype.element_ty))
    tl.store(of_keys_ptr + place, (signs * power_of_two(-exponents)[:, None]).to(of_keys_ptr.dtype.element_ty))


@triton.jit
def sampled(pointer, first, tokens, stride, dims, ROWS: tl.constexpr):
    """`ROWS` of the sampled tokens of one head, from one on; 0 for what is not finite."""
    token = (first + tl.arange(0, ROWS)).to(tl.int64) * tokens // SAMPLES
    x = tl.load(pointer + token[:, None] * stride + dims[None, :]).to(tl.float32)
    return tl.where(tl.abs(x) < INFINITY, x, 0.0)


@triton.jit
def scale_exponents(of_keys, of_queries):
    """Exponents of the scales of channels that are so large in keys and in queries."""
    known = (of_queries > 0.0) & (of_keys > 0.0)
    ratio = tl.math.div_rn(tl.where(known, of_keys, 1.0), tl.where(known, of_queries, 1.0))
    ratio = tl.minimum(tl.maximum(ratio, 2.0**-20), 2.0**20)
    # The upper bits of a float32 are its exponent plus 127. Half of it, of a number below 1 rather than below 2.
    exponents = ((ratio.to(tl.int32, bitcast=True) >> 23) - 126) >> 1
    return tl.minimum(tl.maximum(exponents, -LARGEST_EXPONENT), LARGEST_EXPONENT)


@triton.jit
def power_of_two(exponents):
    return ((exponents + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def signs_of(HEAD_DIM: tl.constexpr):
    """The Hadamard matrix of the reference: float32 `[HEAD_DIM, HEAD_DIM]`."""
    tl.static_assert(HEAD_DIM <= 256)
    row = tl.arange(0, HEAD_DIM)[:, None]
    bits = (row & tl.arange(0, HEAD_DIM)[None, :]) ^ (row & (row >> 1) & 0x55)
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    return tl.where((bits & 1) == 0, 1.0, -1.0)

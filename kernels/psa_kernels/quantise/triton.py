"""Queries and keys in 8-bit integers, in Triton: one pass for what keys are quantised by, one that quantises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl

from psa_kernels.blocks import block_count
from psa_kernels.layout import TokenLayout
from psa_kernels.pyramid.pooled import TritonPyramid
from psa_kernels.quantise import reference
from psa_kernels.quantise.integers import Integers
from psa_kernels.spec import AttentionSpec

LARGEST_INTEGER = tl.constexpr(float(reference.LARGEST_INTEGER))
MIN_ENTRY = tl.constexpr(reference.MIN_ENTRY)
# Factors of rows are divided by where tiles are mixed. Below this all logits are 0.
MIN_FACTOR = tl.constexpr(2.0**-100)
# Added and taken away again, it rounds what is much smaller to an integer: floats of this size are integers.
ROUNDER = tl.constexpr(1.5 * 2.0**23)
# Rows whose sums, smallest and largest entries one program finds; and rows at a time there, and elsewhere.
CHUNK = 1024
FEW_ROWS = 16
ROWS = 64


def quantise_rows(
    q: torch.Tensor, pyramid: TritonPyramid, layout: TokenLayout, spec: AttentionSpec, scale: float
) -> Integers:
    """The queries `[B, Nq, H, D]`, and the keys of the text and of every level, in 8-bit integers.

    Args:
        pyramid: of the keys, perhaps without values yet; `gathered` where tokens are permuted.
        scale: factor on the dot products, positive.
    """
    keys = pyramid.key_rows(layout, spec)
    return quantise(q, keys, [rows for rows in keys[:3] if rows is not None], scale)


def quantised_rows(layout: TokenLayout, spec: AttentionSpec) -> int:
    """Rows of one head that `quantise_rows` makes, of head_dim bytes each."""
    levels = sum(block_count(layout.video_keys, factor) for factor in spec.levels)
    return layout.video_queries + levels + 2 * (layout.text_before + layout.text_after)


def quantise(
    q: torch.Tensor, keys: Sequence[torch.Tensor | None], finest: Sequence[torch.Tensor], scale: float
) -> Integers:
    """Quantise queries and keys as `quantise.reference` says.

    Args:
        q: `[B, Nq, H, D]`, its last stride 1 and D a power of two.
        keys: tensors `[B, H, rows, D]` whose last stride is 1: keys, or means of keys.
        finest: those of them that hold the finest level and the text.
        scale: factor on the dot products, positive.
    """
    means, largest = key_means_and_largest(finest)
    integers = [None if rows is None else quantise_keys(rows, means, largest) for rows in keys]
    queries, factors = quantise_queries(q, largest, scale)
    return Integers(queries, integers, factors, means)


def key_means_and_largest(finest: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean rows `[B, H, D]` and largest entries less these `[B, H]`, float32, of tensors `[B, H, rows, D]`."""
    batch, heads, _, head_dim = finest[0].shape
    chunks = [triton.cdiv(rows.shape[2], CHUNK) for rows in finest]
    empty = partial(torch.empty, dtype=torch.float32, device=finest[0].device)
    parts = empty(batch * heads, 3, sum(chunks), head_dim)
    for index, rows in enumerate(finest):
        statistics_kernel[(chunks[index], batch * heads)](
            rows, parts, *rows.stride()[:3], heads, rows.shape[2], sum(chunks), sum(chunks[:index]),
            HEAD_DIM=head_dim, CHUNK=CHUNK, ROWS=FEW_ROWS, num_warps=4,
        )  # fmt: skip
    means, largest = empty(batch, heads, head_dim), empty(batch, heads)
    summary_kernel[(batch * heads,)](
        parts, means, largest, sum(chunks), sum(rows.shape[2] for rows in finest), HEAD_DIM=head_dim,
        ROWS=FEW_ROWS, num_warps=4,
    )  # fmt: skip
    return means, largest


def quantise_keys(rows: torch.Tensor, means: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Integers of keys `[B, H, rows, D]`, by what `key_means_and_largest` found: int8, contiguous."""
    batch, heads, count, head_dim = rows.shape
    integers = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    keys_kernel[(triton.cdiv(count, ROWS), batch * heads)](
        rows, means, largest, integers, *rows.stride()[:3], heads, count, HEAD_DIM=head_dim, ROWS=ROWS, num_warps=4
    )
    return integers


def quantise_queries(q: torch.Tensor, key_largest: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers of queries `[B, Nq, H, D]`, int8 in their shape, and the factors of `Integers`."""
    batch, tokens, heads, head_dim = q.shape
    integers = torch.empty(batch, heads, tokens, head_dim, dtype=torch.int8, device=q.device)
    factors = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    stride_b, stride_n, stride_h = q.stride()[:3]
    queries_kernel[(triton.cdiv(tokens, ROWS), batch * heads)](
        q, key_largest, integers, factors, stride_b, stride_h, stride_n, heads, tokens, scale * math.log2(math.e),
        HEAD_DIM=head_dim, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return integers.transpose(1, 2), factors


@triton.jit
def statistics_kernel(
    x_ptr, partial_ptr, stride_b, stride_h, stride_n, heads, rows, chunks, first_chunk, HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums, smallest and largest entries of each channel over `CHUNK` rows of one head."""
    head = tl.program_id(1).to(tl.int64)
    x_head = x_ptr + head // heads * stride_b + head % heads * stride_h
    dims = tl.arange(0, HEAD_DIM)
    sums = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    smallest = tl.full([ROWS, HEAD_DIM], float("inf"), tl.float32)
    largest = tl.full([ROWS, HEAD_DIM], -float("inf"), tl.float32)
    for first in tl.range(0, CHUNK, ROWS, loop_unroll_factor=4):
        row = tl.program_id(0) * CHUNK + first + tl.arange(0, ROWS)
        real = row[:, None] < rows
        x = tl.load(x_head + row.to(tl.int64)[:, None] * stride_n + dims[None, :], mask=real, other=0.0).to(tl.float32)
        sums += x
        smallest = tl.minimum(smallest, tl.where(real, x, float("inf")))
        largest = tl.maximum(largest, tl.where(real, x, -float("inf")))
    out = partial_ptr + (head * 3 * chunks + first_chunk + tl.program_id(0)) * HEAD_DIM + dims
    tl.store(out, tl.sum(sums, 0))
    tl.store(out + chunks * HEAD_DIM, tl.min(smallest, 0))
    tl.store(out + 2 * chunks * HEAD_DIM, tl.max(largest, 0))


@triton.jit
def summary_kernel(partial_ptr, means_ptr, largest_ptr, chunks, rows, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    """Mean of one head's keys and the largest entry less it, from what the chunks of its rows gave."""
    head = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    partial = partial_ptr + head * 3 * chunks * HEAD_DIM
    sums = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    smallest = tl.full([ROWS, HEAD_DIM], float("inf"), tl.float32)
    largest = tl.full([ROWS, HEAD_DIM], -float("inf"), tl.float32)
    for first in range(0, chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)
        real = chunk[:, None] < chunks
        place = partial + chunk[:, None] * HEAD_DIM + dims[None, :]
        sums += tl.load(place, mask=real, other=0.0)
        place += chunks * HEAD_DIM
        smallest = tl.minimum(smallest, tl.load(place, mask=real, other=float("inf")))
        place += chunks * HEAD_DIM
        largest = tl.maximum(largest, tl.load(place, mask=real, other=-float("inf")))
    mean = tl.sum(sums, 0) / rows
    entry = tl.max(tl.maximum(tl.max(largest, 0) - mean, mean - tl.min(smallest, 0)), 0)
    tl.store(means_ptr + head * HEAD_DIM + dims, mean)
    tl.store(largest_ptr + head, checked(entry, mean, 0))


@triton.jit
def checked(largest, entries, AXIS: tl.constexpr):
    """The largest of some entries, but not too small; NaN if one of `entries` is not finite."""
    # Anything times 0 is 0, but infinity and NaN, which a maximum may pass over.
    return tl.maximum(largest, MIN_ENTRY) + tl.sum(entries * 0.0, AXIS)


@triton.jit
def to_integers(x, largest):
    """8-bit integers of numbers of up to `largest`, as `reference.to_integers`."""
    numerator = x * (LARGEST_INTEGER / 128.0)
    denominator = largest * (1.0 / 128.0)
    reciprocal = tl.math.div_rn(1.0, denominator)
    x = numerator * reciprocal
    # What the product lacks to the quotient: halves, of which bfloat16 has many, are then exact.
    x = tl.fma(tl.fma(-x, denominator, numerator), reciprocal, x)
    x = tl.minimum(tl.maximum(x, -LARGEST_INTEGER), LARGEST_INTEGER)
    return ((x + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit
def keys_kernel(
    x_ptr, means_ptr, largest_ptr, out_ptr, stride_b, stride_h, stride_n, heads, rows, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Integers of `ROWS` rows of keys of one head."""
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    x_head = x_ptr + head // heads * stride_b + head % heads * stride_h
    x = tl.load(x_head + row * stride_n + dims[None, :], mask=row < rows, other=0.0).to(tl.float32)
    mean = tl.load(means_ptr + head * HEAD_DIM + dims)
    integers = to_integers(x - mean[None, :], tl.load(largest_ptr + head))
    tl.store(out_ptr + (head * rows + row) * HEAD_DIM + dims[None, :], integers, mask=row < rows)


@triton.jit
def queries_kernel(
    q_ptr, key_largest_ptr, out_ptr, factors_ptr, stride_b, stride_h, stride_n, heads, tokens, scale,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Integers of `ROWS` queries of one head, and the factors of their products."""
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = token < tokens
    q_head = q_ptr + head // heads * stride_b + head % heads * stride_h
    q = tl.load(q_head + token[:, None] * stride_n + dims[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    largest = checked(tl.max(tl.abs(q), 1), q, 1)
    place = head * tokens + token
    integers = to_integers(q, largest[:, None])
    tl.store(out_ptr + place[:, None] * HEAD_DIM + dims[None, :], integers, mask=real[:, None])
    factor = largest * (1.0 / LARGEST_INTEGER) * (tl.load(key_largest_ptr + head) * (1.0 / LARGEST_INTEGER) * scale)
    # Not a maximum, which might drop a NaN.
    tl.store(factors_ptr + place, tl.where(factor < MIN_FACTOR, MIN_FACTOR, factor), mask=real)

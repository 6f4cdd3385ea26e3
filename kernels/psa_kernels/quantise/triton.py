"""Queries and keys in 8-bit integers, in Triton: one pass for what keys are quantised by, one that quantises.

Each pass turns rows into other channels anew, by products with a matrix: that takes tensor cores less time than memory
takes to write and read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl

from psa_kernels.blocks import block_count
from psa_kernels.layout import TokenLayout
from psa_kernels.pyramid.pooled import TritonPyramid
from psa_kernels.quantise import reference
from psa_kernels.quantise.integers import Integers
from psa_kernels.quantise.triton_channels import channel_matrices
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape
from psa_kernels.triton_rows import key_head

LARGEST_INTEGER = tl.constexpr(float(reference.LARGEST_INTEGER))
MIN_ENTRY = tl.constexpr(reference.MIN_ENTRY)
# Factors of rows are divided by where tiles are mixed. Below this all logits are 0.
MIN_FACTOR = tl.constexpr(2.0**-100)
# Added to what is much smaller it rounds that to an integer, whose last bits are then those of the sum.
ROUNDER = tl.constexpr(1.5 * 2.0**23)
# Rows of which one program finds sums, smallest and largest entries, and of which it makes integers: for fewer it would
# read more of the matrix than of them.
CHUNK = 1024
RUN = 256
# Rows at a time, for tensor cores; and chunks at a time.
ROWS = 64
FEW_CHUNKS = 16


def quantise_rows(
    q: torch.Tensor, pyramid: TritonPyramid, layout: TokenLayout, spec: AttentionSpec, scale: float
) -> Integers:
    """The queries `[B, Nq, Hq, D]`, and the keys of the text and of every level, in 8-bit integers.

    Args:
        pyramid: of the keys, perhaps without values yet; `gathered` where tokens are permuted.
        scale: factor on the dot products, positive.
    """
    keys = pyramid.key_rows(layout, spec)
    matrices = channel_matrices(q, pyramid.source_keys)
    return quantise(q, keys, [rows for rows in keys[:3] if rows is not None], matrices, scale)


def quantised_rows(layout: TokenLayout, spec: AttentionSpec, group: int = 1) -> int:
    """Rows of head_dim bytes that `quantise_rows` makes of a head of the keys and of `group` heads that read it."""
    levels = sum(block_count(layout.video_keys, factor) for factor in spec.levels)
    return group * layout.video_queries + levels + (1 + group) * (layout.text_before + layout.text_after)


def quantise_as_read(
    q: torch.Tensor, pyramid: TritonPyramid, layout: TokenLayout, spec: AttentionSpec, scale: float
) -> Integers:
    """The same for the portable kernel: keys of all tokens in the order of the model, and of the pyramid's means.

    Args:
        pyramid: of the keys, perhaps without values yet; not `gathered`.
        scale: factor on the dot products, positive.
    """
    tokens = pyramid.source_keys.transpose(1, 2)
    finest = [tokens]
    if spec.levels[0] > 1:
        finest = [rows for rows in pyramid.key_rows(layout, spec)[:3] if rows is not None]
    means = pyramid.keys if pyramid.keys.shape[2] else None
    return quantise(q, [tokens, means], finest, channel_matrices(q, pyramid.source_keys), scale)


def rows_as_read(query_tokens: int, key_tokens: int, means: int, group: int = 1) -> int:
    """Rows of head_dim bytes that `quantise_as_read` makes of a head of the keys and of `group` heads that read it."""
    return group * query_tokens + key_tokens + means


def quantise(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor | None],
    finest: Sequence[torch.Tensor],
    matrices: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> Integers:
    """Quantise queries and keys as `quantise.reference` says.

    Args:
        q: `[B, Nq, Hq, D]`, its last stride 1 and D a power of two.
        keys: tensors `[B, Hkv, rows, D]` whose last stride is 1: keys, or means of keys.
        finest: those of them that hold the finest level and the text.
        matrices: what `channel_matrices` returned.
        scale: factor on the dot products, positive.
    """
    of_queries, of_keys = matrices
    means, rotated_means, largest = key_means_and_largest(finest, of_queries, of_keys)
    integers = [None if rows is None else quantise_keys(rows, of_keys, rotated_means, largest) for rows in keys]
    queries, factors = quantise_queries(q, of_queries, largest, scale)
    return Integers(queries, integers, factors, means)


def key_means_and_largest(
    finest: Sequence[torch.Tensor], of_queries: torch.Tensor, of_keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What keys `[B, H, rows, D]` are quantised by, in float32.

    Returns:
        Mean rows `[B, H, D]`; these in the new channels, D times those of the reference, as the matrix of keys is; and
        the largest entries there less these, `[B, H]`, D times as large too.
    """
    batch, heads, _, head_dim = finest[0].shape
    chunks = [block_count(rows.shape[2], CHUNK) for rows in finest]
    device = finest[0].device
    empty = partial(torch.empty, dtype=torch.float32, device=device)
    parts = empty(batch * heads, 3, sum(chunks), head_dim)
    for index, rows in enumerate(finest):
        first = sum(chunks[:index])
        _statistics(rows.shape, rows.stride(), rows.dtype, device, sum(chunks), first, CHUNK)(rows, of_keys, parts)
    means, rotated_means, largest = empty(batch, heads, head_dim), empty(batch, heads, head_dim), empty(batch, heads)
    count = sum(rows.shape[2] for rows in finest)
    _summary(batch * heads, head_dim, of_queries.dtype, device, sum(chunks), count)(
        parts, of_queries, means, rotated_means, largest
    )
    return means, rotated_means, largest


@lru_cache(maxsize=KEPT_LAUNCHES)
def _statistics(
    shape: Shape,
    strides: Shape,
    dtype: torch.dtype,
    device: torch.device,
    chunks: int,
    first_chunk: int,
    chunk: int,
) -> Launch:
    batch, heads, rows, head_dim = shape
    return Launch(
        statistics_kernel, (block_count(rows, chunk), batch * heads),
        (*strides[:3], heads, rows, chunks, first_chunk),
        HEAD_DIM=head_dim, CHUNK=chunk, ROWS=ROWS, num_warps=8,
    )  # fmt: skip


@lru_cache(maxsize=KEPT_LAUNCHES)
def _summary(heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, chunks: int, rows: int) -> Launch:
    return Launch(summary_kernel, (heads,), (chunks, rows), HEAD_DIM=head_dim, CHUNKS=FEW_CHUNKS, num_warps=4)


def quantise_keys(
    rows: torch.Tensor, of_keys: torch.Tensor, rotated_means: torch.Tensor, largest: torch.Tensor
) -> torch.Tensor:
    """Integers of keys `[B, H, rows, D]`, by what `key_means_and_largest` found: int8, contiguous."""
    integers = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    launch = _of_keys(rows.shape, rows.stride(), rows.dtype, rows.device, RUN)
    launch(rows, of_keys, rotated_means, largest, integers)
    return integers


@lru_cache(maxsize=KEPT_LAUNCHES)
def _of_keys(shape: Shape, strides: Shape, dtype: torch.dtype, device: torch.device, run: int) -> Launch:
    batch, heads, rows, head_dim = shape
    return Launch(
        keys_kernel, (block_count(rows, run), batch * heads), (*strides[:3], heads, rows),
        HEAD_DIM=head_dim, RUN=run, ROWS=ROWS, num_warps=4, num_stages=2,
    )  # fmt: skip


def quantise_queries(
    q: torch.Tensor, of_queries: torch.Tensor, key_largest: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers of queries `[B, Nq, Hq, D]`, int8 in their shape, and the factors of `Integers`.

    Args:
        of_queries: `[B, Hkv, D, D]`.
        key_largest: `[B, Hkv]`.
    """
    batch, tokens, heads, head_dim = q.shape
    integers = torch.empty(batch, heads, tokens, head_dim, dtype=torch.int8, device=q.device)
    factors = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    launch = _of_queries(q.shape, q.stride(), q.dtype, q.device, of_queries.shape[1], scale, RUN)
    launch(q, of_queries, key_largest, integers, factors)
    return integers.transpose(1, 2), factors


@lru_cache(maxsize=KEPT_LAUNCHES)
def _of_queries(
    shape: Shape,
    strides: Shape,
    dtype: torch.dtype,
    device: torch.device,
    key_heads: int,
    scale: float,
    run: int,
) -> Launch:
    batch, tokens, heads, head_dim = shape
    stride_b, stride_n, stride_h = strides[:3]
    return Launch(
        queries_kernel, (block_count(tokens, run), batch * heads),
        (stride_b, stride_h, stride_n, heads, tokens, scale * math.log2(math.e) / head_dim),
        HEAD_DIM=head_dim, RUN=run, ROWS=ROWS, GROUP=heads // key_heads, num_warps=4, num_stages=2,
    )  # fmt: skip


@triton.jit
def statistics_kernel(
    x_ptr, matrix_ptr, partial_ptr, stride_b, stride_h, stride_n, heads, rows, chunks, first_chunk,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums, smallest and largest entries of each new channel over `CHUNK` rows of one head."""
    head = tl.program_id(1).to(tl.int64)
    x_head = x_ptr + head // heads * stride_b + head % heads * stride_h
    dims = tl.arange(0, HEAD_DIM)
    matrix = matrix_of(matrix_ptr, head, HEAD_DIM)
    # Tensor cores leave two rows of every 16 in the same thread, which may as well keep one number for both.
    GROUPS: tl.constexpr = ROWS // 16
    sums = tl.zeros([GROUPS, 8, HEAD_DIM], tl.float32)
    smallest = tl.full([GROUPS, 8, HEAD_DIM], float("inf"), tl.float32)
    largest = tl.full([GROUPS, 8, HEAD_DIM], -float("inf"), tl.float32)
    start = tl.program_id(0) * CHUNK
    for first in tl.range(start, tl.minimum(start + CHUNK, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        real = row[:, None] < rows
        x = tl.load(x_head + row.to(tl.int64)[:, None] * stride_n + dims[None, :], mask=real, other=0.0)
        x = tl.dot(x, matrix, input_precision="ieee")
        low, high = tl.where(real, x, float("inf")), tl.where(real, x, -float("inf"))
        sums += tl.sum(tl.reshape(x, [GROUPS, 2, 8, HEAD_DIM]), 1)
        smallest = tl.minimum(smallest, tl.min(tl.reshape(low, [GROUPS, 2, 8, HEAD_DIM]), 1))
        largest = tl.maximum(largest, tl.max(tl.reshape(high, [GROUPS, 2, 8, HEAD_DIM]), 1))
    out = partial_ptr + (head * 3 * chunks + first_chunk + tl.program_id(0)) * HEAD_DIM + dims
    tl.store(out, tl.sum(tl.sum(sums, 0), 0))
    tl.store(out + chunks * HEAD_DIM, tl.min(tl.min(smallest, 0), 0))
    tl.store(out + 2 * chunks * HEAD_DIM, tl.max(tl.max(largest, 0), 0))


@triton.jit
def summary_kernel(
    partial_ptr, matrix_ptr, means_ptr, rotated_means_ptr, largest_ptr, chunks, rows, HEAD_DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Mean of one head's keys and the largest entry less it, from what the chunks of its rows gave."""
    head = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    partial = partial_ptr + head * 3 * chunks * HEAD_DIM
    sums = tl.zeros([CHUNKS, HEAD_DIM], tl.float32)
    smallest = tl.full([CHUNKS, HEAD_DIM], float("inf"), tl.float32)
    largest = tl.full([CHUNKS, HEAD_DIM], -float("inf"), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        real = chunk[:, None] < chunks
        place = partial + chunk[:, None] * HEAD_DIM + dims[None, :]
        sums += tl.load(place, mask=real, other=0.0)
        place += chunks * HEAD_DIM
        smallest = tl.minimum(smallest, tl.load(place, mask=real, other=float("inf")))
        place += chunks * HEAD_DIM
        largest = tl.maximum(largest, tl.load(place, mask=real, other=-float("inf")))
    rotated_mean = tl.sum(sums, 0) / rows
    entry = tl.max(tl.maximum(tl.max(largest, 0) - rotated_mean, rotated_mean - tl.min(smallest, 0)), 0)
    tl.store(rotated_means_ptr + head * HEAD_DIM + dims, rotated_mean)
    tl.store(largest_ptr + head, checked(entry, rotated_mean, 0))
    # The matrix of the queries undoes that of the keys.
    matrix = matrix_of(matrix_ptr, head, HEAD_DIM).to(tl.float32)
    tl.store(means_ptr + head * HEAD_DIM + dims, tl.sum(matrix * rotated_mean[None, :], 1) * (1.0 / HEAD_DIM))


@triton.jit
def matrix_of(matrix_ptr, head, HEAD_DIM: tl.constexpr):
    """The matrix of one head, `[HEAD_DIM, HEAD_DIM]`."""
    dims = tl.arange(0, HEAD_DIM)
    return tl.load(matrix_ptr + (head * HEAD_DIM + dims[:, None]) * HEAD_DIM + dims[None, :])


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
    return (x + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def keys_kernel(
    x_ptr, matrix_ptr, rotated_means_ptr, largest_ptr, out_ptr, stride_b, stride_h, stride_n, heads, rows,
    HEAD_DIM: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Integers of `RUN` rows of keys of one head."""
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    x_head = x_ptr + head // heads * stride_b + head % heads * stride_h
    matrix = matrix_of(matrix_ptr, head, HEAD_DIM)
    mean = tl.load(rotated_means_ptr + head * HEAD_DIM + dims)
    largest = tl.load(largest_ptr + head)
    start = tl.program_id(0) * RUN
    for first in tl.range(start, tl.minimum(start + RUN, rows), ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        x = tl.load(x_head + row * stride_n + dims[None, :], mask=row < rows, other=0.0)
        integers = to_integers(tl.dot(x, matrix, input_precision="ieee") - mean[None, :], largest)
        tl.store(out_ptr + (head * rows + row) * HEAD_DIM + dims[None, :], integers, mask=row < rows)


@triton.jit
def queries_kernel(
    q_ptr, matrix_ptr, key_largest_ptr, out_ptr, factors_ptr, stride_b, stride_h, stride_n, heads, tokens, scale,
    HEAD_DIM: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Integers of `RUN` queries of one head, and the factors of their products."""
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    q_head = q_ptr + head // heads * stride_b + head % heads * stride_h
    matrix = matrix_of(matrix_ptr, key_head(head, GROUP), HEAD_DIM)
    of_keys = tl.load(key_largest_ptr + key_head(head, GROUP)) * (1.0 / LARGEST_INTEGER) * scale
    start = tl.program_id(0) * RUN
    for first in tl.range(start, tl.minimum(start + RUN, tokens), ROWS):
        token = (first + tl.arange(0, ROWS)).to(tl.int64)
        real = token < tokens
        q = tl.load(q_head + token[:, None] * stride_n + dims[None, :], mask=real[:, None], other=0.0)
        q = tl.dot(q, matrix, input_precision="ieee")
        largest = checked(tl.max(tl.abs(q), 1), q, 1)
        place = head * tokens + token
        integers = to_integers(q, largest[:, None])
        tl.store(out_ptr + place[:, None] * HEAD_DIM + dims[None, :], integers, mask=real[:, None])
        factor = largest * (1.0 / LARGEST_INTEGER) * of_keys
        # Not a maximum, which might drop a NaN.
        tl.store(factors_ptr + place, tl.where(factor < MIN_FACTOR, MIN_FACTOR, factor), mask=real)

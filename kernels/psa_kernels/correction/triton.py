"""The corrections of `reference.py` in one pass over memory each.

A program takes each row by its halves: byte j of a row holds an integer of either, so that bytes and outputs are read
and written as they lie.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from psa_kernels.blocks import block_count
from psa_kernels.correction import reference
from psa_kernels.correction.reference import Correction
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape
from psa_kernels.triton_rows import are_wide, padded_dim, row_offsets

SMALLEST_INTEGER = tl.constexpr(float(reference.SMALLEST_INTEGER))
UNIT = tl.constexpr(1 / reference.SMALLEST_INTEGER)  # of a row whose largest difference is 1
LARGEST_INTEGER = tl.constexpr(float(reference.LARGEST_INTEGER))
ZERO = tl.constexpr(float(reference.ZERO))
# Added to what is much smaller it rounds that to an integer, ties to even, as PyTorch does.
ROUNDER = tl.constexpr(1.5 * 2.0**23)
# Tokens of one head that a program looks at.
ROWS = 32
# Channels of either half that a thread takes: 16 bytes of an output in 16 bits. With more of them what is to be written
# goes through shared memory first.
CHANNELS = 8


def left_out(dense: torch.Tensor, sparse: torch.Tensor) -> Correction:
    """As `reference.left_out`."""
    *rows, head_dim = dense.shape
    pairs = torch.empty((*rows, reference.bytes_a_row(head_dim)), dtype=torch.uint8, device=dense.device)
    units = torch.empty(rows, dtype=torch.float32, device=dense.device)
    _plan(left_out_kernel, dense.shape, dense.dtype, dense.device, (dense.stride(), sparse.stride()))(
        dense, sparse, pairs, units
    )
    return Correction(pairs, units, head_dim)


def add_correction(out: torch.Tensor, correction: Correction, weights: torch.Tensor) -> None:
    """As `reference.add_correction`."""
    _plan(add_kernel, out.shape, out.dtype, out.device, (out.stride(),))(
        out, correction.pairs, correction.units, weights.contiguous()
    )


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(kernel: object, shape: Shape, dtype: torch.dtype, device: torch.device, strides: tuple[Shape, ...]) -> Launch:
    """A kernel for tensors of one shape, dtype and device."""
    batch, tokens, heads, head_dim = shape
    half = reference.bytes_a_row(head_dim)
    padded_half = padded_dim(half)
    return Launch(
        kernel, (block_count(tokens, ROWS), heads, batch),
        (tokens, heads, *(step for each in strides for step in each[:3])),
        HEAD_DIM=head_dim, HALF=half, PADDED_HALF=padded_half, ROWS=ROWS, num_warps=warps_of(padded_half),
        WIDE=are_wide(*((shape, each) for each in strides), ((batch, tokens, heads, half), (0, heads * half, 0, 0))),
    )  # fmt: skip


def warps_of(padded_half: int) -> int:
    """Warps of a program."""
    return max(1, ROWS * padded_half // CHANNELS // 32)


@triton.jit
def left_out_kernel(
    dense_ptr, sparse_ptr, pairs_ptr, units_ptr, tokens, heads, stride_db, stride_dn, stride_dh, stride_sb, stride_sn,
    stride_sh, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """`ROWS` tokens of one head: the grid is token tiles, heads, batch."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, PADDED_HALF)
    real = (token < tokens)[:, None] & (dims < HALF)[None, :]
    real_upper = (token < tokens)[:, None] & (dims < HEAD_DIM - HALF)[None, :]
    dense = dense_ptr + batch * stride_db + head * stride_dh + row_offsets(token, stride_dn, WIDE)
    sparse = sparse_ptr + batch * stride_sb + head * stride_sh + row_offsets(token, stride_sn, WIDE)
    lower = difference(dense, sparse, dims, real)
    upper = difference(dense + HALF, sparse + HALF, dims, real_upper)
    largest = tl.maximum(tl.max(lower, 1), tl.max(upper, 1))
    smallest = tl.minimum(tl.min(lower, 1), tl.min(upper, 1))
    # A maximum may pass over what is not a number, a sum does not.
    finite = tl.sum(lower * 0.0 + upper * 0.0, 1) == 0.0
    units = tl.where(finite, UNIT * tl.where(largest >= -smallest, largest, smallest), 0.0)
    pairs = stored(lower, units) | (stored(upper, units) << 4)
    row = batch * tokens * heads + row_offsets(token, heads, WIDE) + head
    tl.store(pairs_ptr + (row * HALF)[:, None] + dims[None, :], pairs, mask=real)
    tl.store(units_ptr + row, units, mask=token < tokens)


@triton.jit
def difference(dense_rows, sparse_rows, dims, real):
    """Some channels of rows that begin at the pointers given, float32; zeros where `real` is false."""
    dense = tl.load(dense_rows[:, None] + dims[None, :], mask=real, other=0.0).to(tl.float32)
    sparse = tl.load(sparse_rows[:, None] + dims[None, :], mask=real, other=0.0).to(tl.float32)
    return dense - sparse


@triton.jit
def stored(differences, units):
    """The integer of each difference, as it is kept: uint8, plus `ZERO`; `ZERO` in rows whose unit is 0."""
    # Rounded as IEEE 754 says, as PyTorch divides, so that integers are equal to those of the reference.
    quotients = tl.div_rn(differences, tl.where(units != 0.0, units, 1.0)[:, None] + tl.zeros_like(differences))
    integers = tl.where((units != 0.0)[:, None], (quotients + ROUNDER) - ROUNDER, 0.0)
    clipped = tl.minimum(tl.maximum(integers, SMALLEST_INTEGER), LARGEST_INTEGER)
    return (clipped + ZERO).to(tl.uint8)


@triton.jit
def add_kernel(
    out_ptr, pairs_ptr, units_ptr, weights_ptr, tokens, heads, stride_ob, stride_on, stride_oh,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`ROWS` tokens of one head: the grid is token tiles, heads, batch."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, PADDED_HALF)
    real = (token < tokens)[:, None] & (dims < HALF)[None, :]
    real_upper = (token < tokens)[:, None] & (dims < HEAD_DIM - HALF)[None, :]
    row = batch * tokens * heads + row_offsets(token, heads, WIDE) + head
    units = tl.load(units_ptr + row, mask=token < tokens, other=0.0) * tl.load(weights_ptr + batch * heads + head)
    pairs = tl.load(pairs_ptr + (row * HALF)[:, None] + dims[None, :], mask=real, other=0)
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + row_offsets(token, stride_on, WIDE)
    lower_at, upper_at = out_rows[:, None] + dims[None, :], (out_rows + HALF)[:, None] + dims[None, :]
    lower = tl.load(lower_at, mask=real, other=0.0).to(tl.float32)
    upper = tl.load(upper_at, mask=real_upper, other=0.0).to(tl.float32)
    lower += ((pairs & 15).to(tl.float32) - ZERO) * units[:, None]
    upper += ((pairs >> 4).to(tl.float32) - ZERO) * units[:, None]
    tl.store(lower_at, lower.to(out_ptr.dtype.element_ty), mask=real)
    tl.store(upper_at, upper.to(out_ptr.dtype.element_ty), mask=real_upper)

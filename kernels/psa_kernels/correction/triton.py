"""The corrections of `reference.py` in one pass over memory each."""

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

LARGEST_INTEGER = tl.constexpr(float(reference.LARGEST_INTEGER))
# Added to what is much smaller it rounds that to an integer, ties to even, as PyTorch does.
ROUNDER = tl.constexpr(1.5 * 2.0**23)
# Tokens of one head that a program looks at.
ROWS = 32


def left_out(dense: torch.Tensor, sparse: torch.Tensor) -> Correction:
    """As `reference.left_out`."""
    integers = torch.empty(dense.shape, dtype=torch.int8, device=dense.device)
    units = torch.empty(dense.shape[:3], dtype=torch.float32, device=dense.device)
    _plan(left_out_kernel, dense.shape, dense.dtype, dense.device, (dense.stride(), sparse.stride()))(
        dense, sparse, integers, units
    )
    return Correction(integers, units)


def add_correction(out: torch.Tensor, correction: Correction, weights: torch.Tensor) -> None:
    """As `reference.add_correction`."""
    _plan(add_kernel, out.shape, out.dtype, out.device, (out.stride(),))(
        out, correction.integers, correction.units, weights.contiguous()
    )


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(kernel: object, shape: Shape, dtype: torch.dtype, device: torch.device, strides: tuple[Shape, ...]) -> Launch:
    """A kernel for tensors of one shape, dtype and device."""
    batch, tokens, heads, head_dim = shape
    return Launch(
        kernel, (block_count(tokens, ROWS), heads, batch),
        (tokens, heads, *(step for each in strides for step in each[:3])),
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim(head_dim), ROWS=ROWS,
        WIDE=are_wide(*((shape, each) for each in strides), (shape, (0, heads * head_dim, 0, 0))),
    )  # fmt: skip


@triton.jit
def left_out_kernel(
    dense_ptr, sparse_ptr, integers_ptr, units_ptr, tokens, heads, stride_db, stride_dn, stride_dh, stride_sb,
    stride_sn, stride_sh, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`ROWS` tokens of one head: the grid is token tiles, heads, batch."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    real = (token < tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    dense_rows = dense_ptr + batch * stride_db + head * stride_dh + row_offsets(token, stride_dn, WIDE)
    sparse_rows = sparse_ptr + batch * stride_sb + head * stride_sh + row_offsets(token, stride_sn, WIDE)
    dense = tl.load(dense_rows[:, None] + dims[None, :], mask=real, other=0.0).to(tl.float32)
    sparse = tl.load(sparse_rows[:, None] + dims[None, :], mask=real, other=0.0).to(tl.float32)
    difference = dense - sparse
    # A maximum may pass over what is not a number, a sum does not.
    finite = tl.sum(difference * 0.0, 1) == 0.0
    units = tl.where(finite, tl.max(tl.abs(difference), 1) / LARGEST_INTEGER, 0.0)
    integers = tl.where((units > 0.0)[:, None], difference / tl.where(units > 0.0, units, 1.0)[:, None], 0.0)
    integers = (integers + ROUNDER) - ROUNDER
    row = batch * tokens * heads + row_offsets(token, heads, WIDE) + head
    tl.store(integers_ptr + (row * HEAD_DIM)[:, None] + dims[None, :], integers.to(tl.int8), mask=real)
    tl.store(units_ptr + row, units, mask=token < tokens)


@triton.jit
def add_kernel(
    out_ptr, integers_ptr, units_ptr, weights_ptr, tokens, heads, stride_ob, stride_on, stride_oh,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`ROWS` tokens of one head: the grid is token tiles, heads, batch."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    real = (token < tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    row = batch * tokens * heads + row_offsets(token, heads, WIDE) + head
    units = tl.load(units_ptr + row, mask=token < tokens, other=0.0) * tl.load(weights_ptr + batch * heads + head)
    integers = tl.load(integers_ptr + (row * HEAD_DIM)[:, None] + dims[None, :], mask=real, other=0)
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + row_offsets(token, stride_on, WIDE)
    out = tl.load(out_rows[:, None] + dims[None, :], mask=real, other=0.0).to(tl.float32)
    out += integers.to(tl.float32) * units[:, None]
    tl.store(out_rows[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=real)

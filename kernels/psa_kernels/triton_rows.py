"""How the Triton kernels read rows, tokens of one head, from strided `[B, N, H, D]` tensors."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from psa_kernels.blocks import next_power_of_2


def padded_dim(head_dim: int) -> int:
    """Width of a row in registers: a power of two, and no less than a tensor-core instruction takes."""
    return max(16, next_power_of_2(head_dim))


def are_wide(*tensors: tuple[Sequence[int], Sequence[int]]) -> bool:
    """Whether an offset along the tokens of one head passes 2^31 elements in tensors of these shapes and strides.

    Args:
        tensors: shape and strides of each, `[B, N, H, D]`.
    """
    return any((shape[1] - 1) * strides[1] + shape[3] > 2**31 for shape, strides in tensors)


def must_be_told(element_size: int, *steps: int) -> bool:
    """Whether the compiler has to be told that rows at these distances start at multiples of 16 bytes, and they do.

    From Triton 3.8 on it no longer sees it of pointers that `tl.where` chose, and would read each number by itself.

    Args:
        element_size: bytes of a number.
        steps: distances of rows, heads and batch items, in elements. The first row is at a multiple, too.
    """
    sees = triton.__version__.startswith(("3.6.", "3.7."))
    return not sees and all(step * element_size % 16 == 0 for step in steps)


@triton.jit
def key_head(query_head, GROUP: tl.constexpr):
    """The head of the keys that a head of the queries reads, where `GROUP` share one: of one batch item, or of all."""
    if GROUP == 1:
        return query_head
    else:
        return query_head // GROUP


@triton.jit
def row_offsets(rows, stride, WIDE: tl.constexpr):
    """Element offsets of rows, in 64 bits where 32 do not suffice."""
    if WIDE:
        rows = rows.to(tl.int64)
    return rows * stride


@triton.jit
def video_tokens(positions, permutation, text_before, real, PERMUTED: tl.constexpr):
    """Tokens at some positions of the order in which blocks are formed.

    Args:
        real: None, or a mask of the positions that exist.
    """
    if PERMUTED:
        if real is None:
            positions = tl.load(permutation + positions)
        else:
            positions = tl.load(permutation + positions, mask=real, other=0)
    return positions + text_before


@triton.jit
def load_rows(pointers, dims, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Rows `[n, PADDED_DIM]` that start at `n` pointers, filled up with zeros past `HEAD_DIM`."""
    if HEAD_DIM == PADDED_DIM:
        rows = tl.load(pointers[:, None] + dims[None, :])
    else:
        rows = tl.load(pointers[:, None] + dims[None, :], mask=dims[None, :] < HEAD_DIM, other=0.0)
    return rows


@triton.jit
def load_real_rows(pointers, dims, real, HEAD_DIM: tl.constexpr):
    """Rows as `load_rows`, zeros where `real` is false."""
    return tl.load(pointers[:, None] + dims[None, :], mask=real[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)

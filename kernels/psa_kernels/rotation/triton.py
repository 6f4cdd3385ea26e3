"""The rotation of `reference.py` in one pass over memory."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from psa_kernels.blocks import block_count
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape
from psa_kernels.triton_rows import are_wide, padded_dim, row_offsets

# Channels that a program turns at a time, those of one head of some tokens, and how many of them a thread takes.
CHANNELS, CHANNELS_A_THREAD = 2048, 16
# Heads that a program turns one after the other, by cosines and sines that it reads once.
HEADS = 8
# What an address has to be a multiple of, in bytes, for a launch that costs the host little.
ALIGNMENT = 16


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, before: int = 0, after: int = 0) -> torch.Tensor:
    """As `reference.rotate`, for channels that lie side by side."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (cos, cos_first), (sin, sin_first) = _aligned(cos), _aligned(sin)
    launch = _plan(
        x.shape, x.stride(), cos.shape, cos.stride(), sin.shape, sin.stride(), cos_first, sin_first, before, after,
        x.dtype, x.device,
    )  # fmt: skip
    launch(x, cos, sin, out)
    return out


def _aligned(table: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A table as one that starts at an aligned address, and how many numbers after that it starts itself."""
    first = table.data_ptr() % ALIGNMENT // table.element_size()
    offset = table.storage_offset() - first
    if first == 0 or offset < 0:
        return table, 0
    return table.as_strided(table.shape, table.stride(), offset), first


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    shape: Shape, strides: Shape, cos_shape: Shape, cos_strides: Shape, sin_shape: Shape, sin_strides: Shape,
    cos_first: int, sin_first: int, before: int, after: int, dtype: torch.dtype, device: torch.device,
) -> Launch:  # fmt: skip
    """The kernel for tensors of one shape, dtype and device."""
    turned = (shape[0], shape[1] - before - after, *shape[2:-1], shape[-1] // 2)
    cos_steps, sin_steps = _steps(cos_shape, cos_strides, turned), _steps(sin_shape, sin_strides, turned)
    if len(shape) == 3:
        shape, strides = (*shape[:2], 1, shape[2]), (*strides[:2], 0, strides[2])
    batch, tokens, heads, head_dim = shape
    tile = tile_tokens(head_dim)
    reach = [((*shape[:3], head_dim // 2 * steps[3]), steps) for steps in (cos_steps, sin_steps)]
    return Launch(
        rotate_kernel, (block_count(tokens, tile) * block_count(heads, HEADS), batch),
        (tokens, heads, before, tokens - after, *strides[:3], *cos_steps[:3], *sin_steps[:3]),
        COS_FIRST=cos_first, SIN_FIRST=sin_first, COS_STEP=cos_steps[3], SIN_STEP=sin_steps[3], HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim), TOKENS=tile, HEADS=HEADS, BY_HEAD=bool(cos_steps[2] or sin_steps[2]),
        num_warps=warps_of(head_dim),
        WIDE=are_wide((shape, strides), (shape, (0, heads * head_dim, 0, 0)), *reach),
    )  # fmt: skip


def _steps(shape: Shape, strides: Shape, turned: Shape) -> Shape:
    """Strides of a table along `[B, N, H, D / 2]`, 0 where it broadcasts against what is turned.

    Raises:
        ValueError: it does not broadcast.
    """
    absent = len(turned) - len(shape)
    if absent < 0 or any(size not in (1, whole) for size, whole in zip(shape, turned[absent:], strict=True)):
        raise ValueError(f"a table of the shape {tuple(shape)} does not broadcast against pairs of channels {turned}")
    steps = [0] * absent + [0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
    # What has three dimensions has one head.
    return tuple(steps) if len(steps) == 4 else (*steps[:2], 0, steps[2])


def tile_tokens(head_dim: int) -> int:
    """Tokens that a program turns."""
    return max(1, CHANNELS // padded_dim(head_dim))


def warps_of(head_dim: int) -> int:
    """Warps of a program."""
    return min(32, tile_tokens(head_dim) * padded_dim(head_dim) // CHANNELS_A_THREAD // 32)


@triton.jit
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, tokens, heads, before, end, stride_xb, stride_xn, stride_xh, stride_cb, stride_cn,
    stride_ch, stride_sb, stride_sn, stride_sh, COS_FIRST: tl.constexpr, SIN_FIRST: tl.constexpr,
    COS_STEP: tl.constexpr, SIN_STEP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BY_HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`HEADS` heads of `TOKENS` tokens: the grid is token tiles, each for all groups of heads in turn, and batch.

    Args:
        end: the first of the last tokens that are left as they are.
        COS_FIRST, SIN_FIRST: where the tables start after their addresses.
        BY_HEAD: whether heads have tables of their own.
    """
    groups = tl.cdiv(heads, HEADS)
    # Neighbouring programs read the same tables, which the cache then still holds.
    tile, first = tl.program_id(0) // groups, tl.program_id(0) % groups * HEADS
    batch, far = tl.program_id(1).to(tl.int64), first.to(tl.int64)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    dims, pairs = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_DIM // 2)
    turned = (token >= before) & (token < end)
    real = (token < tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    real_pairs = turned[:, None] & (pairs < HEAD_DIM // 2)[None, :]
    x_rows = x_ptr + batch * stride_xb + far * stride_xh + row_offsets(token, stride_xn, WIDE)
    out_rows = out_ptr + (batch * tokens * heads + far) * HEAD_DIM + row_offsets(token, heads * HEAD_DIM, WIDE)
    x_at, out_at = x_rows[:, None] + dims[None, :], out_rows[:, None] + dims[None, :]
    cos_rows = cos_ptr + COS_FIRST + batch * stride_cb + far * stride_ch + row_offsets(token - before, stride_cn, WIDE)
    sin_rows = sin_ptr + SIN_FIRST + batch * stride_sb + far * stride_sh + row_offsets(token - before, stride_sn, WIDE)
    cos_at = cos_rows[:, None] + row_offsets(pairs, COS_STEP, WIDE)[None, :]
    sin_at = sin_rows[:, None] + row_offsets(pairs, SIN_STEP, WIDE)[None, :]
    if not BY_HEAD:
        cos = tl.load(cos_at, mask=real_pairs, other=0.0)
        sin = tl.load(sin_at, mask=real_pairs, other=0.0)
    for _ in range(first, tl.minimum(first + HEADS, heads)):
        if BY_HEAD:
            cos = tl.load(cos_at, mask=real_pairs, other=0.0)
            sin = tl.load(sin_at, mask=real_pairs, other=0.0)
            cos_at += stride_ch
            sin_at += stride_sh
        x = tl.load(x_at, mask=real, other=0.0)
        even, odd = tl.split(tl.reshape(x.to(tl.float32), (TOKENS, PADDED_DIM // 2, 2)))
        both = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        rotated = tl.reshape(both, (TOKENS, PADDED_DIM)).to(x.dtype)
        tl.store(out_at, tl.where(turned[:, None], rotated, x), mask=real)
        x_at += stride_xh
        out_at += HEAD_DIM

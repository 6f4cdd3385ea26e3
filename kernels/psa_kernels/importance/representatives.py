"""Representatives of queries and keys, side by side in memory in the order in which the importance kernel holds them.

The kernel reduces the scores of neighbours. In the registers of a GPU neighbouring columns of a matrix product belong
to four threads in turn, so a reduction over neighbours would cost exchanges between threads. Any order of the rows and
columns is as good to a matrix product, and here one is made in which those to be reduced lie in one thread.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from psa_kernels.blocks import block_count
from psa_kernels.known_calls import recall
from psa_kernels.layout import TokenLayout
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape
from psa_kernels.triton_rows import are_wide, load_real_rows, padded_dim, row_offsets, video_tokens

# Representatives that one program makes.
CHUNK = 32


@triton.constexpr_function
def column_dims(tile_n, columns):
    """Sizes that the columns of a tile of `tile_n` keys, `columns` a block, unfold to, slowest first.

    In the accumulator of a tensor core thread t of every four has columns 8 j + 2 t + e for all j and for e = 0, 1
    (elsewhere the order costs a little and is right all the same). The sizes, and what they count, are: samples of one
    block in j; blocks in j; blocks in t; samples in t, if there are fewer than four blocks; blocks in e, if they
    have one sample each; samples in e.
    """
    blocks = tile_n // columns
    threads, pair = min(4, blocks), min(2, columns)
    blocks_in_j = blocks * pair // (2 * threads)
    return tile_n // 8 // blocks_in_j, blocks_in_j, threads, 4 // threads, 2 // pair, pair


@triton.constexpr_function
def row_dims(tile_m, warps):
    """Sizes that the rows of a tile unfold to, slowest first: one thread has all along the first and the third."""
    return max(1, tile_m // (16 * warps)), min(warps, tile_m // 16), 2, 8


# The same dimensions from the slowest to the fastest in the natural order, in which neighbours are neighbours.
NATURAL_COLUMNS = (2, 1, 4, 0, 3, 5)
NATURAL_ROWS = (1, 3, 0, 2)


def in_tiles(
    x: torch.Tensor, layout: TokenLayout, stride: int, pooled: bool, dims: tuple[int, ...], natural: tuple[int, ...],
    known: dict[Any, Any] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Copy representatives of all heads into tiles.

    Args:
        x: `[B, N, H, D]`, queries or keys.
        stride: one of every so many video tokens is copied, or the mean of them if `pooled`.
        dims: what the rows of a tile unfold to.
        natural: these dimensions in natural order.
        known: None, or the answers of calls like this one, as in `Call`.

    Returns:
        `[B * H, tiles, rows of a tile, padded_dim(D)]` in the dtype of x, zeros past the last.
    """
    permutation = layout.short_permutation
    # The order tells queries from keys.
    shape, launch = recall(known, ("tiles", natural), lambda: _tiling(
        x.shape, x.stride(), x.dtype, x.device, layout.text_before, layout.text_after, permutation is not None, stride,
        pooled, dims, natural,
    ))  # fmt: skip
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    launch(x, out, permutation)
    return out


@lru_cache(maxsize=KEPT_LAUNCHES)
def _tiling(
    shape: Shape, strides: Shape, dtype: torch.dtype, device: torch.device, text_before: int, text_after: int,
    permuted: bool, stride: int, pooled: bool, dims: Shape, natural: Shape,
) -> tuple[Shape, Launch]:  # fmt: skip
    """Shape of the tiles, and what fills them."""
    steps = [1] * len(dims)
    for i in reversed(range(len(dims) - 1)):
        steps[i] = steps[i + 1] * dims[i + 1]
    tile = steps[0] * dims[0]
    batch, tokens, heads, head_dim = shape
    video = tokens - text_before - text_after
    tiles = block_count(block_count(video, stride), tile)
    width = padded_dim(head_dim)
    return (batch * heads, tiles, tile, width), Launch(
        tile_kernel, (batch * heads, tiles * tile // CHUNK), (*strides[:3], stride, text_before, video, heads),
        HEAD_DIM=head_dim, PADDED_DIM=width, COUNT=stride if pooled else 1, TILE=tile,
        SIZES=tuple(dims[i] for i in reversed(natural)), STRIDES=tuple(steps[i] for i in reversed(natural)),
        PERMUTED=permuted, WIDE=are_wide((shape, strides)), CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip


# Inside a kernel, `min` stands for an operation on tensors.
@triton.constexpr_function
def smaller(a, b):
    return min(a, b)


@triton.jit
def reorder(n, SIZES: tl.constexpr, STRIDES: tl.constexpr):
    """Write numbers in the mixed radix `SIZES`, fastest digit first, and add up the digits times `STRIDES`."""
    found = n * 0
    for i in tl.static_range(len(SIZES)):
        found += n % SIZES[i] * STRIDES[i]
        n = n // SIZES[i]
    return found


@triton.jit
def tile_kernel(
    x_ptr, out_ptr, permutation, stride_b, stride_n, stride_h, step, text_before, tokens, heads,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, SIZES: tl.constexpr,
    STRIDES: tl.constexpr, PERMUTED: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`CHUNK` representatives of one head: number i is the mean of `COUNT` tokens from position `step * i` on."""
    # Heads run fastest: those of one token are neighbours in memory.
    head_index = tl.program_id(0).to(tl.int64)
    head = x_ptr + head_index // heads * stride_b + head_index % heads * stride_h
    dims = tl.arange(0, PADDED_DIM)
    sample = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK, PADDED_DIM], tl.float32)
    UNROLLED: tl.constexpr = smaller(COUNT, 8)
    for start in range(0, COUNT, UNROLLED):
        for i in tl.static_range(UNROLLED):
            position = sample * step + start + i
            real = position < tokens
            row = video_tokens(position, permutation, text_before, real, PERMUTED)
            total += load_real_rows(head + row_offsets(row, stride_n, WIDE), dims, real, HEAD_DIM).to(tl.float32)
    if COUNT > 1:
        left = tokens - sample * step
        total *= (1.0 / tl.maximum(tl.minimum(left, COUNT), 1).to(tl.float32))[:, None]
    place = sample // TILE * TILE + reorder(sample % TILE, SIZES, STRIDES)
    rows = head_index * (tl.num_programs(1) * CHUNK) + place
    tl.store(out_ptr + rows[:, None] * PADDED_DIM + dims[None, :], total.to(out_ptr.dtype.element_ty))

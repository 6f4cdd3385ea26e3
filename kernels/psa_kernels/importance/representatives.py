"""Representatives of queries and keys, side by side in memory in the order in which the importance kernel holds them.

The kernel reduces the scores of neighbours. In the registers of a GPU neighbouring columns of a matrix product belong
to four threads in turn, so a reduction over neighbours would cost exchanges between threads. Any order of the rows and
columns is as good to a matrix product, and here one is made in which those to be reduced lie in one thread.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

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


class Unfolded(NamedTuple):
    """How representatives of one head are laid out.

    Attributes:
        shape: `(batch * heads, tiles, rows of a tile, padded_dim(D))`.
        tile: rows of a tile.
        sizes, strides: the dimensions that these rows unfold to, in natural order, fastest first.
    """

    shape: Shape
    tile: int
    sizes: Shape
    strides: Shape

    @property
    def chunks(self) -> int:
        """Programs that each head takes."""
        return self.shape[1] * self.tile // CHUNK


def unfolded(shape: Shape, video: int, stride: int, dims: Shape, natural: Shape) -> Unfolded:
    """The layout of one of every `stride` of `video` tokens of tensors `[B, N, H, D]`; as for `in_tiles`."""
    steps = [1] * len(dims)
    for i in reversed(range(len(dims) - 1)):
        steps[i] = steps[i + 1] * dims[i + 1]
    tile = steps[0] * dims[0]
    tiles = block_count(block_count(video, stride), tile)
    batch, _, heads, head_dim = shape
    order = natural[::-1]
    sizes, strides = tuple(dims[i] for i in order), tuple(steps[i] for i in order)
    return Unfolded((batch * heads, tiles, tile, padded_dim(head_dim)), tile, sizes, strides)


@lru_cache(maxsize=KEPT_LAUNCHES)
def _tiling(
    shape: Shape, strides: Shape, dtype: torch.dtype, device: torch.device, text_before: int, text_after: int,
    permuted: bool, stride: int, pooled: bool, dims: Shape, natural: Shape,
) -> tuple[Shape, Launch]:  # fmt: skip
    """Shape of the tiles, and what fills them."""
    batch, tokens, heads, head_dim = shape
    video = tokens - text_before - text_after
    out = unfolded(shape, video, stride, dims, natural)
    return out.shape, Launch(
        tile_kernel, (batch * heads, out.chunks), (*strides[:3], stride, text_before, video, heads),
        HEAD_DIM=head_dim, PADDED_DIM=out.shape[3], COUNT=stride if pooled else 1, TILE=out.tile, SIZES=out.sizes,
        STRIDES=out.strides, PERMUTED=permuted, WIDE=are_wide((shape, strides)), CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip


@lru_cache(maxsize=KEPT_LAUNCHES)
def tiling_of_both(
    shapes: tuple[Shape, Shape], strides: tuple[Shape, Shape], dtype: torch.dtype, device: torch.device,
    text_before: int, text_after: int, permuted: bool, steps: tuple[int, int], pooled: bool, rows: Shape,
    columns: Shape,
) -> tuple[Shape, Shape, Launch]:  # fmt: skip
    """Shapes of the tiles of queries and of keys, and what fills both.

    Args:
        shapes, strides: of queries and of keys, `[B, N, H, D]`.
        steps: one of every so many video queries, and video keys, is copied, or the mean of them if `pooled`.
        rows, columns: what a tile of queries, and one of keys, unfolds to.
    """
    (batch, _, query_heads, head_dim), (_, _, key_heads, _) = shapes
    video = tuple(shape[1] - text_before - text_after for shape in shapes)
    queries = unfolded(shapes[0], video[0], steps[0], rows, NATURAL_ROWS)
    keys = unfolded(shapes[1], video[1], steps[1], columns, NATURAL_COLUMNS)
    programs = queries.shape[0] * queries.chunks + keys.shape[0] * keys.chunks
    return queries.shape, keys.shape, Launch(
        tiles_kernel, (programs,),
        (*strides[0][:3], *strides[1][:3], *steps, text_before, *video, query_heads, key_heads, batch, queries.chunks,
         keys.chunks),
        HEAD_DIM=head_dim, PADDED_DIM=queries.shape[3], QUERY_COUNT=steps[0] if pooled else 1,
        KEY_COUNT=steps[1] if pooled else 1, QUERY_TILE=queries.tile, KEY_TILE=keys.tile, QUERY_SIZES=queries.sizes,
        KEY_SIZES=keys.sizes, QUERY_STRIDES=queries.strides, KEY_STRIDES=keys.strides, PERMUTED=permuted,
        WIDE=are_wide(*zip(shapes, strides, strict=True)), CHUNK=CHUNK, num_warps=4,
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
    """`CHUNK` representatives of one head of queries or of keys."""
    # Heads run fastest: those of one token are neighbours in memory.
    copy_chunk(
        x_ptr, out_ptr, permutation, tl.program_id(0), tl.program_id(1), tl.num_programs(1), stride_b, stride_n,
        stride_h, step, text_before, tokens, heads, HEAD_DIM, PADDED_DIM, COUNT, TILE, SIZES, STRIDES, PERMUTED, WIDE,
        CHUNK,
    )  # fmt: skip


@triton.jit
def tiles_kernel(
    q_ptr, k_ptr, queries_ptr, keys_ptr, permutation, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    query_step, key_step, text_before, query_tokens, key_tokens, query_heads, key_heads, batch, query_chunks,
    key_chunks, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, QUERY_COUNT: tl.constexpr, KEY_COUNT: tl.constexpr,
    QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr, QUERY_SIZES: tl.constexpr, KEY_SIZES: tl.constexpr,
    QUERY_STRIDES: tl.constexpr, KEY_STRIDES: tl.constexpr, PERMUTED: tl.constexpr, WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """`CHUNK` representatives of one head: of queries in the first programs, of keys in the others."""
    program = tl.program_id(0)
    of_queries = batch * query_heads * query_chunks
    if program < of_queries:
        copy_chunk(
            q_ptr, queries_ptr, permutation, program % (batch * query_heads), program // (batch * query_heads),
            query_chunks, stride_qb, stride_qn, stride_qh, query_step, text_before, query_tokens, query_heads, HEAD_DIM,
            PADDED_DIM, QUERY_COUNT, QUERY_TILE, QUERY_SIZES, QUERY_STRIDES, PERMUTED, WIDE, CHUNK,
        )  # fmt: skip
    else:
        program -= of_queries
        copy_chunk(
            k_ptr, keys_ptr, permutation, program % (batch * key_heads), program // (batch * key_heads), key_chunks,
            stride_kb, stride_kn, stride_kh, key_step, text_before, key_tokens, key_heads, HEAD_DIM, PADDED_DIM,
            KEY_COUNT, KEY_TILE, KEY_SIZES, KEY_STRIDES, PERMUTED, WIDE, CHUNK,
        )  # fmt: skip


@triton.jit
def copy_chunk(
    x_ptr, out_ptr, permutation, head_index, chunk, chunks, stride_b, stride_n, stride_h, step, text_before, tokens,
    heads, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
    SIZES: tl.constexpr, STRIDES: tl.constexpr, PERMUTED: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
    lead=None,
):  # fmt: skip
    """`CHUNK` representatives of one head: number i is the mean of `COUNT` tokens from position `step * i` on.

    Args:
        tokens: position up to which there are tokens.
        lead: None, or the position from which on there are. Number i then is of those that it has of its `step`.
    """
    head_index = head_index.to(tl.int64)
    head = x_ptr + head_index // heads * stride_b + head_index % heads * stride_h
    dims = tl.arange(0, PADDED_DIM)
    sample = chunk * CHUNK + tl.arange(0, CHUNK)
    first, last = sample * step, tokens
    if lead is not None:
        first, last = tl.maximum(first, lead), tl.minimum(first + step, tokens)
    total = tl.zeros([CHUNK, PADDED_DIM], tl.float32)
    UNROLLED: tl.constexpr = smaller(COUNT, 8)
    for start in range(0, COUNT, UNROLLED):
        for i in tl.static_range(UNROLLED):
            position = first + start + i
            real = position < last
            row = video_tokens(position, permutation, text_before, real, PERMUTED)
            total += load_real_rows(head + row_offsets(row, stride_n, WIDE), dims, real, HEAD_DIM).to(tl.float32)
    if COUNT > 1:
        left = last - first if lead is not None else tl.minimum(last - first, COUNT)
        total *= (1.0 / tl.maximum(left, 1).to(tl.float32))[:, None]
    place = sample // TILE * TILE + reorder(sample % TILE, SIZES, STRIDES)
    rows = head_index * (chunks * CHUNK) + place
    tl.store(out_ptr + rows[:, None] * PADDED_DIM + dims[None, :], total.to(out_ptr.dtype.element_ty))

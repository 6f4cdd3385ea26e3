"""What the kernels of causal calls need of queries, whose first row of blocks may begin before the first of them."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from psa_kernels.allocation.prices import energy_stride
from psa_kernels.allocation.triton_statistics import UNROLLED, ScaledRows, blocks_at_once, empty_rows, store_scaled
from psa_kernels.blocks import block_count
from psa_kernels.causal.layout import CausalLayout
from psa_kernels.importance.representatives import CHUNK, NATURAL_ROWS, copy_chunk, smaller, unfolded
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape
from psa_kernels.triton_rows import are_wide, load_real_rows, padded_dim, row_offsets


def query_tiles(q: torch.Tensor, causal: CausalLayout, stride: int, pooled: bool, dims: Shape) -> torch.Tensor:
    """Copy representatives of the video queries into tiles, as `representatives.in_tiles` does.

    Group i has the tokens from `i * stride` on, counted from the begin of the first row. Where the call begins inside a
    group, its first query represents it, or the mean of those that it has.

    Args:
        q: `[B, Nq, H, D]`.
        dims: what the rows of a tile unfold to.

    Returns:
        `[B * H, tiles, rows of a tile, padded_dim(D)]` in the dtype of q, zeros where there is no representative.
    """
    shape, launch = _tiling(q.shape, q.stride(), q.device, causal, stride, pooled, dims)
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    launch(q, out)
    return out


@lru_cache(maxsize=KEPT_LAUNCHES)
def _tiling(
    shape: Shape, strides: Shape, device: torch.device, causal: CausalLayout, stride: int, pooled: bool, dims: Shape
) -> tuple[Shape, Launch]:
    """Shape of the tiles, and what fills them."""
    end = causal.lead + causal.video_queries
    out = unfolded(shape, end, stride, dims, NATURAL_ROWS)
    _, _, heads, head_dim = shape
    return out.shape, Launch(
        tile_kernel, (out.shape[0], out.chunks),
        (*strides[:3], stride, causal.lead, end, causal.query_shift, heads),
        HEAD_DIM=head_dim, PADDED_DIM=out.shape[3], COUNT=stride if pooled else 1, TILE=out.tile, SIZES=out.sizes,
        STRIDES=out.strides, WIDE=are_wide((shape, strides)), CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip


def query_energy(q: torch.Tensor, causal: CausalLayout, spec: AttentionSpec, scale: float) -> ScaledRows:
    """Mean square of `scale` times the queries, per channel, of each row of blocks: `[B, H, rows, D]`.

    Only those are read that tell it: the first query of every `energy_stride` tokens.
    """
    rows = len(causal.rows)
    energy = empty_rows(q, (), rows)
    launch = _energy(q.shape, q.stride(), q.device, causal, spec.block_query, energy_stride(spec), scale)
    launch(q, energy.fractions, energy.tops)
    return energy


@lru_cache(maxsize=KEPT_LAUNCHES)
def _energy(
    shape: Shape, strides: Shape, device: torch.device, causal: CausalLayout, block: int, stride: int, scale: float
) -> Launch:
    batch, _, heads, head_dim = shape
    padded = padded_dim(head_dim)
    rows, at_once = len(causal.rows), blocks_at_once(padded)
    return Launch(
        energy_kernel, (batch * heads, block_count(rows, at_once)),
        (*strides[:3], heads, causal.lead, causal.lead + causal.video_queries, causal.query_shift, rows, scale * scale),
        HEAD_DIM=head_dim, PADDED_DIM=padded, ROWS=at_once, WIDE=are_wide((shape, strides)), BLOCK=block, STRIDE=stride,
        num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["step", "lead", "end", "shift", "heads"])
def tile_kernel(
    x_ptr, out_ptr, stride_b, stride_n, stride_h, step, lead, end, shift, heads, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, SIZES: tl.constexpr, STRIDES: tl.constexpr,
    WIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`CHUNK` representatives of one head: number i is the mean of `COUNT` tokens from position `step * i` on.

    Args:
        lead, end: positions from which on and up to which there are queries.
        shift: what has to be added to a position to name a query.
    """
    copy_chunk(
        x_ptr, out_ptr, None, tl.program_id(0), tl.program_id(1), tl.num_programs(1), stride_b, stride_n, stride_h,
        step, shift, end, heads, HEAD_DIM, PADDED_DIM, COUNT, TILE, SIZES, STRIDES, False, WIDE, CHUNK, lead,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "lead", "end", "shift", "rows"])
def energy_kernel(
    x_ptr, fractions_ptr, tops_ptr, stride_b, stride_n, stride_h, heads, lead, end, shift, rows, factor,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):  # fmt: skip
    """`factor` times the mean square, per channel, of one of `STRIDE` queries of each of `ROWS` rows of one head."""
    head_index = tl.program_id(0).to(tl.int64)
    head = x_ptr + head_index // heads * stride_b + head_index % heads * stride_h
    dims = tl.arange(0, PADDED_DIM)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    PARTS: tl.constexpr = smaller(BLOCK // STRIDE, UNROLLED)
    for start in range(0, BLOCK, PARTS * STRIDE):
        for part in tl.static_range(PARTS):
            group = row * BLOCK + start + part * STRIDE
            position = tl.maximum(group, lead)
            real = position < tl.minimum(group + STRIDE, end)
            tokens = head + row_offsets(position + shift, stride_n, WIDE)
            x = load_real_rows(tokens, dims, real, HEAD_DIM).to(tl.float32)
            total += x * x
    # Groups with a query.
    count = tl.cdiv(tl.minimum(row * BLOCK + BLOCK, end), STRIDE) - tl.maximum(row * BLOCK, lead) // STRIDE
    mean = total * (factor / tl.maximum(count, 1).to(tl.float32))[:, None]
    store_scaled(fractions_ptr, tops_ptr, None, head_index * rows + row, mean, dims, row < rows, PADDED_DIM)

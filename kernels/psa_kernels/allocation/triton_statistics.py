"""What the rule `budget` has to know of every block of queries, keys and values, in Triton: each token is read once.

Rows that only products read are stored as float16 fractions of their largest entry, which is kept beside them: 11 bits
of every entry that matters, whatever its magnitude, at half the traffic of float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from psa_kernels.allocation.prices import energy_stride
from psa_kernels.allocation.triton_groups import UNROLLED, group_squares, load_tokens, real_tokens
from psa_kernels.allocation.triton_lists import smaller
from psa_kernels.blocks import block_count
from psa_kernels.layout import TokenLayout
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape
from psa_kernels.triton_rows import are_wide, padded_dim


@dataclass(frozen=True)
class ScaledRows:
    """Rows as fractions of their largest entries.

    Attributes:
        fractions: float16 `[..., rows, padded_dim(D)]`, zeros past D.
        tops: float32 `[..., rows]`.
        squares: None, or float32 `[..., rows]`: sums of the squares of the rows, such as rounding left them.
    """

    fractions: torch.Tensor
    tops: torch.Tensor
    squares: torch.Tensor | None = None


def query_energy(q: torch.Tensor, layout: TokenLayout, spec: AttentionSpec, scale: float) -> ScaledRows:
    """Mean square of `scale` times the queries, per channel, of each query block: `[B, H, query blocks, D]`.

    Only those are read that tell it, one of `energy_stride`.

    Args:
        q: `[B, Nq, H, D]`, all queries, in the order of the model.
    """
    blocks = block_count(layout.video_queries, spec.block_query)
    constants = (("BLOCK", spec.block_query), ("STRIDE", energy_stride(spec)))
    energy = empty_rows(q, (), blocks)
    launch = _prepared(
        energy_kernel, q.shape, q.stride(), q.dtype, q.device, layout.text_before, layout.video_queries,
        layout.permutation is not None, blocks, (scale * scale,), constants,
    )  # fmt: skip
    launch(q, layout.short_permutation, energy.fractions, energy.tops)
    return energy


def key_spread(
    k: torch.Tensor,
    layout: TokenLayout,
    spec: AttentionSpec,
    means: torch.Tensor | None = None,
    factors: tuple[int, ...] = (),
) -> ScaledRows:
    """Variance inside groups of keys, per channel, mean over each block: `[pooled_factors, B, H, key blocks, D]`.

    Args:
        k: `[B, Nk, H, D]`, all keys, in the order of the model.
        means: None, or `[B, H, rows, D]` in the dtype of k, the keys of a pyramid with these `factors`, which is filled
            in the same pass: with what the pyramid's own kernel would write, bit for bit. Then `spec` has to
            `pools_alike`. What is returned differs by rounding at most.
    """
    blocks = block_count(layout.video_keys, spec.block_key)
    spread = empty_rows(k, (len(pooled_factors(spec)),), blocks)
    launch = _of_keys(k, layout, spec, blocks, False, factors)
    launch(k, means if factors else None, layout.short_permutation, spread.fractions, spread.tops, None, None, None)
    return spread


def pools_alike(spec: AttentionSpec) -> bool:
    """Whether groups are joined here in the order in which the pyramid's kernel joins them."""
    return all(factor <= UNROLLED.value for factor in pooled_factors(spec))


def value_spread(
    v: torch.Tensor,
    layout: TokenLayout,
    spec: AttentionSpec,
    means: torch.Tensor | None = None,
    factors: tuple[int, ...] = (),
) -> tuple[ScaledRows, torch.Tensor]:
    """The mean value of each block, `[B, H, key blocks, D]`, and what its values vary by inside groups.

    Args:
        v: `[B, Nk, H, D]`, all values, in the order of the model.
        means, factors: as in `key_spread`, the values of a pyramid.

    Returns:
        The means; and, summed over the channels and a mean over each block, the variance inside groups: float32
        `[pooled_factors, B, H, key blocks]`.
    """
    blocks = block_count(layout.video_keys, spec.block_key)
    centres = empty_rows(v, (), blocks, squares=True)
    spread = torch.empty(len(pooled_factors(spec)), *centres.tops.shape, device=v.device)
    launch = _of_keys(v, layout, spec, blocks, True, factors)
    launch(
        v, means if factors else None, layout.short_permutation, None, spread, centres.fractions, centres.tops,
        centres.squares,
    )  # fmt: skip
    return centres, spread


def pooled_factors(spec: AttentionSpec) -> tuple[int, ...]:
    """Group sizes whose means some level, or `rest`, puts in the place of tokens."""
    return tuple(factor for factor in spec.factors if factor > 1)


@lru_cache(maxsize=KEPT_LAUNCHES)
def tree(spec: AttentionSpec) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Nested group sizes up to the whole block, among them those whose loads are written out; which ones are wanted."""
    pooled = pooled_factors(spec)
    factors = tuple(sorted({*pooled, UNROLLED.value, spec.block_key}))
    return ("FACTORS", factors), ("WANTED", tuple(factors.index(factor) for factor in pooled))


def empty_rows(x: torch.Tensor, leading: tuple[int, ...], blocks: int, squares: bool = False) -> ScaledRows:
    """Uninitialized rows for `blocks` blocks of each head of `[B, N, H, D]`."""
    batch, _, heads, head_dim = x.shape
    rows = (*leading, batch, heads, blocks)
    fractions = torch.empty(*rows, padded_dim(head_dim), dtype=torch.float16, device=x.device)
    tops = torch.empty(rows, device=x.device)
    return ScaledRows(fractions, tops, torch.empty_like(tops) if squares else None)


def _of_keys(
    x: torch.Tensor, layout: TokenLayout, spec: AttentionSpec, blocks: int, values: bool, held: tuple[int, ...]
) -> Launch:
    """What finds variances of keys or values `[B, Nk, H, D]`, and the means of groups of the sizes `held`."""
    rows = sum(block_count(layout.video_keys, factor) for factor in held)
    # Lists do not depend on whether a pyramid is filled on the way.
    constants = (*tree(spec), ("VALUES", values), ("HELD", held), ("SUMS", pools_alike(spec)))
    return _prepared(
        spread_kernel, x.shape, x.stride(), x.dtype, x.device, layout.text_before, layout.video_keys,
        layout.permutation is not None, blocks, (rows,), constants,
    )  # fmt: skip


@lru_cache(maxsize=KEPT_LAUNCHES)
def _prepared(
    kernel: triton.JITFunction, shape: Shape, strides: Shape, dtype: torch.dtype, device: torch.device,
    text_before: int, video: int, permuted: bool, blocks: int, numbers: tuple[float, ...],
    constants: tuple[tuple[str, Any], ...],
) -> Launch:  # fmt: skip
    """One program for every few blocks of a head; heads run fastest: those of one token are neighbours in memory."""
    batch, _, heads, head_dim = shape
    padded = padded_dim(head_dim)
    rows = blocks_at_once(padded)
    return Launch(
        kernel, (batch * heads, block_count(blocks, rows)),
        (*strides[:3], heads, video, text_before, blocks, *numbers),
        HEAD_DIM=head_dim, PADDED_DIM=padded, ROWS=rows, PERMUTED=permuted, WIDE=are_wide((shape, strides)),
        num_warps=4, **dict(constants),
    )  # fmt: skip


def blocks_at_once(padded: int) -> int:
    """Blocks of a program of four warps: each thread then has eight channels of one of them."""
    return max(1, 1024 // padded)


@triton.jit
def energy_kernel(
    x_ptr, permutation, fractions_ptr, tops_ptr, stride_b, stride_n, stride_h, heads, video, text_before, blocks,
    factor, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, PERMUTED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """`factor` times the mean square, per channel, of one of `STRIDE` tokens of each of `ROWS` blocks of one head."""
    head_index = tl.program_id(0).to(tl.int64)
    head = x_ptr + head_index // heads * stride_b + head_index % heads * stride_h
    dims = tl.arange(0, PADDED_DIM)
    block = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    PARTS: tl.constexpr = smaller(BLOCK // STRIDE, UNROLLED)
    for start in range(0, BLOCK, PARTS * STRIDE):
        for part in tl.static_range(PARTS):
            position = block * BLOCK + start + part * STRIDE
            x = load_tokens(
                head, permutation, position, dims, stride_n, video, text_before, HEAD_DIM, PADDED_DIM, PERMUTED, WIDE,
                True,
            )  # fmt: skip
            total += x * x
    read = tl.cdiv(tl.maximum(tl.minimum(video - block * BLOCK, BLOCK), 1), STRIDE)
    mean = total * (factor / read.to(tl.float32))[:, None]
    row = head_index * blocks + block
    store_scaled(fractions_ptr, tops_ptr, None, row, mean, dims, block < blocks, PADDED_DIM)


@triton.jit
def spread_kernel(
    x_ptr, means_ptr, permutation, fractions_ptr, spread_ptr, centres_ptr, centre_tops_ptr, centre_squares_ptr,
    stride_b, stride_n, stride_h, heads, video, text_before, blocks, means_rows, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, PERMUTED: tl.constexpr, WIDE: tl.constexpr, FACTORS: tl.constexpr,
    WANTED: tl.constexpr, VALUES: tl.constexpr, HELD: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Variances inside groups of `ROWS` blocks of one head; of values their sums over channels, and the means.

    Args:
        means_ptr: means of groups of the sizes `HELD`, one size after the other; `means_rows` of them a head.
    """
    head_index = tl.program_id(0).to(tl.int64)
    head = x_ptr + head_index // heads * stride_b + head_index % heads * stride_h
    means = means_ptr
    if len(HELD) > 0:
        means += head_index * means_rows * HEAD_DIM
    dims = tl.arange(0, PADDED_DIM)
    block = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    BLOCK: tl.constexpr = FACTORS[len(FACTORS) - 1]
    real = block < blocks
    row = head_index * blocks + block
    # Only the last blocks of a head have groups that are not whole.
    if (tl.program_id(1) + 1) * ROWS * BLOCK <= video:
        mean, squares = group_squares(
            head, means, permutation, block * BLOCK, dims, stride_n, video, text_before, len(FACTORS) - 1, HEAD_DIM,
            PADDED_DIM, FACTORS, HELD, SUMS, PERMUTED, WIDE, False,
        )  # fmt: skip
    else:
        mean, squares = group_squares(
            head, means, permutation, block * BLOCK, dims, stride_n, video, text_before, len(FACTORS) - 1, HEAD_DIM,
            PADDED_DIM, FACTORS, HELD, SUMS, PERMUTED, WIDE, True,
        )  # fmt: skip
    size = real_tokens(block * BLOCK, BLOCK, video)
    for index in tl.static_range(len(WANTED)):
        variance = squares[WANTED[index]] / size[:, None]
        place = tl.num_programs(0).to(tl.int64) * index * blocks + row
        if VALUES:
            tl.store(spread_ptr + place, tl.sum(variance, 1), mask=real)
        else:
            store_scaled(fractions_ptr, spread_ptr, None, place, variance, dims, real, PADDED_DIM)
    if VALUES:
        if SUMS:
            mean = mean / size[:, None]
        store_scaled(centres_ptr, centre_tops_ptr, centre_squares_ptr, row, mean, dims, real, PADDED_DIM)


@triton.jit
def store_scaled(fractions_ptr, tops_ptr, squares_ptr, row, x, dims, real, PADDED_DIM: tl.constexpr):
    """Store rows `[n, PADDED_DIM]` as `ScaledRows`."""
    top = tl.max(tl.abs(x), 1)
    fractions = (x / tl.where(top > 0, top, 1)[:, None]).to(tl.float16)
    tl.store(fractions_ptr + row[:, None] * PADDED_DIM + dims[None, :], fractions, mask=real[:, None])
    tl.store(tops_ptr + row, top, mask=real)
    if squares_ptr is not None:
        rounded = fractions.to(tl.float32) * top[:, None]
        tl.store(squares_ptr + row, tl.sum(rounded * rounded, 1), mask=real)

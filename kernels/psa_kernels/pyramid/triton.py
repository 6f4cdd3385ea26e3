"""The pyramid of keys and values in Triton: one pass that pools at all levels at once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from psa_kernels.blocks import block_count
from psa_kernels.known_calls import recall
from psa_kernels.layout import TokenLayout
from psa_kernels.pyramid.pooled import TritonPyramid
from psa_kernels.pyramid.similarity import coarsest_level
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape
from psa_kernels.triton_rows import are_wide, load_real_rows, padded_dim, row_offsets, video_tokens


def build_pyramid(
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    spec: AttentionSpec,
    similarity: bool = False,
    gathered: bool = False,
) -> TritonPyramid:
    """Pool keys and values `[B, N, H, D]` inside their blocks.

    Args:
        similarity, gathered: as in `pool_keys`.
    """
    return add_values(pool_keys(k, layout, spec, similarity, gathered), v, layout)


def pool_keys(
    k: torch.Tensor,
    layout: TokenLayout,
    spec: AttentionSpec,
    similarity: bool = False,
    gathered: bool = False,
    v: torch.Tensor | None = None,
    known: dict[Any, Any] | None = None,
) -> TritonPyramid:
    """The pyramid of keys `[B, N, H, D]`.

    Args:
        similarity: find the coarsest levels in the same pass, where the spec asks for a cap.
        gathered: hold single tokens too where the layout permutes them, in the order of the blocks.
        v: None, or the values, to be pooled in the same pass; `add_values` has nothing left to do then.
        known: None, or the answers of calls like this one, as in `Call`.
    """
    factors = recall(known, ("held factors", gathered), lambda: held_factors(layout, spec, gathered))
    cap = spec if similarity else None
    if v is not None and factors:
        keys, coarsest, values = pool_both(k, v, layout, factors, cap, known)
        return TritonPyramid(k, keys, factors, coarsest, v, values)
    keys, coarsest = pool_tokens(k, layout, factors, cap, known)
    return TritonPyramid(k, keys, factors, coarsest)


def empty_pyramid(
    k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, spec: AttentionSpec, gathered: bool = False
) -> TritonPyramid:
    """The pyramid of keys and values `[B, N, H, D]` without a cap, uninitialized: for kernels that read them anyway."""
    batch, _, heads, head_dim = k.shape
    rows = pyramid_rows(layout, spec, gathered)
    keys, values = (torch.empty(batch, heads, rows, head_dim, dtype=k.dtype, device=k.device) for _ in range(2))
    return TritonPyramid(k, keys, held_factors(layout, spec, gathered), None, v, values)


def add_values(pyramid: TritonPyramid, v: torch.Tensor, layout: TokenLayout) -> TritonPyramid:
    """The same pyramid with values `[B, N, H, D]` too."""
    if pyramid.values is not None:
        return pyramid
    values = pool_tokens(v, layout, pyramid.factors)[0]
    return TritonPyramid(pyramid.source_keys, pyramid.keys, pyramid.factors, pyramid.coarsest, v, values)


def pyramid_rows(layout: TokenLayout, spec: AttentionSpec, gathered: bool = False) -> int:
    """Rows that the pyramid of the keys of one head has; that of the values has as many."""
    return sum(block_count(layout.video_keys, factor) for factor in held_factors(layout, spec, gathered))


def coarsest_levels(k: torch.Tensor, layout: TokenLayout, spec: AttentionSpec) -> torch.Tensor | None:
    """Index of the coarsest level each key block may have: int32 `[B, H, key blocks]`, None without a cap."""
    return pool_tokens(k, layout, (), spec)[1]


def held_factors(layout: TokenLayout, spec: AttentionSpec, gathered: bool) -> tuple[int, ...]:
    """Pooling factors of the pyramid's levels, one after the other; single tokens need no level, unless `gathered`."""
    finest = 1 if gathered and layout.permutation is not None else 2
    return tuple(factor for factor in spec.factors if factor >= finest)


def pool_tokens(
    x: torch.Tensor, layout: TokenLayout, factors: tuple[int, ...], similarity: AttentionSpec | None = None,
    known: dict[Any, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Means over groups of neighbouring video tokens, for several group sizes at once.

    Args:
        x: `[B, N, H, D]`; queries or keys and values, of which the layout has equally many where they are permuted.
        factors: group sizes, powers of two, none decreasing.
        similarity: None, or the spec whose cap to find.
        known: None, or the answers of calls like this one, as in `Call`, if x are its keys.

    Returns:
        `[B, H, sum of groups, D]` in the dtype of x; and int32 `[B, H, key blocks]` or None.
    """
    means, coarsest, _ = _pooled(x, None, layout, factors, similarity, known)
    return means, coarsest


def pool_both(
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    factors: tuple[int, ...],
    similarity: AttentionSpec | None = None,
    known: dict[Any, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What `pool_tokens` returns of keys `[B, N, H, D]`, and the means of values of their shape, in one launch."""
    keys, coarsest, values = _pooled(k, v, layout, factors, similarity, known)
    assert values is not None
    return keys, coarsest, values


def prepare_both(
    k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, factors: tuple[int, ...]
) -> tuple[Shape, Launch | None]:
    """What `pool_both` without a cap launches for tensors like these, whose entries are not read.

    Returns:
        The shape of the means of keys, which those of values have too; and the launch, of keys, their means, None,
        values, their means, and the permutation in 32 bits. It is None without factors: there is nothing to pool.
    """
    (shape, _), launch = _pooling(
        k.shape, k.stride(), k.dtype, k.device, layout.text_before, layout.text_after, layout.permutation is not None,
        factors, None, v.stride(),
    )  # fmt: skip
    return shape, launch


def _pooled(
    x: torch.Tensor, v: torch.Tensor | None, layout: TokenLayout, factors: tuple[int, ...],
    similarity: AttentionSpec | None, known: dict[Any, Any] | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    cap = similarity if similarity is not None and similarity.similarity is not None else None
    permutation = layout.short_permutation
    key = "pooling", factors, cap is None, v is None
    shapes, launch = recall(known, key, lambda: _pooling(
        x.shape, x.stride(), x.dtype, x.device, layout.text_before, layout.text_after, permutation is not None, factors,
        cap, None if v is None else v.stride(),
    ))  # fmt: skip
    means = torch.empty(shapes[0], dtype=x.dtype, device=x.device)
    value_means = None if v is None else torch.empty(shapes[0], dtype=x.dtype, device=x.device)
    coarsest = None if cap is None else torch.empty(shapes[1], dtype=torch.int32, device=x.device)
    if launch is not None:
        launch(x, means, coarsest, v, value_means, permutation)
    return means, coarsest, value_means


@lru_cache(maxsize=KEPT_LAUNCHES)
def _pooling(
    shape: Shape, strides: Shape, dtype: torch.dtype, device: torch.device, text_before: int, text_after: int,
    permuted: bool, factors: tuple[int, ...], cap: AttentionSpec | None, of_values: Shape | None,
) -> tuple[tuple[Shape, Shape], Launch | None]:  # fmt: skip
    """Shapes of the means and of the coarsest levels, and what fills them; None where there is nothing to fill."""
    batch, tokens, heads, head_dim = shape
    video = tokens - text_before - text_after
    rows = sum(block_count(video, factor) for factor in factors)
    block_key = 1 if cap is None else cap.block_key
    shapes = (batch, heads, rows, head_dim), (batch, heads, block_count(video, block_key))
    if not factors and cap is None:
        return shapes, None
    # A program holds whole blocks, and enough groups to give 16 bytes of a token to each of its threads.
    largest = factors[-1] if factors else 1
    groups = max(16 if largest <= 16 else 8, block_key // largest)
    return shapes, Launch(
        pool_kernel, (block_count(video, groups * largest), batch * heads, 1 if of_values is None else 2),
        (*strides[:3], *(of_values or strides)[:3], heads, video, text_before, rows),
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim(head_dim), FACTORS=factors, GROUPS=groups, CAP=cap is not None,
        BLOCK_KEY=block_key, LEVELS=() if cap is None else cap.levels,
        THRESHOLDS=() if cap is None or cap.similarity is None else cap.similarity, PERMUTED=permuted,
        WIDE=are_wide((shape, strides), (shape, of_values or strides)), VALUES=of_values is not None, num_warps=4,
    )  # fmt: skip


@triton.jit
def pool_kernel(
    x_ptr, means_ptr, coarsest_ptr, v_ptr, value_means_ptr, permutation, stride_b, stride_n, stride_h, stride_vb,
    stride_vn, stride_vh, heads, video_tokens_count, text_before, rows, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, FACTORS: tl.constexpr, GROUPS: tl.constexpr,
    CAP: tl.constexpr, BLOCK_KEY: tl.constexpr, LEVELS: tl.constexpr, THRESHOLDS: tl.constexpr,
    PERMUTED: tl.constexpr, WIDE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """`GROUPS` groups of the largest factor of one head, at all levels; of values in the second half of the grid."""
    if VALUES:
        if tl.program_id(2) == 0:
            pool_groups(
                x_ptr, means_ptr, coarsest_ptr, permutation, stride_b, stride_n, stride_h, heads, video_tokens_count,
                text_before, rows, HEAD_DIM, PADDED_DIM, FACTORS, GROUPS, CAP, BLOCK_KEY, LEVELS, THRESHOLDS, PERMUTED,
                WIDE,
            )  # fmt: skip
        else:
            pool_groups(
                v_ptr, value_means_ptr, None, permutation, stride_vb, stride_vn, stride_vh, heads, video_tokens_count,
                text_before, rows, HEAD_DIM, PADDED_DIM, FACTORS, GROUPS, False, BLOCK_KEY, LEVELS, THRESHOLDS,
                PERMUTED, WIDE,
            )  # fmt: skip
    else:
        pool_groups(
            x_ptr, means_ptr, coarsest_ptr, permutation, stride_b, stride_n, stride_h, heads, video_tokens_count,
            text_before, rows, HEAD_DIM, PADDED_DIM, FACTORS, GROUPS, CAP, BLOCK_KEY, LEVELS, THRESHOLDS, PERMUTED,
            WIDE,
        )  # fmt: skip


@triton.jit
def pool_groups(
    x_ptr, means_ptr, coarsest_ptr, permutation, stride_b, stride_n, stride_h, heads, video_tokens_count, text_before,
    rows, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, FACTORS: tl.constexpr, GROUPS: tl.constexpr,
    CAP: tl.constexpr, BLOCK_KEY: tl.constexpr, LEVELS: tl.constexpr, THRESHOLDS: tl.constexpr,
    PERMUTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`GROUPS` groups of one head of keys or of values."""
    head_index = tl.program_id(1).to(tl.int64)
    head = x_ptr + head_index // heads * stride_b + head_index % heads * stride_h
    dims = tl.arange(0, PADDED_DIM)
    LARGEST: tl.constexpr = FACTORS[len(FACTORS) - 1] if len(FACTORS) > 0 else 1
    if len(FACTORS) > 0:
        first = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)) * LARGEST
        group_sums(
            head, means_ptr + head_index * rows * HEAD_DIM, permutation, first, dims, stride_n, video_tokens_count,
            text_before, len(FACTORS) - 1, HEAD_DIM, FACTORS, PERMUTED, WIDE,
        )  # fmt: skip
    if CAP:
        # The keys of this program are in the cache now.
        BLOCKS: tl.constexpr = GROUPS * LARGEST // BLOCK_KEY
        for index in tl.static_range(BLOCKS):
            block = tl.program_id(0) * BLOCKS + index
            if block * BLOCK_KEY < video_tokens_count:
                level = coarsest_level(
                    head, permutation, block, dims, stride_n, video_tokens_count, text_before, HEAD_DIM, BLOCK_KEY,
                    LEVELS, THRESHOLDS, PERMUTED, WIDE,
                )  # fmt: skip
                tl.store(coarsest_ptr + head_index * tl.cdiv(video_tokens_count, BLOCK_KEY) + block, level)


@triton.jit
def group_sums(
    head, means, permutation, first, dims, stride_n, video, text_before, LEVEL: tl.constexpr, HEAD_DIM: tl.constexpr,
    FACTORS: tl.constexpr, PERMUTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums over the groups of a level that start at positions `first`: float32 `[groups, PADDED_DIM]`.

    Adds up the sums of the next finer level, down to single tokens at level -1, and stores the means of every level on
    the way: each token is read once, and no sum leaves its registers.
    """
    if LEVEL < 0:
        real = first < video
        tokens = video_tokens(first, permutation, text_before, real, PERMUTED)
        return load_real_rows(head + row_offsets(tokens, stride_n, WIDE), dims, real, HEAD_DIM).to(tl.float32)
    else:
        STEP: tl.constexpr = FACTORS[LEVEL - 1] if LEVEL > 0 else 1
        sums = group_sums(
            head, means, permutation, first, dims, stride_n, video, text_before, LEVEL - 1, HEAD_DIM, FACTORS,
            PERMUTED, WIDE,
        )  # fmt: skip
        for part in tl.static_range(1, FACTORS[LEVEL] // STEP):
            sums += group_sums(
                head, means, permutation, first + part * STEP, dims, stride_n, video, text_before, LEVEL - 1,
                HEAD_DIM, FACTORS, PERMUTED, WIDE,
            )  # fmt: skip
        row = first // FACTORS[LEVEL]
        for finer in tl.static_range(LEVEL):
            row += tl.cdiv(video, FACTORS[finer])
        size = tl.maximum(tl.minimum(video - first, FACTORS[LEVEL]), 1).to(tl.float32)
        tl.store(
            means + row.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :],
            (sums * (1.0 / size)[:, None]).to(means.dtype.element_ty),
            mask=(first < video)[:, None] & (dims[None, :] < HEAD_DIM),
        )
        return sums

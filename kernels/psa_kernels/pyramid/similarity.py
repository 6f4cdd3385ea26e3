"""How similar the neighbouring keys of a block are, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from psa_kernels.triton_rows import load_real_rows, row_offsets, video_tokens


@triton.jit
def coarsest_level(
    head, permutation, block, dims, stride_n, video, text_before, HEAD_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr,
    LEVELS: tl.constexpr, THRESHOLDS: tl.constexpr, PERMUTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Index of the last level at which the mean cosine of keys one pooling factor apart exceeds its threshold.

    Args:
        head: pointer to the keys of one head.
        THRESHOLDS: one for every entry of `LEVELS` after the first.
    """
    inside = tl.arange(0, BLOCK_KEY)
    size = tl.minimum(video - block * BLOCK_KEY, BLOCK_KEY)
    here = directions(
        head, permutation, block * BLOCK_KEY + inside, inside < size, dims, stride_n, text_before, HEAD_DIM, PERMUTED,
        WIDE,
    )  # fmt: skip
    coarsest = tl.full([], 0, tl.int32)
    for level in tl.static_range(1, len(LEVELS)):
        distance = tl.minimum(LEVELS[level], size - 1)
        paired = inside < size - distance
        there = directions(
            head, permutation, block * BLOCK_KEY + inside + distance, paired, dims, stride_n, text_before, HEAD_DIM,
            PERMUTED, WIDE,
        )  # fmt: skip
        similarity = tl.sum(tl.sum(here * there, 1), 0) / (size - distance).to(tl.float32)
        # A single key has no neighbour and counts as similar to itself.
        coarsest = tl.where((similarity > THRESHOLDS[level - 1]) | (size == 1), level, coarsest)
    return coarsest


@triton.jit
def directions(
    head, permutation, positions, real, dims, stride_n, text_before, HEAD_DIM: tl.constexpr, PERMUTED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Keys scaled to length one: float32 `[n, PADDED_DIM]`, zeros where `real` is false."""
    tokens = video_tokens(positions, permutation, text_before, real, PERMUTED)
    rows = load_real_rows(head + row_offsets(tokens, stride_n, WIDE), dims, real, HEAD_DIM).to(tl.float32)
    return rows / tl.maximum(tl.sqrt(tl.sum(rows * rows, 1)), 1e-12)[:, None]

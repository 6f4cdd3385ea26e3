"""How tokens are joined to groups and groups to larger ones, in Triton: means or sums, and squared deviations."""

from __future__ import annotations

import triton
import triton.language as tl

from psa_kernels.triton_rows import load_real_rows, load_rows, row_offsets, video_tokens

# Tokens of a block whose loads are written out one after the other; beyond that there is a loop.
UNROLLED = tl.constexpr(8)


@triton.jit
def group_squares(
    head, means, permutation, first, dims, stride_n, video, text_before, LEVEL: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, FACTORS: tl.constexpr, HELD: tl.constexpr, SUMS: tl.constexpr, PERMUTED: tl.constexpr,
    WIDE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The groups of a level that start at positions `first`: their means, and squared deviations inside finer groups.

    Groups are joined to larger ones by the formula of Chan, Golub and LeVeque (1979), which needs no difference of
    large numbers. With `SUMS`, sums are carried instead of means, so that the means that are stored on the way, of the
    sizes `HELD`, are those of the pyramid's own kernel.

    Args:
        LEVEL: index into `FACTORS`, or -1 for single tokens.
        HELD: empty without `SUMS`.
        RAGGED: whether tokens may be missing.

    Returns:
        float32 `[rows, PADDED_DIM]`, means or sums; and a tuple of as many of that shape as there are factors up to
        the level: sums of squared deviations from the means of the groups of each.
    """
    if LEVEL < 0:
        x = load_tokens(
            head, permutation, first, dims, stride_n, video, text_before, HEAD_DIM, PADDED_DIM, PERMUTED, WIDE, RAGGED
        )
        store_means(means, x, first, dims, video, 1, HEAD_DIM, HELD)
        return x, ()
    else:
        STEP: tl.constexpr = FACTORS[LEVEL - 1] if LEVEL > 0 else 1
        PARTS: tl.constexpr = FACTORS[LEVEL] // STEP
        if FACTORS[LEVEL] <= UNROLLED:
            found, inside = group_squares(
                head, means, permutation, first, dims, stride_n, video, text_before, LEVEL - 1, HEAD_DIM, PADDED_DIM,
                FACTORS, HELD, SUMS, PERMUTED, WIDE, RAGGED,
            )  # fmt: skip
            between = tl.zeros_like(found)
            for part in tl.static_range(1, PARTS):
                found, inside, between = join(
                    found, inside, between, part, head, means, permutation, first, dims, stride_n, video, text_before,
                    LEVEL, HEAD_DIM, PADDED_DIM, FACTORS, HELD, SUMS, PERMUTED, WIDE, RAGGED,
                )  # fmt: skip
        else:
            found = tl.zeros([first.shape[0], PADDED_DIM], tl.float32)
            between = tl.zeros_like(found)
            inside = ()
            for _ in tl.static_range(LEVEL):
                inside += (tl.zeros_like(found),)
            for part in range(PARTS):
                found, inside, between = join(
                    found, inside, between, part, head, means, permutation, first, dims, stride_n, video, text_before,
                    LEVEL, HEAD_DIM, PADDED_DIM, FACTORS, HELD, SUMS, PERMUTED, WIDE, RAGGED,
                )  # fmt: skip
        if LEVEL > 0:
            between += inside[LEVEL - 1]
        store_means(means, found, first, dims, video, FACTORS[LEVEL], HEAD_DIM, HELD)
        return found, inside + (between,)


@triton.jit
def join(
    found, inside, between, part, head, means, permutation, first, dims, stride_n, video, text_before,
    LEVEL: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, FACTORS: tl.constexpr, HELD: tl.constexpr,
    SUMS: tl.constexpr, PERMUTED: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Join part number `part` of groups, themselves groups of the next finer level, to the parts before it."""
    STEP: tl.constexpr = FACTORS[LEVEL - 1] if LEVEL > 0 else 1
    next_found, next_inside = group_squares(
        head, means, permutation, first + part * STEP, dims, stride_n, video, text_before, LEVEL - 1, HEAD_DIM,
        PADDED_DIM, FACTORS, HELD, SUMS, PERMUTED, WIDE, RAGGED,
    )  # fmt: skip
    if RAGGED:
        before = tl.minimum(tl.maximum(video - first, 0), part * STEP).to(tl.float32)
        new = tl.minimum(tl.maximum(video - first - part * STEP, 0), STEP).to(tl.float32)
        share = (new / tl.maximum(before + new, 1))[:, None]
        weight = before[:, None] * share
    else:
        share = 1.0 / (part + 1)
        weight = STEP * part * share
    if SUMS:
        if RAGGED:
            difference = next_found / tl.maximum(new, 1)[:, None] - found / tl.maximum(before, 1)[:, None]
        else:
            difference = (next_found - found * (1.0 / tl.maximum(part, 1))) * (1 / STEP)
        found += next_found
    else:
        difference = next_found - found
        found += difference * share
    between += difference * difference * weight
    added = ()
    for index in tl.static_range(LEVEL):
        added += (inside[index] + next_inside[index],)
    return found, added, between


@triton.jit
def store_means(means, total, first, dims, video, FACTOR: tl.constexpr, HEAD_DIM: tl.constexpr, HELD: tl.constexpr):
    """Means of the groups of `FACTOR` tokens that start at positions `first`, from their sums, if that size is held."""
    for index in tl.static_range(len(HELD)):
        if HELD[index] == FACTOR:
            row = first // FACTOR
            for finer in tl.static_range(index):
                row += tl.cdiv(video, HELD[finer])
            size = tl.maximum(tl.minimum(video - first, FACTOR), 1).to(tl.float32)
            tl.store(
                means + row.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :],
                (total * (1.0 / size)[:, None]).to(means.dtype.element_ty),
                mask=(first < video)[:, None] & (dims[None, :] < HEAD_DIM),
            )


@triton.jit
def load_tokens(
    head, permutation, position, dims, stride_n, video, text_before, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    PERMUTED: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Tokens at some positions: float32 `[rows, PADDED_DIM]`, zeros where there is none."""
    if RAGGED:
        real = position < video
        token = video_tokens(position, permutation, text_before, real, PERMUTED)
        x = load_real_rows(head + row_offsets(token, stride_n, WIDE), dims, real, HEAD_DIM)
    else:
        token = video_tokens(position, permutation, text_before, None, PERMUTED)
        x = load_rows(head + row_offsets(token, stride_n, WIDE), dims, HEAD_DIM, PADDED_DIM)
    return x.to(tl.float32)


@triton.jit
def real_tokens(first, size, video):
    """How many of `size` tokens from each position there are, at least 1: float32."""
    return tl.maximum(tl.minimum(video - first, size), 1).to(tl.float32)

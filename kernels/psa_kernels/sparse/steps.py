"""One step of the online softmax, in base 2: some rows of keys and values for some queries."""

from __future__ import annotations

import triton
import triton.language as tl

from psa_kernels.triton_rows import load_rows


@triton.jit
def attend(
    q, k_rows, v_rows, dims, scale, bias, COMMON_BIAS: tl.constexpr, top, total, accumulator, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, LATE_SUM: tl.constexpr,
):  # fmt: skip
    """A step in which every query reads every row.

    Args:
        q: `[m, PADDED_DIM]`.
        k_rows, v_rows: pointers to `n` rows each.
        scale: positive factor on the dot products, log2(e) included.
        bias: added to every logit: a scalar if `COMMON_BIAS`, else `[1, n]`.
        top, total, accumulator: largest logit so far, sum of the weights and weighted sum of values relative to it:
            float32 `[m]`, `[m]` or `[m, 4]`, `[m, PADDED_DIM]`.
        LATE_SUM: leave each row's sum in four parts. On tensor cores thread t of every four has columns 8 j + 2 t + e,
            so that these need no exchange between threads.

    Returns:
        The new top, total and accumulator.
    """
    keys = load_rows(k_rows, dims, HEAD_DIM, PADDED_DIM)
    scores = tl.dot(q, keys.T, input_precision="ieee")
    if COMMON_BIAS:
        # It joins the maximum that is subtracted anyway, so that scale and bias cost one operation an entry.
        new_top = tl.maximum(top, tl.max(scores, 1) * scale + bias)
        weights = tl.math.exp2(scores * scale - (new_top - bias)[:, None])
    else:
        scores = scores * scale + bias
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_top[:, None])
    return weigh(weights, new_top, v_rows, dims, top, total, accumulator, HEAD_DIM, PADDED_DIM, LATE_SUM)


@triton.jit
def attend_visible(
    q, k_rows, v_rows, dims, scale, visible, top, total, accumulator, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    LATE_SUM: tl.constexpr,
):  # fmt: skip
    """The same where `visible`, `[m, n]`, says which rows each query may read; the others add exactly nothing."""
    keys = load_rows(k_rows, dims, HEAD_DIM, PADDED_DIM)
    scores = tl.dot(q, keys.T, input_precision="ieee")
    scores = tl.where(visible, scores * scale, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.math.exp2(scores - new_top[:, None])
    return weigh(weights, new_top, v_rows, dims, top, total, accumulator, HEAD_DIM, PADDED_DIM, LATE_SUM)


@triton.jit
def weigh(
    weights, new_top, v_rows, dims, top, total, accumulator, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    LATE_SUM: tl.constexpr,
):  # fmt: skip
    """The second half of a step: add up weights and weighted values."""
    shrink = tl.math.exp2(top - new_top)
    if LATE_SUM:
        parts = tl.reshape(weights, [weights.shape[0], weights.shape[1] // 8, 4, 2])
        total = total * shrink[:, None] + tl.sum(tl.sum(parts, 3), 1)
    else:
        total = total * shrink + tl.sum(weights, 1)
    values = load_rows(v_rows, dims, HEAD_DIM, PADDED_DIM)
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator * shrink[:, None], input_precision="ieee")
    return new_top, total, accumulator

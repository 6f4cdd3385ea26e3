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
        q: `[m, PADDED_DIM]`, of 8-bit integers if the keys are.
        k_rows, v_rows: pointers to `n` rows each.
        scale: positive factor on the dot products, log2(e) included: a scalar, but of integers `[m]`.
        bias: added to every logit: a scalar if `COMMON_BIAS`, else `[1, n]`.
        top, total, accumulator: largest logit so far, sum of the weights and weighted sum of values relative to it:
            float32 `[m]`, `[m]` or `[m, 4]`, `[m, PADDED_DIM]`.
        LATE_SUM: leave each row's sum in four parts. On tensor cores thread t of every four has columns 8 j + 2 t + e,
            so that these need no exchange between threads.

    Returns:
        The new top, total and accumulator.
    """
    keys = load_rows(k_rows, dims, HEAD_DIM, PADDED_DIM)
    scores = products(q, keys)
    if COMMON_BIAS:
        # It joins the maximum that is subtracted anyway, so that scale and bias cost one operation an entry.
        new_top = tl.maximum(top, tl.max(scores, 1) * scale + bias)
        weights = tl.math.exp2(scores * for_rows(q, scale) - (new_top - bias)[:, None])
    else:
        scores = scores * for_rows(q, scale) + bias
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
    scores = products(q, keys)
    scores = tl.where(visible, scores * scale, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.math.exp2(scores - new_top[:, None])
    return weigh(weights, new_top, v_rows, dims, top, total, accumulator, HEAD_DIM, PADDED_DIM, LATE_SUM)


@triton.jit
def products(q, keys):
    """Dot products of queries and keys: float32 `[m, n]`."""
    if q.dtype == tl.int8:
        # At most 127 * 127 * HEAD_DIM, which float32 holds exactly.
        return tl.dot(q, keys.T, out_dtype=tl.int32).to(tl.float32)
    else:
        return tl.dot(q, keys.T, input_precision="ieee")


@triton.jit
def for_rows(q, scale):
    """What multiplies products `[m, n]` by a scalar, or those of integers by one of `[m]` each."""
    if q.dtype == tl.int8:
        return scale[:, None]
    else:
        return scale


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


@triton.jit
def store_means(out_rows, dims, real, total, accumulator, HEAD_DIM: tl.constexpr):
    """Store the outputs of `m` queries, where `real`, in rows that begin at `out_rows`."""
    tl.store(
        out_rows[:, None] + dims[None, :],
        (accumulator * (1.0 / total)[:, None]).to(out_rows.dtype.element_ty),
        mask=real[:, None] & (dims[None, :] < HEAD_DIM),
    )

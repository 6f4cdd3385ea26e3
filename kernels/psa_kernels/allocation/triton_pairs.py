"""What a program does with some query blocks and some key blocks of a head to price their pairs, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from psa_kernels.allocation.triton_statistics import store_scaled
from psa_kernels.allocation.triton_steps import price_steps
from psa_kernels.triton_rows import key_head


@triton.jit
def store_outputs(
    outputs_ptr, output_tops_ptr, output_squares_ptr, totals_ptr, queries, row, real_row, total, output, key_blocks,
    PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """Store the sums of the weights of some query blocks, and their outputs, as means.

    Args:
        queries, row: number of the head's first query block, and theirs from it on.
        total, output: sums of the weights, and of weighted values times `key_blocks`.
    """
    # The smallest normal number, as in the reference.
    total = tl.maximum(total, 1.1754943508222875e-38)
    tl.store(totals_ptr + queries + row, total, mask=real_row)
    output = output / (total * key_blocks)[:, None]
    dims = tl.arange(0, PADDED_DIM)
    store_scaled(outputs_ptr, output_tops_ptr, output_squares_ptr, queries + row, output, dims, real_row, PADDED_DIM)


@triton.jit
def store_prices(
    energy_ptr, energy_tops_ptr, spread_ptr, spread_tops_ptr, varied_ptr, centres_ptr, centre_tops_ptr,
    centre_squares_ptr, outputs_ptr, output_tops_ptr, output_squares_ptr, totals_ptr, importance_ptr, prices_ptr,
    query_blocks, key_blocks, importance_stride, price_stride, candidates, keep_first, keep_last,
    PADDED_DIM: tl.constexpr, LEVELS: tl.constexpr, POOLED: tl.constexpr, BLOCK_KEY: tl.constexpr, SKIP: tl.constexpr,
    COVARIANCE: tl.constexpr, EXPONENT: tl.constexpr, CONVEXITY: tl.constexpr, STEPS: tl.constexpr,
    HIGHEST: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Prices of `TILE_M` query blocks and `TILE_N` key blocks of one head, which the program's numbers name.

    Args:
        candidates: None, where all key blocks are; or how many of each query block, `[TILE_M]`, are.
        keep_first, keep_last: of those, how many have the highest price, as all that are no candidates.
    """
    head_index = tl.program_id(0).to(tl.int64)
    # Offsets inside a head fit 32 bits.
    all_keys = key_head(tl.num_programs(0), GROUP).to(tl.int64) * key_blocks
    all_queries = tl.num_programs(0).to(tl.int64) * query_blocks
    queries = head_index * query_blocks
    keys = key_head(head_index, GROUP) * key_blocks
    row = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    real_row = row < query_blocks
    block = tl.program_id(2) * TILE_N + tl.arange(0, TILE_N)
    real = block < key_blocks
    if candidates is not None:
        past = block[None, :] < candidates[:, None]
        free = past & (block >= keep_first)[None, :] & (block[None, :] < (candidates - keep_last)[:, None])
    # All three terms are of the same rounded rows, so that their difference is a distance however small it is.
    product = products(
        outputs_ptr, output_tops_ptr, queries, row, real_row, centres_ptr, centre_tops_ptr, keys, block, real,
        PADDED_DIM, DEPTH,
    )  # fmt: skip
    output_square = tl.load(output_squares_ptr + queries + row, mask=real_row, other=0.0)
    centre_square = tl.load(centre_squares_ptr + keys + block, mask=real, other=0.0)
    distance = tl.maximum(output_square[:, None] + centre_square[None, :] - 2 * product, 0)
    errors = ()
    if LEVELS[0] == 1:
        errors += (tl.zeros_like(distance),)
    for index in tl.static_range(len(POOLED)):
        start = index * all_keys + keys
        noise = products(
            energy_ptr, energy_tops_ptr, queries, row, real_row, spread_ptr, spread_tops_ptr, start, block, real,
            PADDED_DIM, DEPTH,
        )  # fmt: skip
        varied = tl.load(varied_ptr + start + block, mask=real, other=0.0)
        errors += (pooled_error(noise, varied[None, :], distance, POOLED[index] / BLOCK_KEY, COVARIANCE, CONVEXITY),)
    if SKIP:
        errors += (distance,)
    importance = load_importance(
        importance_ptr, queries, row, block, importance_stride,
        real_row[:, None] & real[None, :] if candidates is None else past,
    )  # fmt: skip
    total = tl.load(totals_ptr + queries + row, mask=real_row, other=1.0)
    prices = price_steps(errors, importance, total, LEVELS, BLOCK_KEY, SKIP, EXPONENT, STEPS, HIGHEST)
    for level in tl.static_range(len(LEVELS)):
        tl.store(
            prices_ptr + (level * all_queries + queries) * price_stride
            + (row[:, None] * price_stride + block[None, :]),
            tl.where(real[None, :] if candidates is None else free, prices[level], HIGHEST).to(tl.int16),
            mask=real_row[:, None] & (block < price_stride)[None, :],
        )  # fmt: skip


@triton.jit
def load_importance(pointer, start, row, block, stride, weighed):
    """Importance of some pairs, rows counted from `start`: float32 `[rows, blocks]`, zeros where not `weighed`."""
    return tl.load(pointer + start * stride + (row[:, None] * stride + block[None, :]), mask=weighed, other=0.0)


@triton.jit
def products(
    a_ptr, a_tops_ptr, a_start, a_row, a_real, b_ptr, b_tops_ptr, b_start, b_row, b_real, PADDED_DIM: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Dot products of two sets of scaled rows, `DEPTH` channels at a time: float32 `[a rows, b rows]`."""
    found = tl.zeros([a_row.shape[0], b_row.shape[0]], tl.float32)
    for depth in tl.range(0, PADDED_DIM, DEPTH, num_stages=2):
        a = load_fractions(a_ptr, a_start, a_row, a_real, depth, PADDED_DIM, DEPTH)
        b = load_fractions(b_ptr, b_start, b_row, b_real, depth, PADDED_DIM, DEPTH)
        found = tl.dot(a, b.T, found)
    a_top = tl.load(a_tops_ptr + a_start + a_row, mask=a_real, other=0.0)
    b_top = tl.load(b_tops_ptr + b_start + b_row, mask=b_real, other=0.0)
    return found * a_top[:, None] * b_top[None, :]


@triton.jit
def pooled_error(noise, varied, distance, share, COVARIANCE: tl.constexpr, CONVEXITY: tl.constexpr):
    """Squared error of means over groups that are a share of a block, but for the factor of mass.

    Args:
        noise, varied: variances inside the groups, of logits and of values.
        distance: squared, of the block's mean value from the output.
    """
    return COVARIANCE * share * noise * varied + noise * noise * distance * CONVEXITY


@triton.jit
def load_fractions(pointer, start, row, real, depth, PADDED_DIM: tl.constexpr, DEPTH: tl.constexpr):
    """`DEPTH` channels of some rows, counted from row `start`; zeros where `real` is false."""
    cells = row[:, None] * PADDED_DIM + (depth + tl.arange(0, DEPTH))[None, :]
    return tl.load(pointer + start * PADDED_DIM + cells, mask=real[:, None], other=0.0)

"""From importance to the lists of blocks in Triton: one program a row, without sorting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from psa_kernels.lists import BlockLists
from psa_kernels.spec import AttentionSpec

# A row has to fit into the registers of one program.
MOST_BLOCKS = 16384


def allocate(importance: torch.Tensor, coarsest: torch.Tensor | None, spec: AttentionSpec) -> BlockLists:
    """Give every pair of blocks a level (DESIGN: stages 3 and 4).

    Args:
        importance: non-negative float32 `[B, H, query blocks, key blocks]` whose rows lie at equal distances; fastest
            where these are multiples of 16.
        coarsest: None, or int32 `[B, H, key blocks]`: index of the coarsest level a key block may have.

    Returns:
        The same lists as the reference.
    """
    batch, heads, query_blocks, key_blocks = importance.shape
    narrow = key_blocks <= torch.iinfo(torch.int16).max
    ids = torch.empty(importance.shape, dtype=torch.int16 if narrow else torch.int32, device=importance.device)
    counts = torch.empty(batch, heads, query_blocks, len(spec.levels), dtype=torch.int32, device=importance.device)
    width = max(32, triton.next_power_of_2(key_blocks))
    allocation_kernel[(batch * heads * query_blocks,)](
        importance, coarsest, ids, counts, importance.stride(2), query_blocks, key_blocks,
        # Shares of the count depend on no data, so the ranks at which levels end are known here, exactly.
        ENDS=tuple(ranks_below(threshold, key_blocks) for threshold in spec.thresholds),
        FLOOR=ranks_below(spec.floor, key_blocks), THRESHOLDS=spec.thresholds, MASS=spec.rule == "mass",
        CAP=coarsest is not None, WIDTH=width, num_warps=row_warps(width),
    )  # fmt: skip
    return BlockLists(ids, counts)


def row_warps(width: int) -> int:
    """Warps for a row of `width` entries: few, as they wait for one another, but enough to hold it in registers."""
    return max(1, min(16, width // 256))


def ranks_below(share: float, blocks: int) -> int:
    """How many of the ranks r = 0 .. blocks - 1 have r / blocks < share in float64."""
    rank = min(blocks, max(0, int(share * blocks) - 1))
    while rank < blocks and rank / blocks < share:
        rank += 1
    return rank


@triton.jit
def allocation_kernel(
    importance_ptr, coarsest_ptr, ids_ptr, counts_ptr, row_stride, query_blocks, key_blocks, ENDS: tl.constexpr,
    FLOOR: tl.constexpr, THRESHOLDS: tl.constexpr, MASS: tl.constexpr, CAP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Levels of one row, then its list."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, WIDTH)
    real = block < key_blocks
    # Masking at the stride instead of the last block lets a thread load 16 bytes at a time.
    importance = tl.load(importance_ptr + row * row_stride + block, mask=block < row_stride, other=0.0)
    # Floats that are not negative compare like their bit patterns, so boundaries can be bisected as integers.
    key = tl.where(real, importance.to(tl.int32, bitcast=True), -1)
    level = tl.zeros([WIDTH], tl.int32)
    for index in tl.static_range(len(ENDS)):
        if MASS and THRESHOLDS[index] < 1:
            within = most_massive(key, block, THRESHOLDS[index])
            if FLOOR > 0:
                within = within | most_important(key, FLOOR)
        else:
            within = most_important(key, larger(ENDS[index], FLOOR))
        level += 1 - within.to(tl.int32)
    if CAP:
        coarsest = tl.load(coarsest_ptr + row // query_blocks * key_blocks + block, mask=real, other=0)
        level = tl.where(level < len(ENDS), tl.minimum(level, coarsest), level)

    # Four counters, one a level, share each scan; they cannot run over, since no row has 2^16 blocks.
    start = 0
    for first in tl.static_range(0, len(ENDS) + 1, 4):
        counter = (level - first) * 16
        counted = real & (counter >= 0) & (counter < 64)
        counter = tl.where(counted, counter, 0).to(tl.int64)
        ones = tl.where(counted, tl.full([], 1, tl.int64) << counter, 0)
        place = ((tl.cumsum(ones, 0) >> counter) & 0xFFFF).to(tl.int32) - 1
        for index in tl.static_range(first, larger(first, smaller(first + 4, len(ENDS) + 1))):
            chosen = real & (level == index)
            tl.store(ids_ptr + row * key_blocks + start + place, block.to(ids_ptr.dtype.element_ty), mask=chosen)
            count = tl.sum(chosen.to(tl.int32), 0)
            if index < len(ENDS):
                tl.store(counts_ptr + row * len(ENDS) + index, count)
            start += count


# Inside a kernel, `max` and `min` stand for operations on tensors.
@triton.constexpr_function
def larger(a, b):
    return max(a, b)


@triton.constexpr_function
def smaller(a, b):
    return min(a, b)


@triton.jit
def most_important(key, AMOUNT: tl.constexpr):
    """Mask of the `AMOUNT` entries with the largest keys; among equal keys the first ones."""
    # The largest key that at least `AMOUNT` entries reach.
    low = tl.full([], -1, tl.int32)
    high = tl.max(key, 0) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = tl.sum((key >= middle).to(tl.int32), 0) >= AMOUNT
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return largest_and_first(key, low, AMOUNT - tl.sum((key > low).to(tl.int32), 0))


@triton.jit
def most_massive(key, block, THRESHOLD: tl.constexpr):
    """Mask of the entries before which, in descending order, less than a share of the row's mass lies.

    Sums are float64, as in the reference: with float32 addends of like size they are exact, in whatever order.
    """
    total = tl.sum(tl.where(key >= 0, key.to(tl.float32, bitcast=True), 0.0).to(tl.float64), 0)
    threshold = tl.full([], THRESHOLD, tl.float64)
    # The smallest key of which less than the share lies before the first entry.
    low = tl.full([], -1, tl.int32)
    high = tl.max(key, 0)
    while high - low > 1:
        middle = low + (high - low) // 2
        beyond = mass_above(key, middle) / total >= threshold
        low = tl.where(beyond, middle, low)
        high = tl.where(beyond, high, middle)
    ties = tl.sum((key == high).to(tl.int32), 0)
    before = mass_above(key, high) + block.to(tl.float64) * high.to(tl.float32, bitcast=True).to(tl.float64)
    within = (block < ties) & ((before / total >= threshold) == 0)
    return largest_and_first(key, high, tl.sum(within.to(tl.int32), 0))


@triton.jit
def mass_above(key, boundary):
    """Sum of the entries whose key is above a boundary that is not negative."""
    return tl.sum(tl.where(key > boundary, key.to(tl.float32, bitcast=True), 0.0).to(tl.float64), 0)


@triton.jit
def largest_and_first(key, boundary, amount):
    """Mask of the entries whose key is above the boundary, and of the first `amount` that equal it."""
    equal = (key == boundary).to(tl.int32)
    # Ties at a boundary are rare, and counting them costs more than finding that there are none.
    if tl.sum(equal, 0) > amount:
        equal = equal * (tl.cumsum(equal, 0) <= amount).to(tl.int32)
    return (key > boundary) | (equal > 0)

"""From importance to the lists of blocks in Triton: one program a row, without sorting."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from psa_kernels.allocation.triton_lists import write_list
from psa_kernels.blocks import next_power_of_2, ranks_below
from psa_kernels.known_calls import recall
from psa_kernels.lists import BlockLists, id_dtype, list_width
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape


def allocate(
    importance: torch.Tensor, coarsest: torch.Tensor | None, spec: AttentionSpec, known: dict[Any, Any] | None = None
) -> BlockLists:
    """Give every pair of blocks a level.

    Args:
        importance: non-negative float32 `[B, Hq, query blocks, key blocks]` whose rows lie at equal distances; fastest
            where these are multiples of 16.
        coarsest: None, or int32 `[B, Hkv, key blocks]`: index of the coarsest level a key block may have.
        known: None, or the answers of calls like this one, as in `Call`.

    Returns:
        The same lists as the reference.
    """
    key_blocks, device = importance.shape[3], importance.device
    cap_heads = None if coarsest is None else coarsest.shape[1]
    ids_shape, counts_shape, launch = recall(
        known,
        ("allocation", cap_heads),
        lambda: _plan(*importance.shape, importance.stride(2), device, cap_heads, spec),
    )
    ids = torch.empty(ids_shape, dtype=id_dtype(key_blocks), device=device)
    counts = torch.empty(counts_shape, dtype=torch.int32, device=device)
    launch(importance, coarsest, ids, counts)
    return BlockLists(ids, counts, key_blocks)


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    batch: int, heads: int, query_blocks: int, key_blocks: int, row_stride: int, device: torch.device,
    cap_heads: int | None, spec: AttentionSpec,
) -> tuple[Shape, Shape, Launch]:  # fmt: skip
    """Shapes of the ids and of the counts, and what fills them."""
    rows, width = (batch, heads, query_blocks), list_width(spec, key_blocks)
    rows_of_cap = query_blocks * heads // (cap_heads or heads)
    return (*rows, width), (*rows, len(spec.levels)), Launch(
        allocation_kernel, (batch * heads * query_blocks,), (row_stride, rows_of_cap, key_blocks, width),
        # Shares of the count depend on no data, so the ranks at which levels end are known here, exactly.
        ENDS=tuple(ranks_below(threshold, key_blocks) for threshold in spec.thresholds),
        FLOOR=ranks_below(spec.floor, key_blocks), THRESHOLDS=spec.thresholds, MASS=spec.rule == "mass",
        CAP=cap_heads is not None, **row_shape(key_blocks, spec.rule == "mass"),
    )  # fmt: skip


def row_shape(key_blocks: int, mass: bool) -> dict[str, int | tuple[int, ...]]:
    """Parts in which a row is held, entries that are listed at a time, and warps: one, where it can hold the row.

    The mass rule takes a second warp for more than 1,024: of 1,182 blocks, 0.72 instead of 1.06 ms on an H200.
    """
    width = max(128, next_power_of_2(key_blocks))
    half = width // 2
    rest = max(128, next_power_of_2(key_blocks - half))
    widths = (half, rest) if half >= 128 and rest < half else (width,)
    warps = width // 1024 if width > 2048 or (mass and width == 2048) else 1
    # Three counters of ten bits share a sum of as many ones.
    return {"WIDTHS": widths, "CHUNK": min(width, 256 if width <= 2048 else 512), "num_warps": warps}


@triton.jit
def allocation_kernel(
    importance_ptr, coarsest_ptr, ids_ptr, counts_ptr, row_stride, rows_of_cap, key_blocks, list_width,
    ENDS: tl.constexpr, FLOOR: tl.constexpr, THRESHOLDS: tl.constexpr, MASS: tl.constexpr, CAP: tl.constexpr,
    WIDTHS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The boundaries of one row's levels, then its list.

    Args:
        rows_of_cap: how many neighbouring rows have the same coarsest levels, those of one head of the keys.
    """
    row = tl.program_id(0).to(tl.int64)
    importance = importance_ptr + row * row_stride
    keys = (load_keys(importance, tl.arange(0, WIDTHS[0]), row_stride, key_blocks),)
    if len(WIDTHS) > 1:
        keys += (load_keys(importance, WIDTHS[0] + tl.arange(0, WIDTHS[1]), row_stride, key_blocks),)
    largest, below = extremes(keys)

    # A level includes the entries above a boundary, and of those that equal it the ones up to a last block.
    boundaries = ()
    lasts = ()
    ties = 0
    if MASS:
        total = mass_above(keys, below)
        floor, floor_ties = most_important(keys, below, largest, key_blocks, FLOOR)
    for index in tl.static_range(len(ENDS)):
        if MASS and THRESHOLDS[index] < 1:
            boundary, ties = most_massive(keys, below, largest, key_blocks, total, THRESHOLDS[index])
            wider = (floor < boundary) | ((floor == boundary) & (floor_ties > ties))
            boundary, ties = tl.where(wider, floor, boundary), tl.where(wider, floor_ties, ties)
        else:
            boundary, ties = most_important(keys, below, largest, key_blocks, larger(ENDS[index], FLOOR))
        boundaries += (boundary,)
        lasts += (last_tie(importance, row_stride, key_blocks, boundary, ties, CHUNK),)

    caps = ()
    if CAP:
        caps += (coarsest_ptr + row // rows_of_cap * key_blocks,)
    write_list(
        ids_ptr, counts_ptr, row, key_blocks, list_width, kind_of,
        (importance, caps, row_stride, boundaries, lasts), len(ENDS), CHUNK,
    )  # fmt: skip


# Inside a kernel, `max` stands for an operation on tensors.
@triton.constexpr_function
def larger(a, b):
    return max(a, b)


@triton.jit
def load_keys(importance, block, row_stride, key_blocks):
    """Importance as integers that compare alike, as floats that are not negative do; -1 past the last block."""
    # Masking at the stride instead of the last block lets a thread load 16 bytes at a time.
    values = tl.load(importance + block, mask=block < row_stride, other=0.0)
    return tl.where(block < key_blocks, values.to(tl.int32, bitcast=True), -1)


@triton.jit
def extremes(keys):
    """The largest key of a row, and one below its smallest."""
    largest = tl.max(keys[0], 0)
    smallest = tl.min(tl.where(keys[0] >= 0, keys[0], 0x7FFFFFFF), 0)
    if len(keys) > 1:
        largest = tl.maximum(largest, tl.max(keys[1], 0))
        smallest = tl.minimum(smallest, tl.min(tl.where(keys[1] >= 0, keys[1], 0x7FFFFFFF), 0))
    return largest, smallest - 1


@triton.jit
def count_above(keys, boundary):
    """Number of entries whose key is above a boundary."""
    count = tl.sum((keys[0] > boundary).to(tl.int32), 0)
    if len(keys) > 1:
        count += tl.sum((keys[1] > boundary).to(tl.int32), 0)
    return count


@triton.jit
def mass_above(keys, boundary, dtype: tl.constexpr = tl.float64):
    """Sum of the entries whose key is above a boundary, itself at least -1.

    Sums are float64, as in the reference: with float32 addends of like size they are exact, in whatever order.
    """
    mass = tl.sum(masked_mass(keys[0], boundary).to(dtype), 0)
    if len(keys) > 1:
        mass += tl.sum(masked_mass(keys[1], boundary).to(dtype), 0)
    return mass


@triton.jit
def masked_mass(key, boundary):
    return tl.where(key > boundary, key.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def most_important(keys, below, largest, key_blocks, AMOUNT: tl.constexpr):
    """Boundary of the `AMOUNT` largest keys, and how many that equal it are among them but not all."""
    low, above_low = below, key_blocks
    high, above_high = largest, 0
    # Only where there is something to find: the compiler does not survive a loop that it knows never to run.
    if AMOUNT > 0:
        while (high - low > 1) & (above_low > AMOUNT):
            middle = low + (high - low) // 2
            above = count_above(keys, middle)
            enough = above >= AMOUNT
            low, above_low = tl.where(enough, middle, low), tl.where(enough, above, above_low)
            high, above_high = tl.where(enough, high, middle), tl.where(enough, above_high, above)
    else:
        low, above_low = largest, 0
    met = above_low <= AMOUNT
    return tl.where(met, low, high), tl.where(met, 0, AMOUNT - above_high)


@triton.jit
def most_massive(keys, below, largest, key_blocks, total, THRESHOLD: tl.constexpr):
    """Boundary and ties, as `most_important`, of the entries before which less than a share of the mass lies."""
    low, above_low = below, key_blocks
    high, above_high = largest, 0
    if THRESHOLD <= 0:
        # Nothing, but of a row without any mass everything: there no share is defined that could reach a threshold.
        low, above_low = tl.where(total > 0, largest, low), tl.where(total > 0, 0, above_low)
    threshold = tl.full([], THRESHOLD, tl.float64)
    aim = (threshold * total).to(tl.float32)
    # A single entry between the two is the last that belongs to the level.
    while (high - low > 1) & (above_low - above_high > 1):
        middle = low + (high - low) // 2
        above = count_above(keys, middle)
        mass = mass_above(keys, middle, tl.float32)
        beyond = mass >= aim
        # More than the rounding errors of the sums apart, float32 tells which is larger.
        if (tl.abs(mass - aim) <= 1e-4 * aim) | (total <= 0):
            beyond = mass_above(keys, middle) / total >= threshold
        low, above_low = tl.where(beyond, middle, low), tl.where(beyond, above, above_low)
        high, above_high = tl.where(beyond, high, middle), tl.where(beyond, above_high, above)
    boundary, ties = low, 0
    equal = above_low - above_high
    if equal > 1:
        boundary = high
        before = mass_above(keys, high)
        value = high.to(tl.float32, bitcast=True).to(tl.float64)
        for begin in range(0, equal, 128):
            tie = begin + tl.arange(0, 128)
            within = (tie < equal) & (((before + tie.to(tl.float64) * value) / total >= threshold) == 0)
            ties += tl.sum(within.to(tl.int32), 0)
    return boundary, ties


@triton.jit
def last_tie(importance, row_stride, key_blocks, boundary, ties, CHUNK: tl.constexpr):
    """The block of the last of the first `ties` entries whose key equals the boundary; -1 if there are to be none."""
    last = tl.full([], -1, tl.int32)
    if ties > 0:
        for begin in range(0, key_blocks, CHUNK):
            block = begin + tl.arange(0, CHUNK)
            equal = (load_keys(importance, block, row_stride, key_blocks) == boundary).to(tl.int32)
            counted = tl.cumsum(equal, 0)
            last = tl.maximum(last, tl.max(tl.where((equal > 0) & (counted <= ties), block, -1), 0))
            ties -= tl.sum(equal, 0)
    return last


@triton.jit
def kind_of(block, key_blocks, chosen):
    """Index of the level of some blocks, or that past the last."""
    importance, caps, row_stride, boundaries, lasts = chosen
    key = load_keys(importance, block, row_stride, key_blocks)
    kind = tl.zeros(block.shape, tl.int32)
    for index in tl.static_range(len(boundaries)):
        kind += (key <= boundaries[index] - (block <= lasts[index]).to(tl.int32)).to(tl.int32)
    if len(caps) > 0:
        cap = tl.load(caps[0] + block, mask=block < key_blocks, other=0)
        kind = tl.where(kind < len(boundaries), tl.minimum(kind, cap), kind)
    return kind

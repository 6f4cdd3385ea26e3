"""Where the levels of one row end in the order of importance, in Triton: found by bisection, without sorting.

`free` says which blocks of a row compete. A tuple of one number, how many blocks the row has: all do. Of four, that
number, the first block that is free, the one after the last, and how many are free: the others are kept, rank before
them and get the finest level.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def level_boundaries(
    importance, row_stride, free, ENDS: tl.constexpr, FLOOR: tl.constexpr, THRESHOLDS: tl.constexpr, MASS: tl.constexpr,
    WIDTHS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A boundary of each level and the last block that ties with it.

    A level includes the entries above a boundary, and of those that equal it the ones up to a last block.

    Args:
        ENDS: the rank at which each level ends, if not `MASS`; where some blocks are kept, as a share of all.
        FLOOR: the rank, or share, before which no level ends.
        THRESHOLDS: the share of the mass at which each level ends, if `MASS`.
    """
    keys = (free_keys(importance, tl.arange(0, WIDTHS[0]), row_stride, free),)
    if len(WIDTHS) > 1:
        keys += (free_keys(importance, WIDTHS[0] + tl.arange(0, WIDTHS[1]), row_stride, free),)
    largest, below = extremes(keys)
    boundaries = ()
    lasts = ()
    if MASS:
        kept_mass = None
        if len(free) > 1:
            kept_mass = mass_of_kept(importance, tl.arange(0, WIDTHS[0]), row_stride, free)
            if len(WIDTHS) > 1:
                kept_mass += mass_of_kept(importance, WIDTHS[0] + tl.arange(0, WIDTHS[1]), row_stride, free)
        total = mass_above(keys, below, kept_mass)
        floor, floor_ties = most_important(keys, below, largest, free, FLOOR)
    for index in tl.static_range(len(THRESHOLDS)):
        if MASS and THRESHOLDS[index] < 1:
            boundary, ties = most_massive(keys, below, largest, free, kept_mass, total, THRESHOLDS[index])
            wider = (floor < boundary) | ((floor == boundary) & (floor_ties > ties))
            boundary, ties = tl.where(wider, floor, boundary), tl.where(wider, floor_ties, ties)
        else:
            boundary, ties = most_important(keys, below, largest, free, larger(ENDS[index], FLOOR))
        boundaries += (boundary,)
        lasts += (last_tie(importance, row_stride, free, boundary, ties, CHUNK),)
    return boundaries, lasts


@triton.jit
def load_keys(importance, block, row_stride, blocks):
    """Importance as integers that compare alike, as floats that are not negative do; -1 past the last block."""
    # Masking at the stride instead of the last block lets a thread load 16 bytes at a time.
    values = tl.load(importance + block, mask=block < row_stride, other=0.0)
    return tl.where(block < blocks, values.to(tl.int32, bitcast=True), -1)


@triton.jit
def free_keys(importance, block, row_stride, free):
    """Importance as `load_keys`, also -1 for what is kept."""
    keys = load_keys(importance, block, row_stride, free[0])
    if len(free) > 1:
        keys = tl.where((block >= free[1]) & (block < free[2]), keys, -1)
    return keys


@triton.jit
def is_kept(block, free):
    """Whether some blocks are kept, where `free` has four numbers."""
    return (block < free[0]) & ((block < free[1]) | (block >= free[2]))


@triton.jit
def mass_of_kept(importance, block, row_stride, free):
    """The importance of the kept ones among some blocks: float64."""
    keys = load_keys(importance, block, row_stride, free[0])
    mass = tl.where(is_kept(block, free), keys.to(tl.float32, bitcast=True), 0.0)
    return tl.sum(mass.to(tl.float64), 0)


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
def mass_above(keys, boundary, kept_mass=None, dtype: tl.constexpr = tl.float64):
    """Sum of the entries whose key is above a boundary, itself at least -1, and of what is kept, if that is given.

    Sums are float64, as in the reference: with float32 addends of like size they are exact, in whatever order.
    """
    mass = tl.sum(masked_mass(keys[0], boundary).to(dtype), 0)
    if len(keys) > 1:
        mass += tl.sum(masked_mass(keys[1], boundary).to(dtype), 0)
    if kept_mass is not None:
        mass += kept_mass.to(dtype)
    return mass


@triton.jit
def masked_mass(key, boundary):
    return tl.where(key > boundary, key.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def most_important(keys, below, largest, free, END: tl.constexpr):
    """Boundary of the blocks before a rank, or of a share of all; how many that equal it are among them but not all."""
    if len(free) > 1:
        kept = free[0] - free[3]
        return largest_keys(keys, below, largest, free[3], ranks_below(END, free[0]) - kept)
    elif END > 0:
        return largest_keys(keys, below, largest, free[0], END)
    else:
        # The compiler does not survive a loop that it knows never to run.
        return largest, 0


@triton.jit
def largest_keys(keys, below, largest, count, amount):
    """The same of the `amount` largest of `count` keys."""
    # Of nothing every key is too much.
    low, above_low = tl.where(amount > 0, below, largest), tl.where(amount > 0, count, 0)
    high, above_high = largest, 0
    while (high - low > 1) & (above_low > amount):
        middle = low + (high - low) // 2
        above = count_above(keys, middle)
        enough = above >= amount
        low, above_low = tl.where(enough, middle, low), tl.where(enough, above, above_low)
        high, above_high = tl.where(enough, high, middle), tl.where(enough, above_high, above)
    met = (above_low <= amount) | (amount <= 0)
    return tl.where(met, low, high), tl.where(met, 0, amount - above_high)


# Inside a kernel, `max` stands for an operation on tensors.
@triton.constexpr_function
def larger(a, b):
    return max(a, b)


@triton.jit
def ranks_below(SHARE: tl.constexpr, blocks):
    """How many of the ranks r = 0 .. blocks - 1 have r / blocks < share in float64, as `blocks.ranks_below`."""
    share = tl.full([], SHARE, tl.float64)
    of = tl.maximum(blocks, 1).to(tl.float64)
    first = tl.maximum((share * of).to(tl.int32) - 1, 0)
    found = first
    for step in tl.static_range(4):
        rank = first + step
        found += ((rank < blocks) & (rank.to(tl.float64) / of < share)).to(tl.int32)
    return tl.minimum(found, blocks)


@triton.jit
def most_massive(keys, below, largest, free, kept_mass, total, THRESHOLD: tl.constexpr):
    """Boundary and ties, as `most_important`, of the entries before which less than a share of the mass lies.

    Args:
        kept_mass: None, or what lies before all of them.
    """
    low, above_low = below, free[len(free) - 1]
    high, above_high = largest, 0
    if THRESHOLD <= 0:
        # Nothing, but of a row without any mass everything: there no share is defined that could reach a threshold.
        low, above_low = tl.where(total > 0, largest, low), tl.where(total > 0, 0, above_low)
    threshold = tl.full([], THRESHOLD, tl.float64)
    aim = (threshold * total).to(tl.float32)
    if kept_mass is not None:
        # Already what is kept may be enough.
        none = (total > 0) & (kept_mass / total >= threshold)
        low, above_low = tl.where(none, largest, low), tl.where(none, 0, above_low)
    # A single entry between the two is the last that belongs to the level.
    while (high - low > 1) & (above_low - above_high > 1):
        middle = low + (high - low) // 2
        above = count_above(keys, middle)
        mass = mass_above(keys, middle, kept_mass, tl.float32)
        beyond = mass >= aim
        # More than the rounding errors of the sums apart, float32 tells which is larger.
        if (tl.abs(mass - aim) <= 1e-4 * aim) | (total <= 0):
            beyond = mass_above(keys, middle, kept_mass) / total >= threshold
        low, above_low = tl.where(beyond, middle, low), tl.where(beyond, above, above_low)
        high, above_high = tl.where(beyond, high, middle), tl.where(beyond, above_high, above)
    boundary, ties = low, 0
    equal = above_low - above_high
    if equal > 1:
        boundary = high
        before = mass_above(keys, high, kept_mass)
        value = high.to(tl.float32, bitcast=True).to(tl.float64)
        for begin in range(0, equal, 128):
            tie = begin + tl.arange(0, 128)
            within = (tie < equal) & (((before + tie.to(tl.float64) * value) / total >= threshold) == 0)
            ties += tl.sum(within.to(tl.int32), 0)
    return boundary, ties


@triton.jit
def last_tie(importance, row_stride, free, boundary, ties, CHUNK: tl.constexpr):
    """The block of the last of the first `ties` entries whose key equals the boundary; -1 if there are to be none."""
    last = tl.full([], -1, tl.int32)
    if ties > 0:
        for begin in range(0, free[0], CHUNK):
            block = begin + tl.arange(0, CHUNK)
            equal = (free_keys(importance, block, row_stride, free) == boundary).to(tl.int32)
            counted = tl.cumsum(equal, 0)
            last = tl.maximum(last, tl.max(tl.where((equal > 0) & (counted <= ties), block, -1), 0))
            ties -= tl.sum(equal, 0)
    return last


@triton.jit
def kind_of(block, key_blocks, chosen):
    """Index of the level of some blocks, or that past the last."""
    importance, caps, row_stride, free, boundaries, lasts = chosen
    key = free_keys(importance, block, row_stride, free)
    kind = tl.zeros(block.shape, tl.int32)
    for index in tl.static_range(len(boundaries)):
        kind += (key <= boundaries[index] - (block <= lasts[index]).to(tl.int32)).to(tl.int32)
    if len(caps) > 0:
        cap = tl.load(caps[0] + block, mask=block < key_blocks, other=0)
        kind = tl.where(kind < len(boundaries), tl.minimum(kind, cap), kind)
    if len(free) > 1:
        kind = tl.where(is_kept(block, free), 0, kind)
        kind = tl.where(block < free[0], kind, len(boundaries))
    return kind

"""From the importance of a causal call to its lists under the rules `count` and `mass`, in Triton: one program a row.

As `allocation.triton`, whose pieces it uses, but each row has candidates of its own number, and of these some are kept:
they rank before all others and get the finest level.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from psa_kernels.allocation.triton import count_above, extremes, larger, load_keys, mass_above, row_shape
from psa_kernels.allocation.triton_lists import write_list
from psa_kernels.causal.layout import CausalLayout
from psa_kernels.causal.widths import causal_list_width
from psa_kernels.lists import BlockLists, id_dtype
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape


def allocate(
    importance: torch.Tensor, coarsest: torch.Tensor | None, causal: CausalLayout, spec: AttentionSpec
) -> BlockLists:
    """Give every candidate of every row a level.

    Args:
        importance: of `triton_importance.block_importance`: float32 `[B, Hq, rows, key blocks]`.
        coarsest: None, or int32 `[B, Hkv, key blocks]`: index of the coarsest level a key block may have.

    Returns:
        The levels of the reference; blocks that are no candidates are last in each row, as far as there is room.
    """
    key_blocks, device = importance.shape[3], importance.device
    cap_heads = None if coarsest is None else coarsest.shape[1]
    ids_shape, counts_shape, launch = _plan(
        *importance.shape[:2], key_blocks, importance.stride(2), device, cap_heads, causal, spec
    )
    ids = torch.empty(ids_shape, dtype=id_dtype(key_blocks), device=device)
    counts = torch.empty(counts_shape, dtype=torch.int32, device=device)
    launch(importance, coarsest, ids, counts)
    return BlockLists(ids, counts, key_blocks)


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    batch: int, heads: int, key_blocks: int, row_stride: int, device: torch.device, cap_heads: int | None,
    causal: CausalLayout, spec: AttentionSpec,
) -> tuple[Shape, Shape, Launch]:  # fmt: skip
    """Shapes of the ids and of the counts, and what fills them."""
    rows, width = (batch, heads, len(causal.rows)), causal_list_width(spec, key_blocks)
    rows_of_cap = rows[2] * heads // (cap_heads or heads)
    most = max(1, causal.candidates(causal.rows[-1]))
    return (*rows, width), (*rows, len(spec.levels)), Launch(
        allocation_kernel, (batch * heads * rows[2],),
        (row_stride, rows_of_cap, rows[2], causal.first_row, key_blocks, width, spec.keep_first, spec.keep_last),
        RATIO=spec.block_query // spec.block_key, THRESHOLDS=spec.thresholds, FLOOR=spec.floor,
        MASS=spec.rule == "mass", CAP=cap_heads is not None, **row_shape(most, spec.rule == "mass"),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["rows_of_cap", "rows", "first_row", "key_blocks", "list_width", "keep_first", "keep_last"]
)
def allocation_kernel(
    importance_ptr, coarsest_ptr, ids_ptr, counts_ptr, row_stride, rows_of_cap, rows, first_row, key_blocks, list_width,
    keep_first, keep_last, RATIO: tl.constexpr, THRESHOLDS: tl.constexpr, FLOOR: tl.constexpr, MASS: tl.constexpr,
    CAP: tl.constexpr, WIDTHS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The boundaries of one row's levels, then its list.

    Args:
        rows_of_cap: how many neighbouring rows of the lists have the same coarsest levels.
        rows, first_row: rows of a head, and the number of the first of them among all query blocks.
        RATIO: key blocks of a query block.
    """
    row = tl.program_id(0).to(tl.int64)
    candidates = (first_row + tl.program_id(0) % rows) * RATIO
    kept = tl.minimum(keep_first + keep_last, candidates)
    free = candidates - kept
    importance = importance_ptr + row * row_stride
    chosen_freely = (keep_first, candidates - keep_last, candidates)
    keys = (free_keys(importance, tl.arange(0, WIDTHS[0]), row_stride, chosen_freely),)
    if len(WIDTHS) > 1:
        keys += (free_keys(importance, WIDTHS[0] + tl.arange(0, WIDTHS[1]), row_stride, chosen_freely),)
    largest, below = extremes(keys)

    # A level includes the entries above a boundary, and of those that equal it the ones up to a last block.
    boundaries = ()
    lasts = ()
    ties = 0
    if MASS:
        kept_mass = mass_of_kept(importance, tl.arange(0, WIDTHS[0]), row_stride, chosen_freely)
        if len(WIDTHS) > 1:
            kept_mass += mass_of_kept(importance, WIDTHS[0] + tl.arange(0, WIDTHS[1]), row_stride, chosen_freely)
        total = kept_mass + mass_above(keys, below)
        floor, floor_ties = most_important(keys, below, largest, free, ranks_below(FLOOR, candidates) - kept)
    for index in tl.static_range(len(THRESHOLDS)):
        if MASS and THRESHOLDS[index] < 1:
            boundary, ties = most_massive(keys, below, largest, free, kept_mass, total, THRESHOLDS[index])
            wider = (floor < boundary) | ((floor == boundary) & (floor_ties > ties))
            boundary, ties = tl.where(wider, floor, boundary), tl.where(wider, floor_ties, ties)
        else:
            amount = ranks_below(larger(THRESHOLDS[index], FLOOR), candidates) - kept
            boundary, ties = most_important(keys, below, largest, free, amount)
        boundaries += (boundary,)
        lasts += (last_tie(importance, row_stride, chosen_freely, boundary, ties, CHUNK),)

    caps = ()
    if CAP:
        caps += (coarsest_ptr + row // rows_of_cap * key_blocks,)
    write_list(
        ids_ptr, counts_ptr, row, key_blocks, list_width, kind_of,
        (importance, caps, row_stride, chosen_freely, boundaries, lasts), len(THRESHOLDS), CHUNK,
    )  # fmt: skip


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
def is_kept(block, chosen_freely):
    """Whether some blocks are candidates that are kept."""
    first, last, candidates = chosen_freely
    return (block < candidates) & ((block < first) | (block >= last))


@triton.jit
def free_keys(importance, block, row_stride, chosen_freely):
    """Importance as `load_keys`, -1 for what is no candidate or is kept."""
    first, last, candidates = chosen_freely
    keys = load_keys(importance, block, row_stride, candidates)
    return tl.where((block >= first) & (block < last), keys, -1)


@triton.jit
def mass_of_kept(importance, block, row_stride, chosen_freely):
    """The importance of the kept ones among some blocks: float64."""
    keys = load_keys(importance, block, row_stride, chosen_freely[2])
    mass = tl.where(is_kept(block, chosen_freely), keys.to(tl.float32, bitcast=True), 0.0)
    return tl.sum(mass.to(tl.float64), 0)


@triton.jit
def most_important(keys, below, largest, count, amount):
    """Boundary of the `amount` largest of `count` keys, and how many that equal it are among them but not all."""
    low, above_low = below, count
    high, above_high = largest, 0
    # Of nothing every key is too much.
    low, above_low = tl.where(amount > 0, low, largest), tl.where(amount > 0, above_low, 0)
    while (high - low > 1) & (above_low > amount):
        middle = low + (high - low) // 2
        above = count_above(keys, middle)
        enough = above >= amount
        low, above_low = tl.where(enough, middle, low), tl.where(enough, above, above_low)
        high, above_high = tl.where(enough, high, middle), tl.where(enough, above_high, above)
    met = above_low <= amount
    return tl.where(met | (amount <= 0), low, high), tl.where(met | (amount <= 0), 0, amount - above_high)


@triton.jit
def most_massive(keys, below, largest, count, kept_mass, total, THRESHOLD: tl.constexpr):
    """Boundary and ties, as `most_important`, of the entries before which less than a share of the mass lies.

    Args:
        kept_mass: what lies before all of them.
    """
    low, above_low = below, count
    high, above_high = largest, 0
    if THRESHOLD <= 0:
        # Nothing, but of a row without any mass everything: there no share is defined that could reach a threshold.
        low, above_low = tl.where(total > 0, largest, low), tl.where(total > 0, 0, above_low)
    threshold = tl.full([], THRESHOLD, tl.float64)
    aim = (threshold * total).to(tl.float32)
    # Already what is kept may be enough.
    none = (total > 0) & (kept_mass / total >= threshold)
    low, above_low = tl.where(none, largest, low), tl.where(none, 0, above_low)
    while (high - low > 1) & (above_low - above_high > 1):
        middle = low + (high - low) // 2
        above = count_above(keys, middle)
        mass = mass_above(keys, middle, tl.float32) + kept_mass.to(tl.float32)
        beyond = mass >= aim
        # More than the rounding errors of the sums apart, float32 tells which is larger.
        if (tl.abs(mass - aim) <= 1e-4 * aim) | (total <= 0):
            beyond = (mass_above(keys, middle) + kept_mass) / total >= threshold
        low, above_low = tl.where(beyond, middle, low), tl.where(beyond, above, above_low)
        high, above_high = tl.where(beyond, high, middle), tl.where(beyond, above_high, above)
    boundary, ties = low, 0
    equal = above_low - above_high
    if equal > 1:
        boundary = high
        before = mass_above(keys, high) + kept_mass
        value = high.to(tl.float32, bitcast=True).to(tl.float64)
        for begin in range(0, equal, 128):
            tie = begin + tl.arange(0, 128)
            within = (tie < equal) & (((before + tie.to(tl.float64) * value) / total >= threshold) == 0)
            ties += tl.sum(within.to(tl.int32), 0)
    return boundary, ties


@triton.jit
def last_tie(importance, row_stride, chosen_freely, boundary, ties, CHUNK: tl.constexpr):
    """The block of the last of the first `ties` entries whose key equals the boundary; -1 if there are to be none."""
    last = tl.full([], -1, tl.int32)
    if ties > 0:
        for begin in range(0, chosen_freely[2], CHUNK):
            block = begin + tl.arange(0, CHUNK)
            equal = (free_keys(importance, block, row_stride, chosen_freely) == boundary).to(tl.int32)
            counted = tl.cumsum(equal, 0)
            last = tl.maximum(last, tl.max(tl.where((equal > 0) & (counted <= ties), block, -1), 0))
            ties -= tl.sum(equal, 0)
    return last


@triton.jit
def kind_of(block, key_blocks, chosen):
    """Index of the level of some blocks, or that past the last."""
    importance, caps, row_stride, chosen_freely, boundaries, lasts = chosen
    key = free_keys(importance, block, row_stride, chosen_freely)
    kind = tl.zeros(block.shape, tl.int32)
    for index in tl.static_range(len(boundaries)):
        kind += (key <= boundaries[index] - (block <= lasts[index]).to(tl.int32)).to(tl.int32)
    if len(caps) > 0:
        cap = tl.load(caps[0] + block, mask=block < key_blocks, other=0)
        kind = tl.where(kind < len(boundaries), tl.minimum(kind, cap), kind)
    kind = tl.where(is_kept(block, chosen_freely), 0, kind)
    return tl.where(block < chosen_freely[2], kind, len(boundaries))

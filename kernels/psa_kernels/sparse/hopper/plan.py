"""How a list is cut into tiles, and what the warpgroups must know of each tile of the kernel for Hopper.

Where all rows of a tile stand for the same number of tokens, its log2 is one number for the whole tile. In a mixed tile
a run ends: it needs a number for each row.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from psa_kernels.limits import MAX_HOPPER_LEVELS
from psa_kernels.sparse.hopper.tiles import TILE_N, divide, log2_of, write_number

# Where one of the levels or of the 2 texts ends, or the groups of full size of the ragged last block.
MAX_MIXED = gl.constexpr(MAX_HOPPER_LEVELS + 3)
# How many tiles a list has; then, for each mixed tile and past the last: its index, and the bias of the tiles before.
PLAN = gl.constexpr(1 + 2 * (MAX_HOPPER_LEVELS + 3 + 1))
NEVER = gl.constexpr(2147483647)


@gluon.jit
def run_ends(
    ids, counts, video_keys, text_before, text_after, BLOCK_KEY: gl.constexpr, FACTORS: gl.constexpr,
    TEXT: gl.constexpr,
):  # fmt: skip
    """Where the runs of a list end.

    Returns:
        A tuple of int32 scalars: rows of the text; where the run of each level ends; and of the sequence's last block,
        if it is ragged and in the list: where its groups of full size end, where it ends, and how many tokens are in
        the group after those of full size. Otherwise these rows lie past all others.
    """
    end = 0
    if TEXT:
        end = gl.cdiv(text_before, BLOCK_KEY) * BLOCK_KEY + gl.cdiv(text_after, BLOCK_KEY) * BLOCK_KEY
    ends = (end,)
    start = 0
    solid = NEVER
    ragged_end = NEVER
    rest = video_keys % BLOCK_KEY
    for level in gl.static_range(len(FACTORS)):
        count = gl.load(counts + level)
        start += count
        # Ids ascend inside a level, so the last block of the sequence can only be the last of its run.
        last = gl.load(ids + start - 1, mask=count > 0, other=-1).to(gl.int32)
        end += count * divide(BLOCK_KEY, FACTORS[level])
        is_ragged = (last == gl.cdiv(video_keys, BLOCK_KEY) - 1) & (video_keys % BLOCK_KEY != 0)
        missing = gl.cdiv(BLOCK_KEY - video_keys % BLOCK_KEY, FACTORS[level])
        solid = gl.where(is_ragged, end - missing, solid)
        ragged_end = gl.where(is_ragged, end, ragged_end)
        rest = gl.where(is_ragged, video_keys % FACTORS[level], rest)
        ends = ends + (end,)
    return ends + (solid, ragged_end, rest)


@gluon.jit
def plan_tiles(
    plans, biases, slot, ends, text_before, text_after, BLOCK_KEY: gl.constexpr, FACTORS: gl.constexpr,
    TEXT: gl.constexpr, BEFORE: gl.constexpr,
):  # fmt: skip
    """Tell the warpgroups which tiles are mixed, and for the others log2 of how many tokens their rows stand for.

    For a mixed tile `biases` has that number for each row, relative to that of the tiles up to the next mixed one.
    `BEFORE` tiles, which are not mixed, come before those of the list.
    """
    tiles = gl.cdiv(ends[len(FACTORS)], TILE_N)
    entry = slot * PLAN
    write_number(plans, entry, tiles + BEFORE)
    mixed, bias = next_mixed_tile(0, ends, text_before, text_after, BLOCK_KEY, FACTORS, TEXT)
    write_number(plans, entry + 1, mixed + BEFORE)
    write_number(plans, entry + 2, bias.to(gl.int32, bitcast=True))
    at = slot * MAX_MIXED
    while mixed < tiles:
        first = mixed * TILE_N
        mixed, bias = next_mixed_tile(mixed + 1, ends, text_before, text_after, BLOCK_KEY, FACTORS, TEXT)
        columns = column_bias(first, ends, text_before, text_after, BLOCK_KEY, FACTORS, TEXT)
        biases.index(at).store(columns - bias)
        at += 1
        entry += 2
        write_number(plans, entry + 1, mixed + BEFORE)
        write_number(plans, entry + 2, bias.to(gl.int32, bitcast=True))


@gluon.jit
def next_mixed_tile(
    index, ends, text_before, text_after, BLOCK_KEY: gl.constexpr, FACTORS: gl.constexpr, TEXT: gl.constexpr
):  # fmt: skip
    """The first mixed tile from `index` on, and the bias of the tiles before it."""
    mixed = index
    bias = 0.0 * index
    if TEXT:
        after = gl.cdiv(text_before, BLOCK_KEY) * BLOCK_KEY
        mixed = gl.where(index < text_before // TILE_N, text_before // TILE_N, mixed)
        whole = (after + text_after) // TILE_N
        mixed = gl.where((index >= gl.cdiv(after, TILE_N)) & (index < whole), whole, mixed)
    solid = ends[1 + len(FACTORS)]
    for level in gl.static_range(len(FACTORS)):
        start, end = ends[level], ends[level + 1]
        whole = gl.where((solid >= start) & (solid < end), solid, end) // TILE_N
        inside = (index >= gl.cdiv(start, TILE_N)) & (index < whole)
        mixed = gl.where(inside, whole, mixed)
        bias = gl.where(inside, 1.0 * log2_of(FACTORS[level]), bias)
    return mixed, bias


@gluon.jit
def column_bias(
    first, ends, text_before, text_after, BLOCK_KEY: gl.constexpr, FACTORS: gl.constexpr, TEXT: gl.constexpr
):  # fmt: skip
    """log2 of how many tokens each row of a tile stands for: float32 `[TILE_N]`, -inf where there is no row."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    place = first + gl.arange(0, TILE_N, layout)
    columns = gl.full([TILE_N], 1.0 * log2_of(FACTORS[0]), gl.float32, layout)
    for level in gl.static_range(1, len(FACTORS)):
        columns = gl.where(place >= ends[level], 1.0 * log2_of(FACTORS[level]), columns)
    solid, ragged_end, rest = ends[1 + len(FACTORS)], ends[2 + len(FACTORS)], ends[3 + len(FACTORS)]
    in_rest = gl.where(rest > 0, gl.log2(gl.maximum(rest, 1).to(gl.float32)), -float("inf"))
    columns = gl.where(place == solid, in_rest, columns)
    absent = ((place > solid) & (place < ragged_end)) | (place >= ends[len(FACTORS)])
    if TEXT:
        after = gl.cdiv(text_before, BLOCK_KEY) * BLOCK_KEY
        columns = gl.where(place < ends[0], 0.0, columns)
        absent = absent | ((place >= text_before) & (place < after))
        absent = absent | ((place >= after + text_after) & (place < ends[0]))
    return gl.where(absent, -float("inf"), columns)

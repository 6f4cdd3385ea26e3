"""Which rows of keys and values a tile of the attention kernel reads.

A level's part of a list is a run of rows: `BLOCK_KEY / factor` rows a block, one block after the other. The run is cut
into tiles of `TILE` rows wherever that falls, so any number of small blocks share a tile and a large one fills several.
What does not fill a tile is left over: the end of each run, the ragged last block of the sequence, and all text. These
leftovers of all levels, one after the other, are the tail.

Tuples hold one entry a level. Factors and `BLOCK_KEY` are powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from psa_kernels.triton_rows import video_tokens


@triton.constexpr_function
def log2_of(value):
    """Exact logarithm of a power of two."""
    return value.bit_length() - 1


@triton.jit
def cut_list(
    ids, counts, video_keys, FACTORS: tl.constexpr, LISTED: tl.constexpr, BLOCK_KEY: tl.constexpr,
    TILE: tl.constexpr, candidates=None,
):  # fmt: skip
    """Cut one list into tiles.

    Args:
        ids, counts: pointers to one row of `BlockLists`.
        candidates: None, where all blocks are; or how many are: the first ones, which are whole.
        FACTORS: pooling factor of each level; `LISTED` of them have a count, a further one takes all other blocks.

    Returns:
        Tuples of scalars, one entry a level: first entry of the list; number of full tiles up to and with this level;
        number of leftover rows up to and with it; first row in the pyramid, which holds no level of factor 1. And two
        scalars: where in the tail the sequence's last group stands, if it is ragged, else -1; and log2 of its tokens.
    """
    starts = ()
    tile_ends = ()
    leftover_ends = ()
    level_rows = ()
    ragged_place = -1
    ragged_bias = 0.0
    start = 0
    tiles = 0
    leftover = 0
    level_row = 0
    key_blocks = tl.cdiv(video_keys, BLOCK_KEY)
    blocks = key_blocks if candidates is None else candidates
    last_tokens = video_keys - (key_blocks - 1) * BLOCK_KEY
    for level in tl.static_range(len(FACTORS)):
        if level < LISTED:
            count = tl.load(counts + level)
        else:
            count = blocks - start
        ragged = 0
        if candidates is None:
            # Ids ascend inside a level, so the ragged last block of the sequence can only be the last of its run.
            last = tl.load(ids + start + count - 1, mask=count > 0, other=-1).to(tl.int32)
            ragged = ((last == key_blocks - 1) & (last_tokens < BLOCK_KEY)).to(tl.int32)
        full_rows = (count - ragged) * (BLOCK_KEY // FACTORS[level])
        starts = starts + (start,)
        level_rows = level_rows + (level_row,)
        tiles += full_rows // TILE
        leftover += full_rows % TILE + ragged * tl.cdiv(last_tokens, FACTORS[level])
        tile_ends = tile_ends + (tiles,)
        leftover_ends = leftover_ends + (leftover,)
        last_count = (last_tokens - 1) % FACTORS[level] + 1
        ragged_place = tl.where(ragged > 0, leftover - 1, ragged_place)
        ragged_bias = tl.where(ragged > 0, tl.math.log2(last_count.to(tl.float32)), ragged_bias)
        start += count
        if FACTORS[level] > 1:
            level_row += tl.cdiv(video_keys, FACTORS[level])
    return starts, tile_ends, leftover_ends, level_rows, ragged_place, ragged_bias


@triton.jit
def full_tile_rows(
    tile, columns, ids, permutation, text_before, starts, tile_ends, level_rows, FACTORS: tl.constexpr,
    BLOCK_KEY: tl.constexpr, TILE: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """Rows of a full tile: int32 `[TILE]`, tokens where the level has factor 1 and rows of the pyramid elsewhere."""
    shift = log2_of(BLOCK_KEY // FACTORS[0])
    first_tile = 0
    start = starts[0]
    level_row = level_rows[0]
    for level in tl.static_range(1, len(FACTORS)):
        reached = tile >= tile_ends[level - 1]
        shift = tl.where(reached, log2_of(BLOCK_KEY // FACTORS[level]), shift)
        first_tile = tl.where(reached, tile_ends[level - 1], first_tile)
        start = tl.where(reached, starts[level], start)
        level_row = tl.where(reached, level_rows[level], level_row)
    position = (tile - first_tile) * TILE + columns
    block = tl.load(ids + start + (position >> shift)).to(tl.int32)
    row = (block << shift) + (position & ((1 << shift) - 1))
    exact = columns < tl.where(tile < tile_ends[0], TILE, 0)
    if FACTORS[0] > 1:
        row = row + level_row
    else:
        row = tl.where(exact, video_tokens(row, permutation, text_before, exact, PERMUTED), row + level_row)
    return row


@triton.jit
def full_tile_bias(tile, tile_ends, FACTORS: tl.constexpr):
    """log2 of the number of tokens that each row of a full tile stands for."""
    bias = tl.full([], log2_of(FACTORS[0]), tl.float32)
    for level in tl.static_range(1, len(FACTORS)):
        bias = tl.where(tile >= tile_ends[level - 1], float(log2_of(FACTORS[level])), bias)
    return bias


@triton.jit
def tail_rows(
    place, ids, permutation, text_before, text_keys, video_keys, starts, tile_ends, leftover_ends, level_rows,
    ragged_place, ragged_bias, FACTORS: tl.constexpr, BLOCK_KEY: tl.constexpr, TILE: tl.constexpr,
    PERMUTED: tl.constexpr,
):  # fmt: skip
    """Rows at some places of the tail.

    Args:
        place: int32 vector: leftovers of all levels first, then text keys; places past these are allowed.

    Returns:
        int32 rows; whether they are tokens (rows of the pyramid elsewhere); log2 of the number of tokens each stands
        for. Past the end it is token 0, which always exists, with -inf.
    """
    row = tl.zeros_like(place)
    bias = tl.full(place.shape, -float("inf"), tl.float32)
    is_token = place >= 0
    leftover_start = 0
    tile_start = 0
    for level in tl.static_range(len(FACTORS)):
        inside = (place >= leftover_start) & (place < leftover_ends[level])
        run_position = (tile_ends[level] - tile_start) * TILE + place - leftover_start
        group = listed_groups(ids + starts[level], run_position, inside, BLOCK_KEY // FACTORS[level])
        # From the place, not from the group: a thread needs the bias of many rows, and would read the list for each.
        bias = tl.where(inside, float(log2_of(FACTORS[level])), bias)
        if FACTORS[level] == 1:
            row = tl.where(inside, video_tokens(group, permutation, text_before, inside, PERMUTED), row)
        else:
            row = tl.where(inside, group + level_rows[level], row)
            is_token = is_token & (inside == 0)
        leftover_start = leftover_ends[level]
        tile_start = tile_ends[level]
    text = place - leftover_start
    is_text = (text >= 0) & (text < text_keys)
    row = tl.where(is_text, tl.where(text < text_before, text, text + video_keys), row)
    bias = tl.where(place == ragged_place, ragged_bias, tl.where(is_text, 0.0, bias))
    return row, is_token, bias


@triton.jit
def listed_groups(ids, position, inside, BLOCK_ROWS: tl.constexpr):
    """Index along the sequence of the group at each position of a level's run; `inside` masks the reads."""
    block = tl.load(ids + position // BLOCK_ROWS, mask=inside, other=0).to(tl.int32)
    return block * BLOCK_ROWS + position % BLOCK_ROWS

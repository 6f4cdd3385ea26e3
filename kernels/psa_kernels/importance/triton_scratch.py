"""What waits in the scratch until the row sums of the softmax are known: written a tile of scores at a time, in Triton.

`triton.py` says why it waits. One number a row and key block does, log2 of the block's largest weight or the sum of its
weights, relative to a reference of the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from psa_kernels.importance.representatives import column_dims, row_dims, smaller


@triton.jit
def add_tile(
    scores, tile, reference, scale, top, total, scratch, COLUMNS: tl.constexpr, LARGEST: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Write what waits of tile number `tile`, whose scores are `[TILE_M, TILE_N]`.

    Returns:
        The largest scores and the sums of weights so far, `top` and `total`, with those of the tile.
    """
    waiting, tile_top, weight = score_blocks(scores, reference, scale, COLUMNS, LARGEST)
    top = tl.maximum(top, tile_top)
    total += weight
    SIZE: tl.constexpr = scores.shape[0] * (scores.shape[1] // COLUMNS)
    tl.store(scratch + tile * SIZE + tl.arange(0, SIZE), in_threads(encode(waiting, LARGEST), WARPS))
    return top, total


@triton.jit
def row_norms(total, LARGEST: tl.constexpr, WARPS: tl.constexpr):
    """What makes the weights of each row probabilities, in the natural order of rows: a factor, or its log2."""
    R: tl.constexpr = row_dims(total.shape[0], WARPS)
    norm = -tl.math.log2(total) if LARGEST else 1.0 / total
    return tl.reshape(tl.permute(tl.reshape(norm, [R[0], R[1], R[2], R[3]]), [1, 3, 0, 2]), [total.shape[0]])


@triton.jit
def read_shares(
    scratch, norm, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr, TILE_N: tl.constexpr,
    WARPS: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Probabilities of `READ` entries, or their log2: `[key blocks, query blocks, SAMPLES]`.

    Args:
        norm: of `row_norms`; where a row does not count 0, or -inf.
    """
    TILE_M: tl.constexpr = norm.shape[0]
    waiting = decode(tl.load(scratch + tl.arange(0, READ)), LARGEST)
    waiting = out_of_threads(waiting, TILE_N, TILE_M, COLUMNS, WARPS)
    shares = waiting + norm[None, :] if LARGEST else waiting * norm[None, :]
    return tl.reshape(shares, [READ // TILE_M, TILE_M // SAMPLES, SAMPLES])


@triton.jit
def score_blocks(scores, reference, scale, COLUMNS: tl.constexpr, LARGEST: tl.constexpr):
    """What waits in the scratch, and of each row a largest score and a sum of weights for every thread with a part."""
    D: tl.constexpr = column_dims(scores.shape[1], COLUMNS)
    unfolded: tl.constexpr = [scores.shape[0], D[0], D[1], D[2], D[3], D[4], D[5]]
    weights = tl.math.exp2(scores * scale - reference[:, None])
    largest = tl.max(tl.max(tl.max(tl.reshape(scores, unfolded), 6), 4), 1)
    if LARGEST:
        waiting = largest * scale - reference[:, None, None, None]
        weights = tl.reshape(weights, [scores.shape[0], D[0] * D[1], D[2] * D[3], D[4] * D[5]])
    else:
        waiting = tl.sum(tl.sum(tl.sum(tl.reshape(weights, unfolded), 6), 4), 1)
        weights = waiting
    return waiting, tl.max(tl.max(largest, 3), 1), tl.sum(tl.sum(weights, 3), 1)


@triton.jit
def encode(x, LOG: tl.constexpr):
    """A number between 2^-64 and 2^64, or such a number's log2, in 16 bits; half as much to write and read as a float.

    Numbers keep 9 bits behind the first, and smaller ones become 2^-64; logarithms come in steps of 1/512.
    """
    if LOG:
        # 2^23 + 2^15 shifts the step to the last bit of a float and zero to the middle of the range.
        return (tl.maximum(x * 512.0, -32768.0) + 8421376.0).to(tl.int32, bitcast=True).to(tl.uint16)
    else:
        # The bits of a float from those of 2^-64 on, rounded.
        return (tl.maximum(x.to(tl.int32, bitcast=True) - 0x1F7FE000, 0) >> 14).to(tl.uint16)


@triton.jit
def decode(code, LOG: tl.constexpr):
    if LOG:
        return ((code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8421376.0) * (1.0 / 512)
    else:
        return ((code.to(tl.int32) << 14) + 0x1F800000).to(tl.float32, bitcast=True)


@triton.jit
def in_threads(waiting, WARPS: tl.constexpr):
    """Bring `[TILE_M, blocks in j, threads, blocks in e]` into an order in which a thread's entries are neighbours."""
    R: tl.constexpr = row_dims(waiting.shape[0], WARPS)
    J: tl.constexpr = waiting.shape[1]
    T: tl.constexpr = waiting.shape[2]
    E: tl.constexpr = waiting.shape[3]
    OWNED: tl.constexpr = R[0] * R[2] * J * E
    # A thread writes 16 bytes at a time.
    PART: tl.constexpr = smaller(OWNED, 8)
    waiting = tl.permute(tl.reshape(waiting, [R[0], R[1], R[2], R[3], J, T, E]), [1, 3, 5, 0, 2, 4, 6])
    waiting = tl.permute(tl.reshape(waiting, [R[1] * R[3] * T, OWNED // PART, PART]), [1, 0, 2])
    return tl.reshape(waiting, [R[1] * R[3] * T * OWNED])


@triton.jit
def out_of_threads(entries, TILE_N: tl.constexpr, TILE_M: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Undo `in_threads` for several tiles: `[blocks, TILE_M]` in natural order."""
    R: tl.constexpr = row_dims(TILE_M, WARPS)
    D: tl.constexpr = column_dims(TILE_N, COLUMNS)
    BLOCKS: tl.constexpr = TILE_N // COLUMNS
    TILES: tl.constexpr = entries.shape[0] // (TILE_M * BLOCKS)
    OWNED: tl.constexpr = R[0] * R[2] * D[1] * D[4]
    PART: tl.constexpr = smaller(OWNED, 8)
    entries = tl.permute(tl.reshape(entries, [TILES, OWNED // PART, R[1] * R[3], D[2], PART]), [0, 3, 2, 1, 4])
    entries = tl.reshape(entries, [TILES, D[2], R[1] * R[3], R[0] * R[2], D[1] * D[4]])
    return tl.reshape(tl.permute(entries, [0, 1, 4, 2, 3]), [TILES * BLOCKS, TILE_M])

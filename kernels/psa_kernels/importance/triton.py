"""How much each query block needs each key block, in Triton."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from psa_kernels.blocks import block_count
from psa_kernels.devices import capability, multiprocessors
from psa_kernels.heads import group_size
from psa_kernels.importance.representatives import column_dims, row_dims, smaller, tiling_of_both
from psa_kernels.known_calls import recall
from psa_kernels.layout import TokenLayout
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape
from psa_kernels.triton_prepared import Prepared
from psa_kernels.triton_rows import key_head, padded_dim

# Scratch entries of an item that are read at a time.
READ = 16384


def block_importance(
    q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, spec: AttentionSpec, scale: float,
    known: dict[Any, Any] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Importance S of every pair of video blocks.

    Args:
        q, k: `[B, Nq, Hq, D]` and `[B, Nk, Hkv, D]`, all queries and keys, in the order of the model.
        scale: factor on the dot products.
        known: None, or the answers of calls like this one, as in `Call`.

    Returns:
        float32 `[B, Hq, query blocks, key blocks]`, non-negative, up to a relative error of 0.1 %.
    """
    plan = recall(known, "importance", lambda: _Importance(q, k, layout, spec, scale))
    return plan(q, k, layout.short_permutation)


class _Importance:
    """The importance of calls of one shape: representatives of queries and keys, then their importance."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, spec: AttentionSpec, scale: float
    ) -> None:
        how = spec.importance
        self.plan = _plan(
            *q.shape, group_size(q, k), q.dtype, q.device, layout.video_queries, layout.video_keys, spec, scale
        )
        queries, keys, self.tiling = tiling_of_both(
            (q.shape, k.shape), (q.stride(), k.stride()), q.dtype, q.device, layout.text_before, layout.text_after,
            layout.permutation is not None, (how.query_stride, how.key_stride), how.estimator == "pooled",
            self.plan.rows, self.plan.columns,
        )  # fmt: skip
        self.parts = (
            (queries, q.dtype), (keys, q.dtype), (self.plan.scratch, torch.uint16), (self.plan.tops, torch.float32)
        )  # fmt: skip
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self.parts]
        self.prepared = Prepared(sizes, [self.tiling, self.plan.launch])

    def __call__(self, q: torch.Tensor, k: torch.Tensor, permutation: torch.Tensor | None) -> torch.Tensor:
        importance = torch.empty(self.plan.padded, device=q.device)
        tensors = q, k, importance, permutation
        self.prepared.run(tensors, self.launch, lambda work: self.look(*tensors, work))
        if self.plan.padded[3] == self.plan.key_blocks:
            return importance
        return importance.narrow(3, 0, self.plan.key_blocks)

    def launch(self, work: int, q: int, k: int, importance: int, permutation: int) -> None:
        """The launches, at addresses."""
        queries, keys, scratch, tops, _ = (work + start for start in self.prepared.starts)
        self.tiling.at_multiples(q, k, queries, keys, permutation)
        self.plan.launch.at_multiples(queries, keys, scratch, tops, importance)

    def look(
        self, q: torch.Tensor, k: torch.Tensor, importance: torch.Tensor, permutation: torch.Tensor | None,
        work: torch.Tensor,
    ) -> None:  # fmt: skip
        """The same from tensors."""
        queries, keys, scratch, tops = (self.prepared.part(work, index, *part) for index, part in enumerate(self.parts))
        self.tiling(q, k, queries, keys, permutation)
        self.plan.launch(queries, keys, scratch, tops, importance)


class _Plan(NamedTuple):
    """What the importance of calls of one shape takes.

    Attributes:
        rows, columns: what the rows of a tile of queries and of keys unfold to.
        padded: shape of the importance with rows at multiples of 64 bytes, which the allocation reads faster.
        key_blocks: how much of a row of it there is.
        scratch, tops: shapes of what each program keeps for itself.
    """

    rows: Shape
    columns: Shape
    padded: Shape
    key_blocks: int
    scratch: Shape
    tops: Shape
    launch: Launch


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    batch: int, _: int, heads: int, head_dim: int, group: int, dtype: torch.dtype, device: torch.device,
    video_queries: int, video_keys: int, spec: AttentionSpec, scale: float,
) -> _Plan:  # fmt: skip
    how = spec.importance
    columns = spec.block_key // how.key_stride
    tile = tile_shape(capability(device), head_dim, dtype.itemsize, columns)
    programs = tile.pop("programs") * multiprocessors(device)
    query_samples, key_samples = block_count(video_queries, how.query_stride), block_count(video_keys, how.key_stride)
    key_blocks, query_blocks = block_count(video_keys, spec.block_key), block_count(video_queries, spec.block_query)
    query_tiles = block_count(query_samples, tile["TILE_M"])
    items = batch * heads * query_tiles
    programs = min(items, programs)
    row_stride = block_count(key_blocks, 16) * 16
    key_tiles = block_count(key_samples, tile["TILE_N"])
    entries = block_count(key_tiles * tile["TILE_M"] * (tile["TILE_N"] // columns), READ) * READ
    launch = Launch(
        importance_kernel, (programs,),
        (items, query_tiles, query_samples, key_samples, query_blocks, key_blocks, row_stride, entries,
         # Never 0, by which the -inf of absent keys must not be multiplied.
         max(abs(scale) * math.log2(math.e), 1e-30)),
        PADDED_DIM=padded_dim(head_dim), SAMPLES=spec.block_query // how.query_stride, COLUMNS=columns,
        LARGEST=how.statistic == "max", NEGATIVE_SCALE=scale < 0, WARPS=tile["num_warps"], READ=READ, GROUP=group,
        **tile,
    )  # fmt: skip
    return _Plan(
        tuple(row_dims(tile["TILE_M"], tile["num_warps"])), tuple(column_dims(tile["TILE_N"], columns)),
        (batch, heads, query_blocks, row_stride), key_blocks, (programs, entries), (programs, tile["TILE_M"]), launch,
    )  # fmt: skip


def tile_shape(capability: tuple[int, int], head_dim: int, element_size: int, columns: int) -> dict[str, Any]:
    """Tile sizes, pipeline stages, launch options, and programs for each multiprocessor."""
    width = padded_dim(head_dim) * element_size
    tile: dict[str, Any] = {"TILE_M": 128, "STAGES": 2, "programs": 1, "num_warps": 8, "maxnreg": None}
    if capability[0] == 9 and width <= 256:
        # Two programs fit, and one multiplies while the other computes exponentials. More rows spare reads of keys.
        tile |= {"programs": 2, "maxnreg": 128}
        tile |= {"TILE_M": 256, "TILE_N": 64} if columns in (8, 16) else {"TILE_N": 128}
    else:
        wide = 128 if capability[0] == 10 else 64
        tile["TILE_N"] = wide if width <= 256 else 64 if capability[0] in (9, 10) else 32
        tile["STAGES"] = 2 if width <= 512 else 1
    tile["TILE_N"] = max(tile["TILE_N"], columns)
    return tile


@triton.jit
def importance_kernel(
    query_ptr, key_ptr, scratch_ptr, tops_ptr, importance_ptr, items, query_tiles, query_samples, key_samples,
    query_blocks, key_blocks, row_stride, scratch_width, scale, PADDED_DIM: tl.constexpr, SAMPLES: tl.constexpr,
    COLUMNS: tl.constexpr, LARGEST: tl.constexpr, NEGATIVE_SCALE: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, READ: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Items of `TILE_M` query representatives of one head, one after the other.

    The row sums of the softmax are known only at the end. Until then one number a row and key block waits in the
    scratch: log2 of the block's largest weight, or the sum of its weights. Weights are relative to a reference, each
    row's largest score in the first tile, which spares the products that follow a running maximum.
    """
    BLOCKS: tl.constexpr = TILE_N // COLUMNS
    SIZE: tl.constexpr = TILE_M * BLOCKS
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * scratch_width
    tops_row = tops_ptr + tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    cells = tl.arange(0, TILE_N)[:, None] * PADDED_DIM + tl.arange(0, PADDED_DIM)[None, :]
    last = (key_samples - 1) // TILE_N
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        head_index = (item // query_tiles).to(tl.int64)
        k_head = key_ptr + key_head(head_index, GROUP) * (last + 1) * (TILE_N * PADDED_DIM) + cells
        again = True
        for attempt in range(2):
            if again:
                rows = (head_index * query_tiles + item % query_tiles) * TILE_M + tl.arange(0, TILE_M)
                q = tl.load(query_ptr + rows[:, None] * PADDED_DIM + tl.arange(0, PADDED_DIM)[None, :])
                if NEGATIVE_SCALE:
                    q = -q
                reference = tl.load(tops_row)
                top = tl.full([TILE_M, smaller(4, BLOCKS)], -float("inf"), tl.float32)
                total = tl.zeros([TILE_M, 4 if LARGEST else smaller(4, BLOCKS)], tl.float32)
                # The last tile, perhaps a ragged one, comes first.
                for back in tl.range(0, last + 1, num_stages=STAGES):
                    tile = last - back
                    keys = tl.load(k_head + tile * (TILE_N * PADDED_DIM))
                    scores = tl.dot(q, keys.T, input_precision="ieee")
                    if back == 0:
                        real = tile * TILE_N + natural_columns(TILE_N, COLUMNS) < key_samples
                        scores = tl.where(real[None, :], scores, -float("inf"))
                        if attempt == 0:
                            reference = tl.max(scores, 1) * scale
                    waiting, tile_top, weight = score_blocks(scores, reference, scale, COLUMNS, LARGEST)
                    top = tl.maximum(top, tile_top)
                    total += weight
                    tl.store(scratch + tile * SIZE + tl.arange(0, SIZE), in_threads(encode(waiting, LARGEST), WARPS))
                tops = tl.max(top, 1) * scale
                # Scores that lie too far above the reference are weighed anew, relative to the largest one.
                again = tl.max(tops - reference, 0) > 56
                tl.store(tops_row, tops)
                # Other threads wrote the scratch that this one reads, and will read what the next item overwrites.
                tl.debug_barrier()
                reduce_item(
                    scratch, importance_ptr + head_index * query_blocks * row_stride, row_stride,
                    tl.sum(total, 1), item % query_tiles * TILE_M, query_samples, key_samples, query_blocks,
                    key_blocks, SAMPLES, COLUMNS, LARGEST, TILE_N, WARPS, READ,
                )  # fmt: skip
                tl.debug_barrier()


@triton.jit
def natural_columns(TILE_N: tl.constexpr, COLUMNS: tl.constexpr):
    """The natural number of each column of a tile."""
    D: tl.constexpr = column_dims(TILE_N, COLUMNS)
    natural = tl.reshape(tl.arange(0, TILE_N), [D[2], D[1], D[4], D[0], D[3], D[5]])
    return tl.reshape(tl.permute(natural, [3, 1, 0, 4, 2, 5]), [TILE_N])


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


@triton.jit
def reduce_item(
    scratch, importance, row_stride, total, first_sample, query_samples, key_samples, query_blocks, key_blocks,
    SAMPLES: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr, TILE_N: tl.constexpr, WARPS: tl.constexpr,
    READ: tl.constexpr,
):  # fmt: skip
    """Largest or mean probability of each pair of blocks, from the scratch and the row sums `total`."""
    TILE_M: tl.constexpr = total.shape[0]
    QUERY_BLOCKS: tl.constexpr = TILE_M // SAMPLES
    WIDTH: tl.constexpr = READ // TILE_M
    R: tl.constexpr = row_dims(TILE_M, WARPS)
    # What makes weights probabilities: a factor, or its log2.
    norm = -tl.math.log2(total) if LARGEST else 1.0 / total
    norm = tl.reshape(tl.permute(tl.reshape(norm, [R[0], R[1], R[2], R[3]]), [1, 3, 0, 2]), [TILE_M])
    norm = tl.where(first_sample + tl.arange(0, TILE_M) < query_samples, norm, -float("inf") if LARGEST else 0.0)
    query_block = first_sample // SAMPLES + tl.arange(0, QUERY_BLOCKS)
    for first in range(0, key_blocks, WIDTH):
        block = first + tl.arange(0, WIDTH)
        waiting = decode(tl.load(scratch + first * TILE_M + tl.arange(0, READ)), LARGEST)
        waiting = out_of_threads(waiting, TILE_N, TILE_M, COLUMNS, WARPS)
        shares = waiting + norm[None, :] if LARGEST else waiting * norm[None, :]
        pairs = tl.reshape(shares, [WIDTH, QUERY_BLOCKS, SAMPLES])
        if LARGEST:
            found = tl.math.exp2(tl.max(pairs, 2))
        else:
            rows = tl.minimum(query_samples - query_block * SAMPLES, SAMPLES)
            sizes = tl.minimum(key_samples - block * COLUMNS, COLUMNS)
            found = tl.sum(pairs, 2) / (sizes[:, None] * rows[None, :]).to(tl.float32)
        tl.store(
            importance + query_block[None, :] * row_stride + block[:, None], found,
            mask=(query_block < query_blocks)[None, :] & (block < key_blocks)[:, None],
        )  # fmt: skip

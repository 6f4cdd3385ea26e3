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
from psa_kernels.importance.triton_scratch import add_tile, read_shares, row_norms
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


class Plan(NamedTuple):
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
) -> Plan:  # fmt: skip
    how = spec.importance
    tile = tile_shape(capability(device), head_dim, dtype.itemsize, spec.block_key // how.key_stride)
    query_samples, key_samples = block_count(video_queries, how.query_stride), block_count(video_keys, how.key_stride)
    key_blocks, query_blocks = block_count(video_keys, spec.block_key), block_count(video_queries, spec.block_query)
    query_tiles = block_count(query_samples, tile["TILE_M"])
    return plan_of(
        importance_kernel, tile, (batch, heads, query_blocks, key_blocks), query_tiles, key_samples,
        (query_samples, key_samples, query_blocks, key_blocks), head_dim, group, spec, scale, device,
    )  # fmt: skip


def plan_of(
    kernel: triton.JITFunction, tile: dict[str, Any], pairs: tuple[int, int, int, int], query_tiles: int,
    key_samples: int, numbers: tuple[int, ...], head_dim: int, group: int, spec: AttentionSpec, scale: float,
    device: torch.device, **constants: int,
) -> Plan:  # fmt: skip
    """What a kernel takes that goes over items, tiles of `query_tiles` a head.

    Args:
        tile: of `tile_shape`.
        pairs: batch, heads, query blocks and key blocks.
        numbers, constants: what this kernel is given beside what both are.
    """
    batch, heads, query_blocks, key_blocks = pairs
    how = spec.importance
    rows, columns, warps = tile["TILE_M"], spec.block_key // how.key_stride, tile["num_warps"]
    items = batch * heads * query_tiles
    programs = min(items, tile.pop("programs") * multiprocessors(device))
    row_stride = block_count(key_blocks, 16) * 16
    entries = block_count(key_samples, tile["TILE_N"]) * rows * (tile["TILE_N"] // columns)
    entries = block_count(entries, READ) * READ
    launch = Launch(
        kernel, (programs,),
        (items, query_tiles, *numbers, row_stride, entries,
         # Never 0, by which the -inf of absent keys must not be multiplied.
         max(abs(scale) * math.log2(math.e), 1e-30)),
        PADDED_DIM=padded_dim(head_dim), SAMPLES=spec.block_query // how.query_stride, COLUMNS=columns,
        LARGEST=how.statistic == "max", NEGATIVE_SCALE=scale < 0, WARPS=warps, READ=READ, GROUP=group, **constants,
        **tile,
    )  # fmt: skip
    return Plan(
        tuple(row_dims(rows, warps)), tuple(column_dims(tile["TILE_N"], columns)),
        (batch, heads, query_blocks, row_stride), key_blocks, (programs, entries), (programs, rows), launch,
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
                    top, total = add_tile(scores, tile, reference, scale, top, total, scratch, COLUMNS, LARGEST, WARPS)
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
def reduce_item(
    scratch, importance, row_stride, total, first_sample, query_samples, key_samples, query_blocks, key_blocks,
    SAMPLES: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr, TILE_N: tl.constexpr, WARPS: tl.constexpr,
    READ: tl.constexpr,
):  # fmt: skip
    """Largest or mean probability of each pair of blocks, from the scratch and the row sums `total`."""
    TILE_M: tl.constexpr = total.shape[0]
    WIDTH: tl.constexpr = READ // TILE_M
    norm = row_norms(total, LARGEST, WARPS)
    norm = tl.where(first_sample + tl.arange(0, TILE_M) < query_samples, norm, -float("inf") if LARGEST else 0.0)
    query_block = first_sample // SAMPLES + tl.arange(0, TILE_M // SAMPLES)
    for first in range(0, key_blocks, WIDTH):
        block = first + tl.arange(0, WIDTH)
        pairs = read_shares(scratch + first * TILE_M, norm, SAMPLES, COLUMNS, LARGEST, TILE_N, WARPS, READ)
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

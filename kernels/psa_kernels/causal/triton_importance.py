"""How much each query block of a causal call needs each of its candidates, in Triton."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from psa_kernels.blocks import block_count
from psa_kernels.causal.layout import CausalLayout
from psa_kernels.causal.triton_queries import query_tiles
from psa_kernels.devices import capability
from psa_kernels.heads import group_size
from psa_kernels.importance.representatives import NATURAL_COLUMNS, column_dims, in_tiles, row_dims, smaller
from psa_kernels.importance.triton import Plan, plan_of, tile_shape
from psa_kernels.importance.triton_scratch import add_tile, read_shares, row_norms
from psa_kernels.layout import TokenLayout
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES
from psa_kernels.triton_rows import key_head


def block_importance(
    q: torch.Tensor, k: torch.Tensor, causal: CausalLayout, layout: TokenLayout, spec: AttentionSpec, scale: float
) -> torch.Tensor:
    """Importance S of the candidates of every row.

    Args:
        q, k: `[B, Nq, Hq, D]` and `[B, Nk, Hkv, D]`, all queries and keys, in the order of the model.
        scale: factor on the dot products.

    Returns:
        float32 `[B, Hq, rows, key blocks]`, up to a relative error of 0.1 %; what stands past a row's candidates is
        not written.
    """
    plan = _plan(q.shape[0], q.shape[2], q.shape[3], group_size(q, k), q.dtype, q.device, causal, spec, scale)
    how, pooled = spec.importance, spec.importance.estimator == "pooled"
    queries = query_tiles(q, causal, how.query_stride, pooled, plan.rows)
    keys = in_tiles(k, layout, how.key_stride, pooled, plan.columns, NATURAL_COLUMNS)
    importance = torch.empty(plan.padded, device=q.device)[..., : plan.key_blocks]
    scratch = torch.empty(plan.scratch, dtype=torch.uint16, device=q.device)
    tops = torch.empty(plan.tops, device=q.device)
    plan.launch(queries, keys, scratch, tops, importance)
    return importance


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    batch: int, heads: int, head_dim: int, group: int, dtype: torch.dtype, device: torch.device, causal: CausalLayout,
    spec: AttentionSpec, scale: float,
) -> Plan:  # fmt: skip
    how = spec.importance
    tile = causal_tile_shape(capability(device), head_dim, dtype.itemsize, spec.block_key // how.key_stride)
    query_samples = block_count(causal.lead + causal.video_queries, how.query_stride)
    key_samples = block_count(causal.video_keys, how.key_stride)
    pairs = batch, heads, len(causal.rows), block_count(causal.video_keys, spec.block_key)
    numbers = (
        causal.lead // how.query_stride, query_samples, block_count(key_samples, tile["TILE_N"]), causal.first_row,
        len(causal.rows),
    )  # fmt: skip
    return plan_of(
        importance_kernel, tile, pairs, block_count(query_samples, tile["TILE_M"]), key_samples, numbers, head_dim,
        group, spec, scale, device, RATIO=spec.block_query // spec.block_key,
    )  # fmt: skip


def causal_tile_shape(capability: tuple[int, int], head_dim: int, element_size: int, columns: int) -> dict[str, Any]:
    """As `importance.triton.tile_shape`; where two programs share a multiprocessor, masks leave fewer registers."""
    tile = tile_shape(capability, head_dim, element_size, columns)
    return tile | ({"TILE_M": 128, "TILE_N": max(64, columns)} if tile["programs"] == 2 else {})


@triton.jit(
    do_not_specialize=["items", "query_tiles", "first_sample", "query_samples", "key_tiles", "first_row", "rows"]
)
def importance_kernel(
    query_ptr, key_ptr, scratch_ptr, tops_ptr, importance_ptr, items, query_tiles, first_sample, query_samples,
    key_tiles, first_row, rows, row_stride, scratch_width, scale, PADDED_DIM: tl.constexpr, SAMPLES: tl.constexpr,
    COLUMNS: tl.constexpr, RATIO: tl.constexpr, LARGEST: tl.constexpr, NEGATIVE_SCALE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, READ: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Items of `TILE_M` query representatives of one head, the longest first: `importance.triton` says how.

    Here an item reads the keys before its last row's diagonal. Those that are no candidates of an earlier row of it are
    masked, in its last tiles and in the first one, which has candidates of every row that has any: its largest scores
    are the reference.

    Args:
        first_sample, query_samples: representatives before the first and up to the last that there are.
        first_row, rows: number of the first row among all query blocks, and of rows.
        RATIO: key blocks of a query block.
    """
    BLOCKS: tl.constexpr = TILE_N // COLUMNS
    QUERY_BLOCKS: tl.constexpr = TILE_M // SAMPLES
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * scratch_width
    tops_row = tops_ptr + tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    cells = tl.arange(0, TILE_N)[:, None] * PADDED_DIM + tl.arange(0, PADDED_DIM)[None, :]
    heads = items // query_tiles
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        head_index = (item % heads).to(tl.int64)
        query_tile = query_tiles - 1 - item // heads
        row = query_tile * QUERY_BLOCKS
        fewest = (first_row + row) * RATIO
        most = (first_row + tl.minimum(row + QUERY_BLOCKS, rows) - 1) * RATIO
        k_head = key_ptr + key_head(head_index, GROUP) * key_tiles * (TILE_N * PADDED_DIM) + cells
        again = True
        for attempt in range(2):
            if again:
                samples = (head_index * query_tiles + query_tile) * TILE_M + tl.arange(0, TILE_M)
                q = tl.load(query_ptr + samples[:, None] * PADDED_DIM + tl.arange(0, PADDED_DIM)[None, :])
                if NEGATIVE_SCALE:
                    q = -q
                reference = tl.load(tops_row)
                top = tl.full([TILE_M, smaller(4, BLOCKS)], -float("inf"), tl.float32)
                total = tl.zeros([TILE_M, 4 if LARGEST else smaller(4, BLOCKS)], tl.float32)
                # What only masked tiles need takes up no registers in the loop over the others.
                whole = tl.maximum(fewest // BLOCKS, 1)
                for index in tl.range(0, tl.cdiv(most, BLOCKS) - whole + 1, num_stages=STAGES):
                    tile = tl.where(index == 0, 0, whole + index - 1)
                    scores = tl.dot(q, tl.load(k_head + tile * (TILE_N * PADDED_DIM)).T, input_precision="ieee")
                    ends = (first_row + row + natural_rows(TILE_M, WARPS) // SAMPLES) * RATIO
                    past = tile * BLOCKS + blocks_of_columns(TILE_N, COLUMNS)[None, :] < ends[:, None]
                    scores = tl.where(past, scores, -float("inf"))
                    if (index == 0) & (attempt == 0):
                        # A row without candidates has no largest score.
                        reference = tl.where(ends > 0, tl.max(scores, 1) * scale, 0.0)
                    top, total = add_tile(scores, tile, reference, scale, top, total, scratch, COLUMNS, LARGEST, WARPS)
                for tile in tl.range(1, whole, num_stages=STAGES):
                    scores = tl.dot(q, tl.load(k_head + tile * (TILE_N * PADDED_DIM)).T, input_precision="ieee")
                    top, total = add_tile(scores, tile, reference, scale, top, total, scratch, COLUMNS, LARGEST, WARPS)
                tops = tl.max(top, 1) * scale
                # Scores that lie too far above the reference are weighed anew, relative to the largest one. The other
                # rows get the same as before, so that keys that only later rows see change nothing in them.
                above = tops - reference > 56
                again = tl.max(above.to(tl.int32), 0) > 0
                tl.store(tops_row, tl.where(above, tops, reference))
                # Other threads wrote the scratch that this one reads, and will read what the next item overwrites.
                tl.debug_barrier()
                reduce_item(
                    scratch, importance_ptr + head_index * rows * row_stride, row_stride, tl.sum(total, 1),
                    query_tile * TILE_M, first_sample, query_samples, first_row, rows, most, SAMPLES, COLUMNS, RATIO,
                    LARGEST, TILE_N, WARPS, READ,
                )  # fmt: skip
                tl.debug_barrier()


@triton.jit
def natural_rows(TILE_M: tl.constexpr, WARPS: tl.constexpr):
    """The natural number of each row of a tile."""
    R: tl.constexpr = row_dims(TILE_M, WARPS)
    row = tl.arange(0, TILE_M)
    lowest = row % R[3]
    pair = row // R[3] % R[2]
    warp = row // (R[3] * R[2]) % R[1]
    return ((warp * R[3] + lowest) * R[0] + row // (R[3] * R[2] * R[1])) * R[2] + pair


@triton.jit
def blocks_of_columns(TILE_N: tl.constexpr, COLUMNS: tl.constexpr):
    """The key block of each column of a tile."""
    D: tl.constexpr = column_dims(TILE_N, COLUMNS)
    column = tl.arange(0, TILE_N)
    pair = column // D[5] % D[4]
    thread = column // (D[5] * D[4] * D[3]) % D[2]
    return (thread * D[1] + column // (D[5] * D[4] * D[3] * D[2]) % D[1]) * D[4] + pair


@triton.jit
def reduce_item(
    scratch, importance, row_stride, total, first_of_tile, first_sample, query_samples, first_row, rows, key_blocks,
    SAMPLES: tl.constexpr, COLUMNS: tl.constexpr, RATIO: tl.constexpr, LARGEST: tl.constexpr, TILE_N: tl.constexpr,
    WARPS: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Largest or mean probability of each pair of blocks, from the scratch and the row sums `total`."""
    TILE_M: tl.constexpr = total.shape[0]
    WIDTH: tl.constexpr = READ // TILE_M
    norm = row_norms(total, LARGEST, WARPS)
    sample = first_of_tile + tl.arange(0, TILE_M)
    real = (sample >= first_sample) & (sample < query_samples)
    norm = tl.where(real, norm, -float("inf") if LARGEST else 0.0)
    row = first_of_tile // SAMPLES + tl.arange(0, TILE_M // SAMPLES)
    candidates = tl.where(row < rows, (first_row + row) * RATIO, 0)
    for first in range(0, key_blocks, WIDTH):
        block = first + tl.arange(0, WIDTH)
        pairs = read_shares(scratch + first * TILE_M, norm, SAMPLES, COLUMNS, LARGEST, TILE_N, WARPS, READ)
        if LARGEST:
            found = tl.math.exp2(tl.max(pairs, 2))
        else:
            last = tl.minimum(query_samples, (row + 1) * SAMPLES)
            count = last - tl.maximum(first_sample, row * SAMPLES)
            found = tl.sum(pairs, 2) / (count * COLUMNS).to(tl.float32)[None, :]
        tl.store(
            importance + row[None, :] * row_stride + block[:, None], found, mask=block[:, None] < candidates[None, :]
        )

"""How much each query block needs each key block, in Triton."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from psa_kernels.blocks import block_count
from psa_kernels.layout import TokenLayout
from psa_kernels.pyramid.triton import TritonPyramid, pool_tokens
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_rows import (
    capability,
    load_real_rows,
    load_rows,
    needs_wide_offsets,
    padded_dim,
    row_offsets,
    short_permutation,
    video_tokens,
)

# Representatives of queries, and most of keys, that are multiplied at a time.
TILE = 128


def block_importance(
    q: torch.Tensor,
    k: torch.Tensor,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    pyramid: TritonPyramid | None = None,
) -> torch.Tensor:
    """Importance S of every pair of video blocks (DESIGN: stage 2).

    Args:
        q, k: `[B, Nq, H, D]` and `[B, Nk, H, D]`, all queries and keys, in the order of the model.
        scale: factor on the dot products.
        pyramid: of k; spares the estimator `pooled` a pass over the keys where it has a level of the key stride.

    Returns:
        float32 `[B, H, query blocks, key blocks]`, non-negative.
    """
    how = spec.importance
    batch, _, heads, head_dim = q.shape
    permutation = short_permutation(layout)
    queries, keys = Rows.of_tokens(q, layout, how.query_stride), Rows.of_tokens(k, layout, how.key_stride)
    if how.estimator == "pooled":
        queries = queries if how.query_stride == 1 else Rows.of_means(pool_tokens(q, layout, (how.query_stride,))[0])
        keys = keys if how.key_stride == 1 else _pooled_keys(k, layout, spec, pyramid)
    query_samples = block_count(layout.video_queries, how.query_stride)
    key_samples = block_count(layout.video_keys, how.key_stride)
    key_blocks = block_count(layout.video_keys, spec.block_key)
    query_blocks = block_count(layout.video_queries, spec.block_query)
    # Rows lie at multiples of 64 bytes, which the allocation reads faster.
    padded = torch.empty(batch, heads, query_blocks, block_count(key_blocks, 16) * 16, device=q.device)
    importance = padded[..., :key_blocks]
    items = batch * heads * triton.cdiv(query_samples, TILE)
    programs = min(items, torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2)
    # One row a program, written and read again for each item: it stays in the cache.
    scratch = torch.empty(programs, TILE, _scratch_width(key_blocks), device=q.device)
    importance_kernel[(programs,)](
        queries.tensor, keys.tensor, scratch, importance, permutation, *queries.strides, *keys.strides,
        queries.step, queries.text_before, keys.step, keys.text_before, heads, items, query_samples, key_samples,
        query_blocks, key_blocks, importance.stride(2), scratch.shape[2],
        # Never 0, by which the -inf of absent keys must not be multiplied.
        max(abs(scale) * math.log2(math.e), 1e-30),
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim(head_dim), SAMPLES=spec.block_query // how.query_stride,
        COLUMNS=spec.block_key // how.key_stride, LARGEST=how.statistic == "max", NEGATIVE_SCALE=scale < 0,
        PERMUTED_QUERIES=queries.tokens and permutation is not None,
        PERMUTED_KEYS=keys.tokens and permutation is not None, WIDE=needs_wide_offsets(q, k),
        **tile_shape(capability(q.device), head_dim, q.element_size(), spec.block_key // how.key_stride),
    )  # fmt: skip
    return importance


def tile_shape(capability: tuple[int, int], head_dim: int, element_size: int, columns: int) -> dict[str, int]:
    """Tile sizes, pipeline stages and warps for `columns` samples a key block."""
    width = padded_dim(head_dim) * element_size
    if capability[0] == 9:
        keys = TILE if width <= 256 else 64
    else:
        # On capability 12, wider tiles spill where keys are permuted.
        keys = 64 if width <= 128 or capability[0] == 10 else 16 if capability[0] == 12 else 32
    stages = 2 if width <= 512 else 1
    return {"TILE_M": TILE, "TILE_N": max(keys, columns), "STAGES": stages, "num_warps": 8}


class Rows:
    """Representatives in memory: row i of a head lies at `step * i`, as a token (perhaps permuted) or as a mean."""

    def __init__(self, tensor: torch.Tensor, strides: tuple[int, ...], step: int, text_before: int, tokens: bool):
        self.tensor, self.strides, self.step, self.text_before, self.tokens = tensor, strides, step, text_before, tokens

    @classmethod
    def of_tokens(cls, x: torch.Tensor, layout: TokenLayout, stride: int) -> Rows:
        """One of every `stride` video tokens of `x`, `[B, N, H, D]`."""
        return cls(x, x.stride()[:3], stride, layout.text_before, True)

    @classmethod
    def of_means(cls, means: torch.Tensor, first: int = 0) -> Rows:
        """The rows of `means`, `[B, H, R, D]`, from `first` on."""
        batch, heads, rows, _ = means.stride()
        return cls(means, (batch, rows, heads), 1, first, False)


def _pooled_keys(k: torch.Tensor, layout: TokenLayout, spec: AttentionSpec, pyramid: TritonPyramid | None) -> Rows:
    stride = spec.importance.key_stride
    if pyramid is None or stride not in pyramid.factors:
        return Rows.of_means(pool_tokens(k, layout, (stride,))[0])
    before = pyramid.factors[: pyramid.factors.index(stride)]
    return Rows.of_means(pyramid.keys, sum(block_count(layout.video_keys, factor) for factor in before))


def _scratch_width(key_blocks: int) -> int:
    """Key blocks of a scratch row, up to whole tiles."""
    return block_count(key_blocks, TILE) * TILE


@triton.jit
def importance_kernel(
    q_ptr, k_ptr, scratch_ptr, importance_ptr, permutation, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn,
    stride_kh, q_step, q_before, k_step, k_before, heads, items, query_samples, key_samples, query_blocks, key_blocks,
    row_stride, scratch_width, scale, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SAMPLES: tl.constexpr,
    COLUMNS: tl.constexpr, LARGEST: tl.constexpr, NEGATIVE_SCALE: tl.constexpr, PERMUTED_QUERIES: tl.constexpr,
    PERMUTED_KEYS: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Items of `TILE_M` query representatives of one head, one after the other.

    The row sums of the softmax are known only at the end. Until then one number a row and key block waits in the
    scratch: log2 of the block's largest weight, or of the sum of its weights.
    """
    BLOCKS: tl.constexpr = TILE_N // COLUMNS
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * TILE_M * scratch_width
    tiles = tl.cdiv(query_samples, TILE_M)
    dims = tl.arange(0, PADDED_DIM)
    columns = tl.arange(0, TILE_N)
    places = tl.arange(0, TILE_M)[:, None] * scratch_width + tl.arange(0, BLOCKS)[None, :]
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        head_index = (item // tiles).to(tl.int64)
        batch, head = head_index // heads, head_index % heads
        k_head = k_ptr + batch * stride_kb + head * stride_kh
        sample = item % tiles * TILE_M + tl.arange(0, TILE_M)
        real = sample < query_samples
        token = video_tokens(sample * q_step, permutation, q_before, real, PERMUTED_QUERIES)
        q_head = q_ptr + batch * stride_qb + head * stride_qh
        q = load_real_rows(q_head + row_offsets(token, stride_qn, WIDE), dims, real, HEAD_DIM)
        if NEGATIVE_SCALE:
            q = -q
        top = tl.full([TILE_M], -float("inf"), tl.float32)
        total = tl.zeros([TILE_M], tl.float32)
        full = key_samples // TILE_N * TILE_N
        for first in tl.range(0, full, TILE_N, num_stages=STAGES):
            waiting, top, total = score_tile(
                q, k_head, permutation, first + columns, dims, stride_kn, k_step, k_before, key_samples, scale, top,
                total, HEAD_DIM, PADDED_DIM, COLUMNS, LARGEST, PERMUTED_KEYS, WIDE, False,
            )  # fmt: skip
            tl.store(scratch + first // COLUMNS + places, waiting)
        if full < key_samples:
            waiting, top, total = score_tile(
                q, k_head, permutation, full + columns, dims, stride_kn, k_step, k_before, key_samples, scale, top,
                total, HEAD_DIM, PADDED_DIM, COLUMNS, LARGEST, PERMUTED_KEYS, WIDE, True,
            )  # fmt: skip
            tl.store(scratch + full // COLUMNS + places, waiting)

        # Other threads of the program wrote what this one reads, and will read what the next item overwrites.
        tl.debug_barrier()
        norm = tl.where(real, top + tl.math.log2(total), float("inf"))
        reduce_item(
            scratch, scratch_width, importance_ptr + head_index * query_blocks * row_stride, row_stride, norm,
            item % tiles * TILE_M, query_samples, key_samples, query_blocks, key_blocks, SAMPLES, COLUMNS, LARGEST,
            TILE_M,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def score_tile(
    q, k_head, permutation, sample, dims, stride_kn, k_step, k_before, key_samples, scale, top, total,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr,
    PERMUTED: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One tile of key representatives: what waits in the scratch, `[TILE_M, blocks]`, and the softmax's states."""
    real = sample < key_samples
    if RAGGED:
        token = video_tokens(sample * k_step, permutation, k_before, real, PERMUTED)
        keys = load_real_rows(k_head + row_offsets(token, stride_kn, WIDE), dims, real, HEAD_DIM)
    else:
        token = video_tokens(sample * k_step, permutation, k_before, None, PERMUTED)
        keys = load_rows(k_head + row_offsets(token, stride_kn, WIDE), dims, HEAD_DIM, PADDED_DIM)
    scores = tl.dot(q, keys.T, input_precision="ieee")
    if RAGGED:
        scores = tl.where(real[None, :], scores, -float("inf"))
    blocks: tl.constexpr = [scores.shape[0], scores.shape[1] // COLUMNS, COLUMNS]
    if LARGEST:
        largest = tl.max(tl.reshape(scores, blocks), 2)
        waiting = largest * scale
        new_top = tl.maximum(top, tl.max(largest, 1) * scale)
        weights = tl.math.exp2(scores * scale - new_top[:, None])
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.math.exp2(scores * scale - new_top[:, None])
        waiting = tl.math.log2(tl.sum(tl.reshape(weights, blocks), 2)) + new_top[:, None]
    return waiting, new_top, total * tl.math.exp2(top - new_top) + tl.sum(weights, 1)


@triton.jit
def reduce_item(
    scratch, scratch_width, importance, row_stride, norm, first_sample, query_samples, key_samples, query_blocks,
    key_blocks, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """Largest or mean probability of each pair of blocks, from the scratch and the log2 of the row sums `norm`."""
    QUERY_BLOCKS: tl.constexpr = TILE_M // SAMPLES
    WIDTH: tl.constexpr = 64  # divides the width of the scratch
    query_block = first_sample // SAMPLES + tl.arange(0, QUERY_BLOCKS)
    for first in range(0, key_blocks, WIDTH):
        block = first + tl.arange(0, WIDTH)
        waiting = tl.load(scratch + tl.arange(0, TILE_M)[:, None] * scratch_width + block[None, :])
        pairs = tl.reshape(tl.math.exp2(waiting - norm[:, None]), [QUERY_BLOCKS, SAMPLES, WIDTH])
        if LARGEST:
            found = tl.max(pairs, 1)
        else:
            rows = tl.minimum(query_samples - query_block * SAMPLES, SAMPLES)
            sizes = tl.minimum(key_samples - block * COLUMNS, COLUMNS)
            found = tl.sum(pairs, 1) / (rows[:, None] * sizes[None, :]).to(tl.float32)
        tl.store(
            importance + query_block[:, None] * row_stride + block[None, :], found,
            mask=(query_block < query_blocks)[:, None] & (block < key_blocks)[None, :],
        )  # fmt: skip

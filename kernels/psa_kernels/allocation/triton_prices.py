"""What a finer level is worth, for every pair of blocks, in Triton; `prices.py` has the formula and says why."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from psa_kernels.allocation.prices import ERROR_MODELS, HIGHEST_PRICE, STEPS_PER_OCTAVE
from psa_kernels.allocation.triton_pairs import load_fractions, load_importance, store_outputs, store_prices
from psa_kernels.allocation.triton_statistics import (
    ScaledRows,
    empty_rows,
    key_spread,
    pooled_factors,
    query_energy,
    value_spread,
)
from psa_kernels.blocks import block_count
from psa_kernels.heads import group_size
from psa_kernels.layout import TokenLayout
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch
from psa_kernels.triton_rows import key_head

# Rows of prices lie at multiples of so many entries, 16 bytes.
ROW_UNIT = 8
# Query blocks and key blocks of a program, and its warps: with five levels its errors still stay in registers, and two
# such programs share a multiprocessor.
TILE = {"TILE_M": 64, "TILE_N": 32, "num_warps": 8}


def upgrade_prices(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    importance: torch.Tensor,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    of_keys: ScaledRows | None = None,
    of_values: tuple[ScaledRows, torch.Tensor] | None = None,
) -> torch.Tensor:
    """At which price of cost each level of each pair of blocks pays.

    Args:
        q, k, v: `[B, Nq, Hq, D]` and twice `[B, Nk, Hkv, D]`, all tokens, in the order of the model.
        importance: float32 `[B, Hq, query blocks, key blocks]`, from 0 to 1, whose rows lie at equal distances.
        scale: factor on the dot products.
        of_keys, of_values: of `key_spread` and `value_spread`, where they are known already.

    Returns:
        `empty_prices`, filled: what the reference returns, but for roundings.
    """
    energy = query_energy(q, layout, spec, scale)
    spread = key_spread(k, layout, spec) if of_keys is None else of_keys
    centres, varied = value_spread(v, layout, spec) if of_values is None else of_values
    outputs, totals = mean_outputs(q, importance, centres)
    batch, heads, query_blocks, key_blocks = importance.shape
    prices = empty_prices(len(spec.levels), batch, heads, query_blocks, key_blocks, q.device)
    _pricing(
        *importance.shape, group_size(q, k), importance.stride(2), prices.stride(3), energy.fractions.shape[-1],
        q.device, spec,
    )(
        energy.fractions, energy.tops, spread.fractions, spread.tops, varied, centres.fractions, centres.tops,
        centres.squares, outputs.fractions, outputs.tops, outputs.squares, totals, importance, prices,
    )  # fmt: skip
    return prices


@lru_cache(maxsize=KEPT_LAUNCHES)
def _pricing(
    batch: int, heads: int, query_blocks: int, key_blocks: int, group: int, importance_stride: int, price_stride: int,
    padded: int, device: torch.device, spec: AttentionSpec,
) -> Launch:  # fmt: skip
    tiles = block_count(query_blocks, TILE["TILE_M"]), block_count(key_blocks, TILE["TILE_N"])
    return Launch(
        price_kernel, (batch * heads, *tiles), (query_blocks, key_blocks, importance_stride, price_stride),
        **price_constants(spec, padded, group),
    )  # fmt: skip


def price_constants(spec: AttentionSpec, padded: int, group: int) -> dict[str, Any]:
    """Constants of a kernel that finds prices, to which one of causal calls adds its own; and its warps."""
    model = ERROR_MODELS[spec.error_model]
    return {
        "PADDED_DIM": padded, "LEVELS": spec.levels, "POOLED": pooled_factors(spec), "BLOCK_KEY": spec.block_key,
        "SKIP": spec.rest == "skip", "COVARIANCE": model.covariance, "EXPONENT": model.exponent,
        "CONVEXITY": model.convexity, "STEPS": STEPS_PER_OCTAVE, "HIGHEST": HIGHEST_PRICE, "DEPTH": min(64, padded),
        "GROUP": group, **TILE,
    }  # fmt: skip


def empty_prices(
    levels: int, batch: int, heads: int, query_blocks: int, key_blocks: int, device: torch.device
) -> torch.Tensor:
    """Uninitialized int16 `[levels, B, H, query blocks, key blocks]` whose rows lie as the allocation reads them.

    Every row is part of one of a multiple of `ROW_UNIT` entries; what lies past its end has to be `HIGHEST_PRICE`.
    """
    padded = block_count(key_blocks, ROW_UNIT) * ROW_UNIT
    rows = torch.empty(levels, batch, heads, query_blocks, padded, dtype=torch.int16, device=device)
    return rows[..., :key_blocks]


def mean_outputs(q: torch.Tensor, importance: torch.Tensor, centres: ScaledRows) -> tuple[ScaledRows, torch.Tensor]:
    """Means of the blocks' mean values, weighted by importance: `[B, Hq, query blocks, D]`; the sums of these weights.

    Args:
        q: `[B, Nq, Hq, D]`: for its shape alone.
        centres: `[B, Hkv, key blocks, D]`.
    """
    query_blocks = importance.shape[2]
    outputs = empty_rows(q, (), query_blocks, squares=True)
    totals = torch.empty_like(outputs.tops)
    _, key_heads, _, padded = centres.fractions.shape
    _averaging(*importance.shape, q.shape[2] // key_heads, importance.stride(2), padded, q.device)(
        importance, centres.fractions, centres.tops, outputs.fractions, outputs.tops, outputs.squares, totals
    )
    return outputs, totals


@lru_cache(maxsize=KEPT_LAUNCHES)
def _averaging(
    batch: int, heads: int, query_blocks: int, key_blocks: int, group: int, importance_stride: int, padded: int,
    device: torch.device,
) -> Launch:  # fmt: skip
    return Launch(
        output_kernel, (batch * heads, block_count(query_blocks, TILE["TILE_M"])),
        (query_blocks, key_blocks, importance_stride), PADDED_DIM=padded, GROUP=group, **TILE,
    )  # fmt: skip


@triton.jit
def output_kernel(
    importance_ptr, centres_ptr, centre_tops_ptr, outputs_ptr, output_tops_ptr, output_squares_ptr, totals_ptr,
    query_blocks, key_blocks, importance_stride, PADDED_DIM: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Weighted means of one head's centres, for `TILE_M` query blocks."""
    head_index = tl.program_id(0).to(tl.int64)
    queries = head_index * query_blocks
    row = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    real_row = row < query_blocks
    total = tl.zeros([TILE_M], tl.float32)
    output = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    for first in tl.range(0, key_blocks, TILE_N, num_stages=3):
        block = first + tl.arange(0, TILE_N)
        real = block < key_blocks
        weighed = real_row[:, None] & real[None, :]
        weight = load_importance(importance_ptr, queries, row, block, importance_stride, weighed)
        total += tl.sum(weight, 1)
        keys = key_head(head_index, GROUP) * key_blocks
        centres = load_fractions(centres_ptr, keys, block, real, 0, PADDED_DIM, PADDED_DIM)
        tops = tl.load(centre_tops_ptr + keys + block, mask=real, other=0.0)
        # In float16: of even importance each weight is about 1, of all importance on one block `key_blocks`.
        top = tl.max(tops, 0)
        weight *= (tops * (key_blocks / tl.where(top > 0, top, 1)))[None, :]
        output += tl.dot(weight.to(tl.float16), centres) * top
    store_outputs(
        outputs_ptr, output_tops_ptr, output_squares_ptr, totals_ptr, queries, row, real_row, total, output,
        key_blocks, PADDED_DIM,
    )  # fmt: skip


@triton.jit
def price_kernel(
    energy_ptr, energy_tops_ptr, spread_ptr, spread_tops_ptr, varied_ptr, centres_ptr, centre_tops_ptr,
    centre_squares_ptr, outputs_ptr, output_tops_ptr, output_squares_ptr, totals_ptr, importance_ptr, prices_ptr,
    query_blocks, key_blocks, importance_stride, price_stride, PADDED_DIM: tl.constexpr, LEVELS: tl.constexpr,
    POOLED: tl.constexpr, BLOCK_KEY: tl.constexpr, SKIP: tl.constexpr, COVARIANCE: tl.constexpr,
    EXPONENT: tl.constexpr, CONVEXITY: tl.constexpr, STEPS: tl.constexpr, HIGHEST: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Prices of `TILE_M` query blocks and `TILE_N` key blocks of one head."""
    store_prices(
        energy_ptr, energy_tops_ptr, spread_ptr, spread_tops_ptr, varied_ptr, centres_ptr, centre_tops_ptr,
        centre_squares_ptr, outputs_ptr, output_tops_ptr, output_squares_ptr, totals_ptr, importance_ptr, prices_ptr,
        query_blocks, key_blocks, importance_stride, price_stride, None, 0, 0, PADDED_DIM, LEVELS, POOLED, BLOCK_KEY,
        SKIP, COVARIANCE, EXPONENT, CONVEXITY, STEPS, HIGHEST, TILE_M, TILE_N, DEPTH, GROUP,
    )  # fmt: skip

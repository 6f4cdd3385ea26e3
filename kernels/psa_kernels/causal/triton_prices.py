"""What a finer level is worth, for every candidate of every row of a causal call, in Triton.

As `allocation.triton_prices`, whose pieces it uses, but a row's sums and means are over its candidates.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from psa_kernels.allocation.triton_pairs import load_fractions, load_importance, store_outputs, store_prices
from psa_kernels.allocation.triton_prices import TILE, empty_prices, price_constants
from psa_kernels.allocation.triton_statistics import empty_rows, key_spread, value_spread
from psa_kernels.blocks import block_count
from psa_kernels.causal.layout import CausalLayout
from psa_kernels.causal.triton_queries import query_energy
from psa_kernels.heads import group_size
from psa_kernels.layout import TokenLayout
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch
from psa_kernels.triton_rows import key_head


def upgrade_prices(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    importance: torch.Tensor,
    causal: CausalLayout,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
) -> torch.Tensor:
    """At which price of cost each level of each candidate pays.

    Args:
        q, k, v: `[B, Nq, Hq, D]` and twice `[B, Nk, Hkv, D]`, all tokens, in the order of the model.
        importance: of `triton_importance.block_importance`: float32 `[B, Hq, rows, key blocks]`.
        scale: factor on the dot products.

    Returns:
        `empty_prices`: what the reference returns, but for roundings; `HIGHEST_PRICE` for kept blocks, and for the
        block after the candidates where these are of an odd number. What stands past that is not written.
    """
    energy = query_energy(q, causal, spec, scale)
    spread = key_spread(k, layout, spec)
    centres, varied = value_spread(v, layout, spec)
    batch, heads, rows, key_blocks = importance.shape
    outputs = empty_rows(q, (), rows, squares=True)
    totals = torch.empty_like(outputs.tops)
    prices = empty_prices(len(spec.levels), batch, heads, rows, key_blocks, q.device)
    average, price = _plan(
        batch, heads, key_blocks, group_size(q, k), importance.stride(2), prices.stride(3), energy.fractions.shape[-1],
        q.device, causal, spec,
    )  # fmt: skip
    average(importance, centres.fractions, centres.tops, outputs.fractions, outputs.tops, outputs.squares, totals)
    price(
        energy.fractions, energy.tops, spread.fractions, spread.tops, varied, centres.fractions, centres.tops,
        centres.squares, outputs.fractions, outputs.tops, outputs.squares, totals, importance, prices,
    )  # fmt: skip
    return prices


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    batch: int, heads: int, key_blocks: int, group: int, importance_stride: int, price_stride: int, padded: int,
    device: torch.device, causal: CausalLayout, spec: AttentionSpec,
) -> tuple[Launch, Launch]:  # fmt: skip
    """What fills the mean outputs, and the prices."""
    rows, ratio = len(causal.rows), spec.block_query // spec.block_key
    of_rows = block_count(rows, TILE["TILE_M"])
    of_blocks = max(1, block_count(causal.candidates(causal.rows[-1]), TILE["TILE_N"]))
    average = Launch(
        output_kernel, (batch * heads, of_rows), (causal.first_row, rows, key_blocks, importance_stride),
        RATIO=ratio, PADDED_DIM=padded, GROUP=group, **TILE,
    )  # fmt: skip
    price = Launch(
        price_kernel, (batch * heads, of_rows, of_blocks),
        (causal.first_row, rows, key_blocks, importance_stride, price_stride, spec.keep_first, spec.keep_last),
        RATIO=ratio, **price_constants(spec, padded, group),
    )  # fmt: skip
    return average, price


@triton.jit(do_not_specialize=["first_row", "rows", "key_blocks"])
def output_kernel(
    importance_ptr, centres_ptr, centre_tops_ptr, outputs_ptr, output_tops_ptr, output_squares_ptr, totals_ptr,
    first_row, rows, key_blocks, importance_stride, RATIO: tl.constexpr, PADDED_DIM: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Means of the candidates' mean values, weighted by importance, of `TILE_M` rows of one head."""
    head_index = tl.program_id(0).to(tl.int64)
    queries = head_index * rows
    row = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    real_row = row < rows
    candidates = tl.where(real_row, (first_row + row) * RATIO, 0)
    total = tl.zeros([TILE_M], tl.float32)
    output = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    for first in tl.range(0, tl.max(candidates, 0), TILE_N, num_stages=2):
        block = first + tl.arange(0, TILE_N)
        real = block < key_blocks
        past = block[None, :] < candidates[:, None]
        weight = load_importance(importance_ptr, queries, row, block, importance_stride, past)
        total += tl.sum(weight, 1)
        keys = key_head(head_index, GROUP) * key_blocks
        centres = load_fractions(centres_ptr, keys, block, real, 0, PADDED_DIM, PADDED_DIM)
        # What is not a number must not reach rows of which the block is no candidate.
        centres = tl.where(centres == centres, centres, 0.0)
        tops = tl.load(centre_tops_ptr + keys + block, mask=real, other=0.0)
        # In float16: of even importance each weight is at least 1, of all importance on one block `key_blocks`. What is
        # largest is so among a row's candidates: a later block must not change how weights are rounded.
        seen = tl.where(past, tops[None, :], 0.0)
        top = tl.max(seen, 1)
        weight *= seen * (key_blocks / tl.where(top > 0, top, 1))[:, None]
        output += tl.dot(weight.to(tl.float16), centres) * top[:, None]
    store_outputs(
        outputs_ptr, output_tops_ptr, output_squares_ptr, totals_ptr, queries, row, real_row, total, output,
        key_blocks, PADDED_DIM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_row", "rows", "key_blocks", "keep_first", "keep_last"])
def price_kernel(
    energy_ptr, energy_tops_ptr, spread_ptr, spread_tops_ptr, varied_ptr, centres_ptr, centre_tops_ptr,
    centre_squares_ptr, outputs_ptr, output_tops_ptr, output_squares_ptr, totals_ptr, importance_ptr, prices_ptr,
    first_row, rows, key_blocks, importance_stride, price_stride, keep_first, keep_last, RATIO: tl.constexpr,
    PADDED_DIM: tl.constexpr, LEVELS: tl.constexpr, POOLED: tl.constexpr, BLOCK_KEY: tl.constexpr,
    SKIP: tl.constexpr, COVARIANCE: tl.constexpr, EXPONENT: tl.constexpr, CONVEXITY: tl.constexpr,
    STEPS: tl.constexpr, HIGHEST: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Prices of `TILE_M` rows and `TILE_N` key blocks of one head, if there is a candidate among them."""
    row = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    candidates = tl.where(row < rows, (first_row + row) * RATIO, 0)
    if tl.program_id(2) * TILE_N < tl.max(candidates, 0):
        store_prices(
            energy_ptr, energy_tops_ptr, spread_ptr, spread_tops_ptr, varied_ptr, centres_ptr, centre_tops_ptr,
            centre_squares_ptr, outputs_ptr, output_tops_ptr, output_squares_ptr, totals_ptr, importance_ptr,
            prices_ptr, rows, key_blocks, importance_stride, price_stride, candidates, keep_first, keep_last,
            PADDED_DIM, LEVELS, POOLED, BLOCK_KEY, SKIP, COVARIANCE, EXPONENT, CONVEXITY, STEPS, HIGHEST, TILE_M,
            TILE_N, DEPTH, GROUP,
        )  # fmt: skip

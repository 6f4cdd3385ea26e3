"""From importance to the lists of blocks in Triton: one program a row, without sorting."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from psa_kernels.allocation.triton_boundaries import kind_of, level_boundaries
from psa_kernels.allocation.triton_lists import write_list
from psa_kernels.blocks import next_power_of_2, ranks_below
from psa_kernels.known_calls import recall
from psa_kernels.lists import BlockLists, id_dtype, list_width
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape


def allocate(
    importance: torch.Tensor, coarsest: torch.Tensor | None, spec: AttentionSpec, known: dict[Any, Any] | None = None
) -> BlockLists:
    """Give every pair of blocks a level.

    Args:
        importance: non-negative float32 `[B, Hq, query blocks, key blocks]` whose rows lie at equal distances; fastest
            where these are multiples of 16.
        coarsest: None, or int32 `[B, Hkv, key blocks]`: index of the coarsest level a key block may have.
        known: None, or the answers of calls like this one, as in `Call`.

    Returns:
        The same lists as the reference.
    """
    key_blocks, device = importance.shape[3], importance.device
    cap_heads = None if coarsest is None else coarsest.shape[1]
    ids_shape, counts_shape, launch = recall(
        known,
        ("allocation", cap_heads),
        lambda: _plan(*importance.shape, importance.stride(2), device, cap_heads, spec),
    )
    ids = torch.empty(ids_shape, dtype=id_dtype(key_blocks), device=device)
    counts = torch.empty(counts_shape, dtype=torch.int32, device=device)
    launch(importance, coarsest, ids, counts)
    return BlockLists(ids, counts, key_blocks, spec.levels)


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    batch: int, heads: int, query_blocks: int, key_blocks: int, row_stride: int, device: torch.device,
    cap_heads: int | None, spec: AttentionSpec,
) -> tuple[Shape, Shape, Launch]:  # fmt: skip
    """Shapes of the ids and of the counts, and what fills them."""
    rows, width = (batch, heads, query_blocks), list_width(spec, key_blocks)
    rows_of_cap = query_blocks * heads // (cap_heads or heads)
    return (*rows, width), (*rows, len(spec.levels)), Launch(
        allocation_kernel, (batch * heads * query_blocks,), (row_stride, rows_of_cap, key_blocks, width),
        # Shares of the count depend on no data, so the ranks at which levels end are known here, exactly.
        ENDS=tuple(ranks_below(threshold, key_blocks) for threshold in spec.thresholds),
        FLOOR=ranks_below(spec.floor, key_blocks), THRESHOLDS=spec.thresholds, MASS=spec.rule == "mass",
        CAP=cap_heads is not None, **row_shape(key_blocks, spec.rule == "mass"),
    )  # fmt: skip


def row_shape(key_blocks: int, mass: bool) -> dict[str, int | tuple[int, ...]]:
    """Parts in which a row is held, entries that are listed at a time, and warps: one, where it can hold the row.

    The mass rule takes a second warp for more than 1,024: of 1,182 blocks, 0.72 instead of 1.06 ms on an H200.
    """
    width = max(128, next_power_of_2(key_blocks))
    half = width // 2
    rest = max(128, next_power_of_2(key_blocks - half))
    widths = (half, rest) if half >= 128 and rest < half else (width,)
    warps = width // 1024 if width > 2048 or (mass and width == 2048) else 1
    # Three counters of ten bits share a sum of as many ones.
    return {"WIDTHS": widths, "CHUNK": min(width, 256 if width <= 2048 else 512), "num_warps": warps}


@triton.jit
def allocation_kernel(
    importance_ptr, coarsest_ptr, ids_ptr, counts_ptr, row_stride, rows_of_cap, key_blocks, list_width,
    ENDS: tl.constexpr, FLOOR: tl.constexpr, THRESHOLDS: tl.constexpr, MASS: tl.constexpr, CAP: tl.constexpr,
    WIDTHS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The boundaries of one row's levels, then its list.

    Args:
        rows_of_cap: how many neighbouring rows have the same coarsest levels, those of one head of the keys.
    """
    row = tl.program_id(0).to(tl.int64)
    importance = importance_ptr + row * row_stride
    boundaries, lasts = level_boundaries(
        importance, row_stride, (key_blocks,), ENDS, FLOOR, THRESHOLDS, MASS, WIDTHS, CHUNK
    )
    caps = ()
    if CAP:
        caps += (coarsest_ptr + row // rows_of_cap * key_blocks,)
    write_list(
        ids_ptr, counts_ptr, row, key_blocks, list_width, kind_of,
        (importance, caps, row_stride, (key_blocks,), boundaries, lasts), len(ENDS), CHUNK,
    )  # fmt: skip

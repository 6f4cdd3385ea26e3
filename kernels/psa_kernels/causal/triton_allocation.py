"""From the importance of a causal call to its lists under the rules `count` and `mass`, in Triton: one program a row.

As `allocation.triton`, whose pieces it uses, but each row has candidates of its own number, and of these some are kept:
they rank before all others and get the finest level.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from psa_kernels.allocation.triton import row_shape
from psa_kernels.allocation.triton_boundaries import kind_of, level_boundaries
from psa_kernels.allocation.triton_lists import write_list
from psa_kernels.causal.layout import CausalLayout
from psa_kernels.causal.widths import causal_list_width
from psa_kernels.lists import BlockLists, id_dtype
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape


def allocate(
    importance: torch.Tensor, coarsest: torch.Tensor | None, causal: CausalLayout, spec: AttentionSpec
) -> BlockLists:
    """Give every candidate of every row a level.

    Args:
        importance: of `triton_importance.block_importance`: float32 `[B, Hq, rows, key blocks]`.
        coarsest: None, or int32 `[B, Hkv, key blocks]`: index of the coarsest level a key block may have.

    Returns:
        The levels of the reference; blocks that are no candidates are last in each row, as far as there is room.
    """
    key_blocks, device = importance.shape[3], importance.device
    cap_heads = None if coarsest is None else coarsest.shape[1]
    ids_shape, counts_shape, launch = _plan(
        *importance.shape[:2], key_blocks, importance.stride(2), device, cap_heads, causal, spec
    )
    ids = torch.empty(ids_shape, dtype=id_dtype(key_blocks), device=device)
    counts = torch.empty(counts_shape, dtype=torch.int32, device=device)
    launch(importance, coarsest, ids, counts)
    return BlockLists(ids, counts, key_blocks, spec.levels)


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    batch: int, heads: int, key_blocks: int, row_stride: int, device: torch.device, cap_heads: int | None,
    causal: CausalLayout, spec: AttentionSpec,
) -> tuple[Shape, Shape, Launch]:  # fmt: skip
    """Shapes of the ids and of the counts, and what fills them."""
    rows, width = (batch, heads, len(causal.rows)), causal_list_width(spec, key_blocks)
    rows_of_cap = rows[2] * heads // (cap_heads or heads)
    most = max(1, causal.candidates(causal.rows[-1]))
    return (*rows, width), (*rows, len(spec.levels)), Launch(
        allocation_kernel, (batch * heads * rows[2],),
        (row_stride, rows_of_cap, rows[2], causal.first_row, key_blocks, width, spec.keep_first, spec.keep_last),
        RATIO=spec.block_query // spec.block_key, THRESHOLDS=spec.thresholds, FLOOR=spec.floor,
        MASS=spec.rule == "mass", CAP=cap_heads is not None, **row_shape(most, spec.rule == "mass"),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["rows_of_cap", "rows", "first_row", "key_blocks", "list_width", "keep_first", "keep_last"]
)
def allocation_kernel(
    importance_ptr, coarsest_ptr, ids_ptr, counts_ptr, row_stride, rows_of_cap, rows, first_row, key_blocks, list_width,
    keep_first, keep_last, RATIO: tl.constexpr, THRESHOLDS: tl.constexpr, FLOOR: tl.constexpr, MASS: tl.constexpr,
    CAP: tl.constexpr, WIDTHS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The boundaries of one row's levels, then its list.

    Args:
        rows_of_cap: how many neighbouring rows of the lists have the same coarsest levels.
        rows, first_row: rows of a head, and the number of the first of them among all query blocks.
        RATIO: key blocks of a query block.
    """
    row = tl.program_id(0).to(tl.int64)
    candidates = (first_row + tl.program_id(0) % rows) * RATIO
    count = candidates - tl.minimum(keep_first + keep_last, candidates)
    importance = importance_ptr + row * row_stride
    free = (candidates, keep_first, candidates - keep_last, count)
    boundaries, lasts = level_boundaries(
        importance, row_stride, free, THRESHOLDS, FLOOR, THRESHOLDS, MASS, WIDTHS, CHUNK
    )
    caps = ()
    if CAP:
        caps += (coarsest_ptr + row // rows_of_cap * key_blocks,)
    write_list(
        ids_ptr, counts_ptr, row, key_blocks, list_width, kind_of,
        (importance, caps, row_stride, free, boundaries, lasts), len(THRESHOLDS), CHUNK,
    )  # fmt: skip

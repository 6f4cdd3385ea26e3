"""Dense attention by the kernels: every key block is read in full, so nothing has to be chosen."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch

from psa_kernels.attention import psa_attention
from psa_kernels.backends.served import pays_and_serves
from psa_kernels.call import make_call
from psa_kernels.lists import BlockLists, id_dtype
from psa_kernels.spec import AttentionSpec

FULL = AttentionSpec(levels=(1,), thresholds=(1.0,))


def serves_full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, implementation: str) -> tuple[bool, str | None]:
    """Whether an implementation should compute dense attention, as `pays_and_serves` says it."""
    return pays_and_serves(make_call(q, k, v, FULL), implementation)


def full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    implementation: str,
    kept: MutableMapping[Any, BlockLists] | None = None,
) -> torch.Tensor:
    """Dense attention, equal to `scaled_dot_product_attention` to rounding.

    Args:
        q, k, v: as of `psa_attention`; text needs no place of its own, as all tokens are attended exactly.
        implementation: as of `psa_attention`.
        kept: where the lists of one shape are put for the next call of it; they take 2 bytes (4 beyond 32,767 key
            blocks) for each query block and key block, head and batch item.

    Returns:
        `[B, Nq, H, D]`, contiguous.

    Raises:
        ValueError: the implementation cannot serve the call.
    """
    call = make_call(q, k, v, FULL)
    shape = (q.shape[0], q.shape[2], call.query_blocks, call.key_blocks)
    kept = {} if kept is None else kept
    if (lists := kept.get((*shape, q.device))) is None:
        lists = kept[(*shape, q.device)] = full_lists(shape, q.device)
    out: torch.Tensor = psa_attention(q, k, v, FULL, implementation=implementation, lists=lists)
    return out


def full_lists(shape: tuple[int, int, int, int], device: torch.device) -> BlockLists:
    """The lists of `FULL`: every row has every key block at the one level.

    Args:
        shape: batch items, heads, query blocks, key blocks.
    """
    key_blocks = shape[3]
    ids = torch.arange(key_blocks, dtype=id_dtype(key_blocks), device=device).expand(shape).contiguous()
    counts = torch.full((*shape[:3], 1), key_blocks, dtype=torch.int32, device=device)
    return BlockLists(ids, counts, key_blocks, FULL.levels)

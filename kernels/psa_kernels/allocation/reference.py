"""From importance to levels: which key block is read at which pooling factor, in PyTorch."""

from __future__ import annotations

import torch

from psa_kernels.lists import BlockLists, list_width
from psa_kernels.spec import AttentionSpec


def allocate(importance: torch.Tensor, coarsest: torch.Tensor | None, spec: AttentionSpec) -> BlockLists:
    """Give every pair of blocks a level.

    Args:
        importance: non-negative `[B, Hq, query blocks, key blocks]`.
        coarsest: None, or int64 `[B, Hkv, key blocks]`: index of the coarsest level a key block may have.

    Returns:
        The lists; no row of them is empty.
    """
    level = ranked_levels(importance, coarsest, spec)
    return BlockLists.from_levels(level, len(spec.levels), list_width(spec, level.shape[-1]), spec.levels)


def ranked_levels(
    importance: torch.Tensor, coarsest: torch.Tensor | None, spec: AttentionSpec, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """The level of every pair of blocks: int64 `[B, Hq, query blocks, key blocks]`, that after the last where skipped.

    Args:
        importance, coarsest: as in `allocate`.
        kept: None, or bool `[key blocks]`: those that are before all others and get the finest level in any case.
    """
    # Equal importance keeps the order of the blocks, so the result does not depend on the sorting algorithm.
    first = importance if kept is None else importance.masked_fill(kept, torch.inf)
    order = first.sort(dim=-1, descending=True, stable=True).indices
    ranked = _levels_by_rank(importance.gather(-1, order), spec)
    level = torch.empty_like(ranked).scatter_(-1, order, ranked)
    if coarsest is not None:
        attended = level < len(spec.levels)
        caps = coarsest.repeat_interleave(level.shape[1] // coarsest.shape[1], dim=1)
        level = torch.where(attended, torch.minimum(level, caps[:, :, None]), level)
    return level if kept is None else level.masked_fill(kept, 0)


def _levels_by_rank(importance: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Level index of the blocks of each row, whose importance is given in descending order."""
    blocks = importance.shape[-1]
    # The quotient of two integers rounds to the same float64 as the decimal number that equals it: 3 / 20 is 0.15.
    count_before = torch.arange(blocks, device=importance.device, dtype=torch.float64) / max(blocks, 1)
    if spec.rule == "count":
        before = count_before.expand_as(importance)
    else:
        mass = importance.double()
        before = (mass.cumsum(-1) - mass) / mass.sum(-1, keepdim=True)
    level = torch.zeros(importance.shape, dtype=torch.int64, device=importance.device)
    for threshold in spec.thresholds:
        # Every share is below 1 in exact arithmetic, also where rounding makes it 1.
        if threshold < 1:
            level += before >= threshold
    return level.masked_fill_(count_before < spec.floor, 0)

"""The level of every pair of blocks so that each row costs what it may and errs least, in PyTorch."""

from __future__ import annotations

import math

import torch

from psa_kernels.allocation.prices import HIGHEST_PRICE
from psa_kernels.costs import row_budget, unit_costs
from psa_kernels.lists import BlockLists, list_width
from psa_kernels.spec import AttentionSpec


def allocate_budget(prices: torch.Tensor, importance: torch.Tensor, spec: AttentionSpec) -> BlockLists:
    """Spend on each row of pairs the share `spec.density` of the cost of dense attention, where it helps most.

    The lowest price that the row can afford is found by bisection. What is left then goes to upgrades that the next
    lower price would buy, in the order of the blocks. The row's most important block is never skipped, even if it costs
    more than the budget.

    Args:
        prices: of `upgrade_prices`: int16 `[levels, B, H, query blocks, key blocks]`.
        importance: `[B, H, query blocks, key blocks]`.

    Returns:
        The lists; the cost of a row is at most the budget, and less than it by less than a step between two levels.
    """
    level = budget_levels(prices, importance, spec)
    return BlockLists.from_levels(level, len(spec.levels), list_width(spec, prices.shape[-1]), spec.levels)


def budget_levels(
    prices: torch.Tensor, importance: torch.Tensor, spec: AttentionSpec, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """The level of every pair of blocks: int64 `[B, H, query blocks, key blocks]`, that after the last where skipped.

    Args:
        prices, importance: as in `allocate_budget`.
        kept: None, or bool `[key blocks]`: those that get the finest level whatever that costs.
    """
    units = unit_costs(spec)
    key_blocks = prices.shape[-1]
    budget = row_budget(spec, key_blocks)
    prices = prices.int()
    if kept is not None:
        prices = prices.masked_fill(kept, HIGHEST_PRICE + 1)
    if spec.rest == "skip":
        most_important = importance.argmax(-1, keepdim=True)
        prices[-1].scatter_(-1, most_important, HIGHEST_PRICE + 1)

    def levels_at(price: torch.Tensor) -> torch.Tensor:
        return (prices < price).sum(0)

    cost_of = torch.tensor(units, device=prices.device)
    # A price above all is affordable but for the most important block; -1 stands for one that is known not to be.
    low = torch.full_like(prices[0, ..., :1], -1)
    high = torch.full_like(low, HIGHEST_PRICE + 1)
    for _ in range(math.ceil(math.log2(HIGHEST_PRICE + 2))):
        middle = (low + high) // 2
        affordable = cost_of[levels_at(middle)].sum(-1, keepdim=True) <= budget
        low, high = torch.where(affordable, low, middle), torch.where(affordable, middle, high)
    level, finer = levels_at(high), levels_at(high - 1)
    extra = (cost_of[finer] - cost_of[level]).cumsum(-1)
    # The most important block may alone have cost more.
    left = (budget - cost_of[level].sum(-1, keepdim=True)).clamp_min(0)
    upgraded = extra <= left
    # The first pair whose upgrade is too dear gets the best that the rest pays for.
    first = upgraded.sum(-1, keepdim=True).clamp(max=level.shape[-1] - 1)
    left = left - torch.where(upgraded, extra, 0).amax(-1, keepdim=True)
    level = torch.where(upgraded, finer, level)
    affordable = cost_of <= cost_of[level.gather(-1, first)] + left
    level.scatter_(-1, first, affordable.int().argmax(-1, keepdim=True))
    return level

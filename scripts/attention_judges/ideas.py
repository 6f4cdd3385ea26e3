"""Ideas that the operator does not have, at the densities of the settings: does more of the error go away?

mass      other estimates of the share of attention that a block holds, for the rules count and budget. `means` is the
          log-sum-exp of the products of the means of 8 queries and 8 keys, as the estimator pooled, mean has it; `means
          and variance` adds half the variance that logits have inside such a group of keys; `exact` is the true share.
budget    one price of error for the rows of a head, or for all heads of a layer, where the rule budget has one a row.
          The errors of a head are measured in parts of its output's power, which is taken from the dense output.
centred   the similarity cap of the count rule, with cosines of the keys as they are and less their mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from attention_judges.judges import Judge
from attention_judges.measure import Measuring, highest_scale
from attention_judges.settings import FEWER_DENSITIES, PYRAMID, Setting

from psa_kernels import AttentionSpec
from psa_kernels.allocation.budget import allocate_budget
from psa_kernels.allocation.prices import HIGHEST_PRICE, STEPS_PER_OCTAVE
from psa_kernels.allocation.reference import allocate
from psa_kernels.blocks import group_means, group_sizes
from psa_kernels.costs import unit_costs
from psa_kernels.importance.reference import block_importance
from psa_kernels.layout import TokenLayout
from psa_kernels.lists import AttentionStats, BlockLists
from psa_kernels.pyramid.reference import coarsest_levels
from psa_kernels.spec import Importance

CAPS = {"no cap": None, "cap .7 .65": (0.7, 0.65), "cap .9 .85": (0.9, 0.85)}

Figures = tuple[str, str, float, tuple[float, float]]


def ideas(judge: Judge, measuring: Measuring) -> Iterator[Figures]:
    """Idea, way, density aimed at, and what `Measuring.measure` returns, of one sample."""
    base = Setting("budget", PYRAMID, judge.orders[0], judge.block_query, judge.block_key)
    layout = measuring.layout(base.order)
    for name, mass in _masses(measuring, base, layout):
        prices = measuring.prices(base, mass)
        for density in FEWER_DENSITIES:
            spec = replace(base, density=density).spec()
            yield (
                "mass",
                f"budget, {name}",
                density,
                measuring.error(spec, allocate_budget(prices, mass, spec), base.order),
            )
            count, lists = _count(base, density, mass, None)
            yield "mass", f"psa-3, {name}", density, measuring.error(count, lists, base.order)
    yield from _shared(measuring, base)
    yield from _caps(measuring, base, layout)


def _masses(measuring: Measuring, base: Setting, layout: TokenLayout) -> Iterator[tuple[str, torch.Tensor]]:
    s, scale = measuring.sample, measuring.sample.q.shape[-1] ** -0.5
    yield "sampled max", measuring.importance(base)
    yield "means", measuring.importance(replace(base, estimator="pooled", statistic="mean"))
    yield "means and variance", mass_of_means(s.q, s.k, layout, base.spec(), scale)
    exact = replace(base.spec(), importance=Importance("sampled", "mean", 1, 1))
    yield "exact", block_importance(s.q, s.k, layout, exact, scale)


def mass_of_means(
    q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, spec: AttentionSpec, scale: float
) -> torch.Tensor:
    """Shares of attention that follow from means and variances of neighbours: `[B, H, query blocks, key blocks]`.

    A group of n keys with mean k and variances s along each channel weighs n exp(q.k + q^2.s / 2) for the mean q of a
    group of queries, which is exact for normally distributed keys whose channels are independent.
    """
    how = spec.importance
    queries = q.index_select(1, layout.video_query_tokens(q.device)).transpose(1, 2) * scale
    keys = k.index_select(1, layout.video_key_tokens(k.device)).transpose(1, 2)
    queries, means = group_means(queries, how.query_stride), group_means(keys, how.key_stride)
    # Means of squares less squares of means could be negative by rounding.
    variances = (group_means(keys.square(), how.key_stride) - means.square()).clamp_min(0)
    counts = group_sizes(keys.shape[2], how.key_stride, q.device).to(keys.dtype)
    logits = queries @ means.mT + queries.square() @ variances.mT / 2 + counts.log()
    shares = logits.softmax(-1)
    groups, columns = spec.block_query // how.query_stride, spec.block_key // how.key_stride
    missing = -shares.shape[-1] % columns
    blocks = torch.nn.functional.pad(shares, (0, missing)).unflatten(-1, (-1, columns)).sum(-1)
    return group_means(blocks, groups)


def allocate_shared(
    prices: torch.Tensor, importance: torch.Tensor, spec: AttentionSpec, dims: tuple[int, ...]
) -> BlockLists:
    """As `allocate_budget`, but rows along some dimensions of the importance have one price and one budget together.

    Args:
        prices: `[levels, B, H, query blocks, key blocks]`.
        dims: of the importance; the last one among them.
    """
    units = torch.tensor(unit_costs(spec))
    prices = prices.int()
    prices[-1].scatter_(-1, importance.argmax(-1, keepdim=True), HIGHEST_PRICE + 1)
    least, most = int(prices.min()), int(prices.max()) + 1

    def levels_at(price: torch.Tensor) -> torch.Tensor:
        return (prices < price).sum(0)

    low = torch.full_like(prices[0].float().mean(dims, keepdim=True), least - 1).int()
    high = torch.full_like(low, most)
    budget = spec.density * units[0] * spec.levels[0] + 1e-6
    for _ in range((most - least + 2).bit_length()):
        middle = (low + high) // 2
        affordable = units[levels_at(middle)].double().mean(dims, keepdim=True) <= budget
        low, high = torch.where(affordable, low, middle), torch.where(affordable, middle, high)
    return BlockLists.from_levels(levels_at(high), len(spec.levels))


def _shared(measuring: Measuring, base: Setting) -> Iterator[Figures]:
    importance, prices = measuring.importance(base), measuring.prices(base)
    power = measuring.power(base.order, base.block_query).log2()
    steps = ((power - power.mean()) * STEPS_PER_OCTAVE).round().int()
    relative = prices.int() - steps[:, None, None]
    for density in FEWER_DENSITIES:
        spec = replace(base, density=density).spec()
        ways = {
            "a price a row": allocate_budget(prices, importance, spec),
            "a price a head": allocate_shared(prices, importance, spec, (-2, -1)),
            "a price a layer": allocate_shared(relative, importance, spec, (-3, -2, -1)),
        }
        for way, lists in ways.items():
            yield "budget", way, density, measuring.error(spec, lists, base.order)


def _caps(measuring: Measuring, base: Setting, layout: TokenLayout) -> Iterator[Figures]:
    importance, k = measuring.importance(base), measuring.sample.k
    for name, cap in CAPS.items():
        for way, keys in {name: k, f"{name}, centred": k - k.mean(1, keepdim=True)}.items():
            if cap is None and keys is not k:
                continue
            coarsest = coarsest_levels(keys, layout, replace(replace(base, rule="count").spec(), similarity=cap))
            for density in FEWER_DENSITIES:
                spec, lists = _count(base, density, importance, coarsest)
                yield "centred", way, density, measuring.error(spec, lists, base.order)


def _count(
    base: Setting, density: float, importance: torch.Tensor, coarsest: torch.Tensor | None
) -> tuple[AttentionSpec, BlockLists]:
    """psa-3's shares, scaled so that with or without a cap they have a density."""
    count = replace(base, rule="count")

    def lists_at(scale: float) -> tuple[AttentionSpec, BlockLists]:
        spec = count.spec(scale)
        return spec, allocate(importance, coarsest, spec)

    def found(scale: float) -> float:
        spec, lists = lists_at(scale)
        return AttentionStats.from_lists(lists, spec, "").density.mean().item()

    return lists_at(highest_scale(found, density, count.highest_scale))

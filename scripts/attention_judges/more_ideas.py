"""More ideas at equal density: where is what the levels chosen by true errors would spare?

mass      other estimates of a block's share of attention under the rule budget. `means 8` and `means 4` are
          log-sum-exps of products of means of so many queries and keys, `variance` adds half the variance inside these
          groups, `exact` is the true share, `true errors` replaces all of the error model by measured errors of pairs.
centred   the rule budget on keys less their mean over all tokens.
values    what values say: `ranked` gives the shares of psa-3 to blocks by importance times the distance of their mean
          value from the output, or times its length; `budget without` prices with the noise of logits and mass alone.
tokens    so many single tokens of skipped blocks for each query block besides, exact, paid from the same density: those
          that the sampled queries of the block give most. To find them takes products with all keys, which is not paid.
shared    one price for the rows of a head or of all heads of a layer, with the exponent of mass as it is or 2, and with
          row budgets held between 0.5 and 1.5 of the density. Errors of heads are in parts of the head's power.
sampling  other samples of queries and keys, and statistics of them.
constants exponent 2 and c = 4 in the place of 1.4 and 16 (`psa_kernels/allocation/prices.py`), and other statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from attention_judges.ideas import Figures, _count, allocate_shared, mass_of_means
from attention_judges.judges import Judge
from attention_judges.measure import Measuring
from attention_judges.pairs import Pairs, modelled_errors, pairs_of, prices_of, truth_of
from attention_judges.settings import FEWER_DENSITIES, PYRAMID, Setting
from attention_judges.single_tokens import with_tokens

from psa_kernels import AttentionSpec
from psa_kernels.allocation.budget import allocate_budget
from psa_kernels.allocation.prices import COVARIANCE, EXPONENT, HIGHEST_PRICE, STEPS_PER_OCTAVE, upgrade_prices
from psa_kernels.importance.reference import block_importance
from psa_kernels.lists import BlockLists
from psa_kernels.spec import Importance

# What a row may cost, in parts of the density.
BOUNDS = (0.5, 1.5)
Way = tuple[str, str, Callable[[AttentionSpec], BlockLists]]


def more_ideas(judge: Judge, measuring: Measuring) -> Iterator[Figures]:
    """Idea, way, density aimed at, and what `Measuring.error` returns, of one sample."""
    base = Setting("budget", PYRAMID, judge.orders[0], judge.block_query, judge.block_key)
    importance = measuring.importance(base)
    pairs = pairs_of(measuring, base.spec(), base.order, importance)
    for make in (_masses, _values, _shared, _samplings, _constants):
        for idea, way, lists_at in make(measuring, base, pairs):
            for density in FEWER_DENSITIES:
                spec = replace(base, density=density).spec()
                yield idea, way, density, measuring.error_of_rows(spec, lists_at(spec), base.order)
    yield from _ranked(measuring, base, pairs)
    yield from _tokens(measuring, base)


def _budget(errors: torch.Tensor, importance: torch.Tensor) -> Callable[[AttentionSpec], BlockLists]:
    """One price a row, for errors and importance `[..., H, query blocks, key blocks]` of rows that are looked at."""
    return lambda spec: allocate_budget(prices_of(errors, spec), importance[None], spec)


def _masses(measuring: Measuring, base: Setting, pairs: Pairs) -> Iterator[Way]:
    s, spec, rows = measuring.sample, base.spec(), slice(None, None, measuring.every)
    scale, layout = s.q.shape[-1] ** -0.5, measuring.layout(base.order)
    four = replace(spec, importance=Importance("pooled", "mean", 4, 4))
    masses = {
        "budget as it is": measuring.importance(base),
        "means 8": measuring.importance(replace(base, estimator="pooled", statistic="mean")),
        "means 4": block_importance(s.q, s.k, layout, four, scale),
        "means 8, variance": mass_of_means(s.q, s.k, layout, spec, scale),
        "exact": block_importance(
            s.q, s.k, layout, replace(spec, importance=Importance("sampled", "mean", 1, 1)), scale
        ),
    }
    for name, mass in masses.items():
        found = pairs_of(measuring, spec, base.order, mass)
        yield "mass", name, _budget(modelled_errors(found, spec), mass[0, :, rows])
    truth = truth_of(measuring, spec, base.order)
    yield "mass", "true errors", _budget(truth.errors, truth.mass)
    centred = s.k - s.k.mean(1, keepdim=True)
    mass = block_importance(s.q, centred, layout, spec, scale)
    prices = upgrade_prices(s.q, centred, s.v, mass, layout, spec, scale)[:, :, :, rows]
    yield "centred", "keys as they are", _budget(modelled_errors(pairs, spec), measuring.importance(base)[0, :, rows])
    yield "centred", "less their mean", lambda spec: allocate_budget(prices, mass[:, :, rows], spec)


def _values(measuring: Measuring, base: Setting, pairs: Pairs) -> Iterator[Way]:
    spec, mass = base.spec(), measuring.importance(base)[0, :, :: measuring.every]
    yield "values", "budget as it is", _budget(modelled_errors(pairs, spec), mass)
    level = torch.ones_like
    plain = replace(pairs, distance=level(pairs.distance), spread=level(pairs.spread))
    yield "values", "budget without", _budget(modelled_errors(plain, spec), mass)


def _shared(measuring: Measuring, base: Setting, pairs: Pairs) -> Iterator[Way]:
    spec, mass = base.spec(), measuring.importance(base)[:, :, :: measuring.every]
    power = measuring.power(base.order, base.block_query).log2()
    steps = ((power - power.mean()) * STEPS_PER_OCTAVE).round().int()[:, None, None]
    yield "shared", "a price a row", _budget(modelled_errors(pairs, spec), mass[0])
    for exponent in (EXPONENT, 2.0):
        prices = prices_of(modelled_errors(pairs, spec, exponent), spec).int()
        relative = prices - steps
        for name, given, dims in (("head", prices, (-2, -1)), ("layer", relative, (-3, -2, -1))):
            way = f"a price a {name}, exponent {exponent}"
            yield "shared", way, lambda spec, given=given, dims=dims: allocate_shared(given, mass, spec, dims)
            held = f"{way}, rows held"
            yield "shared", held, lambda spec, given=given, dims=dims: held_rows(given, mass, spec, dims)


def held_rows(prices: torch.Tensor, importance: torch.Tensor, spec: AttentionSpec, dims: tuple[int, ...]) -> BlockLists:
    """As `allocate_shared`, but what a row costs is held between half and one and a half times the density.

    Rows that want more or less get what the bound pays, and the others share what is left, by their own price: found by
    raising or lowering the density that the others share until all together meet it.
    """
    bounds = (replace(spec, density=spec.density * part) for part in BOUNDS)
    least, most = (_of_one_price_a_row(prices, importance, bound) for bound in bounds)
    low, high, best = spec.density * 0.3, min(1.0, spec.density * 2.5), least
    for _ in range(8):
        middle = (low + high) / 2
        shared = allocate_shared(prices.clone(), importance, replace(spec, density=middle), dims).levels()
        cost = _row_cost(shared, spec)
        held = torch.where((cost < spec.density * BOUNDS[0])[..., None], least, shared)
        held = torch.where((cost > spec.density * BOUNDS[1])[..., None], most, held)
        low, high = (middle, high) if _row_cost(held, spec).mean() <= spec.density else (low, middle)
        if low == middle:
            best = held
    return BlockLists.from_levels(best, len(spec.levels))


def _of_one_price_a_row(prices: torch.Tensor, importance: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Levels by one price a row, of prices that a head's power may have shifted."""
    return allocate_budget(prices.clamp(0, HIGHEST_PRICE).to(torch.int16), importance, spec).levels()


def _row_cost(level: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    return torch.tensor([*(1 / each for each in spec.levels), 0.0])[level].mean(-1)


def _samplings(measuring: Measuring, base: Setting, _: Pairs) -> Iterator[Way]:
    s, spec, rows = measuring.sample, base.spec(), slice(None, None, measuring.every)
    layout, scale = measuring.layout(base.order), s.q.shape[-1] ** -0.5

    def of(statistic: str, queries: int, keys: int) -> torch.Tensor:
        found = replace(spec, importance=Importance("sampled", statistic, queries, keys))
        mass = block_importance(s.q, s.k, layout, found, scale)
        return mass / mass.sum(-1, keepdim=True)

    most, mean = of("max", 8, 8), of("mean", 8, 8)
    ways = {
        "max, 8 x 8 (as it is)": most,
        "mean, 8 x 8": mean,
        "max and mean, sum": (most + mean) / 2,
        "max and mean, root of product": (most * mean).sqrt(),
        "max, 4 x 4": of("max", 4, 4),
        "mean, 4 x 4": of("mean", 4, 4),
        "max, 16 x 4": of("max", 16, 4),
    }
    for name, mass in ways.items():
        found = pairs_of(measuring, spec, base.order, mass)
        yield "sampling", name, _budget(modelled_errors(found, spec), mass[0, :, rows])


def _constants(measuring: Measuring, base: Setting, _: Pairs) -> Iterator[Way]:
    spec, rows = base.spec(), slice(None, None, measuring.every)
    most, mean, pooled = (
        mass / mass.sum(-1, keepdim=True)
        for mass in (
            measuring.importance(base),
            measuring.importance(replace(base, statistic="mean")),
            measuring.importance(replace(base, estimator="pooled", statistic="mean")),
        )
    )
    masses = {"sampled max": most, "sampled mean": mean, "root of product": (most * mean).sqrt(), "pooled mean": pooled}
    for name, mass in masses.items():
        found = pairs_of(measuring, spec, base.order, mass)
        for exponent, covariance in ((EXPONENT, COVARIANCE), (2.0, 4.0)):
            errors = modelled_errors(found, spec, exponent, covariance)
            yield "constants", f"{name}, {exponent}, {covariance:g}", _budget(errors, mass[0, :, rows])


def _ranked(measuring: Measuring, base: Setting, pairs: Pairs) -> Iterator[Figures]:
    """The count rule's shares, by other ranks: of the rows that are looked at, whose share is that of all."""
    s, tokens = measuring.sample, measuring.layout(base.order).video_query_tokens(measuring.sample.q.device)
    values = s.v[0, tokens].transpose(0, 1)
    length = values.unflatten(1, (-1, base.block_key)).mean(2) if values.shape[1] % base.block_key == 0 else None
    ranks = {"psa-3": pairs.mass, "psa-3 ranked by distance": pairs.mass * pairs.distance.sqrt()}
    if length is not None:
        ranks["psa-3 ranked by length"] = pairs.mass * length.norm(dim=-1)[:, None]
    for name, rank in ranks.items():
        for density in FEWER_DENSITIES:
            spec, lists = _count(base, density, rank[None], None)
            yield "values", name, density, measuring.error_of_rows(spec, lists, base.order)


def _tokens(measuring: Measuring, base: Setting) -> Iterator[Figures]:
    spec, importance = base.spec(), measuring.importance(base)
    prices, rows, tokens = measuring.prices(base), slice(None, None, measuring.every), math.prod(measuring.sample.grid)
    for count in (0, 32, 128, 256):
        for density in FEWER_DENSITIES:
            left = density - count / tokens
            if left <= 0.02:
                continue
            spec = replace(base, density=left).spec()
            level = allocate_budget(prices[:, :, :, rows], importance[:, :, rows], spec).levels()
            cost = _row_cost(level, spec).mean().item() + count / tokens
            yield "tokens", f"{count} tokens", density, (cost, with_tokens(measuring, base, level, count))

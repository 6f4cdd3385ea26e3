"""How far sparse attention over one sample is from dense attention, on the CPU, by the reference operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attention_judges.judges import Judge, Sample, dense_attention
from attention_judges.settings import Setting

from psa_diffusers.patch.token_order import token_permutation
from psa_kernels import AttentionSpec, psa_attention
from psa_kernels.allocation.budget import allocate_budget
from psa_kernels.allocation.prices import upgrade_prices
from psa_kernels.allocation.reference import allocate
from psa_kernels.costs import expected_density
from psa_kernels.importance.reference import block_importance
from psa_kernels.layout import TokenLayout, make_layout
from psa_kernels.lists import AttentionStats, BlockLists

BISECTIONS = 16


class Measuring:
    """One sample; what settings share is computed once."""

    def __init__(self, judge: Judge, sample: Sample) -> None:
        self.sample = sample
        self._judge = judge
        self._kept: dict[tuple[Any, ...], Any] = {}

    def measure(self, setting: Setting) -> tuple[float, float]:
        """Density and relative error of a setting; the density is the highest one up to the setting's."""
        importance = self.importance(setting)
        if setting.rule == "budget":
            spec = setting.spec()
            lists = allocate_budget(self.prices(setting), importance, spec)
        else:
            spec, lists = self._scaled(setting, importance)
        return self.error(spec, lists, setting.order)

    def error(self, spec: AttentionSpec, lists: BlockLists, order: str) -> tuple[float, float]:
        """Density, and the root of the mean over heads of the squared error relative to the head's dense output.

        The error is that of the queries of every `Judge.every`-th block, without text; the density that of all.
        """
        part = BlockLists(lists.ids[:, :, :: self.every], lists.counts[:, :, :: self.every], lists.key_blocks)
        density = AttentionStats.from_lists(lists, spec, "reference").density.mean()
        return density.item(), self.error_of_rows(spec, part, order)[1]

    def error_of_rows(self, spec: AttentionSpec, part: BlockLists, order: str) -> tuple[float, float]:
        """As `error`, from the lists of the query blocks that are looked at alone."""
        queries, k, v, _ = self.in_order(order, spec.block_query)
        text = self.sample.text_before
        out = psa_attention(queries, k, v, spec, text_before=text, lists=part, implementation="reference")[:, text:]
        density = AttentionStats.from_lists(part, spec, "reference").density.mean()
        return density.item(), self.relative_error(out, spec.block_query, order)

    def relative_error(self, out: torch.Tensor, block_query: int, order: str) -> float:
        """Of outputs for the queries that are looked at: `[1, N, H, D]`, without text."""
        dense = self.in_order(order, block_query)[-1]
        error = (out - dense).double().square().sum((0, 1, 3)) / dense.double().square().sum((0, 1, 3))
        return error.mean().sqrt().item()

    @property
    def every(self) -> int:
        """The error is that of every so many query blocks."""
        return self._judge.every

    def power(self, order: str, block_query: int) -> torch.Tensor:
        """Mean square of each head's dense output: `[H]`."""
        return self.in_order(order, block_query)[-1].square().mean((0, 1, 3))

    def in_order(self, order: str, block_query: int) -> tuple[torch.Tensor, ...]:
        """Queries of every so many blocks, after the text; all keys and values; dense attention of these queries."""

        def make() -> tuple[torch.Tensor, ...]:
            s, tokens = self.sample, self.layout(order).video_query_tokens(self.sample.q.device)
            blocks = tokens.split(block_query)[:: self.every]
            text = torch.arange(s.text_before)
            q = s.q[:, torch.cat([text, *blocks])]
            k, v = (x[:, torch.cat([text, tokens])] for x in (s.k, s.v))
            return q, k, v, dense_attention(q[:, s.text_before :], k, v)

        return self._once(("in order", order, block_query), make)

    def layout(self, order: str) -> TokenLayout:
        def make() -> TokenLayout:
            permutation = None if order == "raster" else token_permutation(order, self.sample.grid, self._judge.tile)
            tokens = self.sample.q.shape[1]
            return make_layout(tokens, tokens, self.sample.text_before, 0, permutation)

        return self._once(("layout", order), make)

    def importance(self, setting: Setting) -> torch.Tensor:
        """`[1, H, query blocks, key blocks]`."""
        key = (setting.order, setting.block_key, setting.estimator, setting.statistic)
        s, layout = self.sample, self.layout(setting.order)
        return self._once(key, lambda: block_importance(s.q, s.k, layout, setting.spec(), s.q.shape[-1] ** -0.5))

    def prices(self, setting: Setting, importance: torch.Tensor | None = None) -> torch.Tensor:
        """`[levels, 1, H, query blocks, key blocks]`, of the setting's importance or of another."""
        s, layout = self.sample, self.layout(setting.order)
        mass = self.importance(setting) if importance is None else importance

        def make() -> torch.Tensor:
            return upgrade_prices(s.q, s.k, s.v, mass, layout, setting.spec(), s.q.shape[-1] ** -0.5)

        if importance is not None:
            return make()
        key = (setting.order, setting.block_key, setting.estimator, setting.statistic, setting.levels, setting.rest)
        return self._once(("prices", *key), make)

    def _scaled(self, setting: Setting, importance: torch.Tensor) -> tuple[AttentionSpec, BlockLists]:
        def density(scale: float) -> float:
            spec, blocks = setting.spec(scale), importance.shape[-1]
            known = expected_density(spec, blocks)
            if known is None:
                known = AttentionStats.from_lists(allocate(importance, None, spec), spec, "").density.mean().item()
            return known

        spec = setting.spec(highest_scale(density, setting.density, setting.highest_scale))
        return spec, allocate(importance, None, spec)

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def highest_scale(density: Callable[[float], float], target: float, highest: float) -> float:
    """The highest scale, by bisection, at which a density that does not fall is no more than a target."""
    low, high = highest * 2**-BISECTIONS, highest
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if density(middle) <= target + 1e-6 else (low, middle)
    return low

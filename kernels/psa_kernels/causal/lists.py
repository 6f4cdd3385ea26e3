"""Which key blocks each row of a causal call reads, in PyTorch: the stages of other calls, one row at a time."""

from __future__ import annotations

from itertools import pairwise

import torch

from psa_kernels.allocation.budget import budget_levels
from psa_kernels.allocation.prices import upgrade_prices
from psa_kernels.allocation.reference import ranked_levels
from psa_kernels.blocks import compute_dtype, group_means
from psa_kernels.causal.layout import CausalLayout
from psa_kernels.layout import TokenLayout
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.reference import coarsest_levels
from psa_kernels.spec import AttentionSpec


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: CausalLayout,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
) -> BlockLists:
    """Give every candidate of every row a level: the rule is applied to each row as if it had no other key blocks.

    `keep_first` and `keep_last` of a row's candidates get the finest level whatever the rule says. They come before all
    others where a rule counts blocks or mass, and a budget pays for them first.

    Args:
        q, k, v: `[B, Nq, Hq, D]` and twice `[B, Nk, Hkv, D]`, all tokens, in the order of the model.

    Returns:
        Lists as wide as there are key blocks; those that are no candidates are last in each row.
    """
    video = slice(causal.text_before, causal.text_before + causal.video_keys)
    keys = _key_representatives(k[:, video], spec)
    coarsest = coarsest_levels(k, layout, spec)
    key_blocks, levels = -(-causal.video_keys // spec.block_key), len(spec.levels)
    level = torch.full((q.shape[0], q.shape[2], len(causal.rows), key_blocks), levels + 1, device=q.device)
    for index, row in enumerate(causal.rows):
        candidates = causal.candidates(row)
        if not candidates:
            continue
        queries = q[:, causal.queries(row)]
        importance = _importance(queries, keys, causal, spec, scale, row)
        kept = torch.zeros(candidates, dtype=torch.bool, device=q.device)
        kept[: spec.keep_first] = True
        kept[max(candidates - spec.keep_last, 0) :] = True
        if spec.rule == "budget":
            past = slice(causal.text_before, causal.text_before + candidates * spec.block_key)
            alone = TokenLayout(0, 0, queries.shape[1], candidates * spec.block_key)
            lead = causal.span(row)[0] % spec.block_query
            prices = upgrade_prices(queries, k[:, past], v[:, past], importance, alone, spec, scale, lead)
            level[:, :, index : index + 1, :candidates] = budget_levels(prices, importance, spec, kept)
        else:
            caps = None if coarsest is None else coarsest[:, :, :candidates]
            level[:, :, index : index + 1, :candidates] = ranked_levels(importance, caps, spec, kept)
    return BlockLists.from_levels(level, levels, None, spec.levels)


def _key_representatives(keys: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """One vector for every `key_stride` of video keys `[B, N, Hkv, D]`: `[B, Hkv, groups, D]`."""
    how, keys = spec.importance, keys.transpose(1, 2)
    if how.estimator == "sampled":
        return keys[:, :, :: how.key_stride].to(compute_dtype(keys))
    return group_means(keys.to(compute_dtype(keys)), how.key_stride)


def _importance(
    queries: torch.Tensor, keys: torch.Tensor, causal: CausalLayout, spec: AttentionSpec, scale: float, row: int
) -> torch.Tensor:
    """Importance of a row's candidates: `[B, Hq, 1, candidates]`.

    The softmax runs over the candidates alone. Keys of the diagonal are later than some queries of the row, which must
    not see them, not even by way of the list that they share. Groups of queries and of keys are cut at multiples of
    their strides.

    Args:
        queries: of the row: `[B, Q, Hq, D]`.
        keys: of `_key_representatives`.
    """
    how, (first, last) = spec.importance, causal.span(row)
    starts = [first, *range(first // how.query_stride * how.query_stride + how.query_stride, last, how.query_stride)]
    heads_first = queries.transpose(1, 2).to(compute_dtype(queries))
    groups = [heads_first[:, :, start - first : end - first] for start, end in pairwise([*starts, last])]
    chosen = [group[:, :, 0] if how.estimator == "sampled" else group.mean(2) for group in groups]
    # Heads that share keys beside each other: `[B, Hkv, group, representatives, D]`.
    rows = torch.stack(chosen, dim=2).unflatten(1, (keys.shape[1], -1)) * scale
    columns = spec.block_key // how.key_stride
    past = keys[:, :, None, : causal.candidates(row) * columns]
    pairs = (rows @ past.mT).softmax(-1).flatten(1, 2).unflatten(-1, (-1, columns))
    return pairs.amax((2, 4))[:, :, None] if how.statistic == "max" else pairs.mean((2, 4))[:, :, None]

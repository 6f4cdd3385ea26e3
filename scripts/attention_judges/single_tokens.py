"""Blocks at their levels and, for each query block, some single tokens of the blocks that it skips."""

from __future__ import annotations

import torch
from attention_judges.measure import Measuring
from attention_judges.settings import Setting

from psa_kernels.blocks import group_means, group_sizes


def with_tokens(measuring: Measuring, setting: Setting, level: torch.Tensor, count: int) -> float:
    """Relative error where every row has its levels and `count` exact tokens of skipped blocks besides.

    The tokens are those with the largest probability that a sampled query of the block gives them, among all keys.

    Args:
        level: `[1, H, query blocks that are looked at, key blocks]`.
    """
    spec = setting.spec()
    q, k, v, dense = measuring.in_order(setting.order, spec.block_query)
    text = measuring.sample.text_before
    out = torch.empty_like(dense)
    for head in range(q.shape[2]):
        queries, keys, values = q[0, text:, head] * q.shape[-1] ** -0.5, k[0, :, head], v[0, :, head]
        block = torch.arange(len(queries)) // spec.block_query
        levels = level[0, head][block]
        logits, rows = [queries @ keys[:text].T], [values[:text]]
        for index, factor in enumerate(spec.levels):
            counts = group_sizes(len(keys) - text, factor, k.device)
            means, chosen = (
                group_means(keys[text:], factor),
                (levels == index).repeat_interleave(spec.block_key // factor, 1),
            )
            products = queries @ means.T + counts.log()
            logits.append(products.masked_fill(~chosen[:, : len(means)], -torch.inf))
            rows.append(group_means(values[text:], factor))
            if factor == 1 and count:
                skipped = (levels == len(spec.levels)).repeat_interleave(spec.block_key, 1)[:, : len(means)]
                sampled = torch.cat([logits[0], products], -1).softmax(-1)[:: spec.importance.query_stride]
                chosen = _largest(sampled[:, text:], skipped, block, count, spec.importance.query_stride)
                logits[-1] = torch.where(chosen, products, logits[-1])
        out[0, :, head] = torch.cat(logits, -1).softmax(-1) @ torch.cat(rows)
    return measuring.relative_error(out, spec.block_query, setting.order)


def _largest(
    sampled: torch.Tensor, skipped: torch.Tensor, block: torch.Tensor, count: int, stride: int
) -> torch.Tensor:
    """Which keys are among the `count` largest of a query's block that it skips: bool `[N, keys]`."""
    of_block = [part.amax(0) for part in sampled.split(torch.bincount(block[::stride]).tolist())]
    most = torch.stack(of_block)
    first = torch.searchsorted(block, torch.arange(len(most)))
    most = most.masked_fill(~skipped[first], -1.0)
    count = min(count, most.shape[1])
    chosen = torch.zeros_like(most, dtype=torch.bool).scatter_(-1, most.topk(count).indices, True) & (most >= 0)
    return chosen[block]

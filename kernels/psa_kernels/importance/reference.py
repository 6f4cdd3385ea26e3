"""How much each query block needs each key block, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from psa_kernels.blocks import as_blocks, block_count, compute_dtype, group_means, group_sizes
from psa_kernels.heads import group_size, key_head
from psa_kernels.layout import TokenLayout
from psa_kernels.spec import AttentionSpec, Importance
from psa_kernels.threads import run_tasks

# Probabilities that one task holds at a time; with fewer, threads wait for one another more often.
TASK_ENTRIES = 1 << 20


def block_importance(
    q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, spec: AttentionSpec, scale: float
) -> torch.Tensor:
    """Importance S of every pair of video blocks.

    Representatives of the queries (one of every `query_stride` neighbours) attend representatives of the keys; the
    softmax runs over all key representatives. S_ij is the largest, or the mean, probability over the representatives of
    blocks i and j. Nothing is random.

    Args:
        q, k: `[B, Nq, Hq, D]` and `[B, Nk, Hkv, D]`, all queries and keys, in the order of the model.
        scale: factor on the dot products.

    Returns:
        float32 (float64 for float64 inputs) `[B, Hq, query blocks, key blocks]`, non-negative.
    """
    how = spec.importance
    query_tokens, key_tokens = layout.video_query_tokens(q.device), layout.video_key_tokens(k.device)
    rows, columns = spec.block_query // how.query_stride, spec.block_key // how.key_stride
    samples = block_count(len(key_tokens), how.key_stride)
    batch, _, heads, _ = q.shape
    blocks = block_count(len(query_tokens), spec.block_query)
    importance = torch.empty(
        batch, heads, blocks, block_count(samples, columns), dtype=compute_dtype(q), device=q.device
    )
    group = group_size(q, k)
    step = max(1, TASK_ENTRIES // (rows * samples))

    def worker(tasks: Iterator[tuple[int, int, int]]) -> None:
        buffer = importance.new_empty(step * rows, samples)
        for b, h, first in tasks:
            tokens = query_tokens[first * spec.block_query : (first + step) * spec.block_query]
            queries = _representatives(q[b, :, h], tokens, how.query_stride, how) * scale
            keys = _representatives(k[b, :, key_head(h, group)], key_tokens, how.key_stride, how)
            probabilities = torch.mm(queries, keys.T, out=buffer[: len(queries)])
            torch.softmax(probabilities, dim=-1, out=probabilities)
            # Queries first: reducing over whole rows is several times faster than inside them.
            per_key = _reduce(probabilities, rows, -2, how.statistic)
            importance[b, h, first : first + step] = _reduce(per_key, columns, -1, how.statistic)

    tasks = product(range(batch), range(heads), range(0, blocks, step))
    run_tasks(tasks, worker, q.device)
    return importance


def _representatives(x: torch.Tensor, tokens: torch.Tensor, stride: int, how: Importance) -> torch.Tensor:
    """One vector for every `stride` of the given tokens of one head: `[N, D]` to `[ceil(tokens / stride), D]`."""
    if how.estimator == "sampled":
        return x.index_select(0, tokens[::stride]).to(compute_dtype(x))
    return group_means(x.index_select(0, tokens).to(compute_dtype(x)), stride)


def _reduce(x: torch.Tensor, group: int, dim: int, statistic: str) -> torch.Tensor:
    """Largest or mean entry of each group of rows (`dim` -2) or columns (-1) of a matrix."""
    # Entries are never negative, so zeros that fill up the last group change neither a maximum nor a sum.
    groups = as_blocks(x, group, dim)
    if statistic == "max":
        return groups.amax(dim)
    sizes = group_sizes(x.shape[dim], group, x.device)
    return groups.sum(dim) / (sizes if dim == -1 else sizes[:, None])

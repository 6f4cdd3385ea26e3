"""How much each query block needs each key block, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from psa_kernels.blocks import as_blocks, block_count, compute_dtype, group_means, group_sizes
from psa_kernels.layout import TokenLayout
from psa_kernels.spec import AttentionSpec, Importance
from psa_kernels.threads import run_tasks

# Probabilities that one task holds at a time: small enough for a core's cache, large enough for efficient products.
TASK_ENTRIES = 1 << 19


def block_importance(
    q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, spec: AttentionSpec, scale: float
) -> torch.Tensor:
    """Importance S of every pair of video blocks (DESIGN: stage 2).

    Representatives of the queries (one of every `query_stride` neighbours) attend representatives of the keys; the
    softmax runs over all key representatives. S_ij is the largest, or the mean, probability over the representatives of
    blocks i and j. Nothing is random.

    Args:
        q, k: `[B, Nq, H, D]` and `[B, Nk, H, D]`, all queries and keys, in the order of the model.
        scale: factor on the dot products.

    Returns:
        float32 (float64 for float64 inputs) `[B, H, query blocks, key blocks]`, non-negative.
    """
    how = spec.importance
    queries = _representatives(q, layout.video_query_tokens(q.device), how.query_stride, how) * scale
    keys = _representatives(k, layout.video_key_tokens(k.device), how.key_stride, how)
    rows = spec.block_query // how.query_stride
    columns = spec.block_key // how.key_stride

    batch, heads, samples, _ = queries.shape
    blocks = block_count(samples, rows)
    importance = queries.new_empty(batch, heads, blocks, block_count(keys.shape[2], columns))
    step = max(1, TASK_ENTRIES // (rows * keys.shape[2]))
    tasks = [(b, h, i) for b in range(batch) for h in range(heads) for i in range(0, blocks, step)]

    def worker(tasks: Iterator[tuple[int, int, int]]) -> None:
        buffer = queries.new_empty(step * rows, keys.shape[2])
        for b, h, first in tasks:
            some = queries[b, h, first * rows : (first + step) * rows]
            probabilities = torch.mm(some, keys[b, h].T, out=buffer[: len(some)])
            torch.softmax(probabilities, dim=-1, out=probabilities)
            # Queries first: reducing over whole rows is several times faster than inside them.
            per_key = _reduce(probabilities, rows, -2, how.statistic)
            importance[b, h, first : first + step] = _reduce(per_key, columns, -1, how.statistic)

    run_tasks(tasks, worker, queries.device)
    return importance


def _representatives(x: torch.Tensor, tokens: torch.Tensor, stride: int, how: Importance) -> torch.Tensor:
    """One vector for every `stride` of the given tokens: `[B, N, H, D]` to `[B, H, ceil(tokens / stride), D]`."""
    if how.estimator == "sampled":
        tokens = tokens[::stride]
    chosen = x.index_select(1, tokens).transpose(1, 2).to(compute_dtype(x))
    return (chosen if how.estimator == "sampled" else group_means(chosen, stride)).contiguous()


def _reduce(x: torch.Tensor, group: int, dim: int, statistic: str) -> torch.Tensor:
    """Largest or mean entry of each group of rows (`dim` -2) or columns (-1) of a matrix."""
    # Entries are never negative, so zeros that fill up the last group change neither a maximum nor a sum.
    groups = as_blocks(x, group, dim)
    if statistic == "max":
        return groups.amax(dim)
    sizes = group_sizes(x.shape[dim], group, x.device)
    return groups.sum(dim) / (sizes if dim == -1 else sizes[:, None])

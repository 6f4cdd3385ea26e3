"""Causal Pyramid Sparse Attention written down token by token in float64, for small inputs; rules count and mass."""

from __future__ import annotations

import math

import torch

from psa_testing.brute_force import _attend, _chunks, _coarsest, _levels


def brute_force_causal(q, k, v, spec, text_before=0, text_after=0, scale=None):
    """Return the output `[B, Nq, Hq, D]` in float64, the density `[B, Hq]`, and the levels of each row of each head."""
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.full(q.shape, math.nan, dtype=torch.float64)
    density = torch.zeros(q.shape[0], q.shape[2], dtype=torch.float64)
    sharing = q.shape[2] // k.shape[2]
    levels = {}
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            one = q[b, :, h], k[b, :, h // sharing], v[b, :, h // sharing]
            out[b, :, h], density[b, h], levels[b, h] = _one_head(*one, spec, text_before, text_after, scale)
    return out, density, levels


def _one_head(q, k, v, spec, text_before, text_after, scale):
    offset = len(k) - len(q)
    video = range(text_before, len(k) - text_after)
    out = torch.full_like(q, math.nan)
    cost, whole = 0.0, 0
    levels = []
    for t in range(len(q)):
        if t + offset not in video:
            out[t] = _attend(q[t], [(k[s], v[s], 1) for s in range(t + offset + 1)], scale)
    for first in range(0, len(video), spec.block_query):
        diagonal = list(video[first : first + spec.block_query])
        queries = [s - offset for s in diagonal if s >= offset]
        if not queries:
            continue
        blocks = [list(block) for block in _chunks(video[:first], spec.block_key)]
        importance = _importance(q, k, queries, blocks, offset, video[0], spec, scale) if blocks else []
        kept = [j for j in range(len(blocks)) if j < spec.keep_first or j >= len(blocks) - spec.keep_last]
        coarsest = [_coarsest(k, block, spec) for block in blocks]
        row = _levels(importance, coarsest, spec, kept) if blocks else []
        levels.append(row)
        rows = [(k[s], v[s], 1) for s in range(text_before)]
        diagonal_blocks = len(_chunks(diagonal, spec.block_key))
        cost, whole = cost + diagonal_blocks, whole + diagonal_blocks + len(blocks)
        for block, level in zip(blocks, row, strict=True):
            if level is None and spec.rest == "skip":
                continue
            factor = spec.block_key if level is None else spec.levels[level]
            cost += 1 / factor
            rows += [(k[group].mean(0), v[group].mean(0), len(group)) for group in _chunks(block, factor)]
        for t in queries:
            own = [(k[s], v[s], 1) for s in diagonal if s <= t + offset]
            out[t] = _attend(q[t], rows + own, scale)
    return out, cost / whole if whole else 1.0, levels


def _importance(q, k, queries, blocks, offset, start, spec, scale):
    """Of each block before the diagonal; groups are cut at multiples of the strides from the first video token on."""
    how = spec.importance

    def representatives(x, places, stride, shift):
        groups = {}
        for place in places:
            groups.setdefault((place - start) // stride, []).append(place - shift)
        return [x[g].mean(0) if how.estimator == "pooled" else x[g[0]] for g in groups.values()]

    # Blocks begin at multiples of the stride, and so do groups of keys.
    keys = [representatives(k, block, how.key_stride, 0) for block in blocks]
    found = [[] for _ in blocks]
    for query in representatives(q, [t + offset for t in queries], how.query_stride, offset):
        logits = [[float(query @ key) * scale for key in block] for block in keys]
        top = max(max(block) for block in logits)
        total = sum(math.exp(logit - top) for block in logits for logit in block)
        for j in range(len(blocks)):
            found[j] += [math.exp(logit - top) / total for logit in logits[j]]
    reduce = max if how.statistic == "max" else (lambda values: sum(values) / len(values))
    return [reduce(values) for values in found]

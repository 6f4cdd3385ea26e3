"""The maths of Pyramid Sparse Attention written down token by token in float64, for small inputs.

Nothing here is shared with the operator: plain loops over blocks and tokens, one (batch item, head) at a time.
"""

from __future__ import annotations

import math

import torch


def brute_force(q, k, v, spec, text_before=0, text_after=0, permutation=None, scale=None):
    """Return the output `[B, Nq, Hq, D]` in float64 and the density `[B, Hq]`; k and v have Hkv heads."""
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.full((q.shape[0], q.shape[1], q.shape[2], q.shape[3]), math.nan, dtype=torch.float64)
    density = torch.zeros(q.shape[0], q.shape[2], dtype=torch.float64)
    # As many neighbouring heads of the queries read the same head of the keys.
    sharing = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            one = (q[b, :, h], k[b, :, h // sharing], v[b, :, h // sharing])
            out[b, :, h], density[b, h] = _one_head(*one, spec, text_before, text_after, permutation, scale)
    return out, density


def _one_head(q, k, v, spec, text_before, text_after, permutation, scale):
    query_tokens = _video_tokens(len(q), text_before, text_after, permutation)
    key_tokens = _video_tokens(len(k), text_before, text_after, permutation)
    text_keys = [t for t in range(len(k)) if t not in set(key_tokens)]
    text_queries = [t for t in range(len(q)) if t not in set(query_tokens)]
    query_blocks = _chunks(query_tokens, spec.block_query)
    key_blocks = _chunks(key_tokens, spec.block_key)
    importance = _importance(q, k, query_blocks, key_blocks, spec, scale)
    coarsest = [_coarsest(k, block, spec) for block in key_blocks]

    out = torch.full_like(q, math.nan)
    for t in text_queries:
        out[t] = _attend(q[t], [(k[s], v[s], 1) for s in range(len(k))], scale)
    total = 0.0
    for i, queries in enumerate(query_blocks):
        rows = [(k[s], v[s], 1) for s in text_keys]
        for j, level in enumerate(_levels(importance[i], coarsest, spec)):
            if level is None and spec.rest == "skip":
                continue
            factor = spec.block_key if level is None else spec.levels[level]
            total += 1 / factor
            for group in _chunks(key_blocks[j], factor):
                rows.append((k[group].mean(0), v[group].mean(0), len(group)))
        for t in queries:
            out[t] = _attend(q[t], rows, scale)
    return out, total / (len(query_blocks) * len(key_blocks))


def _video_tokens(tokens, text_before, text_after, permutation):
    video = list(range(text_before, tokens - text_after))
    return video if permutation is None else [video[p] for p in permutation.tolist()]


def _chunks(tokens, size):
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def _importance(q, k, query_blocks, key_blocks, spec, scale):
    def representatives(x, block, stride):
        groups = _chunks(block, stride)
        return [x[group].mean(0) if spec.importance.estimator == "pooled" else x[group[0]] for group in groups]

    keys = [representatives(k, block, spec.importance.key_stride) for block in key_blocks]
    importance = []
    for block in query_blocks:
        found = [[] for _ in key_blocks]
        for query in representatives(q, block, spec.importance.query_stride):
            logits = [[float(query @ key) * scale for key in group] for group in keys]
            top = max(max(group) for group in logits)
            total = sum(math.exp(logit - top) for group in logits for logit in group)
            for j, group in enumerate(logits):
                found[j] += [math.exp(logit - top) / total for logit in group]
        reduce = max if spec.importance.statistic == "max" else (lambda values: sum(values) / len(values))
        importance.append([reduce(values) for values in found])
    return importance


def _coarsest(k, block, spec):
    if spec.similarity is None:
        return len(spec.levels) - 1
    coarsest = 0
    for level in range(1, len(spec.levels)):
        distance = min(spec.levels[level], len(block) - 1)
        if distance == 0:
            similarity = 1.0
        else:
            pairs = [(k[block[t]], k[block[t + distance]]) for t in range(len(block) - distance)]
            cosines = [float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)) for x, y in pairs]
            similarity = sum(cosines) / len(cosines)
        if similarity > spec.similarity[level - 1]:
            coarsest = level
    return coarsest


def _levels(importance, coarsest, spec, kept=()):
    """Level index of each key block of one row, None past the last threshold; those that are kept come first."""
    order = sorted(range(len(importance)), key=lambda j: (j not in kept, j if j in kept else -importance[j], j))
    total = sum(importance)
    levels = [None] * len(importance)
    mass_before = 0.0
    for rank, j in enumerate(order):
        count_before = rank / len(order)
        share = count_before if spec.rule == "count" else mass_before / total
        mass_before += importance[j]
        level = next((h for h, t in enumerate(spec.thresholds) if share < t or t >= 1), None)
        if count_before < spec.floor:
            level = 0
        levels[j] = None if level is None else min(level, coarsest[j])
        if j in kept:
            levels[j] = 0
    return levels


def _attend(query, rows, scale):
    logits = [float(query @ key) * scale + math.log(count) for key, _, count in rows]
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return sum(w * value for w, (_, value, _) in zip(weights, rows, strict=True)) / sum(weights)

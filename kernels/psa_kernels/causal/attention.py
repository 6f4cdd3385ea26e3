"""Attention of a causal call over the rows that were chosen, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from psa_kernels.causal.layout import CausalLayout
from psa_kernels.heads import dense_attention, group_size
from psa_kernels.layout import TokenLayout
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.reference import PyramidRows, build_pyramid, pyramid_rows
from psa_kernels.spec import AttentionSpec
from psa_kernels.threads import run_tasks

# Queries whose mask exists at a time, in dense attention.
QUERIES_AT_ONCE = 512


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: BlockLists,
    causal: CausalLayout,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Let the video queries attend the listed blocks at their levels, the text before them, and their diagonals.

    Args:
        q, k, v: `[B, Nq, Hq, D]` and twice `[B, Nk, Hkv, D]`, all tokens, in the order of the model.
        out: `[B, Nq, Hq, D]`; its rows of video queries are written.
    """
    rows, group, levels = pyramid_rows(layout, spec, like=k), group_size(q, k), lists.levels()
    text = rows.first_row[-1] + torch.arange(causal.text_before, device=k.device)

    def worker(tasks: Iterator[tuple[int, int]]) -> None:
        for b, h in tasks:
            keys, values = q.new_empty(2, len(rows.log_count), q.shape[3], dtype=rows.log_count.dtype)
            build_pyramid(k[b, :, h], rows, out=keys)
            build_pyramid(v[b, :, h], rows, out=values)
            for index, row in enumerate(causal.rows):
                queries, diagonal = causal.queries(row), causal.diagonal(row)
                own_keys, own_values = (x[b, diagonal, h].to(keys.dtype) for x in (k, v))
                places = torch.arange(*causal.span(row), device=k.device)[:, None]
                begin = diagonal.start - causal.text_before
                later = torch.arange(begin, begin + len(own_keys), device=k.device) > places
                for head in range(h * group, (h + 1) * group):
                    chosen = torch.cat([_listed(levels[b, head, index, : causal.candidates(row)], rows, spec), text])
                    query = q[b, queries, head].to(keys.dtype) * scale
                    before = query @ keys[chosen].T + rows.log_count[chosen]
                    logits = torch.cat([before, (query @ own_keys.T).masked_fill(later, -torch.inf)], dim=1)
                    attended = logits.softmax(-1) @ torch.cat([values[chosen], own_values])
                    out[b, queries, head] = attended.to(out.dtype)

    run_tasks(product(range(q.shape[0]), range(k.shape[2])), worker, q.device)


def _listed(level: torch.Tensor, rows: PyramidRows, spec: AttentionSpec) -> torch.Tensor:
    """Rows of the pyramid that stand for the candidates of one row, whose levels are given: int64, all are whole."""
    found = [level.new_empty(0)]
    for index in range(len(rows.factors)):
        # Those past the last threshold have the level after it, which `rest` may have given rows.
        blocks = (level == index).nonzero() if index < len(spec.levels) else (level >= index).nonzero()
        size = rows.block_rows[index]
        found.append((rows.first_row[index] + blocks * size + torch.arange(size, device=level.device)).flatten())
    return torch.cat(found)


def dense_causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Let queries that are the last of the keys attend all keys that are not later.

    Args:
        q, k, v: `[B, Nq, Hq, D]` and twice `[B, Nk, Hkv, D]`, Nk no less than Nq.

    Returns:
        `[B, Nq, Hq, D]`, contiguous.
    """
    out, first = torch.empty_like(q, memory_format=torch.contiguous_format), k.shape[1] - q.shape[1]
    for start in range(0, q.shape[1], QUERIES_AT_ONCE):
        queries = q[:, start : start + QUERIES_AT_ONCE]
        seen = first + start + queries.shape[1]
        mask = torch.ones(queries.shape[1], seen, dtype=torch.bool, device=q.device).tril(first + start)
        attended = dense_attention(queries, k[:, :seen], v[:, :seen], scale, mask)
        out[:, start : start + QUERIES_AT_ONCE] = attended
    return out

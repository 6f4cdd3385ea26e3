"""Which head of the keys a head of the queries reads; everything that pairs heads asks here."""

from __future__ import annotations

import torch


def group_size(q: torch.Tensor, k: torch.Tensor) -> int:
    """How many neighbouring heads of the queries share one of the keys, both `[B, N, heads, D]`."""
    return q.shape[2] // k.shape[2]


def key_head(query_head: int, group: int) -> int:
    """The head of the keys and values that a head of the queries reads."""
    return query_head // group


def key_heads(query_heads: slice, group: int) -> slice:
    """The heads of the keys and values that some neighbouring heads of the queries read."""
    return slice(key_head(query_heads.start, group), key_head(query_heads.stop - 1, group) + 1)

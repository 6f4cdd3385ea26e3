"""Which head of the keys a head of the queries reads; everything that pairs heads asks here."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def group_size(q: torch.Tensor, k: torch.Tensor) -> int:
    """How many neighbouring heads of the queries share one of the keys, both `[B, N, heads, D]`."""
    return q.shape[2] // k.shape[2]


def key_head(query_head: int, group: int) -> int:
    """The head of the keys and values that a head of the queries reads."""
    return query_head // group


def key_heads(query_heads: slice, group: int) -> slice:
    """The heads of the keys and values that some neighbouring heads of the queries read."""
    return slice(key_head(query_heads.start, group), key_head(query_heads.stop - 1, group) + 1)


def query_heads(key_heads: slice, group: int) -> slice:
    """All heads of the queries that read some neighbouring heads of the keys and values."""
    return slice(key_heads.start * group, key_heads.stop * group)


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Let all queries attend all keys, or those that a mask allows.

    Heads that share keys become one with as many more queries, so that no implementation of PyTorch repeats the keys.

    Args:
        q, k, v: `[B, Nq, Hq, D]` and twice `[B, Nk, Hkv, D]`.
        scale: factor on the dot products.
        mask: None, or bool `[Nq, Nk]`: which keys each query may read.

    Returns:
        `[B, Nq, Hq, D]`, in whatever order in memory.
    """
    heads_first = q.transpose(1, 2)
    queries, group = heads_first, group_size(q, k)
    if group > 1:
        queries = heads_first.reshape(q.shape[0], k.shape[2], -1, q.shape[3])
        mask = None if mask is None else mask.repeat(group, 1)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return (attended if queries is heads_first else attended.reshape(heads_first.shape)).transpose(1, 2)

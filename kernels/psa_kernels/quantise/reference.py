"""Queries and keys in 8-bit integers, in PyTorch: what `precision="int8_qk"` is.

With the mean m of a head's keys taken away, which adds the same to all logits of a query and so changes no weight,

    logit = q . (k - m) * scale ~ (integers of q . integers of k - m) * (step of q) * (step of the head) * scale

Queries have a step for each token. Keys have one for each head, and means of keys too: their entries are no larger, and
a tile of keys of several levels needs no factor for each of its rows.
"""

from __future__ import annotations

import torch

LARGEST_INTEGER = 127
# Entries that are all below this become zero. It keeps reciprocals within float32.
MIN_ENTRY = 2.0**-100


def key_mean_and_largest(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the keys of a head, and their means, are quantised by.

    Args:
        rows: `[R, D]`: the rows of the finest level and of the text.

    Returns:
        The mean row `[D]`, and the largest entry less the mean `[]`, not finite if an entry is not.
    """
    mean = rows.mean(0)
    return mean, (rows - mean).abs().amax().clamp(min=MIN_ENTRY)


def largest_of_queries(queries: torch.Tensor) -> torch.Tensor:
    """The largest entry of each query `[Q, D]`: `[Q, 1]`, not finite if one of its entries is not."""
    return queries.abs().amax(1, keepdim=True).clamp(min=MIN_ENTRY)


def to_integers(rows: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Rows as multiples of `largest / 127`, rounded to the nearest (halves to even), 127 at most; in their dtype."""
    # The power of two keeps large entries from running over. Halves are exact: bfloat16 has many, such as largest / 2.
    numerators = rows * (LARGEST_INTEGER / 128)
    return (numerators / (largest / 128)).round_().clamp_(-LARGEST_INTEGER, LARGEST_INTEGER)


def quantised(rows: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """What the integers of rows stand for."""
    return to_integers(rows, largest) * (largest / LARGEST_INTEGER)

"""Queries and keys in 8-bit integers, in PyTorch: what `precision="int8_qk"` is.

With the mean m of a head's keys taken away, which adds the same to all logits of a query and so changes no weight,

    logit = q . (k - m) * scale ~ (integers of q . integers of k - m) * (step of q) * (step of the head) * scale

Queries have a step for each token. Keys have one for each head, and means of keys too: their entries are no larger, and
a tile of keys of several levels needs no factor for each of its rows.
"""

from __future__ import annotations

import torch

LARGEST_INTEGER = 127
# Entries below this are zero. It keeps the reciprocal of a step within float32.
LEAST_ENTRY = 2.0**-100


def key_mean_and_step(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the keys of a head, and their means, are quantised by.

    Args:
        rows: `[R, D]`: the rows of the finest level and of the text.

    Returns:
        The mean row `[D]`, and what one step of the integers is worth `[]`; the step is not finite if an entry is not.
    """
    mean = rows.mean(0)
    return mean, _step((rows - mean).abs().amax())


def query_steps(queries: torch.Tensor) -> torch.Tensor:
    """What one step of the integers of each query `[Q, D]` is worth: `[Q, 1]`, not finite if one of its entries is."""
    return _step(queries.abs().amax(1, keepdim=True))


def to_integers(rows: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Rows in steps, rounded to the nearest integer (halves to even) and no further from zero than `LARGEST_INTEGER`.

    They stay in the dtype of `rows`, in which products of integers are exact.
    """
    return (rows * (1 / step)).round_().clamp_(-LARGEST_INTEGER, LARGEST_INTEGER)


def _step(largest: torch.Tensor) -> torch.Tensor:
    return largest.clamp(min=LEAST_ENTRY) / LARGEST_INTEGER

"""Queries and keys in 8-bit integers, in PyTorch: the definition of `precision="int8_qk"`.

The mean m of a head's keys is subtracted. It adds the same to all logits of a query, so it changes no weight:

    logit = q . (k - m) * scale ~ (integers of q' . integers of k' - m') * (step of q') * (step of the head) * scale

Queries have one step for each token. The keys of a head and their means share one step: means have no larger entries,
and with one step a tile of keys of several levels needs no factor for each of its rows.

q' and k' are q and k in other channels, with the same products. Some channels of keys may be many times as large as the
others, and would leave the others few of the integers. So each channel of q is multiplied by a number, and the channel
of k divided by it, so that both vary equally much. Then a fixed rotation spreads what is large over all channels.
"""

from __future__ import annotations

from functools import cache

import torch

from psa_kernels.blocks import compute_dtype

LARGEST_INTEGER = 127
# Entries that are all below this become zero. It keeps reciprocals within float32.
MIN_ENTRY = 2.0**-100
# Tokens, of the queries and of the keys, from which the scales of channels are found.
SAMPLES = 256
# Scales are between 2^-5 and 2^5, so that a key can become no more than 32 times as large where no token was looked at.
LARGEST_EXPONENT = 5


def channel_scales(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The numbers that channels of queries are multiplied by, and those of keys divided by, to be about equally large.

    Powers of two, which are exact in any dtype. Half the range of the keys is what is left of them without their mean.

    Args:
        queries, keys: `[Nq, heads, D]` and `[Nk, D]`: all tokens of a head of the keys, and of the heads of the queries
            that read it, in the order of the model.

    Returns:
        `[D]`, float32 or float64; 1 where all that was looked at is 0, or equal, or not finite.
    """
    of_queries, of_keys = (_samples(x).nan_to_num(0, 0, 0) for x in (queries, keys))
    largest = of_queries.abs().amax((0, 1))
    half_range = of_keys.amax(0) / 2 - of_keys.amin(0) / 2
    known = (largest > 0) & (half_range > 0)
    # The square root of the ratio, rounded to a power of two.
    ratio = torch.where(known, half_range / largest, 1)
    exponents = torch.frexp(ratio.clamp(2.0**-20, 2.0**20)).exponent >> 1
    return torch.ldexp(torch.ones_like(ratio), exponents.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT))


def _samples(tokens: torch.Tensor) -> torch.Tensor:
    """`SAMPLES` tokens at even distances; some of them more than once where there are fewer."""
    places = torch.arange(SAMPLES, device=tokens.device) * len(tokens) // SAMPLES
    return tokens.index_select(0, places).to(compute_dtype(tokens))


def channel_matrices(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows of queries and of keys are multiplied by, `[D, D]` each; products of theirs stay the same.

    Args:
        scales: `[D]`, as `channel_scales` returns them.
    """
    rotation = _signs(len(scales)).to(scales)
    return scales[:, None] * rotation, rotation / (scales[:, None] * rotation.square().sum(0))


@cache
def _signs(head_dim: int) -> torch.Tensor:
    """A Hadamard matrix, each of whose rows has one sign more; for other sizes than powers of two, several in a row.

    The signs are as unlike the columns as can be, so that what all channels share is spread as well.
    """
    if not head_dim:
        return torch.zeros(0, 0)
    size = 1 << (head_dim.bit_length() - 1)
    row = torch.arange(size)[:, None]
    bits = (row & torch.arange(size)) ^ (row & (row >> 1) & 0x5555)
    for shift in (8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return torch.block_diag(1.0 - 2.0 * (bits & 1), _signs(head_dim - size))


def key_mean_and_largest(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the keys of a head, in their new channels, and their means are quantised by.

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
    """The values that the integers of rows stand for."""
    return to_integers(rows, largest) * (largest / LARGEST_INTEGER)

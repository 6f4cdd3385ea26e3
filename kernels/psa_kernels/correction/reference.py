"""The correction, in PyTorch: what sparse attention leaves out, kept in 4-bit integers and added to later outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Integers of 4 bits go from -8 to 7. They are kept plus 8, so that they are not negative.
SMALLEST_INTEGER, LARGEST_INTEGER = -8, 7
ZERO = -SMALLEST_INTEGER
# Queries whose dense attention tells how much of a correction still holds.
SAMPLES = 64


@dataclass(frozen=True, eq=False)
class Correction:
    """Dense less sparse attention of some tokens.

    Attributes:
        pairs: uint8 `[B, N, H, ceil(D / 2)]`, contiguous. Byte j of a row holds the integer of channel j, plus 8, in
            its lower four bits, and that of channel j + ceil(D / 2), or 8 if there is none, in its upper ones.
        units: float32 `[B, N, H]`, contiguous: what an integer of 1 stands for, of either sign. 0 for a row that has no
            correction.
        head_dim: D.
    """

    pairs: torch.Tensor
    units: torch.Tensor
    head_dim: int

    def of_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The correction of some tokens, named by int64 `[n]`: float32 `[B, n, H, D]`."""
        return _integers(self.pairs[:, tokens], self.head_dim) * self.units[:, tokens, :, None]


def kept_bytes(shape: Sequence[int]) -> int:
    """Bytes that the correction of an output `[B, N, H, D]` takes: 4 bits a number, and a unit a token and head."""
    batch, tokens, heads, head_dim = shape
    return batch * tokens * heads * (bytes_a_row(head_dim) + torch.float32.itemsize)


def left_out(dense: torch.Tensor, sparse: torch.Tensor) -> Correction:
    """The correction that turns the sparse output into the dense one.

    The unit of a row is such that its largest difference, by magnitude, is -8 units exactly; of two that are equally
    large, the positive one. Every other difference is off by half a unit at most, but for those beyond 7.5 units, which
    are off by one unit at most. A row with a value that is not finite has no correction.

    Args:
        dense, sparse: `[B, N, H, D]`, of one dtype.
    """
    difference = dense.float() - sparse.float()
    smallest, largest = difference.aminmax(dim=-1)
    units = torch.where(largest >= -smallest, largest, smallest) / SMALLEST_INTEGER
    units = torch.where(units.isfinite(), units, 0.0)
    integers = torch.where(units[..., None] != 0, difference / units[..., None], 0.0).round()
    stored = integers.clamp(SMALLEST_INTEGER, LARGEST_INTEGER).add(ZERO).to(torch.uint8)
    half = bytes_a_row(dense.shape[-1])
    lower, upper = stored[..., :half], stored[..., half:]
    upper = F.pad(upper, (0, half - upper.shape[-1]), value=ZERO)
    return Correction(lower | upper << 4, units, dense.shape[-1])


def add_correction(out: torch.Tensor, correction: Correction, weights: torch.Tensor) -> None:
    """Add a share of a correction to an output, in place.

    Args:
        out: `[B, N, H, D]`.
        weights: float32 `[B, H]`.
    """
    factors = correction.units * weights[:, None]
    out.copy_(out.float() + _integers(correction.pairs, correction.head_dim) * factors[..., None])


def bytes_a_row(head_dim: int) -> int:
    """Bytes of the integers of a token and head."""
    return (head_dim + 1) // 2


def _integers(pairs: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The integers `[..., D]`, int8, of bytes that hold two each."""
    return (torch.cat([pairs & 15, pairs >> 4], -1)[..., :head_dim].to(torch.int8)).sub_(ZERO)


def sample_tokens(tokens: int, device: torch.device) -> torch.Tensor:
    """Which of so many tokens tell how much of a correction still holds: int64, evenly spread, in order."""
    number = min(SAMPLES, tokens)
    return torch.arange(number, device=device) * tokens // number


def correction_weights(dense: torch.Tensor, sparse: torch.Tensor, corrections: torch.Tensor) -> torch.Tensor:
    """How much of a correction is to be added, told by a sample of tokens: the least squares, within 0 to 1.

    Args:
        dense, sparse: what attention of these tokens is now, `[B, n, H, D]`.
        corrections: what it was short of when the correction was made, float32 `[B, n, H, D]`.

    Returns:
        float32 `[B, H]`; 0 where there is nothing to add, or the sample is not finite.
    """
    missing = dense.float() - sparse.float()
    power = corrections.square().sum((1, 3))
    return torch.nan_to_num((missing * corrections).sum((1, 3)) / power, 0.0, 0.0, 0.0).clamp(0.0, 1.0)

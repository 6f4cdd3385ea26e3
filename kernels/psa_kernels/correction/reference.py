"""The correction, in PyTorch: what sparse attention leaves out, kept in 8-bit integers and added to later outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST_INTEGER = 127
# Queries whose dense attention tells how much of a correction still holds.
SAMPLES = 64


@dataclass(frozen=True, eq=False)
class Correction:
    """Dense less sparse attention of some tokens.

    Attributes:
        integers: int8 `[B, N, H, D]`, contiguous.
        units: float32 `[B, N, H]`, contiguous: what an integer of 1 stands for.
    """

    integers: torch.Tensor
    units: torch.Tensor

    def of_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The correction of some tokens, named by int64 `[n]`: float32 `[B, n, H, D]`."""
        return self.integers[:, tokens] * self.units[:, tokens, :, None]


def left_out(dense: torch.Tensor, sparse: torch.Tensor) -> Correction:
    """The correction that turns the sparse output into the dense one.

    A row with a value that is not finite has no correction.

    Args:
        dense, sparse: `[B, N, H, D]`, of one dtype.
    """
    difference = dense.float() - sparse.float()
    units = difference.abs().amax(-1) / LARGEST_INTEGER
    units = torch.where(units.isfinite(), units, 0.0)
    integers = torch.where(units[..., None] > 0, difference / units[..., None], 0.0).round()
    return Correction(integers.to(torch.int8), units)


def add_correction(out: torch.Tensor, correction: Correction, weights: torch.Tensor) -> None:
    """Add a share of a correction to an output, in place.

    Args:
        out: `[B, N, H, D]`.
        weights: float32 `[B, H]`.
    """
    factors = correction.units * weights[:, None]
    out.copy_(out.float() + correction.integers * factors[..., None])


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

"""Corrections by the kernels where they run, else by the reference."""

from __future__ import annotations

import torch

from psa_kernels.backends.triton import has_kernels
from psa_kernels.correction import reference
from psa_kernels.correction.reference import Correction
from psa_kernels.devices import entry_point


@entry_point
def left_out(dense: torch.Tensor, sparse: torch.Tensor) -> Correction:
    """As `reference.left_out`."""
    if not has_kernels(dense.device):
        return reference.left_out(dense, sparse)
    from psa_kernels.correction import triton

    return triton.left_out(dense, sparse)


@entry_point
def add_correction(out: torch.Tensor, correction: Correction, weights: torch.Tensor) -> None:
    """As `reference.add_correction`."""
    if not has_kernels(out.device):
        reference.add_correction(out, correction, weights)
        return
    from psa_kernels.correction import triton

    triton.add_correction(out, correction, weights)

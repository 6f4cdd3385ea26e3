"""The rotation by the kernel where it runs, else by the reference."""

from __future__ import annotations

import torch

from psa_kernels.backends.triton import has_kernels
from psa_kernels.devices import entry_point
from psa_kernels.rotation import reference


@entry_point
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, before: int = 0, after: int = 0) -> torch.Tensor:
    """As `reference.rotate`."""
    if not has_kernels(x.device) or x.stride(-1) != 1:
        return reference.rotate(x, cos, sin, before, after)
    from psa_kernels.rotation import triton

    return triton.rotate(x, cos, sin, before, after)

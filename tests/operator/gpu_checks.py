"""What the tests of the kernels on a GPU have in common."""

import torch


def poison_free_memory() -> None:
    """Leave NaN in the memory that the next tensors are likely to get."""
    kept = [torch.full((size,), torch.nan, device="cuda") for size in (1 << 18, 1 << 20, 1 << 22) for _ in range(8)]
    del kept


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of `expected`, which is float64."""
    return ((found.double() - expected).norm() / expected.norm()).item()

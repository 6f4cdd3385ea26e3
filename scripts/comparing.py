"""How attention outputs are compared."""

from __future__ import annotations

import torch


def first(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What an attention module gave for the video; joint attention gives a pair."""
    return result[0] if isinstance(result, tuple) else result


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2, in float32."""
    expected = expected.float()
    return float((actual.float() - expected).norm() / expected.norm())

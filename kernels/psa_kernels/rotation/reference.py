"""The rotation by positions, in PyTorch: pairs of neighbouring channels are turned by angles."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, before: int = 0, after: int = 0) -> torch.Tensor:
    """The rotated tensor, computed in float32, contiguous, in the dtype of `x`.

    Args:
        x: `[B, N, H, D]`, or `[B, N, D]` where heads are not split yet; bfloat16, float16 or float32.
        cos, sin: of the angles, float32, on the device of `x`. They broadcast against the pairs of channels of the
            tokens that are turned, `[B, N - before - after, H, D / 2]` or `[B, N - before - after, D / 2]`.
        before, after: how many of the first and last tokens are left as they are, bit for bit.
    """
    end = x.shape[1] - after
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    even, odd = x[:, before:end].float().unflatten(-1, (-1, 2)).unbind(-1)
    out[:, before:end] = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    out[:, :before], out[:, end:] = x[:, :before], x[:, end:]
    return out

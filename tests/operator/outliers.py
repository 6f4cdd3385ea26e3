"""Keys a few of whose channels are much larger than the others, as trained models have them."""

from __future__ import annotations

import torch


def with_outliers(
    q: torch.Tensor, k: torch.Tensor, kind: str, channels: list[int], factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of which some channels are `factor` times as large, and queries with which logits vary as they did before.

    Kinds: the queries' channels are as large as they were (`alone`), by the root of the factor smaller (`shared`) or by
    all of it (`undone`, which leaves the logits as they were).
    """
    scales = torch.ones(k.shape[-1], dtype=k.dtype, device=k.device)
    scales[channels] = factor
    many, less = k * scales, {"alone": 1, "shared": scales.sqrt(), "undone": scales}[kind]

    def spread(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bnhd,bmhd->bhnm", q, k - k.mean(1, keepdim=True)).square().mean().sqrt()

    return q / less * (spread(q, k) / spread(q / less, many)), many


def rotary(x: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels, the first half of them all, by angles that grow along the tokens."""
    turned = x.shape[-1] // 2
    speeds = 100.0 ** -torch.arange(0, 1, 2 / turned, dtype=x.dtype, device=x.device)
    angles = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None] * speeds
    first, second = x[..., :turned].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
    return torch.cat([pairs.flatten(-2), x[..., turned:]], -1)

"""What attention modules of several families have in common, in the layout `[B, N, H, D]`."""

from __future__ import annotations

import torch


def split_heads(attn: torch.nn.Module, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`[B, N, H * D]` to `[B, N, H, D]`, each."""
    return tuple(x.unflatten(-1, (attn.heads, -1)) for x in tensors)


def normalise(norm: torch.nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    """Apply a norm that the model may lack."""
    return x if norm is None else norm(x)


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring channels of `[..., C]` by angles whose tables `[..., C / 2]` broadcast; keeps the dtype."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def rotate_tokens(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Rotate `[B, N, H, D]` by a model's tables `[N, D]`, cosines and sines, that hold each angle twice."""
    if tables is None:
        return x
    cos, sin = (table[:, None, ::2] for table in tables)
    return rotate_pairs(x, cos, sin)


def project_out(attn: torch.nn.Module, attended: torch.Tensor) -> torch.Tensor:
    """Hidden states `[B, N, C]` of the attention output `[B, N, H, D]`."""
    linear, dropout = attn.to_out
    return dropout(linear(attended.flatten(2)))

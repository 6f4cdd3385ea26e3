"""Cuts a sequence into blocks, and blocks into groups of neighbouring tokens; the last of each may be short."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def block_count(tokens: int, block: int) -> int:
    """Number of blocks that `tokens` tokens fill, the last one perhaps in part."""
    return -(-tokens // block)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is no smaller than a positive number."""
    return 1 << (number - 1).bit_length()


def ranks_below(share: float, blocks: int) -> int:
    """How many of the ranks r = 0 .. blocks - 1 have r / blocks < share in float64."""
    rank = min(blocks, max(0, int(share * blocks) - 1))
    while rank < blocks and rank / blocks < share:
        rank += 1
    return rank


def group_sizes(tokens: int, group: int, device: torch.device) -> torch.Tensor:
    """Real tokens in each group of `group` neighbours: int64 `[ceil(tokens / group)]`."""
    starts = torch.arange(0, tokens, group, device=device)
    return (tokens - starts).clamp(max=group)


def group_means(x: torch.Tensor, group: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the real tokens of each group of neighbours: `[..., N, D]` to `[..., ceil(N / group), D]`."""
    if out is None:
        out = x.new_empty(*x.shape[:-2], block_count(x.shape[-2], group), x.shape[-1])
    full = x.shape[-2] // group
    whole, (first, *others) = out[..., :full, :], x[..., : full * group, :].unflatten(-2, (-1, group)).unbind(-2)
    # Adding whole slices is several times faster than reducing over a dimension of a few entries.
    whole.copy_(first)
    for other in others:
        whole.add_(other)
    whole.div_(group)
    if full < out.shape[-2]:
        torch.mean(x[..., full * group :, :], dim=-2, keepdim=True, out=out[..., full:, :])
    return out


def as_blocks(x: torch.Tensor, rows: int, dim: int) -> torch.Tensor:
    """Cut dimension `dim` (negative) into blocks, the last filled up with zeros: `[..., M, rows, ...]`."""
    missing = -x.shape[dim] % rows
    if missing:
        x = F.pad(x, [0, 0] * (-1 - dim) + [0, missing])
    return x.unflatten(dim, (-1, rows))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What the references compute in: float32, or the dtype of `x` where it is wider."""
    return torch.promote_types(x.dtype, torch.float32)

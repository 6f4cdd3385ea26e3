"""The pyramid of keys and values: every key block at every pooling factor, in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from psa_kernels.blocks import block_count, compute_dtype, group_means, group_sizes
from psa_kernels.layout import TokenLayout
from psa_kernels.spec import AttentionSpec


@dataclass(frozen=True)
class PyramidRows:
    """Which row of a pyramid holds what; the same for keys and values, and for every head.

    A pyramid `[R, D]` holds the means of all levels, one level after the other, and last the text tokens as they are.

    Attributes:
        factors: pooling factor of each level: those of the spec and, where `rest` is `mean`, the whole block.
        first_row: row at which each level starts, and last the one at which the text starts.
        block_rows: rows of a key block at each level; the last block may have fewer.
        log_count: `[R]`: ln of the number of real tokens that a row stands for.
        video_tokens, text_tokens: int64: index among all keys of each video key, in block order, and of each text key.
    """

    factors: tuple[int, ...]
    first_row: tuple[int, ...]
    block_rows: tuple[int, ...]
    log_count: torch.Tensor
    video_tokens: torch.Tensor
    text_tokens: torch.Tensor


def pyramid_rows(layout: TokenLayout, spec: AttentionSpec, like: torch.Tensor) -> PyramidRows:
    """Lay out the pyramids of a call, for the dtype and device of `like`."""
    video_tokens, text_tokens = layout.video_key_tokens(like.device), layout.text_key_tokens(like.device)
    counts = [group_sizes(len(video_tokens), factor, like.device) for factor in spec.factors]
    return PyramidRows(
        factors=spec.factors,
        first_row=tuple(accumulate(map(len, counts), initial=0)),
        block_rows=tuple(spec.block_key // factor for factor in spec.factors),
        log_count=torch.cat([*counts, torch.ones_like(text_tokens)]).to(compute_dtype(like)).log(),
        video_tokens=video_tokens,
        text_tokens=text_tokens,
    )


def build_pyramid(tokens: torch.Tensor, rows: PyramidRows, out: torch.Tensor) -> None:
    """Pool the keys, or the values, of one head inside their blocks.

    Args:
        tokens: `[N, D]`, all tokens, in the order of the model.
        out: `[R, D]`, written.
    """
    tokens = tokens.to(out.dtype)
    levels = [out[start:end] for start, end in zip(rows.first_row, rows.first_row[1:], strict=False)]
    in_full = levels[0] if rows.factors[0] == 1 else None
    video = torch.index_select(tokens, 0, rows.video_tokens, out=in_full)
    # A factor divides the block, so groups counted from the start of the sequence never straddle two blocks.
    for factor, level in zip(rows.factors, levels, strict=True):
        if level is not in_full:
            group_means(video, factor, out=level)
    torch.index_select(tokens, 0, rows.text_tokens, out=out[rows.first_row[-1] :])


def coarsest_levels(k: torch.Tensor, layout: TokenLayout, spec: AttentionSpec) -> torch.Tensor | None:
    """Index of the coarsest level each key block may have, or None without a similarity cap.

    It is the last level whose similarity, the mean cosine between keys that stand one pooling factor apart inside the
    block, exceeds its threshold; the first level needs none. Where a block is not longer than the factor, its first and
    its last key are compared; a block of a single key is similar to itself.

    Args:
        k: all keys `[B, N, H, D]`, in the order of the model.

    Returns:
        int64 `[B, H, key blocks]`.
    """
    if spec.similarity is None:
        return None
    keys = k.index_select(1, layout.video_key_tokens(k.device)).transpose(1, 2)
    directions = F.normalize(keys.to(compute_dtype(k)), dim=-1)
    whole = layout.video_keys // spec.block_key * spec.block_key
    parts = [directions[:, :, :whole].unflatten(2, (-1, spec.block_key))]
    if whole < layout.video_keys:
        parts.append(directions[:, :, None, whole:])
    blocks = block_count(layout.video_keys, spec.block_key)
    coarsest = torch.zeros(*keys.shape[:2], blocks, dtype=torch.int64, device=keys.device)
    for index, (factor, threshold) in enumerate(zip(spec.levels[1:], spec.similarity, strict=True), start=1):
        similarity = torch.cat([_similarity(part, factor) for part in parts], dim=2)
        coarsest[similarity > threshold] = index
    return coarsest


def _similarity(directions: torch.Tensor, distance: int) -> torch.Tensor:
    """Mean cosine of pairs `distance` apart: unit vectors `[B, H, M, n, D]` to `[B, H, M]`."""
    tokens = directions.shape[3]
    if tokens == 1:
        return directions.new_ones(directions.shape[:3])
    distance = min(distance, tokens - 1)
    return (directions[..., distance:, :] * directions[..., :-distance, :]).sum(-1).mean(-1)

"""The pyramid of keys and values: every key block at every pooling factor, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, product

import torch
import torch.nn.functional as F

from psa_kernels.blocks import block_count, compute_dtype, group_means, group_sizes
from psa_kernels.layout import TokenLayout
from psa_kernels.spec import AttentionSpec
from psa_kernels.threads import run_tasks


@dataclass(frozen=True)
class Pyramid:
    """Keys and values as the attention reads them: rows of means, all levels one after the other, text last.

    Attributes:
        keys, values: `[B, H, R, D]`: means over the real tokens of each group.
        log_count: `[R]`: ln of the number of real tokens that a row stands for.
        first_row: row at which each level starts, and last the one at which the text starts. The levels are those of
            the spec and, where `rest` is `mean`, one more with a row a block.
        block_rows: rows of a key block at each level; the last block of a level may have fewer.
    """

    keys: torch.Tensor
    values: torch.Tensor
    log_count: torch.Tensor
    first_row: tuple[int, ...]
    block_rows: tuple[int, ...]

    @property
    def text_rows(self) -> int:
        """Number of text tokens, which are never pooled."""
        return self.keys.shape[2] - self.first_row[-1]


def build_pyramid(k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, spec: AttentionSpec) -> Pyramid:
    """Pool keys and values `[B, N, H, D]` inside their blocks (DESIGN: stage 1); float32 where they are narrower."""
    factors = spec.levels + ((spec.block_key,) if spec.rest == "mean" else ())
    counts = [group_sizes(layout.video_keys, factor, k.device) for factor in factors]
    counts.append(torch.ones(layout.text_before + layout.text_after, dtype=torch.int64, device=k.device))
    sizes = [len(count) for count in counts]
    batch, _, heads, head_dim = k.shape
    keys = torch.empty(batch, heads, sum(sizes), head_dim, dtype=compute_dtype(k), device=k.device)
    values = torch.empty_like(keys)
    video_tokens, text_tokens = layout.video_key_tokens(k.device), layout.text_key_tokens(k.device)

    def worker(tasks: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for tokens, rows in tasks:
            tokens = tokens.to(rows.dtype)
            *levels, text = rows.split(sizes)
            video = torch.index_select(tokens, 0, video_tokens, out=levels[0] if factors[0] == 1 else None)
            # A factor divides the block, so groups counted from the start of the sequence never straddle two blocks.
            for factor, level in zip(factors, levels, strict=True):
                if factor > 1:
                    group_means(video, factor, out=level)
            torch.index_select(tokens, 0, text_tokens, out=text)

    tasks = [
        (source[b, :, h], rows[b, h])
        for source, rows in ((k, keys), (v, values))
        for b, h in product(range(batch), range(heads))
    ]
    run_tasks(tasks, worker, k.device)
    return Pyramid(
        keys=keys,
        values=values,
        log_count=torch.cat(counts).to(keys.dtype).log(),
        first_row=tuple(accumulate(sizes[:-1], initial=0)),
        block_rows=tuple(spec.block_key // factor for factor in factors),
    )


def coarsest_levels(k: torch.Tensor, layout: TokenLayout, spec: AttentionSpec) -> torch.Tensor | None:
    """Index of the coarsest level each key block may have (DESIGN: stage 4), or None without a similarity cap.

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

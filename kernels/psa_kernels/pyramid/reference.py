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
        rows: `[B, H, R, 2 D]`: a mean key and its mean value side by side, so that one copy fetches both.
        log_count: `[R]`: ln of the number of real tokens that a row stands for.
        first_row: row at which each level starts, and last the one at which the text starts. The levels are those of
            the spec and, where `rest` is `mean`, one more with a row a block.
        block_rows: rows of a key block at each level; the last block of a level may have fewer.
    """

    rows: torch.Tensor
    log_count: torch.Tensor
    first_row: tuple[int, ...]
    block_rows: tuple[int, ...]

    @property
    def text_rows(self) -> int:
        """Number of text tokens, which are never pooled."""
        return self.rows.shape[2] - self.first_row[-1]


def build_pyramid(k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, spec: AttentionSpec) -> Pyramid:
    """Pool keys and values `[B, N, H, D]` inside their blocks (DESIGN: stage 1); float32 where they are narrower."""
    factors = spec.levels + ((spec.block_key,) if spec.rest == "mean" else ())
    counts = [group_sizes(layout.video_keys, factor, k.device) for factor in factors]
    counts.append(torch.ones(layout.text_before + layout.text_after, dtype=torch.int64, device=k.device))
    sizes = [len(count) for count in counts]
    dtype = compute_dtype(k)
    batch, _, heads, head_dim = k.shape
    rows = torch.empty(batch, heads, sum(sizes), 2 * head_dim, dtype=dtype, device=k.device)
    video_tokens, text_tokens = layout.video_key_tokens(k.device), layout.text_key_tokens(k.device)

    def worker(tasks: Iterator[tuple[int, int]]) -> None:
        for b, h in tasks:
            both = torch.cat([k[b, :, h], v[b, :, h]], dim=-1).to(dtype)
            video = both.index_select(0, video_tokens)
            *levels, text = rows[b, h].split(sizes)
            # A factor divides the block, so groups counted from the start of the sequence never straddle two blocks.
            for factor, level in zip(factors, levels, strict=True):
                group_means(video, factor, out=level)
            torch.index_select(both, 0, text_tokens, out=text)

    run_tasks(product(range(batch), range(heads)), worker, k.device)
    return Pyramid(
        rows=rows,
        log_count=torch.cat(counts).to(dtype).log(),
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

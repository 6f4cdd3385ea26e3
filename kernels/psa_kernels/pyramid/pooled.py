"""What the pyramid's kernels leave for the others: tokens where the caller has them, and means beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from psa_kernels.blocks import block_count
from psa_kernels.layout import TokenLayout
from psa_kernels.spec import AttentionSpec


@dataclass(frozen=True)
class TritonPyramid:
    """Keys and values as the attention kernel reads them: single tokens from the originals, means from here.

    Attributes:
        source_keys: `[B, Nk, Hkv, D]`, the caller's tensor.
        keys: `[B, Hkv, R, D]` in its dtype: the means of some levels, one level after the other; the last group of a
            level may stand for fewer tokens.
        factors: the pooling factors of these levels.
        coarsest: None, or int32 `[B, Hkv, key blocks]`: index of the coarsest level each key block may have.
        source_values, values: as those of the keys; None until they are needed.
        key_spread, value_spread: None, or what the rule `budget` wants to know of keys and values, where it was found
            in the same pass.
    """

    source_keys: torch.Tensor
    keys: torch.Tensor
    factors: tuple[int, ...]
    coarsest: torch.Tensor | None
    source_values: torch.Tensor | None = None
    values: torch.Tensor | None = None
    key_spread: Any = None
    value_spread: Any = None

    def key_rows(self, layout: TokenLayout, spec: AttentionSpec) -> list[torch.Tensor | None]:
        """Keys of the text before and after the video, None where there is none, and of every level: `[B, H, rows, D]`.

        Every level has to be runs of rows in memory: a pyramid that is `gathered` where tokens are permuted.
        """
        places = row_places(self.source_keys.shape, self.source_keys.stride(), layout.counts, self.factors, spec.levels)
        return [None if place is None else place.rows(self.source_keys, self.keys) for place in places]

    def needed_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`source_values` and `values`, which have to be there."""
        if self.source_values is None or self.values is None:
            raise ValueError("the pyramid has no values yet")
        return self.source_values, self.values


class Place(NamedTuple):
    """Where rows `[B, H, rows, D]` are, in elements.

    Attributes:
        pooled: whether they are in the pyramid, and not among the caller's tokens.
        offset: of the first one.
    """

    pooled: bool
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def rows(self, tokens: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """The rows, a view of one of the two."""
        source = means if self.pooled else tokens
        return source.as_strided(self.shape, self.strides, source.storage_offset() + self.offset)


@lru_cache(maxsize=64)
def row_places(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    counts: tuple[int, int, int],
    factors: tuple[int, ...],
    levels: tuple[int, ...],
) -> tuple[Place | None, ...]:
    """Where the rows of the text before and after the video, None where there is none, and of every level are.

    Args:
        shape, strides: of the tokens `[B, N, H, D]`.
        counts: of text tokens before the video, of video tokens, of text tokens after it.
        factors: of the pyramid, whose means are `[B, H, rows, D]`, one level after the other.
        levels: pooling factors of the spec.
    """
    batch, _, heads, head_dim = shape
    before, video, after = counts

    def tokens(first: int, count: int) -> Place | None:
        if not count:
            return None
        in_order = (strides[0], strides[2], strides[1], strides[3])
        return Place(False, first * strides[1], (batch, heads, count, head_dim), in_order)

    rows = [block_count(video, factor) for factor in factors]
    in_means = (heads * sum(rows) * head_dim, sum(rows) * head_dim, head_dim, 1)
    found = [tokens(0, before), tokens(before + video, after)]
    for level in levels:
        if level not in factors:
            found.append(tokens(before, video))
            continue
        index = factors.index(level)
        offset = sum(rows[:index]) * head_dim
        found.append(Place(True, offset, (batch, heads, rows[index], head_dim), in_means))
    return tuple(found)

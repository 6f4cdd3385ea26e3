"""What the pyramid's kernels leave for the others: tokens where the caller has them, and means beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from psa_kernels.blocks import block_count
from psa_kernels.layout import TokenLayout
from psa_kernels.spec import AttentionSpec


@dataclass(frozen=True)
class TritonPyramid:
    """Keys and values as the attention kernel reads them: single tokens from the originals, means from here.

    Attributes:
        source_keys: `[B, N, H, D]`, the caller's tensor.
        keys: `[B, H, R, D]` in its dtype: the means of some levels, one level after the other; the last group of a
            level may stand for fewer tokens.
        factors: the pooling factors of these levels.
        coarsest: None, or int32 `[B, H, key blocks]`: index of the coarsest level each key block may have.
        source_values, values: as those of the keys; None until they are needed.
    """

    source_keys: torch.Tensor
    keys: torch.Tensor
    factors: tuple[int, ...]
    coarsest: torch.Tensor | None
    source_values: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def first_row(self, factor: int, tokens: int) -> int:
        """The row at which the level of a factor starts, for `tokens` video keys."""
        return sum(block_count(tokens, finer) for finer in self.factors[: self.factors.index(factor)])

    def key_rows(self, layout: TokenLayout, spec: AttentionSpec) -> list[torch.Tensor | None]:
        """Keys of the text before and after the video, None where there is none, and of every level: `[B, H, rows, D]`.

        Every level has to be runs of rows in memory: a pyramid that is `gathered` where tokens are permuted.
        """
        return self._rows(self.source_keys, self.keys, layout, spec)

    def value_rows(self, layout: TokenLayout, spec: AttentionSpec) -> list[torch.Tensor | None]:
        """The same of the values."""
        return self._rows(*self.needed_values(), layout, spec)

    def needed_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`source_values` and `values`, which have to be there."""
        if self.source_values is None or self.values is None:
            raise ValueError("the pyramid has no values yet")
        return self.source_values, self.values

    def _rows(
        self, tokens: torch.Tensor, means: torch.Tensor, layout: TokenLayout, spec: AttentionSpec
    ) -> list[torch.Tensor | None]:
        heads_first = tokens.transpose(1, 2)
        video_end = layout.text_before + layout.video_keys
        text = [heads_first[:, :, : layout.text_before], heads_first[:, :, video_end:]]
        views = [rows if rows.shape[2] else None for rows in text]
        for factor in spec.levels:
            if factor in self.factors:
                start = self.first_row(factor, layout.video_keys)
                rows = means[:, :, start : start + block_count(layout.video_keys, factor)]
            else:
                rows = heads_first[:, :, layout.text_before : video_end]
            views.append(rows)
        return views

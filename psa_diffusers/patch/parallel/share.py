"""How the ranks of a group share a forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ulysses:
    """How the ranks of a group share the video tokens and the heads of a forward.

    Attributes:
        group: the process group.
        rank: this one's place in it.
        tokens: number of video tokens of each rank, in the order of the video.
        heads: number of heads of each rank.
        any_numbers: whether the user allowed these to differ, by `ulysses_anything`.
    """

    group: Any
    rank: int
    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    any_numbers: bool = False

    def tokens_of(self, rank: int) -> slice:
        """The places of a rank's video tokens in the video."""
        return _part(self.tokens, rank)

    def heads_of(self, rank: int) -> slice:
        """The places of a rank's heads among all."""
        return _part(self.heads, rank)

    def check(self, x: torch.Tensor, before: int, after: int) -> None:
        """Check that a tensor `[B, before + n + after, ...]` has this rank's n video tokens, and needs no gradient.

        Raises:
            RuntimeError: it has not, or does.
        """
        if (found := x.shape[1] - before - after) != self.tokens[self.rank]:
            raise RuntimeError(
                f"context parallelism: this rank has {found} video tokens instead of "
                f"{self.tokens[self.rank]} of {sum(self.tokens)}; use the plan of context_parallel_plan(transformer), "
                "and no conditions beside the video"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "context parallelism: gradients are asked for, and what ranks exchange has none; run this model under "
                "torch.no_grad(), or on one GPU"
            )


def _part(counts: tuple[int, ...], rank: int) -> slice:
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])

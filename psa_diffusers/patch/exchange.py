"""Queries, keys and values on their way between ranks, each while the next one is still being computed."""

from __future__ import annotations

from typing import Any

import torch

from psa_diffusers.patch.context_parallel import Ulysses

# In the order in which families project them; all ranks exchange them in it.
PARTS = ("queries", "keys", "values")


class Exchange:
    """The exchange of one attention call: from this rank's tokens of all heads to all tokens of this rank's heads.

    Args:
        share: how the ranks share the forward.
        before, after: number of text tokens, which every rank has, before and after the video.
    """

    def __init__(self, share: Ulysses, before: int, after: int) -> None:
        self._share, self._before, self._after = share, before, after
        self._begun: dict[str, tuple[torch.Tensor, Any]] = {}

    def begin(self, part: str, x: torch.Tensor) -> None:
        """Begin to exchange one of `PARTS`, `[B, before + n + after, H, D]` with this rank's n video tokens.

        Raises:
            RuntimeError: n is not what this rank should have.
        """
        self._begun[part] = self._share.begin_gathering(x, self._before, self._after)

    def finish(
        self, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Wait for queries, keys and values, of which those whose exchange was not begun are exchanged now.

        Args:
            qkv: as given to `begin`.

        Returns:
            For each a tensor `[B, before + N + after, h, D]`.
        """
        for part, x in zip(PARTS, qkv, strict=True):
            if part not in self._begun:
                self.begin(part, x)
        for _, work in self._begun.values():
            work.wait()
        q, k, v = (self._begun[part][0].transpose(0, 1) for part in PARTS)
        return q, k, v

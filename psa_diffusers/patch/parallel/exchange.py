"""What ranks that share a forward exchange around an attention.

Before it, each rank's tokens of all heads become all tokens of the rank's heads, so that blocks, permutation and
importance are those of the whole video. After it, every rank gets its own tokens of all heads back. Every rank has the
text of joint attention: each attends it with its own heads, and the heads of the result are gathered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from psa_diffusers.patch.parallel.share import Ulysses

# In the order in which families project them; all ranks exchange them in it.
PARTS = ("queries", "keys", "values")

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Exchange(ABC):
    """The exchange of one attention call. Every rank makes the same calls in the same order.

    Args:
        share: how the ranks share the forward.
        before, after: number of text tokens, which every rank has, before and after the video.
    """

    def __init__(self, share: Ulysses, before: int, after: int) -> None:
        self._share, self._before, self._after = share, before, after

    @property
    def text(self) -> tuple[int, int]:
        """Number of text tokens before and after the video."""
        return self._before, self._after

    @abstractmethod
    def begin(self, part: str, x: torch.Tensor) -> None:
        """Begin to exchange one of `PARTS`, `[B, before + n + after, H, D]` with this rank's n video tokens.

        The tensor must stay as it is until `finish`, and values until `await_values`.

        Raises:
            RuntimeError: n is not what this rank should have, or a gradient is asked for.
        """

    @abstractmethod
    def finish(self, qkv: QKV) -> QKV:
        """Wait for queries and keys. What was not begun of queries, keys and values is exchanged now.

        Args:
            qkv: as given to `begin`.

        Returns:
            For each a tensor `[B, before + N + after, h, D]`, valid until the next call's exchange begins. The values
            are there after `await_values` only.
        """

    @abstractmethod
    def await_values(self) -> None:
        """Wait for the values too; nothing happens the second time."""

    @abstractmethod
    def output(self) -> torch.Tensor | None:
        """Where to write the attention output `[B, before + N + after, h, D]` to save a copy; None if anywhere."""

    @abstractmethod
    def heads_done(self, heads: slice) -> None:
        """Let other ranks read what `output` has of the video for all of this rank's heads up to `heads.stop`.

        It must stay as it is, and be where `output` says. Only what saves time by this calls it.
        """

    @abstractmethod
    def give_back(self, head: torch.Tensor, tail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The reverse, for the two parts of an attention output.

        Args:
            head: `[B, before + N, h, D]`: text, and all video tokens.
            tail: `[B, after, h, D]`: text.

        Returns:
            `[B, before + n, H, D]` and `[B, after, H, D]`, which nothing else writes to.
        """

"""Memory that every rank of a group can write directly on the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch

# Where to, and from where; of equal shapes `[B, N, h, D]`, the channels of a token's heads one after the other.
Copy = tuple[torch.Tensor, torch.Tensor]


class PeerMemory(ABC):
    """A piece of memory of each rank, equally large, and the copies that ranks write into each other's."""

    @abstractmethod
    def allocate(self, size: int) -> list[torch.Tensor]:
        """Replace the memory by `size` bytes on each rank. All ranks must call it at the same point.

        Returns:
            The memory of each rank, uint8.
        """

    @abstractmethod
    def push(self, own: Iterable[Copy], others: Iterable[Copy]) -> None:
        """Begin copies, which come after all work so far, and beside what follows, until `meet`.

        Args:
            own, others: into this rank's memory, and into that of others.
        """

    @abstractmethod
    def meet(self) -> None:
        """What follows comes after the copies of all ranks, and after their work before this call."""

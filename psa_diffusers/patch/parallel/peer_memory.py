"""Memory of the ranks of a group that each of them reads and writes directly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch

# Where to, and from where; of equal shapes `[B, N, h, D]`, the channels of a token's heads one after the other.
Copy = tuple[torch.Tensor, torch.Tensor]


class PeerMemory(ABC):
    """A piece of memory of each rank, equally large, which all ranks read and write."""

    @abstractmethod
    def allocate(self, size: int) -> list[torch.Tensor]:
        """Replace the memory by `size` bytes on each rank. All ranks must call it at the same point.

        Returns:
            The memory of each rank, uint8.
        """

    @abstractmethod
    def copy(self, own: Iterable[Copy], others: Iterable[Copy]) -> Any:
        """Begin copies, which come after all work so far, and beside what follows.

        What is copied from must be kept until `wait`.

        Args:
            own, others: within this rank's memory, and between it and that of other ranks.

        Returns:
            What `wait` takes.
        """

    @abstractmethod
    def wait(self, begun: Any) -> None:
        """What follows comes after copies that `copy` began, and so does what others do after the next `meet`."""

    @abstractmethod
    def meet(self) -> None:
        """What follows comes after what all ranks did before this call."""

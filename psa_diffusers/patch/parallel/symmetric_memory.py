"""The memory of GPUs of one host, by PyTorch's symmetric memory, and their copy engines."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch

from psa_diffusers.patch.parallel.local_copy import copy_within
from psa_diffusers.patch.parallel.peer_memory import Copy, PeerMemory
from psa_diffusers.patch.parallel.pitched_copy import copy_rows

# As long as NCCL waits for a rank: another one may still be compiling.
PATIENCE = timedelta(minutes=10)


class SymmetricMemory(PeerMemory):
    """Copies to other ranks go to a stream of their own, where a copy engine fills the link beside other work.

    Args:
        group: the process group, whose ranks have a GPU of the same host each.
        device: this rank's.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self._device = group, device
        self._others = torch.cuda.Stream(device)
        self._memory: torch.Tensor | None = None
        self._handle: Any = None

    def allocate(self, size: int) -> list[torch.Tensor]:
        """As `PeerMemory.allocate`.

        Raises:
            Exception: of any kind, where PyTorch or the machine has no such memory.
        """
        from torch.distributed import _symmetric_memory as symmetric

        if self._handle is not None:
            # Others may still read the memory that goes.
            self.meet()
            torch.cuda.synchronize(self._device)
            self._handle = self._memory = None
        with torch.inference_mode(False):
            self._memory = symmetric.empty(size, dtype=torch.uint8, device=self._device)
            self._handle = symmetric.rendezvous(self._memory, self._group.group_name)
            return [self._handle.get_buffer(rank, (size,), torch.uint8) for rank in range(self._handle.world_size)]

    def copy(self, own: Iterable[Copy], others: Iterable[Copy]) -> torch.cuda.Event:
        """As `PeerMemory.copy`."""
        stream = self._others
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for to, x in others:
                copy_rows(to, x, stream)
        # Local copies are kernels. Beside other work these would only wait for each other.
        for to, x in own:
            copy_within(to, x)
        return stream.record_event()

    def wait(self, begun: torch.cuda.Event) -> None:
        """As `PeerMemory.wait`, for the current stream."""
        torch.cuda.current_stream(self._device).wait_event(begun)

    def meet(self) -> None:
        """As `PeerMemory.meet`, for the current stream."""
        self._handle.barrier(channel=0, timeout_ms=int(PATIENCE.total_seconds() * 1000))

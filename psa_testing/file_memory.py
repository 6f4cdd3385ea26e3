"""Memory of processes on the CPU that each of them can write, in place of that of GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from psa_diffusers.patch.parallel.peer_memory import Copy, PeerMemory


class FileMemory(PeerMemory):
    """Files that all ranks have mapped. A copy is made at once or as late as it may be, by turns.

    Args:
        group: the process group.
        folder: where the files are; empty, and the same one on all ranks.
    """

    def __init__(self, group: Any, folder: Path) -> None:
        self._group, self._folder, self._allocated, self._copied = group, folder, 0, dist.get_rank(group)

    def allocate(self, size: int) -> list[torch.Tensor]:
        self._allocated += 1
        paths = [self._folder / f"{self._allocated}-{rank}" for rank in range(dist.get_world_size(self._group))]
        # About 12 in all dtypes: what is not finite would be computed again, so that a test might pass.
        paths[dist.get_rank(self._group)].write_bytes(b"\x41" * size)
        dist.barrier(self._group)
        return [torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) for path in paths]

    def copy(self, own: Iterable[Copy], others: Iterable[Copy]) -> list[Copy]:
        begun = [*own, *others]
        self._copied += 1
        if self._copied % 2:
            self.wait(begun)
        return begun

    def wait(self, begun: list[Copy]) -> None:
        for to, x in begun:
            to.copy_(x)
        begun.clear()

    def meet(self) -> None:
        dist.barrier(self._group)

"""Launches that follow each other in all calls of one shape, prepared together.

What only they read lies in one piece of memory, of which nothing is made but addresses. Tensors are made where Triton
has to look at them: for the first call, for addresses between multiples of 16 bytes, in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from psa_kernels.blocks import block_count
from psa_kernels.triton_launch import Launch

# Parts of the memory begin at multiples of so many bytes.
PART = 512


class Prepared:
    """Launches and their memory.

    Args:
        sizes: bytes of each part of the memory.
        launches: all of them, None where there is none. They are launched by addresses once each was launched.
        by_addresses: whether they can be launched by addresses at all.

    Attributes:
        starts: where each part begins, in bytes, and where the last one ends.
    """

    def __init__(self, sizes: Sequence[int], launches: Sequence[Launch | None], by_addresses: bool = True) -> None:
        self.starts = tuple(accumulate((block_count(size, PART) * PART for size in sizes), initial=0))
        self._launches, self._by_addresses, self._ready = launches, by_addresses, False

    def run(
        self,
        tensors: Sequence[torch.Tensor | None],
        launch: Callable[..., None],
        look: Callable[[torch.Tensor], None],
    ) -> None:
        """Ask for the memory and launch everything.

        Args:
            tensors: what the call brings, the first one there. Only their addresses may be new.
            launch: gets the address of the memory, and those of the tensors, 0 for None.
            look: gets the memory, as bytes.
        """
        first = tensors[0]
        assert first is not None, "it tells the device"
        work = torch.empty(self.starts[-1], dtype=torch.uint8, device=first.device)
        addresses = [work.data_ptr(), *[0 if each is None else each.data_ptr() for each in tensors]]
        together = 0
        for each in addresses:
            together |= each
        if self._ready and not together & 15:
            launch(*addresses)
            return
        look(work)
        self._ready = self._by_addresses and all(each is None or each.prepared for each in self._launches)

    def part(self, work: torch.Tensor, index: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A part of the memory as a tensor."""
        size, start = dtype.itemsize, self.starts[index]
        for each in shape:
            size *= each
        return work[start : start + size].view(dtype).view(shape)

"""Pooling and attention of calls of one shape, prepared together and then launched by addresses alone.

What such a call holds meanwhile lies in one piece of memory, and nothing is made of it but addresses. Tensors are made
where Triton has to look at them: for the first call, for addresses between multiples of 16 bytes, in the interpreter.
"""

from __future__ import annotations

import math

import torch

from psa_kernels.call import Call
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.pooled import TritonPyramid
from psa_kernels.pyramid.triton import held_factors, prepare_both
from psa_kernels.sparse import triton as portable
from psa_kernels.triton_launch import Launch

# Parts of the memory begin at multiples of so many bytes.
PART = 512


class PoolAndAttend:
    """For the portable kernels.

    Args:
        call, lists, out: as those of all calls that it will be asked for, in all but their addresses and entries.
        gathered: whether the pyramid holds single tokens too where they are permuted.

    Attributes:
        all_tiles: whether the portable attention kernel computes all tiles, and not only those with a flag.
    """

    all_tiles = True

    def __init__(self, call: Call, lists: BlockLists, out: torch.Tensor, gathered: bool) -> None:
        q, k, layout = call.q, call.k, call.layout
        self._factors = held_factors(layout, call.spec, gathered)
        self._shape, pooling = prepare_both(k, call.v, layout, self._factors)
        means = math.prod(self._shape) * k.element_size()
        # From the means of keys to those of values, and past them.
        self._half = -(-means // PART) * PART
        self._size = 2 * self._half
        # Tokens are read from the originals also where the pyramid has them.
        self._skipped = layout.video_keys * q.shape[3] * k.element_size() if 1 in self._factors else 0
        self._pooling = pooling
        self._portable = portable.prepare(
            q, k, call.v, self._shape[2], lists.ids, layout, call.spec, call.scale, out, all_tiles=self.all_tiles,
            known=call.answers,
        )  # fmt: skip
        self._launches: list[Launch | None] = [pooling, self._portable]
        self._by_addresses, self._prepared = True, False

    def __call__(self, call: Call, lists: BlockLists, out: torch.Tensor) -> None:
        """Fill the rows of video queries of `out`, `[B, Nq, H, D]`."""
        permutation = call.layout.short_permutation
        work = torch.empty(self._size, dtype=torch.uint8, device=out.device)
        addresses = (
            call.q.data_ptr(), call.k.data_ptr(), call.v.data_ptr(), work.data_ptr(), out.data_ptr(),
            lists.ids.data_ptr(), lists.counts.data_ptr(), 0 if permutation is None else permutation.data_ptr(),
        )  # fmt: skip
        together = 0
        for each in addresses:
            together |= each
        if together & 15 or not self._prepared:
            self._look(call, lists, out, work)
            self._prepared = self._by_addresses and all(launch is None or launch.prepared for launch in self._launches)
        else:
            self._launch(*addresses)

    def _launch(self, q: int, k: int, v: int, work: int, out: int, ids: int, counts: int, permutation: int) -> None:
        """The launches, for tensors at these addresses."""
        keys, values = work, work + self._half
        if self._pooling is not None:
            self._pooling.at_multiples(k, keys, 0, v, values, permutation)
        self._portable.at_multiples(
            q, k, v, keys + self._skipped, values + self._skipped, out, 0, ids, counts, permutation, 0
        )

    def _look(self, call: Call, lists: BlockLists, out: torch.Tensor, work: torch.Tensor) -> None:
        """The same from tensors."""
        pyramid = self._pyramid(call, work)
        if self._pooling is not None:
            permutation = call.layout.short_permutation
            self._pooling(call.k, pyramid.keys, None, call.v, pyramid.values, permutation)
        portable.sparse_attention(
            call.q, pyramid, lists, call.layout, call.spec, call.scale, out=out, known=call.answers
        )

    def _pyramid(self, call: Call, work: torch.Tensor) -> TritonPyramid:
        """The pyramid that the memory will hold."""
        size = math.prod(self._shape) * call.k.element_size()
        keys, values = (work[first : first + size].view(call.k.dtype).view(self._shape) for first in (0, self._half))
        return TritonPyramid(call.k, keys, self._factors, None, call.v, values)

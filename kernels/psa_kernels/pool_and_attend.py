"""Pooling and attention of calls of one shape, prepared together and then launched by addresses alone."""

from __future__ import annotations

import math

import torch

from psa_kernels.call import Call
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.pooled import TritonPyramid
from psa_kernels.pyramid.triton import held_factors, prepare_both
from psa_kernels.sparse import triton as portable
from psa_kernels.triton_prepared import Prepared


class PoolAndAttend:
    """For the portable kernels.

    Args:
        call, lists, out: as those of all calls that it will be asked for, in all but their addresses and entries.
        gathered: whether the pyramid holds single tokens too where they are permuted.

    Attributes:
        prepared: the launches; their memory holds the means of keys, those of values, and what a subclass needs.
        pooling: None where there is nothing to pool.
    """

    # Whether the portable attention kernel computes all tiles, and not only those with a flag.
    all_tiles = True

    def __init__(self, call: Call, lists: BlockLists, out: torch.Tensor, gathered: bool) -> None:
        k, layout = call.k, call.layout
        self.factors = held_factors(layout, call.spec, gathered)
        self.shape, self.pooling = prepare_both(k, call.v, layout, self.factors)
        # Tokens are read from the originals also where the pyramid has them.
        self.skipped = layout.video_keys * k.shape[3] * k.element_size() if 1 in self.factors else 0
        self.portable = portable.prepare(
            call.q, k, call.v, self.shape[2], lists.ids, layout, call.spec, call.scale, out,
            all_tiles=self.all_tiles, known=call.answers,
        )  # fmt: skip
        self.means_bytes = math.prod(self.shape) * k.element_size()
        self.prepared = self.prepare(call, lists, out)

    def prepare(self, call: Call, lists: BlockLists, out: torch.Tensor) -> Prepared:
        """The launches, of which `pooling` and `portable` are there already."""
        return Prepared([self.means_bytes] * 2, [self.pooling, self.portable])

    def __call__(self, call: Call, lists: BlockLists, out: torch.Tensor) -> None:
        """Fill the rows of video queries of `out`, `[B, Nq, H, D]`."""
        self.prepared.run(
            (call.q, call.k, call.v, out, lists.ids, lists.counts, call.layout.short_permutation),
            self.launch,
            lambda work: self.look(call, lists, out, work),
        )

    def launch(self, work: int, q: int, k: int, v: int, out: int, ids: int, counts: int, permutation: int) -> None:
        """The launches, at addresses."""
        values = work + self.prepared.starts[1]
        if self.pooling is not None:
            self.pooling.at_multiples(k, work, 0, v, values, permutation)
        self.portable.at_multiples(
            q, k, v, work + self.skipped, values + self.skipped, out, 0, ids, counts, permutation, 0
        )

    def look(self, call: Call, lists: BlockLists, out: torch.Tensor, work: torch.Tensor) -> None:
        """The same from tensors."""
        pyramid = self.pyramid(call, work)
        if self.pooling is not None:
            self.pooling(call.k, pyramid.keys, None, call.v, pyramid.values, call.layout.short_permutation)
        portable.sparse_attention(
            call.q, pyramid, lists, call.layout, call.spec, call.scale, out=out, known=call.answers
        )

    def pyramid(self, call: Call, work: torch.Tensor) -> TritonPyramid:
        """The pyramid that the memory will hold."""
        keys, values = (self.prepared.part(work, index, self.shape, call.k.dtype) for index in (0, 1))
        return TritonPyramid(call.k, keys, self.factors, None, call.v, values)

"""The exchange by copies between the memory of the ranks: nothing is packed, and no multiprocessor is taken.

Each rank has four places in memory that the others see. Queries, keys and values are written to the first three by the
ranks that projected them. The output is left in the fourth, for the others to read. All ranks meet before they read the
queries and keys, before they read the values, and before they read outputs. So a rank that writes knows that readers
are done with the call before: it has met them after their attention, or after they read its output. Places stay where
they are, as calls of another size would otherwise write to one place while another is read.

Outputs are read in two halves, of which the first travels while the heads of the second are computed, where that can
be. Whether it can is for each rank to say. So ranks meet before either half in every call, and one that computes all
heads at once, or may have to change them afterwards, comes to the first of these only when all are as they stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from psa_diffusers.patch.parallel.exchange import PARTS, QKV, Exchange
from psa_diffusers.patch.parallel.peer_memory import Copy, PeerMemory
from psa_diffusers.patch.parallel.pitched_copy import has_whole_rows
from psa_diffusers.patch.parallel.share import Ulysses

OUTPUT = "output"
_ALIGNED = 256  # bytes


class _Kind(NamedTuple):
    """What decides where the tensors of a call are."""

    share: Ulysses
    before: int
    after: int
    batch: int
    width: int
    dtype: torch.dtype


# For each of `PARTS`, and for the output, the tensor `[B, before + N + after, h, D]` of each rank.
Places = dict[str, list[torch.Tensor]]


class PeerAreas:
    """The places in the memory of each rank, and the tensors of calls there.

    Args:
        memory: what gives the ranks memory.
    """

    def __init__(self, memory: PeerMemory) -> None:
        self.memory = memory
        self._size = 0
        self._areas: list[torch.Tensor] = []
        self._known: dict[_Kind, Places] = {}

    def places(self, share: Ulysses, before: int, after: int, x: torch.Tensor) -> Places:
        """Where the tensors of a call are, one of whose projections is x. All ranks ask for the same calls in turn."""
        kind = _Kind(share, before, after, x.shape[0], x.shape[3], x.dtype)
        if (found := self._known.get(kind)) is None:
            self._reserve(kind)
            found = self._known[kind] = self._lay_out(kind)
        return found

    def _reserve(self, kind: _Kind) -> None:
        """Let the places be large enough for a kind of call: they never shrink, so that all ranks do this together."""
        tokens = kind.before + sum(kind.share.tokens) + kind.after
        size = _aligned(kind.batch * tokens * max(kind.share.heads) * kind.width * kind.dtype.itemsize)
        if size > self._size:
            self._known.clear()
            self._areas, self._size = [], size
            self._areas = self.memory.allocate(size * (len(PARTS) + 1))

    def _lay_out(self, kind: _Kind) -> Places:
        tokens = kind.before + sum(kind.share.tokens) + kind.after
        return {
            part: [
                _carve(area[number * self._size :], (kind.batch, tokens, heads, kind.width), kind.dtype)
                for area, heads in zip(self._areas, kind.share.heads, strict=True)
            ]
            for number, part in enumerate((*PARTS, OUTPUT))
        }


class PeerExchange(Exchange):
    """Copies rows to where another rank attends them, and outputs from where another rank computed them.

    Args:
        areas: of the ranks that share the forward.
    """

    def __init__(self, share: Ulysses, before: int, after: int, areas: PeerAreas) -> None:
        super().__init__(share, before, after)
        self._areas, self._memory = areas, areas.memory
        # What is copied is kept until it has arrived, as it is read beside other work.
        self._begun: dict[str, tuple[torch.Tensor, Any]] = {}
        self._places: Places | None = None
        # This rank's tokens of the output, once others' heads are read into it: all but the text that stands last.
        self._result: torch.Tensor | None = None

    def begin(self, part: str, x: torch.Tensor) -> None:
        """As `Exchange.begin`."""
        share, before, after = self._share, self._before, self._after
        share.check(x, before, after)
        if self._places is None:
            self._places = self._areas.places(share, before, after, x)
        x, to = _with_whole_rows(x), self._of(part)
        end, tokens = x.shape[1] - after, share.tokens_of(share.rank)
        video = slice(before + tokens.start, before + tokens.stop)
        mine, own = x[:, :, share.heads_of(share.rank)], to[share.rank]
        copies = [(own[:, video], mine[:, before:end])]
        if before:
            copies.append((own[:, :before], mine[:, :before]))
        if after:
            copies.append((own[:, own.shape[1] - after :], mine[:, end:]))
        others = [(to[rank][:, video], x[:, before:end, share.heads_of(rank)]) for rank in self._others()]
        self._begun[part] = x, self._memory.copy(copies, others)

    def finish(self, qkv: QKV) -> QKV:
        """As `Exchange.finish`; the results are views of this rank's memory."""
        for part, x in zip(PARTS, qkv, strict=True):
            if part not in self._begun:
                self.begin(part, x)
        for part in PARTS[:2]:
            self._memory.wait(self._begun.pop(part)[1])
        self._memory.meet()
        q, k, v = (self._own(part) for part in PARTS)
        return q, k, v

    def await_values(self) -> None:
        """As `Exchange.await_values`."""
        if (begun := self._begun.pop(PARTS[2], None)) is not None:
            self._memory.wait(begun[1])
            self._memory.meet()

    def output(self) -> torch.Tensor:
        """As `Exchange.output`: where other ranks read it."""
        return self._own(OUTPUT)

    def heads_done(self, heads: slice) -> None:
        """As `Exchange.heads_done`: at half of the heads others' first halves are read."""
        if self._result is None and heads.stop >= self._half(self._share.rank):
            self._read_first_halves()

    def give_back(self, head: torch.Tensor, tail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Exchange.give_back`; parts of what `output` gave are not copied there."""
        share, before, after, out = self._share, self._before, self._after, self.output()
        end = out.shape[1] - after
        for part, place in ((head, out[:, :end]), (tail, out[:, end:])):
            if part.data_ptr() != place.data_ptr() or part.stride() != place.stride():
                place.copy_(part)
        first = self._read_first_halves() if self._result is None else self._result
        self._memory.meet()
        last = out.new_empty(out.shape[0], after, *first.shape[2:])

        def copies(rank: int, heads: slice) -> Iterator[Copy]:
            found, columns = self._of(OUTPUT)[rank], share.heads_of(rank)
            yield self._video(first, rank, heads)
            if before:
                yield first[:, :before, columns], found[:, :before]
            if after:
                yield last[:, :, columns], found[:, end:]

        others = [copy for rank in self._others() for copy in copies(rank, slice(self._half(rank), share.heads[rank]))]
        begun = self._memory.copy(copies(share.rank, slice(0, share.heads[share.rank])), others)
        for each in (self._begun.pop(OUTPUT)[1], begun):
            self._memory.wait(each)
        return first, last

    def _half(self, rank: int) -> int:
        """How many heads of a rank the others read first."""
        return self._share.heads[rank] // 2

    def _read_first_halves(self) -> torch.Tensor:
        """Begin to read others' first halves into a new result, which is this rank's `_result` from now on."""
        share, out = self._share, self.output()
        self._memory.meet()
        tokens = self._before + share.tokens[share.rank]
        self._result = result = out.new_empty(out.shape[0], tokens, sum(share.heads), out.shape[3])
        copies = [self._video(result, rank, slice(0, self._half(rank))) for rank in self._others()]
        self._begun[OUTPUT] = result, self._memory.copy([], copies)
        return result

    def _video(self, result: torch.Tensor, rank: int, heads: slice) -> Copy:
        """The copy of this rank's video tokens of some of a rank's own heads into the result."""
        share, before, tokens = self._share, self._before, self._share.tokens_of(self._share.rank)
        first = share.heads_of(rank).start
        to = result[:, before:, first + heads.start : first + heads.stop]
        return to, self._of(OUTPUT)[rank][:, before + tokens.start : before + tokens.stop, heads]

    def _of(self, part: str) -> list[torch.Tensor]:
        assert self._places is not None, "begin has found them"
        return self._places[part]

    def _own(self, part: str) -> torch.Tensor:
        return self._of(part)[self._share.rank]

    def _others(self) -> list[int]:
        """The other ranks, of which each begins with another one."""
        ranks = len(self._share.heads)
        return [(self._share.rank + step) % ranks for step in range(1, ranks)]


def _with_whole_rows(x: torch.Tensor) -> torch.Tensor:
    return x if has_whole_rows(x) else x.contiguous()


def _carve(area: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor at the beginning of an area."""
    return area[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED

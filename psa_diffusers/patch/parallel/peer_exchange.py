"""The exchange by copies into the memory of the other ranks: nothing is packed, and no multiprocessor is taken.

Each rank has two areas in memory that the others write to. Queries, keys and values arrive in the first, outputs in the
second. All ranks meet twice a call: before attention reads the first area, and before the outputs are taken from the
second. So whoever writes to an area knows that its owner is done with the call before: it has met the owner after
that one's attention, or after it took its outputs. Areas keep their places, as calls of another size would otherwise
write to one area where the other still is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from psa_diffusers.patch.parallel.exchange import PARTS, QKV, Exchange
from psa_diffusers.patch.parallel.peer_memory import Copy, PeerMemory
from psa_diffusers.patch.parallel.pitched_copy import has_whole_rows
from psa_diffusers.patch.parallel.share import Ulysses

_ALIGNED = 256  # bytes


class _Kind(NamedTuple):
    """What decides where the tensors of a call are."""

    share: Ulysses
    before: int
    after: int
    batch: int
    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Places:
    """Where the tensors of calls of a kind are: views of the ranks' memory.

    Attributes:
        parts: for each of `PARTS` the tensor of each rank, `[B, before + N + after, h, D]`.
        heads: the first part of the output of each rank, `[B, before + n, H, D]`.
        tails: the second, `[B, after, H, D]`.
    """

    parts: dict[str, list[torch.Tensor]]
    heads: list[torch.Tensor]
    tails: list[torch.Tensor]


class PeerAreas:
    """The two areas of each rank, and where calls find their tensors in them.

    Args:
        memory: what gives the ranks memory.
    """

    def __init__(self, memory: PeerMemory) -> None:
        self.memory = memory
        self._sizes = (0, 0)
        self._areas: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._known: dict[_Kind, _Places] = {}

    def places(self, share: Ulysses, before: int, after: int, x: torch.Tensor) -> _Places:
        """Where the tensors of a call are, one of whose projections is x. All ranks ask for the same calls in turn."""
        kind = _Kind(share, before, after, x.shape[0], x.shape[3], x.dtype)
        if (found := self._known.get(kind)) is None:
            self._reserve(kind)
            found = self._known[kind] = self._lay_out(kind)
        return found

    def _reserve(self, kind: _Kind) -> None:
        """Let the areas be large enough for a kind of call: they never shrink, so that all ranks do this together."""
        share, beside, most = kind.share, kind.before + kind.after, max(kind.share.heads)
        channel = kind.batch * kind.width * kind.dtype.itemsize
        part = _aligned((sum(share.tokens) + beside) * most * channel)
        outputs = _aligned((max(share.tokens) + kind.before) * sum(share.heads) * channel)
        sizes = len(PARTS) * part, outputs + _aligned(kind.after * sum(share.heads) * channel)
        if all(size <= had for size, had in zip(sizes, self._sizes, strict=True)):
            return
        self._known.clear()
        self._areas.clear()
        self._sizes = first, second = max(sizes[0], self._sizes[0]), max(sizes[1], self._sizes[1])
        self._areas = [(whole[:first], whole[first:]) for whole in self.memory.allocate(first + second)]

    def _lay_out(self, kind: _Kind) -> _Places:
        share, before, after = kind.share, kind.before, kind.after
        total, all_heads = before + sum(share.tokens) + after, sum(share.heads)
        parts: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS}
        heads, tails = list[torch.Tensor](), list[torch.Tensor]()
        for rank, (first, second) in enumerate(self._areas):
            inbox = _carve(first, kind, [(total, share.heads[rank])] * len(PARTS))
            for part, view in zip(PARTS, inbox, strict=True):
                parts[part].append(view)
            head, tail = _carve(second, kind, [(before + share.tokens[rank], all_heads), (after, all_heads)])
            heads.append(head)
            tails.append(tail)
        return _Places(parts, heads, tails)


class PeerExchange(Exchange):
    """Writes each rank's rows where that rank attends them, and outputs where their rank needs them.

    Args:
        areas: of the ranks that share the forward.
    """

    def __init__(self, share: Ulysses, before: int, after: int, areas: PeerAreas) -> None:
        super().__init__(share, before, after)
        self._areas = areas
        # Kept until all have met, as they are read beside other work.
        self._begun: dict[str, torch.Tensor] = {}
        self._places: _Places | None = None

    def begin(self, part: str, x: torch.Tensor) -> None:
        """As `Exchange.begin`."""
        share, before = self._share, self._before
        share.check(x, before, self._after)
        self._places = places = self._places or self._areas.places(share, before, self._after, x)
        self._begun[part] = x = _with_whole_rows(x)
        end, tokens, to = x.shape[1] - self._after, share.tokens_of(share.rank), places.parts[part]
        video = slice(before + tokens.start, before + tokens.stop)
        mine, own = x[:, :, share.heads_of(share.rank)], to[share.rank]
        copies = [(own[:, video], mine[:, before:end])]
        if before:
            copies.append((own[:, :before], mine[:, :before]))
        if self._after:
            copies.append((own[:, own.shape[1] - self._after :], mine[:, end:]))
        others = [(to[rank][:, video], x[:, before:end, share.heads_of(rank)]) for rank in self._others()]
        self._areas.memory.push(copies, others)

    def finish(self, qkv: QKV) -> QKV:
        """As `Exchange.finish`; the results are views of this rank's memory."""
        for part, x in zip(PARTS, qkv, strict=True):
            if part not in self._begun:
                self.begin(part, x)
        self._areas.memory.meet()
        self._begun.clear()
        assert self._places is not None, "begin has found them"
        q, k, v = (self._places.parts[part][self._share.rank] for part in PARTS)
        return q, k, v

    def give_back(self, head: torch.Tensor, tail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Exchange.give_back`."""
        share, places, before = self._share, self._places, self._before
        assert places is not None, "finish has found them"
        head, tail = _with_whole_rows(head), _with_whole_rows(tail)

        def copies(rank: int) -> Iterator[Copy]:
            heads, tokens = share.heads_of(share.rank), share.tokens_of(rank)
            to = places.heads[rank][:, :, heads]
            yield to[:, before:], head[:, before + tokens.start : before + tokens.stop]
            if before:
                yield to[:, :before], head[:, :before]
            if self._after:
                yield places.tails[rank][:, :, heads], tail

        self._areas.memory.push(copies(share.rank), (copy for rank in self._others() for copy in copies(rank)))
        self._areas.memory.meet()
        return places.heads[share.rank].clone(), places.tails[share.rank].clone()

    def _others(self) -> list[int]:
        """The other ranks, of which each begins with another one."""
        ranks = len(self._share.heads)
        return [(self._share.rank + step) % ranks for step in range(1, ranks)]


def _with_whole_rows(x: torch.Tensor) -> torch.Tensor:
    return x if has_whole_rows(x) else x.contiguous()


def _carve(area: torch.Tensor, kind: _Kind, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Tensors `[B, N, h, D]` for pairs of N and h, one after the other at the beginning of an area."""
    found, start = list[torch.Tensor](), 0
    for tokens, heads in sizes:
        shape = kind.batch, tokens, heads, kind.width
        end = start + math.prod(shape) * kind.dtype.itemsize
        found.append(area[start:end].view(kind.dtype).view(shape))
        start = _aligned(end)
    return found


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED

"""Which exchange the ranks of a group use: decided once, by what works between all of them."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from psa_diffusers.patch.parallel.collectives import CollectiveExchange
from psa_diffusers.patch.parallel.exchange import Exchange
from psa_diffusers.patch.parallel.peer_exchange import PeerAreas, PeerExchange
from psa_diffusers.patch.parallel.peer_memory import PeerMemory
from psa_diffusers.patch.parallel.share import Ulysses
from psa_diffusers.patch.parallel.symmetric_memory import SymmetricMemory

NO_PEERS = (
    "the GPUs that share a video exchange it by torch.distributed's collectives, which takes longer than copies into "
    "each other's memory: {reason}"
)
_CHANGED = "what one copied to the memory of another arrived changed"

# Makes the memory of the ranks of a group, on this rank's device; None where only collectives reach all ranks.
MakeMemory = Callable[[Any, torch.device], PeerMemory | None]


def symmetric_memory(group: Any, device: torch.device) -> PeerMemory | None:
    """The memory of GPUs of one host. Every rank of the group calls this at the same point."""
    if device.type != "cuda":
        return None
    hosts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(hosts, _host(), group=group)
    return SymmetricMemory(group, device) if len(set(hosts)) == 1 else None


def _host() -> tuple[str, str]:
    """What only processes of one running host have in common."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return platform.node(), boot.read_text() if boot.exists() else ""


class Exchanges:
    """Makes the exchange of each attention call.

    Args:
        tell: is told once if ranks of one host cannot write into each other's memory.
    """

    make_memory: MakeMemory = staticmethod(symmetric_memory)

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._areas: dict[tuple[Any, torch.device], PeerAreas | None] = {}

    def of_call(self, share: Ulysses, before: int, after: int, device: torch.device) -> Exchange:
        """The exchange of one call, whose tensors are on a device; arguments are those of `Exchange`."""
        key = share.group, device
        if key not in self._areas:
            self._areas[key] = self._connect(share, device)
        areas = self._areas[key]
        if areas is None:
            return CollectiveExchange(share, before, after)
        return PeerExchange(share, before, after, areas)

    def _connect(self, share: Ulysses, device: torch.device) -> PeerAreas | None:
        if (memory := self.make_memory(share.group, device)) is None:
            return None
        trial = _Trial(memory, share, device)
        # One after the other, so that no rank waits for copies of one that got no memory.
        for step in (trial.allocate, trial.copy):
            if (reason := _any_failure(step, share)) is not None:
                self._tell(NO_PEERS.format(reason=reason))
                return None
        return PeerAreas(memory)


class _Trial:
    """Copies between all ranks, whose results are known."""

    def __init__(self, memory: PeerMemory, share: Ulysses, device: torch.device) -> None:
        self._memory, self._rank = memory, share.rank
        # Samples, tokens, heads, channels; half of the heads are copied.
        numbers = torch.arange(2 * 3 * 8 * 16, dtype=torch.uint8).view(2, 3, 8, 16)
        self._sent = [(numbers + rank).to(device)[:, :, :4] for rank in range(len(share.heads))]
        self._slots: list[torch.Tensor] = []

    def allocate(self) -> None:
        """Get memory, with a slot for what each rank sends.

        Raises:
            Exception: of any kind, where there is none.
        """
        shape = len(self._sent), *self._sent[0].shape
        self._slots = [each.view(shape) for each in self._memory.allocate(math.prod(shape))]

    def copy(self) -> None:
        """Copy something to every rank.

        Raises:
            RuntimeError: what arrives from any is not what it sends.
        """
        own = self._slots[self._rank]
        own.fill_(255)
        self._memory.meet()
        to = [slots[self._rank] for slots in self._slots]
        sent = self._sent[self._rank]
        self._memory.wait(self._memory.copy([(to.pop(self._rank), sent)], [(each, sent) for each in to]))
        self._memory.meet()
        if not all(map(torch.equal, own, self._sent)):
            raise RuntimeError(_CHANGED)


def _any_failure(step: Callable[[], None], share: Ulysses) -> str | None:
    """Why a step failed on any rank; None if it did on none."""
    reason = None
    try:
        step()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    reasons: list[str | None] = [None] * len(share.heads)
    dist.all_gather_object(reasons, reason, group=share.group)
    return next(filter(None, reasons), None)

"""What one rank of a test of exchanges does, on the CPU or on a GPU of its own."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from psa_diffusers.patch.parallel.collectives import CollectiveExchange
from psa_diffusers.patch.parallel.exchange import PARTS, QKV, Exchange
from psa_diffusers.patch.parallel.exchanges import Exchanges
from psa_diffusers.patch.parallel.peer_exchange import PeerExchange
from psa_diffusers.patch.parallel.peer_memory import Copy, PeerMemory
from psa_diffusers.patch.parallel.share import Ulysses
from psa_testing.file_memory import FileMemory


def by_files(folder: Path) -> Callable[[Any, torch.device], PeerMemory]:
    """Memory for `Exchanges.make_memory`, each time in another folder inside of this one."""
    made = iter(range(1000))

    def make(group: Any, _: torch.device) -> PeerMemory:
        place = folder / f"memory-{next(made)}"
        place.mkdir(exist_ok=True)
        return FileMemory(group, place)

    return make


def through_files(ranks: int, folder: str, check: Callable[..., None], *arguments: Any) -> None:
    """A check of pipelines whose ranks write into each other's memory."""
    exchanges: Any = Exchanges
    exchanges.make_memory = staticmethod(by_files(Path(folder)))
    begun: list[str] = []
    begin, heads_done = PeerExchange.begin, PeerExchange.heads_done

    def counted(self: PeerExchange, part: str, x: torch.Tensor) -> None:
        begun.append(part)
        begin(self, part, x)

    def waiting(self: PeerExchange, heads: slice) -> None:
        heads_done(self, heads)
        time.sleep(0.01)  # others read now what they may read, and not what comes after

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(PeerExchange, "begin", counted)
        changed.setattr(PeerExchange, "heads_done", waiting)
        check(ranks, *arguments)
    assert begun[:3] == list(PARTS)


def equal_collectives(ranks: int, device: str, folder: str) -> None:
    """What is copied into the memory of other ranks is what collectives bring, bit for bit, call after call."""
    exchanges = Exchanges(_never)
    if device == "cpu":
        exchanges.make_memory = by_files(Path(folder))  # type: ignore[method-assign]
    chosen = random.Random(3)
    places = torch.device(device, dist.get_rank()) if device == "cuda" else torch.device(device)
    dtypes = cycle((torch.bfloat16, torch.float32, torch.float16))
    delays = random.Random(dist.get_rank())
    for case in range(24):
        uneven = case % 3 == 0
        tokens = tuple(chosen.randint(1, 90) if uneven else 33 for _ in range(ranks))
        heads = tuple(chosen.randint(1, 5) if uneven else 2 for _ in range(ranks))
        share = Ulysses(dist.group.WORLD, dist.get_rank(), tokens, heads, uneven)
        text, batch, width = chosen.choice((0, 5, 13)), chosen.choice((1, 2)), chosen.choice((16, 64, 128))
        before, after = chosen.choice(((text, 0), (0, text)))
        dtype = next(dtypes)
        qkv = _projections(share, before + after, batch, width, dtype, places, strided=case % 4 == 1)
        results: list[list[torch.Tensor]] = []
        for exchange in (
            CollectiveExchange(share, before, after),
            exchanges.of_call(share, before, after, places),
        ):
            assert type(exchange) is (PeerExchange if results else CollectiveExchange)
            results.append(_round(exchange, qkv, (before, after), delays, begun=case % 3))
        for expected, found in zip(*results, strict=True):
            assert expected.shape == found.shape and torch.equal(expected, found), (case, tokens, heads, before, after)


def _projections(
    share: Ulysses, text: int, batch: int, width: int, dtype: torch.dtype, device: torch.device, strided: bool
) -> QKV:
    """Random queries, keys and values of this rank; text is the same on all."""
    tokens, heads = share.tokens[share.rank], sum(share.heads)
    shape = batch, tokens + text, 3 * heads, width
    if not strided:
        x = torch.randn(shape, device=device).to(dtype)
        q, k, v = (part.contiguous() for part in x.chunk(3, dim=2))
        return q, k, v
    x = torch.randn(batch, tokens + text, 3, width, heads, device=device).to(dtype)
    q, k, v = (x[:, :, part].transpose(2, 3) for part in range(3))
    return q, k, v


def _round(
    exchange: Exchange, qkv: QKV, text: tuple[int, int], delays: random.Random, begun: int
) -> list[torch.Tensor]:
    """All that an exchange brings for one call, whose attention is that queries, keys and values are added.

    Where it says where to write the output, the heads of the video are written there one after the other, and then the
    text. Each rank says when heads are done, or does not, as chance has it.
    """
    for part, x in zip(PARTS[:begun], qkv, strict=False):
        exchange.begin(part, x)
        _wait(delays, x.device)
    received = exchange.finish(qkv)
    kept = [x.clone() for x in received[:2]]
    _wait(delays, qkv[0].device)
    exchange.await_values()
    exchange.await_values()
    out = sum(received[1:], start=received[0])
    before, end = text[0], out.shape[1] - text[1]
    if (to := exchange.output()) is not None and begun:
        says = delays.random() < 0.7
        for head in range(out.shape[2]):
            to[:, before:end, head] = out[:, before:end, head]
            if says and (delays.random() < 0.7 or head == out.shape[2] - 1):
                exchange.heads_done(slice(0, head + 1))
            _wait(delays, out.device)
        out = to.copy_(out)
    return [*kept, received[2].clone(), *exchange.give_back(out[:, :end], out[:, end:])]


def _wait(delays: random.Random, device: torch.device) -> None:
    """Let this rank fall behind others, at times."""
    if device.type == "cuda":
        torch.cuda._sleep(delays.choice((0, 0, 2_000_000)))
    else:
        time.sleep(delays.choice((0, 0, 0.003)))


def _never(what: str) -> None:
    raise AssertionError(what)


class _NoMemory(FileMemory):
    def allocate(self, size: int) -> list[torch.Tensor]:
        if dist.get_rank(self._group) == 1:
            raise RuntimeError("no peer access")
        paths = [self._folder / str(rank) for rank in range(dist.get_world_size(self._group))]
        for path in paths:
            path.write_bytes(b"\xff" * size)
        return [torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) for path in paths]


class _Forgetful(FileMemory):
    def wait(self, begun: list[Copy]) -> None:
        if dist.get_rank(self._group) == 0:
            del begun[-1:]
        super().wait(begun)


def fall_back(ranks: int, folder: str) -> None:
    """If any rank has no memory, or a copy does not arrive, all exchange by collectives, and each says why, once."""
    share = Ulysses(dist.group.WORLD, dist.get_rank(), (4,) * ranks, (2,) * ranks)
    cpu = torch.device("cpu")
    for kind, why in ((_NoMemory, "RuntimeError: no peer access"), (_Forgetful, "arrived changed")):
        place = Path(folder, kind.__name__)
        place.mkdir(exist_ok=True)
        told: list[str] = []
        exchanges = Exchanges(told.append)
        exchanges.make_memory = lambda group, _, kind=kind, place=place: kind(group, place)  # type: ignore
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = [exchanges.of_call(share, 0, 0, cpu) for _ in range(2)]
        assert [type(each) for each in made] == [CollectiveExchange] * 2
        assert len(told) == 1 and why in told[0]

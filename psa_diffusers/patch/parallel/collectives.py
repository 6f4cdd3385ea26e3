"""The exchange by collectives of torch.distributed, which any backend has."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from psa_diffusers.patch.parallel.exchange import PARTS, QKV, Exchange
from psa_diffusers.patch.parallel.share import Ulysses


class CollectiveExchange(Exchange):
    """Packs what each rank gets, sends it by an all-to-all, and puts together what arrives."""

    def __init__(self, share: Ulysses, before: int, after: int) -> None:
        super().__init__(share, before, after)
        self._begun: dict[str, tuple[torch.Tensor, Any]] = {}
        self._has_values = False

    def begin(self, part: str, x: torch.Tensor) -> None:
        """As `Exchange.begin`; the tensor is read at once."""
        share, before = self._share, self._before
        share.check(x, before, self._after)
        video = x[:, before : x.shape[1] - self._after]
        batch, width, mine, total = x.shape[0], x.shape[3], share.heads[share.rank], sum(share.tokens)
        sizes = [video.shape[1] * batch * heads * width for heads in share.heads]
        # Tokens come first: then the ranks' parts arrive in order, and text has its place beside them.
        joined = x.new_empty(before + total + self._after, batch, mine, width)
        heads = share.heads_of(share.rank)
        for place, text in (
            (joined[:before], x[:, :before]),
            (joined[before + total :], x[:, x.shape[1] - self._after :]),
        ):
            place.copy_(text[:, :, heads].transpose(0, 1))
        received = joined[before : before + total].view(-1)
        shares = [tokens * batch * mine * width for tokens in share.tokens]
        work = dist.all_to_all_single(received, self._by_rank(video), shares, sizes, share.group, async_op=True)
        self._begun[part] = joined, work

    def _by_rank(self, video: torch.Tensor) -> torch.Tensor:
        """`[B, n, H, D]` flat, the heads of the first rank first."""
        heads = self._share.heads
        if len(set(heads)) == 1:
            return video.unflatten(2, (len(heads), -1)).permute(2, 1, 0, 3, 4).reshape(-1)
        return torch.cat([part.transpose(0, 1).reshape(-1) for part in video.split(heads, dim=2)])

    def finish(self, qkv: QKV) -> QKV:
        """As `Exchange.finish`; the results are this call's own."""
        for part, x in zip(PARTS, qkv, strict=True):
            if part not in self._begun:
                self.begin(part, x)
        for part in PARTS[:2]:
            self._begun[part][1].wait()
        q, k, v = (self._begun[part][0].transpose(0, 1) for part in PARTS)
        return q, k, v

    def await_values(self) -> None:
        """As `Exchange.await_values`."""
        if not self._has_values:
            self._begun[PARTS[2]][1].wait()
            self._has_values = True

    def output(self) -> None:
        """As `Exchange.output`: the output is packed anyway."""
        return None

    def heads_done(self, heads: slice) -> None:
        """As `Exchange.heads_done`: all heads are sent at once."""

    def give_back(self, head: torch.Tensor, tail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Exchange.give_back`."""
        share, before = self._share, self._before
        video = head[:, before:]
        batch, _, mine, width = video.shape
        own = share.tokens[share.rank]
        send = video.transpose(0, 1).reshape(-1)
        sizes = [own * batch * heads * width for heads in share.heads]
        received = send.new_empty(sum(sizes))
        dist.all_to_all_single(received, send, sizes, [n * batch * mine * width for n in share.tokens], share.group)
        parts = [
            part.view(own, batch, heads, width) for part, heads in zip(received.split(sizes), share.heads, strict=True)
        ]
        video = torch.cat(parts, dim=2).transpose(0, 1)
        if before:
            video = torch.cat([self._gather_text(head[:, :before]), video], dim=1)
        return video, self._gather_text(tail) if tail.shape[1] else video.new_empty(batch, 0, *video.shape[2:])

    def _gather_text(self, text: torch.Tensor) -> torch.Tensor:
        """Gather all heads of text, `[B, T, H, D]`, from the ranks' own heads."""
        share = self._share
        most = max(share.heads)
        padded = torch.nn.functional.pad(text, (0, 0, 0, most - text.shape[2])).contiguous()
        gathered = [torch.empty_like(padded) for _ in share.heads]
        dist.all_gather(gathered, padded, group=share.group)
        return torch.cat([part[:, :, :heads] for part, heads in zip(gathered, share.heads, strict=True)], dim=2)

"""Attention of samples whose text is padded: padding is cut off, so that nothing attends it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F

from psa_diffusers.families import DenseOnlyError
from psa_kernels import AttentionSpec, AttentionStats, BlockLists, psa_attention, select_blocks


class TextLengths:
    """How many text tokens of each sample are real.

    Reading the mask waits for the device, so the answer for the last mask is kept: a forward gives all its layers the
    same mask. It serves as long as the mask is the same object and nothing has written to it since, as far as the mask
    tells: tensors of inference mode do not.
    """

    def __init__(self) -> None:
        self._source: weakref.ref[torch.Tensor] | None = None
        self._state: tuple[int, Hashable] = (0, None)
        self._lengths: list[int] = []

    def known(self, source: torch.Tensor, kind: Hashable = None) -> list[int] | None:
        """What `of` returned for the last mask, if it is this one; None if not."""
        if self._source is None or self._source() is not source or self._state != (_writes(source), kind):
            return None
        return self._lengths

    def of(self, source: torch.Tensor, text_mask: torch.Tensor, kind: Hashable = None) -> list[int]:
        """The number of real tokens of each sample.

        Args:
            source: the model's own mask; `text_mask` is the part of it about text.
            text_mask: `[B, T]`, false or zero at padding.
            kind: what else decides which part of the mask is about text, such as numbers of tokens.

        Raises:
            DenseOnlyError: padding stands before real text.
        """
        if (known := self.known(source, kind)) is not None:
            return known
        self._lengths = self._read(text_mask)
        self._source, self._state = weakref.ref(source), (_writes(source), kind)
        return self._lengths

    @staticmethod
    def _read(text_mask: torch.Tensor) -> list[int]:
        """Wait for the device and count."""
        mask = text_mask.bool().cpu()
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise DenseOnlyError("padding stands between its text tokens")
        return mask.sum(1).tolist()


def _writes(mask: torch.Tensor) -> int:
    """How often a tensor was written to; 0 for one of inference mode, which does not count."""
    return 0 if mask.is_inference() else mask._version


def attend_real_text(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    lists: BlockLists | None,
    *,
    before: int,
    after: int,
    lengths: list[int] | None,
    permutation: torch.Tensor | None,
    strict: bool = False,
    return_lists: bool = False,
    await_values: Callable[[], None] | None = None,
    out: torch.Tensor | None = None,
    heads_done: Callable[[slice], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[AttentionStats], BlockLists | None]:
    """`psa_attention` in which each sample has its own number of text tokens after the video.

    If all samples have the same text length they are computed together, otherwise each alone. Padding is cut off, which
    is a view; a mask would need an entry for every query and key.

    Args:
        q, k, v: `[B, N, H, D]`: `before` text tokens, the video, `after` text tokens, padding last.
        lists: which blocks the video tokens of all samples read; chosen here if None.
        lengths: how many of the `after` tokens are real, for each sample; None if all are.
        permutation, strict: as in `psa_attention`.
        return_lists: whether the lists are wanted.
        await_values: if given, is called before the values are read: after blocks were chosen, where the rule allows.
        out: where the output may be written, `[B, N, H, D]`, contiguous.
        heads_done: as in `psa_attention`; is called only where the output is written there.

    Returns:
        The attention output of the first N - after tokens, and that of the last `after` ones, zero at padding; the
        statistics of each computation; and the lists, None if they are not wanted.
    """
    first = q.shape[1] - after
    settings: dict[str, Any] = {"text_before": before, "permutation": permutation, "strict": strict}
    if lengths is None or len(set(lengths)) == 1:
        length = after if lengths is None else lengths[0]
        if length < after:
            q, k, v = (x[:, : first + length] for x in (q, k, v))
            out = None if out is None else out[:, : first + length]
        if await_values is not None:
            if lists is None and spec.rule != "budget":
                lists = select_blocks(q, k, spec, text_after=length, **settings)
            await_values()
        # Of several samples whose padding is cut off, the rows are not contiguous.
        if out is not None and out.is_contiguous():
            settings |= {"out": out, "heads_done": heads_done}
        out, stats, *found = psa_attention(
            q, k, v, spec, text_after=length, lists=lists, return_stats=True, return_lists=return_lists, **settings
        )
        tail = out[:, first:]
        if length < after:
            tail = F.pad(tail, (0, 0, 0, 0, 0, after - length))
        return out[:, :first] if after else out, tail, [stats], found[0] if found else None
    if await_values is not None:
        await_values()
    if lists is None:
        lists = select_blocks(q, k, spec, v=v, text_after=after, **settings)
    heads, tails, all_stats = [], [], []
    for sample, length in enumerate(lengths):
        part = slice(sample, sample + 1)
        out, stats = psa_attention(
            q[part, : first + length],
            k[part, : first + length],
            v[part, : first + length],
            spec,
            text_after=length,
            lists=lists[part],
            return_stats=True,
            **settings,
        )
        heads.append(out[:, :first])
        tails.append(F.pad(out[:, first:], (0, 0, 0, 0, 0, after - length)))
        all_stats.append(stats)
    return torch.cat(heads), torch.cat(tails), all_stats, lists

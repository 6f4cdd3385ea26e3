"""Attention of samples whose text is padded: padding is cut off, so that nothing attends it."""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F

from psa_diffusers.families.family import DenseOnlyError
from psa_kernels import AttentionSpec, AttentionStats, BlockLists, psa_attention


class TextLengths:
    """How many text tokens of each sample are real.

    The mask has to be brought from the device, so the answer for one mask is kept: a forward gives all its layers the
    same one.
    """

    def __init__(self) -> None:
        self._source: weakref.ref[torch.Tensor] | None = None
        self._lengths: list[int] = []

    def of(self, source: torch.Tensor, text_mask: torch.Tensor) -> list[int]:
        """The number of real tokens of each sample.

        Args:
            source: the tensor that the model made, of which `text_mask` is the part about text.
            text_mask: `[B, T]`, false or zero at padding.

        Raises:
            DenseOnlyError: padding stands before real text.
        """
        if self._source is None or self._source() is not source:
            self._lengths = self._read(text_mask)
            self._source = weakref.ref(source)
        return self._lengths

    @staticmethod
    def _read(text_mask: torch.Tensor) -> list[int]:
        """Wait for the device and count."""
        mask = text_mask.bool().cpu()
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise DenseOnlyError("padding stands between its text tokens")
        return mask.sum(1).tolist()


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    lists: BlockLists,
    *,
    before: int,
    after: int,
    lengths: list[int],
    permutation: torch.Tensor | None,
    strict: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, list[AttentionStats]]:
    """`psa_attention` in which each sample has its own number of text tokens after the video.

    Samples of one text length are computed together, otherwise each alone: to cut padding off is a view, a mask would
    be of every query by every key.

    Args:
        q, k, v: `[B, N, H, D]`: `before` text tokens, the video, `after` text tokens, padding last.
        lists: which blocks the video tokens of all samples read.
        lengths: how many of the `after` tokens are real, for each sample.
        permutation, strict: as in `psa_attention`.

    Returns:
        The attention output of the first N - after tokens and of the last `after` ones, which is zero at padding; and
        the statistics of each computation.
    """
    first = q.shape[1] - after
    together = len(set(lengths)) == 1
    heads, tails, stats = [], [], []
    for part in [slice(None)] if together else [slice(index, index + 1) for index in range(len(lengths))]:
        length = lengths[part][0]
        out, figures = psa_attention(
            *(x[part, : first + length] for x in (q, k, v)),
            spec,
            text_before=before,
            text_after=length,
            permutation=permutation,
            lists=lists[part],
            strict=strict,
            return_stats=True,
        )
        heads.append(out[:, :first])
        tails.append(F.pad(out[:, first:], (0, 0, 0, 0, 0, after - length)))
        stats.append(figures)
    return (heads[0], tails[0], stats) if together else (torch.cat(heads), torch.cat(tails), stats)

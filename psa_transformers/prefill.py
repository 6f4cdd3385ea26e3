"""One forward over many tokens: which keys lie in the past of which queries, which are padding, which are text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch

from psa_transformers.fallbacks import Unserved
from psa_transformers.spans import Span


@dataclass(frozen=True)
class Part:
    """Neighbouring batch items whose tokens are alike.

    Attributes:
        items: the batch items.
        first_key, end: their keys that are no padding.
        text_before, text_after: how many of these are text, as of `psa_attention`.
        is_sparse: whether any of their queries is one of the video.
    """

    items: slice
    first_key: int
    end: int
    text_before: int
    text_after: int
    is_sparse: bool


class Prefill:
    """Queries that are the last of the tokens in the cache, and the padding around them.

    Attributes:
        marker: bool `[B, tokens]`: what layers get for a mask. Its length says where keys end, which a cache with room
            for more does not; its zeros are padding.
        queries, tokens: how many there are.
        kernels: for calls alike, why no kernel serves them.
        is_counted: whether a sparse layer was seen.
    """

    def __init__(
        self, marker: torch.Tensor, queries: int, stock_mask: Callable[[], torch.Tensor | None], dense_last: int
    ) -> None:
        """
        Args:
            stock_mask: makes the mask that the model would have had.
            dense_last: how many of the last tokens are text in any case.

        Raises:
            Unserved: padding is among the tokens.
        """
        self.marker, self.queries, self.tokens = marker, queries, marker.shape[1]
        self.kernels: dict[object, str | None] = {}
        self.is_counted = False
        self._stock_mask, self._dense_last = stock_mask, dense_last
        self._parts: tuple[Part, ...] | None = None
        places = torch.arange(self.tokens, device=marker.device)
        first = places.masked_fill(~marker, self.tokens).amin(1)
        end = torch.maximum((places + 1).masked_fill(~marker, 0).amax(1), first)  # the same where all is padding
        edges = torch.stack((first, end, marker.sum(1)), 1).tolist()
        if any(count != end - first for first, end, count in edges):
            raise Unserved("padding between the tokens of a prompt; only that before and after them is cut off")
        self._edges = [(first, end) for first, end, _ in edges]

    @property
    def first_query(self) -> int:
        return self.tokens - self.queries

    def is_marked_by(self, marker: torch.Tensor) -> bool:
        """Whether a marker is its own, or a copy of that for layers on another device."""
        moved = marker.device != self.marker.device and marker.shape == self.marker.shape
        return marker is self.marker or moved

    @cached_property
    def stock_mask(self) -> torch.Tensor | None:
        """The mask that the model would have had, made once."""
        return self._stock_mask()

    def parts(self, spans: Callable[[int, int, int], list[Span | None]]) -> tuple[Part, ...]:
        """What to compute for which batch items; items that are padding alone are left out.

        Args:
            spans: as `VisionTokens.spans`, asked once.
        """
        if self._parts is None:
            found = spans(len(self._edges), self.queries, self.first_query)
            alike = [self._text(edges, span) for edges, span in zip(self._edges, found, strict=True)]
            parts, start = [], 0
            for (first, end, before, after, is_sparse), group in groupby(alike):
                stop = start + len(list(group))
                if end > max(first, self.first_query):
                    parts.append(Part(slice(start, stop), first, end, before, after, is_sparse))
                start = stop
            self._parts = tuple(parts)
        return self._parts

    def _text(self, edges: tuple[int, int], span: Span | None) -> tuple[int, int, int, int, bool]:
        """Edges, and the numbers of text tokens at both ends; where no query is one of the video, all are text."""
        first, end = edges
        start, stop = edges if span is None else span
        stop = min(stop, end - self._dense_last)
        start = max(start, first)
        if stop <= max(start, self.first_query):
            return first, end, 0, end - first, False
        return first, end, start - first, end - stop, True

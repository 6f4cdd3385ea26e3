"""Which keys lie in the past of which queries in a causal call, and how its video tokens form rows of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from psa_kernels.blocks import block_count


@dataclass(frozen=True)
class CausalLayout:
    """Queries that are the last of the keys: query t stands at position `first_query + t`, and reads no later keys.

    Query blocks are cut at multiples of `block_query` of the video tokens, whatever the queries of this call begin
    with, so that a call of the last queries has the rows of the whole call; its first row may be short. A row reads

    - its diagonal, the keys that stand where its query block does, exactly, each query up to itself;
    - of its candidates, the key blocks before the diagonal, those that are listed; they are whole and past;
    - the text before the video, exactly.

    Attributes:
        text_before, video_keys, text_after: numbers of keys.
        first_query: position of the first query among the keys.
        block_query, block_key: tokens of a block; the second divides the first.
    """

    text_before: int
    video_keys: int
    text_after: int
    first_query: int
    block_query: int
    block_key: int

    @property
    def first_video_query(self) -> int:
        """How many video tokens stand before the first video query."""
        return min(max(self.first_query - self.text_before, 0), self.video_keys)

    @property
    def video_queries(self) -> int:
        return self.video_keys - self.first_video_query

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """The number of each query block that has queries, counted from the first video token."""
        if not self.video_queries:
            return ()
        return tuple(range(self.first_video_query // self.block_query, block_count(self.video_keys, self.block_query)))

    @property
    def first_row(self) -> int:
        """The number of the first query block that has queries; 0 without any."""
        return self.rows[0] if self.rows else 0

    @property
    def lead(self) -> int:
        """How many tokens of the first row stand before its first query: kernels count queries from its begin on."""
        return self.first_video_query - self.first_row * self.block_query if self.rows else 0

    @property
    def query_shift(self) -> int:
        """What has to be added to a number of tokens from the begin of the first row on to name a query of the call."""
        return self.text_before + self.first_row * self.block_query - self.first_query

    def span(self, row: int) -> tuple[int, int]:
        """The video tokens from and up to which a row has queries."""
        return max(row * self.block_query, self.first_video_query), self.end(row)

    def end(self, row: int) -> int:
        """The video token at which the diagonal of a row ends."""
        return min((row + 1) * self.block_query, self.video_keys)

    def queries(self, row: int) -> slice:
        """The queries of a row, among those of the call."""
        first, last = self.span(row)
        shift = self.text_before - self.first_query
        return slice(first + shift, last + shift)

    def diagonal(self, row: int) -> slice:
        """The keys of a row's diagonal, among all keys."""
        return slice(self.text_before + row * self.block_query, self.text_before + self.end(row))

    def candidates(self, row: int) -> int:
        """How many key blocks stand before a row's diagonal."""
        return row * self.block_query // self.block_key

    @property
    def diagonal_blocks(self) -> int:
        """How many pairs of blocks of a head are on the diagonals."""
        return sum(block_count(self.end(row) - row * self.block_query, self.block_key) for row in self.rows)

    @property
    def pairs(self) -> int:
        """How many pairs of blocks of a head are not wholly in the future: candidates and diagonals."""
        return self.diagonal_blocks + sum(map(self.candidates, self.rows))

    @property
    def text_queries(self) -> tuple[slice, ...]:
        """The queries before the video's, and those after them, where there are any."""
        before = max(self.text_before - self.first_query, 0)
        after = before + self.video_queries
        total = self.text_before + self.video_keys + self.text_after - self.first_query
        return tuple(part for part in (slice(0, before), slice(after, total)) if part.start < part.stop)

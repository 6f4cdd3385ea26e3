"""The lists that the allocation hands to the attention: which key blocks a query block reads, and at which level."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from psa_kernels.blocks import ranks_below
from psa_kernels.costs import most_attended
from psa_kernels.spec import AttentionSpec

# Statistics hold counts up to this size as they are, and sum up larger ones: a run keeps those of thousands of calls.
FEW_BYTES = 1 << 15


@dataclass(frozen=True)
class BlockLists:
    """Key blocks of every query block, grouped by level.

    `select_blocks` and `from_levels` make them. What the tensors hold is trusted, for looking at it would wait for the
    device: with ids of no key block, or counts of more than a row lists, kernels read memory that is not theirs.

    Attributes:
        ids: int16, or int32 beyond 32,767 key blocks, `[B, H, query blocks, list_width]`: in each row first the blocks
            of the finest level, then those of the next, ..., last the blocks past the last threshold, as far as there
            is room; ids ascend inside each group.
        counts: int32 `[B, H, query blocks, levels]`: how many blocks each level has.
        key_blocks: how many key blocks there are, listed or not.
        pooling: the pooling factor of each level, as `AttentionSpec.levels` had them; None if that is not known.
    """

    ids: torch.Tensor
    counts: torch.Tensor
    key_blocks: int
    pooling: tuple[int, ...] | None = None

    def __getitem__(self, part: slice | tuple[slice, slice]) -> BlockLists:
        """The lists of some batch items, or of some batch items and heads; contiguous, as the kernels read them.

        They share memory with these where they begin at a multiple of 16 bytes there. For other addresses Triton would
        compile the kernels once more, which takes seconds.
        """
        ids, counts = (x[part].contiguous() for x in (self.ids, self.counts))
        ids, counts = (x if x.data_ptr() % 16 == 0 else x.clone() for x in (ids, counts))
        return BlockLists(ids, counts, self.key_blocks, self.pooling)

    def to_count(self) -> torch.Tensor:
        """The counts of these lists as `AttentionStats.listed` holds them."""
        return self.counts if self.counts.nbytes <= FEW_BYTES else self.counts.sum(2)

    @classmethod
    def from_levels(
        cls, level: torch.Tensor, num_levels: int, width: int | None = None, pooling: tuple[int, ...] | None = None
    ) -> BlockLists:
        """Build the lists from the level index of every pair of blocks.

        Args:
            level: integer `[B, H, query blocks, key blocks]`: index into the levels, or `num_levels` past the last.
            num_levels: number of levels.
            width: how many blocks a row lists, at least as many as have a level; all if None.
            pooling: the pooling factor of each level, if the lists are to be refused where others are attended.
        """
        key_blocks = level.shape[-1]
        ids = level.sort(dim=-1, stable=True).indices[..., :width]
        counts = torch.stack([(level == index).sum(-1) for index in range(num_levels)], dim=-1)
        ids = ids.to(id_dtype(key_blocks), memory_format=torch.contiguous_format)
        return cls(ids, counts.to(torch.int32), key_blocks, pooling)

    @classmethod
    def of_all_heads(cls, groups: list[BlockLists]) -> BlockLists:
        """Join the lists of a call's groups of heads."""
        if len(groups) == 1:
            return groups[0]
        ids, counts = torch.cat([group.ids for group in groups], 1), torch.cat([group.counts for group in groups], 1)
        return cls(ids, counts, groups[0].key_blocks, groups[0].pooling)

    def levels(self) -> torch.Tensor:
        """The inverse of `from_levels`: int64 `[B, H, query blocks, key blocks]`."""
        place = torch.arange(self.ids.shape[-1], device=self.ids.device)
        level = (place >= self.counts.cumsum(-1)[..., None]).sum(-2)
        past_last = level.new_full((*level.shape[:-1], self.key_blocks), self.counts.shape[-1])
        return past_last.scatter_(-1, self.ids.long(), level)


def id_dtype(key_blocks: int) -> torch.dtype:
    """The shortest integer type that can name every key block."""
    return torch.int16 if key_blocks <= torch.iinfo(torch.int16).max else torch.int32


@lru_cache(maxsize=256)
def list_width(spec: AttentionSpec, key_blocks: int) -> int:
    """How many key blocks a row of the lists has room for.

    Under the rule `count` every row attends the same number of blocks, so skipped blocks need no room. Under `budget` a
    row attends no more than it can pay for. Under `mass` the number depends on the data, and `rest: mean` attends all
    blocks: both need room for all.
    """
    if spec.rule == "budget":
        return most_attended(spec, key_blocks)
    if spec.rule != "count" or spec.rest != "skip":
        return key_blocks
    return ranks_below(max(spec.thresholds[-1], spec.floor), key_blocks)


@dataclass(frozen=True, eq=False)
class AttentionStats:
    """What one call attended, per batch item and head, over the video tokens; tensors stay on the device.

    To stay cheap, a call only counts pairs of blocks, and a small call not even these. All figures are worked out when
    somebody looks at them.

    Attributes:
        listed: integer `[B, H, levels]`: pairs of blocks at each level. For small calls `[B, H, query blocks, levels]`:
            those of each query block, not summed up yet.
        pairs: how many pairs of blocks a head has; in a causal call without those that lie wholly in the future.
        spec: what was computed.
        implementation: what computed the call: `reference`, `triton`, `triton-int8`, `hopper`, `hopper-int8` or
            `dense`.
        diagonal: how many of the pairs of a causal call are on its diagonal: exact, and in no list. They count in full,
            because they are computed in full.
    """

    listed: torch.Tensor
    pairs: int
    spec: AttentionSpec
    implementation: str
    diagonal: int = 0

    @cached_property
    def counts(self) -> torch.Tensor:
        """Pairs of blocks at each level: integer `[B, H, levels]`."""
        return self.listed if self.listed.dim() == 3 else self.listed.sum(2)

    @property
    def level_shares(self) -> torch.Tensor:
        """Share of pairs of blocks that are listed at each level: float32 `[B, H, levels]`."""
        return self.counts.float() / max(self.pairs, 1)

    @property
    def coverage(self) -> torch.Tensor:
        """Share of pairs of blocks that are not skipped: float32 `[B, H]`; 1 without any pair."""
        if not self.pairs or self.spec.rest == "mean":
            return torch.ones(self.counts.shape[:2], device=self.counts.device)
        return self.level_shares.sum(-1) + self.diagonal / self.pairs

    @property
    def density(self) -> torch.Tensor:
        """Mean over pairs of blocks of 1 / pooling factor, 0 where skipped: float32 `[B, H]`; 1 without any pair.

        It is the share of the FLOPs of dense attention.
        """
        if not self.pairs:
            return self.coverage
        shares = self.level_shares
        # Plain numbers, one by one: a tensor of them would be copied to the device, and the host would wait for that.
        density = shares[..., 0] / self.spec.levels[0]
        for index, level in enumerate(self.spec.levels[1:], start=1):
            density = density + shares[..., index] / level
        density = density + self.diagonal / self.pairs
        rest = 1 - shares.sum(-1) - self.diagonal / self.pairs
        return density + rest / self.spec.block_key if self.spec.rest == "mean" else density

    @classmethod
    def from_lists(cls, lists: BlockLists, spec: AttentionSpec, implementation: str) -> AttentionStats:
        """The statistics of one call that is not causal."""
        return cls(lists.to_count(), lists.ids.shape[2] * lists.key_blocks, spec, implementation)

    @classmethod
    def of_all_heads(cls, groups: list[AttentionStats]) -> AttentionStats:
        """Join the statistics of a call's groups of heads."""
        if len(groups) == 1:
            return groups[0]
        return replace(groups[0], listed=torch.cat([group.counts for group in groups], dim=1))

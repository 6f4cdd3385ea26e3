"""Context parallelism as diffusers does it: the ranks share the tokens outside attention, and the heads inside it.

`transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=N))` splits the video tokens at the first
block and joins them after the last. This module does what is needed for the attention in between. An all-to-all before
it gives each rank all tokens of some heads, so that blocks, permutation and importance are those of the whole video. An
all-to-all after it gives every rank its own tokens back. Every rank has the text of joint attention: each attends it
with its own heads, and the heads of the result are gathered. Every rank calls the collectives in the same order,
whatever its layers decide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from psa_diffusers.diffusers_internals import parallel_config, split_arguments, ulysses_group
from psa_diffusers.families import ModelFamily, find_family
from psa_diffusers.patch.token_order import Grid

RING = (
    "ring attention shows a rank only a part of the keys at a time, and choosing blocks needs all of them; "
    "use ContextParallelConfig(ulysses_degree=...)"
)


def context_parallel_plan(transformer: torch.nn.Module) -> dict[str, Any]:
    """Return the `cp_plan` for `transformer.enable_parallelism`, also for models that diffusers has no plan for.

    Plans of joint attention leave the text on every rank, so they are right only with PSAProcessor.

    Examples:
        >>> plan = context_parallel_plan(pipe.transformer)
        >>> pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2), cp_plan=plan)

    Raises:
        UnsupportedModelError: the transformer is of no supported family.
        ValueError: the family's tokens cannot be split.
    """
    family = find_family(transformer)
    plan = family.parallel_plan(transformer)
    if plan is None:
        raise ValueError(f"there is no plan for context parallelism of {family.name} ({type(transformer).__name__})")
    return plan


@dataclass(frozen=True)
class Ulysses:
    """How the ranks of a group share the video tokens and the heads of a forward.

    Attributes:
        group: the process group.
        rank: this one's place in it.
        tokens: number of video tokens of each rank, in the order of the video.
        heads: number of heads of each rank.
        any_numbers: whether the user allowed these to differ, by `ulysses_anything`.
    """

    group: Any
    rank: int
    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    any_numbers: bool = False

    def begin_gathering(self, x: torch.Tensor, before: int, after: int) -> tuple[torch.Tensor, Any]:
        """From this rank's video tokens of all heads to all video tokens of this rank's heads.

        Args:
            x: `[B, before + n + after, H, D]`: this rank's n video tokens, and `before` and `after` text tokens.

        Returns:
            The tensor `[before + N + after, B, h, D]` where the result will be, and the work to wait for.

        Raises:
            RuntimeError: n is not what this rank should have.
        """
        video = x[:, before : x.shape[1] - after]
        if video.shape[1] != self.tokens[self.rank]:
            raise RuntimeError(
                f"context parallelism: this rank has {video.shape[1]} video tokens instead of "
                f"{self.tokens[self.rank]} of {sum(self.tokens)}; use the plan of context_parallel_plan(transformer), "
                "and no conditions beside the video"
            )
        batch, width, mine, total = x.shape[0], x.shape[3], self.heads[self.rank], sum(self.tokens)
        sizes = [video.shape[1] * batch * heads * width for heads in self.heads]
        # Tokens come first: then the ranks' parts arrive in order, and text has its place beside them.
        joined = x.new_empty(before + total + after, batch, mine, width)
        start = sum(self.heads[: self.rank])
        for place, text in ((joined[:before], x[:, :before]), (joined[before + total :], x[:, x.shape[1] - after :])):
            place.copy_(text[:, :, start : start + mine].transpose(0, 1))
        received = joined[before : before + total].view(-1)
        shares = [tokens * batch * mine * width for tokens in self.tokens]
        packed = self._by_rank(video)
        return joined, dist.all_to_all_single(received, packed, shares, sizes, self.group, async_op=True)

    def _by_rank(self, video: torch.Tensor) -> torch.Tensor:
        """`[B, n, H, D]` flat, the heads of the first rank first."""
        if len(set(self.heads)) == 1:
            return video.unflatten(2, (len(self.heads), -1)).permute(2, 1, 0, 3, 4).reshape(-1)
        return torch.cat([part.transpose(0, 1).reshape(-1) for part in video.split(self.heads, dim=2)])

    def gather_heads(self, head: torch.Tensor, tail: torch.Tensor, before: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The reverse of `begin_gathering`, for the two parts of an attention output.

        Args:
            head: `[B, before + N, h, D]`: text, and all video tokens.
            tail: `[B, after, h, D]`: text.

        Returns:
            `[B, before + n, H, D]` and `[B, after, H, D]`.
        """
        video = head[:, before:]
        batch, _, mine, width = video.shape
        own = self.tokens[self.rank]
        send = video.transpose(0, 1).reshape(-1)
        sizes = [own * batch * heads * width for heads in self.heads]
        received = send.new_empty(sum(sizes))
        dist.all_to_all_single(received, send, sizes, [n * batch * mine * width for n in self.tokens], self.group)
        parts = [
            part.view(own, batch, heads, width) for part, heads in zip(received.split(sizes), self.heads, strict=True)
        ]
        video = torch.cat(parts, dim=2).transpose(0, 1)
        if before:
            video = torch.cat([self._gather_text(head[:, :before]), video], dim=1)
        return video, self._gather_text(tail) if tail.shape[1] else video.new_empty(batch, 0, *video.shape[2:])

    def _gather_text(self, text: torch.Tensor) -> torch.Tensor:
        """Gather all heads of text, `[B, T, H, D]`, from the ranks' own heads."""
        most = max(self.heads)
        padded = torch.nn.functional.pad(text, (0, 0, 0, most - text.shape[2])).contiguous()
        gathered = [torch.empty_like(padded) for _ in self.heads]
        dist.all_gather(gathered, padded, group=self.group)
        return torch.cat([part[:, :, :heads] for part, heads in zip(gathered, self.heads, strict=True)], dim=2)


def share_of(
    transformer: torch.nn.Module, family: type[ModelFamily], grid: Grid | None, tokens: int | None = None
) -> tuple[Ulysses | None, str | None]:
    """How a forward is shared among ranks, None if it is not shared in this way; and why its layers cannot be sparse.

    Args:
        tokens: how many tokens there are to share; by default those of the grid.

    Raises:
        ValueError: tokens or heads cannot be shared in this way, or diffusers' own attention would be wrong.
    """
    both = parallel_config(transformer)
    if both is None:
        return None, None
    config = getattr(both, "context_parallel_config", None)
    if config is None:
        return None, "tensor parallelism is enabled, which sparse attention does not support"
    if family.parallel_plan(transformer) is None:
        return None, f"context parallelism of {type(transformer).__name__} is not supported"
    if family.replicates_text:
        _check_text_is_whole(transformer, family)
    if config.ring_degree > 1:
        if family.text != "none":
            raise ValueError(f"{family.name} cannot run with ring_degree={config.ring_degree}: {RING}")
        return None, RING
    if grid is None:
        if family.text != "none":
            raise ValueError(f"context parallelism of {family.name} needs a pipeline's run with a known video size")
        return None, None
    degree = config.ulysses_degree
    first: Any = next(iter(family.self_attentions(transformer).values()))
    heads = first.heads
    uneven = getattr(config, "ulysses_anything", None)  # diffusers 0.36 does not have it
    tokens = math.prod(grid) if tokens is None else tokens
    for what, count in (("video tokens", tokens), ("heads", heads)):
        if (count % degree and not uneven) or count < degree:
            hint = "" if uneven is not False else ", or ContextParallelConfig(ulysses_anything=True)"
            raise ValueError(
                f"{count} {what} cannot be shared by ulysses_degree={degree} ranks; use a degree that fits{hint}"
            )
    group, rank = ulysses_group(config)
    return Ulysses(group, rank, _shares(tokens, degree), _shares(heads, degree), bool(uneven)), None


def _check_text_is_whole(transformer: torch.nn.Module, family: type[ModelFamily]) -> None:
    split, plan = split_arguments(transformer), family.parallel_plan(transformer) or {}
    # Other plans split the tokens further on, where they are joined with the text.
    at_once = "hidden_states" in plan.get("", {})
    if (at_once and "hidden_states" not in split) or "encoder_hidden_states" in split:
        raise ValueError(
            f"context parallelism of {family.name} needs enable_parallelism(..., cp_plan=context_parallel_plan("
            "transformer)); with another plan a rank attends a part of the text only"
        )


def _shares(count: int, ranks: int) -> tuple[int, ...]:
    """As `torch.tensor_split`: the first ranks have one more where it does not come out even."""
    each, more = divmod(count, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))

"""How ranks share a forward: the plan that splits its tokens, and what of it each rank has.

`transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=N))` splits the video tokens at the first
block and joins them after the last.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from psa_diffusers.diffusers_internals import parallel_config, split_arguments, ulysses_group
from psa_diffusers.families import ModelFamily, find_family
from psa_diffusers.patch.parallel.share import Ulysses
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

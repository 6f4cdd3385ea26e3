"""Which key blocks each row of a causal call reads, in Triton: its stages in order."""

from __future__ import annotations

from psa_kernels.call import Call
from psa_kernels.causal.layout import CausalLayout
from psa_kernels.causal.triton_allocation import allocate
from psa_kernels.causal.triton_budget import allocate_budget
from psa_kernels.causal.triton_importance import block_importance
from psa_kernels.causal.triton_prices import upgrade_prices
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.pooled import TritonPyramid
from psa_kernels.pyramid.triton import coarsest_levels


def select(call: Call, causal: CausalLayout, keys: TritonPyramid | None) -> BlockLists:
    """Give every candidate of every row a level.

    Args:
        causal: of the call, which has video queries.
        keys: the pyramid of the keys, with their coarsest levels where the spec has a cap; or None.

    Returns:
        The levels of the reference, `causal.lists.select`; narrower where rows attend fewer blocks than there are.
    """
    q, k, layout, spec, scale = call.q, call.k, call.layout, call.spec, call.scale
    importance = block_importance(q, k, causal, layout, spec, scale)
    if spec.rule == "budget":
        prices = upgrade_prices(q, k, call.v, importance, causal, layout, spec, scale)
        return allocate_budget(prices, importance, causal, spec)
    coarsest = coarsest_levels(k, layout, spec) if keys is None else keys.coarsest
    return allocate(importance, coarsest, causal, spec)

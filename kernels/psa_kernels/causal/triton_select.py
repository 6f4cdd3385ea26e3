"""Which key blocks each row of a causal call reads, in Triton: its stages in order."""

from __future__ import annotations

from psa_kernels.call import Call
from psa_kernels.causal.layout import CausalLayout
from psa_kernels.causal.triton_allocation import allocate
from psa_kernels.causal.triton_budget import allocate_budget
from psa_kernels.causal.triton_importance import block_importance
from psa_kernels.causal.triton_prices import upgrade_prices
from psa_kernels.head_groups import LARGEST_SHARE, head_groups
from psa_kernels.heads import group_size, query_heads
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.pooled import TritonPyramid
from psa_kernels.pyramid.triton import coarsest_levels

# What importance and prices may take of the memory of the output, if that is much. They grow with the square of the
# number of tokens.
PAIRS_SHARE = 0.5


def select(call: Call, causal: CausalLayout, keys: TritonPyramid | None) -> BlockLists:
    """Give every candidate of every row a level; where their pairs would take much memory, of some heads at a time.

    Args:
        causal: of the call, which has video queries.
        keys: the pyramid of the keys, with their coarsest levels where the spec has a cap; or None.

    Returns:
        The levels of the reference, `causal.lists.select`; narrower where rows attend fewer blocks than there are.
    """
    q, k, spec = call.q, call.k, call.spec
    coarsest = None
    if spec.rule != "budget":
        coarsest = coarsest_levels(k, call.layout, spec) if keys is None else keys.coarsest
    group = group_size(q, k)
    pair_bytes = 4 + (2 * len(spec.levels) if spec.rule == "budget" else 0)
    head_bytes = q.shape[0] * group * call.query_blocks * call.key_blocks * pair_bytes
    output_bytes = q.shape.numel() * q.element_size()
    parts = head_groups(k.shape[2], head_bytes, int(output_bytes * PAIRS_SHARE / LARGEST_SHARE))
    found = []
    for part in parts:
        some = call if len(parts) == 1 else call.of_heads(query_heads(part, group))
        importance = block_importance(some.q, some.k, causal, some.layout, spec, some.scale)
        if spec.rule == "budget":
            prices = upgrade_prices(some.q, some.k, some.v, importance, causal, some.layout, spec, some.scale)
            found.append(allocate_budget(prices, importance, causal, spec))
            del prices
        else:
            caps = None if coarsest is None else coarsest[:, part].contiguous()
            found.append(allocate(importance, caps, causal, spec))
        del importance
    return BlockLists.of_all_heads(found)

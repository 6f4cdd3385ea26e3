"""The definition of every stage, in PyTorch, on any device."""

from __future__ import annotations

import torch

from psa_kernels.allocation.budget import allocate_budget
from psa_kernels.allocation.prices import upgrade_prices
from psa_kernels.allocation.reference import allocate
from psa_kernels.backends.base import Backend
from psa_kernels.call import Call
from psa_kernels.causal import attention as causal_attention
from psa_kernels.causal import lists as causal_lists
from psa_kernels.importance.reference import block_importance
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.reference import coarsest_levels
from psa_kernels.sparse.reference import sparse_attention
from psa_kernels.spec import PRECISIONS


class Reference(Backend):
    """Serves every call; `auto` ends here, whatever the device."""

    name = implementation = "reference"
    precisions = PRECISIONS
    has_pyramid = False

    def why_not(self, call: Call) -> str | None:
        return None

    def select(self, call: Call, keys: None) -> BlockLists:
        q, k, layout, spec, scale = call.q, call.k, call.layout, call.spec, call.scale
        if call.causal is not None:
            return causal_lists.select(q, k, call.v, call.causal, layout, spec, scale)
        importance = block_importance(q, k, layout, spec, scale)
        if spec.rule == "budget":
            return allocate_budget(upgrade_prices(q, k, call.v, importance, layout, spec, scale), importance, spec)
        return allocate(importance, coarsest_levels(k, layout, spec), spec)

    def attend(self, call: Call, keys: None, lists: BlockLists, out: torch.Tensor) -> None:
        tokens, rest = (call.q, call.k, call.v, lists), (call.layout, call.spec, call.scale, out)
        if call.causal is not None:
            causal_attention.sparse_attention(*tokens, call.causal, *rest)
        else:
            sparse_attention(*tokens, *rest)

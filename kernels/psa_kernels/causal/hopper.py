"""Attention of a causal call on Hopper GPUs: the launch of the kernel that serves other calls too."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from psa_kernels.blocks import block_count
from psa_kernels.causal import triton_attention
from psa_kernels.causal.layout import CausalLayout
from psa_kernels.devices import cache_bytes, multiprocessors
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.pooled import Place, TritonPyramid, row_places
from psa_kernels.sparse.hopper.kernel import attention_kernel
from psa_kernels.sparse.hopper.launch import COUNTERS, Plan, outgrow, pipeline
from psa_kernels.sparse.hopper.tiles import TILE_M
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Shape


def sparse_attention(
    q: torch.Tensor,
    pyramid: TritonPyramid,
    lists: BlockLists,
    causal: CausalLayout,
    spec: AttentionSpec,
    scale: float,
    out: torch.Tensor,
) -> None:
    """The same as the portable `triton_attention.sparse_attention`, on a GPU of compute capability 9.0.

    Queries whose sums run over are computed anew by the portable kernel, and no others.
    """
    k, (v, value_means) = pyramid.source_keys, pyramid.needed_values()
    plan = _plan(
        q.shape, q.dtype, q.device, (q.stride(), k.stride(), v.stride(), out.stride()), k.shape, pyramid.factors,
        causal, lists.ids.shape[3], lists.ids.dtype, spec, scale, keeps_in_step(causal, spec, k),
    )  # fmt: skip
    counters = torch.zeros(plan.counters, dtype=torch.int32, device=q.device)
    redo = counters[COUNTERS:]
    # Where there is no log-sum-exp or permutation, any pointer will do.
    plan.launch(
        q, None, *plan.boxes(k, pyramid.keys), *plan.boxes(v, value_means), out, counters, lists.ids, lists.counts,
        counters, counters, redo,
    )  # fmt: skip
    if not plan.online:
        triton_attention.sparse_attention(q, pyramid, lists, causal, spec, scale, out, redo)


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    shape: Shape, dtype: torch.dtype, device: torch.device, strides: tuple[Shape, Shape, Shape, Shape],
    of_keys: Shape, factors: tuple[int, ...], causal: CausalLayout, list_width: int, ids: torch.dtype,
    spec: AttentionSpec, scale: float, in_step: bool,
) -> Plan:  # fmt: skip
    batch, query_tokens, heads, head_dim = shape
    end = causal.lead + causal.video_queries
    items = block_count(end, TILE_M.value) * batch * heads
    online, unit = dtype == torch.float16, 16 // dtype.itemsize
    launch = Launch(
        attention_kernel, (min(items, multiprocessors(device)),),
        (*(stride // unit for stride in strides[0][:3]), *strides[3][:3], heads, items, end, causal.video_keys,
         list_width, causal.text_before, 0, query_tokens, scale * math.log2(math.e), causal.lead, causal.query_shift),
        HEAD_DIM=head_dim, BLOCK_QUERY=spec.block_query, BLOCK_KEY=spec.block_key, FACTORS=spec.levels,
        TEXT=causal.text_before > 0, PERMUTED=False, STORE_LSE=False, ONLINE=online, IN_STEP=in_step,
        GROUP=heads // of_keys[2], CAUSAL=True, num_warps=4, **pipeline(head_dim),
    )  # fmt: skip
    heights = (spec.block_key, spec.block_key, *(spec.block_key // factor for factor in spec.levels))
    counts = (causal.text_before, causal.video_keys, causal.text_after)
    # Rows begin at multiples of the query block, and so do diagonals, which are counted from the first one.
    first = causal.first_row * causal.block_query
    places = {}
    for each in strides[1:3]:
        before, _, *levels = row_places(of_keys, each, counts, factors, spec.levels)
        rows = (batch, of_keys[2], causal.video_keys - first, head_dim)
        diagonals = Place(False, (causal.text_before + first) * each[1], rows, (each[0], each[2], each[1], each[3]))
        places[each] = before, diagonals, *levels
    return Plan(launch, items, online, heights, places)


def keeps_in_step(causal: CausalLayout, spec: AttentionSpec, keys: torch.Tensor) -> bool:
    """Whether programs wait for each other, so that they find each other's rows in the cache.

    Items that run at the same time are only nearly as long as each other, and waiting takes a share of the time. So a
    head has to have more rows than the whole cache can hold, twice what it takes in other calls.
    """
    return outgrow(causal.video_keys, spec, keys, cache_bytes(keys.device))

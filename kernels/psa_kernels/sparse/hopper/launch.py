"""Attention over the chosen rows of keys and values on Hopper GPUs."""

from __future__ import annotations

import math

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from psa_kernels.blocks import block_count
from psa_kernels.devices import cache_bytes, multiprocessors
from psa_kernels.layout import TokenLayout
from psa_kernels.limits import MAX_HOPPER_LEVELS
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.pooled import TritonPyramid
from psa_kernels.quantise.integers import Integers
from psa_kernels.sparse import triton as portable
from psa_kernels.sparse.hopper.kernel import attention_kernel
from psa_kernels.sparse.hopper.tiles import TILE_M, panel_columns, tile_layout
from psa_kernels.spec import AttentionSpec


def sparse_attention(
    q: torch.Tensor,
    pyramid: TritonPyramid,
    lists: BlockLists,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    lse: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    integers: Integers | None = None,
) -> torch.Tensor:
    """The same as the portable `sparse.triton.sparse_attention`, on a GPU of compute capability 9.0.

    Args:
        pyramid: with tokens as a level of factor 1 where they are permuted, since a box is a run of rows in memory.
        integers: None, or what `quantise_rows` returned for the same bfloat16 tensors: queries are then multiplied by
            keys in 8-bit integers. A tile whose sums run over, or which has numbers that are not finite, is computed in
            bfloat16.
    """
    batch, query_tokens, heads, head_dim = q.shape
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    permutation = layout.short_permutation
    items = triton.cdiv(layout.video_queries, TILE_M.value) * batch * heads
    # In half precision, weights relative to any but the largest logit could overflow.
    online = q.dtype == torch.float16
    counters = torch.zeros(2 + items, dtype=torch.int32, device=q.device)
    redo = counters[2:]
    queries, factors = q, None
    keys = pyramid.key_rows(layout, spec)
    if integers is not None:
        queries, factors, keys = integers.queries, integers.factors, integers.keys
    values = pyramid.value_rows(layout, spec)
    unit = 16 // queries.element_size()
    # Where there is no permutation or log-sum-exp, any pointer will do.
    arguments = (
        queries, factors, *_descriptors(keys, spec), *_descriptors(values, spec), out,
        counters if lse is None else lse, lists.ids, lists.counts, counters if permutation is None else permutation,
        counters, redo, *(stride // unit for stride in queries.stride()[:3]), *out.stride()[:3], heads, items,
        layout.video_queries, layout.video_keys, lists.ids.shape[3], layout.text_before, layout.text_after,
        query_tokens, scale * math.log2(math.e),
    )  # fmt: skip
    options = {
        "HEAD_DIM": head_dim,
        "BLOCK_QUERY": spec.block_query,
        "BLOCK_KEY": spec.block_key,
        "FACTORS": spec.levels,
        "TEXT": layout.text_before + layout.text_after > 0,
        "PERMUTED": permutation is not None,
        "STORE_LSE": lse is not None,
        "ONLINE": online,
        "IN_STEP": keeps_in_step(layout, spec, pyramid.source_keys),
        "num_warps": 4,
        **pipeline(head_dim),
    }
    programs = min(items, multiprocessors(q.device))
    attention_kernel[(programs,)](*arguments, **options)
    if integers is not None and lse is not None:
        # Integer keys are centred: what the mean of the keys would add to each query's logits goes back into the sum.
        video = slice(layout.text_before, layout.text_before + layout.video_queries)
        lse[:, :, video] += torch.einsum("bnhd,bhd->bhn", q[:, video].float(), integers.key_means) * scale
    if not online:
        portable.launch(q, pyramid, lists, layout, spec, scale, out, lse, only=redo)
    return out


def pipeline(head_dim: int) -> dict[str, int | bool]:
    """How many tiles of keys, of values and of queries are in flight, and whether the warpgroups take turns.

    As many tiles as fit shared memory do not pay. Turns pay where products are as short as exponentials.
    """
    return {"STAGES": 2 if head_dim == 128 else 4, "QUERY_SLOTS": 2, "TURNS": head_dim == 64}


def keeps_in_step(layout: TokenLayout, spec: AttentionSpec, keys: torch.Tensor) -> bool:
    """Whether a head has more rows than both halves of the cache can hold, and all lists are as long as each other."""
    rows = sum(block_count(layout.video_keys, factor) for factor in spec.levels)
    head_bytes = 2 * rows * keys.shape[3] * keys.element_size()
    return spec.rule == "count" and len(spec.levels) > 1 and head_bytes > cache_bytes(keys.device) // 2


def _descriptors(views: list[torch.Tensor | None], spec: AttentionSpec) -> list[TensorDescriptor | None]:
    """Where the boxes of text and of every level come from; each ends where its rows end, so that zeros follow."""
    heights = [spec.block_key, spec.block_key, *(spec.block_key // factor for factor in spec.levels)]
    boxes = [None if rows is None else _boxes(rows, height) for rows, height in zip(views, heights, strict=True)]
    return boxes + [None] * (MAX_HOPPER_LEVELS - len(spec.levels))


def _boxes(rows: torch.Tensor, height: int) -> TensorDescriptor:
    bits = 8 * rows.element_size()
    return TensorDescriptor.from_tensor(
        rows, [1, 1, height, panel_columns(rows.shape[3], bits)], tile_layout(rows.shape[3], bits, 4)
    )

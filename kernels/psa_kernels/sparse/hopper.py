"""Attention over the chosen rows of keys and values on Hopper GPUs."""

from __future__ import annotations

import math

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from psa_kernels.blocks import block_count
from psa_kernels.layout import TokenLayout
from psa_kernels.limits import MOST_HOPPER_LEVELS
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.triton import TritonPyramid
from psa_kernels.sparse import triton as portable
from psa_kernels.sparse.hopper_kernel import attention_kernel
from psa_kernels.sparse.hopper_tiles import PANEL, TILE_M, box_layout
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_rows import short_permutation


def sparse_attention(
    q: torch.Tensor,
    pyramid: TritonPyramid,
    lists: BlockLists,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    lse: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same as the portable `sparse.triton.sparse_attention`, on a GPU of compute capability 9.0.

    Args:
        pyramid: with tokens as a level of factor 1 where they are permuted, since a box is a run of rows in memory.
    """
    batch, query_tokens, heads, head_dim = q.shape
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    permutation = short_permutation(layout)
    items = triton.cdiv(layout.video_queries, TILE_M.value) * batch * heads
    # In half precision, weights relative to any but the largest logit could overflow.
    online = q.dtype == torch.float16
    counters = torch.zeros(1 + items, dtype=torch.int32, device=q.device)
    redo = counters[1:]
    # Where there is no permutation or log-sum-exp, any pointer will do.
    arguments = (
        q, *_sources(pyramid.source_keys, pyramid.keys, pyramid, layout, spec),
        *_sources(pyramid.source_values, pyramid.values, pyramid, layout, spec), out,
        counters if lse is None else lse, lists.ids, lists.counts, counters if permutation is None else permutation,
        counters, redo, *(stride // 8 for stride in q.stride()[:3]), *out.stride()[:3], heads, items,
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
        "num_warps": 4,
        **pipeline(head_dim),
    }
    programs = min(items, torch.cuda.get_device_properties(q.device).multi_processor_count)
    attention_kernel[(programs,)](*arguments, **options)
    if not online:
        portable.launch(q, pyramid, lists, layout, spec, scale, out, lse, only=redo)
    return out


def pipeline(head_dim: int) -> dict[str, int | bool]:
    """How many tiles of keys, of values and of queries are in flight, and whether the warpgroups take turns.

    As many tiles as fit shared memory do not pay. Turns pay where products are as short as exponentials.
    """
    return {"STAGES": 2 if head_dim == 128 else 4, "QUERY_SLOTS": 2, "TURNS": head_dim == 64}


def _sources(
    tokens: torch.Tensor, means: torch.Tensor, pyramid: TritonPyramid, layout: TokenLayout, spec: AttentionSpec
) -> list[TensorDescriptor | None]:
    """Where the boxes of text and of every level come from; each ends where its rows end, so that zeros follow."""
    heads_first = tokens.transpose(1, 2)
    video_end = layout.text_before + layout.video_keys
    text = [heads_first[:, :, : layout.text_before], heads_first[:, :, video_end:]]
    sources = [_boxes(rows, spec.block_key) if rows.shape[2] else None for rows in text]
    for factor in spec.levels:
        if factor in pyramid.factors:
            start = pyramid.first_row(factor, layout.video_keys)
            rows = means[:, :, start : start + block_count(layout.video_keys, factor)]
        else:
            rows = heads_first[:, :, layout.text_before : video_end]
        sources.append(_boxes(rows, spec.block_key // factor))
    return sources + [None] * (MOST_HOPPER_LEVELS - len(spec.levels))


def _boxes(rows: torch.Tensor, height: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(rows, [1, 1, height, PANEL.value], box_layout(height))

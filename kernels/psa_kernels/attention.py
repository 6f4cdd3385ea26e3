"""Pyramid Sparse Attention: its stages in order, and the choice of what computes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from psa_kernels.blocks import block_count
from psa_kernels.head_groups import head_groups
from psa_kernels.implementations import Implementation, choose
from psa_kernels.layout import TokenLayout, make_layout
from psa_kernels.lists import AttentionStats, BlockLists, list_width
from psa_kernels.sparse.reference import text_attention
from psa_kernels.spec import AttentionSpec


def psa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    *,
    text_before: int = 0,
    text_after: int = 0,
    permutation: torch.Tensor | None = None,
    scale: float | None = None,
    implementation: str = "auto",
    strict: bool = False,
    return_stats: bool = False,
    lists: BlockLists | None = None,
) -> torch.Tensor | tuple[torch.Tensor, AttentionStats]:
    """Attention in which every block of queries reads few keys in full, more of them pooled, and skips the rest.

    Defined in "PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation", arXiv 2512.04025. Half
    precision is computed in float32 and returned in the dtype of `q`. Forward only: no gradient flows.

    The kernels' pyramids take at most 1 1/4 times the memory of the output, or half a GiB if that is more (but at least
    those of one head): where those of all heads would take more, the stages run for one group of heads after the other.

    Args:
        q, k, v: `[B, N, H, D]`, floating point, one dtype and device; the last stride is 1, the others are free. The
            number of queries may differ from the number of keys.
        spec: what to compute.
        text_before, text_after: how many of the first and last tokens, of the queries and of the keys, are text. Text
            keys are attended exactly by all queries, text queries attend all keys exactly.
        permutation: int64 `[video tokens]`: the order in which video tokens form blocks; entry i names the token at
            position i. The output stays in the order of `q`.
        scale: factor on the dot products; 1 / sqrt(D) if None.
        implementation: `reference` (PyTorch), `triton` (kernels for GPUs of compute capability 8.0 or newer), `hopper`
            (the same with an attention kernel made for capability 9.0), or `auto`: the fastest that the device has and
            that serves the call.
        strict: with `auto`, raise instead of warning where a GPU cannot use its fastest implementation, or the
            precision of the spec.
        return_stats: also return what was attended.
        lists: what `select_blocks` returned for the same spec and shapes, perhaps for the tensors of an earlier
            denoising step; computed from `q` and `k` if None.

    Returns:
        The attention output `[B, Nq, H, D]`, contiguous, and with `return_stats` an `AttentionStats`.

    Raises:
        ValueError: shapes, dtypes, token counts, the permutation, the lists or the implementation do not fit; or a
            gradient is asked for.
        RuntimeError: `strict`, and `auto` cannot use the fastest implementation of the device, or the precision.
    """
    layout = _check(q, k, v, text_before, text_after, permutation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose(q, k, v, layout, spec, scale, implementation, strict)
    with torch.no_grad():
        if not layout.video_queries or not layout.video_keys:
            out = _all_dense(q, k, v, scale)
            stats = AttentionStats.from_lists(_no_lists(q, spec, layout), spec, "dense")
            return (out, stats) if return_stats else out
        if lists is not None:
            _check_lists(lists, q, spec, layout)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        head_bytes = 2 * q.shape[0] * chosen.pyramid_rows(layout, spec) * q.shape[3] * q.element_size()
        stats = []
        for heads in head_groups(q.shape[2], head_bytes, out.nbytes):
            tensors = (x[:, :, heads] for x in (q, k, v, out))
            used = _attend_heads(*tensors, None if lists is None else lists[:, heads], chosen, layout, spec, scale)
            if return_stats:
                stats.append(AttentionStats.from_lists(used, spec, chosen.name))
            del used  # A group's lists need not outlive it.
        if text_before or text_after:
            text_attention(q, k, v, out, layout, scale)
    return (out, AttentionStats.of_all_heads(stats)) if return_stats else out


def _attend_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lists: BlockLists | None,
    chosen: Implementation,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
) -> BlockLists:
    """All stages for a group of heads: fill the rows of video queries of `out`, and return the lists that were used."""
    keys = chosen.pool_keys(k, layout, spec, lists is None)
    if lists is None:
        lists = chosen.select(q, k, v, layout, spec, scale, keys)
    chosen.attend(q, k, v, keys, lists, layout, spec, scale, out)
    return lists


def select_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    spec: AttentionSpec,
    *,
    v: torch.Tensor | None = None,
    text_before: int = 0,
    text_after: int = 0,
    permutation: torch.Tensor | None = None,
    scale: float | None = None,
    implementation: str = "auto",
    strict: bool = False,
) -> BlockLists:
    """The first half of `psa_attention`: which key blocks every query block reads, and at which level.

    Arguments and errors are those of `psa_attention`; only the rule `budget` needs `v`. The lists take 4 bytes a query
    block and level, and 2 (4 beyond 32,767 key blocks) a query block and attended key block; skipped ones take as much
    under the rule `mass`, and unattended room under `budget`, where a row has that of as many as it could pay.
    """
    if v is None:
        if spec.rule == "budget":
            raise ValueError("v=None: the rule 'budget' needs the values")
        v = k
    layout = _check(q, k, v, text_before, text_after, permutation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose(q, k, v, layout, spec, scale, implementation, strict)
    with torch.no_grad():
        if not layout.video_queries or not layout.video_keys:
            return _no_lists(q, spec, layout)
        return chosen.select(q, k, v, layout, spec, scale, None)


def _no_lists(q: torch.Tensor, spec: AttentionSpec, layout: TokenLayout) -> BlockLists:
    no_blocks = torch.zeros(_list_shape(q, spec, layout), dtype=torch.int64, device=q.device)
    return BlockLists.from_levels(no_blocks, len(spec.levels))


def _all_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Without video queries or video keys there is nothing to leave out."""
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    return out.transpose(1, 2).contiguous()


def _list_shape(q: torch.Tensor, spec: AttentionSpec, layout: TokenLayout) -> tuple[int, int, int, int]:
    query_blocks = block_count(layout.video_queries, spec.block_query)
    return q.shape[0], q.shape[2], query_blocks, block_count(layout.video_keys, spec.block_key)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_before: int,
    text_after: int,
    permutation: torch.Tensor | None,
) -> TokenLayout:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point() or not x.numel():
            raise ValueError(
                f"{name}: expected a non-empty floating point tensor [batch, tokens, heads, head_dim], "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name}: expected a last stride of 1, got strides {x.stride()}")
        if (x.dtype, x.device) != (q.dtype, q.device):
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} as q, got {x.dtype} on {x.device}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: requires a gradient, but psa_attention is forward only; use torch.no_grad()")
    if k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: expected [B, Nq, H, D] and "
            "twice [B, Nk, H, D]"
        )
    return make_layout(q.shape[1], k.shape[1], text_before, text_after, permutation)


def _check_lists(lists: BlockLists, q: torch.Tensor, spec: AttentionSpec, layout: TokenLayout) -> None:
    *rows, key_blocks = _list_shape(q, spec, layout)
    width = list_width(spec, key_blocks)
    found = *lists.ids.shape[:3], lists.key_blocks, *lists.counts.shape
    if found != (*rows, key_blocks, *rows, len(spec.levels)) or not width <= lists.ids.shape[3] <= key_blocks:
        raise ValueError(
            f"lists: made for another call: ids {tuple(lists.ids.shape)} of {lists.key_blocks} key blocks and counts "
            f"{tuple(lists.counts.shape)}, expected {(*rows, width)} of {key_blocks} and {(*rows, len(spec.levels))}"
        )

"""Pyramid Sparse Attention: its stages in order, and the choice of what computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

import torch

from psa_kernels import head_groups
from psa_kernels.backends.base import Backend
from psa_kernels.backends.choose import choose
from psa_kernels.call import Call, make_call
from psa_kernels.devices import entry_point
from psa_kernels.heads import dense_attention, group_size, query_heads
from psa_kernels.known_calls import recall
from psa_kernels.lists import AttentionStats, BlockLists
from psa_kernels.sparse.reference import text_attention
from psa_kernels.spec import AttentionSpec


class Options(TypedDict, total=False):
    """The keyword arguments that every overload of `psa_attention` takes."""

    text_before: int
    text_after: int
    permutation: torch.Tensor | None
    scale: float | None
    causal: bool
    implementation: str
    strict: bool
    lists: BlockLists | None
    out: torch.Tensor | None
    heads_done: Callable[[slice], None] | None


@overload
def psa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    *,
    return_stats: Literal[False] = False,
    return_lists: Literal[False] = False,
    **options: Unpack[Options],
) -> torch.Tensor: ...


@overload
def psa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    *,
    return_stats: Literal[True],
    return_lists: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[torch.Tensor, AttentionStats]: ...


@overload
def psa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    *,
    return_stats: Literal[False] = False,
    return_lists: Literal[True],
    **options: Unpack[Options],
) -> tuple[torch.Tensor, BlockLists]: ...


@overload
def psa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    *,
    return_stats: Literal[True],
    return_lists: Literal[True],
    **options: Unpack[Options],
) -> tuple[torch.Tensor, AttentionStats, BlockLists]: ...


@overload
def psa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    *,
    return_stats: bool = False,
    return_lists: bool = False,
    **options: Unpack[Options],
) -> Any: ...


@entry_point
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
    causal: bool = False,
    implementation: str = "auto",
    strict: bool = False,
    return_stats: bool = False,
    lists: BlockLists | None = None,
    return_lists: bool = False,
    out: torch.Tensor | None = None,
    heads_done: Callable[[slice], None] | None = None,
) -> Any:
    """Attention in which each query block reads a few key blocks in full and more of them pooled, and skips the rest.

    Defined in "PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation", arXiv 2512.04025. Half
    precision is computed in float32 and returned in the dtype of `q`; autocast changes nothing. Forward only: no
    gradient flows.

    Pyramids take at most 1 1/4 times the memory of the output, or a GiB if that is more (but at least the memory
    of one head's). Where the pyramids of all heads would take more, the stages run for one group of heads after the
    other.

    Args:
        q, k, v: `[B, Nq, Hq, D]` and twice `[B, Nk, Hkv, D]`, floating point, one dtype and device; the last stride is
            1, the others are free. Nq and Nk may differ. Hq is Hkv or a multiple of it (grouped-query attention): head
            h of the queries reads head `h // (Hq / Hkv)` of the keys and values, which are never repeated in memory.
        spec: what to compute.
        text_before, text_after: how many of the first and last tokens, of the queries and of the keys, are text. Text
            keys are attended exactly by all queries, text queries attend all keys exactly.
        permutation: int64 `[video tokens]`: the order in which video tokens form blocks; entry i names the token at
            position i. The output stays in the order of `q`.
        scale: factor on the dot products; 1 / sqrt(D) if None.
        causal: let query t, which stands at position Nk - Nq + t, read no later keys; Nk is no less than Nq. A query
            block reads two things. Its diagonal, the keys at its own positions, is read exactly, each query up to
            itself. Its candidates are the key blocks before the diagonal; of these it reads those that are listed. So
            the keys and values of a token change no output before it. Lists are chosen for a query block as a whole,
            from the keys and values of its candidates and from all its queries. So the query of a token may change
            which blocks the earlier queries of its own query block read, but nothing before that block. `text_before`
            and `text_after` then count keys; the queries at the positions of text are text queries, and exact.
            `permutation` has to be None, `block_query` a multiple of `block_key`, the precision native.
        implementation: `reference` (PyTorch), `triton` (kernels for GPUs of compute capability 8.0 or newer), `hopper`
            (the same, with an attention kernel made for capability 9.0), or `auto`, which takes the fastest one that
            the device has and that can serve the call.
        strict: with `auto`, raise instead of warning where a GPU cannot use its fastest implementation, or the
            precision of the spec.
        return_stats: also return what was attended.
        lists: what `select_blocks` returned for the same spec and shapes, perhaps for the tensors of an earlier
            denoising step; computed from `q`, `k` and, if the rule needs them, `v` if None. Their shapes and pooling
            factors are checked, their entries are trusted (`BlockLists`).
        return_lists: also return the lists that were used: `lists`, or what `select_blocks` returns for this call. A
            caller who wants to keep lists saves a second pass over the keys.
        out: where to write the attention output: contiguous, with the shape, dtype and device of `q`, at an address
            that is a multiple of 16, and not in the memory of other arguments. New memory if None.
        heads_done: if given, is called with each group of query heads as soon as what fills the rows of their video
            queries is enqueued. So they can be passed on while the next group is computed.

    Returns:
        The attention output `[B, Nq, Hq, D]`, contiguous; `out`, if that was given. With `return_stats` or
        `return_lists` a tuple of it, the `AttentionStats` and the `BlockLists`, as far as they were asked for; both
        have an entry for every query head.

    Raises:
        ValueError: shapes, dtypes, token counts, the permutation, the lists, `out` or the implementation do not fit;
            or a gradient is asked for.
        TypeError: an argument is something else, such as `spec` the name of a preset.
        RuntimeError: `strict`, and `auto` cannot use the fastest implementation of the device, or the precision.
    """
    call = make_call(q, k, v, spec, text_before, text_after, permutation, scale, causal)
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else _checked(out, q)
    backend = choose(call, implementation, strict)
    if not call.layout.video_queries or not call.layout.video_keys:
        _all_dense(call, backend, out)
        used = [call.no_lists()]
        stats = [call.stats(used[0], "dense")]
    else:
        if lists is not None:
            lists = call.check_lists(lists)
        key = "groups of heads", backend.name, head_groups.LARGEST_SHARE, head_groups.SMALL_PYRAMIDS
        groups = recall(call.answers, key, lambda: _groups(call, backend))
        used, stats = [], []
        for heads in groups:
            if len(groups) == 1:
                found = _attend(call, backend, lists, out, True)
            else:
                part, rows = call.of_heads(heads), out[:, :, heads]
                found = _attend(part, backend, None if lists is None else lists[:, heads], rows)
            if return_stats:
                stats.append(call.stats(found, backend.name))
            if return_lists:
                used.append(found)
            del found  # A group's lists need not outlive it.
            if heads_done is not None:
                heads_done(slice(*heads.indices(q.shape[2])[:2]))
        if call.causal is not None:
            backend.attend_causal_text(call, call.causal.text_queries, out)
        elif text_before or text_after:
            text_attention(q, k, v, out, call.layout, call.scale)
    if not return_stats and not return_lists:
        return out
    results: list[Any] = [out]
    if return_stats:
        results.append(AttentionStats.of_all_heads(stats))
    if return_lists:
        results.append(BlockLists.of_all_heads(used) if lists is None else lists)
    return tuple(results)


def _groups(call: Call, backend: Backend) -> list[slice]:
    """Groups of heads of the queries that are computed at a time."""
    if not backend.has_pyramid:
        return [slice(None)]
    q, k = call.q, call.k
    head_bytes = 2 * q.shape[0] * backend.pyramid_rows(call) * q.shape[3] * q.element_size()
    # As much as the output, which has the shape of the queries.
    parts = head_groups.head_groups(k.shape[2], head_bytes, q.shape.numel() * q.element_size())
    group = group_size(q, k)
    return [slice(None)] if len(parts) == 1 else [query_heads(part, group) for part in parts]


def _attend(
    call: Call, backend: Backend, lists: BlockLists | None, out: torch.Tensor, alone: bool = False
) -> BlockLists:
    """Run all stages for a group of heads: fill the video queries' rows of `out`, and return the lists used."""
    keys = backend.pool_keys(call, lists is None, alone) if backend.has_pyramid else None
    if lists is None:
        lists = backend.select(call, keys)
    backend.attend(call, keys, lists, out)
    return lists


@entry_point
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
    causal: bool = False,
    implementation: str = "auto",
    strict: bool = False,
) -> BlockLists:
    """The first half of `psa_attention`: choose which key blocks every query block reads, and at which level.

    Arguments and errors are those of `psa_attention`; only the rule `budget` needs `v`. The lists take 4 bytes a query
    block and level, and 2 (4 beyond 32,767 key blocks) a query block and attended key block. Under the rule `mass`
    skipped blocks take room too; under `budget` a row has room for as many blocks as it could pay for.
    """
    call = make_call(q, k, k if v is None else v, spec, text_before, text_after, permutation, scale, causal)
    if v is None and spec.rule == "budget":
        raise ValueError("v=None: the rule 'budget' needs the values")
    backend = choose(call, implementation, strict)
    if not call.layout.video_queries or not call.layout.video_keys:
        return call.no_lists()
    return backend.select(call, None)


def _all_dense(call: Call, backend: Backend, out: torch.Tensor) -> None:
    """Fill the output of a call without video queries or without video keys: there is nothing to leave out."""
    if call.causal is not None:
        backend.attend_causal_text(call, [slice(0, call.q.shape[1])], out)
    else:
        out.copy_(dense_attention(call.q, call.k, call.v, call.scale))


def _checked(out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`out`, if the output can be written there."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out: expected a tensor or None, got {type(out).__name__}")
    for name in ("shape", "dtype", "device"):
        if (found := getattr(out, name)) != (wanted := getattr(q, name)):
            raise ValueError(f"out.{name}={found}: expected that of q, {wanted}")
    if not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}: expected it to be contiguous")
    if out.data_ptr() % 16:
        raise ValueError(f"out begins at address {out.data_ptr():#x}: expected a multiple of 16")
    return out

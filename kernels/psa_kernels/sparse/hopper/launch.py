"""Attention over the chosen rows of keys and values on Hopper GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from psa_kernels.blocks import block_count
from psa_kernels.devices import cache_bytes, multiprocessors
from psa_kernels.known_calls import recall
from psa_kernels.layout import TokenLayout
from psa_kernels.limits import MAX_HOPPER_LEVELS
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.pooled import Place, TritonPyramid, row_places
from psa_kernels.quantise.integers import Integers
from psa_kernels.sparse import triton as portable
from psa_kernels.sparse.hopper.kernel import attention_kernel
from psa_kernels.sparse.hopper.tiles import TILE_M, panel_columns, tile_layout
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import KEPT_LAUNCHES, Launch, Rows, Shape, address_of

# Integers that the programs share before the one of each item: two, and as many more as keep that at 16 bytes.
COUNTERS = 4


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
    known: dict[Any, Any] | None = None,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same as the portable `sparse.triton.sparse_attention`, on a GPU of compute capability 9.0.

    Args:
        pyramid: with tokens as a level of factor 1 where they are permuted, since a box is a run of rows in memory.
        integers: None, or what `quantise_rows` returned for the same bfloat16 tensors: queries are then multiplied by
            keys in 8-bit integers. A tile whose sums run over, or which has numbers that are not finite, is computed in
            bfloat16.
        known: as in the portable one.
        counters: None, or int32 of `Plan.counters` zeros, which are used up.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    permutation = layout.short_permutation
    k, (v, value_means) = pyramid.source_keys, pyramid.needed_values()
    queries, factors = (q, None) if integers is None else (integers.queries, integers.factors)
    ids = lists.ids
    plan = prepare(
        q, k, v, pyramid.factors, ids, layout, spec, scale, out, None if integers is None else queries,
        lse is not None, known,
    )  # fmt: skip
    if counters is None:
        counters = torch.zeros(plan.counters, dtype=torch.int32, device=q.device)
    redo = counters.narrow(0, COUNTERS, plan.items)
    if integers is None:
        key_addresses = plan.addresses(k, pyramid.keys)
    else:
        key_addresses = [address_of(rows) for rows in integers.keys]
        key_addresses += [0] * (2 + MAX_HOPPER_LEVELS - len(key_addresses))
    # Where there is no permutation or log-sum-exp, any pointer will do.
    sums, order = counters if lse is None else lse, counters if permutation is None else permutation
    if not plan.launch.at(
        queries.data_ptr(), address_of(factors), *key_addresses, *plan.addresses(v, value_means), out.data_ptr(),
        sums.data_ptr(), ids.data_ptr(), lists.counts.data_ptr(), order.data_ptr(), counters.data_ptr(),
        redo.data_ptr(),
    ):  # fmt: skip
        keys = plan.boxes(k, pyramid.keys) if integers is None else plan.boxes_of(integers.keys)
        values = plan.boxes(v, value_means)
        plan.launch(queries, factors, *keys, *values, out, sums, ids, lists.counts, order, counters, redo)
    if integers is not None and lse is not None:
        integers.add_key_means(lse, q, layout, scale)
    if not plan.online:
        portable.launch(q, pyramid, lists, layout, spec, scale, out, lse, only=redo, known=known)
    return out


class Plan(NamedTuple):
    """What calls of one shape take.

    Attributes:
        items: tiles of queries, of all heads.
        online: whether weights are relative to the largest logit so far; in half precision they could overflow,
            relative to any other.
        heights: rows of a box of text before and after the video, and of each level; in causal calls the second is of
            the video's keys.
        places: for keys and values of these strides, where the rows of each are.
    """

    launch: Launch
    items: int
    online: bool
    heights: tuple[int, ...]
    places: dict[Shape, tuple[Place | None, ...]]

    @property
    def counters(self) -> int:
        """Integers that have to be 0 before a launch."""
        return COUNTERS + self.items

    def addresses(self, tokens: torch.Tensor, means: torch.Tensor) -> list[int]:
        """Where the first rows of what `boxes` returns are, 0 for None."""
        return self.addresses_at(tokens.stride(), tokens.element_size(), tokens.data_ptr(), means.data_ptr())

    def addresses_at(self, strides: Shape, element_size: int, tokens: int, means: int) -> list[int]:
        """The same for tokens of these strides, from the addresses of both."""
        first = tokens, means
        places = self.places[strides]
        found = [0 if place is None else first[place.pooled] + place.offset * element_size for place in places]
        return found + [0] * (2 + MAX_HOPPER_LEVELS - len(found))

    def boxes(self, tokens: torch.Tensor, means: torch.Tensor) -> list[Boxes | None]:
        """Where the boxes of text and of every level come from; each ends where its rows end: zeros follow."""
        found: list[Boxes | None] = []
        for place, height in zip(self.places[tokens.stride()], self.heights, strict=True):
            if place is None:
                found.append(None)
                continue
            source = means if place.pooled else tokens
            found.append(Boxes(source, place.offset, place.shape, place.strides, height))
        return found + [None] * (2 + MAX_HOPPER_LEVELS - len(found))

    def boxes_of(self, views: Sequence[torch.Tensor | None]) -> list[Boxes | None]:
        """The same of tensors `[B, H, rows, D]`."""
        found = [
            None if rows is None else Boxes(rows, 0, rows.shape, rows.stride(), height)
            for rows, height in zip(views, self.heights, strict=True)
        ]
        return found + [None] * (2 + MAX_HOPPER_LEVELS - len(found))


class Boxes(Rows):
    """Rows `[B, H, rows, D]` that are fetched some at a time.

    Args:
        source: the tensor that they are in.
        offset: of the first one, in elements.
        height: rows of a box.
    """

    __slots__ = ("_height", "_offset", "_source")

    def __init__(self, source: torch.Tensor, offset: int, shape: Shape, strides: Shape, height: int) -> None:
        super().__init__(source.data_ptr() + offset * source.element_size(), shape, strides)
        self._source, self._offset, self._height = source, offset, height

    def descriptor(self) -> TensorDescriptor:
        """As `Rows.descriptor`."""
        source, bits = self._source, 8 * self._source.element_size()
        rows = source.as_strided(self.shape, self.strides, source.storage_offset() + self._offset)
        width = self.shape[3]
        return TensorDescriptor.from_tensor(
            rows, [1, 1, self._height, panel_columns(width, bits)], tile_layout(width, bits, 4)
        )


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    factors: tuple[int, ...],
    ids: torch.Tensor,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    out: torch.Tensor,
    queries: torch.Tensor | None = None,
    store_lse: bool = False,
    known: dict[Any, Any] | None = None,
) -> Plan:
    """What `sparse_attention` takes for tensors like these, whose entries are not read.

    Args:
        factors: of the pyramid.
        ids: of the lists.
        queries: None, or those in 8-bit integers.
        store_lse: whether the log-sum-exp is asked for.
        known: as in `sparse_attention`.
    """
    # What the other settings leave open.
    key = "hopper attention", factors, ids.shape[3], ids.dtype, out.stride(), store_lse, queries is None
    given = q if queries is None else queries
    return recall(known, key, lambda: _plan(
        q.shape, given.stride(), (q.dtype, given.dtype, ids.dtype), q.device,
        (k.shape, k.stride(), v.stride(), out.stride()), factors, layout.text_before, layout.text_after,
        layout.video_queries, layout.video_keys, layout.permutation is not None, ids.shape[3], spec, scale, store_lse,
        keeps_in_step(layout, spec, k),
    ))  # fmt: skip


@lru_cache(maxsize=KEPT_LAUNCHES)
def _plan(
    shape: Shape, query_strides: Shape, dtypes: tuple[torch.dtype, ...], device: torch.device,
    others: tuple[Shape, Shape, Shape, Shape], factors: tuple[int, ...], text_before: int, text_after: int,
    video_queries: int, video_keys: int, permuted: bool, list_width: int, spec: AttentionSpec, scale: float,
    store_lse: bool, in_step: bool,
) -> Plan:  # fmt: skip
    batch, query_tokens, heads, head_dim = shape
    items = block_count(video_queries, TILE_M.value) * batch * heads
    dtype, query_dtype, _ = dtypes
    online, unit = dtype == torch.float16, 16 // query_dtype.itemsize
    launch = Launch(
        attention_kernel, (min(items, multiprocessors(device)),),
        (*(stride // unit for stride in query_strides[:3]), *others[3][:3], heads, items, video_queries, video_keys,
         list_width, text_before, text_after, query_tokens, scale * math.log2(math.e)),
        HEAD_DIM=head_dim, BLOCK_QUERY=spec.block_query, BLOCK_KEY=spec.block_key, FACTORS=spec.levels,
        TEXT=text_before + text_after > 0, PERMUTED=permuted, STORE_LSE=store_lse, ONLINE=online, IN_STEP=in_step,
        GROUP=heads // others[0][2], CAUSAL=False, lead=None, shift=None, num_warps=4, **pipeline(head_dim),
    )  # fmt: skip
    heights = (spec.block_key, spec.block_key, *(spec.block_key // factor for factor in spec.levels))
    of_keys, key_strides, value_strides, _ = others
    counts = (text_before, video_keys, text_after)
    places = {each: row_places(of_keys, each, counts, factors, spec.levels) for each in (key_strides, value_strides)}
    return Plan(launch, items, online, heights, places)


def pipeline(head_dim: int) -> dict[str, int | bool]:
    """How many tiles of keys, of values and of queries are in flight, and whether the warpgroups take turns.

    As many tiles as fit shared memory do not pay. Turns pay where products are as short as exponentials.
    """
    return {"STAGES": 2 if head_dim == 128 else 4, "QUERY_SLOTS": 2, "TURNS": head_dim == 64}


def keeps_in_step(layout: TokenLayout, spec: AttentionSpec, keys: torch.Tensor) -> bool:
    """Whether a head has more rows than both halves of the cache can hold, and all lists are as long as each other."""
    return outgrow(layout.video_keys, spec, keys, cache_bytes(keys.device) // 2)


def outgrow(video_keys: int, spec: AttentionSpec, keys: torch.Tensor, cache: int) -> bool:
    """Whether the rule makes lists of levels that are all as long, and a head has rows of more bytes than a cache."""
    rows = sum(block_count(video_keys, factor) for factor in spec.levels)
    head_bytes = 2 * rows * keys.shape[3] * keys.element_size()
    return spec.rule == "count" and len(spec.levels) > 1 and head_bytes > cache

"""Attention over the chosen rows of the pyramid, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from psa_kernels.blocks import block_count
from psa_kernels.heads import dense_attention, group_size, key_head
from psa_kernels.layout import TokenLayout
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.reference import PyramidRows, build_pyramid, pyramid_rows
from psa_kernels.quantise.reference import (
    channel_matrices,
    channel_scales,
    key_mean_and_largest,
    largest_of_queries,
    quantised,
)
from psa_kernels.spec import AttentionSpec
from psa_kernels.threads import run_tasks

# Query blocks that share the cost of finding their rows: more of them need more memory for the indices.
BLOCKS_AT_ONCE = 32
# Tasks that each thread gets at least, so that none waits long for the last.
TASKS_PER_THREAD = 2


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: BlockLists,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Let the video queries attend the listed blocks at their levels, and all text.

    The logit of a row that stands for `count` tokens is q.k * scale + ln(count). With the precision `int8_qk` q and k
    are what `quantise.reference` makes of them, but for a head of which a key is not finite. Heads are done one after
    the other by each thread, so that only as many pyramids exist at a time as there are threads.

    Args:
        q, k, v: `[B, Nq, Hq, D]` and twice `[B, Nk, Hkv, D]`, all tokens, in the order of the model.
        out: where the result goes: `[B, Nq, Hq, D]` in the dtype of q; a new tensor if None.

    Returns:
        `out`; the rows of text queries are not written.
    """
    batch, heads, query_blocks, _ = lists.ids.shape
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    query_tokens = layout.video_query_tokens(q.device)
    rows = pyramid_rows(layout, spec, like=k)
    group = group_size(q, k)
    counts = _blocks_per_level(lists, spec)
    most_rows = int((counts * counts.new_tensor(rows.block_rows)).sum(-1).max()) + len(rows.text_tokens)
    parts = block_count(TASKS_PER_THREAD * torch.get_num_threads(), batch * heads)
    part_blocks = block_count(query_blocks, min(parts, query_blocks))

    def worker(tasks: Iterator[tuple[int, int, int]]) -> None:
        # Kept for all tasks: fresh tensors of this size cost more than the arithmetic on them, because the allocator
        # gives their pages back to the system each time.
        keys, values = q.new_empty(2, len(rows.log_count), q.shape[3], dtype=rows.log_count.dtype)
        attend = _BlockAttention(keys, values, spec.block_query, most_rows)
        for b, h, start in tasks:
            of_keys = key_head(h, group)
            build_pyramid(k[b, :, of_keys], rows, out=keys)
            build_pyramid(v[b, :, of_keys], rows, out=values)
            of_queries = None
            if spec.precision == "int8_qk":
                sharing = q[b, :, of_keys * group : (of_keys + 1) * group]
                of_queries = _round_keys(keys, rows, sharing, k[b, :, of_keys])
            end = min(start + part_blocks, query_blocks)
            for first in range(start, end, BLOCKS_AT_ONCE):
                blocks = slice(first, min(first + BLOCKS_AT_ONCE, end))
                tokens = query_tokens[blocks.start * spec.block_query : blocks.stop * spec.block_query]
                index, lengths = _rows_of_lists(lists.ids[b, h, blocks], counts[b, h, blocks], rows)
                queries = q[b, :, h].index_select(0, tokens).to(keys.dtype)
                if of_queries is not None:
                    queries = queries @ of_queries
                    queries = quantised(queries, largest_of_queries(queries))
                queries *= scale
                attended = torch.empty_like(queries)
                for query, result, row, bias in zip(
                    queries.split(spec.block_query),
                    attended.split(spec.block_query),
                    index.split(lengths),
                    rows.log_count[index].split(lengths),
                    strict=True,
                ):
                    attend(query, row, bias, result)
                out[b, :, h].index_copy_(0, tokens, attended.to(out.dtype))

    run_tasks(product(range(batch), range(heads), range(0, query_blocks, part_blocks)), worker, q.device)
    return out


def _round_keys(
    keys: torch.Tensor, rows: PyramidRows, queries: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor | None:
    """Replace the keys of a pyramid by multiples of a step, in other channels and less their mean.

    Args:
        queries, tokens: `[Nq, heads, D]` and `[Nk, D]`, of all heads that read these keys, and the keys themselves.

    Returns:
        What queries have to be multiplied by, `[D, D]`; None if a key is not finite, and the keys are left as they are.
    """
    of_queries, of_keys = channel_matrices(channel_scales(queries, tokens))
    rotated = keys @ of_keys
    mean, largest = key_mean_and_largest(torch.cat([rotated[: rows.first_row[1]], rotated[rows.first_row[-1] :]]))
    if not largest.isfinite():
        return None
    keys.copy_(quantised(rotated - mean, largest))
    return of_queries


class _BlockAttention:
    """Softmax attention of one query block over some rows of a pyramid, in memory that is used again and again."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, most_queries: int, most_rows: int) -> None:
        self._keys, self._values = keys, values
        self._gathered = keys.new_empty(2, most_rows, keys.shape[1])
        self._weights = keys.new_empty(most_queries * most_rows)
        self._views: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

    def __call__(self, query: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> None:
        """Attend `rows` `[R]` with `query` `[Q, D]`, already scaled, and write `out` `[Q, D]`."""
        shape = len(query), len(rows)
        if shape not in self._views:
            keys, values = self._gathered[:, : len(rows)]
            self._views[shape] = keys, keys.T, values, self._weights[: len(query) * len(rows)].view(shape)
        keys, keys_transposed, values, weights = self._views[shape]
        torch.index_select(self._keys, 0, rows, out=keys)
        torch.index_select(self._values, 0, rows, out=values)
        torch.mm(query, keys_transposed, out=weights)
        torch.softmax(weights.add_(bias), dim=-1, out=weights)
        torch.mm(weights, values, out=out)


def text_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layout: TokenLayout, scale: float
) -> None:
    """Let the text queries attend every key, densely, and write their rows of `out`, all as in `sparse_attention`."""
    before, after = layout.text_before, q.shape[1] - layout.text_after
    # Slices are views; a gather of the rows would take longer than their attention.
    text = [q[:, :before]] * bool(before) + [q[:, after:]] * bool(layout.text_after)
    attended = dense_attention(text[0] if len(text) == 1 else torch.cat(text, dim=1), k, v, scale)
    if before:
        out[:, :before] = attended[:, :before]
    if layout.text_after:
        out[:, after:] = attended[:, before:]


def _blocks_per_level(lists: BlockLists, spec: AttentionSpec) -> torch.Tensor:
    """How many blocks of each row of lists stand at each level of the pyramid: `[B, H, query blocks, levels]`."""
    if spec.rest == "skip":
        return lists.counts
    rest = lists.key_blocks - lists.counts.sum(-1, keepdim=True)
    return torch.cat([lists.counts, rest], dim=-1)


def _rows_of_lists(ids: torch.Tensor, counts: torch.Tensor, rows: PyramidRows) -> tuple[torch.Tensor, list[int]]:
    """Rows of the pyramid that some query blocks attend.

    Args:
        ids, counts: `[query blocks, list width]` and `[query blocks, levels]`, as in `BlockLists`.

    Returns:
        int32 `[sum of lengths]`: the rows of the first query block, then those of the next, ...; and the lengths.
    """
    position = torch.arange(ids.shape[1], device=ids.device)
    ends = counts.cumsum(-1)
    level = (position >= ends[:, :, None]).sum(1)
    # One more entry of each table stands for blocks that are skipped: they have no rows.
    block_rows = ids.new_tensor([*rows.block_rows, 0], dtype=torch.int32)[level]
    first_row = ids.new_tensor(rows.first_row, dtype=torch.int32)
    first = first_row[level] + ids * block_rows
    last = torch.cat([first_row[1:], first_row[-1:]])[level]
    length = torch.minimum(block_rows, last - first)

    text = torch.full_like(first[:, :1], rows.first_row[-1])
    first = torch.cat([first, text], dim=1)
    length = torch.cat([length, torch.full_like(text, len(rows.text_tokens))], dim=1)
    shift = (first - (length.flatten().cumsum(0, dtype=torch.int32).view_as(length) - length)).flatten()
    index = shift.repeat_interleave(length.flatten())
    index += torch.arange(len(index), dtype=torch.int32, device=index.device)
    return index, length.sum(1).tolist()

"""Attention over the chosen rows of the pyramid, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F

from psa_kernels.layout import TokenLayout
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.reference import Pyramid
from psa_kernels.spec import AttentionSpec
from psa_kernels.threads import run_tasks

# Query blocks that share the cost of finding their rows, at most, and tasks a thread gets, at least: the rows of one
# task fit in memory, and no thread waits long for the last.
TASK_BLOCKS = 32
TASKS_PER_THREAD = 4


def sparse_attention(
    q: torch.Tensor, pyramid: Pyramid, lists: BlockLists, layout: TokenLayout, spec: AttentionSpec, scale: float
) -> torch.Tensor:
    """Let the video queries attend the listed blocks at their levels, and all text (DESIGN: stage 5).

    The logit of a row that stands for `count` tokens is q.k * scale + ln(count).

    Args:
        q: `[B, Nq, H, D]`, all queries, in the order of the model.

    Returns:
        `[B, Nq, H, D]` in the dtype of q; the rows of text queries are not written.
    """
    batch, heads, query_blocks, _ = lists.ids.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    query_tokens = layout.video_query_tokens(q.device)
    counts = _blocks_per_level(lists, spec)
    step = batch * heads * query_blocks // (TASKS_PER_THREAD * torch.get_num_threads())
    step = max(1, min(step, TASK_BLOCKS))
    most_rows = int((counts * counts.new_tensor(pyramid.block_rows)).sum(-1).max()) + pyramid.text_rows

    def worker(tasks: Iterator[tuple[int, int, int]]) -> None:
        # Kept for all tasks: fresh tensors of this size cost more than the arithmetic on them, because the allocator
        # gives their pages back to the system each time.
        gathered = pyramid.keys.new_empty(2, most_rows, pyramid.keys.shape[3])
        logits = pyramid.keys.new_empty(spec.block_query * most_rows)

        @cache
        def workspace(queries: int, rows: int) -> tuple[torch.Tensor, ...]:
            keys, values = gathered[:, :rows]
            return keys, keys.T, values, logits[: queries * rows].view(queries, rows)

        for b, h, first in tasks:
            blocks = slice(first, first + step)
            tokens = query_tokens[first * spec.block_query : (first + step) * spec.block_query]
            index, lengths = _rows_of_lists(lists.ids[b, h, blocks], counts[b, h, blocks], pyramid)
            queries = q[b, :, h].index_select(0, tokens).to(pyramid.keys.dtype) * scale
            attended = torch.empty_like(queries)
            all_keys, all_values = pyramid.keys[b, h], pyramid.values[b, h]
            for query, result, rows, bias in zip(
                queries.split(spec.block_query),
                attended.split(spec.block_query),
                index.split(lengths),
                pyramid.log_count[index].split(lengths),
                strict=True,
            ):
                keys, keys_t, values, weights = workspace(len(query), len(rows))
                torch.index_select(all_keys, 0, rows, out=keys)
                torch.index_select(all_values, 0, rows, out=values)
                torch.mm(query, keys_t, out=weights)
                torch.softmax(weights.add_(bias), dim=-1, out=weights)
                torch.mm(weights, values, out=result)
            out[b, :, h].index_copy_(0, tokens, attended.to(out.dtype))

    run_tasks(product(range(batch), range(heads), range(0, query_blocks, step)), worker, q.device)
    return out


def text_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layout: TokenLayout, scale: float
) -> None:
    """Let the text queries attend every key, densely, and write their rows of `out`; all tensors `[B, N, H, D]`."""
    tokens = layout.text_query_tokens(q.device)
    q, k, v = (x.transpose(1, 2) for x in (q.index_select(1, tokens), k, v))
    out.index_copy_(1, tokens, F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2))


def _blocks_per_level(lists: BlockLists, spec: AttentionSpec) -> torch.Tensor:
    """How many blocks of each row of lists stand at each level of the pyramid: `[B, H, query blocks, levels]`."""
    if spec.rest == "skip":
        return lists.counts
    rest = lists.ids.shape[-1] - lists.counts.sum(-1, keepdim=True)
    return torch.cat([lists.counts, rest], dim=-1)


def _rows_of_lists(ids: torch.Tensor, counts: torch.Tensor, pyramid: Pyramid) -> tuple[torch.Tensor, list[int]]:
    """Rows of the pyramid that some query blocks attend.

    Args:
        ids, counts: `[query blocks, key blocks]` and `[query blocks, levels]`, as in `BlockLists`.

    Returns:
        int32 `[sum of lengths]`: the rows of the first query block, then those of the next, ...; and the lengths.
    """
    position = torch.arange(ids.shape[1], device=ids.device)
    ends = counts.cumsum(-1)
    level = (position >= ends[:, :, None]).sum(1)
    # One more entry of each table stands for blocks that are skipped: they have no rows.
    block_rows = ids.new_tensor([*pyramid.block_rows, 0], dtype=torch.int32)[level]
    first_row = ids.new_tensor(pyramid.first_row, dtype=torch.int32)
    first = first_row[level] + ids * block_rows
    last = torch.cat([first_row[1:], first_row[-1:]])[level]
    length = torch.minimum(block_rows, last - first)

    text = torch.full_like(first[:, :1], pyramid.first_row[-1])
    first = torch.cat([first, text], dim=1)
    length = torch.cat([length, torch.full_like(text, pyramid.text_rows)], dim=1)
    shift = (first - (length.flatten().cumsum(0, dtype=torch.int32).view_as(length) - length)).flatten()
    index = shift.repeat_interleave(length.flatten())
    index += torch.arange(len(index), dtype=torch.int32, device=index.device)
    return index, length.sum(1).tolist()

"""`pool_and_attend` with the attention kernel for Hopper: what it counts is set to zero where rows are pooled."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from psa_kernels.call import Call
from psa_kernels.lists import BlockLists
from psa_kernels.pool_and_attend import PART, PoolAndAttend
from psa_kernels.pyramid.triton import pool_kernel
from psa_kernels.sparse.hopper import launch as hopper

# Integers that a program sets to zero at a time.
CLEARED = tl.constexpr(128)
# Calls whose rows are kept. Memory is given out at the same addresses again and again.
KEPT_ROWS = 256


class PoolAndAttendHopper(PoolAndAttend):
    """For the kernel for Hopper, and the portable one that computes tiles again.

    The counters are part of the call's own memory, so that calls on several streams, or in a CUDA graph, share none.
    """

    all_tiles = False

    def __init__(self, call: Call, lists: BlockLists, out: torch.Tensor, gathered: bool) -> None:
        super().__init__(call, lists, out, gathered)
        self._plan = hopper.prepare(
            call.q, call.k, call.v, self._factors, lists.ids, call.layout, call.spec, call.scale, out,
            known=call.answers,
        )  # fmt: skip
        self._counters, self._size = self._size, self._size + -(-4 * self._plan.counters // PART) * PART
        if self._pooling is not None:
            self._pooling = self._pooling.with_more(pool_and_clear_kernel, self._plan.counters)
        self._launches = [self._pooling, self._plan.launch, None if self._plan.online else self._portable]
        # Without anything to pool nobody clears the counters here.
        self._by_addresses = self._pooling is not None
        self._strides = call.k.stride(), call.v.stride()
        self._element_size = call.k.element_size()
        self._rows: dict[tuple[int, int, int], list[int]] = {}

    def _launch(self, q: int, k: int, v: int, work: int, out: int, ids: int, counts: int, permutation: int) -> None:
        keys, values, counters = work, work + self._half, work + self._counters
        redo = counters + 4 * hopper.COUNTERS
        assert self._pooling is not None, "then tensors are looked at"
        self._pooling.at_multiples(k, keys, 0, v, values, permutation, counters)
        rows = self._rows.get((k, v, work))
        if rows is None:
            rows = self._rows_at(k, v, work)
        # Where there is no log-sum-exp or permutation, any pointer will do.
        self._plan.launch.at_multiples(q, 0, *rows, out, counters, ids, counts, permutation or counters, counters, redo)
        if not self._plan.online:
            self._portable.at_multiples(
                q, k, v, keys + self._skipped, values + self._skipped, out, 0, ids, counts, permutation, redo
            )

    def _rows_at(self, k: int, v: int, work: int) -> list[int]:
        """Where the rows of keys and values are, as the kernel takes them."""
        if len(self._rows) >= KEPT_ROWS:
            self._rows.clear()
        found = self._rows[k, v, work] = [
            *self._plan.addresses_at(self._strides[0], self._element_size, k, work),
            *self._plan.addresses_at(self._strides[1], self._element_size, v, work + self._half),
        ]
        return found

    def _look(self, call: Call, lists: BlockLists, out: torch.Tensor, work: torch.Tensor) -> None:
        pyramid, counters = self._pyramid(call, work), None
        if self._pooling is not None:
            counters = work[self._counters : self._counters + 4 * self._plan.counters].view(torch.int32)
            permutation = call.layout.short_permutation
            self._pooling(call.k, pyramid.keys, None, call.v, pyramid.values, permutation, counters)
        hopper.sparse_attention(
            call.q, pyramid, lists, call.layout, call.spec, call.scale, out=out, known=call.answers, counters=counters
        )


@triton.jit
def pool_and_clear_kernel(
    x_ptr, means_ptr, coarsest_ptr, v_ptr, value_means_ptr, permutation, counters_ptr, stride_b, stride_n, stride_h,
    stride_vb, stride_vn, stride_vh, heads, video_tokens_count, text_before, rows, counters, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, FACTORS: tl.constexpr, GROUPS: tl.constexpr, CAP: tl.constexpr,
    BLOCK_KEY: tl.constexpr, LEVELS: tl.constexpr, THRESHOLDS: tl.constexpr, PERMUTED: tl.constexpr,
    WIDE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """`pool_kernel`; and zeros in `counters` integers at `counters_ptr`, for a kernel that is launched later."""
    program = tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * tl.program_id(2))
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    for first in range(program * CLEARED, counters, programs * CLEARED):
        place = first + tl.arange(0, CLEARED)
        tl.store(counters_ptr + place, tl.zeros([CLEARED], tl.int32), mask=place < counters)
    pool_kernel(
        x_ptr, means_ptr, coarsest_ptr, v_ptr, value_means_ptr, permutation, stride_b, stride_n, stride_h, stride_vb,
        stride_vn, stride_vh, heads, video_tokens_count, text_before, rows, HEAD_DIM, PADDED_DIM, FACTORS, GROUPS, CAP,
        BLOCK_KEY, LEVELS, THRESHOLDS, PERMUTED, WIDE, VALUES,
    )  # fmt: skip

"""`pool_and_attend` with the attention kernel for Hopper: what it counts is set to zero where rows are pooled."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from psa_kernels.call import Call
from psa_kernels.lists import BlockLists
from psa_kernels.pool_and_attend import PoolAndAttend
from psa_kernels.pyramid.triton import pool_kernel
from psa_kernels.sparse.hopper import launch as hopper
from psa_kernels.triton_prepared import Prepared

# Integers that a program sets to zero at a time.
CLEARED = tl.constexpr(128)
# Calls whose rows are kept. Memory is given out at the same addresses again and again.
KEPT_ROWS = 256


class PoolAndAttendHopper(PoolAndAttend):
    """For the kernel for Hopper, and the portable one that computes tiles again.

    The counters are part of the call's own memory, so that calls on several streams, or in a CUDA graph, share none.
    """

    all_tiles = False

    def prepare(self, call: Call, lists: BlockLists, out: torch.Tensor) -> Prepared:
        self.plan = hopper.prepare(
            call.q, call.k, call.v, self.factors, lists.ids, call.layout, call.spec, call.scale, out,
            known=call.answers,
        )  # fmt: skip
        self.rows: dict[tuple[int, int, int], list[int]] = {}
        self.strides, self.element_size = (call.k.stride(), call.v.stride()), call.k.element_size()
        if self.pooling is not None:
            self.pooling = self.pooling.with_more(pool_and_clear_kernel, self.plan.counters)
        launches = self.pooling, self.plan.launch, None if self.plan.online else self.portable
        sizes = self.means_bytes, self.means_bytes, 4 * self.plan.counters
        # Without anything to pool nobody clears the counters here.
        return Prepared(sizes, launches, by_addresses=self.pooling is not None)

    def launch(self, work: int, q: int, k: int, v: int, out: int, ids: int, counts: int, permutation: int) -> None:
        _, values, counters, _ = (work + start for start in self.prepared.starts)
        redo = counters + 4 * hopper.COUNTERS
        assert self.pooling is not None, "then tensors are looked at"
        self.pooling.at_multiples(k, work, 0, v, values, permutation, counters)
        rows = self.rows.get((k, v, work))
        if rows is None:
            rows = self.rows_at(k, v, work)
        # Where there is no log-sum-exp or permutation, any pointer will do.
        self.plan.launch.at_multiples(q, 0, *rows, out, counters, ids, counts, permutation or counters, counters, redo)
        if not self.plan.online:
            self.portable.at_multiples(
                q, k, v, work + self.skipped, values + self.skipped, out, 0, ids, counts, permutation, redo
            )

    def rows_at(self, k: int, v: int, work: int) -> list[int]:
        """Where the rows of keys and values are, as the kernel takes them."""
        if len(self.rows) >= KEPT_ROWS:
            self.rows.clear()
        values = work + self.prepared.starts[1]
        found = self.rows[k, v, work] = [
            *self.plan.addresses_at(self.strides[0], self.element_size, k, work),
            *self.plan.addresses_at(self.strides[1], self.element_size, v, values),
        ]
        return found

    def look(self, call: Call, lists: BlockLists, out: torch.Tensor, work: torch.Tensor) -> None:
        pyramid, counters = self.pyramid(call, work), None
        if self.pooling is not None:
            counters = self.prepared.part(work, 2, [self.plan.counters], torch.int32)
            permutation = call.layout.short_permutation
            self.pooling(call.k, pyramid.keys, None, call.v, pyramid.values, permutation, counters)
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

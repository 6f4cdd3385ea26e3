"""The kernel for Hopper, multiplying queries by keys in 8-bit integers."""

from __future__ import annotations

from typing import Any

import torch

from psa_kernels.backends.hopper import Hopper
from psa_kernels.blocks import block_count
from psa_kernels.call import Call
from psa_kernels.heads import group_size
from psa_kernels.lists import BlockLists


class HopperInt8(Hopper):
    """Needs what the native Hopper kernel needs, and bfloat16."""

    name = "hopper-int8"
    precisions = ("int8_qk",)
    in_one_go = None

    def _why_not_beside_triton(self, call: Call) -> str | None:
        obstacle = super()._why_not_beside_triton(call)
        # Only the frozen maximum has a second computation for what overflows, and float16 lacks the range for it.
        if obstacle is None and call.q.dtype != torch.bfloat16:
            obstacle = f"dtype {call.q.dtype}: expected torch.bfloat16"
        return obstacle

    def pyramid_rows(self, call: Call) -> int:
        from psa_kernels.quantise.triton import quantised_rows

        rows = quantised_rows(call.layout, call.spec, group_size(call.q, call.k))
        # A row of the pyramid has an entry of keys and one of values, 16 bits each: 4 bytes, as 4 integers.
        return super().pyramid_rows(call) + block_count(rows, 4)

    def attend(self, call: Call, keys: Any, lists: BlockLists, out: torch.Tensor) -> None:
        from psa_kernels.pyramid.triton import add_values
        from psa_kernels.quantise.triton import quantise_rows
        from psa_kernels.sparse.hopper.launch import sparse_attention

        q, layout, spec, scale = call.q, call.layout, call.spec, call.scale
        integers = quantise_rows(q, keys, layout, spec, scale)
        pyramid = add_values(keys, call.v, layout)
        sparse_attention(q, pyramid, lists, layout, spec, scale, out=out, integers=integers, known=call.answers)

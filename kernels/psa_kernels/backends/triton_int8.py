"""The portable kernels, multiplying queries by keys in 8-bit integers."""

from __future__ import annotations

from typing import Any

import torch

from psa_kernels.backends.triton import Triton
from psa_kernels.blocks import block_count
from psa_kernels.call import Call
from psa_kernels.devices import is_hopper
from psa_kernels.heads import group_size
from psa_kernels.lists import BlockLists


class TritonInt8(Triton):
    """Needs what the portable kernels need, half precision, and a head_dim of 64 or 128."""

    name = "triton-int8"
    precisions = ("int8_qk",)
    in_one_go = None

    def pays(self, call: Call) -> bool:
        # On Hopper the kernel made for it is faster, with integers or without.
        return not is_hopper(call.q.device)

    def why_not(self, call: Call) -> str | None:
        obstacle = super().why_not(call)
        if obstacle is not None:
            return obstacle
        if call.q.dtype not in (torch.bfloat16, torch.float16):
            return f"dtype {call.q.dtype}: expected torch.bfloat16 or torch.float16"
        if call.q.shape[-1] not in (64, 128):
            return f"head_dim={call.q.shape[-1]}: expected 64 or 128"
        if not call.scale > 0:
            return f"scale={call.scale}: expected more than 0"
        return None

    def pyramid_rows(self, call: Call) -> int:
        from psa_kernels.quantise.triton import rows_as_read

        rows = super().pyramid_rows(call)
        integers = rows_as_read(call.q.shape[1], call.k.shape[1], rows, group_size(call.q, call.k))
        # A row of the pyramid has an entry of keys and one of values, 16 bits each: 4 bytes, as 4 integers.
        return rows + block_count(integers, 4)

    def attend(self, call: Call, keys: Any, lists: BlockLists, out: torch.Tensor) -> None:
        from psa_kernels.pyramid.triton import add_values
        from psa_kernels.quantise.triton import quantise_as_read
        from psa_kernels.sparse.triton_int8 import sparse_attention

        q, layout, spec, scale = call.q, call.layout, call.spec, call.scale
        integers = quantise_as_read(q, keys, layout, spec, scale)
        sparse_attention(q, add_values(keys, call.v, layout), lists, layout, spec, scale, out=out, integers=integers)

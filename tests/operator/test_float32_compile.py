"""The portable attention kernels for float32, compiled without a GPU: they fit, and spill no more than pays.

Without tensor cores each thread multiplies rows of its own, so that a tile too many spills thousands of bytes. Some
spilling was measured to be faster than tiles that spill nothing (docs/kernels.md).
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from test_causal_compile import of_attention
from test_triton_compile import TARGETS, compile_and_check

from psa_kernels.causal import triton_attention
from psa_kernels.sparse import triton as sparse
from psa_kernels.triton_rows import must_be_told, padded_dim

POINTERS = ("q_ptr", "k_ptr", "v_ptr", "pooled_k_ptr", "pooled_v_ptr", "out_ptr")
FLOATS = dict.fromkeys(POINTERS, "*fp32")
# Bytes of stack by head_dim.
STACK = {32: 2500, 64: 0, 128: 800, 256: 200}


def of_float32(target, head_dim, block_query):
    constants, _ = of_attention(target, head_dim, 1)
    tile = sparse.tile_shape(divmod(target, 10), head_dim, 4, block_query)
    warps = tile.pop("num_warps")
    constants |= {"PADDED_DIM": padded_dim(head_dim), "LATE_SUM": target == 90, **tile, "BLOCK_QUERY": block_query}
    constants |= {"BLOCK_KEY": 64, "FACTORS": (1, 2, 4), "LISTED": 3, "FLAGS": 64, "ONLY": False, "only_ptr": None}
    return constants | {"ALIGNED": must_be_told(4, head_dim)}, {"num_warps": warps}


@pytest.mark.parametrize(
    ("target", "head_dim", "block_query"),
    [
        *((target, head_dim, 128) for target in TARGETS for head_dim in (64, 128)),
        *((90, head_dim, 128) for head_dim in (32, 256)),
        *((90, head_dim, 64) for head_dim in (32, 64)),
    ],
)
def test_attention(target, head_dim, block_query):
    constants, options = of_float32(target, head_dim, block_query)
    constants |= {"PERMUTED": True, "STORE_LSE": False, "lse_ptr": None}
    compile_and_check(
        sparse.attention_kernel, target, constants, options, tensor_cores=False, types=FLOATS, stack=STACK[head_dim]
    )


@pytest.mark.parametrize("head_dim", [64, 128])
def test_causal_attention(head_dim):
    constants, options = of_float32(90, head_dim, 128)
    compile_and_check(
        triton_attention.attention_kernel,
        90,
        constants,
        options,
        tensor_cores=False,
        types=FLOATS,
        stack=STACK[head_dim],
    )

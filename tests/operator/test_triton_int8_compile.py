"""The portable kernel in 8-bit integers, compiled without a GPU: integer tensor cores, no spills, and it fits."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")

from test_triton_compile import TARGETS, check_stack, cuobjdump, instructions  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from psa_kernels.sparse import triton_int8  # noqa: E402
from psa_kernels.triton_rows import must_be_told  # noqa: E402

TYPES = {
    **dict.fromkeys(("q_ptr", "k_ptr", "pooled_k_ptr"), "*i8"),
    **dict.fromkeys(("redo_ptr", "counts_ptr", "permutation"), "*i32"),
    **dict.fromkeys(("factors_ptr", "lse_ptr"), "*fp32"),
    "ids_ptr": "*i16",
}
# Compute capability 8.6 has the shared memory of 8.9. On 10.0 Triton 3.6 takes the instruction of
# 8.0, newer versions have one of its own.
SHARED = {target: shared for target, (shared, _) in TARGETS.items()} | {86: TARGETS[89][0]}
INTEGERS = {90: "IGMMA"}


@pytest.mark.parametrize("permuted", [False, True], ids=["ordered", "permuted"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", sorted(SHARED))
def test_attention(target, head_dim, permuted):
    tile = triton_int8.tile_shape(divmod(target, 10), head_dim, 128)
    warps = tile.pop("num_warps")
    kernel = triton_int8.attention_kernel
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_QUERY": 128,
        "BLOCK_KEY": 64,
        "FACTORS": (1, 2, 4),
        "LISTED": 3,
        "PERMUTED": permuted,
        "STORE_LSE": False,
        "WIDE": False,
        "GROUP": 1,
        "ALIGNED": must_be_told(2, head_dim),
        "lse_ptr": None,
        **tile,
        **({} if permuted else {"permutation": None}),
    }
    names = kernel.arg_names
    types = {
        name: "constexpr" if name in constants else TYPES.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in names
    }
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or "stride" in name or "width" in name]
    source = ASTSource(kernel, types, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps})
    assert compiled.metadata.shared <= SHARED[target]
    usage = cuobjdump(compiled, "-res-usage")
    check_stack(compiled, usage)
    assert int(re.search(r"REG:(\d+)", usage).group(1)) * 32 * warps <= 65536
    sass = instructions(compiled)
    newest = target == 100 and not triton.__version__.startswith(("3.6.", "3.7."))
    assert re.search(r"\bUTCIMMA\b" if newest else rf"\b{INTEGERS.get(target, 'IMMA')}\b\.\S*S8", sass)

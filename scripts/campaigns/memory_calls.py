"""A small grid of calls through every kernel on a GPU, to be watched by a memory checker:

    python scripts/campaigns/memory_calls.py
    compute-sanitizer --tool memcheck --error-exitcode 1 python scripts/campaigns/memory_calls.py

The first line fills Triton's cache, which the second is quicker with; it also compares every call with the reference.
Tensors get memory of their own, right before what is not theirs, instead of a part of a large piece that PyTorch keeps.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from psa_kernels import AttentionSpec, Importance, psa_attention, select_blocks

POOLED = Importance("pooled", "mean", 8, 8)
MASS = {"rule": "mass", "thresholds": (0.3, 0.5, 0.8), "floor": 0.1}
FOUR = {"levels": (1, 2, 4, 8), "thresholds": (0.1, 0.2, 0.4, 0.6)}
COARSE = {"block_key": 16, "levels": (1, 16), "thresholds": (0.5, 1.0)}
BUDGET = {"rule": "budget", "density": 0.3}
INT8 = {"precision": "int8_qk"}
# head_dim, dtype, tokens, text before and after, permuted, fields of the spec
CASES = [
    (128, torch.bfloat16, 1000, (0, 0), False, {}),
    (128, torch.bfloat16, 1000, (0, 0), True, {"block_key": 32}),
    (128, torch.float16, 777, (5, 40), True, {"block_key": 128, **FOUR}),
    (128, torch.bfloat16, 641, (0, 77), False, {"importance": POOLED, **MASS}),
    (128, torch.bfloat16, 900, (0, 0), True, BUDGET),
    (64, torch.bfloat16, 1025, (226, 0), False, {}),
    (64, torch.float16, 999, (0, 0), True, MASS),
    (64, torch.bfloat16, 800, (0, 9), False, BUDGET),
    (96, torch.bfloat16, 515, (0, 0), True, {"block_query": 64, "similarity": (0.1, 0.0)}),
    (40, torch.float16, 300, (3, 0), False, {"block_query": 64, **COARSE}),
    (64, torch.float32, 260, (0, 0), False, {"rest": "mean", "thresholds": (0.2, 0.4, 0.6)}),
    (256, torch.bfloat16, 200, (0, 1), False, {}),
    (128, torch.bfloat16, 3001, (0, 0), False, {}),
    (128, torch.bfloat16, 1000, (5, 40), True, INT8),
    (64, torch.bfloat16, 1025, (226, 0), False, INT8),
]  # fmt: skip
TOLERANCE = 2e-2


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("memory_calls: no CUDA device")
    hopper = torch.cuda.get_device_capability() == (9, 0)
    if hopper:
        let_programs_wait()
    for head_dim, dtype, tokens, (before, after), permuted, fields in CASES:
        spec = AttentionSpec(**fields)
        # Rows end 8 numbers before the next begins, which is not the tensor's either after its last.
        q, k, v = (
            torch.randn(2, tokens, 3, head_dim + 8, dtype=dtype, device="cuda")[..., :head_dim] for _ in range(3)
        )
        where = {"text_before": before, "text_after": after}
        if permuted:
            where["permutation"] = torch.randperm(tokens - before - after, device="cuda")
        names = ["triton"] if spec.precision == "native" else []
        for name in [*names, *(["hopper"] if hopper and serves_hopper(head_dim, dtype, spec) else [])]:
            lists = select_blocks(q, k, spec, v=v, implementation=name, **where)
            found = psa_attention(q, k, v, spec, lists=lists, implementation=name, **where)
            expected = psa_attention(q, k, v, spec, lists=lists, implementation="reference", **where)
            error = ((found - expected).double().norm() / expected.double().norm()).item()
            print(
                f"{name}, head_dim {head_dim}, {dtype}, {tokens} tokens, {fields}: differs by {error:.1e}", flush=True
            )
            if not error < TOLERANCE:
                raise SystemExit(1)


def let_programs_wait() -> None:
    """Let those of the Hopper kernel wait for each other in all calls, instead of long ones only."""
    from psa_kernels.sparse.hopper import launch as hopper

    hopper.keeps_in_step = lambda *_: True


def serves_hopper(head_dim: int, dtype: torch.dtype, spec: AttentionSpec) -> bool:
    """The kernel made for compute capability 9.0 takes fewer specs than the portable one."""
    return head_dim in (64, 128) and dtype != torch.float32 and spec.block_query == 128 and spec.rest == "skip"


if __name__ == "__main__":
    main()

"""The kernel of the rotation compiled for every supported architecture: it spills nothing, its accesses are wide."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

from test_triton_compile import TARGETS, compile_and_check, instructions

from psa_kernels.rotation.triton import HEADS, rotate_kernel, tile_tokens, warps_of
from psa_kernels.triton_rows import padded_dim

CASES = [
    # head_dim, distance of cosines, whether heads have tables of their own, 64-bit offsets
    (64, 1, False, True),
    (128, 1, True, False),
    (128, 2, False, False),
    (80, 2, False, False),
    (2048, 2, False, True),
]


@pytest.mark.parametrize("target", sorted({*TARGETS, 86}))
@pytest.mark.parametrize(("head_dim", "step", "by_head", "wide"), CASES)
def test_rotation(target, head_dim, step, by_head, wide, monkeypatch):
    """As it is launched for tables that hold each angle once, or twice, with the second of two taken of the sines."""
    monkeypatch.setitem(TARGETS, 86, TARGETS[89])
    tables = {"COS_FIRST": 0, "SIN_FIRST": step - 1, "COS_STEP": step, "SIN_STEP": step, "BY_HEAD": by_head}
    tile = {"PADDED_DIM": padded_dim(head_dim), "TOKENS": tile_tokens(head_dim), "HEADS": HEADS}
    constants = {"HEAD_DIM": head_dim, "WIDE": wide, **tables, **tile}
    types = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    options = {"num_warps": warps_of(head_dim)}
    compiled = compile_and_check(rotate_kernel, target, constants, options, tensor_cores=False, types=types)
    code = instructions(compiled)
    loads, stores = (re.findall(rf"\b{kind}\b([\w.]*)", code) for kind in ("LDG", "STG"))
    # A thread takes 32 bytes of channels and as many of cosines and of sines, these one by one where every other one
    # is left out.
    assert len(stores) == 2 and all(each.endswith(".128") for each in stores)
    assert sum(each.endswith(".128") for each in loads) == (6 if step == 1 else 2)
    assert step == 2 or len(loads) == 6

"""Arguments of another type or without a finite value are named before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from psa_kernels import AttentionSpec, BlockLists, psa_attention, select_blocks
from psa_kernels.call import make_call

SPEC = AttentionSpec(block_query=16, block_key=8)

WRONG_TYPES = [
    ({"q": [1.0]}, "q: expected a tensor, got list"),
    ({"k": None}, "k: expected a tensor, got NoneType"),
    ({"v": np.zeros((1, 40, 2, 16))}, "v: expected a tensor, got ndarray"),
    ({"spec": {}}, "spec: expected an AttentionSpec, got dict"),
    ({"permutation": list(range(40))}, "permutation: expected a tensor or None, got list"),
    ({"scale": "x"}, "scale='x': expected a number or None"),
    ({"scale": [0.5]}, r"scale=\[0.5\]: expected a number or None"),
    ({"scale": True}, "scale=True: expected a number or None"),
    ({"causal": "no"}, "causal='no': expected True or False"),
    ({"causal": 0}, "causal=0: expected True or False"),
    ({"lists": (1, 2)}, "lists: expected BlockLists or None, got tuple"),
    ({"out": "x"}, "out: expected a tensor or None, got str"),
]


@pytest.mark.parametrize(("given", "message"), WRONG_TYPES, ids=[message for _, message in WRONG_TYPES])
def test_a_wrong_type_is_told(given, message):
    x = torch.zeros(1, 40, 2, 16)
    with pytest.raises(TypeError, match=message):
        psa_attention(**{"q": x, "k": x, "v": x, "spec": SPEC} | given)


@pytest.mark.parametrize(("given", "message"), WRONG_TYPES[3:10], ids=[message for _, message in WRONG_TYPES[3:10]])
def test_it_is_told_where_calls_are_remembered(given, message):
    x = torch.empty(1, 40, 2, 16, device="meta")
    with pytest.raises(TypeError, match=message):
        make_call(**{"q": x, "k": x, "v": x, "spec": SPEC} | given)


def test_a_selection_without_values_and_spec():
    x = torch.zeros(1, 40, 2, 16)
    with pytest.raises(TypeError, match="spec: expected an AttentionSpec, got str"):
        select_blocks(x, x, "psa-3")


@pytest.mark.parametrize(
    "scale", [float("nan"), float("inf"), -float("inf"), 10**400], ids=["nan", "inf", "-inf", "large"]
)
def test_a_scale_that_is_not_finite(scale):
    x = torch.zeros(1, 40, 2, 16)
    with pytest.raises(ValueError, match=f"scale={scale}: expected a finite number or None"):
        psa_attention(x, x, x, SPEC, scale=scale)


@pytest.mark.parametrize("scale", [1, np.float32(0.5), np.int64(2), Fraction(1, 2), -0.5, 0.0])
def test_any_other_number_is_a_scale(scale):
    x = torch.randn(1, 40, 2, 16)
    assert torch.equal(psa_attention(x, x, x, SPEC, scale=scale), psa_attention(x, x, x, SPEC, scale=float(scale)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int32], ids=str)
def test_a_dtype_without_arithmetic(dtype):
    x = torch.zeros(1, 40, 2, 16).to(dtype)
    with pytest.raises(ValueError, match=f"floating point tensor .* of 16, 32 or 64 bits, got {dtype}"):
        psa_attention(x, x, x, SPEC)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", ["count", "mass", "budget"])
def test_lists_of_other_pooling_factors(rule, causal):
    spec = replace(SPEC, rule=rule, density=0.3 if rule == "budget" else None)
    q, k, v = torch.randn(3, 1, 64, 2, 16).unbind()
    out, lists = psa_attention(q, k, v, spec, causal=causal, return_lists=True)
    both = BlockLists.of_all_heads([lists[:, :1], lists[:, 1:]])
    assert torch.equal(psa_attention(q, k, v, spec, causal=causal, lists=both), out)
    for given in (lists, both):
        with pytest.raises(ValueError, match=r"lists: made for levels=\(1, 2, 4\), .* \(2, 4, 8\)"):
            psa_attention(q, k, v, replace(spec, levels=(2, 4, 8)), causal=causal, lists=given)


def test_lists_that_do_not_know_their_pooling_factors():
    q, k, v = torch.randn(3, 1, 64, 2, 16).unbind()
    lists = select_blocks(q, k, SPEC)
    unknown = BlockLists.from_levels(lists.levels(), 3)
    assert torch.equal(psa_attention(q, k, v, SPEC, lists=unknown), psa_attention(q, k, v, SPEC, lists=lists))

"""Autocast around the operator changes nothing, for the operator chooses the precision of each of its steps."""

from __future__ import annotations

import pytest
import torch

from psa_kernels import AttentionSpec, psa_attention, select_blocks
from psa_kernels.full import full_attention
from psa_kernels.lists import BlockLists

SPEC = {"block_query": 16, "block_key": 8}
CALLS = [
    ({}, {}),
    ({}, {"text_before": 3, "text_after": 2}),
    ({}, {"text_before": 100}),
    ({"rule": "budget", "density": 0.3}, {}),
    ({"precision": "int8_qk"}, {}),
    ({}, {"causal": True, "text_before": 3}),
    ({"rule": "budget", "density": 0.3}, {"causal": True}),
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("fields", "settings"), CALLS, ids=str)
def test_on_a_cpu(fields, settings):
    q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
    spec = AttentionSpec(**SPEC, **fields)
    expected, lists = psa_attention(q, k, v, spec, return_lists=True, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(psa_attention(q, k, v, spec, **settings), expected)
        if lists.ids.numel():
            assert torch.equal(select_blocks(q, k, spec, v=v, **settings).levels(), lists.levels())
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.usefixtures("one_thread")
def test_full_attention_on_a_cpu():
    q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
    kept: dict[object, BlockLists] = {}
    expected = full_attention(q, k, v, "reference", kept)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(full_attention(q, k, v, "reference", kept), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize(("fields", "settings"), CALLS, ids=str)
def test_on_a_gpu(fields, settings, implementation):
    q, k, v = torch.randn(3, 1, 400, 2, 64, device="cuda", dtype=torch.float16).unbind()
    spec = AttentionSpec(block_query=64, block_key=16, **fields)
    expected = psa_attention(q, k, v, spec, implementation=implementation, **settings)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(psa_attention(q, k, v, spec, implementation=implementation, **settings), expected)

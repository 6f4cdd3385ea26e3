"""The portable kernels in float32 on a GPU, whose tiles are others than those of 16 bits."""

from __future__ import annotations

import pytest
import torch

from psa_kernels import AttentionSpec, psa_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("block_query", [64, 128])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128, 256])
def test_agrees_with_the_reference_given_its_lists(head_dim, block_query):
    generator = torch.Generator("cuda").manual_seed(head_dim)
    q, k, v = (torch.randn(2, 1500, 3, head_dim, device="cuda", generator=generator) for _ in range(3))
    spec = AttentionSpec(block_query=block_query, thresholds=(0.2, 0.4, 0.6))
    permutation = torch.randperm(1400, device="cuda", generator=generator)
    for order in (None, permutation):
        settings = {"text_after": 100, "permutation": order}
        out, lists = psa_attention(q, k, v, spec, implementation="triton", return_lists=True, **settings)
        expected = psa_attention(q, k, v, spec, implementation="reference", lists=lists, **settings)
        assert float((out - expected).norm() / expected.norm()) < 1e-5

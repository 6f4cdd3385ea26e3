"""`psa_attention` writes its output where the caller wants it."""

from __future__ import annotations

import pytest
import torch

from psa_kernels import AttentionSpec, psa_attention

SPEC = AttentionSpec(block_query=16, block_key=16)


def inputs(tokens=100):
    return torch.randn(3, 2, tokens, 3, 8).unbind()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text_before": 5, "text_after": 7},
        {"text_after": 100},  # nothing but text
        {"causal": True},
        {"causal": True, "text_before": 100},
    ],
    ids=str,
)
@pytest.mark.parametrize("lists", [False, True])
def test_it_is_what_would_be_returned(settings, lists):
    q, k, v = inputs()
    expected, chosen = psa_attention(q, k, v, SPEC, return_lists=True, **settings)
    out = torch.full_like(q, float("nan"))
    found, stats = psa_attention(q, k, v, SPEC, out=out, lists=chosen if lists else None, return_stats=True, **settings)
    assert found is out and torch.equal(out, expected) and stats.density is not None


BAD = {
    "shape": (lambda q: q.new_empty(2, 100, 3, 9), r"out.shape=.*9.*: expected that of q"),
    "dtype": (lambda q: q.new_empty(q.shape, dtype=torch.float64), r"out.dtype=torch.float64: expected that of q"),
    "strides": (lambda q: torch.empty(2, 3, 100, 8).transpose(1, 2), r"strides .*: expected it to be contiguous"),
    "address": (lambda q: torch.empty(q.numel() + 1)[1:].view(q.shape), r"address 0x.*: expected a multiple of 16"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_it_cannot_be_written_to_is_refused(kind):
    q, k, v = inputs()
    make, message = BAD[kind]
    out = make(q)
    with pytest.raises(ValueError, match=message):
        psa_attention(q, k, v, SPEC, out=out)

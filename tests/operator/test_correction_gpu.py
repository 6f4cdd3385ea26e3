"""The kernels of corrections on a GPU, against their reference on the same tensors."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import poison_free_memory, surrounded

from psa_kernels.correction import choose, reference
from psa_kernels.correction.reference import SAMPLES, sample_tokens

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [32, 40, 64, 72, 80, 96, 128, 256, 33])
def test_as_the_reference(head_dim, dtype):
    shape = (2, 1037, 3, head_dim)
    (_, dense), (_, sparse) = (surrounded(shape, dtype, headwise) for headwise in (True, False))
    dense[:, 0, 0] = sparse[:, 0, 0]
    dense[0, 5, 1, head_dim - 1], sparse[1, 6, 2, 0] = torch.nan, torch.inf
    poison_free_memory()
    found, expected = choose.left_out(dense, sparse), reference.left_out(dense, sparse)
    assert torch.equal(found.units, expected.units) and torch.equal(found.pairs, expected.pairs)
    tokens = sample_tokens(shape[1], dense.device)
    assert found.of_tokens(tokens).shape == (2, SAMPLES, 3, head_dim)
    weights = torch.rand(2, 3, device="cuda")
    for headwise in (True, False):
        wide, later = surrounded(shape, dtype, headwise)
        out, gaps = later.clone(), wide.isnan().sum()
        reference.add_correction(out, found, weights)
        choose.add_correction(later, found, weights)
        # A product and a sum are one operation there, rounded once.
        torch.testing.assert_close(later, out, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert wide.isnan().sum() == gaps and later.isfinite().all()


def test_rows_whose_bytes_lie_beyond_32_bits():
    """One layer of a long video: 2^31 channels and more, so that offsets take 64 bits."""
    tokens, heads, head_dim = 2**31 // (16 * 128) + 5, 16, 128
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    dense = torch.zeros(1, tokens, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    sparse = torch.zeros_like(dense)
    dense[0, -3:] = torch.randn(3, heads, head_dim, device="cuda")
    found = choose.left_out(dense, sparse)
    expected = reference.left_out(dense[:, -3:], sparse[:, -3:])
    assert torch.equal(found.pairs[:, -3:], expected.pairs) and torch.equal(found.units[:, -3:], expected.units)
    assert not found.units[:, :-3].any()
    choose.add_correction(sparse, found, torch.ones(1, heads, device="cuda"))
    out = torch.zeros_like(dense[:, -3:])
    reference.add_correction(out, expected, torch.ones(1, heads, device="cuda"))
    assert torch.equal(sparse[:, -3:], out) and not sparse[:, :-3].any()

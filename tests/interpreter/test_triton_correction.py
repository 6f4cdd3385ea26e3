"""The kernels of corrections, in Triton's interpreter, against their reference."""

from __future__ import annotations

import pytest
import torch

from psa_kernels.correction import reference, triton


def outputs(shape, dtype, number):
    """Fresh random outputs, every one with other strides: views into wider tensors, heads first or tokens first."""
    batch, tokens, heads, head_dim = shape
    made = []
    for index in range(number):
        if index % 2:
            made.append(torch.randn(batch, heads, tokens, head_dim + 3)[..., :head_dim].transpose(1, 2).to(dtype))
        else:
            made.append(torch.randn(batch, tokens + 2, heads, head_dim, dtype=dtype)[:, 1:-1])
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 70, 2, 64), (2, 33, 3, 24), (1, 1, 1, 80)], ids=str)
def test_as_the_reference(shape, dtype):
    dense, sparse, later = outputs(shape, dtype, 3)
    dense[:, 0, 0] = sparse[:, 0, 0]
    if shape[1] > 5:
        dense[0, 5, -1, 3] = torch.nan
    expected, found = reference.left_out(dense, sparse), triton.left_out(dense, sparse)
    torch.testing.assert_close(found.units, expected.units)
    # A quotient in the middle of two integers may be rounded to either.
    assert (found.integers.int() - expected.integers.int()).abs().max() <= 1
    assert (found.integers != expected.integers).float().mean() < 0.01
    weights = torch.rand(shape[0], shape[2])
    out = later.clone()
    reference.add_correction(out, found, weights)
    triton.add_correction(later, found, weights)
    torch.testing.assert_close(later, out, rtol=2**-10 if dtype == torch.float16 else 1e-6, atol=1e-6)

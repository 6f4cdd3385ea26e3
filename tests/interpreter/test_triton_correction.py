"""The kernels of corrections, in Triton's interpreter, against their reference."""

from __future__ import annotations

import pytest
import torch

from psa_kernels.correction import reference, triton


def outputs(shape, dtype, number):
    """Random outputs, views into wider tensors of NaN, every one with other strides: heads first or tokens first."""
    batch, tokens, heads, head_dim = shape
    made = []
    for index in range(number):
        if index % 2:
            out = torch.full((batch, heads, tokens, head_dim + 3), torch.nan, dtype=dtype)
            out = out[..., :head_dim].transpose(1, 2)
        else:
            out = torch.full((batch, tokens + 2, heads, head_dim), torch.nan, dtype=dtype)[:, 1:-1]
        made.append(out.copy_(torch.randn(shape)))
    return made


def around(view):
    """Whether each number of the memory that a view lies in belongs to the view, and all these numbers."""
    everything = torch.as_strided(view, (view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)
    inside = torch.zeros(everything.shape, dtype=torch.bool)
    torch.as_strided(inside, view.shape, view.stride(), view.storage_offset()).fill_(True)
    return everything, inside


SHAPES = [
    *((1, 33, 2, head_dim) for head_dim in (32, 40, 64, 72, 80, 96, 128, 256)),
    *((2, 7, 3, head_dim) for head_dim in (1, 2, 33, 65)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 70, 2, 64), (2, 33, 3, 24), (1, 1, 1, 80), *SHAPES], ids=str)
def test_as_the_reference_bit_for_bit(shape, dtype, poisoned_memory):
    dense, sparse, first, second = outputs(shape, dtype, 4)
    dense[:, 0, 0] = sparse[:, 0, 0]
    if shape[1] > 5:
        dense[0, 5, -1, shape[3] // 2], sparse[0, 4, -1, 0] = torch.nan, torch.inf
    expected, found = reference.left_out(dense, sparse), triton.left_out(dense, sparse)
    assert torch.equal(found.units, expected.units) and torch.equal(found.pairs, expected.pairs)
    assert found.head_dim == shape[3] and found.pairs.dtype == torch.uint8
    weights = torch.rand(shape[0], shape[2])
    for later in (first, second):
        out = later.clone()
        reference.add_correction(out, found, weights)
        triton.add_correction(later, found, weights)
        assert torch.equal(later, out) and later.isfinite().all()
        everything, inside = around(later)
        assert everything[~inside].isnan().all()


@pytest.mark.parametrize(
    "row", [[8.0, -8.0, 3.5, 0.5, 7.5], [-8.0, 7.5, 7.6, -0.5, -2.5], [1.3e-44, 0.0, 0.0, -1.3e-44, 2e-45]], ids=str
)
def test_extremes_as_the_reference(row):
    dense = torch.tensor(row)[None, None, None]
    expected, found = (module.left_out(dense, torch.zeros_like(dense)) for module in (reference, triton))
    assert torch.equal(found.units, expected.units) and torch.equal(found.pairs, expected.pairs)

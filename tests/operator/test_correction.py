"""Corrections: what sparse attention left out, kept in 8 bits, and how much of it still holds."""

from __future__ import annotations

import pytest
import torch

from psa_kernels.correction.reference import (
    SAMPLES,
    add_correction,
    correction_weights,
    left_out,
    sample_tokens,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_correction_makes_one_output_the_other(dtype):
    dense, sparse = torch.randn(2, 2, 50, 3, 40).to(dtype)
    out = sparse.clone()
    add_correction(out, left_out(dense, sparse), torch.ones(2, 3))
    # Half of a 127th of the largest difference of a row, and the dtype's own rounding.
    largest = (dense.double() - sparse.double()).abs().amax(-1, keepdim=True)
    rounding = dense.abs().double() * torch.finfo(dtype).eps + largest / 127 / 2 * 1.02
    assert ((out.double() - dense.double()).abs() <= rounding).all()


def test_rows_that_are_not_finite_have_no_correction():
    dense, sparse = torch.randn(2, 1, 6, 2, 8)
    dense[0, 1, 0, 3], sparse[0, 2, 1, 0], dense[0, 4, 1, 7] = torch.nan, torch.inf, -torch.inf
    found = left_out(dense, sparse)
    for token, head in ((1, 0), (2, 1), (4, 1)):
        assert found.units[0, token, head] == 0 and not found.integers[0, token, head].any()
    assert (found.units > 0).sum() == 12 - 3


def test_weights_are_the_least_squares_of_a_sample():
    corrections = torch.randn(2, 20, 3, 16)
    sparse, noise = torch.randn(2, 2, 20, 3, 16)
    share = torch.tensor([[0.9, 0.5, 0.1], [0.3, -0.4, 1.7]])
    missing = share[:, None, :, None] * corrections
    # What the correction does not explain is at right angles to it, and changes nothing.
    noise -= corrections * ((noise * corrections).sum((1, 3)) / corrections.square().sum((1, 3)))[:, None, :, None]
    found = correction_weights(sparse + missing + noise, sparse, corrections)
    torch.testing.assert_close(found, share.clamp(0, 1), rtol=0, atol=1e-5)


def test_nothing_to_add_and_what_is_not_finite_weigh_nothing():
    corrections = torch.randn(1, 20, 4, 16)
    corrections[:, :, 0] = 0
    dense, sparse = torch.randn(2, 1, 20, 4, 16)
    dense[0, 3, 1, 2], sparse[0, 7, 2, 5] = torch.nan, torch.inf
    assert correction_weights(dense, sparse, corrections)[0, :3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("tokens", [1, 5, SAMPLES, SAMPLES + 1, 5000])
def test_samples_are_spread_over_all_tokens(tokens):
    found = sample_tokens(tokens, torch.device("cpu"))
    assert found.dtype == torch.int64 and len(found) == min(tokens, SAMPLES) == len(found.unique())
    assert found[0] == 0 and found[-1] >= tokens - 1 - tokens // len(found) and found.max() < tokens


def test_kernels_are_prepared_for_each_dtype(monkeypatch):
    triton_correction = pytest.importorskip("psa_kernels.correction.triton")
    prepared = []

    class Launch:
        def __init__(self, *_, **__):
            prepared.append(self)

        def __call__(self, *_):
            pass

    monkeypatch.setattr(triton_correction, "Launch", Launch)
    triton_correction._plan.cache_clear()
    x = torch.randn(1, 37, 2, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        correction = triton_correction.left_out(x.to(dtype), x.to(dtype))
        triton_correction.add_correction(x.to(dtype), correction, torch.ones(1, 2))
    triton_correction._plan.cache_clear()
    assert len(prepared) == 6

"""Corrections: what sparse attention left out, kept in 4 bits, and how much of it still holds."""

from __future__ import annotations

import pytest
import torch

from psa_kernels.correction.reference import (
    SAMPLES,
    add_correction,
    correction_weights,
    kept_bytes,
    left_out,
    sample_tokens,
)


def whole(dense, sparse):
    """What a correction holds, every token of it."""
    return left_out(dense, sparse).of_tokens(torch.arange(dense.shape[1]))


def peaks(difference):
    """The largest difference of each row; of two that are equally large, as is frequent in 16 bits, the positive."""
    largest = difference.abs().amax(-1, keepdim=True)
    return torch.where((difference == largest).any(-1, keepdim=True), largest, -largest)


@pytest.mark.parametrize("head_dim", [1, 2, 7, 40, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_correction_makes_one_output_the_other(dtype, head_dim):
    dense, sparse = torch.randn(2, 2, 50, 3, head_dim).to(dtype)
    out = sparse.clone()
    add_correction(out, left_out(dense, sparse), torch.ones(2, 3))
    difference = dense.double() - sparse.double()
    peak = peaks(difference)
    unit = peak.abs() / 8
    # Half a unit; but what is opposed to the largest difference and nearly as large has only 7 units.
    clipped = difference * peak.sign() < -7.5 * unit
    off = torch.where(clipped, 1.0, 0.5) * unit * 1.001
    rounding = (dense.abs().double() + off) * torch.finfo(dtype).eps
    assert ((out.double() - dense.double()).abs() <= off + rounding).all()


@pytest.mark.parametrize("head_dim", [3, 64])
def test_numbers_are_the_nearest_of_sixteen(head_dim):
    """Of so many multiples of the unit, in float64, the largest difference being -8 units."""
    dense, sparse = torch.randn(2, 2, 30, 2, head_dim)
    difference = (dense - sparse).double()
    peak = peaks(difference)
    levels = peak[..., None] / -8 * torch.arange(-8, 8)
    off = (difference[..., None] - levels).abs().amin(-1)
    found = whole(dense, sparse).double()
    torch.testing.assert_close((found - difference).abs(), off, rtol=0, atol=1e-6)
    # The largest of each row is kept exactly.
    assert torch.equal(found.gather(-1, (difference == peak).int().argmax(-1, keepdim=True)), peak)


def test_a_normal_row_errs_a_ninth_of_its_norm():
    difference = torch.randn(1, 4000, 1, 128)
    error = (whole(difference, torch.zeros_like(difference)) - difference).norm() / difference.norm()
    assert 0.1 < error < 0.107


@pytest.mark.parametrize("head_dim", [1, 5, 6])
def test_where_the_channels_stand(head_dim):
    """Byte j holds channel j below and channel j + ceil(D / 2) above; 8 is an integer of 0, and fills what is left."""
    half = (head_dim + 1) // 2
    for channel in range(head_dim):
        dense = torch.zeros(1, 1, 1, head_dim)
        dense[..., channel] = 2.0
        found = left_out(dense, torch.zeros_like(dense))
        expected = [0x88] * half
        expected[channel % half] = 0x80 if channel < half else 0x08
        assert found.pairs.tolist() == [[[expected]]] and found.units.item() == -0.25


def test_a_correction_takes_the_bytes_that_are_counted():
    for shape in ((2, 5, 3, 128), (1, 7, 2, 33), (1, 1, 1, 1)):
        found = left_out(*torch.randn(2, *shape))
        assert found.pairs.nbytes + found.units.nbytes == kept_bytes(shape)
    # As the docs say: layers and guidance branches of Wan2.1-14B at 720p, and of 1.3B at 480p.
    assert round(40 * 2 * kept_bytes((1, 75600, 40, 128)) / 2**30, 1) == 15.3
    assert round(30 * 2 * kept_bytes((1, 32760, 12, 128)) / 2**30, 1) == 1.5


def test_equal_rows_have_none_and_stay_as_they_are():
    dense, sparse = torch.randn(2, 1, 6, 2, 9)
    dense[:, ::2] = sparse[:, ::2]
    found, out = left_out(dense, sparse), sparse.clone()
    add_correction(out, found, torch.ones(1, 2))
    assert torch.equal(out[:, ::2], sparse[:, ::2]) and not torch.equal(out[:, 1::2], sparse[:, 1::2])
    assert not found.units[:, ::2].any() and (found.pairs[:, ::2] == 0x88).all()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([8.0, -8.0, 3.6, 0.4], [8.0, -7.0, 4.0, 0.0]),  # of two that are equally large the positive one
        ([-8.0, 7.4, 7.6, -0.5], [-8.0, 7.0, 7.0, 0.0]),
        ([0.0, 16.0, -15.0, 5.0], [0.0, 16.0, -14.0, 4.0]),  # ties to even
        ([3e38, -2.9e38, 0.0, 1e38], [3e38, -2.625e38, 0.0, 1.125e38]),
        ([2e-45, 0.0, 0.0, 1e-45], [0.0, 0.0, 0.0, 0.0]),  # an eighth of it is none
        ([1.3e-44, 0.0, 0.0, -1.3e-44], None),
    ],
)
def test_extremes(row, expected):
    dense = torch.tensor(row)[None, None, None]
    found = whole(dense, torch.zeros_like(dense)).flatten()
    if expected is None:  # the smallest number of all is the unit
        assert (found.double() - dense.double().flatten()).abs().max() <= 2 * 2.0**-149
    else:
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("head_dim", [8, 7])
def test_rows_that_are_not_finite_have_no_correction(head_dim):
    dense, sparse = torch.randn(2, 1, 6, 2, head_dim)
    dense[0, 1, 0, 3], sparse[0, 2, 1, 0], dense[0, 4, 1, -1] = torch.nan, torch.inf, -torch.inf
    dense[0, 5, 0, 0], sparse[0, 5, 0, 0] = 3e38, -3e38
    found, out = left_out(dense, sparse), torch.zeros_like(sparse)
    add_correction(out, found, torch.ones(1, 2))
    for token, head in ((1, 0), (2, 1), (4, 1), (5, 0)):
        assert found.units[0, token, head] == 0 and (found.pairs[0, token, head] == 0x88).all()
        assert not out[0, token, head].any()
    assert (found.units != 0).sum() == 12 - 4


def test_some_tokens_of_it_are_what_is_added():
    dense, sparse = torch.randn(2, 2, 20, 3, 11)
    found, out = left_out(dense, sparse), torch.zeros(2, 20, 3, 11)
    add_correction(out, found, torch.ones(2, 3))
    tokens = torch.tensor([3, 0, 17])
    assert torch.equal(found.of_tokens(tokens), out[:, tokens])


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

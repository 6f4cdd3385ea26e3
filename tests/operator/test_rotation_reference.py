"""The rotation by positions, as PyTorch computes it: complex numbers turned, and tokens left as they are."""

from __future__ import annotations

import pytest
import torch

from psa_kernels.backends import triton as portable
from psa_kernels.rotation import choose
from psa_kernels.rotation.reference import rotate


def complex_products(x, angles):
    """In float64: a pair of channels is a complex number."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 11, 3, 16), (2, 11, 24)], ids=str)
@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 0), (0, 4), (2, 1), (11, 0)])
def test_pairs_are_complex_numbers_that_are_turned(shape, dtype, before, after):
    _, tokens, *heads, channels = shape
    angles = torch.rand(tokens - before - after, *(1 for _ in heads), channels // 2, dtype=torch.float64) * 6
    x = torch.randn(*reversed(shape)).to(dtype).permute(*reversed(range(len(shape))))
    copy = x.clone()
    for rotated in (rotate, choose.rotate):
        found = rotated(x, angles.cos().float(), angles.sin().float(), before, after)
        assert found.dtype == dtype and found.is_contiguous() and torch.equal(x, copy)
        end = tokens - after
        expected = complex_products(x[:, before:end], angles)
        # Of float32 half a dozen roundings, and that to the dtype.
        rounding = expected.abs() * torch.finfo(dtype).eps / 2 + 2e-6
        assert ((found[:, before:end].double() - expected).abs() <= rounding).all()
        assert torch.equal(found[:, :before], x[:, :before]) and torch.equal(found[:, end:], x[:, end:])


@pytest.mark.parametrize(
    "shape", [(5, 1, 4), (1, 5, 1, 4), (2, 5, 1, 4), (1, 5, 3, 4), (2, 1, 3, 4), (3, 4), (4,)], ids=str
)
def test_tables_broadcast(shape):
    x, angles = torch.randn(2, 5, 3, 8), torch.rand(shape, dtype=torch.float64) * 6
    found = rotate(x, angles.cos().float(), angles.sin().float())
    expected = complex_products(x, angles.expand(2, 5, 3, 4))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_a_kernel_runs_on_gpus_that_triton_serves(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(portable, "has_triton", lambda: True)
    cases = ((None, (8, 0), True), (None, (7, 5), False), (None, (12, 0), True), ("7", (9, 4), True))
    for hip, capability, serves in cases:
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(portable, "capability", lambda device, found=capability: found)
        assert portable.has_kernels(gpu) == serves and not portable.has_kernels(cpu)
    monkeypatch.setattr(portable, "has_triton", lambda: False)
    assert not portable.has_kernels(gpu)


def test_channels_apart_from_each_other_are_left_to_the_reference(monkeypatch):
    """The kernel would read other channels; on a CPU it would not run at all."""
    monkeypatch.setattr(choose, "has_kernels", lambda device: True)
    x, angles = torch.randn(2, 4, 16, 3).transpose(2, 3), torch.rand(4, 1, 8, dtype=torch.float64)
    assert x.stride(-1) != 1
    found = choose.rotate(x, angles.cos().float(), angles.sin().float())
    torch.testing.assert_close(found.double(), complex_products(x, angles), rtol=0, atol=2e-6)

"""The kernel of the rotation, in Triton's interpreter, against its reference: bit for bit."""

from __future__ import annotations

import pytest
import torch

from psa_kernels.rotation import reference, triton

pytestmark = pytest.mark.usefixtures("poisoned_memory")
HEAD_DIMS = 2, 16, 32, 40, 64, 72, 80, 96, 128, 256


def surrounded(shape, dtype, first=0, headwise=False):
    """Random numbers, a view into wider memory of NaN; `headwise` has the tokens of a head side by side."""
    order = (0, 2, 1, 3) if headwise else range(len(shape))
    wide = torch.full([shape[i] + (i > 0) * 3 for i in order], torch.nan, dtype=dtype)
    view = wide[tuple(slice(first, first + shape[i]) if i else slice(None) for i in order)]
    return (view.transpose(1, 2) if headwise else view).copy_(torch.randn(shape))


def tables_of(shape, step=1, first=0):
    """Cosines and sines of random angles, views of which each number stands between NaN, or after `first` of them."""
    angles = torch.rand(shape) * 6
    made = []
    for table in (angles.cos(), angles.sin()):
        wide = torch.full((table.numel() * step + first,), torch.nan)
        made.append(wide[first::step].view(shape).copy_(table))
    return made


def check(x, cos, sin, before=0, after=0):
    found, copy = triton.rotate(x, cos, sin, before, after), x.clone()
    expected = reference.rotate(x, cos, sin, before, after)
    assert found.dtype == x.dtype and found.is_contiguous() and torch.equal(x, copy)
    assert found.isfinite().all() and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_as_the_reference(head_dim, step, dtype):
    """Of 37 tokens the last tile of a program is not full, whatever the head dim."""
    for headwise in (False, True):
        x = surrounded((2, 37, 3, head_dim), dtype, 1, headwise)
        check(x, *tables_of((1, 37, 1, head_dim // 2), step))


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("width", [130, 2048, 4096])
def test_before_heads_are_split(width, step):
    """Tables of one or all batch items, of the whole width."""
    for batch in (1, 2):
        check(surrounded((2, 3, width), torch.float16), *tables_of((batch, 3, width // 2), step))


@pytest.mark.parametrize("heads", [1, 2, 8, 9, 17])
@pytest.mark.parametrize(
    "of",
    [("token",), ("token", "head"), ("batch", "token"), ("batch", "token", "head"), ("head",), ("batch",)],
    ids="-".join,
)
def test_tables_broadcast(of, heads):
    """Whatever they are the same for, and however the heads fill the programs."""
    shape = [size if name in of else 1 for name, size in (("batch", 2), ("token", 35), ("head", heads))]
    check(surrounded((2, 35, heads, 64), torch.float32), *tables_of((*shape, 32), 2))


def test_tables_of_fewer_dimensions_and_different_ones():
    x = surrounded((2, 5, 3, 16), torch.float32)
    (cos, _), (_, sin) = tables_of((5, 1, 8)), tables_of((2, 1, 3, 8), 2)
    check(x, cos, sin)
    check(x, sin, cos)
    check(x, cos[0, 0], sin)
    check(x, sin[:, :, 2:], cos[..., :1])


@pytest.mark.parametrize(("before", "after"), [(5, 0), (0, 7), (1, 1), (33, 34), (30, 37), (37, 0), (67, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tokens_without_positions_stay_bit_for_bit(before, after, dtype):
    """What is no number and what is infinite, too."""
    tokens = 67 - before - after
    x = surrounded((1, 67, 2, 40), dtype, headwise=True)
    cos, sin = tables_of((tokens, 1, 20))
    check(x, cos, sin, before, after)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    still = [*range(before), *range(67 - after, 67)]
    for token, value in zip(still, (torch.nan, torch.inf, -torch.inf, -0.0), strict=False):
        x[:, token] = value
    x.view(bits)[:, still[:1], 0, :2] += 77  # of what is no number, another pattern
    found = triton.rotate(x, cos, sin, before, after)
    assert torch.equal(found.view(bits)[:, still], x.view(bits)[:, still])
    assert found[:, before : 67 - after].isfinite().all()


@pytest.mark.parametrize("first", range(1, 6))
def test_tables_start_anywhere(first):
    """Between multiples of 16 bytes, at which launches start: what lies before them is not read."""
    x = surrounded((1, 9, 2, 32), torch.float32)
    for step in (1, 2):
        cos, sin = tables_of((9, 1, 16), step, first)
        assert cos.data_ptr() % 16 == 4 * first % 16
        check(x, cos, tables_of((9, 1, 16), step)[1])
        check(x, cos, sin)


def test_offsets_beyond_32_bits(monkeypatch):
    """Each of the strides, told to be one, makes the kernel count in 64 bits; the numbers are the same."""
    monkeypatch.setattr(triton, "are_wide", lambda *tensors: True)
    triton._plan.cache_clear()
    check(surrounded((2, 37, 9, 40), torch.float32, headwise=True), *tables_of((2, 30, 9, 20), 2), 3, 4)
    triton._plan.cache_clear()


@pytest.mark.parametrize(
    "shape", [(5, 1, 8), (1, 4, 1, 8), (6, 2, 8), (6, 1, 16), (3, 6, 1, 8), (1, 2, 6, 1, 8)], ids=str
)
def test_tables_that_do_not_broadcast_are_named(shape):
    x, (cos, sin) = torch.randn(2, 6, 3, 16), tables_of((6, 1, 8))
    for pair in ((torch.ones(shape), sin), (cos, torch.ones(shape))):
        with pytest.raises(ValueError, match=r"a table of the shape .* does not broadcast against .*\(2, 6, 3, 8\)"):
            triton.rotate(x, *pair)

"""The kernel of the rotation on a GPU, against its reference on the same tensors."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import poison_free_memory, surrounded

from psa_kernels.rotation import choose, reference

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def tables_of(*shape):
    """Cosines and sines that hold each angle twice, of which every other number is taken: the first, or the second."""
    angles = torch.rand(shape, device="cuda").mul(6).repeat_interleave(2, -1)
    return angles.cos()[..., ::2], angles.sin()[..., 1::2]


def check(x, cos, sin, before=0, after=0):
    copy = x.clone()
    poison_free_memory()
    found, expected = choose.rotate(x, cos, sin, before, after), reference.rotate(x, cos, sin, before, after)
    assert torch.equal(x, copy) and found.isfinite().all() and found.is_contiguous()
    # A product and a sum are one operation there, rounded once.
    torch.testing.assert_close(found, expected, rtol=torch.finfo(x.dtype).eps, atol=2e-6)
    # What differs is what lies in the middle of two numbers of few bits.
    assert x.dtype == torch.float32 or (found != expected).float().mean() < 1e-3
    end = x.shape[1] - after
    assert torch.equal(found[:, :before], x[:, :before]) and torch.equal(found[:, end:], x[:, end:])


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        *((head_dim, torch.bfloat16) for head_dim in (32, 40, 64, 72, 80, 96, 128, 256, 34)),
        *((head_dim, torch.float16) for head_dim in (40, 64, 128)),
        *((head_dim, torch.float32) for head_dim in (72, 128)),
    ],
    ids=str,
)
def test_as_the_reference(head_dim, dtype):
    """One launch after the other of the same shapes, and others: what is compiled for one does not serve another."""
    for headwise in (False, True, False):
        _, x = surrounded((2, 1037, 9, head_dim), dtype, headwise, first=3)
        for shape in ((1037, 1, head_dim // 2), (2, 1037, 9, head_dim // 2), (2, 1, 1, head_dim // 2)):
            cos, sin = tables_of(*shape)
            check(x, cos, sin)
            check(x, cos.contiguous(), sin.contiguous())
        check(x, *tables_of(1000, 1, head_dim // 2), before=30, after=7)


@DTYPES
@pytest.mark.parametrize("width", [130, 2048, 4096, 8192])
def test_before_heads_are_split(width, dtype):
    for batch in (1, 2):
        x = torch.randn(2, 333, width, device="cuda").to(dtype)
        check(x, *tables_of(batch, 333, width // 2))
        check(x[:, ::2], *tables_of(batch, 167, width // 2))


def test_tokens_without_positions_stay_bit_for_bit():
    """What is no number and what is infinite, too."""
    x = torch.randn(1, 300, 2, 128, device="cuda", dtype=torch.bfloat16)
    x[:, 0], x[:, 299], x[:, 1] = torch.nan, torch.inf, -0.0
    x.view(torch.int16)[:, 0] += 5
    found = choose.rotate(x, *tables_of(200, 1, 64), before=60, after=40)
    assert torch.equal(found.view(torch.int16)[:, :60], x.view(torch.int16)[:, :60])
    assert torch.equal(found.view(torch.int16)[:, -40:], x.view(torch.int16)[:, -40:])
    assert found[:, 60:-40].isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_a_device_that_is_not_the_current_one():
    x, tables = torch.randn(1, 300, 3, 128, device="cuda", dtype=torch.bfloat16), tables_of(300, 1, 64)
    assert torch.cuda.current_device() == 0
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        found = choose.rotate(x.to(device), *(table.to(device) for table in tables))
        assert found.device == torch.device(device)
        assert torch.equal(found.to(x.device), choose.rotate(x, *tables))


def test_a_captured_graph_rotates_what_it_is_given():
    """By the tables as they are at its replay."""
    x, (cos, sin) = torch.randn(1, 500, 3, 128, device="cuda", dtype=torch.bfloat16), tables_of(500, 1, 64)
    choose.rotate(x, cos, sin)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = choose.rotate(x, cos, sin)
    x.copy_(torch.randn_like(x))
    for table, other in zip((cos, sin), tables_of(500, 1, 64), strict=True):
        table.copy_(other)
    graph.replay()
    assert torch.equal(found, choose.rotate(x, cos, sin))


@pytest.mark.parametrize("headwise", [False, True])
def test_rows_whose_bytes_lie_beyond_32_bits(headwise):
    """One layer of a long video: more than 2^31 channels, so that offsets take 64 bits."""
    tokens, heads, head_dim = 2**31 // (16 * 128) + 5, 16, 128
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    lengths = (heads, tokens) if headwise else (tokens, heads)
    x = torch.zeros(1, *lengths, head_dim, dtype=torch.bfloat16, device="cuda")
    x = x.transpose(1, 2) if headwise else x
    x[0, -3:] = torch.randn(3, heads, head_dim, device="cuda")
    cos, sin = tables_of(tokens, 1, head_dim // 2)
    found = choose.rotate(x, cos, sin)
    expected = reference.rotate(x[:, -3:], cos[-3:], sin[-3:])
    torch.testing.assert_close(found[:, -3:], expected, rtol=2**-7, atol=2e-6)
    assert expected.any() and not found[:, :-3].any()

"""Rotary positions, by complex products or a kernel: as written out, and never from tables that are not those given."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from psa_diffusers import apply_psa
from psa_diffusers.families import rotation
from psa_diffusers.families.parts import ReadOnce, rotate_halves, rotate_pairs
from psa_diffusers.families.rotation import Rotation, rotate_tokens
from psa_kernels.backends import triton as portable
from psa_kernels.rotation import choose, reference
from psa_testing.tiny_families import CASES, preset

pytestmark = pytest.mark.usefixtures("one_thread")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_A_GPU = (pytest.mark.gpu, needs_gpu)


def tables_of(*shape, dtype=torch.float32):
    angles = torch.rand(*shape, dtype=torch.float64).mul(6).repeat_interleave(2, dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def halved(cos, sin):
    return cos[..., ::2], sin[..., ::2]


def expected(x, tables, before=0, after=0):
    """In float64, by the formula."""
    cos, sin = (table.double() for table in halved(*tables))
    end = x.shape[1] - after
    even, odd = x[:, before:end].double().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([x[:, :before].double(), turned, x[:, end:].double()], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (5, 0), (0, 7)])
@pytest.mark.parametrize("gradients", [False, True])
def test_it_equals_the_formula_and_leaves_its_input(dtype, table_dtype, before, after, gradients):
    """Where a complex product does not suit, too."""
    rotated_by, tables = Rotation(halved), tables_of(1, 29, 1, 8, dtype=table_dtype)
    wide = torch.randn(2, 29 + before + after, 3, 32).to(dtype)
    queries, keys = wide[..., :16], wide.transpose(1, 2).contiguous().transpose(1, 2)[..., 16:]  # strided, both
    copies = queries.clone(), keys.clone()
    with torch.set_grad_enabled(gradients):
        rotated = [rotated_by(tables, x, before, after) for x in (queries, keys)]
    coarse = torch.bfloat16 in (dtype, table_dtype)
    for x, copy, result in zip((queries, keys), copies, rotated, strict=True):
        assert torch.equal(x, copy) and result.dtype == dtype and result.shape == x.shape
        formula = expected(x, tables, before, after)
        torch.testing.assert_close(result.double(), formula, rtol=0, atol=0.1 if coarse else 5e-3)
        unmoved = [*range(before), *range(x.shape[1] - after, x.shape[1])]
        assert torch.equal(result[:, unmoved], x[:, unmoved])
        if dtype == table_dtype == torch.float32:
            torch.testing.assert_close(result.double(), formula, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("gradients", [False, True])
def test_halves_turn_against_each_other(dtype, gradients, device):
    """For strided tensors, and tables that broadcast."""
    x = torch.randn(2, 3, 29, 16, device=device).to(dtype).transpose(1, 2)
    cos, sin = (table.to(device) for table in halved(*tables_of(1, 29, 1, 8)))
    before = x.clone()
    with torch.set_grad_enabled(gradients):
        found = rotate_halves(x, cos, sin)
    first, second = x.double().chunk(2, -1)
    formula = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    assert torch.equal(x, before) and found.dtype == dtype
    tolerance = 4e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), formula, rtol=0, atol=tolerance)


def test_gradients_flow_where_they_are_enabled():
    x = torch.randn(1, 4, 1, 4, requires_grad=True)
    rotated = rotate_tokens(tables_of(4, 2), x)
    rotated.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())  # a rotation keeps lengths


@torch.no_grad()
def test_other_tables_are_seen():
    """Another pair of tables, one of them new, one written to, and none any more at their address."""
    x, (cos, sin) = torch.randn(1, 6, 2, 8), tables_of(6, 4)

    def check():
        found = rotate_tokens((cos, sin), x)
        torch.testing.assert_close(found, rotate_pairs(x, cos[:, None, ::2], sin[:, None, ::2]), rtol=0, atol=1e-6)
        return found

    first = check()
    assert torch.equal(check(), first)
    sin = -sin
    assert not torch.equal(check(), first)
    cos.copy_(tables_of(6, 4)[0])
    check()
    for _ in range(5):
        del cos, sin
        cos, sin = tables_of(6, 4)  # perhaps where the others were
        check()
    x, (cos, sin) = torch.randn(2, 9, 2, 8), tables_of(9, 4)
    check()


def test_tables_of_inference_mode_are_read_each_time():
    """They do not count writes."""
    x = torch.randn(1, 6, 2, 8)
    with torch.inference_mode():
        cos, sin = tables_of(6, 4)
        first = rotate_tokens((cos, sin), x)
        sin.neg_()
        second = rotate_tokens((cos, sin), x)
    torch.testing.assert_close(second, rotate_pairs(x, cos[:, None, ::2], sin[:, None, ::2]), rtol=0, atol=1e-6)
    assert not torch.equal(first, second)


@torch.no_grad()
def test_tables_are_made_once_and_go_with_the_model_s():
    made = []
    read = ReadOnce(lambda cos, sin: made.append(torch.complex(cos, sin)) or made[-1])
    tables = tables_of(6, 4)
    assert read(*tables) is read(*tables) and len(made) == 1
    gone = weakref.ref(made.pop())
    assert gone() is not None
    del tables
    gc.collect()
    assert gone() is None


def no_complex_number(*_):
    raise AssertionError("a complex table where the kernel takes the model's own")


@torch.no_grad()
def test_the_kernel_takes_the_model_s_own_tables(monkeypatch):
    """In place: neither a complex table nor a copy is made of them."""
    taken, tables = [], tables_of(1, 29, 1, 8)

    def rotate(x, cos, sin, before, after):
        taken.extend((cos, sin))
        return reference.rotate(x, cos, sin, before, after)

    monkeypatch.setattr(portable, "has_kernels", lambda device: True)
    monkeypatch.setattr(choose, "rotate", rotate)
    monkeypatch.setattr(torch, "complex", no_complex_number)
    queries, keys = torch.randn(2, 2, 36, 3, 16)
    rotated_by = Rotation(halved)
    found = [rotated_by(tables, x, before=3, after=4) for x in (queries, keys)]
    for x, result in zip((queries, keys), found, strict=True):
        torch.testing.assert_close(result.double(), expected(x, tables, 3, 4), rtol=0, atol=1e-5)
    assert [table.data_ptr() for table in taken] == [table.data_ptr() for table in tables] * 2


@torch.no_grad()
@pytest.mark.parametrize("why", ["gradients", "dtype", "tables"])
def test_the_kernel_has_no_part_in_what_it_does_not_compute(why, monkeypatch):
    monkeypatch.setattr(portable, "has_kernels", lambda device: True)
    monkeypatch.setattr(choose, "rotate", lambda *_: pytest.fail("the kernel was asked"))
    wide = torch.float64
    tables = tables_of(1, 29, 1, 8, dtype=wide if why == "tables" else torch.float32)
    x = torch.randn(2, 29, 3, 16, dtype=wide if why == "dtype" else torch.float32)
    with torch.set_grad_enabled(why == "gradients"):
        found = Rotation(halved)(tables, x)
    torch.testing.assert_close(found.double(), expected(x, tables), rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_a_pipeline_gives_what_it_gives_written_out(name, device, monkeypatch):
    """In float32: in bfloat16, roundings change as much as positions do in these pipelines."""
    # What the kernels take of tiny models. Every block is pooled by 2, for rounding may change choices.
    changes = {"block": {"query": 64, "key": 16}, "thresholds": [0.0, 1.0, 1.0], "float32_on_gpu": "sparse"}
    served = preset(dense_steps=0.0, **changes)
    asked = []

    def latents():
        pipe = CASES[name].make().to(device)
        with apply_psa(pipe, served, strict=True):
            return CASES[name].run(pipe, num_inference_steps=2).double().cpu()

    def difference(found, wanted):
        return ((found - wanted).norm() / wanted.norm()).item()

    with monkeypatch.context() as patch:
        patch.setattr(choose, "rotate", lambda x, *rest, rotate=choose.rotate: asked.append(x) or rotate(x, *rest))
        found = latents()
    assert bool(asked) == portable.has_kernels(torch.device(device))
    with monkeypatch.context() as patch:
        patch.setattr(rotation, "_suits", lambda *_: False)
        written_out = latents()
    monkeypatch.setattr(Rotation, "__call__", lambda self, tables, x, *_: x)
    without_positions = latents()
    assert difference(found, written_out) < 0.1 * difference(without_positions, written_out)
    assert difference(found, written_out) < 0.001


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (64, 0), (0, 77)])
def test_on_a_gpu_it_equals_the_formula(dtype, before, after):
    tables = tuple(table.cuda() for table in tables_of(1, 1000, 1, 64))
    x = torch.randn(2, 1000 + before + after, 3, 128, device="cuda").to(dtype)
    found = Rotation(halved)(tables, x, before=before, after=after)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(found.double(), expected(x, tables, before, after), rtol=0, atol=tolerance)


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_nothing_is_kept_or_copied(dtype):
    """Beyond the rotated tensors themselves no memory is asked for, where Triton serves the GPU."""
    if not portable.has_kernels(torch.device("cuda")):
        pytest.skip("needs a GPU that Triton serves")
    tables = tuple(table.cuda() for table in tables_of(1, 4096, 1, 64))
    queries, keys = torch.randn(2, 1, 4096, 8, 128, device="cuda").to(dtype)
    rotated_by = Rotation(halved)
    gc.collect()  # what earlier tests left may not go while memory is counted
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    found = [rotated_by(tables, x) for x in (queries, keys)]
    after = torch.cuda.memory_stats()
    rotated = sum(x.nbytes for x in found)
    assert after["requested_bytes.all.peak"] == after["requested_bytes.all.current"] == before + rotated


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_the_same_tables_serve_two_devices_in_turn():
    tables, x = tables_of(1, 50, 1, 64), torch.randn(1, 50, 2, 128)
    rotated_by = Rotation(halved)
    for device in ("cuda", "cpu", "cuda"):
        found = rotated_by(tables, x.to(device))
        assert found.device.type == device
        torch.testing.assert_close(found.cpu().double(), expected(x, tables), rtol=0, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_a_captured_graph_reads_no_table_that_is_gone():
    """What an eager call made of the same tables is dropped as soon as others come."""
    tables = tuple(table.cuda() for table in tables_of(1, 500, 1, 64))
    rotated_by, x, graph = Rotation(halved), torch.randn(1, 500, 2, 128, device="cuda"), torch.cuda.CUDAGraph()
    rotated_by(tables, x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = rotated_by(tables, x)
    other = tuple(table.cuda() for table in tables_of(1, 500, 1, 64))
    eager = rotated_by(other, x)
    torch.testing.assert_close(eager.double(), expected(x, other), rtol=0, atol=1e-5)
    junk = [torch.full((1, 500, 1, 64), torch.nan, device="cuda") for _ in range(64)]
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(found.double(), expected(x, tables), rtol=0, atol=1e-5)
    again = rotated_by(tables, x)
    torch.testing.assert_close(again, found, rtol=0, atol=1e-6)
    assert len(junk) == 64

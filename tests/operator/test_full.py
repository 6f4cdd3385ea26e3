"""Dense attention by the operator: equal to PyTorch's, with lists that are made once a shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu_checks import relative_error

from psa_kernels import psa_attention
from psa_kernels.backends.served import pays_and_serves
from psa_kernels.full import FULL, full_attention, full_lists, serves_full

is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def inputs(queries, keys=None, batch=1, heads=2, head_dim=16):
    return [torch.randn(batch, n, heads, head_dim) for n in (queries, keys or queries, keys or queries)]


def dense(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (131, 131), (70, 257), (3, 1)])
def test_it_is_dense_attention(queries, keys):
    q, k, v = (x.double() for x in inputs(queries, keys, batch=2, heads=3))
    torch.testing.assert_close(full_attention(q, k, v, "reference"), dense(q, k, v))


def test_lists_are_those_that_the_importance_stage_would_make_and_are_kept():
    q, k, v = inputs(200)
    kept = {}
    first = full_attention(q, k, v, "reference", kept)
    (lists,) = kept.values()
    _, chosen = psa_attention(q, k, v, FULL, implementation="reference", return_lists=True)
    assert torch.equal(lists.ids, chosen.ids) and torch.equal(lists.counts, chosen.counts)
    assert lists.ids.dtype == chosen.ids.dtype and lists.counts.dtype == chosen.counts.dtype
    assert torch.equal(full_attention(q, k, v, "reference", kept), first)
    assert next(iter(kept.values())) is lists and len(kept) == 1
    full_attention(q[:, :100], k, v, "reference", kept)
    assert len(kept) == 2


def test_lists_of_many_blocks_are_wide_enough():
    assert full_lists((1, 1, 1, 32_768), torch.device("cpu")).ids.dtype == torch.int32


def test_who_should_compute_it_is_told(on_a_gpu):
    assert pays_and_serves(on_a_gpu(FULL), "triton") == (True, None)
    served, why = pays_and_serves(on_a_gpu(FULL, capability=(8, 0)), "hopper")
    assert not served and "compute capability (9, 0)" in why
    x = torch.empty(1, 64, 1, 64)
    assert serves_full(x, x, x, "reference") == (True, None)
    served, why = serves_full(x, x, x, "hopper")
    assert not served and why


def test_a_call_too_small_for_the_kernel_is_passed_on_without_a_word(on_a_gpu, monkeypatch):
    from psa_kernels.backends.hopper import Hopper

    monkeypatch.setattr(Hopper, "why_not", lambda self, call: None)
    assert pays_and_serves(on_a_gpu(FULL), "hopper") == (True, None)
    assert pays_and_serves(on_a_gpu(FULL, tokens=1024), "hopper") == (False, None)


@pytest.mark.gpu
@pytest.mark.skipif(not is_hopper, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_for_hopper_errs_no_more_than_pytorch(dtype, head_dim):
    q, k, v = (x.to("cuda", dtype) for x in inputs(5000, heads=4, head_dim=head_dim))
    exact = dense(*(x.double() for x in (q, k, v)))
    assert relative_error(full_attention(q, k, v, "hopper"), exact) <= 1.5 * relative_error(dense(q, k, v), exact)

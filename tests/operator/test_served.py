"""Which calls on a GPU no kernel serves, so that `auto` would end at the reference."""

from __future__ import annotations

import pytest
import torch

from psa_kernels import AttentionSpec
from psa_kernels.backends.choose import choose
from psa_kernels.backends.served import why_no_kernel
from psa_kernels.call import make_call


@pytest.mark.parametrize("precision", ["native", "int8_qk"])
@pytest.mark.parametrize(
    ("spec", "call", "reason"),
    [
        ({}, {}, None),
        ({}, {"capability": (8, 6)}, None),
        ({}, {"dtype": torch.float32}, None),
        ({"rest": "mean"}, {}, None),
        ({}, {"head_dim": 512}, "head_dim=512: expected at most 256"),
        ({}, {"dtype": torch.float64}, "dtype torch.float64"),
        ({"block_query": 32}, {}, "block_query=32: expected 64 or 128"),
        ({}, {"capability": (7, 5)}, "compute capability (7, 5): expected (8, 0) or newer"),
    ],
)
def test_it_is_told_why_the_reference_would_be_taken(spec, call, reason, precision, on_a_gpu):
    pytest.importorskip("triton")
    asked = on_a_gpu(AttentionSpec(precision=precision, **spec), **call)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("psa_kernels.backends.choose._warn_once", lambda message: None)
        assert (choose(asked).name == "reference") == (reason is not None)
    why = why_no_kernel(asked)
    assert why is None if reason is None else reason in why


def test_the_reference_is_what_a_cpu_has():
    q = torch.randn(1, 64, 1, 16)
    assert why_no_kernel(make_call(q, q, q, AttentionSpec())) is None


def test_other_devices_have_no_kernel():
    q = torch.empty(1, 64, 1, 16, device="meta")
    assert why_no_kernel(make_call(q, q, q, AttentionSpec())) == "device meta: expected cuda"

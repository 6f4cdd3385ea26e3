"""The portable kernel in 8-bit integers against its definition in float64, on GPUs from compute capability 8.0 on."""

from __future__ import annotations

import math
from dataclasses import replace

import not_finite
import pytest
import torch
from gpu_checks import poison_free_memory, relative_error
from outliers import rotary, with_outliers
from test_int8_gpu import random_case, tensors

from psa_kernels import AttentionSpec, psa_attention, select_blocks

pytest.importorskip("triton")
can_run = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not can_run, reason="needs a GPU of compute capability 8.0 or newer")]


def int8(spec):
    return replace(spec, precision="int8_qk")


def attend(q, k, v, spec, **options):
    """The portable kernel, also on Hopper."""
    poison_free_memory()
    found, stats = psa_attention(q, k, v, int8(spec), implementation="triton", return_stats=True, **options)
    assert stats.implementation == "triton-int8"
    return found


@pytest.mark.parametrize("seed", range(30))
def test_it_is_the_definition_to_rounding(seed):
    q, k, v, spec, lists, options = random_case(seed)
    options["lists"] = lists
    wide = [x.double() for x in (q, k, v)]
    exact, defined = (
        psa_attention(*wide, which, implementation="reference", **options) for which in (spec, int8(spec))
    )
    found, again = (attend(q, k, v, spec, **options) for _ in range(2))
    assert torch.equal(found, again)
    portable = psa_attention(q, k, v, spec, implementation="triton", **options)
    allowed = 1.4 * relative_error(portable, exact) + 0.02 * relative_error(defined, exact)
    assert relative_error(found, defined) <= allowed


def error_of(q, k, v, spec):
    """Relative error against exact attention, and the one that rounding and the definition allow."""
    lists = select_blocks(q, k, spec)
    wide = [x.double() for x in (q, k, v)]
    exact, defined = (
        psa_attention(*wide, which, lists=lists, implementation="reference") for which in (spec, int8(spec))
    )
    portable = psa_attention(q, k, v, spec, lists=lists, implementation="triton")
    allowed = math.hypot(1.4 * relative_error(portable, exact), 1.25 * relative_error(defined, exact))
    return relative_error(attend(q, k, v, spec, lists=lists), exact), allowed


@pytest.mark.parametrize("factor", [20, 50])
@pytest.mark.parametrize("kind", ["alone", "shared", "undone"])
@pytest.mark.parametrize("channels", [[3], [8, 9, 10, 11]], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_channels_of_keys_that_are_much_larger_cost_no_accuracy(head_dim, channels, kind, factor):
    spec = AttentionSpec(thresholds=(0.3, 0.5, 0.9))
    q, k, v = (
        torch.randn(1, 2048 + 8, 1, head_dim, device="cuda", dtype=torch.float64).unfold(1, 9, 1).mean(-1).mul(4)
        for _ in range(3)
    )
    k = k + 2 * torch.randn(head_dim, device="cuda")
    plain, outliers = (
        error_of(*(x.bfloat16() for x in (*map(rotary, turned), v)), spec)
        for turned in ((q, k), with_outliers(q, k, kind, channels, factor))
    )
    assert plain[0] <= plain[1] and outliers[0] <= 1.5 * plain[0]


@pytest.mark.parametrize("value", ["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_not_finite_is_neither_hidden_nor_spread(which, value):
    spec = int8(not_finite.make_spec("count"))
    options = {"dtype": torch.bfloat16, "device": "cuda", "head_dim": 128}
    not_finite.check_output(which, value, spec, "triton", 3e-2, **options)


def test_logits_that_grow_along_the_keys_do_not_run_over():
    q, k, v = tensors((1, 2, 128), (4096, 4096))
    direction = torch.ones(128, device="cuda") / 128**0.5
    q = (0.1 * q + 4 * direction).to(q.dtype)
    k[:, 3000:] = (k[:, 3000:] + direction * 200 * 128**0.5 / 4).to(k.dtype)
    found, allowed = error_of(q, k, v, AttentionSpec(thresholds=(0.3, 0.5, 0.9)))
    assert found <= allowed

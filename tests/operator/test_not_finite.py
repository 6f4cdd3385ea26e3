"""Inputs with NaN, infinite and overflowing values, through the reference and, on a GPU, through every kernel."""

from __future__ import annotations

from dataclasses import replace

import not_finite
import pytest
import torch

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")]

WAYS = [
    pytest.param("reference", {"dtype": torch.float32}, 1e-4, id="reference"),
    pytest.param("reference", {"dtype": torch.float16}, 2e-3, id="reference-half"),
    pytest.param("reference", {"dtype": torch.bfloat16}, 2e-2, id="reference-bfloat16"),
    pytest.param(
        "triton", {"dtype": torch.bfloat16, "device": "cuda", "head_dim": 64}, 3e-2, id="triton", marks=on_gpu
    ),
    pytest.param(
        "triton", {"dtype": torch.float16, "device": "cuda", "head_dim": 128}, 4e-3, id="triton-half", marks=on_gpu
    ),
    pytest.param(
        "hopper", {"dtype": torch.bfloat16, "device": "cuda", "head_dim": 128}, 3e-2, id="hopper", marks=on_hopper
    ),
    pytest.param(
        "hopper", {"dtype": torch.float16, "device": "cuda", "head_dim": 64}, 4e-3, id="hopper-half", marks=on_hopper
    ),
]


def spec_for(implementation, name):
    spec = not_finite.make_spec(name)
    # The kernel for Hopper has larger query blocks and does not serve rest="mean".
    return replace(spec, block_query=128, rest="skip") if implementation == "hopper" else spec


@pytest.mark.parametrize(("implementation", "options", "tolerance"), WAYS)
@pytest.mark.parametrize("name", not_finite.SPECS)
@pytest.mark.parametrize(("which", "value"), not_finite.CASES)
def test_nothing_is_hidden_or_invented(implementation, options, tolerance, name, which, value):
    not_finite.check_output(which, value, spec_for(implementation, name), implementation, tolerance, **options)


@pytest.mark.parametrize(("implementation", "options", "tolerance"), WAYS)
@pytest.mark.parametrize("name", not_finite.SPECS)
@pytest.mark.parametrize(("which", "value"), not_finite.CASES)
def test_lists_stay_in_bounds(implementation, options, tolerance, name, which, value):
    not_finite.check_lists(which, value, spec_for(implementation, name), implementation, **options)

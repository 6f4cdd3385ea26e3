"""Calls for tensors on a GPU that is not the current one."""

from __future__ import annotations

import inspect

import pytest
import torch

from psa_kernels import AttentionSpec, psa_attention, select_blocks
from psa_kernels.correction import choose
from psa_kernels.devices import entry_point
from psa_kernels.rotation.choose import rotate


class OnSecond(torch.Tensor):
    """A tensor that says that it is on the second GPU."""

    is_cuda = True
    device = torch.device("cuda:1")


@pytest.fixture
def made_current(monkeypatch):
    """The devices that are made current, of which the first is at the beginning."""
    seen = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            seen.append(self.device)

        def __exit__(self, *_):
            seen.append("back")

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return seen


def test_their_device_is_current_meanwhile(made_current):
    function = entry_point(lambda x, y=0: (list(made_current), y))
    second = torch.zeros(2).as_subclass(OnSecond)
    assert function(second, y=3) == ([torch.device("cuda:1")], 3)
    assert made_current == [torch.device("cuda:1"), "back"]
    assert function(x=second)[0][-1] == torch.device("cuda:1")


def test_nothing_is_done_for_others(made_current):
    function = entry_point(lambda x: x)
    first = torch.zeros(2).as_subclass(type("OnFirst", (OnSecond,), {"device": torch.device("cuda:0")}))
    for argument in (first, torch.zeros(2), "no tensor", None):
        assert function(argument) is argument
    with pytest.raises(TypeError):
        function()
    assert made_current == []


def test_whatever_launches_kernels_is_called_so():
    for function in (psa_attention, select_blocks, choose.left_out, choose.add_correction, rotate):
        assert inspect.unwrap(function) is not function
    q = torch.randn(1, 256, 1, 16)
    with pytest.raises(ValueError):
        psa_attention(q=q, k=q, v=q[0], spec=AttentionSpec())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_call_on_the_second_gpu():
    generator = torch.Generator("cuda:1").manual_seed(0)
    q, k, v = (torch.randn(1, 3000, 4, 128, device="cuda:1", generator=generator).to(torch.bfloat16) for _ in range(3))
    assert torch.cuda.current_device() == 0
    for rule in ("count", "budget"):
        spec = AttentionSpec(rule=rule, density=0.3 if rule == "budget" else None)
        found = psa_attention(q, k, v, spec)
        for _ in range(2):  # a launch that is prepared, too
            assert torch.equal(psa_attention(q, k, v, spec), found)
        with torch.cuda.device(1):
            assert torch.equal(psa_attention(q, k, v, spec), found)
    correction = choose.left_out(q, k)
    out = k.clone()
    choose.add_correction(out, correction, torch.ones(1, 4, device="cuda:1"))
    # What 4 bits round of normal numbers is 1.06 % of their power.
    assert float((out.float() - q.float()).norm() / (k.float() - q.float()).norm()) < 0.11

"""Which implementation a call gets, and why."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
import torch

import psa_kernels
from psa_kernels import AttentionSpec, psa_attention, select_blocks
from psa_kernels.backends import triton
from psa_kernels.backends.choose import SlowerKernelWarning, choose
from psa_kernels.backends.hopper import Hopper
from psa_kernels.backends.triton import Triton
from psa_kernels.call import make_call


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_the_reference_serves_a_cpu(implementation):
    q = torch.randn(1, 40, 1, 8)
    spec = AttentionSpec(block_query=16, block_key=8)
    _, stats = psa_attention(q, q, q, spec, implementation=implementation, return_stats=True)
    assert stats.implementation == "reference"


@pytest.mark.parametrize("function", [psa_attention, select_blocks])
def test_an_implementation_that_cannot_serve_the_call_is_refused(function):
    q = torch.randn(1, 40, 1, 8)
    with pytest.raises(ValueError, match="implementation='triton': "):
        function(*[q] * (3 if function is psa_attention else 2), AttentionSpec(), implementation="triton")


OBSTACLES = [
    ({"dtype": torch.float64}, {}, "dtype torch.float64"),
    ({"dtype": torch.bfloat16}, {}, "dtype torch.bfloat16"),
    ({"head_dim": 257}, {}, "head_dim=257: expected at most 256"),
    ({}, {"block_query": 32}, "block_query=32: expected 64 or 128"),
    ({}, {"block_key": 48, "levels": (1, 3), "thresholds": (0.1, 0.5)}, "block_key=48"),
    ({}, {}, None),
]


@pytest.mark.parametrize(("tensor", "fields", "reason"), OBSTACLES, ids=str)
def test_reasons_name_the_thing_its_value_and_what_is_allowed(tensor, fields, reason, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.zeros(1, 40, 1, tensor.get("head_dim", 8), dtype=tensor.get("dtype", torch.float32))
    found = Triton().why_not(make_call(q, q, q, AttentionSpec(**fields)))
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize("wanted", ["auto", "hopper"])
@pytest.mark.parametrize("precision", ["native", "int8_qk"])
def test_a_choice_keeps_no_tensor_alive(precision, wanted, monkeypatch):
    monkeypatch.setattr(Triton, "devices", ("cpu",))
    monkeypatch.setattr(Triton, "why_not", lambda *_: None)
    monkeypatch.setattr(Hopper, "why_not", lambda *_: "it is a test")
    monkeypatch.setattr(Hopper, "pays", lambda *_: True)
    q = torch.randn(1, 64, 1, 16)
    spec = AttentionSpec(precision=precision)
    gc.disable()
    try:
        with suppress(ValueError):
            choose(make_call(q, q, q, spec), wanted)
        alive = weakref.ref(q)
        del q
        assert alive() is None
    finally:
        gc.enable()


def test_a_kernel_that_pays_is_missed_and_one_that_does_not_is_not(on_a_gpu, recwarn):
    pytest.importorskip("triton")
    wide = on_a_gpu(AttentionSpec(block_query=64))
    with pytest.warns(SlowerKernelWarning, match="the hopper kernel cannot be used, .*: block_query=64: expected 128"):
        assert choose(wide, "auto").name == "triton"
    with pytest.raises(RuntimeError, match="strict: the hopper kernel cannot be used: block_query=64"):
        choose(wide, "auto", True)
    recwarn.clear()
    assert choose(on_a_gpu(AttentionSpec(block_query=64), tokens=1024), "auto", True).name == "triton"
    assert choose(on_a_gpu(AttentionSpec(block_query=64), (8, 0)), "auto", True).name == "triton"
    assert not recwarn.list
    with pytest.warns(SlowerKernelWarning, match="the triton kernel cannot be used, .*: head_dim=512"):
        assert choose(on_a_gpu(AttentionSpec(), (8, 0), head_dim=512), "auto").name == "reference"


def test_what_never_changes_is_asked_once(on_a_gpu, monkeypatch):
    pytest.importorskip("triton")
    call = on_a_gpu(AttentionSpec())
    assert choose(call).name == "hopper"

    def asked(*_):
        raise AssertionError("asked again")

    for module, name in ((torch.cuda, "get_device_capability"), (triton, "find_spec"), (metadata, "version")):
        monkeypatch.setattr(module, name, asked)
    assert choose(call).name == "hopper"


def test_stages_know_nothing_of_the_kernels_of_others():
    """What they hand on are the classes named here and in `lists`; only a reference may build on others."""
    package = Path(psa_kernels.__file__).parent
    stages = {"pyramid", "importance", "allocation", "quantise", "sparse"}
    files = [file for stage in stages for file in (package / stage).rglob("*.py") if file.name != "reference.py"]
    assert len(files) > 20
    for file in files:
        stage = file.relative_to(package).parts[0]
        for other, module in re.findall(r"from psa_kernels\.(\w+)\.(\w+) import", file.read_text()):
            assert other in {stage} or (other, module) in {("pyramid", "pooled"), ("quantise", "integers")}, file


def test_the_reference_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from psa_kernels import AttentionSpec, psa_attention
q = torch.randn(1, 40, 1, 8)
psa_attention(q, q, q, AttentionSpec())
try:
    psa_attention(q, q, q, AttentionSpec(), implementation="triton")
except ValueError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("accepted")
"""
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"], check=True)

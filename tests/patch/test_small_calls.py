"""`min_tokens: auto`: calls with too little work to gain on a GPU are dense and say so; here a CPU is taken for one."""

from __future__ import annotations

import pytest
import torch

import psa_presets.model
from psa_diffusers import apply_psa
from psa_diffusers.calibrate.measure import Measurement
from psa_diffusers.families import AttentionCall
from psa_diffusers.patch import served_calls
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_diffusers.patch.served_calls import ServedCalls
from psa_diffusers.patch.sites import Layer
from psa_presets import Preset
from psa_testing.tiny_families import SPARSE, WAN

pytestmark = pytest.mark.usefixtures("one_thread")
AUTO = SPARSE.replace(min_tokens="auto")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Takes the CPU for a GPU, of which a kernel serves all calls, and lets short sequences pass."""
    monkeypatch.setattr(served_calls, "is_gpu", lambda device: True)
    monkeypatch.setattr(served_calls, "why_no_kernel", lambda call: None)
    monkeypatch.setattr(psa_presets.model, "AUTO_MIN_TOKENS", 0)


def in_bfloat16():
    pipe = WAN.make()
    pipe.transformer.to(torch.bfloat16)
    return pipe


def test_they_are_dense_with_one_warning(on_a_gpu):
    pipe = in_bfloat16()
    stock = WAN.run(pipe)
    with apply_psa(pipe, AUTO) as psa:
        with pytest.warns(
            PSAFallbackWarning, match=r"attention of 192 tokens x 2 heads x 32 .* min_tokens: 0"
        ) as caught:
            assert torch.equal(WAN.run(pipe), stock)
            WAN.run(pipe)
        stats = psa.stats()
    assert len([entry for entry in caught if entry.category is PSAFallbackWarning]) == 1
    (reason,) = stats.fallbacks
    assert "slower below 27" in reason and stats.density_run == 1 and stats.dense_at == [0, 1, 2, 3]
    with apply_psa(pipe, AUTO, strict=True), pytest.raises(PSAFallbackError, match="192 tokens x 2 heads"):
        WAN.run(pipe)


def test_an_integer_overrides_it(on_a_gpu):
    pipe = in_bfloat16()
    with apply_psa(pipe, AUTO.replace(min_tokens=192), strict=True) as psa:
        WAN.run(pipe)
    assert psa.stats().density_sparse < 0.5 and psa.stats().fallbacks == {}


def test_with_enough_work_they_are_sparse(on_a_gpu, monkeypatch):
    for bound in ("LOSES_BELOW", "GAINS_FROM"):
        monkeypatch.setattr(served_calls, bound, 4 * 192**2 * 2 * 32)
    pipe = in_bfloat16()
    with apply_psa(pipe, AUTO, strict=True) as psa:
        WAN.run(pipe)
    assert psa.stats().density_sparse < 0.5


def test_between_the_two_they_are_sparse_with_one_warning(on_a_gpu, monkeypatch):
    monkeypatch.setattr(served_calls, "LOSES_BELOW", 0)
    pipe = in_bfloat16()
    with (
        apply_psa(pipe, AUTO, strict=True) as psa,
        pytest.warns(PSAFallbackWarning, match="192 tokens x 2 heads x 32 is .* may be slower than dense") as caught,
    ):
        WAN.run(pipe)
        WAN.run(pipe)
    assert len([entry for entry in caught if entry.category is PSAFallbackWarning]) == 1
    assert psa.stats().density_sparse < 0.5 and psa.stats().fallbacks == {}


def test_in_float32_another_key_decides(on_a_gpu):
    pipe = WAN.make()
    with apply_psa(pipe, AUTO.replace(float32_on_gpu="sparse"), strict=True) as psa:
        WAN.run(pipe)
    assert psa.stats().density_sparse < 0.5


def test_on_a_cpu_the_number_of_tokens_decides(monkeypatch):
    pipe = in_bfloat16()
    with apply_psa(pipe, AUTO, strict=True), pytest.raises(PSAFallbackError, match=r"192 tokens .* min_tokens=2048"):
        WAN.run(pipe)
    monkeypatch.setattr(psa_presets.model, "AUTO_MIN_TOKENS", 192)
    with apply_psa(pipe, AUTO, strict=True) as psa:
        WAN.run(pipe)
    assert psa.stats().density_sparse < 0.5


def test_what_is_measured_on_such_calls_is_refused_at_once(on_a_gpu):
    pipe = in_bfloat16()
    with Measurement(pipe, {"base": AUTO}, {2}), pytest.raises(PSAFallbackError, match="192 tokens x 2 heads"):
        WAN.run(pipe)


@pytest.mark.parametrize(
    ("shape", "dense", "remark"),
    [
        ((1, 2048, 24, 64), True, False),
        ((1, 5184, 4, 64), False, True),  # the demo
        ((1, 4096, 8, 128), False, True),
        ((1, 5184, 24, 64), False, False),
        ((1, 5184, 12, 64), False, True),  # the same, shared by two GPUs
        ((2, 5184, 12, 64), False, False),
        ((1, 6930, 32, 64), False, False),  # LTX-Video
    ],
)
def test_the_work_of_the_call_decides(on_a_gpu, shape, dense, remark):
    preset = Preset()
    (spec,) = preset.layer_specs(1)
    layer = Layer("blocks.0", preset, spec, preset.layer_orders(1)[0], False)
    q = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    remarks = []
    reason = ServedCalls(remarks.append).why_not(layer, AttentionCall(q[:, :, 0]), (q, q, q), shape[1])
    assert ((reason is not None), bool(remarks)) == (dense, remark)
    for said in (*remarks, *([reason] if dense else [])):
        assert f"{shape[1]:,} tokens x {shape[2]} heads x {shape[3]}" in said

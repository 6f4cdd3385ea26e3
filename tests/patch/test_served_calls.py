"""Sparse calls that would be slower than dense on a GPU are dense and say so; here a CPU is taken for one."""

from __future__ import annotations

import pytest
import torch

from psa_diffusers import apply_psa
from psa_diffusers.patch import served_calls
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_diffusers.patch.served_calls import FLOAT32
from psa_testing.tiny_families import CASES, SPARSE, WAN, assert_equal_to_rounding

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Takes the CPU for a GPU, of which a kernel serves all calls; counts how often that is asked."""
    asked = []
    monkeypatch.setattr(served_calls, "is_gpu", lambda device: True)
    monkeypatch.setattr(served_calls, "why_no_kernel", lambda call: asked.append(call))
    return asked


@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "cogvideox-5b"])
def test_float32_is_dense_there_with_one_warning(name, on_a_gpu):
    case, pipe = CASES[name], CASES[name].make()
    stock = case.run(pipe)
    with apply_psa(pipe, SPARSE) as psa:
        with pytest.warns(PSAFallbackWarning, match="in float32 can be slower than dense") as caught:
            assert torch.equal(case.run(pipe), stock)
            case.run(pipe)
        stats = psa.stats()
    assert len([entry for entry in caught if entry.category is PSAFallbackWarning]) == 1
    assert set(stats.fallbacks) == {FLOAT32} and stats.density_run == 1 and stats.dense_at == [0, 1, 2, 3]
    with apply_psa(pipe, SPARSE, strict=True), pytest.raises(PSAFallbackError, match="float32_on_gpu: sparse"):
        case.run(pipe)


def test_a_preset_can_ask_for_it_sparse(on_a_gpu):
    pipe = WAN.make()
    with apply_psa(pipe, SPARSE.replace(float32_on_gpu="sparse"), strict=True) as psa:
        WAN.run(pipe)
        stats = psa.stats()
    assert stats.density_sparse < 0.5 and stats.fallbacks == {}
    assert len(on_a_gpu) == 1  # once for each kind of call


def test_on_a_cpu_float32_is_sparse():
    pipe = WAN.make()
    with apply_psa(pipe, SPARSE, strict=True) as psa:
        WAN.run(pipe)
    assert psa.stats().density_sparse < 0.5


def test_what_no_kernel_serves_is_dense_and_says_why(on_a_gpu, monkeypatch):
    monkeypatch.setattr(served_calls, "why_no_kernel", lambda call: "head_dim=512: expected at most 256")
    chosen = SPARSE.replace(float32_on_gpu="sparse")
    pipe = WAN.make()
    stock = WAN.run(pipe)
    with apply_psa(pipe, chosen) as psa, pytest.warns(PSAFallbackWarning, match="no kernel serves .* head_dim=512"):
        assert torch.equal(WAN.run(pipe), stock)
        assert list(psa.stats().fallbacks) == ["no kernel serves such calls: head_dim=512: expected at most 256"]


def test_the_kernel_is_asked_about_the_video(on_a_gpu):
    case, pipe = CASES["cogvideox-5b"], CASES["cogvideox-5b"].make()
    with apply_psa(pipe, SPARSE.replace(float32_on_gpu="sparse"), strict=True) as psa:
        case.run(pipe)
        assert psa.stats().density_sparse < 0.5
    assert {call.layout.video_keys for call in on_a_gpu} == {3 * 8 * 8}


def test_what_was_refused_is_not_projected_again(on_a_gpu):
    pipe = WAN.make()
    projected = []
    hook = pipe.transformer.blocks[0].attn1.to_q.register_forward_hook(lambda *_: projected.append(1))
    with apply_psa(pipe, SPARSE), pytest.warns(PSAFallbackWarning):
        WAN.run(pipe)
    patched = len(projected)
    WAN.run(pipe)
    hook.remove()
    assert patched == (len(projected) - patched) + 1


def test_compiled_blocks(on_a_gpu):
    pipe = WAN.make()
    stock = WAN.run(pipe, num_inference_steps=2)
    torch._dynamo.reset()
    for block in pipe.transformer.blocks:
        block.compile(fullgraph=True, backend="eager")
    with apply_psa(pipe, SPARSE) as psa, pytest.warns(PSAFallbackWarning, match="in float32 can be slower than dense"):
        assert_equal_to_rounding(WAN.run(pipe, num_inference_steps=2), stock)
        assert set(psa.stats().fallbacks) == {FLOAT32}
    torch._dynamo.reset()
